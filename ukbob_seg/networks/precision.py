"""In which precision a network computes, where that is not left to the device."""

from __future__ import annotations

import torch
from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.wrappers import PreciseNetwork

# What ``--precision`` may say; auto is half precision on CUDA and float32 on CPUs.
AUTO = "auto"
PRECISIONS: dict[str, torch.dtype | None] = {AUTO: None, "float32": None, "bfloat16": torch.bfloat16}


def check_precision(name: str) -> None:
    """Refuse what is no precision.

    Raises:
        ConfigError: names those that there are.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"--precision must be one of {', '.join(PRECISIONS)}, got {name!r}")


def in_precision(network: nn.Module, name: str) -> nn.Module:
    """The network, computing in this precision; with ``auto`` as its caller says."""
    inner = network.network if isinstance(network, PreciseNetwork) else network
    return inner if name == AUTO else PreciseNetwork(inner, PRECISIONS[name])


def multiplies_bfloat16_quickly() -> bool:
    """Whether this CPU has a matrix unit for bfloat16 (AMX)."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private: absent is no
    return bool(supported is not None and supported())
