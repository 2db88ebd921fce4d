"""Reading weights to start from: the state dict in a file, under this package's names, and what its ends mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import CheckpointError, UkbobError
from ukbob_seg.files import read_json

_CONTAINERS = ("network_weights", "state_dict", "model_state_dict", "model_state", "net", "network", "model")
_RENAMED = {".mlp.fc1.": ".mlp.linear1.", ".mlp.fc2.": ".mlp.linear2."}
# What stands before all names: left by parallel or compiled training, by wrappers, or by a module around the network.
_ALWAYS_REMOVED = ("module.", "_orig_mod.")
_REMOVED_IF_BETTER = ("", "network.", "network.network.", "model.", "net.")
_ENCODER = "swinViT."


@dataclass(frozen=True)
class Interface:
    """What the input channels and outputs of a network are.

    Attributes:
        inputs: image channels by name.
        outputs: classes (background first) or regions by name.
        head: ``softmax`` or ``sigmoid``, None where it is not known.
        previous: in a cascade, the labels whose maps are further input channels.
        values: file value of each foreground output, or None for regions.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    head: str | None = None
    previous: tuple[str, ...] = ()
    values: tuple[int, ...] | None = None

    @classmethod
    def of(cls, spec: DatasetSpec, head: str | None = None, previous_labels: int = 0) -> Interface:
        """Of a network for a dataset, with the number of labels that a first stage adds to its input."""
        scheme = spec.labels
        values = None if scheme.has_regions else scheme.values
        labels = scheme.output_names[1:] if values else tuple(f"label {value}" for value in scheme.values)
        return cls(spec.channel_names, scheme.output_names, head, labels[:previous_labels], values)

    def rows(self, count: int) -> tuple[str | None, ...]:
        """Name of each row of an output layer with ``count`` rows; None for a row without class.

        Others count by file value where values have gaps, or leave background out.

        Raises:
            CheckpointError: the names do not fit any of these ways of counting.
        """
        if count == len(self.outputs):
            return self.outputs
        if self.values is not None and count == self.values[-1] + 1:
            by_value = dict(zip((0, *self.values), self.outputs, strict=True))
            return tuple(by_value.get(value) for value in range(count))
        if self.values is not None and count == len(self.values):
            return self.outputs[1:]
        ways = {len(self.outputs), *(() if self.values is None else (self.values[-1] + 1, len(self.values)))}
        raise CheckpointError(
            f"the pretrained network has {count} outputs, its dataset.json names {len(self.outputs)} (fitting numbers: "
            f"{', '.join(map(str, sorted(ways)))}); give the dataset.json that it was trained with"
        )


@dataclass(frozen=True)
class Pretrained:
    """Weights to start from.

    Attributes:
        source: file, for messages.
        weights: by cleaned name.
        interface: what the ends of the network mean; None where nothing says it.
        network: registry name; None for a checkpoint of others.
        arguments: of the network; empty for a checkpoint of others.
        plans: plans.json that its images were preprocessed by; empty for a checkpoint of others.
        configuration: of these plans.
    """

    source: str
    weights: Mapping[str, Tensor] = field(repr=False)
    interface: Interface | None = None
    network: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    plans: Mapping[str, Any] = field(default_factory=dict, repr=False)
    configuration: str = ""

    def renamed(self, wanted: Set[str]) -> dict[str, Tensor]:
        """The weights under the prefix that makes most names those of a network."""
        best, most = dict(self.weights), -1
        for prefix in _REMOVED_IF_BETTER:
            for added in ("", _ENCODER):  # a release of the encoder alone names its weights from the encoder on
                names = {added + name.removeprefix(prefix): value for name, value in self.weights.items()}
                if (found := len(names.keys() & wanted)) > most:
                    best, most = names, found
        return best


def read_pretrained(path: Path, dataset: Path | None = None) -> Pretrained:
    """Read our checkpoints, plain state dicts, MONAI's, and the self-supervised Swin encoder release.

    The latter has the prefix ``module.``, ``fc1/fc2``, and the encoder only. Files are read with ``weights_only``, so
    that no code in them can run.

    Args:
        path: file.
        dataset: dataset.json (or its folder) of the data that the weights were trained with; our own checkpoints hold
            it, and this one comes before it.

    Raises:
        CheckpointError: unreadable or damaged file, or no weights in it.
        DatasetError: unusable dataset.json.
    """
    path = Path(path)
    return interpret(_read(path), str(path), dataset)


def interpret(content: Mapping[str, Any], source: str, dataset: Path | None = None) -> Pretrained:
    """The same for what such a file holds."""
    weights = _clean_names(_find_state_dict(content))
    if not weights:
        raise CheckpointError(f"{source} holds no weights (found: {_listing(content)})")
    model = content.get("model")
    network, arguments, plans, configuration, interface = None, {}, {}, "", None
    if isinstance(model, Mapping) and {"network", "arguments", "head", "dataset"} <= set(model):
        try:
            network, arguments = str(model["network"]), dict(model["arguments"])
            plans, configuration = dict(model.get("plans", {})), str(model.get("configuration", ""))
            spec = DatasetSpec.from_json(model["dataset"], "dataset of the checkpoint")
            interface = Interface.of(spec, model["head"], int(arguments.get("previous_labels", 0)))
        except (UkbobError, TypeError, ValueError) as error:
            raise CheckpointError(f"{source} is damaged: {error}") from error
    if dataset is not None:
        file = Path(dataset) / "dataset.json" if Path(dataset).is_dir() else Path(dataset)
        spec = DatasetSpec.from_json(read_json(file, "dataset description"), str(file))
        head = interface.head if interface else None
        interface = Interface.of(spec, head, int(arguments.get("previous_labels", 0)))
    return Pretrained(source, weights, interface, network, arguments, plans, configuration)


def plain_name(name: str) -> str:
    """A class or channel name without upper case, spaces, underscores and hyphens, to compare names by."""
    return re.sub(r"[\s_\-]+", "", name.casefold())


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"pretrained weights {path} do not exist, or are no file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes make the unpickler raise anything
        raise CheckpointError(
            f"{path} is damaged or holds more than weights; it was not loaded. If you trust its origin, open it "
            "yourself and save its state dict alone"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds no state dict")
    return content


def _find_state_dict(content: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in _CONTAINERS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return inner
    return content


def _clean_names(state: Mapping[str, Any]) -> dict[str, Tensor]:
    result = {}
    for name, value in state.items():
        if not isinstance(name, str) or not _is_weight(value):
            continue
        while name.startswith(_ALWAYS_REMOVED):
            for prefix in _ALWAYS_REMOVED:
                name = name.removeprefix(prefix)
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        result[name] = value
    return result


def _is_weight(value: Any) -> bool:
    """An ordinary tensor with content: files may hold sparse, quantised, complex and empty shells of tensors."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex())
    )


def _listing(content: Mapping[str, Any]) -> str:
    names = [str(key) for key in content]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
