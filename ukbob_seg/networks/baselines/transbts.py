"""TransBTS (Wang et al., "TransBTS: Multimodal Brain Tumor Segmentation Using Transformer", MICCAI 2021).

A convolutional encoder shrinks the image by eight, a transformer relates all voxels of the small map to each other, and
a convolutional decoder with skip connections enlarges the result again (Figure 1 of the paper). The order of layers
within a block, which the paper leaves open, is that of the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
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
)

GROUPS = 8  # of the encoder's GroupNorms
ENCODER_BLOCKS = (1, 2, 2, 4)  # residual blocks per resolution, finest first
DIVISOR = (8, 8, 8)


def divisor(arguments: Mapping[str, Any]) -> Triple:
    """By what the patch (z, y, x) must be divisible: the encoder halves it three times, whatever the arguments."""
    return DIVISOR


class TransBTS(nn.Module):
    """CNN encoder, transformer at an eighth of the resolution, CNN decoder with skip connections.

    At its defaults, with 4 input channels and 4 outputs, this is the network of 32.99 M parameters that the paper
    reports, less 263,680 that the authors' code creates but never uses (a linear layer that stands for another kind of
    patch embedding, and the LayerNorm after the last transformer layer, whose output it drops).

    Args:
        in_channels: image channels.
        out_channels: network outputs.
        base_channels: channels of the finest map, a multiple of 8; every halving doubles them.
        embedding_dim: channels of a token, d in the paper.
        heads: attention heads.
        layers: transformer layers, L in the paper.
        hidden_dim: channels between the two linear layers of a transformer layer.
        dropout: of positions, attention branch and feed-forward part.
        attention_dropout: of attention weights and attention branch.
        input_dropout: of whole channels after the first convolution.
        patch_size: window (z, y, x) that the network is trained with, a multiple of 8; its position embedding is
            interpolated for windows of another size.
        deep_supervision: while training, also return logits of the decoder's maps at 1/2 and 1/4 (not in the paper);
            the attribute of this name switches that off and on again, for networks built with it.

    Raises:
        ConfigError: an argument that does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        base_channels: int = 16,
        embedding_dim: int = 512,
        heads: int = 8,
        layers: int = 4,
        hidden_dim: int = 4096,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        input_dropout: float = 0.2,
        patch_size: Sequence[int] = (128, 128, 128),
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if base_channels < GROUPS or base_channels % GROUPS:
            raise ConfigError(f"base_channels must be a multiple of {GROUPS}, got {base_channels}")
        if layers < 1 or hidden_dim < 1:
            raise ConfigError(f"layers and hidden_dim must be at least 1, got {layers} and {hidden_dim}")
        check_heads(embedding_dim, heads, "embedding_dim")
        check_rates(dropout=dropout, attention_dropout=attention_dropout, input_dropout=input_dropout)
        grid = token_grid("TransBTS", patch_size, DIVISOR)
        self.in_channels = in_channels
        widths = [base_channels * 2**level for level in range(len(ENCODER_BLOCKS))]
        self.encoder = _Encoder(in_channels, widths, input_dropout)
        self.linear_projection = nn.Sequential(
            nn.BatchNorm3d(widths[-1]), nn.ReLU(inplace=True), _convolution(widths[-1], embedding_dim)
        )
        self.position = PositionEmbedding(embedding_dim, grid)
        self.dropout = nn.Dropout(dropout)
        # Two dropouts in a row keep what both keep, and scale by both.
        branch_dropout = 1 - (1 - attention_dropout) * (1 - dropout)
        self.transformer = nn.Sequential(
            *(
                EncoderLayer(
                    SelfAttention(embedding_dim, heads, False, attention_dropout, branch_dropout),
                    FeedForward(embedding_dim, hidden_dim, dropout),
                    embedding_dim,
                )
                for _ in range(layers)
            )
        )
        self.feature_mapping = nn.Sequential(
            _convolution(embedding_dim, widths[-1]),
            *_norm_relu(widths[-1]),
            _convolution(widths[-1], widths[-1]),
            *_norm_relu(widths[-1]),
            _DecoderBlock(widths[-1]),
        )
        coarser = list(zip(widths[:0:-1], widths[-2::-1], strict=True))  # (from, to), coarsest first
        self.ups = nn.ModuleList(_UpCat(before, after) for before, after in coarser)
        self.decoder = nn.ModuleList(_DecoderBlock(after) for _, after in coarser)
        self.out = nn.Conv3d(widths[0], out_channels, 1)
        self.deep_supervision = deep_supervision
        # Last, so that the other weights are drawn as without.
        supervised = widths[1:-1] if deep_supervision else []
        self.coarse_outs = nn.ModuleList(nn.Conv3d(width, out_channels, 1) for width in supervised)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """(B, in_channels, z, y, x) -> (B, out_channels, z, y, x) logits.

        In training mode with deep supervision a list of three, finest first: also at 1/2 and 1/4.

        Raises:
            ConfigError: an input of other channels, of edges that 8 does not divide, or of 8 voxels along each axis.
        """
        check_input("TransBTS", image.shape, self.in_channels, DIVISOR)
        *skips, x = self.encoder(image)
        x = self.linear_projection(x)
        grid = x.shape[2:]
        tokens = self.dropout(as_tokens(x) + self.position(grid))
        x = self.feature_mapping(as_map(self.transformer(tokens), grid))
        maps = []
        for up, block, skip in zip(self.ups, self.decoder, reversed(skips), strict=True):
            x = block(up(x, skip))
            maps.append(x)
        logits = self.out(x)
        if not (self.deep_supervision and self.training and len(self.coarse_outs)):
            return logits
        return [logits, *(head(x) for head, x in zip(self.coarse_outs, maps[-2::-1], strict=True))]


class _Encoder(nn.Module):
    """Residual blocks at four resolutions with strided convolutions between."""

    def __init__(self, in_channels: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.stem = nn.Sequential(_convolution(in_channels, widths[0]), nn.Dropout3d(dropout))
        self.stages = nn.ModuleList(
            nn.Sequential(*(_EncoderBlock(width) for _ in range(count)))
            for width, count in zip(widths, ENCODER_BLOCKS, strict=True)
        )
        self.downs = nn.ModuleList(
            nn.Conv3d(before, after, 3, stride=2, padding=1) for before, after in pairwise(widths)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, in, z, y, x) -> four maps (B, C, d, h, w), at 1 to 1/8 of the resolution."""
        maps = [self.stages[0](self.stem(image))]
        for down, stage in zip(self.downs, list(self.stages)[1:], strict=True):
            maps.append(stage(down(maps[-1])))
        return maps


class _EncoderBlock(nn.Module):
    """Twice GroupNorm, ReLU and convolution, with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.ReLU(inplace=True), _convolution(width, width),
            nn.GroupNorm(GROUPS, width), nn.ReLU(inplace=True), _convolution(width, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, d, h, w) -> same shape."""
        return x + self.layers(x)


class _DecoderBlock(nn.Module):
    """Twice convolution, BatchNorm and ReLU, with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(width, width), *_norm_relu(width), _convolution(width, width), *_norm_relu(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, d, h, w) -> same shape."""
        return x + self.layers(x)


class _UpCat(nn.Module):
    """Fewer channels, twice the resolution, and the encoder's map of that resolution mixed in."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.reduce = nn.Conv3d(before, after, 1)
        self.up = nn.ConvTranspose3d(after, after, 2, stride=2)
        self.mix = nn.Conv3d(2 * after, after, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, before, d, h, w) and (B, after, 2d, 2h, 2w) -> (B, after, 2d, 2h, 2w)."""
        return self.mix(torch.cat([skip, self.up(self.reduce(x))], dim=1))


def _convolution(before: int, after: int) -> nn.Conv3d:
    return nn.Conv3d(before, after, 3, padding=1)


def _norm_relu(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm3d(width), nn.ReLU(inplace=True)
