"""Shifted-window self-attention in 3D (Liu et al., Swin Transformer, ICCV 2021; Tang et al., Swin UNETR, CVPR 2022).

Numbers and parameter names are those of MONAI's ``SwinUNETR``, so that its checkpoints load unchanged.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ukbob_seg.networks.recompute import recomputed

Triple = tuple[int, int, int]
OUT_OF_REGION = -100.0  # added to the attention between voxels that the cyclic shift made neighbours
BACKWARD_SCORES = 2_000_000  # attention scores recomputed at a time, so that they stay in the processor's cache


def partition_windows(x: Tensor, window: Triple) -> Tensor:
    """(B, D, H, W, C) -> (B, windows z, y, x, tokens, C); D, H, W are multiples of the window."""
    b, d, h, w, c = x.shape
    x = x.view(b, d // window[0], window[0], h // window[1], window[1], w // window[2], window[2], c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, d // window[0], h // window[1], w // window[2], -1, c)


def merge_windows(windows: Tensor, window: Triple) -> Tensor:
    """Inverse of ``partition_windows``."""
    b, nd, nh, nw, _, c = windows.shape
    x = windows.view(b, nd, nh, nw, *window, c)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, nd * window[0], nh * window[1], nw * window[2], c)


def fit_window(size: Triple, window: Triple, shift: Triple) -> tuple[Triple, Triple]:
    """Window and shift for a feature map: an axis no longer than the window becomes one unshifted window."""
    fits = [n <= w for n, w in zip(size, window, strict=True)]
    z, y, x = (n if small else w for n, w, small in zip(size, window, fits, strict=True))
    dz, dy, dx = (0 if small else s for s, small in zip(shift, fits, strict=True))
    return (z, y, x), (dz, dy, dx)


def shift_mask(window: Triple, shift: Triple, last: tuple[bool, bool, bool], device: torch.device) -> Tensor | None:
    """Additive mask (tokens, tokens) of windows that hold voxels from both ends of the map; None where none do.

    Only the last window along a shifted axis does, so a map has at most eight different masks, whatever its size.

    Args:
        window: voxels per window.
        shift: cyclic shift.
        last: whether the window is the last one along each axis.
        device: where the mask is needed.
    """
    if not any(s > 0 and end for s, end in zip(shift, last, strict=True)):
        return None
    make = _shift_mask if torch.compiler.is_compiling() else _stored_mask  # no cache inside a compiled graph
    return make(window, shift, last, device)


def _shift_mask(window: Triple, shift: Triple, last: tuple[bool, bool, bool], device: torch.device) -> Tensor:
    region = torch.zeros(window, dtype=torch.long)
    for axis in range(3):
        if shift[axis] and last[axis]:
            wrapped = (torch.arange(window[axis]) >= window[axis] - shift[axis]).long()
            view = [1, 1, 1]
            view[axis] = -1
            region = region * 2 + wrapped.view(view)
    flat = region.flatten()
    apart = flat[:, None] != flat[None, :]
    return torch.zeros(apart.shape, device=device).masked_fill(apart.to(device), OUT_OF_REGION)


_stored_mask = functools.lru_cache(maxsize=64)(_shift_mask)


# An operator of its own, since a compiler would write out the loop, some hundred times for a large patch.
@torch.library.custom_op("ukbob_seg::attention_gradients", mutates_args=())
def _attention_gradients(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, output: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias of ``_BiasedAttention``, a few windows at a time."""
    scale = query.shape[-1] ** -0.5
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    grad_bias = torch.zeros_like(bias)
    along = (gradient * output).sum(-1, keepdim=True)  # equals sum_j p_ij (dL/dp)_ij
    step = max(1, BACKWARD_SCORES // bias.numel())
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        q, k, v, g = query[part], key[part], value[part], gradient[part]
        weights = torch.matmul(q * scale, k.transpose(-2, -1)).add_(bias).softmax(-1)
        grads[2][part] = torch.matmul(weights.transpose(-2, -1), g)
        scores = torch.matmul(g, v.transpose(-2, -1)).sub_(along[part]).mul_(weights)
        grad_bias += scores.sum(0)
        grads[0][part] = torch.matmul(scores, k).mul_(scale)
        grads[1][part] = torch.matmul(scores.transpose(-2, -1), q).mul_(scale)
    return *grads, grad_bias


@_attention_gradients.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, output: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), torch.empty_like(bias)


class _BiasedAttention(torch.autograd.Function):
    """Attention with a learned additive bias that stores no attention matrix: the backward pass recomputes it.

    The fused CPU kernel has no gradient for the bias, so torch would fall back to storing windows x heads x tokens^2
    values for each block: more than everything else a small network stores. CUDA's fused kernel does not need this.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """(W, heads, tokens, channels) three times and (heads, tokens, tokens) -> (W, heads, tokens, channels)."""
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.unsqueeze(0))
        ctx.save_for_backward(query, key, value, bias, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the four inputs."""
        query_gradient, key_gradient, value_gradient, bias_gradient = _attention_gradients(*ctx.saved_tensors, gradient)
        return query_gradient, key_gradient, value_gradient, bias_gradient


def biased_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention with an additive bias, by the cheapest way that gives the gradients needed.

    Args:
        query: (W, heads, tokens, channels); key and value alike.
        key: see query.
        value: see query.
        bias: (heads, tokens, tokens), the same for all W windows.

    Returns:
        (W, heads, tokens, channels).
    """
    if torch.is_grad_enabled() and bias.requires_grad and bias.device.type == "cpu":
        return _BiasedAttention.apply(query, key, value, bias.to(query.dtype))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.unsqueeze(0).to(query.dtype))


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias per relative position.

    Args:
        dim: channels.
        num_heads: attention heads.
        window: voxels (z, y, x) of a full window.
        qkv_bias: learn a bias of query, key and value.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: Triple, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        spans = [2 * n - 1 for n in window]
        self.relative_position_bias_table = nn.Parameter(torch.zeros(spans[0] * spans[1] * spans[2], num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in window), indexing="ij")).flatten(1)
        offset = grid[:, :, None] - grid[:, None, :] + torch.tensor(window)[:, None, None] - 1
        index = (offset[0] * spans[1] + offset[1]) * spans[2] + offset[2]
        self.register_buffer("relative_position_index", index)  # in the state dict because MONAI's has it
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def position_bias(self, tokens: int) -> Tensor:
        """(heads, tokens, tokens) bias.

        A window that was cut to a small feature map has fewer tokens; MONAI then takes the flat prefix of the index
        (not the positions of the smaller window), and every published checkpoint was trained so.
        """
        index = self.relative_position_index[:tokens, :tokens]
        # Not table[index]: its gradient may be summed by several threads in any order, and resuming must be exact.
        return F.embedding(index, self.relative_position_bias_table).permute(2, 0, 1)

    def forward(self, windows: Tensor, window: Triple, shift: Triple) -> Tensor:
        """Attend inside each window.

        Args:
            windows: (B, nz, ny, nx, tokens, C).
            window: voxels per window here.
            shift: cyclic shift that was applied, 0 where none.

        Returns:
            Same shape.
        """
        tokens = windows.shape[4]
        bias = self.position_bias(tokens)
        if not any(shift):
            return self._attend(windows, bias)
        result = torch.empty_like(windows)
        counts = windows.shape[1:4]
        parts = [
            ((slice(0, n - 1), False), (slice(n - 1, n), True)) if s else ((slice(0, n), False),)
            for n, s in zip(counts, shift, strict=True)
        ]
        for (z, last_z), (y, last_y), (x, last_x) in itertools.product(*parts):
            group = windows[:, z, y, x]
            if group.numel():
                mask = shift_mask(window, shift, (last_z, last_y, last_x), windows.device)
                result[:, z, y, x] = self._attend(group, bias if mask is None else bias + mask)
        return result

    def _attend(self, windows: Tensor, bias: Tensor) -> Tensor:
        b, nz, ny, nx, tokens, c = windows.shape
        qkv = self.qkv(windows).view(-1, tokens, 3, self.num_heads, c // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (windows, heads, tokens, channels of a head)
        mixed = biased_attention(query, key, value, bias)
        return self.proj(mixed.transpose(1, 2).reshape(b, nz, ny, nx, tokens, c))


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.linear2(F.gelu(self.linear1(x)))


class DropPath(nn.Module):
    """Drop a residual branch for whole samples while training (Huang et al., stochastic depth, 2016)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Identity in evaluation mode."""
        if not self.training or self.probability == 0:
            return x
        keep = x.new_empty((x.shape[0], *[1] * (x.dim() - 1))).bernoulli_(1 - self.probability)
        return x * keep / (1 - self.probability)


class SwinBlock(nn.Module):
    """Window attention and an MLP, each after a LayerNorm and with a residual connection."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Triple,
        shift: Triple,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window, qkv_bias)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> same shape."""
        x = x + self.drop_path(self._attend(self.norm1(x)))
        return x + self.drop_path(recomputed(lambda x: self.mlp(self.norm2(x)), x))

    def _attend(self, x: Tensor) -> Tensor:
        _, d, h, w, _ = x.shape
        window, shift = fit_window((d, h, w), self.window, self.shift)
        pads = [(-n) % m for n, m in zip((d, h, w), window, strict=True)]
        x = F.pad(x, (0, 0, 0, pads[2], 0, pads[1], 0, pads[0]))
        if any(shift):
            x = torch.roll(x, [-s for s in shift], (1, 2, 3))
        x = merge_windows(self.attn(partition_windows(x, window), window, shift), window)
        if any(shift):
            x = torch.roll(x, shift, (1, 2, 3))
        return x[:, :d, :h, :w]


# Which of the eight neighbours (z, y, x offsets) are stacked. Before its fix #8285 MONAI stacked two of them twice and
# left two out; the paper's and the self-supervised checkpoints were trained so.
MERGING_ORDERS: dict[str, tuple[Triple, ...]] = {
    "distinct": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "legacy": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
}


class PatchMerging(nn.Module):
    """Halve the resolution: stack eight neighbours, normalise, project to twice the channels."""

    def __init__(self, dim: int, order: str = "distinct") -> None:
        super().__init__()
        self.offsets = MERGING_ORDERS[order]
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(8 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> (B, ceil(D/2), ceil(H/2), ceil(W/2), 2C)."""
        _, d, h, w, _ = x.shape
        if d % 2 or h % 2 or w % 2:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
        stacked = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.offsets], dim=-1)
        return self.reduction(self.norm(stacked))


class SwinStage(nn.Module):
    """Blocks with and without shift in turn, then patch merging."""

    def __init__(self, blocks: list[SwinBlock], downsample: PatchMerging, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> (B, D/2, H/2, W/2, 2C)."""
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.downsample(x)
