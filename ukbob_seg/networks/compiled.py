"""Networks called through ``torch.compile``, and as they are where that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ukbob_seg.errors import UkbobError, is_out_of_memory
from ukbob_seg.networks.diffusion import DiffusionNetwork
from ukbob_seg.networks.wrappers import unwrapped

log = logging.getLogger(__name__)
BACKEND = "inductor"


class CompiledNetwork(nn.Module):
    """Calls a network through ``torch.compile``; once that fails, the network itself, with one warning.

    The network stays what it was: its weights are shared, and its state dict, which is what checkpoints hold, has the
    same names. Graphs are made for one shape each, in the first call, which therefore takes minutes. Of a diffusion
    network training is compiled, and not the drawing of segmentations.

    Args:
        network: on its device.
        backend: of ``torch.compile``; None for ``BACKEND``.
    """

    def __init__(self, network: nn.Module, backend: str | Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.network = network
        self._rehearsed = False
        self._draws = isinstance(unwrapped(network), DiffusionNetwork)  # with an image alone, by a loop of many calls
        self._call: Callable[..., Any] | None = None
        try:
            self._call = torch.compile(network.forward, backend=backend or BACKEND, dynamic=False)
        except Exception as error:  # old Pythons, builds without it, unknown backends: each raises something else
            self._give_up(error)

    @property
    def fell_back(self) -> bool:
        """Whether compiling failed, so that calls run the network as it is."""
        return self._call is None

    def forward(self, *inputs: Tensor) -> Any:
        """What the network returns."""
        if self._call is None or (self._draws and len(inputs) == 1):
            return self.network(*inputs)
        try:
            if torch.is_grad_enabled() and not self._rehearsed:
                self._rehearse(*inputs)
            return self._call(*inputs)
        except UkbobError:
            raise
        except Exception as error:  # compilers raise anything
            if is_out_of_memory(error):  # the network as it is needs no less
                raise
            outputs = self.network(*inputs)  # raises its own error where the input is at fault
            self._give_up(error)
            return outputs

    def _rehearse(self, *inputs: Tensor) -> None:
        """One step without consequences: the backward pass is compiled in its first call, which must not be training's.

        Random state and buffers, such as the statistics of BatchNorm, are as before; no parameter gets a gradient.
        """
        assert self._call is not None
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        with torch.random.fork_rng(devices=[inputs[0].device] if inputs[0].is_cuda else []):
            outputs = self._call(*(each.detach() for each in inputs))
        outputs = [outputs] if isinstance(outputs, Tensor) else [each for each in outputs if each is not None]
        wanted = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        total = sum(output.float().sum() for output in outputs)
        if wanted and isinstance(total, Tensor) and total.requires_grad:
            torch.autograd.grad(total, wanted, allow_unused=True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        self._rehearsed = True

    def _give_up(self, error: Exception) -> None:
        self._call = None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        log.warning("the network could not be compiled and runs as it is, with the same results (%s)", lines[0])


def maybe_compiled(network: nn.Module, wanted: bool) -> nn.Module:
    """The network, or what calls it through ``torch.compile``."""
    return CompiledNetwork(network) if wanted else network
