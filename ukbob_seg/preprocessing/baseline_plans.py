"""Plans of the baselines: the published network, with the largest patch and batch that the memory allows.

Their widths and depths are never changed: what is compared is what was published. A patch is at most 96 voxels long, as
Swin-UNETR's, so that all networks see as much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ukbob_seg.errors import ConfigError
from ukbob_seg.preprocessing.memory_model import CONV, peak_gb
from ukbob_seg.preprocessing.network_plans import PlanningInput, grow_batch, x_joined
from ukbob_seg.preprocessing.plans import NetworkPlan

MAX_EDGE = 96
PAPER_BATCH = 8
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Baseline:
    """What is counted of a network with its published arguments, by benchmarks/baseline_memory.py.

    Attributes:
        divisor: voxels that the patch must be a multiple of, along every axis or per axis (z, y, x).
        weights: parameters, with 1 input channel and 3 outputs.
        kept: values that the forward pass keeps for the backward pass, per voxel of the patch, without outputs.
        kept_per_output: further ones per voxel and output.
        kept_square: further ones per voxel and million voxels of the patch: attention among all tokens.
        outputs: values of all outputs per voxel and class; more than 1 with coarser ones beside the finest.
        weights_per_output: parameters per output.
        patch_argument: argument that is the patch; empty where the network takes any.
        channels: numbers of input channels that it takes; empty for any.
        arguments: of the published form, where the class has other defaults; or what learns better, see the docs.
        extent: argument that is the patch divided by ``extent_share``: the map in which positions are told apart.
        extent_share: per axis.
    """

    divisor: int | Triple
    weights: float
    kept: float
    kept_per_output: float = 0.0
    kept_square: float = 0.0
    outputs: float = 1.0
    weights_per_output: float = 0.0
    patch_argument: str = ""
    channels: tuple[int, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    extent: str = ""
    extent_share: Triple = (1, 1, 1)

    @property
    def multiple(self) -> Triple:
        """The divisor of each axis."""
        return (self.divisor,) * 3 if isinstance(self.divisor, int) else self.divisor


VELOCITY = {"target": "velocity"}
DEEP = {"deep_supervision": True}
BASELINES: dict[str, Baseline] = {
    "unet": Baseline(16, weights=4.8e6, kept=35, kept_per_output=3.0, weights_per_output=1165),
    "vnet": Baseline(
        16, weights=45.6e6, kept=280, kept_per_output=2.0, weights_per_output=4014, channels=(1, 2, 4, 8, 16)
    ),
    "segresnet": Baseline(8, weights=18.8e6, kept=501),
    "attention_unet": Baseline(16, weights=5.9e6, kept=269),
    "resunet_pp": Baseline(8, weights=11.9e6, kept=815),
    "unetr": Baseline(16, weights=92.8e6, kept=293, kept_square=8.6, patch_argument="patch_size"),
    "transunet": Baseline(32, weights=116.8e6, kept=433, patch_argument="patch_size"),
    "transbts": Baseline(8, weights=31.5e6, kept=449, kept_square=366.2, patch_argument="patch_size"),
    "nnformer": Baseline(
        (16, 32, 32),
        weights=149.6e6,
        kept=468,
        kept_square=26.1,
        outputs=1.14,
        weights_per_output=43011,
        arguments=DEEP,
        extent="global_extent",
        extent_share=(8, 16, 16),
    ),
    "medformer": Baseline(16, weights=39.5e6, kept=1290, outputs=1.02, arguments=DEEP),
    "ux_net": Baseline(16, weights=53.0e6, kept=619),
    "swin_unetr_v2": Baseline(32, weights=72.8e6, kept=1606),
    "medsegdiff_v1": Baseline(
        8,
        weights=35.4e6,
        kept=2362,
        kept_per_output=1.0,
        weights_per_output=1729,
        patch_argument="image_size",
        arguments=VELOCITY,
    ),
    "medsegdiff_v2": Baseline(
        16,
        weights=73.4e6,
        kept=2376,
        kept_per_output=1.0,
        kept_square=201.7,
        outputs=2.0,
        weights_per_output=1762,
        arguments=VELOCITY,
    ),
}


def baseline_memory_gb(name: str, patch: Triple, batch: int, in_channels: int, out_channels: int) -> float:
    """Peak memory of a training step, GiB.

    Args:
        name: key of ``BASELINES``.
        patch: voxels (z, y, x).
        batch: patches per step.
        in_channels: of the input.
        out_channels: network outputs.
    """
    counted = BASELINES[name]
    kept = counted.kept + counted.kept_per_output * out_channels + counted.kept_square * float(np.prod(patch)) / 1e6
    weights = counted.weights + counted.weights_per_output * (out_channels - 3)
    return peak_gb(CONV, weights, patch, batch, kept, in_channels, counted.outputs * out_channels)


def plan_baseline(name: str, given: PlanningInput) -> tuple[NetworkPlan, str]:
    """Plan one of ``BASELINES``: the median case in multiples of its divisor, up to 96 voxels, less where too large.

    With the paper's preset 96^3 and batch 8, the recipe of all its networks.

    Raises:
        ConfigError: slices, a number of channels, or a requested patch that the network cannot take.
    """
    counted = BASELINES[name]
    if given.slice_axis is not None:
        raise ConfigError(f"{name} is a 3D network and cannot be planned for slices; give a 3D configuration")
    if counted.channels and given.input_channels not in counted.channels:
        raise ConfigError(
            f"{name} takes {', '.join(map(str, counted.channels))} input channels, but the data have "
            f"{given.input_channels}; choose another network"
        )

    def memory(patch: Triple, batch: int) -> float:
        return baseline_memory_gb(name, patch, batch, given.input_channels, given.out_channels)

    patch, batch = _choose(name, counted, given, memory)
    if given.batch_size is None and not given.paper_recipe:
        batch = grow_batch(given, patch, batch, lambda n: memory(patch, n))
    needed = memory(patch, batch)
    over = "" if needed <= given.memory_gb else f", OVER the budget of {given.memory_gb:g} GB"
    why = " (the paper's recipe)" if given.paper_recipe and given.patch_size is None else ""
    form = "learns velocity" if counted.arguments == VELOCITY else "as published"
    reason = f"patch {x_joined(patch)}, batch {batch}, {form}, about {needed:.1f} GB{over}{why}."
    sized = {counted.patch_argument: list(patch)} if counted.patch_argument else {}
    if counted.extent:
        sized[counted.extent] = [n // share for n, share in zip(patch, counted.extent_share, strict=True)]
    return NetworkPlan(patch, batch, {**counted.arguments, **sized, **given.stage_arguments}, round(needed, 2)), reason


def _choose(
    name: str, counted: Baseline, given: PlanningInput, memory_gb: Callable[[Triple, int], float]
) -> tuple[Triple, int]:
    """Patch, and the batch that it is chosen for: two where a patch fits with two, else one."""
    if given.patch_size is not None:
        _check(name, counted, given.patch_size)
        patches = [given.patch_size]
    elif given.paper_recipe:
        return _largest(counted), given.batch_size or PAPER_BATCH
    else:
        patches = _candidates(counted, given)
    for batch in [given.batch_size] if given.batch_size else [2, 1]:
        for patch in patches:
            if memory_gb(patch, batch) <= given.memory_gb:
                return patch, batch
    return patches[-1], given.batch_size or 1


def _check(name: str, counted: Baseline, patch: Triple) -> None:
    if any(n % m for n, m in zip(patch, counted.multiple, strict=True)) or tuple(patch) == counted.multiple:
        raise ConfigError(
            f"{name} needs a patch (z, y, x) in multiples of {counted.multiple}, and twice as much along one axis at "
            f"least; got {tuple(patch)}"
        )


def _largest(counted: Baseline) -> Triple:
    z, y, x = (max(1, MAX_EDGE // m) * m for m in counted.multiple)
    return z, y, x


def _candidates(counted: Baseline, given: PlanningInput) -> list[Triple]:
    """Largest first: the median case in multiples of the divisor, then the physically longest axis less."""
    multiple = counted.multiple
    most = [max(2, MAX_EDGE // m) for m in multiple]
    units = [int(np.clip(round(n / m), 1, k)) for n, m, k in zip(given.median_shape, multiple, most, strict=True)]
    if max(units) == 1:
        units[int(np.argmax(given.median_shape))] = 2  # normalisation of a single voxel has no statistics
    found = []
    while True:
        z, y, x = (u * m for u, m in zip(units, multiple, strict=True))
        found.append((z, y, x))
        if sum(units) <= 4:
            return found
        extent = [u * m * s if u > 1 else 0.0 for u, m, s in zip(units, multiple, given.spacing_mm, strict=True)]
        units[int(np.argmax(extent))] -= 1


BASELINE_PLANNERS: dict[str, Callable[[PlanningInput], tuple[NetworkPlan, str]]] = {
    name: partial(plan_baseline, name) for name in BASELINES
}
