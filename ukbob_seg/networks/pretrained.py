"""Starting from given weights: load what matches, say what did not, fail when nothing does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ukbob_seg.errors import CheckpointError

_CONTAINERS = ("network_weights", "state_dict", "model_state_dict", "model")
_RENAMED = {".mlp.fc1.": ".mlp.linear1.", ".mlp.fc2.": ".mlp.linear2."}


@dataclass(frozen=True)
class LoadReport:
    """What happened to each weight, by the network's own names (``unexpected``: by the checkpoint's)."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shape_mismatch: tuple[str, ...]


def load_weights(network: nn.Module, source: Path | Mapping[str, Any]) -> LoadReport:
    """Copy every weight whose name and shape match into a network.

    Accepts our checkpoints, plain state dicts, MONAI's, and the self-supervised Swin encoder release (``module.``
    prefix, ``fc1/fc2``, encoder only). Files are read with ``weights_only``, so that no code in them can run.

    Args:
        network: changed in place.
        source: file, or its content.

    Raises:
        CheckpointError: unreadable file, or not a single weight matches.
    """
    content = source if isinstance(source, Mapping) else _read(Path(source))
    given = _clean_names(_find_state_dict(content))
    wanted = network.state_dict()
    # An encoder-only release names its weights from the encoder on; a stray name of ours must not hide that.
    prefixed = {f"swinViT.{name}": value for name, value in given.items()}
    if len(set(prefixed) & set(wanted)) > len(set(given) & set(wanted)):
        given = prefixed
    loaded = sorted(k for k in set(given) & set(wanted) if given[k].shape == wanted[k].shape)
    mismatched = sorted(k for k in set(given) & set(wanted) if given[k].shape != wanted[k].shape)
    if not loaded:
        where = "the given weights" if isinstance(source, Mapping) else source
        raise CheckpointError(
            f"{where}: not one of its {len(given)} weights matches this network; is it of another architecture or size?"
        )
    network.load_state_dict({name: given[name] for name in loaded}, strict=False)
    return LoadReport(
        loaded=tuple(loaded),
        missing=tuple(sorted(set(wanted) - set(given))),
        unexpected=tuple(sorted(set(given) - set(wanted))),
        shape_mismatch=tuple(mismatched),
    )


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"pretrained weights {path} do not exist, or are no file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes make the unpickler raise anything
        raise CheckpointError(f"{path} is damaged or holds more than weights; it was not loaded") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds no state dict")
    return content


def _find_state_dict(content: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in _CONTAINERS:
        if isinstance(content.get(key), Mapping) and key != "model":
            return content[key]
    inner = content.get("model")
    return inner if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()) else content


def _clean_names(state: Mapping[str, Any]) -> dict[str, Tensor]:
    result = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        name = name.removeprefix("module.")
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        result[name] = value
    return result
