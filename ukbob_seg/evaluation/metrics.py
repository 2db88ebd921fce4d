"""Overlap and surface-distance metrics of one case, per class or region, in millimetres."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.evaluation.counting import MOST_VALUE, PairCounts, count_pair
from ukbob_seg.evaluation.surface import boundary_distances
from ukbob_seg.parallel import thread_count

OVERLAPS = ("dice", "iou", "nsd", "precision", "recall")
DISTANCES = ("hd", "hd95", "assd")
DIFFERENCES = ("volume_difference_mm3", "relative_volume_difference")
VOLUMES = ("volume_pred_mm3", "volume_ref_mm3")
COUNTS = ("n_pred", "n_ref", "tp", "fp", "fn")
METRICS = ("dice", "iou", *DISTANCES, "nsd", "precision", "recall", *DIFFERENCES, *VOLUMES, *COUNTS)

MOST_CLASSES = 2048
_MOST_THREADS = 8  # each holds 11 bytes per voxel of a class's box: 0.2 GB where that is a whole body
# Spacings come out of file headers in single precision; their rounding must not decide who is within the tolerance.
_ROUNDING_MM = 1e-4
_NAN = float("nan")

Tolerances = float | Sequence[float]


def evaluate_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing_mm: Sequence[float],
    labels: Mapping[Any, int | Sequence[int]] | Sequence[int],
    tolerance_mm: Tolerances = 2.0,
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
        tolerance_mm: of the normalized surface Dice, one or several.
        ignore_value: voxels where the reference has this value are background in both maps.

    Returns:
        {label: metrics}, metrics being a dict with the keys of ``METRICS``:
        dice, iou, precision, recall: of the voxel sets;
        hd: largest distance; hd95: the larger of the two directions' 95th percentiles (linear interpolation);
        assd: mean over the boundary voxels of both maps together (all in mm);
        nsd: share of the boundary voxels of both maps that lie within ``tolerance_mm`` of the other (the first, if
        several; further keys such as ``nsd_1mm`` then hold that of each);
        volume_difference_mm3: prediction minus reference; relative_volume_difference: the same over the reference;
        volume_pred_mm3, volume_ref_mm3; n_pred, n_ref, tp, fp, fn: voxels (int).

        Absent from both maps: NaN, with volumes and counts 0. Absent from one: dice, iou, nsd 0 and distances
        infinite; precision is NaN without a prediction, recall and the relative difference without a reference
        (nothing to divide by).

    Raises:
        DatasetError: shapes differ, or an array is not a volume of integers.
        ConfigError: spacing, tolerance or a label value is out of range, or there are more than 2048 values.

    Reference: UKBOB, section 4 (Dice, Hausdorff distance); Nikolov et al., 2018, arXiv:1809.04430 (surface Dice).
    """
    spacing = _checked_spacing(spacing_mm)
    tolerances = check_tolerances(tolerance_mm)
    _check_maps(prediction, reference)
    groups = _groups(labels)
    values = sorted({value for group in groups.values() for value in group})
    if len(values) > MOST_CLASSES:
        raise ConfigError(f"at most {MOST_CLASSES} label values can be scored, got {len(values)}")
    counts = count_pair(prediction, reference, values, ignore_value)
    index_of = {value: k for k, value in enumerate(values, start=1)}
    members = [[index_of[value] for value in group] for group in groups.values()]
    score = partial(_score_group, counts, spacing=spacing, tolerances=tolerances)
    with ThreadPoolExecutor(
        min(thread_count(), _MOST_THREADS)
    ) as pool:  # the compiled passes run outside the interpreter's lock
        return dict(zip(groups, pool.map(score, members), strict=True))


def metric_names(tolerances: Sequence[float]) -> tuple[str, ...]:
    """The keys of ``evaluate_case``'s metrics: ``METRICS``, and one more per tolerance if there are several."""
    return (*METRICS, *nsd_names(tolerances))


def nsd_names(tolerances: Sequence[float]) -> tuple[str, ...]:
    """``nsd_1mm`` and so on for several tolerances; none for one, which is ``nsd`` alone."""
    return tuple(f"nsd_{tolerance:g}mm" for tolerance in tolerances) if len(tolerances) > 1 else ()


def check_tolerances(tolerance_mm: Tolerances, name: str = "tolerance_mm") -> tuple[float, ...]:
    """One or several tolerances as a tuple; ``name`` is what the user knows them by.

    Raises:
        ConfigError: none, one twice, or one that is negative or not finite.
    """
    given = tuple(tolerance_mm) if isinstance(tolerance_mm, Iterable) else (tolerance_mm,)
    tolerances = tuple(float(tolerance) for tolerance in given)
    if not tolerances or not all(np.isfinite(t) and t >= 0 for t in tolerances):
        raise ConfigError(f"{name} must be zero or positive, got {', '.join(f'{t:g}' for t in tolerances) or 'none'}")
    if len(set(nsd_names(tolerances))) < len(nsd_names(tolerances)):
        raise ConfigError(f"{name} must be different numbers, got {', '.join(f'{t:g}' for t in tolerances)}")
    return tolerances


def absent_from_both(metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """The metrics of a class that neither map has: NaN, with volumes and counts 0."""
    known = {**dict.fromkeys(VOLUMES, 0.0), **dict.fromkeys(COUNTS, 0)}
    return {metric: known.get(metric, _NAN) for metric in metrics}


def present_values(labels: np.ndarray) -> list[int]:
    """The distinct values of an integer label map other than 0, ascending."""
    if labels.dtype in (np.uint8, np.uint16):
        found = np.zeros(np.iinfo(labels.dtype).max + 1, dtype=bool)
        found[labels] = True
        values = np.flatnonzero(found)
    else:
        values = np.unique(labels)
    return [int(value) for value in values if value != 0]


def surface_metrics(there: np.ndarray, back: np.ndarray, tolerances: Sequence[float]) -> dict[str, float]:
    """hd, hd95, assd (mm), nsd, and ``nsd_names`` from the two directions' distances.

    Args:
        there: (boundary voxels of the prediction,) mm, not empty.
        back: (boundary voxels of the reference,) mm, not empty.
        tolerances: mm, at least one.
    """
    voxels = len(there) + len(back)
    shares = [
        sum(int(np.count_nonzero(distances <= tolerance + _ROUNDING_MM)) for distances in (there, back)) / voxels
        for tolerance in tolerances
    ]
    return {
        "hd": float(max(there.max(), back.max())),
        "hd95": float(max(np.percentile(distances, 95) for distances in (there, back))),
        "assd": float((there.sum() + back.sum()) / voxels),
        "nsd": shares[0],
        **dict(zip(nsd_names(tolerances), shares, strict=False)),
    }


def _score_group(
    counts: PairCounts, members: Sequence[int], spacing: np.ndarray, tolerances: Sequence[float]
) -> dict[str, float]:
    """All metrics of the union of ``members``."""
    overlap = _overlap(counts.joint, members, float(spacing.prod()))
    if not overlap["n_pred"] or not overlap["n_ref"] or overlap["tp"] == overlap["n_pred"] == overlap["n_ref"]:
        surface = _trivial_surface(overlap, tolerances)
    else:
        box = counts.joint_box(members)
        directed = boundary_distances(counts.predicted[box], counts.true[box], members, spacing)
        surface = surface_metrics(*directed, tolerances)
    both = {**overlap, **surface}
    return {metric: both[metric] for metric in metric_names(tolerances)}


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
        if min(group) < 0 or max(group) > MOST_VALUE:
            raise ConfigError(f"label {name!r}: values must lie in 0..{MOST_VALUE}, got {value!r}")
        groups[name] = tuple(sorted({int(v) for v in group}))
    return groups


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
        "volume_difference_mm3": (n_pred - n_ref) * voxel_mm3 if n_pred or n_ref else _NAN,
        "relative_volume_difference": _ratio(n_pred - n_ref, n_ref),
        "volume_pred_mm3": n_pred * voxel_mm3,
        "volume_ref_mm3": n_ref * voxel_mm3,
        "n_pred": n_pred,
        "n_ref": n_ref,
        "tp": tp,
        "fp": n_pred - tp,
        "fn": n_ref - tp,
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else _NAN


def _trivial_surface(overlap: Mapping[str, float], tolerances: Sequence[float]) -> dict[str, float]:
    """Surface metrics that need no distances: both maps equal, or the class absent from one or both."""
    if overlap["n_pred"] and overlap["n_ref"]:
        distance, nsd = 0.0, 1.0
    elif overlap["n_pred"] or overlap["n_ref"]:
        distance, nsd = float("inf"), 0.0
    else:
        distance = nsd = _NAN
    return {"hd": distance, "hd95": distance, "assd": distance, **dict.fromkeys(("nsd", *nsd_names(tolerances)), nsd)}
