"""From a fingerprint to plans: normalization, spacing, patch, batch and network size, each with its reason.

The spacing, normalization and low-resolution rules are nnU-Net's (Isensee et al., Nature Methods 2021), so that
its users meet the decisions they know; patch and feature size follow the memory model of the network in use.
``--preset nnunet`` takes the other decisions from nnU-Net too (``nnunet_preset``).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.preprocessing.fingerprint import Fingerprint
from ukbob_seg.preprocessing.network_plans import NETWORK_PLANNERS, SLICE_NETWORK_PLANNERS, PlanningInput
from ukbob_seg.preprocessing.nnunet_preset import NnunetRequest, nnunet_configurations
from ukbob_seg.preprocessing.nnunet_rules import Cases, target_spacing
from ukbob_seg.preprocessing.normalization import ChannelNormalization, scheme_for_channel
from ukbob_seg.preprocessing.plan_options import PlanOptions, planning_input
from ukbob_seg.preprocessing.plans import ConfigurationPlan, Plans
from ukbob_seg.preprocessing.requested_networks import with_networks

ANISOTROPY_THRESHOLD = 3.0
LOWRES_COVERAGE = 0.25  # a low-resolution configuration is added when the patch covers less of the median case
LOWRES_STEP = 1.03
CROP_MASK_THRESHOLD = 0.75
PAPER_CT_WINDOW_HU = (-175.0, 250.0)


def plan(fingerprint: Fingerprint, spec: DatasetSpec, options: PlanOptions | None = None) -> Plans:
    """Decide how a dataset is preprocessed and trained; the same inputs always give the same plans.

    Args:
        fingerprint: from ``extract_fingerprint``.
        spec: the dataset's contract.
        options: the user's wishes.

    Raises:
        ConfigError: a wish that cannot be met, such as a patch that the network cannot take.
    """
    options = options or PlanOptions()
    reasons: list[str] = [_describe_cases(fingerprint, spec)]
    normalization = _plan_normalization(fingerprint, spec, options, reasons)
    spacing = _target_spacing(fingerprint, options, reasons)
    if options.preset == "nnunet":
        configurations = nnunet_configurations(_nnunet_request(fingerprint, spec, options, spacing), reasons)
    else:
        configurations = _configurations(fingerprint, spec, options, spacing, reasons)
    configurations = {
        name: replace(entry, anti_alias=options.anti_alias, coarse_order=options.coarse_order)
        for name, entry in configurations.items()
    }
    axes = {case.left_right_axis for case in fingerprint.cases}
    plans = Plans(
        dataset=spec.name,
        preset=options.preset,
        memory_gb=options.budget_gb,
        normalization=normalization,
        left_right_axis=axes.pop() if len(axes) == 1 else None,
        configurations=configurations,
        reasons=tuple(reasons),
        fingerprint=fingerprint.inputs,
    )
    return with_networks(plans, fingerprint, spec, options)


def _describe_cases(fingerprint: Fingerprint, spec: DatasetSpec) -> str:
    shapes = np.array([case.shape for case in fingerprint.cases])
    median = "x".join(str(int(v)) for v in np.median(shapes, axis=0))
    absent = [value for value, cases in fingerprint.cases_with_label.items() if cases == 0]
    text = (
        f"{len(fingerprint.cases)} cases, {len(spec.channel_names)} channel(s), {len(spec.labels.values)} foreground "
        f"labels, median size {median} voxels (z, y, x)."
    )
    return text + (f" Labels {', '.join(absent)} occur in no case and cannot be learned." if absent else "")


def _plan_normalization(
    fingerprint: Fingerprint, spec: DatasetSpec, options: PlanOptions, reasons: list[str]
) -> tuple[ChannelNormalization, ...]:
    """Scheme of each channel from its name; z-score inside the nonzero mask when cropping removes much."""
    before = np.array([np.prod(case.shape, dtype=float) for case in fingerprint.cases])
    after = np.array([np.prod(case.cropped_shape, dtype=float) for case in fingerprint.cases])
    kept = float(np.median(after / before))
    mask = kept < CROP_MASK_THRESHOLD
    result = []
    for name, statistics in zip(spec.channel_names, fingerprint.intensities, strict=True):
        scheme = scheme_for_channel(name)
        if options.preset == "ukbob" and scheme in ("zscore", "ct"):
            scheme = "ct_window" if scheme == "ct" else "rescale_to_0_1"
        if scheme == "ct":
            entry = ChannelNormalization(
                scheme,
                clip_low=statistics.percentile_00_5,
                clip_high=statistics.percentile_99_5,
                mean=statistics.mean,
                std=statistics.std,
            )
            why = f"clipped to {entry.clip_low:.4g}..{entry.clip_high:.4g} (0.5/99.5% of foreground), global z-score"
        elif scheme == "ct_window":
            entry = ChannelNormalization(scheme, clip_low=PAPER_CT_WINDOW_HU[0], clip_high=PAPER_CT_WINDOW_HU[1])
            why = f"window {PAPER_CT_WINDOW_HU} HU scaled to [0, 1] (preset ukbob)"
        else:
            entry = ChannelNormalization(scheme, mask_nonzero=mask and scheme == "zscore")
            inside = f" inside the nonzero mask (cropping keeps only {kept:.0%})" if entry.mask_nonzero else ""
            why = {"zscore": f"z-score per case{inside}"}.get(scheme, scheme)
        reasons.append(f"Channel {name!r}: {why}.")
        result.append(entry)
    return tuple(result)


def _target_spacing(fingerprint: Fingerprint, options: PlanOptions, reasons: list[str]) -> tuple[float, float, float]:
    """Median spacing; 10th percentile on a coarse axis; isotropic for the paper's preset."""
    spacings = np.array([case.spacing_mm for case in fingerprint.cases], dtype=float)
    sizes = np.array([case.cropped_shape for case in fingerprint.cases], dtype=float)
    if options.spacing_mm is not None:
        reasons.append(f"Target spacing {_mm(options.spacing_mm)}: as asked.")
        return options.spacing_mm
    if options.preset == "nnunet":
        z, y, x = target_spacing(Cases(spacings, sizes, 0)).tolist()
        reasons.append(f"Target spacing {_mm((z, y, x))}: nnU-Net's rule.")
        return z, y, x
    target = np.median(spacings, axis=0)
    why = "median of the cases"
    if options.preset == "ukbob":
        # The paper resamples isotropically but gives no figure; this keeps the median voxel volume.
        target = np.full(3, float(np.prod(target)) ** (1 / 3))
        why = "isotropic, of the median voxel's volume (preset ukbob)"
    else:
        size = np.median(sizes, axis=0)
        worst = int(np.argmax(target))
        others = [axis for axis in range(3) if axis != worst]
        finest_other = float(max(target[others]))
        if target[worst] > ANISOTROPY_THRESHOLD * finest_other and size[worst] * ANISOTROPY_THRESHOLD < min(
            size[others]
        ):
            coarse = float(np.percentile(spacings[:, worst], 10))
            target[worst] = max(coarse, finest_other + 1e-5)
            why = f"median of the cases, 10th percentile on the coarse axis {'zyx'[worst]}"
    spacing = (float(target[0]), float(target[1]), float(target[2]))
    reasons.append(f"Target spacing {_mm(spacing)}: {why}.")
    return spacing


def _configurations(
    fingerprint: Fingerprint,
    spec: DatasetSpec,
    options: PlanOptions,
    spacing: tuple[float, float, float],
    reasons: list[str],
) -> dict[str, ConfigurationPlan]:
    """Full resolution, slices, and for large cases a low resolution with the cascade that follows it."""
    given = planning_input(fingerprint, spec, options, spacing)
    full = _plan_configuration(given, reasons, "3d_fullres")
    found = {"3d_fullres": full}
    low_spacing = None if options.patch_size else _lowres_spacing(full)
    if low_spacing is not None:
        reasons.append(
            f"3d_lowres: the patch of 3d_fullres covers less than {LOWRES_COVERAGE:.0%} of the median case, so a "
            "coarser configuration is offered as well."
        )
        low = planning_input(fingerprint, spec, options, low_spacing)
        found["3d_lowres"] = _plan_configuration(low, reasons, "3d_lowres")
        second = replace(given, previous_labels=len(spec.labels.values))
        found["3d_cascade_fullres"] = replace(
            _plan_configuration(second, reasons, "3d_cascade_fullres"),
            previous_stage="3d_lowres",
            arrays_of="3d_fullres",
        )
    if options.patch_size:
        reasons.append("2d: left out, because --patch-size asks for 3D patches.")
    else:
        axis = int(np.argmax(spacing))
        sliced = planning_input(fingerprint, spec, options, spacing, axis)
        found["2d"] = _plan_configuration(sliced, reasons, "2d")
    return found


def _nnunet_request(
    fingerprint: Fingerprint, spec: DatasetSpec, options: PlanOptions, spacing: tuple[float, float, float]
) -> NnunetRequest:
    return NnunetRequest(
        cases=Cases(
            np.array([case.spacing_mm for case in fingerprint.cases], dtype=float),
            np.array([case.cropped_shape for case in fingerprint.cases]),
            outputs=len(spec.content["labels"]),
        ),
        spacing_mm=spacing,
        memory_gb=options.memory_gb,
        batch_size=options.batch_size,
        previous_labels=len(spec.labels.values),
        describe=partial(planning_input, fingerprint, spec, options),
    )


def _plan_configuration(given: PlanningInput, reasons: list[str], name: str) -> ConfigurationPlan:
    planners = NETWORK_PLANNERS if given.slice_axis is None else SLICE_NETWORK_PLANNERS
    across = "" if given.slice_axis is None else f" (slices across {'zyx'[given.slice_axis]})"
    networks = {}
    for network, planner in planners.items():
        networks[network], why = planner(given)
        reasons.append(f"{name}{across}, {network}: {why}")
    return ConfigurationPlan(given.spacing_mm, given.median_shape, 3, networks, slice_axis=given.slice_axis)


def _lowres_spacing(full: ConfigurationPlan) -> tuple[float, float, float] | None:
    """Spacing at which the default network's patch covers enough of the median case, or None when not needed."""
    patch_voxels = float(np.prod(full.networks["swin_unetr"].patch_size))
    shape = np.asarray(full.median_shape, dtype=float)
    extent = shape * full.spacing_mm
    if patch_voxels / shape.prod() >= LOWRES_COVERAGE:
        return None
    spacing = np.asarray(full.spacing_mm, dtype=float)
    while patch_voxels / np.prod(extent / spacing) < LOWRES_COVERAGE:
        finer = spacing.max() / spacing > 2
        spacing = np.where(finer, spacing * LOWRES_STEP, spacing) if finer.any() else spacing * LOWRES_STEP
    if shape.prod() / np.prod(extent / spacing) < 2:
        return None
    return float(spacing[0]), float(spacing[1]), float(spacing[2])


def _mm(spacing: tuple[float, float, float]) -> str:
    return " x ".join(f"{value:.3g}" for value in spacing) + " mm (z, y, x)"
