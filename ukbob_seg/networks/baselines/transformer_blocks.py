"""What the transformer baselines share: tokens with positions, pre-norm encoder layers, and checks of arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError

Triple = tuple[int, int, int]


class PositionEmbedding(nn.Module):
    """A learned vector per token of a grid; for windows of another size it is interpolated trilinearly.

    Args:
        dim: channels of a token.
        grid: tokens (z, y, x) of the window that the network is trained with.
    """

    def __init__(self, dim: int, grid: Triple) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(torch.zeros(1, dim, *grid))

    def forward(self, grid: Sequence[int]) -> Tensor:
        """(1, tokens, dim) for a window of so many tokens (z, y, x)."""
        weight: Tensor = self.weight
        if tuple(grid) != self.grid:
            weight = F.interpolate(weight, size=tuple(grid), mode="trilinear", align_corners=False)
        return weight.flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention of all tokens to all (Vaswani et al., NeurIPS 2017, Eq. 1).

    Args:
        dim: channels, divisible by the heads.
        heads: attention heads.
        bias: learn a bias of query, key and value.
        dropout: of the attention weights.
        output_dropout: of the result.
    """

    def __init__(self, dim: int, heads: int, bias: bool, dropout: float = 0.0, output_dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.output_dropout = nn.Dropout(output_dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)  # (B, heads, N, dim / heads)
        return self.output_dropout(self.proj(mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Two linear layers with GELU between, and dropout after each.

    Args:
        dim: channels.
        hidden: channels between the layers.
        dropout: of either output.
    """

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        return self.dropout(self.linear2(self.dropout(F.gelu(self.linear1(tokens)))))


class EncoderLayer(nn.Module):
    """Attention and a feed-forward part, each after a LayerNorm and with a residual connection.

    Args:
        attention: of tokens (B, N, dim).
        feed_forward: of tokens (B, N, dim).
        dim: channels.
        eps: of the LayerNorms.
    """

    def __init__(self, attention: SelfAttention, feed_forward: FeedForward, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.feed_forward = feed_forward

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.feed_forward(self.norm2(tokens))


def as_tokens(features: Tensor) -> Tensor:
    """(B, C, d, h, w) -> (B, d h w, C)."""
    return features.flatten(2).transpose(1, 2)


def as_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, d h w, C) -> (B, C, d, h, w), contiguous."""
    return tokens.transpose(1, 2).unflatten(2, tuple(grid)).contiguous()


def token_grid(network: str, patch_size: Sequence[int], divisor: Triple) -> Triple:
    """Tokens (z, y, x) of a patch.

    Raises:
        ConfigError: the patch is no three voxel counts that the divisor divides.
    """
    z, y, x = triple("patch_size", patch_size)
    if z % divisor[0] or y % divisor[1] or x % divisor[2]:
        raise ConfigError(f"{network} needs a patch_size (z, y, x) divisible by {divisor}, got {(z, y, x)}")
    return z // divisor[0], y // divisor[1], x // divisor[2]


def triple(name: str, value: int | Sequence[int]) -> Triple:
    """Three whole numbers of at least 1 (z, y, x); a single one stands for all three.

    Raises:
        ConfigError: anything else.
    """
    values = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(values) != 3 or any(not isinstance(n, int) or n < 1 for n in values):
        raise ConfigError(f"{name} must be three whole numbers of at least 1 (z, y, x), got {value!r}")
    return values[0], values[1], values[2]


def check_heads(dim: int, heads: int, name: str) -> None:
    """Raises ConfigError unless the heads divide the channels that are called ``name``."""
    if heads < 1 or dim < 1 or dim % heads:
        raise ConfigError(f"{name} must be a multiple of its attention heads, got {dim} and {heads}")


def check_rates(**rates: float) -> None:
    """Raises ConfigError unless dropout rates are in [0, 1)."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ConfigError(f"{name} must be in [0, 1), got {rate}")


def check_input(network: str, shape: Sequence[int], in_channels: int, divisor: Triple) -> None:
    """Refuse an input that would fail deep inside a network.

    Raises:
        ConfigError: the input is not (B, in_channels, z, y, x), an edge is not divisible, or a single voxel would be
            left at the bottleneck, which has no statistics.
    """
    if len(shape) != 5 or shape[1] != in_channels:
        raise ConfigError(f"{network} takes (batch, {in_channels}, z, y, x), got an input of {tuple(shape)}")
    edges = tuple(shape[2:])
    if any(n % d for n, d in zip(edges, divisor, strict=True)):
        raise ConfigError(f"{network} needs edges divisible by {divisor}, got an input of {edges}")
    if edges == divisor:
        raise ConfigError(
            f"an input of {edges} leaves {network} one voxel at the bottleneck, which cannot be normalised; use twice "
            "as many voxels along one axis at least"
        )
