"""Attention within volumes: the layers of nnFormer (Zhou et al., 2021; IEEE TIP 2023).

Local (LV-MSA, every second one shifted: SLV-MSA) inside windows, global (GV-MSA) over the whole map, and skip
attention, where the decoder's map asks and the encoder's answers. All add a learned bias per relative position.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ukbob_seg.networks.recompute import recomputed
from ukbob_seg.networks.window_attention import (
    DropPath,
    Mlp,
    Triple,
    biased_attention,
    fit_window,
    merge_windows,
    partition_windows,
    shift_mask,
)

UNSHIFTED = (0, 0, 0)


class PositionBias(nn.Module):
    """A learned number per head for each offset between two voxels; those beyond the extent share that of its edge.

    So a table serves volumes of any size, and the sharing begins where nothing was learned of. (The authors' code folds
    different offsets onto one row by a wrong stride; here each has its own.)

    Args:
        num_heads: attention heads.
        extent: voxels (z, y, x) of a volume whose offsets all differ.
    """

    def __init__(self, num_heads: int, extent: Triple) -> None:
        super().__init__()
        self.extent = extent
        z, y, x = (2 * n - 1 for n in extent)
        self.table = nn.Parameter(torch.zeros(z * y * x, num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, shape: Triple) -> Tensor:
        """Bias (heads, tokens, tokens) of a volume of this shape, tokens in the order z, y, x."""
        index = torch.zeros((1,) * 6, dtype=torch.long, device=self.table.device)
        for axis, (count, extent) in enumerate(zip(shape, self.extent, strict=True)):
            place = torch.arange(count, device=self.table.device)
            offset = (place[:, None] - place[None, :]).clamp(1 - extent, extent - 1) + extent - 1
            view = [1] * 6
            view[axis] = view[axis + 3] = count
            index = index * (2 * extent - 1) + offset.view(view)
        tokens = shape[0] * shape[1] * shape[2]
        # Not table[index]: its gradient may be summed by several threads in any order, and resuming must be exact.
        return F.embedding(index.reshape(tokens, tokens), self.table).permute(2, 0, 1)


def attend_in_volumes(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: Triple, shift: Triple) -> Tensor:
    """Multi-head attention inside each volume; voxels that a cyclic shift made neighbours do not see each other.

    Args:
        query: (B, nz, ny, nx, tokens, C); key and value alike.
        key: see query.
        value: see query.
        bias: (heads, tokens, tokens).
        window: voxels (z, y, x) of a volume.
        shift: cyclic shift that was applied, 0 where none.

    Returns:
        (B, nz, ny, nx, tokens, C).
    """
    result = torch.empty_like(query)
    heads = len(bias)
    for part, last in _alike(query.shape[1:4], shift):
        q, k, v = (_heads_apart(tensor[part], heads) for tensor in (query, key, value))
        mask = shift_mask(window, shift, last, query.device)
        mixed = biased_attention(q, k, v, bias if mask is None else bias + mask)
        result[part] = mixed.transpose(1, 2).reshape(result[part].shape)
    return result


def _alike(counts: torch.Size, shift: Triple) -> Iterator[tuple[tuple[slice, ...], tuple[bool, bool, bool]]]:
    """Groups of volumes with the same mask, at most eight, and along which axes they are the last ones."""
    axes = [
        ((slice(0, n - 1), False), (slice(n - 1, n), True)) if s else ((slice(0, n), False),)
        for n, s in zip(counts, shift, strict=True)
    ]
    for (z, last_z), (y, last_y), (x, last_x) in itertools.product(*axes):
        if all(part.stop > part.start for part in (z, y, x)):
            yield (slice(None), z, y, x), (last_z, last_y, last_x)


def _heads_apart(windows: Tensor, heads: int) -> Tensor:
    """(B, nz, ny, nx, tokens, C) -> (volumes, heads, tokens, C / heads)."""
    tokens, channels = windows.shape[-2:]
    return windows.reshape(-1, tokens, heads, channels // heads).transpose(1, 2)


class VolumeAttention(nn.Module):
    """Queries, keys and values of a map; or, over a skip connection, keys and values of the encoder's map only.

    Args:
        dim: channels.
        num_heads: attention heads.
        extent: of the position bias.
        over_skip: the map itself is the query, without a projection (the paper's skip attention).
    """

    def __init__(self, dim: int, num_heads: int, extent: Triple, over_skip: bool) -> None:
        super().__init__()
        self.bias = PositionBias(num_heads, extent)
        self.over_skip = over_skip
        self.project_in = nn.Linear(dim, (2 if over_skip else 3) * dim)
        self.project_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, source: Tensor, window: Triple, shift: Triple) -> Tensor:
        """Attend inside each volume.

        Args:
            x: (B, nz, ny, nx, tokens, C).
            source: like x, the encoder's map; x itself where not over a skip connection.
            window: voxels (z, y, x) of a volume.
            shift: cyclic shift that was applied, 0 where none.

        Returns:
            Same shape.
        """
        if self.over_skip:
            key, value = self.project_in(source).chunk(2, dim=-1)
            query = x.to(key.dtype)  # under autocast the norm before has left it in float32
        else:
            query, key, value = self.project_in(x).chunk(3, dim=-1)
        return self.project_out(attend_in_volumes(query, key, value, self.bias(window), window, shift))


class VolumeLayer(nn.Module):
    """Attention and an MLP, each after a LayerNorm and with a residual connection.

    A map that windows do not divide is padded with zeros after the norm, as in the authors' code: the padding has the
    key and value of a zero vector. An axis no longer than the window becomes one unshifted window.

    Args:
        dim: channels.
        num_heads: attention heads.
        extent: voxels (z, y, x) of a window; for a global layer those of its position bias.
        is_global: attend over the whole map, whatever its size.
        shifted: move the windows by half of their size.
        over_skip: see ``VolumeAttention``; the residual connection is the sum of both maps.
        mlp_ratio: hidden width of the MLP.
        drop_path: probability with which training leaves a branch out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        extent: Triple,
        *,
        is_global: bool = False,
        shifted: bool = False,
        over_skip: bool = False,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.window, self.is_global = extent, is_global
        z, y, x = (n // 2 for n in extent)
        self.shift = (z, y, x) if shifted and not is_global else UNSHIFTED
        self.norm1 = nn.LayerNorm(dim)
        self.attention = VolumeAttention(dim, num_heads, extent, over_skip)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, D, H, W, C), and the encoder's map of the same shape for a layer over a skip connection -> same shape."""
        normed = self.norm1(x)
        if skip is None:
            x = x + self.drop_path(self._attend(normed, normed))
        else:
            x = x + skip + self.drop_path(self._attend(normed, self.norm1(skip)))
        return x + self.drop_path(recomputed(lambda x: self.mlp(self.norm2(x)), x))

    def _attend(self, x: Tensor, source: Tensor) -> Tensor:
        _, d, h, w, _ = x.shape
        window, shift = ((d, h, w), UNSHIFTED) if self.is_global else fit_window((d, h, w), self.window, self.shift)
        volumes = _cut(x, window, shift)
        from_source = volumes if source is x else _cut(source, window, shift)
        mixed = merge_windows(self.attention(volumes, from_source, window, shift), window)
        if any(shift):
            mixed = torch.roll(mixed, shift, (1, 2, 3))
        return mixed[:, :d, :h, :w]


def _cut(x: Tensor, window: Triple, shift: Triple) -> Tensor:
    """Pad, shift and partition (B, D, H, W, C) into (B, nz, ny, nx, tokens, C)."""
    z, y, w = (-n % m for n, m in zip(x.shape[1:4], window, strict=True))
    x = F.pad(x, (0, 0, 0, w, 0, y, 0, z))
    if any(shift):
        x = torch.roll(x, [-s for s in shift], (1, 2, 3))
    return partition_windows(x, window)
