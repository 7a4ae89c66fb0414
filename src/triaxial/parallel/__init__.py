"""The axes in PyTorch: one file an axis, and the mesh that names them."""
