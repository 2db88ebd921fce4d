"""Exact distances between the boundaries of two objects, compiled; the array's border counts as boundary.

A distance transform in three passes, one per axis, of which the last is done only at the boundary voxels that ask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

_PREDICTED, _TRUE = 1, 2  # bits of a voxel that is in the boundary of one or both objects
_NONE = 2**31 - 1  # no boundary voxel in this row


def boundary_voxels(mask: np.ndarray) -> np.ndarray:
    """Voxels of an object that have a face neighbour outside it; the array's border counts as outside.

    Args:
        mask: (Z, Y, X) bool.

    Returns:
        (Z, Y, X) bool, a subset of ``mask``; empty for an empty mask.
    """
    classes = np.ascontiguousarray(mask).view(np.uint8)
    return _boundaries(classes, classes, np.array([False, True])) > 0


def boundary_distances(
    predicted: np.ndarray, true: np.ndarray, members: Sequence[int], spacing_mm: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distance from every boundary voxel of each object to the nearest boundary voxel of the other.

    Args:
        predicted: (Z, Y, X) uint8 or uint16, class of every voxel; a box that holds the whole object.
        true: the same of the reference.
        members: classes whose union is the object, present in both maps.
        spacing_mm: voxel size (z, y, x).

    Returns:
        (distances from the prediction, distances from the reference) float64 in mm, centre to centre, exact but for
        rounding; each in array order.

    Reference: Felzenszwalb and Huttenlocher, Distance transforms of sampled functions, 2012 (lower envelopes).
    """
    wanted = np.zeros(max(members) + 1, dtype=np.bool_)
    wanted[list(members)] = True
    codes = _boundaries(np.ascontiguousarray(predicted), np.ascontiguousarray(true), wanted)
    step = tuple(float(mm) for mm in spacing_mm)
    return _distances(codes, _PREDICTED, _TRUE, step), _distances(codes, _TRUE, _PREDICTED, step)


@njit(cache=True, nogil=True)
def _boundaries(predicted, true, wanted):  # type: ignore[no-untyped-def]
    """(Z, Y, X) uint8: bit 1 where the prediction's object has its boundary, bit 2 where the reference's has."""
    depth, height, width = predicted.shape
    inside = np.zeros((depth + 2, height + 2, width + 2), np.uint8)
    most = wanted.size
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                code = 0
                if predicted[z, y, x] < most and wanted[predicted[z, y, x]]:
                    code |= 1
                if true[z, y, x] < most and wanted[true[z, y, x]]:
                    code |= 2
                inside[z + 1, y + 1, x + 1] = code
    codes = np.empty((depth, height, width), np.uint8)
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                surrounded = inside[z, y + 1, x + 1] & inside[z + 2, y + 1, x + 1]
                surrounded &= inside[z + 1, y, x + 1] & inside[z + 1, y + 2, x + 1]
                surrounded &= inside[z + 1, y + 1, x] & inside[z + 1, y + 1, x + 2]
                codes[z, y, x] = inside[z + 1, y + 1, x + 1] & ~surrounded
    return codes


@njit(cache=True, nogil=True)
def _distances(codes, origin, target, step_mm):  # type: ignore[no-untyped-def]
    """(boundary voxels of ``origin``,) float64 mm to the nearest one of ``target``."""
    depth, height, width = codes.shape
    squared = np.empty((depth, height, width), np.float64)
    in_row = np.empty((height, width), np.int32)
    columns, bounds = np.empty(height, np.int64), np.empty(height, np.float64)
    asking = 0
    for z in range(depth):
        found = False
        for y in range(height):
            found |= _along_row(codes[z, y], target, in_row[y])
            for x in range(width):
                asking += (codes[z, y, x] & origin) != 0
        if found:
            for x in range(width):
                _along_column(in_row[:, x], step_mm[1], step_mm[2], squared[z, :, x], columns, bounds)
        else:
            squared[z] = np.inf
    distances = np.empty(asking, np.float64)
    at = 0
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                if codes[z, y, x] & origin:
                    distances[at] = np.sqrt(_across_planes(squared, z, y, x, step_mm[0]))
                    at += 1
    return distances


@njit(cache=True, nogil=True)
def _along_row(codes, target, nearest):  # type: ignore[no-untyped-def]
    """Voxels to the nearest target in the row; whether there is one."""
    width = codes.size
    last = -1
    for x in range(width):
        if codes[x] & target:
            last = x
        nearest[x] = x - last if last >= 0 else _NONE
    if last < 0:
        return False
    last = -1
    for x in range(width - 1, -1, -1):
        if codes[x] & target:
            last = x
        if last >= 0 and last - x < nearest[x]:
            nearest[x] = last - x
    return True


@njit(cache=True, nogil=True)
def _along_column(in_row, step_y, step_x, squared, apexes, bounds):  # type: ignore[no-untyped-def]
    """Squared mm to the nearest target in the plane, from the distances within the rows: the lower envelope of the
    parabolas over a column. ``apexes`` and ``bounds`` are working space: whose parabola is lowest, and from where."""
    height = in_row.size
    count = 0
    for y in range(height):
        if in_row[y] == _NONE:
            continue
        here = (in_row[y] * step_x) ** 2
        start = -np.inf
        while count:
            apex = apexes[count - 1]
            there = (in_row[apex] * step_x) ** 2
            # Where the two parabolas meet, in voxels.
            start = ((here - there) / step_y**2 + y * y - apex * apex) / (2.0 * (y - apex))
            if start > bounds[count - 1]:
                break
            count -= 1
            start = -np.inf
        apexes[count] = y
        bounds[count] = start
        count += 1
    if not count:
        for y in range(height):
            squared[y] = np.inf
        return
    k = 0
    for y in range(height):
        while k + 1 < count and bounds[k + 1] < y:
            k += 1
        squared[y] = ((y - apexes[k]) * step_y) ** 2 + (in_row[apexes[k]] * step_x) ** 2


@njit(cache=True, nogil=True)
def _across_planes(squared, z, y, x, step_z):  # type: ignore[no-untyped-def]
    """The smallest squared distance over all planes, looking outwards until no plane can be nearer."""
    depth = squared.shape[0]
    best = squared[z, y, x]
    for k in range(1, max(z + 1, depth - z)):
        away = (k * step_z) ** 2
        if away >= best:
            break
        if z >= k:
            best = min(best, away + squared[z - k, y, x])
        if z + k < depth:
            best = min(best, away + squared[z + k, y, x])
    return best
