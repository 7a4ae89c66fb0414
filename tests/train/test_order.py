"""The order of samples is a permutation an epoch, and any step's part of it is computable alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triaxial.train.order import permute, round_keys, sample_indices


def order(n: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return [int(index) for index in permute(np.arange(n), n, round_keys(seed, epoch))]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 101, 256, 257, 1009, 4096, 10_007])
def test_permute_is_a_bijection(n: int) -> None:
    assert sorted(order(n)) == list(range(n))


@given(n=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
def test_permute_is_a_bijection_for_any_size_and_key(n: int, seed: int, epoch: int) -> None:
    assert sorted(order(n, seed, epoch)) == list(range(n))


@given(n=st.integers(1, 2**62), seed=st.integers(), data=st.data())
def test_permute_stays_in_range_and_apart_for_huge_sizes(n: int, seed: int, data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=20))
    image = permute(np.array(index, dtype=np.int64), n, round_keys(seed, 0))
    assert all(0 <= value < n for value in image)
    assert len(set(image.tolist())) == len(index)


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(order(100, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_order_is_pinned() -> None:
    """A run resumed under a later version must go on with the same samples."""
    assert order(10, seed=1, epoch=2) == [0, 2, 5, 7, 6, 3, 9, 4, 1, 8]


@pytest.mark.parametrize("n", [3, 10, 97])
def test_every_sample_is_equally_likely_in_every_place(n: int) -> None:
    """Chi-square of the value in the first, a middle and the last place over many seeds, at five standard deviations."""
    keys, trials = [round_keys(seed, 0) for seed in range(1500)], 1500
    for place in {0, n // 2, n - 1}:
        counts = np.bincount([permute(np.array([place]), n, key)[0] for key in keys], minlength=n)
        chi_square = ((counts - trials / n) ** 2 / (trials / n)).sum()
        assert chi_square < (n - 1) + 5 * np.sqrt(2 * (n - 1))


def test_neighbours_are_scattered() -> None:
    """The mean distance between samples that follow each other is that of a random order, n / 3."""
    n = 100_003
    distance = np.abs(np.diff(order(n))).mean()
    assert distance == pytest.approx(n / 3, rel=0.02)


@given(
    num_samples=st.integers(1, 50), global_batch=st.integers(1, 60), seed=st.integers(0, 5), epochs=st.integers(1, 4)
)
def test_every_sample_is_seen_once_an_epoch(num_samples: int, global_batch: int, seed: int, epochs: int) -> None:
    steps = -(-epochs * num_samples // global_batch)
    seen = np.concatenate([sample_indices(step, global_batch, num_samples, seed) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(seen[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@given(step=st.integers(0, 10**9), parts=st.sampled_from([1, 2, 4, 8]))
def test_the_same_samples_whatever_the_batch_is_cut_into(step: int, parts: int) -> None:
    whole = sample_indices(step, 8, 1000, seed=3)
    pieces = [sample_indices(step * parts + part, 8 // parts, 1000, seed=3) for part in range(parts)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


def test_shape_and_type() -> None:
    indices = sample_indices(5, 7, 11, seed=0)
    assert indices.shape == (7,)
    assert indices.dtype == np.int64
