"""nnFormer (Zhou et al., 2021; IEEE TIP 2023): local and global attention in volumes between convolutions.

Convolutional embedding, two local encoder stages, a bottleneck of three global blocks (third and fourth encoder stage
and first decoder stage), two local decoder stages; each decoder stage starts with skip attention. Defaults are those of
the authors' code for Synapse, where the patch is 64 x 128 x 128. There a block is called global because its window is
as large as its map; here it is global on every map, so that patches of other sizes keep the paper's structure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.baselines.channel_norm import ChannelNorm
from ukbob_seg.networks.baselines.checks import Triple, check_channels, check_input, check_rate, integers, triple
from ukbob_seg.networks.baselines.nnformer_attention import VolumeLayer

NAME = "nnFormer"
STAGES = 4
LOCAL_STAGES = 2
EMBEDDING_STRIDES = (2, 4, 4)
STRIDES = ((2, 2, 2),) * (STAGES - 1)


def divisor(arguments: Mapping[str, Any]) -> Triple:
    """By what the patch (z, y, x) must be divisible: all strides, of ``embedding_strides`` and ``strides``.

    Raises:
        ConfigError: strides that the network does not take.
    """
    first, others = _strides(arguments.get("embedding_strides", EMBEDDING_STRIDES), arguments.get("strides", STRIDES))
    z, y, x = (prod(steps) for steps in zip(first, *others, strict=True))
    return z, y, x


class NNFormer(nn.Module):
    """nnFormer; with the defaults, deep supervision and 14 outputs 150.05 M parameters (published: 150.5 M).

    Args:
        in_channels: image channels.
        out_channels: network outputs.
        embedding_dim: channels of the first stage, twice as many in each next one.
        depths: layers of each encoder stage; those of the first three are the decoder's, too.
        num_heads: attention heads per stage.
        embedding_strides: voxels (z, y, x) of a token, 1, 2 or 4 each (the authors use 2 4 4, 4 4 4 and 1 4 4).
        strides: of the three downsamplings, 1 or 2 per axis; 1 for axes of few slices, as the authors do for ACDC.
        window_size: voxels (z, y, x) of the local stages' windows.
        global_extent: voxels (z, y, x) of the third stage's map of the training patch: the position bias tells apart
            all offsets in it, and clamps those of larger maps.
        mlp_ratio: hidden width of the MLPs.
        drop_path_rate: stochastic depth of the last layer of encoder and decoder; earlier ones less.
        deep_supervision: also return logits of the two coarser decoder stages, as the paper does; the attribute of this
            name switches that off and on again, for networks built with it.

    Raises:
        ConfigError: an argument that no network can be built with.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_dim: int = 192,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (6, 12, 24, 48),
        embedding_strides: Sequence[int] = EMBEDDING_STRIDES,
        strides: Sequence[Sequence[int]] = STRIDES,
        window_size: Sequence[int] = (4, 4, 4),
        global_extent: Sequence[int] = (8, 8, 8),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels)
        check_rate("drop_path_rate", drop_path_rate)
        depths, heads = integers("depths", depths, STAGES), integers("num_heads", num_heads, STAGES)
        dims = tuple(embedding_dim * 2**stage for stage in range(STAGES))
        if embedding_dim < 2 or embedding_dim % 2 or any(dim % n for dim, n in zip(dims, heads, strict=True)):
            raise ConfigError(
                f"embedding_dim must be even, and num_heads {heads} must divide it x (1, 2, 4, 8), got {embedding_dim}"
            )
        if int(embedding_dim * mlp_ratio) < 1:
            raise ConfigError(f"mlp_ratio must leave the MLPs at least one channel, got {mlp_ratio}")
        first, steps = _strides(embedding_strides, strides)
        extents = _extents(triple("window_size", window_size), triple("global_extent", global_extent), steps[-1])
        self.in_channels = in_channels
        self.divisor = divisor({"embedding_strides": embedding_strides, "strides": strides})
        self.embedding = Embedding(in_channels, embedding_dim, first)
        self.downs = nn.ModuleList([DownSampling(dim, step) for dim, step in zip(dims, steps, strict=False)])
        self.ups = nn.ModuleList([UpSampling(2 * dim, step) for dim, step in zip(dims, steps, strict=False)])

        def stage(index: int, rates: Sequence[float], over_skip: bool) -> nn.ModuleList:
            return nn.ModuleList(
                VolumeLayer(
                    dims[index], heads[index], extents[index], is_global=index >= LOCAL_STAGES, shifted=i % 2 == 1,
                    over_skip=over_skip and i == 0, mlp_ratio=mlp_ratio, drop_path=rate,
                )
                for i, rate in enumerate(rates)
            )  # fmt: skip

        rates = _rates(depths, drop_path_rate)
        self.encoder = nn.ModuleList([stage(i, rates[i], False) for i in range(STAGES)])
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for dim in dims])
        rates = _rates(depths[-2::-1], drop_path_rate)[::-1]  # the decoder begins with the third stage
        self.decoder = nn.ModuleList([stage(i, rates[i], True) for i in range(STAGES - 1)])
        self.deep_supervision = deep_supervision
        levels = STAGES - 1 if deep_supervision else 1
        self.outs = nn.ModuleList([nn.ConvTranspose3d(dims[i], out_channels, first, first) for i in range(levels)])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(B, in_channels, D, H, W) -> (B, out_channels, D, H, W) logits.

        With deep supervision a list of three, finest first: also after one and two downsamplings.

        Raises:
            ConfigError: an edge is not divisible.
        """
        check_input(NAME, x.shape, self.in_channels, self.divisor)
        x = self.embedding(x)
        skips = []
        for index, (layers, norm) in enumerate(zip(self.encoder, self.norms, strict=True)):
            if index:
                x = self.downs[index - 1](x)
            for layer in _layers(layers):
                x = layer(x)
            skips.append(norm(x))
        x = skips.pop()
        decoded = []
        for index in reversed(range(STAGES - 1)):
            x = self.ups[index](x)
            over_skip, *others = _layers(self.decoder[index])
            x = over_skip(x, skips.pop())
            for layer in others:
                x = layer(x)
            decoded.append(x)
        wanted = self.outs if self.deep_supervision else self.outs[:1]
        logits = [head(_channels_first(x)) for head, x in zip(wanted, reversed(decoded), strict=False)]
        return logits if len(logits) > 1 else logits[0]


class Embedding(nn.Module):
    """Four convolutions, two of them with strides,, with GELU and LayerNorm between."""

    def __init__(self, in_channels: int, dim: int, strides: Triple) -> None:
        super().__init__()
        half = dim // 2
        z, y, x = strides
        first = min(z, 2), min(y, 2), min(x, 2)
        second = z // first[0], y // first[1], x // first[2]
        self.layers = nn.Sequential(
            nn.Conv3d(in_channels, half, 3, stride=first, padding=1), nn.GELU(), ChannelNorm(half),
            nn.Conv3d(half, half, 3, padding=1), nn.GELU(), ChannelNorm(half),
            nn.Conv3d(half, dim, 3, stride=second, padding=1), nn.GELU(), ChannelNorm(dim),
            nn.Conv3d(dim, dim, 3, padding=1), ChannelNorm(dim),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, D, H, W) -> tokens (B, d, h, w, dim)."""
        return _channels_last(self.layers(x))


class DownSampling(nn.Module):
    """GELU, LayerNorm and a convolution of 3x3x3 with stride to twice the channels."""

    def __init__(self, dim: int, stride: Triple) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reduction = nn.Conv3d(dim, 2 * dim, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> (B, D/stride, H/stride, W/stride, 2C)."""
        return _channels_last(self.reduction(_channels_first(self.norm(F.gelu(x)))))


class UpSampling(nn.Module):
    """LayerNorm and a transposed convolution to half the channels."""

    def __init__(self, dim: int, stride: Triple) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.expansion = nn.ConvTranspose3d(dim, dim // 2, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> (B, stride D, stride H, stride W, C/2)."""
        return _channels_last(self.expansion(_channels_first(self.norm(x))))


def _strides(first: Any, others: Any) -> tuple[Triple, list[Triple]]:
    if not isinstance(others, Sequence) or len(others) != STAGES - 1:
        raise ConfigError(f"strides must be {STAGES - 1} lists (z, y, x), got {others!r}")
    return triple("embedding_strides", first, (1, 2, 4)), [triple("strides", step, (1, 2)) for step in others]


def _extents(window: Triple, whole: Triple, stride: Triple) -> list[Triple]:
    """Of the four stages: windows of the local ones, maps of the global ones."""
    z, y, x = (ceil(n / s) for n, s in zip(whole, stride, strict=True))
    return [window] * LOCAL_STAGES + [whole, (z, y, x)]


def _rates(depths: Sequence[int], last: float) -> list[list[float]]:
    """Stochastic depth per stage and layer, rising from 0."""
    flat = iter(torch.linspace(0, last, sum(depths), device="cpu").tolist())  # also when building on meta
    return [[next(flat) for _ in range(depth)] for depth in depths]


def _layers(stage: Any) -> Any:
    """A stage is a ModuleList, which the type checker takes for any module."""
    return stage


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 4, 1, 2, 3)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1)
