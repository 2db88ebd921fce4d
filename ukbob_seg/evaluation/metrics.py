"""Overlap and surface-distance metrics of one case, per class or region, in millimetres."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects

from ukbob_seg.errors import ConfigError, DatasetError

OVERLAPS = ("dice", "iou", "nsd", "precision", "recall")
DISTANCES = ("hd", "hd95", "assd")
VOLUMES = ("volume_pred_mm3", "volume_ref_mm3")
COUNTS = ("n_pred", "n_ref", "tp", "fp", "fn")
METRICS = ("dice", "iou", "hd", "hd95", "assd", "nsd", "precision", "recall", *VOLUMES, *COUNTS)

MOST_CLASSES = 2048
_MOST_VALUE = 65535
# Spacings come out of file headers in single precision; their rounding must not decide who is within the tolerance.
_ROUNDING_MM = 1e-4
_SLAB_VOXELS = 2**20

Box = tuple[slice, ...]


def evaluate_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing_mm: Sequence[float],
    labels: Mapping[Any, int | Sequence[int]] | Sequence[int],
    tolerance_mm: float = 2.0,
    *,
    ignore_value: int | None = None,
) -> dict[Any, dict[str, float]]:
    """Score a predicted label map against its reference.

    A boundary voxel is a voxel of the object with a face neighbour outside it; beyond the volume counts as outside.
    Distances run from each boundary voxel to the nearest boundary voxel of the other map (centre to centre, exact).

    Args:
        prediction: (Z, Y, X) integers.
        reference: (Z, Y, X) integers, same shape.
        spacing_mm: voxel size (z, y, x).
        labels: name -> value, or name -> values (a region is their union); or a sequence of values, which are then
            the keys of the result. Values lie in 0..65535; all other values in the maps count as background.
        tolerance_mm: of the normalized surface Dice.
        ignore_value: voxels where the reference has this value are background in both maps.

    Returns:
        {label: metrics}, metrics being a dict with the keys of ``METRICS``:
        dice, iou, precision, recall: of the voxel sets;
        hd: largest distance; hd95: the larger of the two directions' 95th percentiles (linear interpolation);
        assd: mean over the boundary voxels of both maps together (all in mm);
        nsd: share of the boundary voxels of both maps that lie within ``tolerance_mm`` of the other;
        volume_pred_mm3, volume_ref_mm3; n_pred, n_ref, tp, fp, fn: voxels (int).

        Absent from both maps: NaN, with volumes and counts 0. Absent from one: dice, iou, nsd 0 and distances
        infinite; precision is NaN without a prediction, recall without a reference (nothing to divide by).

    Raises:
        DatasetError: shapes differ, or an array is not a volume of integers.
        ConfigError: spacing, tolerance or a label value is out of range, or there are more than 2048 values.

    Reference: UKBOB, section 4 (Dice, Hausdorff distance); Nikolov et al., 2018, arXiv:1809.04430 (surface Dice).
    """
    spacing = _checked_spacing(spacing_mm)
    if not (np.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise ConfigError(f"tolerance_mm must be zero or positive, got {tolerance_mm}")
    _check_maps(prediction, reference)
    groups = _groups(labels)
    values = sorted({value for group in groups.values() for value in group})
    if len(values) > MOST_CLASSES:
        raise ConfigError(f"at most {MOST_CLASSES} label values can be scored, got {len(values)}")
    predicted, true, joint = _compress(prediction, reference, values, ignore_value)
    predicted_boxes = find_objects(predicted, max_label=len(values))
    true_boxes = find_objects(true, max_label=len(values))
    index_of = {value: k for k, value in enumerate(values, start=1)}

    result: dict[Any, dict[str, float]] = {}
    for name, group in groups.items():
        members = [index_of[value] for value in group]
        overlap = _overlap(joint, members, float(spacing.prod()))
        if not overlap["n_pred"] or not overlap["n_ref"] or overlap["tp"] == overlap["n_pred"] == overlap["n_ref"]:
            surface = _trivial_surface(overlap)
        else:
            box = _union([boxes[k - 1] for boxes in (predicted_boxes, true_boxes) for k in members])
            masks = [_mask(maps[box], members) for maps in (predicted, true)]
            surface = surface_metrics(masks[0], masks[1], spacing, tolerance_mm)
        both = {**overlap, **surface}
        result[name] = {metric: both[metric] for metric in METRICS}
    return result


def absent_from_both() -> dict[str, float]:
    """The metrics of a class that neither map has: NaN, with volumes and counts 0."""
    known = {**dict.fromkeys(VOLUMES, 0.0), **dict.fromkeys(COUNTS, 0)}
    return {metric: known.get(metric, float("nan")) for metric in METRICS}


def present_values(labels: np.ndarray) -> list[int]:
    """The distinct values of an integer label map other than 0, ascending."""
    if labels.dtype in (np.uint8, np.uint16):
        found = np.zeros(np.iinfo(labels.dtype).max + 1, dtype=bool)
        found[labels] = True
        values = np.flatnonzero(found)
    else:
        values = np.unique(labels)
    return [int(value) for value in values if value != 0]


def boundary_voxels(mask: np.ndarray) -> np.ndarray:
    """Voxels of an object that have a face neighbour outside it; the array's border counts as outside.

    Args:
        mask: (Z, Y, X) bool.

    Returns:
        (Z, Y, X) bool, a subset of ``mask``; empty for an empty mask.
    """
    padded = np.pad(mask, 1)
    inside = mask.copy()
    for axis in range(mask.ndim):
        for start in (0, 2):
            neighbour = [slice(1, -1)] * mask.ndim
            neighbour[axis] = slice(start, start + mask.shape[axis])
            inside &= padded[tuple(neighbour)]
    return mask & ~inside


def surface_distances(origin: np.ndarray, target: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Distance from every voxel of one set to the nearest voxel of another, exact, centre to centre.

    Args:
        origin: (Z, Y, X) bool, not empty.
        target: (Z, Y, X) bool, not empty.
        spacing_mm: (3,) voxel size.

    Returns:
        (voxels of ``origin``,) float64 in mm, in array order.
    """
    # Only the nearest voxel's indices are kept: the distances themselves are needed on the boundary alone.
    nearest = distance_transform_edt(~target, sampling=spacing_mm, return_distances=False, return_indices=True)
    squared = np.zeros(int(np.count_nonzero(origin)))
    for here, there, step in zip(np.nonzero(origin), nearest, spacing_mm, strict=True):
        squared += ((here - there[origin]) * step) ** 2
    return np.sqrt(squared)


def surface_metrics(
    predicted: np.ndarray, true: np.ndarray, spacing_mm: np.ndarray, tolerance_mm: float
) -> dict[str, float]:
    """hd, hd95, assd (mm) and nsd of two masks.

    Args:
        predicted: (Z, Y, X) bool, not empty.
        true: (Z, Y, X) bool, not empty.
        spacing_mm: (3,) voxel size.
        tolerance_mm: of the normalized surface Dice.
    """
    boundaries = boundary_voxels(predicted), boundary_voxels(true)
    directed = (
        surface_distances(boundaries[0], boundaries[1], spacing_mm),
        surface_distances(boundaries[1], boundaries[0], spacing_mm),
    )
    pooled = np.concatenate(directed)
    return {
        "hd": float(pooled.max()),
        "hd95": float(max(np.percentile(distances, 95) for distances in directed)),
        "assd": float(pooled.mean()),
        "nsd": float((pooled <= tolerance_mm + _ROUNDING_MM).mean()),
    }


def _checked_spacing(spacing_mm: Sequence[float]) -> np.ndarray:
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    if spacing.shape != (3,) or not np.isfinite(spacing).all() or spacing.min() <= 0:
        raise ConfigError(f"spacing_mm must be three positive numbers (z, y, x), got {spacing_mm}")
    return spacing


def _check_maps(prediction: np.ndarray, reference: np.ndarray) -> None:
    for what, array in (("prediction", prediction), ("reference", reference)):
        if array.ndim != 3 or array.dtype.kind not in "biu":
            raise DatasetError(
                f"the {what} must be a (Z, Y, X) array of integers, got shape {array.shape} of {array.dtype}"
            )
    if prediction.shape != reference.shape:
        raise DatasetError(
            f"shape differs: {reference.shape} in the reference, {prediction.shape} in the prediction; "
            "bring both onto one grid"
        )


def _groups(labels: Mapping[Any, int | Sequence[int]] | Sequence[int]) -> dict[Hashable, tuple[int, ...]]:
    """Values of each label, checked."""
    named = labels.items() if isinstance(labels, Mapping) else ((value, value) for value in labels)
    groups: dict[Hashable, tuple[int, ...]] = {}
    for name, value in named:
        group = tuple(value) if isinstance(value, Iterable) else (value,)
        if not group or any(isinstance(v, bool) or not isinstance(v, (int, np.integer)) for v in group):
            raise ConfigError(f"label {name!r} must be an integer or several, got {value!r}")
        if min(group) < 0 or max(group) > _MOST_VALUE:
            raise ConfigError(f"label {name!r}: values must lie in 0..{_MOST_VALUE}, got {value!r}")
        groups[name] = tuple(sorted({int(v) for v in group}))
    return groups


def _compress(
    prediction: np.ndarray, reference: np.ndarray, values: Sequence[int], ignore_value: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both maps as indices (``values[k - 1]`` becomes k, anything else 0), and their joint histogram.

    Returns:
        (prediction, reference, histogram (K + 1, K + 1) with the prediction's index first).
    """
    size = len(values) + 1
    table = np.zeros(_MOST_VALUE + 2, dtype=np.uint8 if size <= 256 else np.uint16)
    table[list(values)] = np.arange(1, size)
    predicted = np.empty(prediction.shape, dtype=table.dtype)
    true = np.empty(reference.shape, dtype=table.dtype)
    joint = np.zeros(size * size, dtype=np.int64)
    # Slab by slab, since the conversions to machine integers need many times the memory of the maps.
    step = max(1, _SLAB_VOXELS // max(1, int(np.prod(prediction.shape[1:]))))
    for start in range(0, prediction.shape[0], step):
        slab = slice(start, start + step)
        here = _look_up(table, prediction[slab])
        there = _look_up(table, reference[slab])
        if ignore_value is not None:
            ignored = reference[slab] == ignore_value
            here[ignored] = 0
            there[ignored] = 0
        predicted[slab], true[slab] = here, there
        joint += np.bincount(here.ravel().astype(np.intp) * size + there.ravel(), minlength=size * size)
    return predicted, true, joint.reshape(size, size)


def _look_up(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``table[labels]``, where values beyond the table (negative ones too) take its last entry."""
    if labels.dtype.kind == "b":
        labels = labels.view(np.uint8)
    elif labels.dtype.kind == "i" and labels.size and labels.min() < 0:
        labels = np.where(labels < 0, len(table) - 1, labels.astype(np.int64))
    return np.take(table, labels, mode="clip")


def _overlap(joint: np.ndarray, members: Sequence[int], voxel_mm3: float) -> dict[str, float]:
    """Counts, volumes and voxel overlap of the union of ``members``."""
    n_pred = int(joint[members].sum())
    n_ref = int(joint[:, members].sum())
    tp = int(joint[np.ix_(members, members)].sum())
    return {
        "dice": _ratio(2 * tp, n_pred + n_ref),
        "iou": _ratio(tp, n_pred + n_ref - tp),
        "precision": _ratio(tp, n_pred),
        "recall": _ratio(tp, n_ref),
        "volume_pred_mm3": n_pred * voxel_mm3,
        "volume_ref_mm3": n_ref * voxel_mm3,
        "n_pred": n_pred,
        "n_ref": n_ref,
        "tp": tp,
        "fp": n_pred - tp,
        "fn": n_ref - tp,
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _trivial_surface(overlap: Mapping[str, float]) -> dict[str, float]:
    """Surface metrics that need no distances: both maps equal, or the class absent from one or both."""
    if overlap["n_pred"] and overlap["n_ref"]:
        distance, nsd = 0.0, 1.0
    elif overlap["n_pred"] or overlap["n_ref"]:
        distance, nsd = float("inf"), 0.0
    else:
        distance = nsd = float("nan")
    return {"hd": distance, "hd95": distance, "assd": distance, "nsd": nsd}


def _union(boxes: Sequence[Box | None]) -> Box:
    """The smallest box around several (None: nothing there)."""
    found = [box for box in boxes if box is not None]
    return tuple(
        slice(min(box[axis].start for box in found), max(box[axis].stop for box in found)) for axis in range(3)
    )


def _mask(indices: np.ndarray, members: Sequence[int]) -> np.ndarray:
    mask = indices == members[0]
    for member in members[1:]:
        mask |= indices == member
    return mask
