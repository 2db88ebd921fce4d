"""The parts of MedFormer: bidirectional attention between a feature map and a small semantic map, and convolutions.

Maps are (B, C, d, h, w); a semantic map is (B, C, z, y, x) with few voxels, each of which sums up voxels of the feature
map anywhere (Gao et al., arXiv 2203.00131, Section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ukbob_seg.networks.baselines.transformer_blocks import EncoderLayer, FeedForward, SelfAttention, Triple
from ukbob_seg.networks.instance_norm import InstanceNorm

CONVOLUTION_EPS = 1e-4  # of the norms in front of convolutions, as the authors have it; those of attention have 1e-5
SQUEEZE_RATIO = 4


@dataclass(frozen=True)
class Style:
    """What all blocks of a network share.

    Attributes:
        activation: makes the activation layer of convolutions.
        norm_affine: learn weight and bias of the InstanceNorms.
        expansion: hidden channels of the inverted residual block, as a multiple of its channels.
        attention_dropout: of the weights by which the semantic map gathers features.
        projection_dropout: of the features that attention gives.
    """

    activation: Callable[[], nn.Module]
    norm_affine: bool
    expansion: int
    attention_dropout: float
    projection_dropout: float

    def norm(self, channels: int, eps: float = 1e-5) -> nn.Module:
        """An InstanceNorm."""
        return InstanceNorm(channels, eps=eps, affine=self.norm_affine)


class NormActConv(nn.Sequential):
    """InstanceNorm, activation (where wanted) and a convolution without bias."""

    def __init__(
        self, style: Style, before: int, after: int, kernel: Triple, *, groups: int = 1, activate: bool = True
    ) -> None:
        layers = [style.norm(before, CONVOLUTION_EPS), *([style.activation()] if activate else [])]
        super().__init__(*layers, convolution(before, after, kernel, groups))


class BasicBlock(nn.Module):
    """Two convolutions, each after norm and activation, with a residual connection (He et al., ECCV 2016).

    Where the channels change the shortcut is such a convolution too.
    """

    def __init__(self, style: Style, before: int, after: int, kernel: Triple) -> None:
        super().__init__()
        self.conv1 = NormActConv(style, before, after, kernel)
        self.conv2 = NormActConv(style, after, after, kernel)
        self.shortcut = nn.Identity() if before == after else NormActConv(style, before, after, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, d, h, w) -> (B, after, d, h, w)."""
        return self.conv2(self.conv1(x)) + self.shortcut(x)


class SeparableConvolution(nn.Sequential):
    """One filter per channel, then a 1x1x1 convolution; neither has a bias."""

    def __init__(self, before: int, after: int, kernel: Triple) -> None:
        super().__init__(convolution(before, before, kernel, before), convolution(before, after, (1, 1, 1)))


class SqueezeExcitation(nn.Module):
    """Channels weighted by what their means say (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv3d(channels, channels // SQUEEZE_RATIO, 1)
        self.excite = nn.Conv3d(channels // SQUEEZE_RATIO, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, d, h, w) -> same shape."""
        means = x.mean(dim=(2, 3, 4), keepdim=True)
        return x * self.excite(F.relu(self.squeeze(means))).sigmoid()


class InvertedResidual(nn.Module):
    """The feed-forward part: more channels, a filter for each, squeeze and excitation, and as many channels as before.

    MBConv (Sandler et al., CVPR 2018; Tan and Le, ICML 2019) with norm and activation in front of the convolutions.
    """

    def __init__(self, style: Style, channels: int, kernel: Triple) -> None:
        super().__init__()
        hidden = style.expansion * channels
        one = (1, 1, 1)
        self.expand = NormActConv(style, channels, hidden, one) if style.expansion > 1 else nn.Identity()
        self.depthwise = NormActConv(style, hidden, hidden, kernel, groups=hidden)
        self.squeeze_excitation = SqueezeExcitation(hidden)
        self.reduce = NormActConv(style, hidden, channels, one, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, d, h, w) -> same shape."""
        return x + self.reduce(self.squeeze_excitation(self.depthwise(self.expand(x))))


class BidirectionalAttention(nn.Module):
    """B-MHA: features gather from the semantic map and it gathers from them, by the same scores.

    Of the scores S = Q_f Q_m^T / sqrt(channels of a head), of each voxel i and each element j of the semantic map, the
    softmax over j weights what voxel i gets from the semantic map, and the softmax over i what element j gets from the
    features; so each side has queries and values, and no keys. Cost is linear in the voxels.

    Args:
        style: dropout rates.
        features: channels of the feature map.
        semantic: channels of the semantic map.
        out: channels of the new feature map, divisible by the heads.
        heads: attention heads.
        kernel: of the depthwise convolutions that project the feature map.
        update_map: whether a new semantic map is wanted; the last block of a network has no use for it.
    """

    def __init__(
        self, style: Style, features: int, semantic: int, out: int, heads: int, kernel: Triple, update_map: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.update_map = heads, update_map
        self.project_features = SeparableConvolution(features, 2 * out if update_map else out, kernel)
        self.project_map = convolution(semantic, 2 * out, (1, 1, 1))
        self.out_features = SeparableConvolution(out, out, kernel)
        self.out_map = convolution(out, semantic, (1, 1, 1)) if update_map else None
        self.attention_dropout = nn.Dropout(style.attention_dropout)
        self.projection_dropout = nn.Dropout(style.projection_dropout)

    def forward(self, features: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, features, d, h, w) and (B, semantic, z, y, x) -> new ones with (B, out, d, h, w) features."""
        projected = self.project_features(features)
        feature_query, feature_value = projected.chunk(2, dim=1) if self.update_map else (projected, None)
        map_query, map_value = self.project_map(semantic).chunk(2, dim=1)
        query, map_query, map_value = self._heads(feature_query), self._heads(map_query), self._heads(map_value)
        scores = torch.einsum(
            "bhdi,bhdj->bhij", query * query.shape[2] ** -0.5, map_query
        )  # (B, heads, voxels, elements)
        gathered = torch.einsum("bhij,bhdj->bhdi", scores.softmax(dim=3).to(map_value.dtype), map_value)
        new = self.projection_dropout(self.out_features(_joined(gathered, features)))
        if self.out_map is None or feature_value is None:
            return new, None
        weights = self.attention_dropout(scores.softmax(dim=2)).to(feature_value.dtype)
        summed = torch.einsum("bhij,bhdi->bhdj", weights, self._heads(feature_value))
        return new, self.out_map(_joined(summed, semantic))

    def _heads(self, projected: Tensor) -> Tensor:
        """(B, C, d, h, w) -> (B, heads, C / heads, d h w)."""
        return projected.flatten(2).unflatten(1, (self.heads, -1))


def _joined(values: Tensor, like: Tensor) -> Tensor:
    """(B, heads, C / heads, voxels) -> (B, C, d, h, w) with the voxels of ``like``."""
    return values.flatten(1, 2).unflatten(2, tuple(like.shape[2:]))


class AttentionBlock(nn.Module):
    """Bidirectional attention, then an inverted residual block; both maps have residual connections.

    Args:
        style: of the network.
        features: channels of the feature map.
        semantic: channels of the semantic map.
        out: channels of the new feature map; where they differ the shortcut is a 1x1x1 convolution.
        heads: attention heads.
        kernel: of the depthwise convolutions.
        update_map: whether a new semantic map is wanted.
    """

    def __init__(
        self, style: Style, features: int, semantic: int, out: int, heads: int, kernel: Triple, update_map: bool = True
    ) -> None:
        super().__init__()
        self.norm_features, self.norm_map = style.norm(features), style.norm(semantic)
        self.attention = BidirectionalAttention(style, features, semantic, out, heads, kernel, update_map)
        self.shortcut = nn.Identity() if features == out else NormActConv(style, features, out, (1, 1, 1))
        self.feed_forward = InvertedResidual(style, out, kernel)

    def forward(self, features: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
        """(B, features, d, h, w) and (B, semantic, z, y, x) -> new ones with (B, out, d, h, w) features."""
        new, change = self.attention(self.norm_features(features), self.norm_map(semantic))
        new = self.feed_forward(new + self.shortcut(features))
        return new, semantic if change is None else semantic + change


class SemanticMap(nn.Module):
    """Makes a semantic map: each of its elements is a weighted mean of projected features, by weights of its own.

    Args:
        channels: of the feature map and of the semantic map.
        size: elements (z, y, x); in what order they lie there means nothing.
    """

    def __init__(self, channels: int, size: Triple) -> None:
        super().__init__()
        self.size = size
        self.value = convolution(channels, channels, (3, 3, 3))
        self.weight = convolution(channels, prod(size), (3, 3, 3))

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, d, h, w) -> (B, C, z, y, x)."""
        weights = self.weight(features).flatten(2).softmax(dim=2)  # (B, elements, voxels), sum 1 over voxels
        values = self.value(features).flatten(2)
        return torch.einsum("bcv,bev->bce", values, weights.to(values.dtype)).unflatten(2, self.size)


class MapFusion(nn.Module):
    """Semantic maps of all resolutions, as tokens of one transformer, exchange what they know.

    Args:
        channels: of each map.
        dim: channels of the tokens.
        heads: attention heads.
        layers: transformer layers.
        dropout: of the feed-forward parts.
    """

    def __init__(self, channels: Sequence[int], dim: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.into = nn.ModuleList(convolution(width, dim, (1, 1, 1)) for width in channels)
        self.layers = nn.Sequential(
            *(
                EncoderLayer(SelfAttention(dim, heads, bias=False), FeedForward(dim, dim, dropout), dim, eps=1e-4)
                for _ in range(layers)
            )
        )
        self.out = nn.ModuleList(convolution(dim, width, (1, 1, 1)) for width in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_i, z, y, x) -> as many of the same shapes."""
        size = maps[0].shape[2:]
        tokens = torch.cat([into(x).flatten(2) for into, x in zip(self.into, maps, strict=True)], dim=2)
        tokens = self.layers(tokens.transpose(1, 2)).transpose(1, 2)  # (B, dim, maps * elements)
        parts = tokens.chunk(len(maps), dim=2)
        return [out(part.unflatten(2, tuple(size))) for out, part in zip(self.out, parts, strict=True)]


class PatchMerging(nn.Module):
    """Lower resolution: neighbours are stacked, normalised and projected by a separable convolution."""

    def __init__(self, style: Style, before: int, after: int, stride: Triple, kernel: Triple) -> None:
        super().__init__()
        self.stride = stride
        merged = prod(stride) * before
        self.norm = style.norm(merged)
        self.reduction = SeparableConvolution(merged, after, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, d, h, w) -> (B, after, d / stride, h / stride, w / stride)."""
        z, y, x_step = self.stride
        offsets = product(range(z), range(y), range(x_step))
        return self.reduction(self.norm(torch.cat([x[:, :, i::z, j::y, k::x_step] for i, j, k in offsets], dim=1)))


def convolution(before: int, after: int, kernel: Triple, groups: int = 1) -> nn.Conv3d:
    """A convolution without bias that keeps the size; its kernel has odd edges."""
    z, y, x = kernel
    return nn.Conv3d(before, after, kernel, padding=(z // 2, y // 2, x // 2), groups=groups, bias=False)
