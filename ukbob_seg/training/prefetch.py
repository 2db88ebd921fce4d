"""Batches on their way from the loader to the device: while one is trained on, the next is copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ukbob_seg.training.augmentation import Batch

Arrays = dict[str, Tensor]


class Copier(Protocol):
    """Copies to a device in two steps."""

    def begin(self, arrays: Arrays) -> Any:
        """Start copying; returns at once, with what ``finish`` needs."""

    def finish(self, begun: Any) -> Arrays:
        """Let what follows on the device wait for a copy that was begun, and for no later one."""


class SideStream:
    """Copies from pinned memory on a CUDA stream of its own, beside the kernels of the running step."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)

    def begin(self, arrays: Arrays) -> tuple[Arrays, torch.cuda.Event]:
        """Queue the copies, and a mark behind them."""
        with torch.cuda.stream(self._stream):
            copies = {name: array.to(self._device, non_blocking=True) for name, array in arrays.items()}
            return copies, self._stream.record_event()

    def finish(self, begun: tuple[Arrays, torch.cuda.Event]) -> Arrays:
        """Order them before the current stream, and tell the allocator that this stream uses their memory.

        Not ``wait_stream``: by now the next batch's copies are queued on the side stream, and they must run beside this
        batch's step.
        """
        arrays, copied = begun
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for array in arrays.values():
            array.record_stream(current)
        return arrays


def to_device(loader: Iterable[Arrays], device: str) -> Iterator[Batch]:
    """The loader's batches on the device, in order; nobody else has their images."""
    if device.startswith("cuda"):
        for arrays in one_ahead(loader, SideStream(device)):
            yield Batch(**arrays, owned=True)
    else:
        for arrays in loader:
            yield Batch(**{name: array.to(device) for name, array in arrays.items()}, owned=True)


def one_ahead(loader: Iterable[Arrays], copier: Copier) -> Iterator[Arrays]:
    """Each batch after the copy of the next one was begun."""
    waiting = None
    for arrays in loader:
        begun = copier.begin(arrays)
        if waiting is not None:
            yield copier.finish(waiting)
        waiting = begun
    if waiting is not None:
        yield copier.finish(waiting)
