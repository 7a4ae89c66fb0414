"""What limits a decoding step on a CPU, in C++: matrix products, attention, and the small operations in between.

torch takes several small operations for what is one here, and every one of them comes back to a cache that the weights
have been pushed through; its products do not ask for the weights ahead. There are kernels where a compiler was there at
installation, for one thread of a CPU with AVX-512 (products: with AMX); everything else is left to torch.
"""
