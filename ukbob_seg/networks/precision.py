"""In which precision a network computes, where that is not left to the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ukbob_seg.networks.precision_names import AUTO, check_precision
from ukbob_seg.networks.wrappers import Wrapper

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EXACT_LAST = 2  # layers: the head, and what it sees


class PreciseNetwork(Wrapper):
    """Computes in one precision, whatever its caller's autocast says.

    In half precision the factors of convolutions and matrix products are rounded, and so are maps; products are added
    up in float32. Processors with units for bfloat16 (AMX) are faster in it. On CPUs the convolution that is called
    first and the two that are called last stay in float32, so that neither the image nor the logits are rounded.

    Args:
        network: any network; its weights stay float32. Those three layers learn to stay in float32 under autocast.
        half: the type of factors and maps, None for float32.
    """

    def __init__(self, network: nn.Module, half: torch.dtype | None) -> None:
        super().__init__()
        self.network = network
        self.rounded_to = half
        self._knows_ends = False

    def forward(self, *inputs: Tensor) -> Any:
        """What the network returns, perhaps in half precision."""
        kind = inputs[0].device.type
        if self.rounded_to is not None and kind == "cpu" and not self._knows_ends:
            self._find_ends(inputs)
        with torch.autocast(kind, self.rounded_to or torch.bfloat16, enabled=self.rounded_to is not None):
            return self.network(*inputs)

    def _find_ends(self, inputs: tuple[Tensor, ...]) -> None:
        """In a pass of its own, unless that had consequences for statistics or chance."""
        if any(module.training for module in self.network.modules()):
            return
        called: list[nn.Module] = []
        layers = [module for module in self.network.modules() if isinstance(module, _CONVOLUTIONS)]
        hooks = [layer.register_forward_hook(lambda layer, *_: called.append(layer)) for layer in layers]
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                self.network(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        for layer in {id(layer): layer for layer in (*called[:1], *called[-EXACT_LAST:])}.values():
            if not isinstance(layer, _Exact):  # of a class of its own, so that copies and recomputations are exact, too
                kind = type(layer)
                layer.__class__ = type(kind.__name__, (_Exact, kind), {"__module__": kind.__module__})
        self._knows_ends = True


class _Exact:
    """A layer whose numbers are not rounded on CPUs."""

    def forward(self, input: Tensor, *more: Any) -> Tensor:
        """In float32 whatever autocast says."""
        layer: Any = super()
        if input.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return layer.forward(input, *more)
        with torch.autocast("cpu", enabled=False):
            return layer.forward(input.float(), *more)


def in_precision(network: nn.Module, name: str) -> nn.Module:
    """The network, computing in this precision; with ``auto`` as its caller says."""
    check_precision(name)
    inner = network.network if isinstance(network, PreciseNetwork) else network
    if name == AUTO:
        return inner
    half = torch.bfloat16 if name == "bfloat16" else None
    if isinstance(network, PreciseNetwork) and network.rounded_to == half:
        return network
    return PreciseNetwork(inner, half)


def multiplies_bfloat16_quickly() -> bool:
    """Whether this CPU has a matrix unit for bfloat16 (AMX)."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private: absent is no
    return bool(supported is not None and supported())
