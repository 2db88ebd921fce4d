"""Checkpoints: plain tensors and JSON values, written atomically, read without unpickling code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import CheckpointError, ConfigError
from ukbob_seg.files import atomic_path
from ukbob_seg.networks.diffusion import set_head
from ukbob_seg.networks.registry import build_network, set_deep_supervision
from ukbob_seg.preprocessing.intensity_field import UsualField
from ukbob_seg.preprocessing.plans import Plans

FORMAT_VERSION = 1
IMPORTED = "imported.json"  # beside a fold's checkpoint that ukbob_import_model wrote: weights without a training state
NAMES = {"best": "checkpoint_best.pt", "final": "checkpoint_final.pt", "latest": "checkpoint_latest.pt"}


@dataclass(frozen=True)
class ModelDescription:
    """What a checkpoint's weights belong to.

    Attributes:
        network: registry name or dotted path.
        arguments: of its builder.
        configuration: of the plans.
        fold: trained fold.
        head: ``softmax`` or ``sigmoid``: what the logits mean.
        mirror_axes: axes (0 = z, 1 = y, 2 = x) that training flipped.
        plans: whole plans.json.
        dataset: whole dataset.json.
        fields: of the training images in each channel (``UsualField``); None where it was not looked for them. Folds
            of one model may differ in it.
    """

    network: str
    arguments: dict[str, Any]
    configuration: str
    fold: str
    head: str
    mirror_axes: tuple[int, ...]
    plans: dict[str, Any]
    dataset: dict[str, Any]
    fields: tuple[UsualField | None, ...] | None = field(default=None, compare=False)

    def spec(self) -> DatasetSpec:
        """The dataset's contract."""
        return DatasetSpec.from_json(self.dataset, self.plans["dataset"])

    def parsed_plans(self) -> Plans:
        """The plans as dataclasses."""
        return Plans.from_json(self.plans, "plans in the checkpoint")

    def build(self) -> nn.Module:
        """A network with fresh weights."""
        spec = self.spec()
        network = build_network(self.network, len(spec.channel_names), spec.labels.num_outputs, self.arguments)
        set_head(network, self.head)
        return network

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        fields = self.fields and [usual and usual.to_json() for usual in self.fields]
        return {**self.__dict__, "mirror_axes": list(self.mirror_axes), "fields": fields}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ModelDescription:
        """Inverse of ``to_json``."""
        fields = content.get("fields")
        usual = fields and tuple(each and UsualField.from_json(each) for each in fields)
        if fields and usual and any(given and not found for given, found in zip(fields, usual, strict=True)):
            usual = None  # an earlier version's
        return cls(**{**content, "mirror_axes": tuple(content["mirror_axes"]), "fields": usual})


def save_checkpoint(path: Path, description: ModelDescription, weights: dict[str, Any], **state: Any) -> None:
    """Write a checkpoint atomically.

    Args:
        path: file.
        description: what the weights belong to.
        weights: the network's state dict.
        state: training state (optimizer, epoch, history, ...), tensors and JSON values only.
    """
    content = {"format_version": FORMAT_VERSION, "model": description.to_json(), "network_weights": weights, **state}
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch reports a full disk so
            raise OSError(str(error)) from error


def read_checkpoint(path: Path, device: str = "cpu") -> tuple[ModelDescription, dict[str, Any]]:
    """Read a checkpoint of ours.

    Raises:
        CheckpointError: missing, damaged, or not one of ours; names the file.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist; train first, or give another fold or folder")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # arbitrary bytes make the unpickler raise anything
        raise CheckpointError(f"checkpoint {path} is damaged or holds more than weights; it was not loaded") from error
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION or "model" not in content:
        raise CheckpointError(f"checkpoint {path} was not written by this version of ukbob_train")
    try:
        return ModelDescription.from_json(content["model"]), content
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error


def load_into(network: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Load all weights of a checkpoint into a network.

    Raises:
        CheckpointError: it is a checkpoint of another network; says what differs.
    """
    check_fit(network, content["network_weights"], f"checkpoint {path}")
    network.load_state_dict(content["network_weights"])


def check_fit(network: nn.Module, given: Mapping[str, Any], where: str) -> None:
    """Compare names and shapes of weights with a network's.

    Raises:
        CheckpointError: they are of another network; says what differs.
    """
    wanted = network.state_dict()
    missing = sorted(set(wanted) - set(given))
    unexpected = sorted(set(given) - set(wanted))
    differing = sorted(k for k in set(wanted) & set(given) if wanted[k].shape != given[k].shape)
    if missing or unexpected or differing:
        example = (missing or unexpected or differing)[0]
        raise CheckpointError(
            f"{where} is of another network: {len(missing)} weights missing, {len(unexpected)} unexpected, "
            f"{len(differing)} of another shape (for example {example})"
        )


@torch.inference_mode(False)  # else parameters could never have gradients, as in ETTA
def load_network(path: Path, device: str = "cpu") -> tuple[nn.Module, ModelDescription]:
    """Rebuild the network of a checkpoint, in evaluation mode on ``device``."""
    description, content = read_checkpoint(path)
    return network_of(description, content, path).to(device), description


@torch.inference_mode(False)  # else parameters could never have gradients, as in ETTA
def network_of(description: ModelDescription, content: dict[str, Any], path: Path) -> nn.Module:
    """The network of what ``read_checkpoint`` returned, in evaluation mode on the CPU.

    Raises:
        CheckpointError: it cannot be built, or the weights are of another; names the file.
    """
    try:
        network = description.build()
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    load_into(network, content, path)
    set_deep_supervision(network, False)  # prediction needs the finest output only
    return network.eval()
