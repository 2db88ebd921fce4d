"""What a user may ask of the planner, and what a network's planner is told of a dataset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import ConfigError
from ukbob_seg.preprocessing.fingerprint import Fingerprint
from ukbob_seg.preprocessing.network_plans import PlanningInput

PRESETS = ("default", "ukbob", "nnunet")
DEFAULT_MEMORY_GB = 8.0


@dataclass(frozen=True)
class PlanOptions:
    """What the user may ask of the planner.

    Attributes:
        memory_gb: budget for one training step, GiB; None is 8, and with preset ``nnunet`` what each of nnU-Net's
            planners aims at.
        preset: ``default``; ``ukbob`` for the paper's exact recipe (isotropic, 96^3, feature size 48, batch 8,
            intensities scaled to [0, 1]); ``nnunet`` for the decisions of nnU-Net's own planners.
        spacing_mm: target spacing (z, y, x) instead of the rule's.
        patch_size: patch (z, y, x) instead of the rule's, for every network.
        batch_size: batch size instead of the rule's, for every network.
        feature_size: Swin-UNETR feature size instead of the rule's.
        anti_alias: blur images along axes that shrink before they are resampled.
        coarse_order: interpolation of images across a coarse axis, 0 (nearest voxels) or 1 (linear).
        networks: further networks to plan, by registry name (``requested_networks``).
    """

    memory_gb: float | None = None
    preset: str = "default"
    spacing_mm: tuple[float, float, float] | None = None
    patch_size: tuple[int, int, int] | None = None
    batch_size: int | None = None
    feature_size: int | None = None
    anti_alias: bool = False
    coarse_order: int = 0
    networks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("spacing_mm", "patch_size", "networks"):  # lists are as good
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.preset not in PRESETS:
            raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if not 0.5 <= self.budget_gb <= 10_000:
            raise ConfigError(f"--memory-gb must be at least 0.5, got {self.memory_gb}")
        if self.spacing_mm is not None and not all(0 < mm < float("inf") for mm in self.spacing_mm):
            raise ConfigError(f"--spacing must be positive (z y x, mm), got {self.spacing_mm}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.feature_size is not None and (self.feature_size < 12 or self.feature_size % 12):
            raise ConfigError(f"--feature-size must be a multiple of 12, got {self.feature_size}")
        for flag, value in (("--patch-size", self.patch_size), ("--feature-size", self.feature_size)):
            if self.preset == "nnunet" and value is not None:
                raise ConfigError(f"{flag} cannot be combined with --preset nnunet; change the size in plans.json")

    @property
    def budget_gb(self) -> float:
        """Budget of a training step where no planner brings its own."""
        return DEFAULT_MEMORY_GB if self.memory_gb is None else self.memory_gb


def resampled_shape(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], target_mm: tuple[float, float, float]
) -> tuple[int, int, int]:
    """Voxels (z, y, x) that cover the same extent at another spacing."""
    z, y, x = (max(1, round(n * s / t)) for n, s, t in zip(shape, spacing_mm, target_mm, strict=True))
    return z, y, x


def planning_input(
    fingerprint: Fingerprint,
    spec: DatasetSpec,
    options: PlanOptions,
    spacing: tuple[float, float, float],
    slice_axis: int | None = None,
) -> PlanningInput:
    """What the network planners need at one spacing; along ``slice_axis`` every case keeps its own."""
    shapes = np.array([resampled_shape(case.cropped_shape, case.spacing_mm, spacing) for case in fingerprint.cases])
    if slice_axis is not None:
        shapes[:, slice_axis] = [case.cropped_shape[slice_axis] for case in fingerprint.cases]
        own = float(np.median([case.spacing_mm[slice_axis] for case in fingerprint.cases]))
        first, second, third = (own if axis == slice_axis else mm for axis, mm in enumerate(spacing))
        spacing = (first, second, third)
    z, y, x = (int(v) for v in np.median(shapes, axis=0))
    return PlanningInput(
        median_shape=(z, y, x),
        spacing_mm=spacing,
        dataset_voxels=float(np.prod(shapes, axis=1, dtype=float).sum()),
        in_channels=len(spec.channel_names),
        out_channels=spec.labels.num_outputs,
        memory_gb=options.budget_gb,
        paper_recipe=options.preset == "ukbob",
        patch_size=options.patch_size,
        batch_size=options.batch_size,
        feature_size=options.feature_size,
        slice_axis=slice_axis,
    )
