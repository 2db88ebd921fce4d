"""Linear filters that work on one axis after another, each a matrix: exact, and fast on every device.

A 96^3 volume and three 96 x 96 matrices are 0.5 billion multiplications in the best-tuned routine that a machine has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def along_axes(volume: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Multiply each axis of a volume by a matrix.

    Args:
        volume: (..., n_z, n_y, n_x) float.
        matrices: for z, y and x one (m, n) matrix, or None to leave the axis as it is.

    Returns:
        (..., m_z, m_y, m_x), same type and device.
    """
    for axis, matrix in zip((-3, -2, -1), matrices, strict=True):
        if matrix is None:
            continue
        weights = matrix.to(volume)
        if axis == -1:
            volume = volume @ weights.T
        elif axis == -2:
            volume = weights @ volume
        else:
            flat = weights @ volume.flatten(-2)
            volume = flat.unflatten(-1, volume.shape[-2:])
    return volume


def blur_matrix(size: int, sigma: float) -> Tensor:
    """(size, size): a Gaussian of ``sigma`` voxels cut off at 3 sigma (rounded up); the edge voxel goes on for ever."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weights /= weights.sum()
    sources = (torch.arange(size)[:, None] + offsets).clamp(0, size - 1)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, sources, weights.expand(size, -1))


def low_resolution_matrix(size: int, scale: float) -> Tensor:
    """(size, size): keep the nearest of every 1 / scale voxels, then interpolate linearly between those."""
    kept = max(1, round(size * scale))
    nearest = ((torch.arange(kept) + 0.5) * size / kept).floor().long()
    position = ((torch.arange(size, dtype=torch.float64) + 0.5) * kept / size - 0.5).clamp(0, kept - 1)
    low = position.floor().long()
    high, share = (low + 1).clamp(max=kept - 1), position - low
    matrix = torch.zeros(size, size, dtype=torch.float64)
    rows = torch.arange(size)
    matrix.index_put_((rows, nearest[low]), 1 - share, accumulate=True)
    matrix.index_put_((rows, nearest[high]), share, accumulate=True)
    return matrix


def spline_matrix(size: int, nodes: int, spans: float | None = None) -> Tensor:
    """(size, nodes): a uniform cubic B-spline over an axis, from its control values at ``nodes`` >= 4 points.

    The axis is ``spans`` node distances long, at most (and by default) ``nodes - 3``. A single node is a constant.
    """
    if nodes == 1:
        return torch.ones(size, 1, dtype=torch.float64)
    position = (torch.arange(size, dtype=torch.float64) + 0.5) / size * (spans or nodes - 3)
    first = position.floor().clamp(max=nodes - 4)
    t = position - first
    basis = torch.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], dim=1) / 6
    columns = first.long()[:, None] + torch.arange(4)
    return torch.zeros(size, nodes, dtype=torch.float64).scatter_(1, columns, basis)


def truncation_matrix(size: int, share: float) -> Tensor:
    """(size, size): the Fourier transform of the mirrored axis, without frequencies above ``share`` of the highest.

    The axis is continued by its mirror image, so that its ends, where a patch was cut out, do not ring.
    """
    frequencies = torch.arange(size, dtype=torch.float64)
    angles = math.pi / size * (torch.arange(size, dtype=torch.float64) + 0.5)
    waves = torch.cos(frequencies[:, None] * angles) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    kept = waves[frequencies <= share * (size - 1)]
    return kept.T @ kept


def ghost_matrix(size: int, ghosts: int, intensity: float) -> Tensor:
    """(size, size): every ``ghosts``-th line of the Fourier transform, but the mean, times ``1 - intensity``."""
    lines = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64).round().abs()
    gain = torch.where((lines % ghosts == 0) & (lines > 0), 1 - intensity, 1.0).to(torch.float64)
    response = torch.fft.ifft(gain).real
    steps = torch.arange(size)
    return response[(steps[:, None] - steps) % size]
