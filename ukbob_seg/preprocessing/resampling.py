"""Resampling of images, label maps and logits; shapes are (z, y, x).

All of them share one map of coordinates, that of scipy's ``zoom(grid_mode=True)`` and nnU-Net (``resampling_taps``).
Large arrays are shared between as many threads as numba is allowed (NUMBA_NUM_THREADS; one inside worker processes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from ukbob_seg.preprocessing import resampling_kernels as kernels
from ukbob_seg.preprocessing.resampling_taps import (
    ImageOptions,
    LinearTaps,
    PlaneRange,
    Shape,
    SplineTaps,
    checked_shape,
    image_taps,
    plane_taps,
    voting_taps,
)

SMALL = 1 << 18  # arrays with fewer values than this are not worth a second thread
PLANES_AT_ONCE = 8  # output planes for which logits are brought to contiguous float32 together


def resample_image(
    image: np.ndarray,
    new_shape: Shape,
    order: int = 3,
    coarse_axis: int | None = None,
    coarse_order: int = 0,
    anti_alias: bool = False,
) -> np.ndarray:
    """Resample every channel by spline interpolation, equal to ``scipy.ndimage.zoom(mode="nearest", grid_mode=True)``.

    Splines are separable and linear: each axis is one banded matrix whose entries scipy computes.

    Args:
        image: (C, Z, Y, X), any real type and memory order; finite (a NaN spreads to its neighbourhood).
        new_shape: voxels (z, y, x) wanted.
        order: spline order, 0 (nearest) to 5.
        coarse_axis: axis that is interpolated by ``coarse_order`` instead (nnU-Net's way with anisotropic images).
        coarse_order: along that axis, 0 (nearest voxels) or 1 (linear).
        anti_alias: blur axes that shrink first, by the Gaussian of ``skimage.transform.resize(anti_aliasing=True)``:
            sigma (old / new - 1) / 2 voxels, borders repeated. It costs no pass of its own.

    Returns:
        (C, *new_shape) float32, never a view of ``image``.

    Raises:
        ValueError: not four axes, or a shape, order or axis that cannot be.
    """
    passes = image_taps(image.shape[1:], new_shape, ImageOptions(order, coarse_axis, coarse_order, anti_alias))
    result = np.array(image, dtype=np.float32, order="C")
    for axis, taps in passes:
        if taps.weights.shape[1] == 1:
            result = np.take(result, taps.first, axis=axis + 1)
        else:
            result = _spline_axis(result, taps, axis + 1)
    return result


def resample_labels(labels: np.ndarray, new_shape: Shape, nearest_axis: int | None = None) -> np.ndarray:
    """Resample a label map: the eight neighbours vote with their trilinear weights, the label with most votes wins.

    The same as resampling a one-hot map per label linearly and taking the argmax, in one pass, and without the holes
    that thresholding label by label leaves where three labels meet.

    Args:
        labels: (Z, Y, X), any integer type and memory order.
        new_shape: voxels (z, y, x) wanted.
        nearest_axis: axis along which only the nearest voxel counts.

    Returns:
        ``new_shape`` array of the same type (native byte order), never a view. Equal votes go to the label of the
        nearest voxel (of two equally near ones the upper, as scipy rounds), then to the lower value.

    Raises:
        ValueError: not three axes, or a shape or axis that cannot be.
    """
    shape = checked_shape(labels.shape, new_shape, nearest_axis)
    source = np.ascontiguousarray(labels, dtype=labels.dtype.newbyteorder("="))
    if source.shape == shape:
        return source.copy()
    z, y, x = voting_taps(source.shape, shape, nearest_axis)
    result = np.empty(shape, dtype=source.dtype)
    _share(lambda start, stop: kernels.vote_labels(source, z, y, x, result, start, stop), shape[0], result.size)
    return result


def logits_to_indices(
    logits: np.ndarray, new_shape: Shape, coarse_axis: int | None = None, planes: PlaneRange | None = None
) -> np.ndarray:
    """Interpolate class logits linearly and take the most probable class, one plane and one class at a time.

    Args:
        logits: (K, Z, Y, X) floating point, any memory order.
        new_shape: voxels (z, y, x) of the whole new volume.
        coarse_axis: axis along which only the nearest voxel counts.
        planes: which new planes to make, where ``logits`` are some rows of the volume; None for all from all.

    Returns:
        (planes, Y', X') class indices, uint8 (uint16 past 256 classes); equal logits go to the lower class.

    Raises:
        ValueError: not four axes, no class, or planes, a shape or an axis that cannot be.
    """
    kind = np.uint8 if len(logits) <= 256 else np.uint16
    return _decide(kernels.best_class, logits, new_shape, coarse_axis, kind, planes)


def logits_to_regions(
    logits: np.ndarray, new_shape: Shape, coarse_axis: int | None = None, planes: PlaneRange | None = None
) -> np.ndarray:
    """Interpolate region logits linearly and take the last region with a positive one.

    Args:
        logits: (R, Z, Y, X) floating point, any memory order.
        new_shape: voxels (z, y, x) of the whole new volume.
        coarse_axis: axis along which only the nearest voxel counts.
        planes: which new planes to make, where ``logits`` are some rows of the volume; None for all from all.

    Returns:
        (planes, Y', X'): 0 where no region is positive, else 1 + the index of the last positive region; uint8 (uint16
        past 255 regions).

    Raises:
        ValueError: not four axes, no region, or planes, a shape or an axis that cannot be.
    """
    kind = np.uint8 if len(logits) < 256 else np.uint16
    return _decide(kernels.last_positive, logits, new_shape, coarse_axis, kind, planes)


def resample_logits_planes(
    logits: np.ndarray, new_shape: Shape, planes: PlaneRange, coarse_axis: int | None = None
) -> np.ndarray:
    """The interpolated logits of some planes, bit for bit those that ``logits_to_indices`` compares.

    Args:
        logits: (K, Z, Y, X) floating point, any memory order.
        new_shape: voxels (z, y, x) of the whole resampled volume.
        planes: which of them, and which rows ``logits`` are.
        coarse_axis: axis along which only the nearest voxel counts.

    Returns:
        (K, planes, Y', X') float32.

    Raises:
        ValueError: planes outside the volume, not four axes, no class, or a shape or axis that cannot be.
    """
    z, y, x = _float_taps(plane_taps(logits.shape[1:], new_shape, coarse_axis, planes))
    result = np.empty((len(logits), *(len(low) for low, _, _ in (z, y, x))), dtype=np.float32)

    def work(start: int, stop: int) -> None:
        source, z_part = _planes_needed(logits, z, start, stop)
        kernels.interpolate_planes(source, z_part, y, x, result[:, start:stop], 0, stop - start)

    _share(work, result.shape[1], result.size, PLANES_AT_ONCE)
    return result


FloatTaps = tuple[np.ndarray, np.ndarray, np.ndarray]


def _float_taps(axes: Sequence[LinearTaps]) -> list[FloatTaps]:
    return [(taps.low, taps.high, taps.weight) for taps in axes]


def _spline_axis(array: np.ndarray, taps: SplineTaps, axis: int) -> np.ndarray:
    """Resample one axis (1, 2 or 3) of a contiguous float32 (C, Z, Y, X) array."""
    first, weights = taps
    old, new = array.shape[axis], len(first)
    result = np.empty((*array.shape[:axis], new, *array.shape[axis + 1 :]), dtype=np.float32)
    inner = int(np.prod(array.shape[axis + 1 :]))
    if inner == 1:
        lines, targets = array.reshape(-1, old), result.reshape(-1, new)
        groups = -(-len(lines) // kernels.LINES)
        _share(lambda a, b: kernels.spline_lines(lines, first, weights, targets, a, b), groups, result.size)
    else:
        rows, filtered = array.reshape(-1, old, inner), result.reshape(-1, new, inner)
        blocks = len(rows) * -(-inner // kernels.BLOCK)
        _share(lambda a, b: kernels.spline_rows(rows, first, weights, filtered, a, b), blocks, result.size)
    return result


def _decide(
    kernel: Callable[..., None],
    logits: np.ndarray,
    new_shape: Shape,
    coarse_axis: int | None,
    kind: type,
    planes: PlaneRange | None,
) -> np.ndarray:
    """Run a kernel that turns logits into one decision per voxel, a few planes at a time."""
    z, y, x = _float_taps(plane_taps(logits.shape[1:], new_shape, coarse_axis, planes))
    if not len(logits):
        raise ValueError("logits need at least one class")
    result: np.ndarray = np.empty([len(low) for low, _, _ in (z, y, x)], dtype=kind)

    def work(start: int, stop: int) -> None:
        source, z_part = _planes_needed(logits, z, start, stop)
        kernel(source, z_part, y, x, result[start:stop], 0, stop - start)

    _share(work, len(result), result.size * len(logits), PLANES_AT_ONCE)
    return result


def _planes_needed(logits: np.ndarray, z: FloatTaps, start: int, stop: int) -> tuple[np.ndarray, FloatTaps]:
    """Contiguous float32 logits for some output planes, and their z neighbours counted within them.

    Float32 logits in C order are passed on as they are; others are converted for these planes alone, so that half
    precision never exists twice as a whole.
    """
    low, high, weight = (part[start:stop] for part in z)
    if logits.dtype == np.float32 and logits.flags.c_contiguous:
        return logits, (low, high, weight)
    first = int(low[0])
    planes = np.ascontiguousarray(logits[:, first : int(high[-1]) + 1], dtype=np.float32)
    return planes, (low - first, high - first, weight)


def _share(work: Callable[[int, int], None], count: int, values: int, step: int | None = None) -> None:
    """Call ``work(start, stop)`` for pieces of ``range(count)``, in threads when there are many values to compute."""
    threads = numba.config.NUMBA_NUM_THREADS if values >= SMALL else 1  # type: ignore[attr-defined]
    step = step or max(1, -(-count // (4 * threads)) if threads > 1 else count)
    starts = range(0, count, step)
    stops = [min(start + step, count) for start in starts]
    if threads == 1 or len(starts) == 1:
        for start, stop in zip(starts, stops, strict=True):
            work(start, stop)
        return
    with ThreadPoolExecutor(min(threads, len(starts))) as pool:
        for _ in pool.map(work, starts, stops):
            pass  # consuming the results raises what a thread raised
