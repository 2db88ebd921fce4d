"""MedFormer (Gao et al., "A Data-scalable Transformer for Medical Image Segmentation", arXiv 2203.00131, 2022).

Convolutions at the two finest resolutions; below, blocks of bidirectional attention in which every voxel and a small
semantic map exchange information, at a cost linear in the voxels. The semantic maps of three resolutions are fused by a
transformer before the decoder. Widths and numbers of blocks are those of the authors' AMOS configuration (128^3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.baselines.medformer_blocks import (
    AttentionBlock,
    BasicBlock,
    MapFusion,
    PatchMerging,
    SemanticMap,
    Style,
    convolution,
)
from ukbob_seg.networks.baselines.transformer_blocks import Triple, check_heads, check_input, check_rates, triple

HALVINGS = 4
STAGES = 2 * HALVINGS
WITH_ATTENTION = range(1, 6)  # from the second halving down and up again, but for the two finest of the decoder
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
STRIDES = (2,) * HALVINGS


def divisor(arguments: Mapping[str, Any]) -> Triple:
    """By what the patch (z, y, x) must be divisible: the product of the strides along each axis.

    Raises:
        ConfigError: strides that are no whole numbers.
    """
    strides = [triple("strides", stride) for stride in arguments.get("strides", STRIDES)]
    return prod(s[0] for s in strides), prod(s[1] for s in strides), prod(s[2] for s in strides)


class MedFormer(nn.Module):
    """Hierarchical encoder and decoder of convolutions and bidirectional attention.

    Lists of eight go through the four stages of the encoder, each after a halving, and the four of the decoder, each
    after a doubling. Attention is where the authors have it, in stages 1 to 5 (counted from 0). With one input channel
    and 16 outputs the defaults have 39.54 M parameters; the authors' code 39.59 M, since its last attention block also
    projects features for a semantic map that nothing asks for.

    Args:
        in_channels: image channels.
        out_channels: network outputs.
        base_channels: channels at full resolution in the encoder.
        channels: of the eight stages.
        conv_blocks: residual blocks of two convolutions per stage; the last two of the decoder need one at least.
        attention_blocks: blocks of bidirectional attention per stage; 0 in stages 0, 6 and 7, else at least 1.
        heads: attention heads per stage.
        map_size: elements (z, y, x) of a semantic map.
        expansion: hidden channels of the attention blocks' feed-forward parts, as a multiple of their channels.
        fusion_dim: channels of the tokens of the map fusion.
        fusion_heads: its attention heads.
        fusion_layers: its transformer layers.
        strides: of the four halvings, a number or (z, y, x) each.
        kernels: of the five resolutions, finest first, a number or (z, y, x) each, odd.
        activation: ``relu``, ``gelu`` (the authors' choice for some datasets) or ``silu``.
        norm_affine: learn weight and bias of the InstanceNorms, which the authors do not; test-time adaptation has then
            more than the map fusion's LayerNorms to adapt.
        attention_dropout: of the weights by which semantic maps gather features.
        projection_dropout: of what attention gives, and in the map fusion.
        deep_supervision: while training, also return logits of two coarser decoder maps: that after the second
            doubling, which the authors supervise, and that after the first, which the toolkit's loss leaves out as it
            always does with the coarsest. The attribute of this name switches that off and on again, for networks built
            with it.

    Raises:
        ConfigError: an argument that does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        base_channels: int = 32,
        channels: Sequence[int] = (64, 128, 256, 320, 256, 128, 64, 32),
        conv_blocks: Sequence[int] = (2, 1, 0, 0, 0, 1, 2, 2),
        attention_blocks: Sequence[int] = (0, 1, 4, 6, 4, 1, 0, 0),
        heads: Sequence[int] = (1, 4, 8, 10, 8, 4, 1, 1),
        map_size: Sequence[int] = (4, 4, 4),
        expansion: int = 4,
        fusion_dim: int = 320,
        fusion_heads: int = 10,
        fusion_layers: int = 2,
        strides: Sequence[int | Sequence[int]] = STRIDES,
        kernels: Sequence[int | Sequence[int]] = (3, 3, 3, 3, 3),
        activation: str = "relu",
        norm_affine: bool = False,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        _check_stages(channels, conv_blocks, attention_blocks, heads)
        check_heads(fusion_dim, fusion_heads, "fusion_dim")
        check_rates(attention_dropout=attention_dropout, projection_dropout=projection_dropout)
        if min(base_channels, expansion, fusion_layers) < 1:
            raise ConfigError("base_channels, expansion and fusion_layers must be at least 1")
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        size = triple("map_size", map_size)
        if prod(size) == 1:
            raise ConfigError("a map_size of a single element has no statistics to be normalised with; use two or more")
        steps, edges = _check_geometry(strides, kernels)
        style = Style(ACTIVATIONS[activation], norm_affine, expansion, attention_dropout, projection_dropout)
        self.in_channels, self.divisor = in_channels, divisor({"strides": strides})
        self.stem = nn.Sequential(
            convolution(in_channels, base_channels, edges[0]), BasicBlock(style, base_channels, base_channels, edges[0])
        )
        counts = list(zip(conv_blocks, attention_blocks, heads, strict=True))
        widths = (base_channels, *channels)
        self.down = nn.ModuleList(
            _Down(style, widths[i], widths[i + 1], counts[i], steps[i], edges[i + 1], size) for i in range(HALVINGS)
        )
        self.map_fusion = MapFusion(channels[1:HALVINGS], fusion_dim, fusion_heads, fusion_layers, projection_dropout)
        self.up = nn.ModuleList(
            _Up(style, widths[i], widths[STAGES - i - 1], widths[i + 1], counts[i], edges[STAGES - i - 1], i)
            for i in range(HALVINGS, STAGES)
        )
        self.out = nn.Conv3d(channels[-1], out_channels, 1)
        self.deep_supervision = deep_supervision
        # Last, so that the other weights are drawn as without.
        supervised = (channels[5], channels[4]) if deep_supervision else ()
        self.coarse_outs = nn.ModuleList(nn.Conv3d(width, out_channels, 1) for width in supervised)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """(B, in_channels, z, y, x) -> (B, out_channels, z, y, x) logits.

        In training mode with deep supervision a list of three, finest first: also at 1/4 and 1/8 (at strides of 2).

        Raises:
            ConfigError: an input of other channels, of edges that the strides do not divide, or one that leaves a
                single voxel at the bottleneck.
        """
        check_input("MedFormer", image.shape, self.in_channels, self.divisor)
        skips, maps = [self.stem(image)], []
        for stage in self.down:
            x, semantic = stage(skips[-1])
            skips.append(x)
            maps += [] if semantic is None else [semantic]
        x = skips.pop()
        maps = self.map_fusion(maps)
        semantic = maps.pop()
        features = []
        for stage in self.up:
            x, semantic = stage(x, skips.pop(), semantic, maps.pop() if maps else None)
            features.append(x)
        logits = self.out(x)
        if not (self.deep_supervision and self.training and len(self.coarse_outs)):
            return logits
        return [logits, *(head(x) for head, x in zip(self.coarse_outs, features[1::-1], strict=True))]


Counts = tuple[int, int, int]  # convolution blocks, attention blocks, heads


class _Down(nn.Module):
    """A stage of the encoder; with attention it also makes a semantic map."""

    def __init__(
        self, style: Style, before: int, after: int, counts: Counts, stride: Triple, kernel: Triple, map_size: Triple
    ) -> None:
        super().__init__()
        convolutions, attentions, heads = counts
        self.merging = PatchMerging(style, before, after, stride, kernel)
        self.conv_blocks = nn.Sequential(*(BasicBlock(style, after, after, kernel) for _ in range(convolutions)))
        self.semantic_map = SemanticMap(after, map_size) if attentions else None
        self.attention_blocks = nn.ModuleList(
            AttentionBlock(style, after, after, after, heads, kernel) for _ in range(attentions)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, before, d, h, w) -> (B, after, d / stride, ...) and the semantic map (B, after, z, y, x), if any."""
        x = self.conv_blocks(self.merging(x))
        semantic = None if self.semantic_map is None else self.semantic_map(x)
        for block in self.attention_blocks:
            x, semantic = block(x, semantic)
        return x, semantic


class _Up(nn.Module):
    """A stage of the decoder: the coarser features are enlarged and joined with the encoder's, and so are the maps."""

    def __init__(
        self, style: Style, before: int, skip: int, after: int, counts: Counts, kernel: Triple, position: int
    ) -> None:
        super().__init__()
        convolutions, attentions, heads = counts
        width = before + skip
        self.join_maps = convolution(width, after, (1, 1, 1)) if attentions else None
        blocks = []
        for i in range(attentions):
            last = position == WITH_ATTENTION[-1] and i == attentions - 1  # nothing asks for its map
            blocks.append(AttentionBlock(style, width if i == 0 else after, after, after, heads, kernel, not last))
        self.attention_blocks = nn.ModuleList(blocks)
        width = after if attentions else width
        self.conv_blocks = nn.Sequential(
            *(BasicBlock(style, width if i == 0 else after, after, kernel) for i in range(convolutions))
        )

    def forward(self, x: Tensor, skip: Tensor, semantic: Tensor, skip_map: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features (B, before, d, h, w) and (B, skip, D, H, W), maps (B, before, z, y, x) and (B, skip, z, y, x) or
        None -> features (B, after, D, H, W) and a map."""
        x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=True)
        x = torch.cat([x, skip], dim=1)
        if self.join_maps is not None and skip_map is not None:
            semantic = self.join_maps(torch.cat([semantic, skip_map], dim=1))
        for block in self.attention_blocks:
            x, semantic = block(x, semantic)
        return self.conv_blocks(x), semantic


def _check_stages(
    channels: Sequence[int], conv_blocks: Sequence[int], attention_blocks: Sequence[int], heads: Sequence[int]
) -> None:
    """Raises ConfigError unless the four lists describe eight stages."""
    lists = {"channels": channels, "conv_blocks": conv_blocks, "attention_blocks": attention_blocks, "heads": heads}
    for name, values in lists.items():
        if len(values) != STAGES or any(n < (name in ("channels", "heads")) for n in values):
            raise ConfigError(f"{name} must have {STAGES} entries, none too small, got {tuple(values)}")
    for stage, count in enumerate(attention_blocks):
        if (count > 0) != (stage in WITH_ATTENTION):
            raise ConfigError(
                f"attention_blocks must be at least 1 in stages {WITH_ATTENTION[0]} to {WITH_ATTENTION[-1]}, counted "
                f"from 0, and 0 in others, got {tuple(attention_blocks)}"
            )
    if min(conv_blocks[6:]) < 1:
        raise ConfigError(f"the last two conv_blocks must be at least 1, got {tuple(conv_blocks)}")
    for stage in WITH_ATTENTION:
        check_heads(channels[stage], heads[stage], f"channels[{stage}]")


def _check_geometry(
    strides: Sequence[int | Sequence[int]], kernels: Sequence[int | Sequence[int]]
) -> tuple[list[Triple], list[Triple]]:
    """Strides and kernels as (z, y, x); raises ConfigError where they do not fit four halvings."""
    if len(strides) != HALVINGS or len(kernels) != HALVINGS + 1:
        raise ConfigError(
            f"MedFormer has {HALVINGS} strides and {HALVINGS + 1} kernels, got {len(strides)} and {len(kernels)}"
        )
    edges = [triple("kernels", kernel) for kernel in kernels]
    if any(n % 2 == 0 for edge in edges for n in edge):
        raise ConfigError(f"kernels must be odd, got {list(kernels)}")
    return [triple("strides", stride) for stride in strides], edges
