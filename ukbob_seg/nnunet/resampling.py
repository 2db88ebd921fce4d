"""Resampling as nnU-Net does it where that differs from ours: which axis is coarse, clipping, and label by label.

nnU-Net's functions are named in its plans; ``ResamplingRule`` is what their keyword arguments amount to. Shapes and
spacings are (z, y, x).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ukbob_seg.errors import CheckpointError
from ukbob_seg.preprocessing.resampling import resample_image, resample_labels

Triple = tuple[float, float, float]
ANISOTROPY = 3.0  # nnU-Net's ANISO_THRESHOLD
SPLINES, LINEAR = "resample_data_or_seg_to_shape", "resample_torch_fornnunet"


@dataclass(frozen=True)
class ResamplingRule:
    """How one kind of array is resampled.

    Attributes:
        order: of the spline; 0 to 5.
        order_z: along a coarse axis.
        separate: whether an axis is treated as coarse always (True), never (False), or where it is (None).
        threshold: ratio of the longest to the shortest edge of a voxel above which the longest axis is coarse.
        votes: label maps go to the label of most weight, instead of label by label above one half.
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
    """Resample a label map (Z, Y, X): a voxel has the highest label that covers at least half of it, else 0.

    Where three labels meet this leaves holes; networks of a second stage were trained on such maps.
    """
    if labels.shape == shape:
        return labels
    if rule.votes or rule.order == 0:
        nearest = resample_image(labels[None].astype(np.float32), shape, order=0)[0] if rule.order == 0 else None
        return resample_labels(labels, shape, axis) if nearest is None else nearest.astype(labels.dtype)
    in_plane = shape if axis is None else tuple(labels.shape[k] if k == axis else n for k, n in enumerate(shape))
    result = _label_by_label(labels, in_plane, at_half=True)
    if in_plane == shape:
        return result
    if rule.order_z == 0:
        return resample_image(result[None].astype(np.float32), shape, order=0)[0].astype(labels.dtype)
    return _label_by_label(result, shape, at_half=False)


def _label_by_label(labels: np.ndarray, shape: tuple[int, ...], at_half: bool) -> np.ndarray:
    result = np.zeros(shape, dtype=labels.dtype)
    for value in np.unique(labels):
        share = resample_image((labels == value).astype(np.float32)[None], shape, order=1)[0]
        result[share >= 0.5 if at_half else share > 0.5] = value
    return result
