"""Which old voxels make up a new one, along one axis, and with which weights.

New voxel k of ``new`` lies at (k + 0.5) * old / new - 0.5 on the old axis of ``old`` voxels, clamped to its ends:
voxel centres, as in ``scipy.ndimage.zoom(grid_mode=True)``, ``skimage.transform.resize`` and nnU-Net.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from scipy import ndimage

NEGLIGIBLE = 1e-8  # weights below this are dropped; a cubic spline's fall by a factor 3.7 per voxel
UNROLL = 4  # the kernels take this many spline weights at a time


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
    """Weights of spline interpolation, prefilter included.

    Attributes:
        first: (new,) int64, first old voxel that contributes.
        weights: (new, taps) float32, of ``taps`` old voxels from there on.
    """

    first: np.ndarray
    weights: np.ndarray


@functools.lru_cache(maxsize=64)
def spline_taps(old: int, new: int, order: int) -> SplineTaps:
    """Spline interpolation as a banded matrix.

    The matrix is what scipy's own zoom gives for the unit vectors, so that boundaries and prefilter are scipy's.
    """
    if old == 1:
        return SplineTaps(np.zeros(new, dtype=np.int64), np.ones((new, 1), dtype=np.float32))
    matrix = ndimage.zoom(np.eye(old), (new / old, 1), order=order, mode="nearest", grid_mode=True)
    matters = np.abs(matrix) > NEGLIGIBLE
    first = matters.argmax(axis=1)
    last = old - 1 - matters[:, ::-1].argmax(axis=1)
    taps = min(-(-int((last - first).max() + 1) // UNROLL) * UNROLL, old)
    first = np.minimum(first, old - taps)
    weights = np.take_along_axis(matrix, first[:, None] + np.arange(taps), axis=1)
    return SplineTaps(first.astype(np.int64), np.ascontiguousarray(weights, dtype=np.float32))
