"""The parts that work on spectra: MedSegDiff v1's FF-Parser, v2's NBP-Filter and spectrum-space attention.

Spectra are complex float32 whatever the precision around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AXES = (-3, -2, -1)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Without autocast on the tensor's device: there are no half spectra."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda") else nullcontext()


class FFParser(nn.Module):
    """Feature Frequency Parser: weighs the frequencies of a map by a learned table (Wu et al., MIDL 2023).

    m' = F^-1[A * F[m]], with the 3D Fourier transform F over space and a complex weight A for each channel and
    frequency, of which the half that a real map needs is held. A begins as 1: nothing is filtered.

    The table is of one size. Maps of another size get it interpolated between frequencies in cycles per voxel.

    Args:
        channels: of the map.
        size: (z, y, x) of the maps that the table is made for.
    """

    def __init__(self, channels: int, size: Sequence[int]) -> None:
        super().__init__()
        z, y, x = size
        weight = torch.zeros(channels, z, y, x // 2 + 1, 2)
        weight[..., 0] = 1
        self.weight = nn.Parameter(weight)  # real and imaginary part last
        self.size = (z, y, x)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, z, y, x) -> the same, in the input's precision."""
        shape = tuple(features.shape[2:])
        with full_precision(features):
            spectrum = torch.fft.rfftn(features.float(), dim=AXES, norm="ortho")
            weight = self.weight.float() if shape == self.size else self._resampled(shape)
            spectrum = spectrum * torch.view_as_complex(weight.contiguous())
            return torch.fft.irfftn(spectrum, s=shape, dim=AXES, norm="ortho").to(features.dtype)

    def _resampled(self, shape: tuple[int, ...]) -> Tensor:
        """(C, z, y, x // 2 + 1, 2) for maps of another size; frequencies beyond the table take its last weights."""
        z, y, x = self.size
        device = self.weight.device
        # Ascending frequencies: index n // 2 is frequency 0 along z and y, index 0 along x.
        table = torch.fft.fftshift(self.weight.float(), dim=(1, 2)).permute(0, 4, 1, 2, 3)  # (C, 2, z, y, x // 2 + 1)
        places = [
            torch.fft.fftfreq(shape[0], device=device) * z + z // 2,
            torch.fft.fftfreq(shape[1], device=device) * y + y // 2,
            torch.fft.rfftfreq(shape[2], device=device) * x,
        ]
        scaled = [2 * p / max(1, n - 1) - 1 for p, n in zip(places, table.shape[2:], strict=True)]
        grid = torch.stack(torch.meshgrid(*scaled, indexing="ij")[::-1], dim=-1)  # (z, y, x // 2 + 1, 3), x first
        found = F.grid_sample(
            table.flatten(0, 1).unsqueeze(0), grid.unsqueeze(0), padding_mode="border", align_corners=True
        )
        return found[0].unflatten(0, (-1, 2)).movedim(1, -1)


def frequency_pairs(shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Coordinates of every pair of frequencies of a grid, in cycles per voxel.

    Args:
        shape: (z, y, x) of the grid, N points in all.
        device: of the result.

    Returns:
        (N, N, 6): (z, y, x) frequency of the query's row, then of the key's column.
    """
    axes = [torch.fft.fftfreq(n, device=device) for n in shape]
    single = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)  # (N, 3)
    count = len(single)
    return torch.cat([single[:, None].expand(-1, count, -1), single[None].expand(count, -1, -1)], dim=-1)


class NeuralBandPassFilter(nn.Module):
    """NBP-Filter: which frequencies pass is a learned function of their position and of the time (v2, Fig. 1c).

    Blocks of a pointwise convolution, LayerNorm, a scale and a shift that the time gives, and SiLU; then a sigmoid.
    [open] The affinity map's positions are pairs of 3D frequencies here, for which neighbours along a row are none in
    space: convolutions have no extent. The last bias begins as 2, so that most passes at first.

    Args:
        time: channels of the time's embedding.
        width: of the blocks.
        blocks: of them.
    """

    def __init__(self, time: int, width: int, blocks: int) -> None:
        super().__init__()
        self.project = nn.Linear(6, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.modulation = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * width)) for _ in range(blocks))
        self.gate = nn.Linear(width, 1)
        nn.init.constant_(self.gate.bias, 2.0)

    def forward(self, positions: Tensor, embedding: Tensor) -> Tensor:
        """Positions (N, N, 6) and the time's embedding (B, C) -> (B, N, N) in (0, 1)."""
        x = self.project(positions).unsqueeze(0)
        for layer, norm, modulation in zip(self.layers, self.norms, self.modulation, strict=True):
            scale, shift = modulation(embedding)[:, None, None].chunk(2, dim=-1)
            x = F.silu(norm(layer(x)) * (1 + scale) + shift)
        passed: Tensor = self.gate(x).squeeze(-1).sigmoid()
        return passed


class SpectrumAttention(nn.Module):
    """Cross-attention whose affinity is weighed in the Fourier domain, and an MLP (v2, the SS-Former).

    M = F(q W_q) F(k W_k)^T over the frequencies of query and key, M' = NBP(M), and the result F^-1(M') (k W_v): the
    inverse transform runs over the query's and over the key's positions. With a filter that passes everything this is
    (q W_q) (k W_k)^T (k W_v), attention without softmax. The real part is taken, which makes the filter symmetric.
    [open] W_q and W_k are real, so that it does not matter on which side of F they are; the sum is divided by
    sqrt(channels) and by the number of positions, as no softmax bounds it. Query and key are normalised before, and
    both the attention and the MLP are added to the query, as in every vision transformer.

    Args:
        channels: of query and key.
        time: channels of the time's embedding.
        filter_width: of the filter's blocks.
        filter_blocks: number of them.
    """

    def __init__(self, channels: int, time: int, filter_width: int, filter_blocks: int) -> None:
        super().__init__()
        self.norm_query, self.norm_key, self.norm_mlp = (nn.LayerNorm(channels) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.filter = NeuralBandPassFilter(time, filter_width, filter_blocks)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, query: Tensor, key: Tensor, embedding: Tensor, shape: Sequence[int]) -> Tensor:
        """Query and key (B, N, C), N points of a grid (z, y, x) -> the query with what it found (B, N, C)."""
        with full_precision(query):
            query, key = query.float(), key.float()
            query = query + self.attended(self.norm_query(query), self.norm_key(key), embedding.float(), shape)
            result: Tensor = query + self.mlp(self.norm_mlp(query))
        return result

    def attended(self, query: Tensor, key: Tensor, embedding: Tensor, shape: Sequence[int]) -> Tensor:
        """The attention alone: normalised query and key (B, N, C) -> (B, N, C)."""
        count = query.shape[1]
        spectra = [_over_space(torch.fft.fftn, part, shape, 1) for part in (self.query(query), self.key(key))]
        affinity = spectra[0] @ spectra[1].transpose(1, 2)  # (B, N, N), complex
        affinity = affinity * self.filter(frequency_pairs(shape, query.device), embedding)
        weights = _over_space(torch.fft.ifftn, _over_space(torch.fft.ifftn, affinity, shape, 1), shape, 2).real
        found: Tensor = weights @ self.value(key) / (query.shape[2] ** 0.5 * count)
        return found


def _over_space(transform: Callable[..., Tensor], x: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Fourier transform over the points of a grid (z, y, x), which lie along one axis of a tensor (B, ., .)."""
    spread = x.unflatten(axis, tuple(shape))
    return transform(spread, dim=(axis, axis + 1, axis + 2), norm="ortho").flatten(axis, axis + 2)


class SSFormerBlock(nn.Module):
    """Two symmetric attentions: the condition reads the noise embedding, then the noise embedding reads the condition.

    Args:
        channels: of both embeddings.
        time: channels of the time's embedding.
        filter_width: of the filters' blocks.
        filter_blocks: number of them.
    """

    def __init__(self, channels: int, time: int, filter_width: int, filter_blocks: int) -> None:
        super().__init__()
        self.to_condition = SpectrumAttention(channels, time, filter_width, filter_blocks)
        self.to_noise = SpectrumAttention(channels, time, filter_width, filter_blocks)

    def forward(
        self, noise: Tensor, condition: Tensor, embedding: Tensor, shape: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Both embeddings (B, N, C) -> both, changed."""
        condition = self.to_condition(condition, noise, embedding, shape)
        return self.to_noise(noise, condition, embedding, shape), condition


class SSFormer(nn.Module):
    """Spectrum-Space Transformer: the noise embedding, informed by the condition's (v2, Fig. 1b).

    Args:
        channels: of both embeddings.
        time: channels of the time's embedding.
        blocks: number of blocks.
        filter_width: of the filters' blocks.
        filter_blocks: number of them.
    """

    def __init__(self, channels: int, time: int, blocks: int, filter_width: int, filter_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SSFormerBlock(channels, time, filter_width, filter_blocks) for _ in range(blocks))
        self.from_noise, self.from_condition = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, noise: Tensor, condition: Tensor, embedding: Tensor) -> Tensor:
        """Both embeddings (B, C, z, y, x), every voxel of which is a token -> (B, C, z, y, x)."""
        shape = noise.shape[2:]
        tokens = self.from_noise(noise.flatten(2).transpose(1, 2))  # (B, N, C)
        semantic = self.from_condition(condition.flatten(2).transpose(1, 2))
        for block in self.blocks:
            tokens, semantic = block(tokens, semantic, embedding, shape)
        return tokens.transpose(1, 2).unflatten(2, shape).to(noise.dtype)
