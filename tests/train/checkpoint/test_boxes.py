"""A flat run of a tensor is cut into boxes that hold its elements in order, and boxes meet as their elements do."""

from __future__ import annotations

import numpy as np
import pytest

from triaxial.train.checkpoint.boxes import (
    common,
    from_text,
    in_blocks,
    inside,
    run_of_boxes,
    shape_of,
    shift,
    to_text,
    volume,
)


@pytest.mark.parametrize("shape", [(6,), (3, 4), (1, 5), (5, 1), (2, 3, 4)])
def test_boxes_of_every_run_hold_its_elements_in_order(shape: tuple[int, ...]) -> None:
    elements = np.arange(np.prod(shape)).reshape(shape)
    for first in range(elements.size):
        for last in range(first + 1, elements.size + 1):
            boxes = list(run_of_boxes(shape, first, last))
            found = [elements[tuple(slice(*span) for span in box)].ravel() for box in boxes]
            assert np.concatenate(found).tolist() == list(range(first, last))
            assert [volume(box) for box in boxes] == [part.size for part in found]
            assert len(boxes) <= 2 * len(shape) - 1


def test_what_two_boxes_share() -> None:
    a, b = ((0, 4), (2, 6)), ((2, 8), (0, 3))
    assert common(a, b) == common(b, a) == ((2, 4), (2, 3))
    assert inside(((2, 4), (2, 3)), a) == (slice(2, 4), slice(0, 1))
    assert common(a, ((4, 5), (2, 6))) is None
    assert shift(a, 1, 10) == ((0, 4), (12, 16))
    assert shape_of(a) == (4, 4)


def test_blocks_of_rows_cover_a_box_and_stay_small() -> None:
    box = ((3, 13), (2, 9))
    blocks = list(in_blocks(box, 21))
    assert blocks == [((start, min(start + 3, 13)), (2, 9)) for start in range(3, 13, 3)]
    assert list(in_blocks(box, 1)) == [((row, row + 1), (2, 9)) for row in range(3, 13)]


def test_names_of_parts_can_be_read_back() -> None:
    assert to_text("a.b.weight", ((0, 32), (16, 48))) == "a.b.weight[0:32,16:48]"
    assert from_text("a.b.weight[0:32,16:48]") == ("a.b.weight", ((0, 32), (16, 48)))
    for wrong in ("a", "a[1]", "[0:1]", "a[0:1"):
        with pytest.raises(ValueError, match="names no part"):
            from_text(wrong)
