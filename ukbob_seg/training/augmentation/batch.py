"""A training batch, and how random transforms are drawn and applied.

Every transform first samples its parameters, on the CPU and from a generator that is given, then applies them on the
device. What was not drawn costs nothing. ``apply`` changes nothing in the batch that it is given, unless that batch
says that its image may be overwritten: memory that was just used is several times as fast as new memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Image (B, C, z, y, x) float32 and labels (B, z, y, x) integer, on one device.

    ``previous`` (B, z, y, x): in a cascade, the first stage's label indices, which move with the labels. ``owned``:
    nobody else needs the image, so that transforms may write into it.
    """

    image: Tensor
    labels: Tensor
    previous: Tensor | None = None
    owned: bool = False

    def network_input(self) -> Tensor:
        """(B, C, z, y, x), or with the first stage's labels as one more channel."""
        if self.previous is None:
            return self.image
        return torch.cat([self.image, self.previous.unsqueeze(1).to(self.image.dtype)], dim=1)

    def label_maps(self) -> tuple[Tensor, ...]:
        """Everything that is made of label indices."""
        return (self.labels,) if self.previous is None else (self.labels, self.previous)

    def writable_image(self) -> Tensor:
        """The image, or a copy of it where it is not owned."""
        return self.image if self.owned else self.image.clone()

    def moved(self, image: Tensor, maps: Sequence[Tensor]) -> Batch:
        """Another image, which is nobody else's, and other label maps in the order of ``label_maps``."""
        return Batch(image, maps[0], maps[1] if len(maps) > 1 else None, owned=True)

    def with_image(self, image: Tensor) -> Batch:
        """The same with another image, which is nobody else's."""
        return replace(self, image=image, owned=True)


class Transform(Protocol):
    """A random transform of a batch."""

    def sample(self, batch_size: int, generator: torch.Generator) -> Any:
        """Draw parameters for each element."""

    def apply(self, batch: Batch, record: Any) -> Batch:
        """Apply drawn parameters; deterministic."""


def augment(batch: Batch, transforms: Sequence[Transform], generator: torch.Generator) -> Batch:
    """Sample and apply every transform in turn."""
    for transform in transforms:
        batch = transform.apply(batch, transform.sample(len(batch.image), generator))
    return batch


def chance(probability: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Bool, true with the probability given, each independently."""
    return torch.rand(shape, generator=generator) < probability


def uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Float32, evenly spread between ``low`` and ``high``."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def uniform_around_one(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Float32 factors: below 1 as often as above, and evenly spread on each side (nnU-Net's rule)."""
    below = torch.rand(shape, generator=generator) < 0.5
    share = torch.rand(shape, generator=generator)
    return torch.where(below, low + (1 - low) * share, 1 + (high - 1) * share)


def change_channels(batch: Batch, chosen: Tensor, change: Callable[[Tensor, int, int], Tensor]) -> Batch:
    """Replace the chosen channels (z, y, x) of the image by what ``change(channel, element, index)`` returns.

    Args:
        batch: with an image (B, C, z, y, x).
        chosen: (B, C) bool on the CPU.
        change: must not write to its input.

    Returns:
        The same batch when nothing is chosen.
    """
    if not bool(chosen.any()):
        return batch
    image = batch.image
    if batch.owned:
        for element, index in chosen.nonzero().tolist():
            image[element, index] = change(image[element, index], element, index)
        return batch
    changed = torch.empty_like(image)
    for element, channels in enumerate(chosen.tolist()):
        if not any(channels):
            changed[element] = image[element]
            continue
        for index, here in enumerate(channels):
            channel = image[element, index]
            changed[element, index] = change(channel, element, index) if here else channel
    return batch.with_image(changed)


def stack(elements: Sequence[Tensor]) -> Tensor:
    """Elements as a batch; a single one is not copied."""
    return elements[0][None] if len(elements) == 1 else torch.stack(list(elements))
