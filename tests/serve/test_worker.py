"""Which cores a rank keeps to."""

from __future__ import annotations

from triaxial.serve.worker import own_cores


def test_ranks_that_take_all_cores_have_their_own() -> None:
    assert [own_cores([2, 3, 6, 7], rank, 2, 2) for rank in range(2)] == [[2, 3], [6, 7]]
    assert [own_cores([0, 1], rank, 2, 1) for rank in range(2)] == [[0], [1]]


def test_other_ranks_go_where_there_is_room() -> None:
    assert own_cores([0, 1], 0, 1, 1) == [0, 1]
    assert own_cores([0, 1], 3, 4, 1) == [0, 1]
