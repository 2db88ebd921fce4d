"""Flips and quarter turns: exact moves of image and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ukbob_seg.training.augmentation.batch import Batch, change_channels, stack


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
        self._allowed = torch.tensor([axis in self.axes for axis in range(3)])
        self.left_right_axis, self.swap = left_right_axis, swap

    def sample(self, batch_size: int, generator: torch.Generator) -> FlipRecord:
        """Draw which axes of which elements are flipped."""
        return FlipRecord((torch.rand(batch_size, 3, generator=generator) < self.probability) & self._allowed)

    def apply(self, batch: Batch, record: FlipRecord) -> Batch:
        """Flip the elements that were drawn."""
        if not bool(record.flipped.any()):
            return batch
        flips = [[axis for axis in range(3) if drawn[axis]] for drawn in record.flipped.tolist()]
        chosen = record.flipped.any(dim=1, keepdim=True).expand(*batch.image.shape[:2])
        changed = change_channels(batch, chosen, lambda channel, element, _: channel.flip(flips[element]))
        maps = [
            [self._flip_labels(x, dims) if dims else x for x, dims in zip(labels, flips, strict=True)]
            for labels in batch.label_maps()
        ]
        return changed.moved(changed.image, [stack(labels) for labels in maps])

    def _flip_labels(self, labels: Tensor, dims: list[int]) -> Tensor:
        flipped = labels.flip(dims)
        if self.swap is not None and self.left_right_axis in dims:
            flipped = self.swap.to(flipped.device)[flipped.long()].to(flipped.dtype)
        return flipped


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
        turns, planes = record.turns.tolist(), [self.planes[plane] for plane in record.plane.tolist()]

        def turn(x: Tensor, element: int, _: int = 0) -> Tensor:
            return _turned(x, turns[element], planes[element])

        chosen = (record.turns > 0).unsqueeze(1).expand(*batch.image.shape[:2])
        changed = change_channels(batch, chosen, turn)
        maps = [
            [turn(x, element).contiguous() if turns[element] else x for element, x in enumerate(labels)]
            for labels in batch.label_maps()
        ]
        return changed.moved(changed.image, [stack(labels) for labels in maps])


def _turned(x: Tensor, turns: int, plane: tuple[int, int]) -> Tensor:
    """``torch.rot90`` of (z, y, x), in half the time where z and x change places.

    PyTorch transposes matrices block by block, but walks through other maps row by row, which misses the cache at every
    voxel. So (z, y * x) is transposed first, and then whole rows are moved.
    """
    if plane != (0, 2) or turns == 2:
        return torch.rot90(x, turns, plane)
    _, height, width = x.shape
    transposed = x.reshape(len(x), -1).t().contiguous().view(height, width, len(x)).transpose(0, 1)
    return transposed.flip(0 if turns == 1 else 2)
