"""3D UX-Net (Lee et al., ICLR 2023): a Swin-like encoder of large-kernel depthwise convolutions, UNETR's decoder.

The block is that of the authors' code, with which the paper's numbers were made: one residual connection around
depthwise convolution, LayerNorm, scaling and a learned scale per channel (ConvNeXt's block, Liu et al., CVPR 2022).
The paper's formula has two residual connections instead, each branch after a LayerNorm of its own. "Scaling" is its
depthwise replacement of the MLP: each channel has four hidden values of its own, and no channel sees another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.baselines.channel_norm import ChannelNorm
from ukbob_seg.networks.baselines.checks import (
    Triple,
    check_bottleneck,
    check_channels,
    check_input,
    check_rate,
    integers,
)
from ukbob_seg.networks.recompute import recomputed
from ukbob_seg.networks.residual_blocks import Projection, SkipBlock, UpBlock
from ukbob_seg.networks.window_attention import DropPath

NAME = "3D UX-Net"
DIVISOR = (16, 16, 16)
STAGES = 4
STEM_KERNEL = 7
EPS = 1e-6


def divisor(arguments: Mapping[str, Any]) -> Triple:
    """By what the patch (z, y, x) must be divisible: the stem and three stages halve it, whatever the arguments."""
    return DIVISOR


class UXNet(nn.Module):
    """3D UX-Net; with the defaults it has the paper's 53.0 M parameters, for 5 outputs as for 16.

    Args:
        in_channels: image channels.
        out_channels: network outputs.
        feature_sizes: channels of the four stages.
        hidden_size: channels of the residual block at the bottleneck.
        depths: blocks per stage.
        kernel_size: edge of the depthwise convolutions, odd.
        expansion: hidden values per channel in the scaling.
        layer_scale: first value of the learned scales; 0 for none.
        drop_path_rate: stochastic depth of the last block; earlier ones less.
        norm_affine: learn weight and bias of the decoder's InstanceNorms (the authors' have none).
        deep_supervision: also return logits of three coarser decoder maps (not in the paper); the attribute of this
            name switches that off and on again, for networks built with it.

    Raises:
        ConfigError: an argument that no network can be built with.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        feature_sizes: Sequence[int] = (48, 96, 192, 384),
        hidden_size: int = 768,
        depths: Sequence[int] = (2, 2, 2, 2),
        kernel_size: int = 7,
        expansion: int = 4,
        layer_scale: float = 1e-6,
        drop_path_rate: float = 0.0,
        norm_affine: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels)
        check_rate("drop_path_rate", drop_path_rate)
        integers("hidden_size and expansion", (hidden_size, expansion), 2)
        f1, f2, f3, f4 = integers("feature_sizes", feature_sizes, STAGES)
        integers("kernel_size", (kernel_size,), 1)
        if kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size must be odd, got {kernel_size}")
        if layer_scale < 0:
            raise ConfigError(f"layer_scale must not be negative, got {layer_scale}")
        self.in_channels = in_channels
        self.encoder = UXEncoder(
            in_channels, (f1, f2, f3, f4), integers("depths", depths, STAGES), kernel_size, expansion, layer_scale,
            drop_path_rate,
        )  # fmt: skip
        widths = (in_channels, f1, f2, f3, f4, hidden_size)
        self.skips = nn.ModuleList([SkipBlock(a, b, norm_affine) for a, b in pairwise(widths)])
        self.ups = nn.ModuleList([UpBlock(a, b, 2, norm_affine) for a, b in ((f2, f1), (f3, f2), (f4, f3))])
        self.ups.append(UpBlock(hidden_size, f4, 2, norm_affine))
        self.last = SkipBlock(f1, f1, norm_affine)
        self.out = Projection(f1, out_channels)
        self.deep_supervision = deep_supervision
        self.coarse_outs = nn.ModuleList([Projection(f, out_channels) for f in (f2, f3, f4) if deep_supervision])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(B, in_channels, D, H, W) -> (B, out_channels, D, H, W) logits.

        With deep supervision a list of four, finest first: also at 1/2, 1/4 and 1/8.

        Raises:
            ConfigError: an edge is not divisible by 16, or the bottleneck would be a single voxel.
        """
        check_input(NAME, x.shape, self.in_channels, DIVISOR)
        check_bottleneck(NAME, x.shape, DIVISOR)
        if not x.is_cuda:  # as Swin-UNETR, whose decoder this is
            x = x.contiguous(memory_format=torch.channels_last_3d)
        maps = [x, *self.encoder(x)]
        x = self.skips[STAGES](maps.pop())
        decoded = []
        for level in reversed(range(STAGES)):
            x = self.ups[level](x, self.skips[level](maps.pop()))
            decoded.append(x)
        logits = self.out(self.last(x))
        if not (self.deep_supervision and len(self.coarse_outs)):
            return logits
        coarse = zip(self.coarse_outs, reversed(decoded[:-1]), strict=True)
        return [logits, *(head(x) for head, x in coarse)]


class UXEncoder(nn.Module):
    """Stem and four stages, each of which halves the resolution; returns the normalised map of each, finest first."""

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, int, int, int],
        depths: Sequence[int],
        kernel_size: int,
        expansion: int,
        layer_scale: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stem = nn.Conv3d(in_channels, widths[0], STEM_KERNEL, stride=2, padding=STEM_KERNEL // 2)
        self.downs = nn.ModuleList([nn.Sequential(stem, ChannelNorm(widths[0], eps=EPS))])
        for a, b in pairwise(widths):
            self.downs.append(nn.Sequential(ChannelNorm(a, eps=EPS), nn.Conv3d(a, b, 2, stride=2)))
        self.stages = nn.ModuleList()
        for width, depth in zip(widths, depths, strict=True):
            blocks = [UXBlock(width, kernel_size, expansion, layer_scale, next(rates)) for _ in range(depth)]
            self.stages.append(nn.Sequential(*blocks))
        self.norms = nn.ModuleList([ChannelNorm(width, eps=EPS) for width in widths])

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, D, H, W) -> four maps (B, C, d, h, w), from 1/2 to 1/16 resolution."""
        outputs = []
        for down, stage, norm in zip(self.downs, self.stages, self.norms, strict=True):
            x = stage(down(x))
            outputs.append(norm(x))
        return outputs


class UXBlock(nn.Module):
    """Depthwise convolution, LayerNorm, scaling of each channel by itself, and a residual connection.

    Args:
        width: channels.
        kernel_size: edge of the depthwise convolution.
        expansion: hidden values per channel.
        layer_scale: first value of the scales; 0 for none.
        drop_path: probability with which training leaves the branch out.
    """

    def __init__(self, width: int, kernel_size: int, expansion: int, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv3d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.norm = ChannelNorm(width, eps=EPS)
        self.expand = nn.Conv3d(width, expansion * width, 1, groups=width)
        self.reduce = nn.Conv3d(expansion * width, width, 1, groups=width)
        self.scale = nn.Parameter(torch.full((width,), float(layer_scale))) if layer_scale else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, d, h, w) -> the same shape."""
        branch = recomputed(self._scaled, self.depthwise(x))
        if self.scale is not None:
            branch = branch * self.scale[:, None, None, None]
        return x + self.drop_path(branch)

    def _scaled(self, x: Tensor) -> Tensor:
        return self.reduce(F.gelu(self.expand(self.norm(x))))
