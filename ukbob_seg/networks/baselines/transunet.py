"""3D TransUNet (Chen et al., "3D TransUNet: Advancing Medical Image Segmentation through Vision Transformers", arXiv
2310.07781, 2023; "TransUNet: Rethinking the U-Net architecture design", Medical Image Analysis 97, 2024).

nnU-Net's U-Net with a ViT on its deepest map. The default is the paper's encoder-only variant. With ``decoder_layers``
it also has the paper's transformer decoder of organ queries (``vit_layers`` 0 then gives decoder-only), with one query
for each output, always the same: what the authors' code calls fixed matching.

Not built: Hungarian matching, with which the paper trains that decoder (more queries than outputs compete and are
classified, which needs a loss of its own); ImageNet's weights for the ViT, and the scaled shortcuts that go with them
in the authors' configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.baselines.transformer_blocks import (
    EncoderLayer,
    FeedForward,
    PositionEmbedding,
    SelfAttention,
    Triple,
    as_map,
    as_tokens,
    check_heads,
    check_input,
    check_rates,
    token_grid,
    triple,
)
from ukbob_seg.networks.baselines.transunet_decoder import LEVELS, OrganQueryDecoder
from ukbob_seg.networks.instance_norm import InstanceNorm

NEGATIVE_SLOPE = 0.01
VIT_EPS = 1e-6
STRIDES = (1, 2, 2, 2, 2, 2)


def divisor(arguments: Mapping[str, Any]) -> Triple:
    """By what the patch (z, y, x) must be divisible: the product of the strides along each axis.

    Raises:
        ConfigError: strides that are no whole numbers.
    """
    strides = [triple("strides", stride) for stride in arguments.get("strides", STRIDES)]
    return prod(s[0] for s in strides), prod(s[1] for s in strides), prod(s[2] for s in strides)


class TransUNet(nn.Module):
    """U-Net with a ViT at its bottleneck, and on request a transformer decoder of organ queries.

    The U-Net has 31 M parameters, the twelve layers of ViT-B 85 M. Lists go through the stages of the U-Net, finest
    first, as for nnU-Net's own network.

    Args:
        in_channels: image channels.
        out_channels: network outputs.
        features_per_stage: channels of each stage.
        strides: in front of each stage, a number or (z, y, x).
        kernel_sizes: of each stage, a number or (z, y, x), odd.
        n_conv_per_stage: convolutions of each encoder stage, a number or a list.
        n_conv_per_stage_decoder: convolutions of each decoder stage, a number or a list (one entry less).
        vit_layers: transformer layers at the bottleneck; 0 leaves the ViT out.
        vit_dim: channels of its tokens.
        vit_heads: its attention heads.
        vit_hidden_dim: channels between the two linear layers of a layer.
        vit_dropout: of positions and feed-forward parts.
        decoder_layers: layers in which organ queries attend to the decoder's maps; 0 leaves them out.
        decoder_dim: channels of a query, a multiple of 96 (position code of three axes, 32 groups of a norm).
        decoder_heads: attention heads of queries.
        patch_size: window (z, y, x) that the network is trained with; the ViT's position embedding is interpolated for
            windows of another size.
        deep_supervision: while training, also return coarser predictions: logits of every coarser decoder map, or with
            organ queries the masks before each layer, at full resolution. The attribute of this name switches that off
            and on again, for networks built with it.

    Raises:
        ConfigError: an argument that does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        features_per_stage: Sequence[int] = (32, 64, 128, 256, 320, 320),
        strides: Sequence[int | Sequence[int]] = STRIDES,
        kernel_sizes: Sequence[int | Sequence[int]] = (3, 3, 3, 3, 3, 3),
        n_conv_per_stage: int | Sequence[int] = 2,
        n_conv_per_stage_decoder: int | Sequence[int] = 2,
        vit_layers: int = 12,
        vit_dim: int = 768,
        vit_heads: int = 12,
        vit_hidden_dim: int = 3072,
        vit_dropout: float = 0.1,
        decoder_layers: int = 0,
        decoder_dim: int = 192,
        decoder_heads: int = 8,
        patch_size: Sequence[int] = (128, 128, 128),
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        stages = len(features_per_stage)
        widths = _per_stage("features_per_stage", features_per_stage, stages)
        counts = _per_stage("n_conv_per_stage", n_conv_per_stage, stages)
        decoder_counts = _per_stage("n_conv_per_stage_decoder", n_conv_per_stage_decoder, stages - 1)
        steps, kernels = _geometry(strides, kernel_sizes, stages)
        _check_layers(vit_layers, decoder_layers, stages)
        self.in_channels, self.divisor = in_channels, divisor({"strides": strides})
        grid = token_grid("TransUNet", patch_size, self.divisor)
        before = [in_channels, *widths[:-1]]
        self.encoder = nn.ModuleList(
            _stage(before[i], widths[i], counts[i], kernels[i], steps[i]) for i in range(stages)
        )
        levels = range(stages - 1, 0, -1)  # coarsest first
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(widths[i], widths[i - 1], steps[i], stride=steps[i], bias=False) for i in levels
        )
        self.decoder = nn.ModuleList(
            _stage(2 * widths[i - 1], widths[i - 1], decoder_counts[stages - 1 - i], kernels[i - 1]) for i in levels
        )
        self.out = nn.Conv3d(widths[0], out_channels, 1, bias=False) if decoder_layers == 0 else None
        self.apply(_initialise)
        self.vit = None
        if vit_layers:
            self.vit = _VisionTransformer(widths[-1], vit_layers, vit_dim, vit_heads, vit_hidden_dim, vit_dropout, grid)
        self.queries = None
        if decoder_layers:
            self.queries = OrganQueryDecoder(
                widths[LEVELS:0:-1], widths[0], out_channels, decoder_layers, decoder_dim, decoder_heads
            )
        self.deep_supervision = self._supervisable = deep_supervision
        # Last, so that the other weights are drawn as without.
        supervised = widths[1:-1] if deep_supervision and not decoder_layers else []
        self.coarse_outs = nn.ModuleList(nn.Conv3d(width, out_channels, 1, bias=False) for width in supervised)
        self.coarse_outs.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """(B, in_channels, z, y, x) -> (B, out_channels, z, y, x) logits.

        In training mode with deep supervision a list, finest (or with organ queries, last) first.

        Raises:
            ConfigError: an input of other channels, of edges that the strides do not divide, or one that leaves a
                single voxel at the bottleneck.
        """
        check_input("TransUNet", image.shape, self.in_channels, self.divisor)
        skips = [image]
        for stage in self.encoder:
            skips.append(stage(skips[-1]))
        x = skips.pop()
        maps = [x if self.vit is None else self.vit(x)]
        for up, stage in zip(self.ups, self.decoder, strict=True):
            maps.append(stage(torch.cat([up(maps[-1]), skips.pop()], dim=1)))
        supervise = self.deep_supervision and self.training and self._supervisable
        if self.queries is not None:
            masks = self.queries(maps[-1 - LEVELS : -1], maps[-1], every=supervise)
            return masks if supervise else masks[0]
        assert self.out is not None
        logits = self.out(maps[-1])
        if not supervise:
            return logits
        return [logits, *(head(x) for head, x in zip(self.coarse_outs, maps[-2:0:-1], strict=True))]


class _VisionTransformer(nn.Module):
    """Every voxel of a map is a token of a ViT (Dosovitskiy et al., ICLR 2021); the map gets its channels back."""

    def __init__(
        self, channels: int, layers: int, dim: int, heads: int, hidden: int, dropout: float, grid: Triple
    ) -> None:
        super().__init__()
        check_heads(dim, heads, "vit_dim")
        check_rates(vit_dropout=dropout)
        if hidden < 1:
            raise ConfigError(f"vit_hidden_dim must be at least 1, got {hidden}")
        self.embed = nn.Conv3d(channels, dim, 1)
        self.position = PositionEmbedding(dim, grid)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(*(_vit_layer(dim, heads, hidden, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim, eps=VIT_EPS)
        self.out = nn.Conv3d(dim, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, d, h, w) -> same shape."""
        grid = x.shape[2:]
        tokens = self.dropout(as_tokens(self.embed(x)) + self.position(grid))
        return self.out(as_map(self.norm(self.layers(tokens)), grid))


def _vit_layer(dim: int, heads: int, hidden: int, dropout: float) -> EncoderLayer:
    feed_forward = FeedForward(dim, hidden, dropout)
    for linear in (feed_forward.linear1, feed_forward.linear2):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(linear.bias, std=1e-6)
    return EncoderLayer(SelfAttention(dim, heads, bias=True), feed_forward, dim, VIT_EPS)


def _stage(before: int, after: int, count: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> nn.Sequential:
    """Convolutions with InstanceNorm and leaky ReLU; the first has the stride."""
    z, y, x = kernel
    layers: list[nn.Module] = []
    for i in range(count):
        layers += [
            nn.Conv3d(
                before if i == 0 else after, after, kernel, stride if i == 0 else 1, padding=(z // 2, y // 2, x // 2)
            ),
            InstanceNorm(after, affine=True),
            nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
        ]
    return nn.Sequential(*layers)


def _initialise(part: nn.Module) -> None:
    """nnU-Net's initial weights (He et al., ICCV 2015)."""
    if isinstance(part, (nn.Conv3d, nn.ConvTranspose3d)):
        nn.init.kaiming_normal_(part.weight, a=NEGATIVE_SLOPE)
        if part.bias is not None:
            nn.init.zeros_(part.bias)


def _check_layers(vit_layers: int, decoder_layers: int, stages: int) -> None:
    """Raises ConfigError where there is no transformer at all, or no map for queries to attend to."""
    if min(vit_layers, decoder_layers) < 0 or max(vit_layers, decoder_layers) < 1:
        raise ConfigError(f"one of vit_layers and decoder_layers must be above 0, got {vit_layers}, {decoder_layers}")
    if decoder_layers and stages <= LEVELS:
        raise ConfigError(f"decoder_layers need at least {LEVELS + 1} stages, got {stages}")


def _geometry(strides: Any, kernel_sizes: Any, stages: int) -> tuple[list[Triple], list[Triple]]:
    """Strides and kernels of all stages as (z, y, x).

    Raises:
        ConfigError: too few stages, lists of other lengths, or even kernels.
    """
    steps = [triple("strides", stride) for stride in _per_stage("strides", strides, stages)]
    kernels = [triple("kernel_sizes", kernel) for kernel in _per_stage("kernel_sizes", kernel_sizes, stages)]
    if stages < 2 or any(n % 2 == 0 for kernel in kernels for n in kernel):
        raise ConfigError(f"TransUNet needs at least 2 stages and odd kernel_sizes, got {stages} and {kernels}")
    return steps, kernels


def _per_stage(name: str, value: Any, stages: int) -> list[Any]:
    """A value for each stage; a number stands for all of them.

    Raises:
        ConfigError: another number of values, or a number below 1.
    """
    values = [value] * stages if isinstance(value, int) else list(value)
    if len(values) != stages or any(isinstance(n, int) and n < 1 for n in values):
        raise ConfigError(f"{name} must have {stages} entries of at least 1, got {value}")
    return values
