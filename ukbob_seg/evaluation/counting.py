"""One pass over a pair of label maps: every class's voxels, their overlap with every other class, and its box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

MOST_VALUE = 65535


class PairCounts(NamedTuple):
    """What is known of two label maps of K classes after one pass; class k (from 1) is the k-th value asked for.

    Attributes:
        predicted: (Z, Y, X) uint8 or uint16, class of every voxel, 0 for any other value.
        true: the same of the reference.
        joint: (K + 1, K + 1) voxels by class in the prediction (first) and in the reference.
        boxes: (2, K + 1, 3, 2) first voxel and one past the last (z, y, x), of the prediction and of the reference;
            a class that is not there has its first beyond its last.
    """

    predicted: np.ndarray
    true: np.ndarray
    joint: np.ndarray
    boxes: np.ndarray

    def joint_box(self, classes: Sequence[int]) -> tuple[slice, slice, slice]:
        """The smallest box around some classes of both maps, at least one of which must be there."""
        first = self.boxes[:, list(classes), :, 0].min(axis=(0, 1))
        last = self.boxes[:, list(classes), :, 1].max(axis=(0, 1))
        z, y, x = (slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
        return z, y, x


def count_pair(
    prediction: np.ndarray, reference: np.ndarray, values: Sequence[int], ignore_value: int | None = None
) -> PairCounts:
    """Count two label maps.

    Args:
        prediction: (Z, Y, X) integers or bool.
        reference: the same shape.
        values: of the classes, distinct, in 0..65535; all other values count as background.
        ignore_value: where the reference has it, both maps are background.
    """
    size = len(values) + 1
    table = np.zeros(MOST_VALUE + 1, dtype=np.uint8 if size <= 256 else np.uint16)
    table[list(values)] = np.arange(1, size)
    predicted, true = (np.empty(prediction.shape, dtype=table.dtype) for _ in range(2))
    joint = np.zeros((size, size), dtype=np.int64)
    boxes = np.empty((2, size, 3, 2), dtype=np.int64)
    boxes[..., 0], boxes[..., 1] = np.iinfo(np.int64).max, 0
    ignored = (ignore_value is not None, ignore_value or 0)  # a flag, since any value may occur
    _count(_countable(prediction), _countable(reference), table, ignored, predicted, true, joint, boxes)
    return PairCounts(predicted, true, joint, boxes)


def _countable(labels: np.ndarray) -> np.ndarray:
    """In one of the types that the kernel is compiled for, and in array order; usually as it is."""
    if labels.dtype == np.bool_:
        labels = labels.view(np.uint8)
    wanted = labels.dtype.newbyteorder("=")
    if wanted not in (np.uint8, np.uint16):
        # Unsigned 64-bit values beyond the signed range turn negative, which is background like all unknown values.
        wanted = np.dtype(np.int64)
    return np.ascontiguousarray(labels, dtype=wanted)


@njit(cache=True, nogil=True)
def _count(prediction, reference, table, ignored, predicted, true, joint, boxes):  # type: ignore[no-untyped-def]
    """Fill the last four arrays. Labels lie in runs, so all but the look-up happens once per run."""
    depth, height, width = prediction.shape
    ignores, ignore_value = ignored
    known = table.size
    for z in range(depth):
        for y in range(height):
            run_start, run_p, run_r = 0, 0, 0
            for x in range(width):
                value_p, value_r = np.int64(prediction[z, y, x]), np.int64(reference[z, y, x])
                p = table[value_p] if 0 <= value_p < known else table.dtype.type(0)
                r = table[value_r] if 0 <= value_r < known else table.dtype.type(0)
                if ignores and value_r == ignore_value:
                    p = r = table.dtype.type(0)
                predicted[z, y, x], true[z, y, x] = p, r
                if p != run_p or r != run_r:
                    _end_run(joint, boxes, run_p, run_r, z, y, run_start, x)
                    run_start, run_p, run_r = x, p, r
            _end_run(joint, boxes, run_p, run_r, z, y, run_start, width)


@njit(cache=True, nogil=True)
def _end_run(joint, boxes, p, r, z, y, start, stop):  # type: ignore[no-untyped-def]
    if stop == start:
        return
    joint[p, r] += stop - start
    if p:
        _grow(boxes[0, p], z, y, start, stop)
    if r:
        _grow(boxes[1, r], z, y, start, stop)


@njit(cache=True, nogil=True)
def _grow(box, z, y, start, stop):  # type: ignore[no-untyped-def]
    box[0, 0], box[0, 1] = min(box[0, 0], z), max(box[0, 1], z + 1)
    box[1, 0], box[1, 1] = min(box[1, 0], y), max(box[1, 1], y + 1)
    box[2, 0], box[2, 1] = min(box[2, 0], start), max(box[2, 1], stop)
