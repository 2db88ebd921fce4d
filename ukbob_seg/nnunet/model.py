"""A trained model folder of nnU-Net v2, described as one of ours.

    model = NnunetModel.load(folder)                  # or an exported zip archive
    networks = model.networks("cuda")

Nothing of nnU-Net is imported: plans.json and dataset.json are read as the documents that they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ukbob_seg.dataset.orientation import checked_orientation
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import CheckpointError, ConfigError, DatasetError, listing
from ukbob_seg.files import read_json
from ukbob_seg.networks.registry import set_deep_supervision
from ukbob_seg.networks.wrappers import unwrapped
from ukbob_seg.nnunet.architecture import AxisOrder, network_arguments
from ukbob_seg.nnunet.folders import INFERENCE_CONFIG, ModelFiles, find_model
from ukbob_seg.nnunet.resampling import ResamplingRule
from ukbob_seg.nnunet.weights import NnunetCheckpoint, read_nnunet_checkpoint
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan, Plans
from ukbob_seg.training.checkpoint import ModelDescription, load_into

_SCHEMES = {
    "ZScoreNormalization": "zscore",
    "CTNormalization": "ct",
    "NoNormalization": "no_norm",
    "RescaleTo01Normalization": "rescale_to_0_1",
    "RGBTo01Normalization": "rgb_to_0_1",
}
_READERS = {  # what each does to the axes of a file; those that are not here read other kinds of files
    "SimpleITKIO": None,
    "NibabelIO": None,
    "NibabelIOWithReorient": "RAS",
    "SimpleITKIOWithReorient": "RAS",
}


@dataclass(frozen=True)
class InputRules:
    """What is done to an image that our own models do not need.

    Attributes:
        data: resampling of images.
        segmentation: of a first stage's label maps.
        probabilities: of logits.
        orientation: that the images are turned to, such as ``RAS``; None for as they are.
        most_intensity: a channel whose maximum exceeds it is divided, so that the maximum becomes
            ``divided_intensity``; None for never.
        divided_intensity: see there.
        label_channel: number of a channel that is a label map, and is resampled as such; None for none.
    """

    data: ResamplingRule
    segmentation: ResamplingRule
    probabilities: ResamplingRule
    orientation: str | None = None
    most_intensity: float | None = None
    divided_intensity: float = 1000.0
    label_channel: int | None = None


@dataclass(frozen=True)
class NnunetModel:
    """A trained model of nnU-Net.

    Attributes:
        description: the same as of a checkpoint of ours, with plans in the axis order of files.
        rules: what our preprocessing does otherwise.
        files: where the folds are.
        folds: which of them.
        checkpoint: ``best`` or ``final``.
        order: of axes.
        previous_stage: name of the configuration of a cascade's first stage, or None.
        roi: id of the model whose label map is the last channel (TotalVibeSegmentator's first releases), or None.
    """

    description: ModelDescription
    rules: InputRules
    files: ModelFiles
    folds: tuple[str, ...]
    checkpoint: str
    order: AxisOrder
    previous_stage: str | None
    roi: str | None = None

    @classmethod
    def load(cls, folder: Path, folds: Sequence[str] | None = None, checkpoint: str | None = None) -> NnunetModel:
        """Read the plans and the dataset of a model folder, or of an exported archive.

        Args:
            folder: holds plans.json, dataset.json and ``fold_K``; or a zip archive, or a folder within one.
            folds: which to average; None for all but ``all``, as nnU-Net, or that one if it is the only one.
            checkpoint: ``best`` or ``final``; None for final where it is, as nnU-Net, else best.

        Raises:
            CheckpointError: nothing trained, a missing fold, or what this package cannot do.
        """
        return cls.of_files(find_model(folder), folds, checkpoint)

    @classmethod
    def of_files(
        cls, files: ModelFiles, folds: Sequence[str] | None = None, checkpoint: str | None = None
    ) -> NnunetModel:
        """Of a folder that was found; otherwise as ``load``."""
        chosen, kind = files.choose(folds, checkpoint)
        try:
            plans = read_json(files.folder / "plans.json", "plans")
            dataset = _plain_dataset(read_json(files.folder / "dataset.json", "dataset description"))
            dataset |= _inference_config(files.folder / INFERENCE_CONFIG)
        except DatasetError as error:
            raise CheckpointError(f"{files.shown}: {error}") from error
        first = read_nnunet_checkpoint(files.checkpoint(chosen[0], kind))
        try:
            return _translate(files, chosen, kind, plans, dataset, first)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{files.shown}: plans.json or dataset.json are not what nnU-Net v2 writes ({type(error).__name__}: "
                f"{error})"
            ) from error
        except (ConfigError, DatasetError) as error:
            raise CheckpointError(f"{files.shown}: {error}") from error

    @torch.inference_mode(False)  # else parameters could never have gradients, as in ETTA
    def networks(self, device: str = "cpu") -> list[nn.Module]:
        """The networks of all folds, in evaluation mode.

        Raises:
            CheckpointError: a fold is damaged, of another model, or dynamic-network-architectures is not installed.
        """
        return [self._network(self.files.checkpoint(fold, self.checkpoint), device) for fold in self.folds]

    def _network(self, path: Path, device: str) -> nn.Module:
        content = read_nnunet_checkpoint(path)
        if content.configuration != self.description.configuration:
            raise CheckpointError(
                f"{path} is of configuration {content.configuration}, other folds are of "
                f"{self.description.configuration}; predict them apart"
            )
        try:
            network = self.description.build()
        except ConfigError as error:
            raise CheckpointError(f"checkpoint {path}: {error}") from error
        prefix = _wrapper_prefix(network)
        weights = {prefix + name: value for name, value in self.order.weights(content.weights).items()}
        load_into(network, {"network_weights": weights}, path)
        set_deep_supervision(network, False)
        return network.to(device).eval()

    def origin(self) -> list[str]:
        """Checkpoints, for records; those in an archive by the archive's name."""
        return [self.files.shown_checkpoint(fold, self.checkpoint) for fold in self.folds]

    def checkpoint_files(self) -> list[Path]:
        """The same as files; those of an archive as they are unpacked."""
        return [self.files.checkpoint(fold, self.checkpoint) for fold in self.folds]


def _translate(
    files: ModelFiles,
    folds: tuple[str, ...],
    kind: str,
    plans: Mapping[str, Any],
    dataset: dict[str, Any],
    checkpoint: NnunetCheckpoint,
) -> NnunetModel:
    """The model in our terms."""
    spec = DatasetSpec.from_json(dataset, str(plans["dataset_name"]))
    configuration = resolve_configuration(plans, checkpoint.configuration, files.shown)
    preprocessor = configuration.get("preprocessor_name", "DefaultPreprocessor")
    reader = plans.get("image_reader_writer", "SimpleITKIO")
    if preprocessor != "DefaultPreprocessor" or reader not in _READERS:
        what = f"preprocessor {preprocessor}" if reader in _READERS else f"image reader {reader}"
        raise CheckpointError(f"{files.shown}: {what} is not supported; predict where the model was trained")
    forward = tuple(int(axis) for axis in plans["transpose_forward"])
    if sorted(forward) != [0, 1, 2]:
        raise CheckpointError(f"{files.shown}: transpose_forward must hold 0, 1 and 2, got {forward}")
    order = AxisOrder((forward[0], forward[1], forward[2]), len(configuration["patch_size"]) == 2)
    network, arguments = network_arguments(configuration, order, files.shown)
    previous = configuration.get("previous_stage")
    if previous is not None:
        arguments["previous_labels"] = len(spec.labels.values)
    own = _plans(plans, configuration, checkpoint.configuration, order, spec, network, arguments)
    turned = dataset.get("orientation")  # TotalVibeSegmentator's models say so
    roi = dataset.get("roi")  # and its first releases this
    if roi is not None and len(spec.channel_names) < 2:
        raise CheckpointError(f"{files.shown}: dataset.json names a ROI model ({roi}) but no channel for its label map")
    rules = InputRules(
        data=ResamplingRule.from_plans(configuration, "data"),
        segmentation=ResamplingRule.from_plans(configuration, "seg"),
        probabilities=ResamplingRule.from_plans(configuration, "probabilities"),
        orientation=checked_orientation(turned) if turned is not None else _READERS[reader],
        most_intensity=10_000.0 if turned is not None else None,
        label_channel=len(spec.channel_names) - 1 if roi is not None else None,
    )
    description = ModelDescription(
        network=network,
        arguments=arguments,
        configuration=checkpoint.configuration,
        fold=folds[0],
        head="sigmoid" if spec.labels.has_regions else "softmax",
        mirror_axes=tuple(sorted(order.in_file(axis) for axis in checkpoint.mirror_axes)),
        plans=own.to_json(),
        dataset=dataset,
    )
    return NnunetModel(description, rules, files, folds, kind, order, previous, None if roi is None else str(roi))


def _plans(
    plans: Mapping[str, Any],
    configuration: Mapping[str, Any],
    name: str,
    order: AxisOrder,
    spec: DatasetSpec,
    network: str,
    arguments: dict[str, Any],
) -> Plans:
    """Our plans of one configuration."""
    median = configuration.get("median_image_size_in_voxels") or plans["original_median_shape_after_transp"]
    across_mm = float(plans["original_median_spacing_after_transp"][0])
    axes = slice(-2, None) if order.is_flat else slice(None)
    spline = int((configuration.get("resampling_fn_data_kwargs") or {}).get("order", 3))
    planned = ConfigurationPlan(
        spacing_mm=order.per_axis([float(s) for s in configuration["spacing"]], across_mm),
        median_shape=order.per_axis([round(float(n)) for n in median[axes]], 1),
        image_order=spline if spline in (0, 1, 3) else 3,
        networks={
            network: NetworkPlan(
                patch_size=order.per_axis([int(n) for n in configuration["patch_size"]], 1),
                batch_size=int(configuration["batch_size"]),
                arguments=arguments,
                estimated_memory_gb=0.0,
            )
        },
        slice_axis=order.slice_axis,
        previous_stage=configuration.get("previous_stage"),
    )
    return Plans(
        dataset=str(plans["dataset_name"]),
        preset="nnunet",
        memory_gb=0.0,
        normalization=_normalization(plans, configuration, len(spec.channel_names)),
        left_right_axis=None,
        configurations={name: planned},
        reasons=(f"made by nnU-Net v2 ({plans.get('plans_name')}); axes in the order of files",),
    )


def _normalization(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], channels: int
) -> tuple[ChannelNormalization, ...]:
    """One entry per channel."""
    names, masks = configuration["normalization_schemes"], configuration["use_mask_for_norm"]
    numbers = plans.get("foreground_intensity_properties_per_channel")
    numbers = numbers or plans.get("foreground_intensity_properties_by_modality") or {}
    if len(names) != channels or len(masks) != channels:
        raise CheckpointError(f"the plans normalise {len(names)} channels, dataset.json names {channels}")
    unknown = [name for name in names if name not in _SCHEMES]
    if unknown:
        raise CheckpointError(f"normalization {unknown[0]} is not supported ({', '.join(_SCHEMES)} are)")
    entries = []
    for channel, (name, masked) in enumerate(zip(names, masks, strict=True)):
        if name == "CTNormalization":
            entries.append(_ct(numbers[str(channel)]))
        else:
            masked_too = bool(masked) and name == "ZScoreNormalization"
            entries.append(ChannelNormalization(_SCHEMES[name], mask_nonzero=masked_too))
    return tuple(entries)


def _ct(numbers: Mapping[str, float]) -> ChannelNormalization:
    return ChannelNormalization(
        "ct",
        clip_low=float(numbers["percentile_00_5"]),
        clip_high=float(numbers["percentile_99_5"]),
        mean=float(numbers["mean"]),
        std=float(numbers["std"]),
    )


def resolve_configuration(plans: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """A configuration with everything that it inherits.

    Raises:
        CheckpointError: there is none of that name, or they inherit from each other in a circle.
    """
    chain: list[Mapping[str, Any]] = []
    visited: list[str] = []
    following: str | None = name
    while following is not None:
        if following not in plans["configurations"] or following in visited:
            known = listing(sorted(plans["configurations"]))
            raise CheckpointError(f"{where}: the plans hold no usable configuration {following!r} (found: {known})")
        visited.append(following)
        chain.append(plans["configurations"][following])
        following = chain[-1].get("inherits_from")
    resolved: dict[str, Any] = {}
    for entry in reversed(chain):
        resolved.update(entry)
    return resolved


def _plain_dataset(content: Any) -> dict[str, Any]:
    """dataset.json as we read it: old ones say ``modality``; lists of one label are labels where nothing overlaps."""
    if not isinstance(content, dict):
        raise DatasetError("dataset.json must hold an object")
    plain = dict(content)
    if "channel_names" not in plain and "modality" in plain:
        plain["channel_names"] = plain["modality"]
    labels = plain.get("labels")
    if isinstance(labels, dict) and not any(isinstance(v, (list, tuple)) and len(v) > 1 for v in labels.values()):
        plain["labels"] = {name: v[0] if isinstance(v, (list, tuple)) and v else v for name, v in labels.items()}
    return plain


def _inference_config(path: Path) -> dict[str, Any]:
    """What TotalVibeSegmentator's program reads beside dataset.json, and prefers to it."""
    if not path.is_file():
        return {}
    content = read_json(path, "inference configuration")
    turned = content.get("model_expected_orientation") if isinstance(content, dict) else None
    return {} if turned is None else {"orientation": turned}


def _wrapper_prefix(network: nn.Module) -> str:
    """What our wrappers put before the names of a network's weights."""
    inner = unwrapped(network)
    return next((f"{name}." for name, module in network.named_modules() if module is inner and name), "")
