"""Batch augmentation on the device: each transform first samples its parameters, then applies them.

The paper's set: random flips, random 90-degree rotations (p 0.1), random intensity shift (offset 0.1) and scaling;
the random foreground crop is the patch sampler's (``sampling.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Image (B, C, z, y, x) float32 and labels (B, z, y, x) integer, on one device.

    ``previous`` (B, z, y, x): in a cascade, the first stage's label indices, which move with the labels.
    """

    image: Tensor
    labels: Tensor
    previous: Tensor | None = None

    def network_input(self) -> Tensor:
        """(B, C, z, y, x), or with the first stage's labels as one more channel."""
        if self.previous is None:
            return self.image
        return torch.cat([self.image, self.previous.unsqueeze(1).to(self.image.dtype)], dim=1)

    def label_maps(self) -> tuple[Tensor, ...]:
        """Everything that is made of label indices."""
        return (self.labels,) if self.previous is None else (self.labels, self.previous)


class Transform(Protocol):
    """A random transform of a batch."""

    def sample(self, batch_size: int, generator: torch.Generator) -> Any:
        """Draw parameters for each element."""

    def apply(self, batch: Batch, record: Any) -> Batch:
        """Apply drawn parameters; deterministic."""


@dataclass(frozen=True)
class FlipRecord:
    """Which axis of which element is flipped: (B, 3) bool."""

    flipped: Tensor


class RandomFlip:
    """Flip each axis independently; a flip of the left-right axis also swaps labels named left and right.

    Without the swap a network would learn that the left kidney may lie on either side.

    Args:
        axes: which of (0 = z, 1 = y, 2 = x) may be flipped.
        probability: of each flip.
        left_right_axis: array axis that runs left-right, or None.
        swap: (n,) table that exchanges left and right label indices, or None when there are no such pairs.
    """

    def __init__(
        self,
        axes: Sequence[int] = (0, 1, 2),
        probability: float = 0.5,
        left_right_axis: int | None = None,
        swap: Tensor | None = None,
    ) -> None:
        self.axes, self.probability = tuple(axes), probability
        self.left_right_axis, self.swap = left_right_axis, swap

    def sample(self, batch_size: int, generator: torch.Generator) -> FlipRecord:
        """Draw which axes of which elements are flipped."""
        allowed = torch.tensor([axis in self.axes for axis in range(3)])
        return FlipRecord((torch.rand(batch_size, 3, generator=generator) < self.probability) & allowed)

    def apply(self, batch: Batch, record: FlipRecord) -> Batch:
        """Flip in place of copies only where something is flipped."""
        image, maps = batch.image.clone(), [labels.clone() for labels in batch.label_maps()]
        for element, flips in enumerate(record.flipped.tolist()):
            dims = [axis for axis in range(3) if flips[axis]]
            if not dims:
                continue
            image[element] = batch.image[element].flip([axis + 1 for axis in dims])
            for labels, before in zip(maps, batch.label_maps(), strict=True):
                flipped = before[element].flip(dims)
                if self.swap is not None and self.left_right_axis in dims:
                    flipped = self.swap.to(flipped.device)[flipped.long()].to(flipped.dtype)
                labels[element] = flipped
        return Batch(image, *maps)


@dataclass(frozen=True)
class Rotate90Record:
    """Quarter turns (B,), 0 for none, and the index (B,) of the plane they turn in."""

    turns: Tensor
    plane: Tensor


class RandomRotate90:
    """Rotate by 90, 180 or 270 degrees in one of the planes given.

    Args:
        planes: pairs of axes (0 = z, 1 = y, 2 = x) with equal patch edges and equal spacing.
        probability: of any rotation.
    """

    def __init__(self, planes: Sequence[tuple[int, int]], probability: float = 0.1) -> None:
        self.planes, self.probability = tuple(planes), probability

    def sample(self, batch_size: int, generator: torch.Generator) -> Rotate90Record:
        """Draw turns and planes."""
        rotated = torch.rand(batch_size, generator=generator) < self.probability
        turns = torch.randint(1, 4, (batch_size,), generator=generator) * rotated
        return Rotate90Record(turns, torch.randint(0, max(1, len(self.planes)), (batch_size,), generator=generator))

    def apply(self, batch: Batch, record: Rotate90Record) -> Batch:
        """Rotate the elements that were drawn; nothing happens without a plane to rotate in."""
        if not self.planes or not bool(record.turns.any()):
            return batch
        image, maps = batch.image.clone(), [labels.clone() for labels in batch.label_maps()]
        for element, (turns, plane) in enumerate(zip(record.turns.tolist(), record.plane.tolist(), strict=True)):
            if turns:
                a, b = self.planes[plane]
                image[element] = torch.rot90(batch.image[element], turns, (a + 1, b + 1))
                for labels, before in zip(maps, batch.label_maps(), strict=True):
                    labels[element] = torch.rot90(before[element], turns, (a, b))
        return Batch(image, *maps)


@dataclass(frozen=True)
class IntensityRecord:
    """One number per element, (B,) float32."""

    value: Tensor


class RandomIntensityShift:
    """Add one offset, uniform in +-offset of normalised intensity, to all channels of an element."""

    def __init__(self, offset: float = 0.1, probability: float = 0.5) -> None:
        self.offset, self.probability = offset, probability

    def sample(self, batch_size: int, generator: torch.Generator) -> IntensityRecord:
        """Draw an offset per element, 0 where it stays as it is."""
        return IntensityRecord(_uniform(batch_size, self.offset, self.probability, generator))

    def apply(self, batch: Batch, record: IntensityRecord) -> Batch:
        """Add the offsets."""
        offset = record.value.to(batch.image).view(-1, 1, 1, 1, 1)
        return replace(batch, image=batch.image + offset)


class RandomIntensityScale:
    """Multiply all channels of an element by 1 + v, v uniform in +-factor."""

    def __init__(self, factor: float = 0.1, probability: float = 0.5) -> None:
        self.factor, self.probability = factor, probability

    def sample(self, batch_size: int, generator: torch.Generator) -> IntensityRecord:
        """Draw v per element, 0 where it stays as it is."""
        return IntensityRecord(_uniform(batch_size, self.factor, self.probability, generator))

    def apply(self, batch: Batch, record: IntensityRecord) -> Batch:
        """Multiply."""
        factor = 1 + record.value.to(batch.image).view(-1, 1, 1, 1, 1)
        return replace(batch, image=batch.image * factor)


def _uniform(batch_size: int, width: float, probability: float, generator: torch.Generator) -> Tensor:
    changed = torch.rand(batch_size, generator=generator) < probability
    return (torch.rand(batch_size, generator=generator) * 2 - 1) * width * changed


@dataclass(frozen=True)
class AugmentationSetup:
    """What the transforms must know of the data.

    Attributes:
        patch_size: voxels (z, y, x).
        spacing_mm: (z, y, x).
        mirror_axes: axes that may be flipped.
        left_right_axis: array axis that runs left-right, or None.
        swap: table that exchanges left and right label indices, or None.
    """

    patch_size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    left_right_axis: int | None = None
    swap: Tensor | None = None


def make_transforms(name: str, setup: AugmentationSetup) -> list[Transform]:
    """The transforms of a named set, in order."""
    if name == "none":
        return []
    planes = [
        (a, b)
        for a, b in ((0, 1), (0, 2), (1, 2))
        if setup.patch_size[a] == setup.patch_size[b]
        and max(setup.spacing_mm[a], setup.spacing_mm[b]) < 1.1 * min(setup.spacing_mm[a], setup.spacing_mm[b])
        # Turning the left-right axis into another one would need a swap of labels that does not exist.
        and (setup.swap is None or setup.left_right_axis not in (a, b))
    ]
    return [
        RandomFlip(setup.mirror_axes, 0.5, setup.left_right_axis, setup.swap),
        RandomRotate90(planes),
        RandomIntensityScale(),
        RandomIntensityShift(),
    ]


def augment(batch: Batch, transforms: Sequence[Transform], generator: torch.Generator) -> Batch:
    """Sample and apply every transform in turn."""
    for transform in transforms:
        batch = transform.apply(batch, transform.sample(len(batch.image), generator))
    return batch
