"""Configurations of ``--preset nnunet``: what nnU-Net's planners decide, for each of its networks, in (z, y, x).

nnU-Net writes one file of plans per planner. Here they lie side by side and ``--network`` chooses. Full resolution and
slices are the same arrays for all of them; a low resolution depends on the patch, so each network has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ukbob_seg.errors import ConfigError
from ukbob_seg.preprocessing.network_plans import PlanningInput, conv_arguments, plan_swin_unetr
from ukbob_seg.preprocessing.nnunet_rules import SIZINGS, Cases, SizedNetwork, coarsest_first, size_all
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan

STANDARD = "plain_conv_unet"  # its low resolution has nnU-Net's plain name, and serves Swin-UNETR too
Spacing = tuple[float, float, float]
T = TypeVar("T")


@dataclass(frozen=True)
class NnunetRequest:
    """What the preset starts from.

    Attributes:
        cases: spacings, sizes after cropping, and outputs as nnU-Net counts them.
        spacing_mm: target spacing (z, y, x).
        memory_gb: graphics memory to size for; None for what each planner aims at.
        batch_size: instead of the rule's.
        previous_labels: foreground labels, which a cascade's second stage takes as channels.
        describe: makes the planning input of the default rules from a spacing and a slice axis.
    """

    cases: Cases
    spacing_mm: Spacing
    memory_gb: float | None
    batch_size: int | None
    previous_labels: int
    describe: Callable[[Spacing, int | None], PlanningInput]


def nnunet_configurations(request: NnunetRequest, reasons: list[str]) -> dict[str, ConfigurationPlan]:
    """``3d_fullres``, ``3d_lowres``, ``3d_cascade_fullres`` and ``2d`` of nnU-Net's standard U-Net and of ResEnc.

    Low resolutions of the residual networks and their cascades carry the network's name. ``swin_unetr``, which nnU-Net
    does not have, is planned by the default rules at the spacings of the standard U-Net.

    Raises:
        ConfigError: cases too small for a U-Net of nnU-Net, or labels too many for the memory.
    """
    target = np.array(request.spacing_mm)
    sized = {name: size_all(request.cases, target, sizing, request.memory_gb) for name, sizing in SIZINGS.items()}
    reasons.append(
        "Networks sized by nnU-Net's rules for "
        + ", ".join(f"{request.memory_gb or sizing.memory_gb:g} GB ({name})" for name, sizing in SIZINGS.items())
        + "."
    )
    found = {}
    if "3d_fullres" in sized[STANDARD]:
        full = {name: networks["3d_fullres"] for name, networks in sized.items()}
        found["3d_fullres"] = _configuration("3d_fullres", full, request, reasons)
    else:
        reasons.append("Only 2d, as in nnU-Net: the median case is one voxel thick.")
    for name, networks in sized.items():
        if "3d_lowres" in networks:
            suffix = "" if name == STANDARD else f"_{name}"
            lowres, cascade = f"3d_lowres{suffix}", f"3d_cascade_fullres{suffix}"
            found[lowres] = _configuration(lowres, {name: networks["3d_lowres"]}, request, reasons)
            found[cascade] = _cascade(cascade, found["3d_fullres"], name, request, reasons)
    slices = {name: networks["2d"] for name, networks in sized.items()}
    found["2d"] = _configuration("2d", slices, request, reasons)
    return found


def _configuration(
    name: str, sized: dict[str, SizedNetwork], request: NnunetRequest, reasons: list[str]
) -> ConfigurationPlan:
    """One resolution from what was decided with the coarsest axis first."""
    order = coarsest_first(request.spacing_mm)
    some = next(iter(sized.values()))
    slice_axis = order[0] if len(some.spacing_mm) == 2 else None
    axes = order if slice_axis is None else order[1:]
    own = request.describe(request.spacing_mm, slice_axis)  # of 2D along the slice axis: the cases' own
    spacing, shape = list(own.spacing_mm), list(own.median_shape)
    for axis, mm, voxels in zip(axes, some.spacing_mm, some.median_shape, strict=True):
        spacing[axis], shape[axis] = mm, int(voxels)
    networks = {network: _network(network, size, axes, request) for network, size in sized.items()}
    reasons.append(f"{name}: " + "; ".join(_summary(network, entry) for network, entry in networks.items()) + ".")
    if slice_axis is None and STANDARD in networks:
        networks["swin_unetr"], why = plan_swin_unetr(request.describe(_triple(spacing), None))
        reasons.append(f"{name}, swin_unetr (default rules): {why}")
    return ConfigurationPlan(_triple(spacing), _triple(shape), 3, networks, slice_axis=slice_axis)


def _cascade(
    name: str, full: ConfigurationPlan, network: str, request: NnunetRequest, reasons: list[str]
) -> ConfigurationPlan:
    """The second stage: the same network at full resolution, with the labels of the first as channels."""
    entry = full.networks[network]
    further = {"previous_labels": request.previous_labels}
    networks = {network: replace(entry, arguments={**entry.arguments, **further})}
    if network == STANDARD:
        given = replace(request.describe(full.spacing_mm, None), previous_labels=request.previous_labels)
        networks["swin_unetr"], _ = plan_swin_unetr(given)
    previous = name.replace("3d_cascade_fullres", "3d_lowres")
    reasons.append(f"{name}: as 3d_fullres, with the {request.previous_labels} labels of {previous} as further input.")
    return replace(full, networks=networks, previous_stage=previous, arrays_of="3d_fullres")


def _network(name: str, size: SizedNetwork, axes: Sequence[int], request: NnunetRequest) -> NetworkPlan:
    """Plans of one network, its axes back in the order (z, y, x)."""
    topology, sizing = size.topology, SIZINGS[name]
    stages = len(topology.strides)
    if stages == 1:
        raise ConfigError(
            f"preset nnunet: {name} cannot be planned for cases of {'x'.join(f'{n:g}' for n in size.median_shape)} "
            f"voxels and {request.cases.outputs} outputs, because its patch would be too small to be pooled; "
            "use --preset default"
        )
    back = np.argsort(axes)
    patch = [1, 1, 1]
    for axis, edge in zip(axes, topology.patch, strict=True):
        patch[axis] = edge
    arguments = conv_arguments(
        [[stride[a] for a in back] for stride in topology.strides],
        [[kernel[a] for a in back] for kernel in topology.kernels],
        topology.features,
        sizing.encoder_blocks[:stages],
        sizing.decoder_convolutions,
    )
    sliced = {} if len(axes) == 3 else {"slice_axis": ({0, 1, 2} - set(axes)).pop()}
    batch = request.batch_size or size.batch
    memory = round(size.memory_gb * batch / size.batch, 2)
    return NetworkPlan(_triple(patch), batch, arguments | sliced, memory)


def _summary(network: str, entry: NetworkPlan) -> str:
    return f"{network} {'x'.join(map(str, entry.patch_size))}, batch {entry.batch_size}"


def _triple(values: Sequence[T]) -> tuple[T, T, T]:
    z, y, x = values
    return z, y, x
