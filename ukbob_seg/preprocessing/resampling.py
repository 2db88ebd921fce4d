"""Resampling of images, label maps and logits.

All of them use the same map of coordinates, that of ``scipy.ndimage.zoom(grid_mode=True)``, ``skimage.resize`` and
nnU-Net: voxel centres, edges clamped. Shapes are (z, y, x).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numba import njit, prange
from scipy import ndimage

Shape = Sequence[int]
TIE = 1e-9  # votes closer than this are equal


def resample_image(image: np.ndarray, new_shape: Shape, order: int = 3, coarse_axis: int | None = None) -> np.ndarray:
    """Resample every channel by spline interpolation.

    Spline resampling is linear and separable, so each axis is one matrix product with the (new, old) matrix that
    scipy's own routine gives for the unit vectors: exactly scipy's result, at the speed of BLAS.

    Args:
        image: (C, Z, Y, X), any real type.
        new_shape: voxels (z, y, x) wanted.
        order: spline order, 0 to 5.
        coarse_axis: axis that takes its nearest voxels instead (nnU-Net's treatment of anisotropic images).

    Returns:
        (C, *new_shape) float32.
    """
    result = np.ascontiguousarray(image, dtype=np.float32)
    # Shrinking axes first keeps the products small.
    for axis in sorted(range(3), key=lambda a: new_shape[a] / image.shape[a + 1]):
        old, new = image.shape[axis + 1], int(new_shape[axis])
        if old == new:
            continue
        if axis == coarse_axis or order == 0:
            result = np.take(result, nearest_voxels(old, new), axis=axis + 1)
        else:
            result = _apply_matrix(result, interpolation_matrix(old, new, order), axis + 1)
    return result if result is not image else result.copy()


@functools.lru_cache(maxsize=256)
def interpolation_matrix(old: int, new: int, order: int) -> np.ndarray:
    """(new, old) float32 matrix that resamples a line of ``old`` voxels to ``new``, as scipy does."""
    if old == 1:
        return np.ones((new, 1), dtype=np.float32)
    unit = np.eye(old)
    columns = ndimage.zoom(unit, (new / old, 1), order=order, mode="nearest", grid_mode=True)
    return np.ascontiguousarray(columns, dtype=np.float32)


def nearest_voxels(old: int, new: int) -> np.ndarray:
    """(new,) index of the nearest old voxel of each new one."""
    position = (np.arange(new) + 0.5) * (old / new) - 0.5
    return np.clip(np.floor(position + 0.5), 0, old - 1).astype(np.intp)


def _apply_matrix(array: np.ndarray, matrix: np.ndarray, axis: int) -> np.ndarray:
    """Multiply a (C, Z, Y, X) array along one axis."""
    c, z, y, x = array.shape
    if axis == 3:
        return (array.reshape(-1, x) @ matrix.T).reshape(c, z, y, -1)
    if axis == 2:
        return np.matmul(matrix, array)
    return np.matmul(matrix, array.reshape(c, z, y * x)).reshape(c, -1, y, x)


def resample_labels(labels: np.ndarray, new_shape: Shape, nearest_axis: int | None = None) -> np.ndarray:
    """Resample a label map: the eight neighbours vote with their trilinear weights, the label with most votes wins.

    The same result as resampling a one-hot map per label linearly and taking the argmax, in one pass and without the
    holes that thresholding label by label leaves where three labels meet.

    Args:
        labels: (Z, Y, X), any integer type and memory order.
        new_shape: voxels (z, y, x) wanted.
        nearest_axis: axis along which only the nearest voxel counts.

    Returns:
        ``new_shape`` array of the same type. Equal votes go to the label of the nearest voxel, then to the lower one.
    """
    if tuple(labels.shape) == tuple(new_shape):
        return labels.copy()
    z, y, x = (
        _linear_taps(old, int(new), axis == nearest_axis)
        for axis, (old, new) in enumerate(zip(labels.shape, new_shape, strict=True))
    )
    result = np.empty(tuple(int(n) for n in new_shape), dtype=labels.dtype)
    _vote(np.ascontiguousarray(labels), *z, *y, *x, result)
    return result


def logits_to_indices(logits: np.ndarray, new_shape: Shape, coarse_axis: int | None = None) -> np.ndarray:
    """Interpolate class logits linearly and take the most probable class, one plane and one class at a time.

    Args:
        logits: (K, Z, Y, X) float.
        new_shape: voxels (z, y, x) wanted.
        coarse_axis: axis along which only the nearest voxel counts.

    Returns:
        ``new_shape`` class indices, uint8 (uint16 past 256 classes); equal logits go to the lower class.
    """
    result = np.empty(tuple(int(n) for n in new_shape), dtype=np.uint8 if len(logits) <= 256 else np.uint16)
    _best_class(_as_float32(logits), *_all_taps(logits, new_shape, coarse_axis), result)  # type: ignore[call-arg]
    return result


def logits_to_regions(logits: np.ndarray, new_shape: Shape, coarse_axis: int | None = None) -> np.ndarray:
    """Interpolate region logits linearly and take the last region with a positive one.

    Args:
        logits: (R, Z, Y, X) float.
        new_shape: voxels (z, y, x) wanted.
        coarse_axis: axis along which only the nearest voxel counts.

    Returns:
        ``new_shape``: 0 where no region is positive, else 1 + the index of the last positive region.
    """
    result = np.empty(tuple(int(n) for n in new_shape), dtype=np.uint8 if len(logits) < 256 else np.uint16)
    _last_positive(_as_float32(logits), *_all_taps(logits, new_shape, coarse_axis), result)  # type: ignore[call-arg]
    return result


def resample_logits_planes(
    logits: np.ndarray, new_shape: Shape, z_start: int, z_stop: int, coarse_axis: int | None = None
) -> np.ndarray:
    """Interpolated logits (K, z_stop - z_start, Y', X') float32 of some planes of the resampled volume."""
    z, y, x = (
        _linear_taps(old, int(new), axis == coarse_axis)
        for axis, (old, new) in enumerate(zip(logits.shape[1:], new_shape, strict=True))
    )
    low, high, weight = (taps[z_start:z_stop] for taps in z)
    w = weight.astype(np.float32)[None, :, None, None]
    planes = logits[:, low] * (1 - w) + logits[:, high] * w
    low, high, weight = y
    w = weight.astype(np.float32)[None, None, :, None]
    planes = planes[:, :, low] * (1 - w) + planes[:, :, high] * w
    low, high, weight = x
    w = weight.astype(np.float32)
    return (planes[..., low] * (1 - w) + planes[..., high] * w).astype(np.float32, copy=False)


Taps = tuple[np.ndarray, np.ndarray, np.ndarray]


def _linear_taps(old: int, new: int, nearest: bool) -> Taps:
    """Lower and upper neighbour of each new voxel and the weight of the upper one."""
    if nearest:
        index = nearest_voxels(old, new)
        return index, index, np.zeros(new)
    position = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    low = np.minimum(position.astype(np.intp), max(old - 2, 0))
    high = np.minimum(low + 1, old - 1)
    return low, high, position - low


def _all_taps(logits: np.ndarray, new_shape: Shape, coarse_axis: int | None) -> list[np.ndarray]:
    return [
        part
        for axis, (old, new) in enumerate(zip(logits.shape[1:], new_shape, strict=True))
        for part in _linear_taps(old, int(new), axis == coarse_axis)
    ]


def _as_float32(logits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(logits, dtype=np.float32)


@njit(parallel=True, cache=True, nogil=True)
def _vote(labels, z0, z1, wz, y0, y1, wy, x0, x1, wx, result):  # type: ignore[no-untyped-def]
    for k in prange(result.shape[0]):
        values = np.empty(8, dtype=labels.dtype)
        votes = np.empty(8, dtype=np.float64)
        for j in range(result.shape[1]):
            for i in range(result.shape[2]):
                first = labels[z0[k], y0[j], x0[i]]
                same = True
                n = 0
                for a in range(2):
                    z = z1[k] if a else z0[k]
                    for b in range(2):
                        y = y1[j] if b else y0[j]
                        for c in range(2):
                            value = labels[z, y, x1[i] if c else x0[i]]
                            if value != first:
                                same = False
                            values[n] = value
                            n += 1
                if same:
                    result[k, j, i] = first
                    continue
                for n in range(8):
                    w = wz[k] if n & 4 else 1.0 - wz[k]
                    w *= wy[j] if n & 2 else 1.0 - wy[j]
                    w *= wx[i] if n & 1 else 1.0 - wx[i]
                    votes[n] = w
                nearest = values[(4 if wz[k] >= 0.5 else 0) + (2 if wy[j] >= 0.5 else 0) + (1 if wx[i] >= 0.5 else 0)]
                best = first
                best_votes = -1.0
                for n in range(8):
                    total = 0.0
                    for m in range(8):
                        if values[m] == values[n]:
                            total += votes[m]
                    if total > best_votes + TIE:
                        best, best_votes = values[n], total
                    elif total > best_votes - TIE and (values[n] == nearest or (best != nearest and values[n] < best)):
                        best, best_votes = values[n], max(total, best_votes)
                result[k, j, i] = best


@njit(cache=True, nogil=True)
def _interpolate_plane(source, z0, z1, wz, y0, y1, wy, x0, x1, wx, line, plane):  # type: ignore[no-untyped-def]
    """One output plane of one class, (Y', X') float32."""
    a, b = np.float32(1.0 - wz), np.float32(wz)
    for j in range(plane.shape[0]):
        c, d = np.float32(1.0 - wy[j]), np.float32(wy[j])
        for x in range(source.shape[2]):
            upper = a * source[z0, y0[j], x] + b * source[z1, y0[j], x]
            lower = a * source[z0, y1[j], x] + b * source[z1, y1[j], x]
            line[x] = c * upper + d * lower
        for i in range(plane.shape[1]):
            w = np.float32(wx[i])
            plane[j, i] = (np.float32(1.0) - w) * line[x0[i]] + w * line[x1[i]]


@njit(parallel=True, cache=True, nogil=True)
def _best_class(logits, z0, z1, wz, y0, y1, wy, x0, x1, wx, result):  # type: ignore[no-untyped-def]
    for k in prange(result.shape[0]):
        line = np.empty(logits.shape[3], dtype=np.float32)
        plane = np.empty(result.shape[1:], dtype=np.float32)
        best = np.empty(result.shape[1:], dtype=np.float32)
        result[k] = 0
        _interpolate_plane(logits[0], z0[k], z1[k], wz[k], y0, y1, wy, x0, x1, wx, line, best)
        for c in range(1, logits.shape[0]):
            _interpolate_plane(logits[c], z0[k], z1[k], wz[k], y0, y1, wy, x0, x1, wx, line, plane)
            for j in range(plane.shape[0]):
                for i in range(plane.shape[1]):
                    if plane[j, i] > best[j, i]:
                        best[j, i] = plane[j, i]
                        result[k, j, i] = c


@njit(parallel=True, cache=True, nogil=True)
def _last_positive(logits, z0, z1, wz, y0, y1, wy, x0, x1, wx, result):  # type: ignore[no-untyped-def]
    for k in prange(result.shape[0]):
        line = np.empty(logits.shape[3], dtype=np.float32)
        plane = np.empty(result.shape[1:], dtype=np.float32)
        result[k] = 0
        for c in range(logits.shape[0]):
            _interpolate_plane(logits[c], z0[k], z1[k], wz[k], y0, y1, wy, x0, x1, wx, line, plane)
            for j in range(plane.shape[0]):
                for i in range(plane.shape[1]):
                    if plane[j, i] > 0:
                        result[k, j, i] = c + 1
