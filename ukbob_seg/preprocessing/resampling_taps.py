"""Which old voxels make up a new one, along one axis, and with which weights.

New voxel k of ``new`` lies at (k + 0.5) * old / new - 0.5 on the old axis of ``old`` voxels, clamped to its ends:
voxel centres, as in ``scipy.ndimage.zoom(grid_mode=True)``, ``skimage.transform.resize`` and nnU-Net.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

NEGLIGIBLE = 1e-8  # weights below this are dropped; a cubic spline's fall by a factor 3.7 per voxel
UNROLL = 4  # the kernels take this many spline weights at a time
Shape = Sequence[int]


class LinearTaps(NamedTuple):
    """Two neighbours of each new voxel.

    Attributes:
        low: (new,) int64, the lower neighbour.
        high: (new,) int64, the upper one.
        part: (new,) int64, weight of the upper neighbour in units of 1 / whole, exact.
        whole: what the two weights add up to.
    """

    low: np.ndarray
    high: np.ndarray
    part: np.ndarray
    whole: int

    @property
    def weight(self) -> np.ndarray:
        """(new,) float32 weight of the upper neighbour."""
        return (self.part / self.whole).astype(np.float32)

    def part_of(self, start: int, stop: int, first: int = 0) -> LinearTaps:
        """Of some new voxels; neighbours are counted from the old voxel ``first``."""
        low, high, part = (values[start:stop] for values in (self.low, self.high, self.part))
        return LinearTaps(low - first, high - first, part, self.whole)


class PlaneRange(NamedTuple):
    """Some planes of a resampled volume, to be made from some rows of the old one.

    Attributes:
        start: first new plane wanted.
        stop: one past the last.
        first_row: old plane that the rows at hand begin with.
        rows: old planes of the whole volume; None where all are at hand.
    """

    start: int
    stop: int
    first_row: int = 0
    rows: int | None = None


@functools.lru_cache(maxsize=64)
def linear_taps(old: int, new: int, nearest: bool = False) -> LinearTaps:
    """Neighbours and weights of linear interpolation, or the nearest voxel alone with all of the weight.

    Weights are kept as integers so that equal votes are recognised as equal whatever the shapes.
    """
    if nearest:
        index = nearest_voxels(old, new)
        return LinearTaps(index, index, np.zeros(new, dtype=np.int64), 1)
    whole = 2 * new
    position = (2 * np.arange(new, dtype=np.int64) + 1) * old - new  # in units of 1 / whole
    position = np.clip(position, 0, (old - 1) * whole)
    low = position // whole
    return LinearTaps(low, np.minimum(low + 1, old - 1), position % whole, whole)


def nearest_voxels(old: int, new: int) -> np.ndarray:
    """(new,) int64 index of the nearest old voxel of each new one; halfway goes up, as scipy rounds."""
    position = (np.arange(new) + 0.5) * (old / new) - 0.5
    return np.clip(np.floor(position + 0.5), 0, old - 1).astype(np.int64)


class SplineTaps(NamedTuple):
    """Weights of image interpolation, prefilters included.

    Attributes:
        first: (new,) int64, first old voxel that contributes.
        weights: (new, taps) float32, of ``taps`` old voxels from there on; a single tap has weight 1.
    """

    first: np.ndarray
    weights: np.ndarray


@functools.lru_cache(maxsize=64)
def spline_taps(old: int, new: int, order: int, anti_alias: bool = False) -> SplineTaps:
    """Interpolation by splines as a banded matrix.

    The matrix is what scipy's own zoom gives for the unit vectors, so that boundaries and prefilter are scipy's.

    Args:
        old: voxels along the axis.
        new: voxels wanted.
        order: of the spline, 0 (nearest) to 5.
        anti_alias: where the axis shrinks, blur it first as ``skimage.transform.resize(anti_aliasing=True)`` does: a
            Gaussian of sigma (old / new - 1) / 2 voxels. It is linear too and becomes part of the matrix.
    """
    blurred = anti_alias and old > new
    if old == 1 or (order == 0 and not blurred):
        return SplineTaps(nearest_voxels(old, new), np.ones((new, 1), dtype=np.float32))
    identity = np.eye(old)
    if order == 0:
        matrix = identity[nearest_voxels(old, new)]
    else:
        matrix = ndimage.zoom(identity, (new / old, 1), order=order, mode="nearest", grid_mode=True)
    if blurred:
        matrix = matrix @ ndimage.gaussian_filter1d(identity, (old / new - 1) / 2, axis=0, mode="nearest")
    return _banded(matrix)


def _banded(matrix: np.ndarray) -> SplineTaps:
    """The entries of a (new, old) matrix that matter."""
    old = matrix.shape[1]
    matters = np.abs(matrix) > NEGLIGIBLE
    first = matters.argmax(axis=1)
    last = old - 1 - matters[:, ::-1].argmax(axis=1)
    taps = min(-(-int((last - first).max() + 1) // UNROLL) * UNROLL, old)
    first = np.minimum(first, old - taps)
    weights = np.take_along_axis(matrix, first[:, None] + np.arange(taps), axis=1)
    return SplineTaps(first.astype(np.int64), np.ascontiguousarray(weights, dtype=np.float32))


class ImageOptions(NamedTuple):
    """How images are interpolated; see ``resampling.resample_image``."""

    order: int = 3
    coarse_axis: int | None = None
    coarse_order: int = 0
    anti_alias: bool = False


def image_taps(old_shape: Shape, new_shape: Shape, options: ImageOptions) -> list[tuple[int, SplineTaps]]:
    """The passes that resample an image: (axis, taps) of every axis that changes, in the order of application.

    Raises:
        ValueError: a shape, order or axis that cannot be.
    """
    shape = checked_shape(old_shape, new_shape, options.coarse_axis)
    if options.order not in range(6):
        raise ValueError(f"order must be 0 to 5, got {options.order}")
    if options.coarse_order not in (0, 1):
        raise ValueError(f"coarse_order must be 0 (nearest) or 1 (linear), got {options.coarse_order}")
    passes = []
    # Shrinking axes first keeps the later passes small.
    for axis in sorted(range(3), key=lambda a: shape[a] / old_shape[a]):
        order = options.coarse_order if axis == options.coarse_axis else options.order
        if old_shape[axis] != shape[axis]:
            passes.append((axis, spline_taps(old_shape[axis], shape[axis], order, options.anti_alias)))
    return passes


def voting_taps(old_shape: Shape, shape: Shape, nearest_axis: int | None) -> list[LinearTaps]:
    """Two neighbours along each axis, for labels and logits."""
    return [linear_taps(old_shape[axis], shape[axis], axis == nearest_axis) for axis in range(3)]


def plane_taps(
    held: Shape, new_shape: Shape, nearest_axis: int | None, planes: PlaneRange | None = None
) -> list[LinearTaps]:
    """The same for some new planes, counted within the old voxels at hand.

    Args:
        held: voxels (z, y, x) at hand.
        new_shape: of the whole new volume.
        nearest_axis: axis along which only the nearest voxel counts.
        planes: which new planes, and which old ones are at hand; None for all.

    Raises:
        ValueError: planes outside the volume, rows that are not at hand, or a shape or axis that cannot be.
    """
    old_shape = held if planes is None or planes.rows is None else (planes.rows, *held[1:])
    shape = checked_shape(old_shape, new_shape, nearest_axis)
    z, y, x = voting_taps(old_shape, shape, nearest_axis)
    if planes is None:
        return [z, y, x]
    if not 0 <= planes.start <= planes.stop <= shape[0]:
        raise ValueError(f"planes {planes.start} to {planes.stop} are not within the {shape[0]} of the volume")
    z = z.part_of(planes.start, planes.stop, planes.first_row)
    if len(z.low) and (z.low[0] < 0 or z.high[-1] >= held[0]):
        first, last = z.low[0] + planes.first_row, z.high[-1] + planes.first_row
        raise ValueError(
            f"planes {planes.start} to {planes.stop} need rows {first} to {last}, at hand are {planes.first_row} to "
            f"{planes.first_row + held[0] - 1}"
        )
    return [z, y, x]


def checked_shape(old_shape: Shape, new_shape: Shape, axis: int | None) -> tuple[int, int, int]:
    """The new shape as three integers.

    Raises:
        ValueError: not three axes, an empty one, or an axis that does not exist.
    """
    shape = tuple(int(n) for n in new_shape)
    if len(old_shape) != 3 or len(shape) != 3 or min(*old_shape, *shape) < 1:
        raise ValueError(f"shapes must have three axes of at least one voxel, got {tuple(old_shape)} to {shape}")
    if axis not in (None, 0, 1, 2):
        raise ValueError(f"the coarse axis must be 0, 1, 2 or None, got {axis}")
    return shape[0], shape[1], shape[2]
