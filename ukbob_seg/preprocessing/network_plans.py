"""Patch, batch and network size under a memory budget: Swin-UNETR and nnU-Net's U-Nets; see also ``baseline_plans``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ukbob_seg.errors import ConfigError
from ukbob_seg.preprocessing.memory_model import plain_conv_unet_memory_gb, swin_unetr_memory_gb
from ukbob_seg.preprocessing.nnunet_rules import RESIDUAL_BLOCKS, SIZINGS
from ukbob_seg.preprocessing.plans import NetworkPlan

DATASET_SHARE = 0.05  # a batch holds at most this share of the dataset's voxels
SWIN_MULTIPLE = 32
SWIN_MAX_EDGE = 96
SWIN_FEATURE_SIZES = (48, 36, 24, 12)
CONV_MIN_EDGE = 8  # pool while an edge has at least this many voxels
CONV_BASE_FEATURES = 32
# By dimension of the network: 2 (slices) or 3.
MAX_BATCH_SIZE = {2: 64, 3: 8}
CONV_MAX_FEATURES = {2: 512, 3: 320}
CONV_MAX_STAGES = {2: 8, 3: 6}
CONV_PATCH_VOLUME = {2: 2048**2, 3: 256**3}


@dataclass(frozen=True)
class PlanningInput:
    """What a network planner needs; shapes (z, y, x) at the configuration's spacing.

    ``slice_axis`` asks for a 2D network on slices across that axis; ``previous_labels`` for a cascade's second stage,
    which takes so many label maps of the first as further channels.
    """

    median_shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    dataset_voxels: float
    in_channels: int
    out_channels: int
    memory_gb: float
    paper_recipe: bool = False
    patch_size: tuple[int, int, int] | None = None
    batch_size: int | None = None
    feature_size: int | None = None
    slice_axis: int | None = None
    previous_labels: int = 0

    @property
    def input_channels(self) -> int:
        """Channels that the network takes."""
        return self.in_channels + self.previous_labels

    @property
    def stage_arguments(self) -> dict[str, Any]:
        """Arguments that every network needs of a configuration of slices or of a cascade."""
        sliced = {} if self.slice_axis is None else {"slice_axis": self.slice_axis}
        return sliced | ({"previous_labels": self.previous_labels} if self.previous_labels else {})


def plan_swin_unetr(given: PlanningInput) -> tuple[NetworkPlan, str]:
    """Plan Swin-UNETR: patch in multiples of 32 up to 96, feature size 48 where it fits, then smaller.

    Raises:
        ConfigError: a requested patch that is no multiple of 32 or leaves a one-voxel bottleneck.
    """
    fixed_features = (given.feature_size,) if given.feature_size else None
    if given.paper_recipe and given.patch_size is None:
        return _paper_swin(given)
    if given.patch_size is not None:
        _check_swin_patch(given.patch_size)
        patches = [given.patch_size]
    else:
        patches = _swin_patches(given)
    least_batch = given.batch_size or 2
    for batch in sorted({least_batch, given.batch_size or 1}, reverse=True):
        for patch in patches:
            # The smallest feature size is a last resort: a smaller patch costs less accuracy.
            for features in fixed_features or (SWIN_FEATURE_SIZES if patch == patches[-1] else SWIN_FEATURE_SIZES[:-1]):
                if _swin_memory(given, patch, batch, features) <= given.memory_gb:
                    return _finish_swin(given, patch, batch, features)
    features = fixed_features[0] if fixed_features else SWIN_FEATURE_SIZES[-1]
    return _finish_swin(given, patches[-1], given.batch_size or 1, features)


def _paper_swin(given: PlanningInput) -> tuple[NetworkPlan, str]:
    patch, batch, features = (96, 96, 96), given.batch_size or 8, given.feature_size or 48
    return _finish_swin(given, patch, batch, features, note="the paper's recipe")


def _swin_patches(given: PlanningInput) -> list[tuple[int, int, int]]:
    """Candidate patches, largest first: the median case in multiples of 32, then the physically longest axis less."""
    edges = [
        int(np.clip(round(n / SWIN_MULTIPLE), 1, SWIN_MAX_EDGE // SWIN_MULTIPLE)) * SWIN_MULTIPLE
        for n in given.median_shape
    ]
    if max(edges) == SWIN_MULTIPLE:
        edges[int(np.argmax(given.median_shape))] = 2 * SWIN_MULTIPLE  # the bottleneck must exceed one voxel
    patches = [(edges[0], edges[1], edges[2])]
    while sum(edge > SWIN_MULTIPLE for edge in edges) > 1 or max(edges) > 2 * SWIN_MULTIPLE:
        extent = [edge * s if edge > SWIN_MULTIPLE else 0.0 for edge, s in zip(edges, given.spacing_mm, strict=True)]
        edges[int(np.argmax(extent))] -= SWIN_MULTIPLE
        patches.append((edges[0], edges[1], edges[2]))
    return patches


def _check_swin_patch(patch: tuple[int, int, int]) -> None:
    if any(edge % SWIN_MULTIPLE for edge in patch) or max(patch) < 2 * SWIN_MULTIPLE:
        raise ConfigError(
            f"Swin-UNETR needs a patch in multiples of {SWIN_MULTIPLE} with one edge of at least "
            f"{2 * SWIN_MULTIPLE} voxels, got {patch}"
        )


def _swin_memory(given: PlanningInput, patch: tuple[int, int, int], batch: int, features: int) -> float:
    return swin_unetr_memory_gb(patch, batch, features, given.input_channels, given.out_channels)


def _finish_swin(
    given: PlanningInput, patch: tuple[int, int, int], batch: int, features: int, note: str = ""
) -> tuple[NetworkPlan, str]:
    if given.batch_size is None and not note:
        batch = grow_batch(given, patch, batch, lambda b: _swin_memory(given, patch, b, features))
    memory = _swin_memory(given, patch, batch, features)
    sizes = {"patch": given.patch_size, "batch": given.batch_size, "feature size": given.feature_size}
    asked = [name for name, size in sizes.items() if size]
    why = note or "largest that fits the budget"
    if asked and not note:
        why = "as asked for" if len(asked) == len(sizes) else f"{' and '.join(asked)} as asked for, else the largest"
    if memory > given.memory_gb:
        why += f"; OVER the budget of {given.memory_gb:g} GB: lower --batch-size, or give more memory"
    reason = f"patch {x_joined(patch)}, batch {batch}, feature size {features}, about {memory:.1f} GB ({why})."
    arguments = {"feature_size": features, "patch_merging": "distinct", **given.stage_arguments}
    return NetworkPlan(patch, batch, arguments, round(memory, 2)), reason


def plan_plain_conv_unet(given: PlanningInput) -> tuple[NetworkPlan, str]:
    """Plan nnU-Net's PlainConvUNet: patch shaped like the median case, pooled until edges are small.

    With ``slice_axis`` the same in 2D: the patch is one voxel thick along it, strides and kernels have two entries.

    Raises:
        ConfigError: a requested patch that pooling does not divide.
    """
    return _plan_conv("plain_conv_unet", given, None)


def plan_residual_unet(name: str, given: PlanningInput) -> tuple[NetworkPlan, str]:
    """Plan nnU-Net's residual-encoder U-Net by the same rules, with its blocks per stage.

    ``resenc_unet_m``, ``_l`` and ``_xl`` take what nnU-Net's planner of that size aims at (8, 24 and 40 GB), or the
    budget where that is less; ``residual_encoder_unet`` takes the budget.

    Raises:
        ConfigError: a requested patch that pooling does not divide.
    """
    aim = SIZINGS[name].memory_gb if name in SIZINGS else given.memory_gb
    return _plan_conv(name, replace(given, memory_gb=min(aim, given.memory_gb)), RESIDUAL_BLOCKS)


def _plan_conv(name: str, given: PlanningInput, blocks: Sequence[int] | None) -> tuple[NetworkPlan, str]:
    plane = [axis for axis in range(3) if axis != given.slice_axis]
    spacing, median = [given.spacing_mm[a] for a in plane], [given.median_shape[a] for a in plane]
    least_batch = given.batch_size or 2
    edges = [given.patch_size[a] for a in plane] if given.patch_size else _conv_start_patch(median, spacing)
    while True:
        edges, strides, kernels = _conv_topology(edges, spacing)
        memory = _conv_memory(given, edges, least_batch, strides, blocks)
        if given.patch_size is not None or memory <= given.memory_gb:
            break
        # Shrink the axis that covers most of the median case, by one unit of its pooling.
        units = np.prod(strides, axis=0)
        share = [n / m if n - unit >= CONV_MIN_EDGE else 0.0 for n, m, unit in zip(edges, median, units, strict=True)]
        if not any(share):
            break
        axis = int(np.argmax(share))
        edges = [n - int(units[a]) if a == axis else n for a, n in enumerate(edges)]
    z, y, x = (edges[plane.index(axis)] if axis in plane else 1 for axis in range(3))
    patch = (z, y, x)
    if given.patch_size is not None and patch != given.patch_size:
        raise ConfigError(f"{name}: patch {given.patch_size} is not divisible by its pooling; try {patch}")

    def memory_gb(batch: int) -> float:
        return _conv_memory(given, edges, batch, strides, blocks)

    batch = given.batch_size or grow_batch(given, patch, least_batch, memory_gb)
    memory, stages = memory_gb(batch), len(strides)
    encoder, decoder = (2, 2) if blocks is None else (blocks[:stages], 1)
    arguments = conv_arguments(strides, kernels, _conv_features(strides), encoder, decoder) | given.stage_arguments
    over = "" if memory <= given.memory_gb else f", OVER the budget of {given.memory_gb:g} GB"
    reason = f"patch {x_joined(patch)}, batch {batch}, {stages} stages, about {memory:.1f} GB{over}."
    return NetworkPlan(patch, batch, arguments, round(memory, 2)), reason


def conv_arguments(
    strides: Sequence[Sequence[int]],
    kernels: Sequence[Sequence[int]],
    features: Sequence[int],
    encoder: int | Sequence[int],
    decoder: int,
) -> dict[str, Any]:
    """Arguments of nnU-Net's networks; ``encoder`` convolutions (or residual blocks) and ``decoder`` ones a stage."""
    stages = len(strides)
    return {
        "features_per_stage": list(features),
        "strides": [list(stride) for stride in strides],
        "kernel_sizes": [list(kernel) for kernel in kernels],
        "n_conv_per_stage": [encoder] * stages if isinstance(encoder, int) else list(encoder),
        "n_conv_per_stage_decoder": [decoder] * (stages - 1),
        "deep_supervision": True,
        "norm": "instance",
    }


def _conv_start_patch(median: Sequence[int], spacing_mm: Sequence[float]) -> list[int]:
    """Aspect 1/spacing, volume 256^3 (2D: 2048^2), clipped to the median case (nnU-Net's start)."""
    dims = len(median)
    aspect = 1 / np.asarray(spacing_mm)
    edges = aspect / np.prod(aspect) ** (1 / dims) * CONV_PATCH_VOLUME[dims] ** (1 / dims)
    return [max(CONV_MIN_EDGE, min(round(e), n)) for e, n in zip(edges, median, strict=True)]


def _conv_topology(
    patch: Sequence[int], spacing_mm: Sequence[float]
) -> tuple[list[int], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Strides and kernels per stage, and the patch rounded up to what they divide.

    An axis is pooled while it keeps at least four voxels, together with the others once their spacings are within
    a factor of two; kernels are 1 along an axis that is still more than twice as coarse as the finest.
    """
    spacing, size = np.asarray(spacing_mm, dtype=float), np.asarray(patch, dtype=int)
    strides: list[tuple[int, ...]] = [(1,) * len(patch)]
    kernels: list[tuple[int, ...]] = []
    while True:
        close = spacing / spacing.min()
        kernels.append(tuple(3 if ratio < 2 else 1 for ratio in close))
        pool = (size >= CONV_MIN_EDGE) & (close < 2)
        if not pool.any() or len(strides) == CONV_MAX_STAGES[len(patch)]:
            break
        stride = np.where(pool, 2, 1)
        strides.append(tuple(int(s) for s in stride))
        spacing, size = spacing * stride, -(-size // stride)
    multiple = np.prod(strides, axis=0)
    return [int(-(-n // m) * m) for n, m in zip(patch, multiple, strict=True)], strides, kernels


def _conv_features(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    most = CONV_MAX_FEATURES[len(strides[0])]
    return tuple(min(CONV_BASE_FEATURES * 2**i, most) for i in range(len(strides)))


def _conv_memory(
    given: PlanningInput,
    patch: Sequence[int],
    batch: int,
    strides: Sequence[Sequence[int]],
    blocks: Sequence[int] | None,
) -> float:
    return plain_conv_unet_memory_gb(
        patch, batch, strides, _conv_features(strides), given.input_channels, given.out_channels, blocks
    )


def grow_batch(given: PlanningInput, patch: tuple[int, int, int], least: int, memory_gb: Callable[[int], float]) -> int:
    """Largest batch within the budget, the dataset share and the cap; never below ``least``."""
    by_share = int(DATASET_SHARE * given.dataset_voxels / float(np.prod(patch)))
    most = MAX_BATCH_SIZE[3 if given.slice_axis is None else 2]
    batch = least
    while batch + 1 <= min(by_share, most) and memory_gb(batch + 1) <= given.memory_gb:
        batch += 1
    return batch


def x_joined(values: tuple[int, int, int]) -> str:
    """``96x96x64``."""
    return "x".join(str(v) for v in values)


NETWORK_PLANNERS: dict[str, Callable[[PlanningInput], tuple[NetworkPlan, str]]] = {
    "swin_unetr": plan_swin_unetr,
    "plain_conv_unet": plan_plain_conv_unet,
}
# Swin-UNETR is a 3D network.
SLICE_NETWORK_PLANNERS = {"plain_conv_unet": plan_plain_conv_unet}
