"""The order of samples: a keyed pseudo-random permutation that is computed, not stored.

A shuffled list costs memory and has to be rebuilt on resuming. A permutation *function* gives any step's samples in
O(batch), on any number of hosts: a Feistel network (Luby and Rackoff, 1988) permutes a power of two, and cycle walking
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002) narrows it to [0, n).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

# Below 2**6 values a Feistel network has too few round functions to look random; cycle walking makes up the rest.
MIN_HALF_BITS = 3


def sample_indices(step: int, global_batch: int, num_samples: int, seed: int) -> NDArray[np.int64]:
    """Samples of one optimizer step: every sample exactly once an epoch, each epoch in its own order.

    Args:
        step: optimizer step, from 0.
        global_batch: samples of one step over all data-parallel ranks.
        num_samples: samples of one epoch.
        seed: fixes the order, together with the epoch.

    Returns:
        [global_batch] indices into [0, num_samples). A batch may end one epoch and begin the next.
    """
    position = step * global_batch + np.arange(global_batch, dtype=np.int64)
    epochs = position // num_samples
    order = np.empty(global_batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        order[here] = permute(position[here] % num_samples, num_samples, round_keys(seed, int(epoch)))
    return order


def round_keys(seed: int, epoch: int) -> Words:
    """[8] keys, one a Feistel round, that depend on every bit of seed and epoch."""
    digest = hashlib.blake2b(f"triaxial sample order, seed {seed}, epoch {epoch}".encode()).digest()
    return np.frombuffer(digest, dtype="<u8")


def permute(index: NDArray[np.int64], n: int, keys: Words) -> NDArray[np.int64]:
    """Apply the bijection of [0, n) that the keys choose to each index. Shapes: [m] to [m]."""
    half_bits = max(MIN_HALF_BITS, ((n - 1).bit_length() + 1) // 2)
    value = _feistel(index.astype(np.uint64), half_bits, keys)
    while (outside := value >= n).any():
        value[outside] = _feistel(value[outside], half_bits, keys)
    return value.astype(np.int64)


def _feistel(value: Words, half_bits: int, keys: Words) -> Words:
    """A permutation of [0, 4**half_bits)."""
    bits = np.uint64(half_bits)
    left, right = value >> bits, value & np.uint64((1 << half_bits) - 1)
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) >> (np.uint64(64) - bits))
    return (left << bits) | right


def _mix(word: Words) -> Words:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014): every output bit depends on every input bit."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
