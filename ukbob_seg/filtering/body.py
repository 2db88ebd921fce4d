"""How large the body is: the yardstick of the normalized volume."""

from __future__ import annotations

import numpy as np
from numba import njit

from ukbob_seg.errors import DatasetError
from ukbob_seg.filtering.components import Runs, connect, gaps_between, largest_part, runs_above

BODY_IMAGE = "image"
BODY_UNION = "union"
BODY_MASK = "mask"
_BINS = 256


def body_kind(source: str) -> str:
    """``image`` or ``union``; anything else is a folder: ``mask``."""
    return source if source in (BODY_IMAGE, BODY_UNION) else BODY_MASK


def body_mask(image: np.ndarray) -> np.ndarray:
    """Foreground of an image: Otsu threshold, largest component (6 neighbours), holes filled in 3D.

    Args:
        image: (Z, Y, X) one channel, any real dtype, finite.

    Returns:
        (Z, Y, X) bool. A cavity that is open to the border of the volume is no hole. Of components of equal size the
        first in array order is the body.

    Raises:
        DatasetError: the image is constant, not 3D, or holds NaN or infinite voxels.

    Reference: Otsu, IEEE Trans. SMC 9(1), 1979.
    """
    gaps, is_open = _outside(image)
    return ~gaps.paint(is_open)


def body_voxels(image: np.ndarray) -> int:
    """Number of voxels of ``body_mask(image)``; never holds a mask of the image's size."""
    gaps, is_open = _outside(image)
    return int(image.size - gaps.voxels[is_open].sum())


def otsu_threshold(image: np.ndarray) -> float:
    """The middle of that one of 256 equal bins which separates dark and bright voxels best.

    Args:
        image: (Z, Y, X) any real dtype.

    Raises:
        DatasetError: the image is constant, or holds NaN or infinite voxels.
    """
    if image.dtype in (np.uint8, np.int8, np.uint16, np.int16):
        low, high, counts = _histogram_of_values(image)
    else:
        low, high = _range(image)
        if not np.isfinite(high - low):
            raise DatasetError("the image has NaN or infinite voxels")
        counts = np.zeros(_BINS, dtype=np.int64)
        if high > low:
            _histogram(image, low, _BINS / (high - low), counts)
    if low == high:
        raise DatasetError("the image is constant: it has no foreground to measure the body by")
    width = (high - low) / _BINS
    centres = low + (np.arange(_BINS) + 0.5) * width
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    sums = counts * centres
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_below = np.cumsum(sums) / below
        mean_above = np.cumsum(sums[::-1])[::-1] / above
    between = below[:-1].astype(np.float64) * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    return float(centres[int(np.nanargmax(between))])


def _histogram_of_values(image: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(smallest, largest, counts per bin) of an image of small integers, from one pass that counts every value."""
    lowest = int(np.iinfo(image.dtype).min)
    table = np.zeros(np.iinfo(image.dtype).max - lowest + 1, dtype=np.int64)
    _count_values(image, lowest, table)
    present = np.flatnonzero(table)
    low, high = float(present[0] + lowest), float(present[-1] + lowest)
    scale = _BINS / max(high - low, 1.0)
    bins = np.minimum(((present + lowest - low) * scale).astype(np.int64), _BINS - 1)
    return low, high, np.bincount(bins, weights=table[present], minlength=_BINS).astype(np.int64)


def _outside(image: np.ndarray) -> tuple[Runs, np.ndarray]:
    """Runs of everything around the largest bright component, and which of them are open to the border."""
    if image.ndim != 3:
        raise DatasetError(f"a body mask needs a (Z, Y, X) image, got shape {image.shape}")
    if image.size == 0:
        raise DatasetError("the image is empty")
    if image.dtype.kind not in "iuf" or image.dtype == np.float16 or not image.dtype.isnative:
        image = image.astype(np.float32)
    gaps = _around_largest(image)
    root = connect(gaps, diagonal=False)
    depth, height, width = image.shape
    z, y = np.divmod(np.arange(depth * height), height)
    border_line = (z == 0) | (z == depth - 1) | (y == 0) | (y == height - 1)
    at_border = np.repeat(border_line, np.diff(gaps.first)) | (gaps.start == 0) | (gaps.stop == width)
    is_open = np.zeros(len(root), dtype=bool)
    is_open[root[at_border]] = True
    return gaps, is_open[root]


def _around_largest(image: np.ndarray) -> Runs:
    """Runs of everything that is not the largest bright component."""
    bright = runs_above(image, otsu_threshold(image))
    root = connect(bright, diagonal=False)
    return gaps_between(bright, root == largest_part(bright, root))


@njit(cache=True, nogil=True)
def _range(image):  # type: ignore[no-untyped-def]
    """(smallest, largest) as float64; a NaN anywhere makes both NaN."""
    low, high = np.float64(image[0, 0, 0]), np.float64(image[0, 0, 0])
    depth, height, width = image.shape
    for z in range(depth):
        for y in range(height):
            row = image[z, y]
            for x in range(width):
                value = row[x]
                if value != value:
                    return np.nan, np.nan
                if value < low:
                    low = np.float64(value)
                if value > high:
                    high = np.float64(value)
    return low, high


@njit(cache=True, nogil=True)
def _count_values(image, lowest, table):  # type: ignore[no-untyped-def]
    depth, height, width = image.shape
    for z in range(depth):
        for y in range(height):
            row = image[z, y]
            for x in range(width):
                table[np.int64(row[x]) - lowest] += 1


@njit(cache=True, nogil=True)
def _histogram(image, low, scale, counts):  # type: ignore[no-untyped-def]
    depth, height, width = image.shape
    last = len(counts) - 1
    for z in range(depth):
        for y in range(height):
            row = image[z, y]
            for x in range(width):
                counts[min(int((row[x] - low) * scale), last)] += 1
