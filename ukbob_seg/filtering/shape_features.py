"""Size and shape of every organ of a label map, from one pass over the array."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numba import njit

from ukbob_seg.errors import ConfigError, DatasetError

MAX_LABEL = 65535
FEATURE_COLUMNS = (
    "label",
    "voxels",
    "volume_mm3",
    "faces",
    "surface_mm2",
    "normalized_volume",
    "sphericity",
    "eccentricity",
)

# Columns of the integer table that the pass fills, one row per label value. Axes in the order of the array.
_COUNT, _FACE_PAIRS, _FIRST, _SECOND, _COLUMNS = 0, 1, 4, 7, 13
_PAIRS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))  # axes of the six second moments, in column order


def organ_features(
    labels: np.ndarray, spacing_mm: tuple[float, float, float], body_voxels: float | None = None
) -> pd.DataFrame:
    """Measure every organ of a label map.

    Args:
        labels: (Z, Y, X) integer label map, 0 is background, values up to 65,535. Any memory layout; uint8, uint16
            and int32 are read in place, other integer types are converted first.
        spacing_mm: voxel size (z, y, x).
        body_voxels: voxels of the whole body; None takes the union of all labels.

    Returns:
        One row per label present, ascending, with the columns
        ``label`` (int64), ``voxels`` (int64), ``volume_mm3``,
        ``faces`` (int64): voxel faces whose other side has another value or lies outside the volume,
        ``surface_mm2``: area of those faces,
        ``normalized_volume``: voxels / body_voxels,
        ``sphericity``: pi^(1/3) (6 volume)^(2/3) / surface; a digital ball tends to 2/3, since its voxel surface is
        1.5 times the smooth one, and a cube has (pi/6)^(1/3) = 0.806,
        ``eccentricity``: sqrt(1 - smallest / largest eigenvalue of the covariance of the voxel centres in mm).
        An organ in one plane or on one line has eccentricity 1, an organ of one voxel NaN. A volume without labels
        gives a table without rows.

    Raises:
        DatasetError: not a 3D integer array, or a value outside 0..65,535.
        ConfigError: spacing or body_voxels not positive.

    Reference: UKBOB (ICCV 2025), section on the Specialized Organ Label Filter.
    """
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    if spacing.shape != (3,) or not (np.isfinite(spacing).all() and spacing.min() > 0):
        raise ConfigError(f"spacing_mm must be three positive numbers (z, y, x), got {spacing_mm}")
    if body_voxels is not None and not body_voxels > 0:
        raise ConfigError(f"body_voxels must be positive, got {body_voxels}")
    view, order = _in_memory_order(_as_labels(labels))
    sums = organ_sums(view)
    spacing = spacing[order]

    present = np.flatnonzero(sums[:, _COUNT])
    sums = sums[present]
    voxels = sums[:, _COUNT]
    faces = 2 * sums[:, _FACE_PAIRS:_FIRST]
    voxel_mm3 = spacing.prod()
    volume_mm3 = voxels * voxel_mm3
    surface_mm2 = (faces * (voxel_mm3 / spacing)).sum(axis=1)
    body = float(voxels.sum()) if body_voxels is None else float(body_voxels)
    return pd.DataFrame(
        {
            "label": present.astype(np.int64),
            "voxels": voxels,
            "volume_mm3": volume_mm3,
            "faces": faces.sum(axis=1),
            "surface_mm2": surface_mm2,
            "normalized_volume": voxels / (body or 1.0),
            "sphericity": np.cbrt(np.pi) * np.cbrt(6 * volume_mm3) ** 2 / surface_mm2,
            "eccentricity": _eccentricity(covariance_mm2(sums, spacing)),
        }
    )


def _as_labels(labels: np.ndarray) -> np.ndarray:
    """The array in a dtype that the kernel is compiled for; no copy for uint8, uint16, int32 and bool."""
    if labels.ndim != 3:
        raise DatasetError(f"a label map must be (Z, Y, X), got shape {labels.shape}")
    if labels.dtype == np.bool_:
        return labels.view(np.uint8)
    if labels.dtype.kind not in "ui":
        raise DatasetError(f"a label map must hold integers, got {labels.dtype}")
    if labels.size * (max(labels.shape) // 2 + 1) ** 2 >= 2**63:
        raise DatasetError(f"a label map of shape {labels.shape} is too large: its second moments exceed 64 bits")
    if labels.dtype.newbyteorder("=") in (np.uint8, np.uint16, np.int32):
        return labels.astype(labels.dtype.newbyteorder("="), copy=False)
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) <= MAX_LABEL:
        raise _value_error(int(labels.min()) if labels.min() < 0 else int(labels.max()))
    return labels.astype(np.int32)


def _in_memory_order(labels: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """A view whose last axis is the densest in memory, and which axis of ``labels`` each of its axes is.

    Every feature is the same after permuting or reversing axes as long as the spacing follows, so the pass may walk
    the array in the order in which it lies in memory.
    """
    order = sorted(range(3), key=lambda axis: -abs(labels.strides[axis]))
    view = labels.transpose(order)
    return view[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in view.strides)], order


def organ_sums(labels: np.ndarray) -> np.ndarray:
    """(values, 13) int64 sums per label value: voxels, face pairs per axis, first and second moments in voxels.

    Args:
        labels: (Z, Y, X) uint8, uint16 or int32. Moments are about the voxel ``shape // 2``.
    """
    rows = 256 if labels.dtype == np.uint8 else MAX_LABEL + 1
    sums = np.zeros((rows, _COLUMNS), dtype=np.int64)
    wrong = _accumulate(labels, sums)
    if wrong:
        raise _value_error(wrong)
    return sums


def _value_error(value: int) -> DatasetError:
    return DatasetError(f"the label map holds the value {value}; label values must lie in 0..{MAX_LABEL}")


@njit(cache=True, nogil=True)
def _accumulate(labels, sums):  # type: ignore[no-untyped-def]
    """Walk the runs of equal values along the last axis and add up each run in closed form.

    Along an axis the faces of an organ come in pairs (every line that enters it leaves it), so it is enough to count
    the voxels whose PREVIOUS neighbour differs. Moments are taken about the centre of the volume, in integers: exact.
    Returns 0, or the first value that has no row in ``sums``.
    """
    depth, height, width = labels.shape
    middle_z, middle_y, middle_x = depth // 2, height // 2, width // 2
    for z in range(depth):
        for y in range(height):
            row = labels[z, y]
            before_z = labels[max(z - 1, 0), y]
            before_y = labels[z, max(y - 1, 0)]
            end = 0
            while end < width:
                start = end
                value = row[start]
                end += 1
                while end < width and row[end] == value:
                    end += 1
                if value == 0:
                    continue
                if value < 0 or value >= sums.shape[0]:
                    return np.int64(value)
                n = end - start
                same_z = 0
                if z > 0:
                    for x in range(start, end):
                        same_z += before_z[x] == value
                same_y = 0
                if y > 0:
                    for x in range(start, end):
                        same_y += before_y[x] == value
                first = start - middle_x
                last = end - 1 - middle_x
                sum_x = n * (first + last) // 2
                sum_xx = n * first * first + first * n * (n - 1) + (n - 1) * n * (2 * n - 1) // 6
                dz, dy = z - middle_z, y - middle_y
                target = sums[value]
                target[0] += n
                target[1] += n - same_z
                target[2] += n - same_y
                target[3] += 1
                target[4] += n * dz
                target[5] += n * dy
                target[6] += sum_x
                target[7] += n * dz * dz
                target[8] += n * dy * dy
                target[9] += sum_xx
                target[10] += n * dz * dy
                target[11] += dz * sum_x
                target[12] += dy * sum_x
    return np.int64(0)


def covariance_mm2(sums: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """(organs, 3, 3) population covariance of the voxel centres, from exact integer sums."""
    n = sums[:, _COUNT]
    first = sums[:, _FIRST:_SECOND]
    # Shift to the voxel nearest to the centroid while still in integers: nothing cancels in floating point.
    centre = np.rint(first / n[:, None]).astype(np.int64)
    rest = (first - n[:, None] * centre) / n[:, None]
    covariance = np.empty((len(sums), 3, 3))
    for column, (i, j) in enumerate(_PAIRS, start=_SECOND):
        second = (
            sums[:, column] - centre[:, i] * first[:, j] - centre[:, j] * first[:, i] + n * centre[:, i] * centre[:, j]
        )
        value = (second / n - rest[:, i] * rest[:, j]) * spacing[i] * spacing[j]
        covariance[:, i, j] = covariance[:, j, i] = value
    return covariance


def centroids(sums: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(organs, 3) mean voxel index, from the sums of a volume of that shape."""
    return np.asarray(shape) // 2 + sums[:, _FIRST:_SECOND] / sums[:, _COUNT, None]


def _eccentricity(covariance: np.ndarray) -> np.ndarray:
    """sqrt(1 - smallest / largest eigenvalue), in [0, 1]; NaN where the covariance is zero (a single voxel)."""
    eigenvalues = np.linalg.eigvalsh(covariance)
    smallest, largest = eigenvalues[:, 0], eigenvalues[:, 2]
    ratio = np.divide(smallest, largest, out=np.full(len(largest), np.nan), where=largest > 0)
    return np.sqrt(np.clip(1 - ratio, 0, 1))
