"""plans.json: what was decided for a dataset. A user may read and edit every field."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.files import json_text, read_json, write_json
from ukbob_seg.preprocessing.normalization import ChannelNormalization

log = logging.getLogger(__name__)

FORMAT_VERSION = 1


@dataclass(frozen=True)
class NetworkPlan:
    """How one network is built and fed in one configuration.

    Attributes:
        patch_size: voxels (z, y, x) of a training patch and of an inference window.
        batch_size: patches per training step.
        arguments: keyword arguments of the network's builder.
        estimated_memory_gb: predicted peak memory of a training step, GiB.
    """

    patch_size: tuple[int, int, int]
    batch_size: int
    arguments: dict[str, Any]
    estimated_memory_gb: float

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (*self.patch_size, self.batch_size))
        if not whole or len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ConfigError(
                f"patch_size must be three positive whole numbers (z, y, x), got {self.patch_size}, and batch_size one"
            )
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True)
class ConfigurationPlan:
    """One resolution at which the dataset is preprocessed and trained.

    Attributes:
        spacing_mm: target voxel size (z, y, x).
        median_shape: median case after cropping and resampling, voxels (z, y, x).
        image_order: spline order of image resampling (labels vote among their eight neighbours, logits are linear).
        networks: a plan for each network, by registry name.
        slice_axis: array axis across which a 2D configuration cuts its slices, None in 3D. Cases keep their own
            spacing along it, and patches are one voxel thick.
        previous_stage: configuration whose segmentation is a further input (second stage of a cascade), or None.
        arrays_of: configuration whose preprocessed arrays this one uses, None for its own.
        anti_alias: blur images along axes that shrink before they are resampled.
        coarse_order: interpolation of images across a coarse axis, 0 (nearest voxels) or 1 (linear).
    """

    spacing_mm: tuple[float, float, float]
    median_shape: tuple[int, int, int]
    image_order: int
    networks: dict[str, NetworkPlan]
    slice_axis: int | None = None
    previous_stage: str | None = None
    arrays_of: str | None = None
    anti_alias: bool = False
    coarse_order: int = 0

    def __post_init__(self) -> None:
        if len(self.spacing_mm) != 3 or min(self.spacing_mm) <= 0:
            raise ConfigError(f"spacing_mm must be three positive numbers (z, y, x), got {self.spacing_mm}")
        if self.image_order not in (0, 1, 3):
            raise ConfigError(f"image_order must be 0, 1 or 3, got {self.image_order}")
        if self.slice_axis not in (None, 0, 1, 2):
            raise ConfigError(f"slice_axis must be 0, 1, 2 or null, got {self.slice_axis}")
        if not isinstance(self.anti_alias, bool):
            raise ConfigError(f"anti_alias must be true or false, got {self.anti_alias!r}")
        if isinstance(self.coarse_order, bool) or self.coarse_order not in (0, 1):
            raise ConfigError(f"coarse_order must be 0 (nearest) or 1 (linear), got {self.coarse_order!r}")

    def target_spacing(self, spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
        """Spacing (z, y, x) in mm that a case of ``spacing_mm`` is resampled to: its own across slices."""
        if self.slice_axis is None:
            return self.spacing_mm
        z, y, x = (
            own if axis == self.slice_axis else target
            for axis, (own, target) in enumerate(zip(spacing_mm, self.spacing_mm, strict=True))
        )
        return z, y, x

    @property
    def default_network(self) -> str:
        """Swin-BOB where the configuration has it, else the first network.

        Raises:
            ConfigError: there is none.
        """
        if not self.networks:
            raise ConfigError("the configuration has no network in plans.json; run ukbob_plan again")
        return "swin_unetr" if "swin_unetr" in self.networks else next(iter(self.networks))

    def network(self, name: str) -> NetworkPlan:
        """The plan of one network.

        Raises:
            ConfigError: the plans hold none for it.
        """
        if name not in self.networks:
            raise ConfigError(
                f"the plans hold no network {name!r} (found: {', '.join(self.networks)}); "
                "run ukbob_plan again or add it to plans.json"
            )
        return self.networks[name]


@dataclass(frozen=True)
class Plans:
    """Everything that later stages need to know about a dataset.

    Attributes:
        dataset: ``DatasetXXX_Name``.
        preset: recipe that the planner followed, ``default``, ``ukbob`` or ``nnunet``.
        memory_gb: budget for a training step that the planner was given, GiB.
        normalization: one entry per channel.
        left_right_axis: array axis (0 = z, 1 = y, 2 = x) that runs left-right in every case, or None.
        configurations: by name; ``3d_fullres`` and ``2d``, for large cases ``3d_lowres`` and ``3d_cascade_fullres``.
        reasons: why, in sentences.
        fingerprint: ``inputs`` of the fingerprint that they were made from; tells whether the dataset has changed.
        format_version: of this file.
    """

    dataset: str
    preset: str
    memory_gb: float
    normalization: tuple[ChannelNormalization, ...]
    left_right_axis: int | None
    configurations: dict[str, ConfigurationPlan]
    reasons: tuple[str, ...] = field(default=())
    fingerprint: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ConfigError(
                f"plans of format {self.format_version} cannot be used by this version (format {FORMAT_VERSION}); "
                "run ukbob_plan again"
            )
        if self.left_right_axis not in (None, 0, 1, 2):
            raise ConfigError(f"left_right_axis must be 0, 1, 2 or null, got {self.left_right_axis}")

    def configuration(self, name: str) -> ConfigurationPlan:
        """One configuration.

        Raises:
            ConfigError: the plans hold none of that name.
        """
        if name not in self.configurations:
            raise ConfigError(f"the plans hold no configuration {name!r} (found: {', '.join(self.configurations)})")
        return self.configurations[name]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str = "plans.json") -> Plans:
        """Validate the content of a plans.json.

        Raises:
            ConfigError: unknown or missing entries, or values out of range; names the entry.
        """
        plain = dict(content)
        plain["normalization"] = tuple(
            _build(ChannelNormalization, entry, f"{where}: normalization") for entry in plain.get("normalization", ())
        )
        configurations = {}
        for name, entry in _table(plain.get("configurations", {}), f"{where}: configurations").items():
            inner = dict(_table(entry, f"{where}: {name}"))
            inner["networks"] = {
                network: _build(NetworkPlan, plan, f"{where}: {name}: {network}")
                for network, plan in _table(inner.get("networks", {}), f"{where}: {name}: networks").items()
            }
            configurations[name] = _build(ConfigurationPlan, inner, f"{where}: {name}")
        plain["configurations"] = configurations
        return _build(cls, plain, where)

    @classmethod
    def load(cls, path: Path) -> Plans:
        """Read plans.json.

        Raises:
            DatasetError: it is not there, or no plans.
        """
        if not path.is_file():
            raise DatasetError(
                f"plans {path} do not exist; ukbob_plan_and_preprocess makes them, in a model's folder ukbob_train"
            )
        return cls.from_json(read_json(path, "plans"), str(path))

    def save(self, path: Path) -> None:
        """Write plans.json; equal plans give equal bytes. Different plans that were there, edited by hand perhaps,
        are kept as ``plans.previous.json``.
        """
        path = Path(path)
        if path.is_file() and path.read_text(encoding="utf-8") != json_text(self.to_json()):
            path.replace(path.with_name(f"{path.stem}.previous.json"))
            log.warning("%s: the plans that were there are kept as %s.previous.json", path, path.stem)
        write_json(path, self.to_json())


def _table(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a table of names, got {content!r}")
    return content


def _build(cls: type, content: Mapping[str, Any], where: str) -> Any:
    """Make a dataclass from JSON: every key known, every required one present, lists become tuples."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(content) - set(fields))
    if unknown:
        raise ConfigError(f"{where}: unknown entry {', '.join(unknown)}; known are {', '.join(fields)}")
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(content))
    if missing:
        raise ConfigError(f"{where}: missing entry {', '.join(missing)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error
