"""In which precision a network computes, where that is not left to the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.wrappers import Wrapper

# What ``--precision`` may say; auto is half precision on CUDA and float32 on CPUs.
AUTO = "auto"
PRECISIONS: dict[str, torch.dtype | None] = {AUTO: None, "float32": None, "bfloat16": torch.bfloat16}
_CONVOLUTIONS = (torch.conv2d, torch.conv3d)
EXACT_LAST = 2  # convolutions: the head, and what it sees


class PreciseNetwork(Wrapper):
    """Computes in one precision, whatever its caller's autocast says.

    In half precision the factors of convolutions and matrix products are rounded, and so are maps; products are added
    up in float32. Processors with units for bfloat16 (AMX, less so AVX-512 BF16) are several times as fast in it. On
    CPUs the first convolution and the last two stay in float32, because rounding at both ends is most of what is seen
    in label maps (and the head's would be that of the logits themselves); when compiled, all are rounded.

    Args:
        network: any network; its weights stay float32.
        half: the type of factors and maps, None for float32.
    """

    def __init__(self, network: nn.Module, half: torch.dtype | None) -> None:
        super().__init__()
        self.network = network
        self.rounded_to = half
        self._calls: int | None = None  # of convolutions in a pass

    def forward(self, *inputs: Tensor) -> Any:
        """What the network returns, perhaps in half precision."""
        kind = inputs[0].device.type
        with torch.autocast(kind, self.rounded_to or torch.bfloat16, enabled=self.rounded_to is not None):
            if self.rounded_to is None or kind != "cpu" or torch.compiler.is_compiling():
                return self.network(*inputs)
            with self._exact_ends(inputs):
                return self.network(*inputs)

    def _exact_ends(self, inputs: tuple[Tensor, ...]) -> AbstractContextManager[Any]:
        """The first and last convolutions are known once those of a pass were counted, in one of its own."""
        if self._calls is None:
            if any(module.training for module in self.network.modules()):
                return nullcontext()  # a further pass would have consequences, for statistics or chance
            with torch.no_grad(), _Convolutions(lambda number: False) as counted:
                self.network(*inputs)
            self._calls = counted.number
        first_of_last = self._calls - EXACT_LAST
        return _Convolutions(lambda number: number == 0 or number >= first_of_last)


class _Convolutions(TorchFunctionMode):
    """Numbers the convolutions of a pass, and has some of them in float32.

    Args:
        is_exact: by number, from 0.
    """

    def __init__(self, is_exact: Callable[[int], bool]) -> None:
        super().__init__()
        self.number = 0
        self._is_exact = is_exact

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _CONVOLUTIONS:
            return func(*args, **(kwargs or {}))
        number, self.number = self.number, self.number + 1
        if not self._is_exact(number):
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(args[0].float(), *args[1:], **(kwargs or {}))


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
