"""What both MedSegDiff networks are made of: residual blocks that know the time, encoder and decoder.

After Nichol and Dhariwal, Improved denoising diffusion probabilistic models, ICML 2021, which the papers refer to for
the details, in 3D: GroupNorm, SiLU, convolution, twice; the time is added between the two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError

MOST_GROUPS, CHANNELS_PER_GROUP = 32, 4  # the reference has 32 groups for 128 channels
LONGEST_PERIOD = 10_000.0
TIME_FACTOR = 4  # width of the time's embedding, of that of the first stage
M = TypeVar("M", bound=nn.Module)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with groups of four channels and more, at most 32 groups."""
    groups = min(MOST_GROUPS, max(1, channels // CHANNELS_PER_GROUP))
    return nn.GroupNorm(math.gcd(groups, channels), channels)


def convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv3d:
    """3x3x3, padded."""
    return nn.Conv3d(in_channels, out_channels, 3, stride, padding=1)


def zeroed(module: M) -> M:
    """The module with all parameters 0: a block that begins as the identity, a network that predicts no noise."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class TimeEmbedding(nn.Module):
    """Sines and cosines of the time, and two linear layers with a SiLU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.channels = width, TIME_FACTOR * width
        self.layers = nn.Sequential(nn.Linear(width, self.channels), nn.SiLU(), nn.Linear(self.channels, self.channels))

    def forward(self, time: Tensor) -> Tensor:
        """(B,) in [0, 1000) -> (B, channels)."""
        half = self.width // 2
        rates = torch.exp(-math.log(LONGEST_PERIOD) * torch.arange(half, device=time.device) / half)
        angles = time.float().unsqueeze(1) * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        embedded: Tensor = self.layers(F.pad(waves, (0, self.width - 2 * half)))
        return embedded


class ResidualBlock(nn.Module):
    """Twice GroupNorm, SiLU and convolution, the time added in between; the shortcut is 1x1x1 where widths differ.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        time: channels of the time's embedding; None for a block without time.
        dropout: before the second convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, time: int | None, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Sequential(group_norm(in_channels), nn.SiLU(), convolution(in_channels, out_channels))
        self.time = None if time is None else nn.Sequential(nn.SiLU(), nn.Linear(time, out_channels))
        self.second = nn.Sequential(
            group_norm(out_channels), nn.SiLU(), nn.Dropout(dropout), zeroed(convolution(out_channels, out_channels))
        )
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, in, z, y, x), and the time's embedding (B, C) if the block knows time, -> (B, out, z, y, x)."""
        inner = self.first(x)
        if self.time is not None:
            inner = inner + self.time(embedding)[:, :, None, None, None]
        result: Tensor = self.shortcut(x) + self.second(inner)
        return result


class Stage(nn.ModuleList):
    """Residual blocks at one resolution."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, time: int | None, dropout: float) -> None:
        super().__init__(
            ResidualBlock(in_channels if i == 0 else out_channels, out_channels, time, dropout) for i in range(blocks)
        )

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, in, z, y, x) -> (B, out, z, y, x)."""
        for block in self:
            x = block(x, embedding)
        return x


class Encoder(nn.Module):
    """Stages of residual blocks, each at half the resolution of the one before.

    Args:
        in_channels: of the input.
        features: channels per stage.
        blocks: per stage.
        time: channels of the time's embedding, or None.
        dropout: of the blocks.
    """

    def __init__(
        self, in_channels: int, features: Sequence[int], blocks: Sequence[int], time: int | None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.stem = convolution(in_channels, features[0])
        before = [features[0], *features[:-1]]
        self.shrink = nn.ModuleList(convolution(width, width, stride=2) for width in features[:-1])
        self.stages = nn.ModuleList(
            Stage(a, b, count, time, dropout) for a, b, count in zip(before, features, blocks, strict=True)
        )

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> list[Tensor]:
        """(B, in, z, y, x) -> one map per stage, finest first."""
        return self.after_stem(self.stem(x), embedding)

    def after_stem(self, x: Tensor, embedding: Tensor | None = None) -> list[Tensor]:
        """From the first convolution's result."""
        maps: list[Tensor] = []
        for level, stage in enumerate(self.stages):
            maps.append(stage(self.shrink[level - 1](maps[-1]) if level else x, embedding))
        return maps


class Decoder(nn.Module):
    """From the deepest map up to full resolution: nearest voxels and a convolution, then a block with the skip.

    Args:
        features: channels per stage of the encoder.
        time: channels of the time's embedding, or None.
        dropout: of the blocks.
    """

    def __init__(self, features: Sequence[int], time: int | None, dropout: float = 0.0) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(features))
        self.grow = nn.ModuleList(convolution(deep, fine) for fine, deep in pairs)
        self.blocks = nn.ModuleList(ResidualBlock(2 * fine, fine, time, dropout) for fine, _ in pairs)

    def forward(self, maps: Sequence[Tensor], embedding: Tensor | None = None) -> Tensor:
        """Maps of the encoder, finest first, -> (B, features[0], z, y, x)."""
        x = maps[-1]
        for level in range(len(maps) - 2, -1, -1):
            x = self.grow[level](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = self.blocks[level](torch.cat([x, maps[level]], dim=1), embedding)
        return x


def noise_head(width: int, outputs: int) -> nn.Sequential:
    """GroupNorm, SiLU and a convolution of zeros."""
    return nn.Sequential(group_norm(width), nn.SiLU(), zeroed(convolution(width, outputs)))


def checked_features(name: str, features: Sequence[int], least: int) -> list[int]:
    """Channels per stage as a list.

    Raises:
        ConfigError: too few stages, or no positive numbers.
    """
    found = list(features)
    if len(found) < least or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in found):
        raise ConfigError(
            f"network {name!r}: features_per_stage must be {least} or more positive numbers, got {features!r}"
        )
    return found


def checked_blocks(name: str, blocks: int | Sequence[int], stages: int) -> list[int]:
    """Residual blocks per stage; one number stands for all stages.

    Raises:
        ConfigError: not one positive number for each stage.
    """
    found = [blocks] * stages if isinstance(blocks, int) else list(blocks)
    if len(found) != stages or any(not isinstance(n, int) or n < 1 for n in found):
        raise ConfigError(
            f"network {name!r}: blocks_per_stage must be a positive number, or {stages} of them, got {blocks!r}"
        )
    return found
