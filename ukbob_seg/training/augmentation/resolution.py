"""Blur and low resolution: nnU-Net's two ways of losing detail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ukbob_seg.training.augmentation.batch import Batch, chance, change_channels, uniform
from ukbob_seg.training.augmentation.separable import along_axes, blur_matrix, low_resolution_matrix


@dataclass(frozen=True)
class AxesRecord:
    """A number (B, C, 3) for each axis, and which channels (B, C) bool are changed."""

    chosen: Tensor
    value: Tensor


class RandomBlur:
    """Gaussian blur with a width for each axis and channel; nnU-Net's.

    Args:
        channels: of the image.
        sigma_vox: lowest and highest standard deviation, in voxels as nnU-Net has it.
        probability: per element.
        channel_probability: per channel of a chosen element.
    """

    def __init__(
        self,
        channels: int,
        sigma_vox: tuple[float, float] = (0.5, 1.0),
        probability: float = 0.2,
        channel_probability: float = 0.5,
    ) -> None:
        self.channels, self.sigma_vox = channels, sigma_vox
        self.probability, self.channel_probability = probability, channel_probability

    def sample(self, batch_size: int, generator: torch.Generator) -> AxesRecord:
        """Draw elements, channels and widths."""
        shape = (batch_size, self.channels)
        chosen = chance(self.probability, (batch_size, 1), generator) & chance(
            self.channel_probability, shape, generator
        )
        return AxesRecord(chosen, uniform(*self.sigma_vox, (*shape, 3), generator))

    def apply(self, batch: Batch, record: AxesRecord) -> Batch:
        """Blur, the edge voxels going on beyond the patch."""

        def blur(channel: Tensor, element: int, index: int) -> Tensor:
            sigma = record.value[element, index].tolist()
            return along_axes(
                channel, [blur_matrix(n, s) if n > 1 else None for n, s in zip(channel.shape, sigma, strict=True)]
            )

        return change_channels(batch, record.chosen, blur)


class RandomLowResolution:
    """Bring channels to fewer voxels (nearest) and back (linear), by one factor for all axes; nnU-Net's.

    Args:
        channels: of the image.
        axes: that lose resolution (0 = z, 1 = y, 2 = x).
        scale: lowest and highest share of the voxels along an axis that is kept.
        probability: per element.
        channel_probability: per channel of a chosen element.
    """

    def __init__(
        self,
        channels: int,
        axes: Sequence[int] = (0, 1, 2),
        scale: tuple[float, float] = (0.5, 1.0),
        probability: float = 0.25,
        channel_probability: float = 0.5,
    ) -> None:
        self.channels, self.axes, self.scale = channels, tuple(axes), scale
        self.probability, self.channel_probability = probability, channel_probability

    def sample(self, batch_size: int, generator: torch.Generator) -> AxesRecord:
        """Draw elements, channels and scales."""
        shape = (batch_size, self.channels)
        chosen = chance(self.probability, (batch_size, 1), generator) & chance(
            self.channel_probability, shape, generator
        )
        return AxesRecord(chosen, uniform(*self.scale, (*shape, 1), generator).expand(*shape, 3))

    def apply(self, batch: Batch, record: AxesRecord) -> Batch:
        """Drop voxels and interpolate."""

        def coarsen(channel: Tensor, element: int, index: int) -> Tensor:
            scale = record.value[element, index].tolist()
            sizes = channel.shape
            return along_axes(
                channel, [low_resolution_matrix(sizes[a], scale[a]) if a in self.axes else None for a in range(3)]
            )

        return change_channels(batch, record.chosen, coarsen)
