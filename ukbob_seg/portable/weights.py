"""Weights as safetensors: names, types, shapes and bytes, and no way to run code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import safetensors
from safetensors.torch import load, save
from torch import Tensor

from ukbob_seg.errors import CheckpointError


def weights_to_bytes(weights: Mapping[str, Any], where: str) -> bytes:
    """A state dict as the content of a safetensors file.

    Args:
        weights: tensors by name; those that share memory are written once each.
        where: file that they are from, for messages.

    Raises:
        CheckpointError: one of them is no ordinary tensor.
    """
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: {name} is no tensor, and cannot be exported")
    try:
        return save({name: value.detach().cpu().contiguous().clone() for name, value in weights.items()})
    except (KeyError, ValueError, RuntimeError, NotImplementedError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{where}: the weights cannot be exported ({error})") from error


def weights_from_bytes(content: bytes, where: str) -> dict[str, Tensor]:
    """Inverse of ``weights_to_bytes``, to the last bit.

    Raises:
        CheckpointError: it is no such content; says where it is from.
    """
    try:
        return load(content)
    except (KeyError, ValueError, RuntimeError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{where} is no safetensors file, or a damaged one ({error})") from error
