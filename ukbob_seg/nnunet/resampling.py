"""Resampling as nnU-Net does it where that differs from ours: which axis is coarse, clipping, and label by label.

nnU-Net's functions are named in its plans; ``ResamplingRule`` is what their keyword arguments amount to. Shapes and
spacings are (z, y, x).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ukbob_seg.errors import CheckpointError
from ukbob_seg.preprocessing.resampling import resample_image, resample_labels

Triple = tuple[float, float, float]
ANISOTROPY = 3.0  # nnU-Net's ANISO_THRESHOLD
NEARLY = 1e-4  # shares as near to each other as float32 cannot tell apart
SPLINES, LINEAR = "resample_data_or_seg_to_shape", "resample_torch_fornnunet"


@dataclass(frozen=True)
class ResamplingRule:
    """How one kind of array is resampled.

    Attributes:
        order: of the spline; 0 to 5.
        order_z: along a coarse axis.
        separate: whether an axis is treated as coarse always (True), never (False), or where it is (None).
        threshold: ratio of the longest to the shortest edge of a voxel above which the longest axis is coarse.
        votes: label maps are resampled as by ``resample_torch_fornnunet``.
    """

    order: int = 3
    order_z: int = 0
    separate: bool | None = None
    threshold: float = ANISOTROPY
    votes: bool = False

    @classmethod
    def from_plans(cls, configuration: Mapping[str, Any], kind: str) -> ResamplingRule:
        """Of ``resampling_fn_<kind>`` of a configuration; kind is ``data``, ``seg`` or ``probabilities``.

        Raises:
            CheckpointError: a function, or an order, that this package does not have.
        """
        name = configuration.get(f"resampling_fn_{kind}", SPLINES)
        default = {"order": 3 if kind == "data" else 1, "order_z": 0, "force_separate_z": None}
        given = dict(configuration.get(f"resampling_fn_{kind}_kwargs") or default)
        threshold = float(given.get("separate_z_anisotropy_threshold", ANISOTROPY))
        if name == LINEAR and given.get("mode", "linear") == "linear":
            return cls(1, 0, given.get("force_separate_z"), threshold, votes=True)
        rule = cls(
            order=given.get("order", 3),
            order_z=given.get("order_z", 0),
            separate=given.get("force_separate_z", False),  # the function's own default; plans say null
            threshold=threshold,
        )
        orders = (0, 1) if kind == "seg" else (1,) if kind == "probabilities" else range(6)
        if name != SPLINES or rule.order not in orders or rule.order_z not in (0, 1):
            raise CheckpointError(
                f"the plans resample {kind} by {name} with {given}, which is not supported ({SPLINES} of order "
                f"{', '.join(map(str, orders))} and order_z 0 or 1, and {LINEAR} are)"
            )
        return rule

    def coarse_axis(self, current_mm: Triple, new_mm: Triple) -> int | None:
        """The axis that is resampled by itself, with ``order_z``; None where all three are resampled together."""
        for spacing in (current_mm, new_mm):
            if self.separate is False:
                return None
            if self.separate or max(spacing) / min(spacing) > self.threshold:
                coarsest = [axis for axis in range(3) if max(spacing) / spacing[axis] == 1]
                return coarsest[0] if len(coarsest) == 1 else None
        return None


def nnunet_shape(shape: Sequence[int], spacing_mm: Triple, target_mm: Triple) -> tuple[int, int, int]:
    """Voxels that cover the same extent at another spacing; rounded as nnU-Net rounds."""
    z, y, x = (max(1, round(s / t * n)) for n, s, t in zip(shape, spacing_mm, target_mm, strict=True))
    return z, y, x


def resample_intensities(
    image: np.ndarray, shape: tuple[int, int, int], rule: ResamplingRule, axis: int | None
) -> np.ndarray:
    """Resample (C, Z, Y, X) float32; splines that overshoot are cut at the extremes of what they interpolate.

    That is a channel, or with a coarse axis each of its slices, as with ``skimage.transform.resize``.
    """
    if image.shape[1:] == shape:
        return image
    if axis is None:
        result = resample_image(image, shape, order=rule.order)
        return _clipped(result, image, (1, 2, 3)) if rule.order > 1 else result
    in_plane = tuple(image.shape[1 + k] if k == axis else n for k, n in enumerate(shape))
    result = resample_image(image, in_plane, order=rule.order)
    if rule.order > 1:
        result = _clipped(result, image, tuple(1 + k for k in range(3) if k != axis))
    return result if in_plane == shape else resample_image(result, shape, order=rule.order_z)


def _clipped(result: np.ndarray, source: np.ndarray, over: tuple[int, ...]) -> np.ndarray:
    low, high = (extreme(axis=over, keepdims=True) for extreme in (source.min, source.max))
    return np.clip(result, low, high, out=result)


def resample_segmentation(
    labels: np.ndarray, shape: tuple[int, int, int], rule: ResamplingRule, axis: int | None
) -> np.ndarray:
    """Resample a label map (Z, Y, X): a voxel has the label that covers most of it; of equal ones the nearest.

    As ``resize_segmentation`` of batchgenerators does it since version 0.25.5; before, the highest label that covered
    at least half.
    """
    if labels.shape == shape:
        return labels
    if rule.votes or rule.order == 0:
        nearest = resample_image(labels[None].astype(np.float32), shape, order=0)[0] if rule.order == 0 else None
        return resample_labels(labels, shape, axis) if nearest is None else nearest.astype(labels.dtype)
    in_plane = shape if axis is None else tuple(labels.shape[k] if k == axis else n for k, n in enumerate(shape))
    result = _largest_shares(labels, in_plane)
    if in_plane == shape:
        return result
    if rule.order_z == 0:
        return resample_image(result[None].astype(np.float32), shape, order=0)[0].astype(labels.dtype)
    return _above_half(result, shape)


def _above_half(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    result = np.zeros(shape, dtype=labels.dtype)
    for value in np.unique(labels):
        mask = labels == value
        share = resample_image(mask.astype(np.float32)[None], shape, order=1)[0].astype(np.float64)
        points = np.nonzero(np.abs(share - 0.5) < NEARLY)
        share[points] = _shares(mask, shape, points)
        result[share > 0.5] = value
    return result


def _largest_shares(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The label with the largest share of each voxel; of equal ones the nearest, if it is among them, or the lowest."""
    values = np.unique(labels)
    if len(values) == 1:
        return np.full(shape, values[0], dtype=labels.dtype)
    winner = np.zeros(shape, dtype=np.int32)
    best, second = np.full(shape, -1, dtype=np.float32), np.full(shape, -1, dtype=np.float32)
    for number, value in enumerate(values):
        share = resample_image((labels == value).astype(np.float32)[None], shape, order=1)[0]
        winner[share > best] = number
        np.maximum(second, np.minimum(share, best), out=second)
        np.maximum(best, share, out=best)
    points = np.nonzero(best - second < NEARLY)
    exact = np.stack([_shares(labels == value, shape, points) for value in values])
    is_best = exact == exact.max(axis=0)
    nearest = np.searchsorted(values, labels[tuple(_nearest(labels.shape, shape, points))])
    counts = is_best[nearest, np.arange(len(nearest))]
    winner[points] = np.where(counts, nearest, is_best.argmax(axis=0))
    return values[winner]


def _shares(mask: np.ndarray, shape: tuple[int, ...], points: tuple[np.ndarray, ...]) -> np.ndarray:
    """Linear interpolation at some points in float64, operation by operation as ``scipy.ndimage.zoom`` does it.

    Equal shares are frequent, on the grids of many pairs of spacings, and the last bit decides.
    """
    corners, weights = [], []
    for size, wanted, index in zip(mask.shape, shape, points, strict=True):
        place = (index + 0.5) * (size / wanted) - 0.5
        below = np.floor(place)
        corners.append([np.clip(each, 0, size - 1).astype(np.intp) for each in (below, below + 1)])
        weights.append((1 - (place - below), place - below))
    total = np.zeros(len(points[0]))
    for z, y, x in itertools.product((0, 1), repeat=3):
        value = mask[corners[0][z], corners[1][y], corners[2][x]].astype(np.float64)
        total += value * weights[0][z] * weights[1][y] * weights[2][x]
    return total


def _nearest(sizes: Sequence[int], shape: Sequence[int], points: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Indices of the voxels that some points of another grid lie nearest to."""
    places = [(index + 0.5) * (size / wanted) for size, wanted, index in zip(sizes, shape, points, strict=True)]
    return [np.clip(np.floor(place), 0, size - 1).astype(np.intp) for place, size in zip(places, sizes, strict=True)]
