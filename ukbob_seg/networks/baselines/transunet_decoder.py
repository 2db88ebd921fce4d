"""The transformer decoder of 3D TransUNet: organ queries, refined by masked cross-attention to the U-Net's maps.

A query is a vector that stands for one output; its dot product with a vector of every voxel is the logit there. Layer
by layer the queries attend to those voxels that their present masks hold, coarse maps first (Chen et al., arXiv
2310.07781, Section III; after Cheng et al., Mask2Former, CVPR 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.baselines.transformer_blocks import as_tokens, check_heads

LEVELS = 3  # maps that the queries attend to in turn: those before the finest
GROUPS = 32
HIDDEN_FACTOR = 8
TEMPERATURE = 10_000.0


class OrganQueryDecoder(nn.Module):
    """Queries, one for each output, that end as masks.

    Args:
        channels: of the maps to attend to, coarsest first.
        finest: channels of the finest map, on which the masks lie.
        outputs: queries.
        layers: of cross-attention, self-attention and feed-forward part; layer i attends to map i modulo 3.
        dim: channels of a query, a multiple of 96.
        heads: attention heads.

    Raises:
        ConfigError: channels and heads that do not fit.
    """

    def __init__(self, channels: Sequence[int], finest: int, outputs: int, layers: int, dim: int, heads: int) -> None:
        super().__init__()
        if dim < 1 or dim % (3 * GROUPS):
            raise ConfigError(f"decoder_dim must be a multiple of {3 * GROUPS}, got {dim}")
        check_heads(dim, heads, "decoder_dim")
        used = channels[:layers]
        self.project = nn.ModuleList(nn.Sequential(nn.Conv3d(c, dim, 1), nn.GroupNorm(GROUPS, dim)) for c in used)
        self.level = nn.Parameter(torch.empty(len(used), dim))
        self.query = nn.Parameter(torch.empty(outputs, dim))
        self.query_position = nn.Parameter(torch.empty(outputs, dim))
        for parameter in (self.level, self.query, self.query_position):
            nn.init.normal_(parameter)
        self.layers = nn.ModuleList(_Layer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.embed = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.mask_features = nn.Conv3d(finest, dim, 1)

    def forward(self, maps: Sequence[Tensor], finest: Tensor, every: bool = False) -> list[Tensor]:
        """The masks of the queries.

        Args:
            maps: (B, C_i, d, h, w) to attend to, coarsest first.
            finest: (B, C, z, y, x).
            every: return the masks before each layer too, with gradients.

        Returns:
            (B, outputs, z, y, x) logits after the last layer; with ``every``, then those before it, and so on back to
            the masks of the queries as they are learned.
        """
        memories = [project(x) for project, x in zip(self.project, maps, strict=False)]  # fewer layers than maps
        queries = self.query.expand(len(finest), -1, -1)
        masks = []
        for i, layer in enumerate(self.layers):
            level = i % len(memories)
            mask = self.masks(queries, finest) if every else self.masks(queries.detach(), finest.detach()).detach()
            masks.append(mask)
            memory = memories[level]
            value = as_tokens(memory) + self.level[level]
            key = value + position_code(memory.shape[2:], memory.shape[1], memory.device)
            blocked = outside(mask, memory.shape[2:])
            queries = layer(queries, self.query_position, key, value, blocked)
        final = self.masks(queries, finest)
        return [final, *masks[::-1]] if every else [final]

    def masks(self, queries: Tensor, finest: Tensor) -> Tensor:
        """(B, outputs, dim) and (B, C, z, y, x) -> (B, outputs, z, y, x), the products of embedded queries and voxels.

        E (W f + b) is computed as (E W) f + E b, so that no map of ``dim`` channels at full resolution is made.
        """
        embedded = self.embed(self.norm(queries))
        bias = self.mask_features.bias
        assert bias is not None
        weight = embedded @ self.mask_features.weight.flatten(1)  # (B, outputs, C)
        products = torch.einsum("bqc,bczyx->bqzyx", weight, finest)
        return products + (embedded @ bias.to(embedded.dtype))[:, :, None, None, None]


class _Layer(nn.Module):
    """Masked cross-attention, self-attention and feed-forward part, each with a residual connection and then a norm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.cross_attention, self.norm1 = _Attention(dim, heads), nn.LayerNorm(dim)
        self.self_attention, self.norm2 = _Attention(dim, heads), nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, HIDDEN_FACTOR * dim), nn.Linear(HIDDEN_FACTOR * dim, dim)
        self.norm3 = nn.LayerNorm(dim)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, queries: Tensor, position: Tensor, key: Tensor, value: Tensor, blocked: Tensor) -> Tensor:
        """(B, Q, dim), positions (Q, dim), keys and values (B, N, dim), (B, Q, N) bool -> (B, Q, dim)."""
        queries = self.norm1(queries + self.cross_attention(queries + position, key, value, blocked))
        placed = queries + position
        queries = self.norm2(queries + self.self_attention(placed, placed, queries))
        return self.norm3(queries + self.linear2(F.relu(self.linear1(queries))))


class _Attention(nn.Module):
    """Multi-head attention of queries to other tokens. A bias of the keys would change no weight, so there is none."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None) -> Tensor:
        """(B, Q, dim), twice (B, N, dim), and (B, Q, N) bool where a query must not look -> (B, Q, dim)."""
        allowed = None if blocked is None else ~blocked.unsqueeze(1)
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(query)), self._split(self.key(key)), self._split(self.value(value)), allowed
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, N, dim) -> (B, heads, N, dim / heads)."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


@torch.no_grad()
def outside(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Which voxels of a coarser map a query must not look at: those out of its mask, or none where it holds none.

    Args:
        mask: (B, Q, z, y, x) logits.
        shape: of the coarser map.

    Returns:
        (B, Q, voxels) bool.
    """
    blocked = F.interpolate(mask, size=tuple(shape), mode="trilinear", align_corners=False).flatten(2) < 0
    return blocked & ~blocked.all(dim=2, keepdim=True)


def position_code(shape: Sequence[int], dim: int, device: torch.device) -> Tensor:
    """Sines and cosines of the place of every voxel, a third of the channels for each axis.

    Places run to 2 pi along an axis; channels 2i and 2i + 1 are sine and cosine at 10000^(-2i / third).

    Args:
        shape: of the map (d, h, w).
        dim: channels, a multiple of 6.
        device: where the code is needed.

    Returns:
        (d h w, dim) float32.
    """
    third = dim // 3
    rates = TEMPERATURE ** (-torch.arange(0, third, 2, device=device, dtype=torch.float32) / third)
    codes = []
    for axis, n in enumerate(shape):
        angles = torch.arange(1, n + 1, device=device).unsqueeze(1) * (2 * math.pi / n) * rates  # (n, third / 2)
        code = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)  # (n, third)
        view = [1, 1, 1, third]
        view[axis] = n
        codes.append(code.view(view).expand(*shape, third))
    return torch.cat(codes, dim=3).flatten(0, 2)
