"""The functions of ``resampling.py`` for torch tensors on any device, so that logits need not leave the GPU.

They follow the same taps and do the same arithmetic in the same order: labels and decisions equal those of the
compiled kernels voxel for voxel, images up to the rounding of float32 sums. Output planes are made in slabs, classes
one at a time: beyond input and result, memory is a few slabs.

The only module of this folder that needs torch; nothing else in it imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ukbob_seg.preprocessing.resampling_taps import (
    ImageOptions,
    LinearTaps,
    PlaneRange,
    Shape,
    SplineTaps,
    checked_shape,
    image_taps,
    plane_taps,
    voting_taps,
)

SLAB_VOXELS = 1 << 22  # output voxels of one class or image that are made together: 16 MiB of float32
VOTE_VOXELS = 1 << 19  # output voxels whose eight corners are held together
WIDER = {torch.bool: torch.uint8, torch.uint16: torch.int32, torch.uint32: torch.int64}  # types torch cannot compare


def resample_image(
    image: Tensor,
    new_shape: Shape,
    order: int = 3,
    coarse_axis: int | None = None,
    coarse_order: int = 0,
    anti_alias: bool = False,
) -> Tensor:
    """Resample every channel by spline interpolation; as ``resampling.resample_image``.

    Args:
        image: (C, Z, Y, X), any real type, device and strides.
        new_shape: voxels (z, y, x) wanted.
        order: spline order, 0 (nearest) to 5.
        coarse_axis: axis that is interpolated by ``coarse_order`` instead.
        coarse_order: along that axis, 0 (nearest voxels) or 1 (linear).
        anti_alias: blur axes that shrink first.

    Returns:
        (C, *new_shape) float32 on the same device, never a view of ``image``.

    Raises:
        ValueError: not four axes, or a shape, order or axis that cannot be.
    """
    passes = image_taps(image.shape[1:], new_shape, ImageOptions(order, coarse_axis, coarse_order, anti_alias))
    result = image.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    for axis, taps in passes:
        result = _filter_axis(result, taps, axis + 1)
    return result


def resample_labels(labels: Tensor, new_shape: Shape, nearest_axis: int | None = None) -> Tensor:
    """Resample a label map by the votes of eight neighbours; as ``resampling.resample_labels``, in whole numbers.

    Args:
        labels: (Z, Y, X), any integer type but uint64, any device and strides.
        new_shape: voxels (z, y, x) wanted.
        nearest_axis: axis along which only the nearest voxel counts.

    Returns:
        ``new_shape`` tensor of the same type on the same device, never a view. Equal votes go to the label of the
        nearest voxel, then to the lower value.

    Raises:
        ValueError: no whole numbers, not three axes, or a shape or axis that cannot be.
    """
    shape = checked_shape(labels.shape, new_shape, nearest_axis)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.uint64:
        raise ValueError(f"labels must be whole numbers of at most 63 bits, got {labels.dtype}")
    result = torch.empty(shape, dtype=labels.dtype, device=labels.device)
    if labels.shape == shape:
        return result.copy_(labels)
    source = labels.to(WIDER.get(labels.dtype, labels.dtype))
    z, y, x = (_Votes.of(taps, labels.device) for taps in voting_taps(labels.shape, shape, nearest_axis))
    for start, stop in _slabs(shape, VOTE_VOXELS):
        result[start:stop] = _vote(source, z.part_of(start, stop), y, x)
    return result


def logits_to_indices(
    logits: Tensor, new_shape: Shape, coarse_axis: int | None = None, planes: PlaneRange | None = None
) -> Tensor:
    """Interpolate class logits linearly and take the most probable class; as ``resampling.logits_to_indices``.

    Args:
        logits: (K, Z, Y, X) floating point, any device and strides.
        new_shape: voxels (z, y, x) of the whole new volume.
        coarse_axis: axis along which only the nearest voxel counts.
        planes: which new planes to make, where ``logits`` are some rows of the volume; None for all from all.

    Returns:
        (planes, Y', X') class indices on the same device, uint8 (uint16 past 256 classes); equal logits go to the lower
        class.

    Raises:
        ValueError: not four axes, no class, or planes, a shape or an axis that cannot be.
    """
    kind = torch.uint8 if len(logits) <= 256 else torch.uint16
    return _decide(_best_class, logits, new_shape, coarse_axis, kind, planes)


def logits_to_regions(
    logits: Tensor, new_shape: Shape, coarse_axis: int | None = None, planes: PlaneRange | None = None
) -> Tensor:
    """Interpolate region logits linearly and take the last region with a positive one.

    Args:
        logits: (R, Z, Y, X) floating point, any device and strides.
        new_shape: voxels (z, y, x) of the whole new volume.
        coarse_axis: axis along which only the nearest voxel counts.
        planes: which new planes to make, where ``logits`` are some rows of the volume; None for all from all.

    Returns:
        (planes, Y', X') on the same device: 0 where no region is positive, else 1 + the index of the last positive
        region; uint8 (uint16 past 255 regions).

    Raises:
        ValueError: not four axes, no region, or planes, a shape or an axis that cannot be.
    """
    kind = torch.uint8 if len(logits) < 256 else torch.uint16
    return _decide(_last_positive, logits, new_shape, coarse_axis, kind, planes)


@torch.no_grad()
def resample_logits_planes(
    logits: Tensor, new_shape: Shape, planes: PlaneRange, coarse_axis: int | None = None
) -> Tensor:
    """The interpolated logits of some planes, the very numbers that ``logits_to_indices`` compares.

    Args:
        logits: (K, Z, Y, X) floating point, any device and strides.
        new_shape: voxels (z, y, x) of the whole resampled volume.
        planes: which of them, and which rows ``logits`` are.
        coarse_axis: axis along which only the nearest voxel counts.

    Returns:
        (K, planes, Y', X') float32 on the same device.

    Raises:
        ValueError: planes outside the volume, not four axes, no class, or a shape or axis that cannot be.
    """
    z, y, x = _mixtures(logits, new_shape, coarse_axis, planes)
    result = torch.empty((len(logits), *(len(axis.low) for axis in (z, y, x))), device=logits.device)
    for start, stop in _slabs(result.shape[1:], SLAB_VOXELS):
        slab = z.part_of(start, stop)
        for channel, values in zip(logits, result, strict=True):
            values[start:stop] = _interpolated(channel, slab, y, x)
    return result


class _Mixture(NamedTuple):
    """Linear interpolation along one axis: (new,) neighbours, and float32 weights of both of them."""

    low: Tensor
    high: Tensor
    weight: Tensor
    rest: Tensor  # 1 - weight

    @classmethod
    def of(cls, taps: LinearTaps, device: torch.device) -> _Mixture:
        low, high, weight = (torch.from_numpy(part).to(device) for part in (taps.low, taps.high, taps.weight))
        return cls(low, high, weight, 1 - weight)

    def part_of(self, start: int, stop: int) -> _Mixture:
        """The same for some of the new voxels."""
        return _Mixture(*(part[start:stop] for part in self))

    def along(self, values: Tensor, axis: int) -> Tensor:
        """Interpolate ``values`` along ``axis``; weight 0 gives the lower neighbour even where the upper is infinite.

        In float32, two products, each rounded, and their rounded sum: the numbers of ``resampling_kernels``.
        """
        view = [-1 if a == axis else 1 for a in range(values.dim())]
        weight, rest = self.weight.view(view), self.rest.view(view)
        lower = values.index_select(axis, self.low).float()
        mixed = values.index_select(axis, self.high).float().mul_(weight).add_(lower * rest)
        return torch.where(weight == 0, lower, mixed)


class _Votes(NamedTuple):
    """Linear interpolation along one axis in whole numbers: (new,) neighbours, votes of the upper one of ``whole``."""

    low: Tensor
    high: Tensor
    part: Tensor
    whole: int

    @classmethod
    def of(cls, taps: LinearTaps, device: torch.device) -> _Votes:
        low, high, part = (torch.from_numpy(array).to(device) for array in (taps.low, taps.high, taps.part))
        return cls(low, high, part, taps.whole)

    def part_of(self, start: int, stop: int) -> _Votes:
        """The same for some of the new voxels."""
        return _Votes(self.low[start:stop], self.high[start:stop], self.part[start:stop], self.whole)


def _slabs(shape: Shape, voxels: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of planes with about that many voxels each."""
    step = max(1, voxels // (shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _filter_axis(array: Tensor, taps: SplineTaps, axis: int) -> Tensor:
    """Apply a banded matrix to one axis (1, 2 or 3) of a float32 (C, Z, Y, X) tensor."""
    first = torch.from_numpy(taps.first).to(array.device)
    if taps.weights.shape[1] == 1:
        return array.index_select(axis, first)
    weights = torch.from_numpy(taps.weights).to(array.device)
    view = [-1 if a == axis else 1 for a in range(array.dim())]
    shape = list(array.shape)
    shape[axis] = len(first)
    result = torch.zeros(shape, device=array.device)
    step = max(1, SLAB_VOXELS * len(first) // result.numel())
    for start in range(0, len(first), step):
        part = slice(start, min(start + step, len(first)))
        target = result.narrow(axis, start, part.stop - start)
        for tap in range(weights.shape[1]):
            target.addcmul_(array.index_select(axis, first[part] + tap), weights[part, tap].view(view))
    return result


def _vote(labels: Tensor, z: _Votes, y: _Votes, x: _Votes) -> Tensor:
    """The winners of some planes. Where all eight corners agree there is nothing to count."""
    corners = []
    for z_side in (z.low, z.high):
        planes = labels.index_select(0, z_side)
        for y_side in (y.low, y.high):
            rows = planes.index_select(1, y_side)
            corners += [rows.index_select(2, x_side) for x_side in (x.low, x.high)]
    result = corners[0].clone()
    agreed = torch.ones_like(result, dtype=torch.bool)
    for corner in corners[1:]:
        agreed &= corner == result
    k, j, i = torch.nonzero(~agreed, as_tuple=True)
    values = torch.stack([corner[k, j, i] for corner in corners])  # (8, voxels)
    parts = [axis.part[index] for axis, index in ((z, k), (y, j), (x, i))]
    sides = [(axis.whole - part, part) for axis, part in zip((z, y, x), parts, strict=True)]
    votes = torch.stack([a * b * c for a in sides[0] for b in sides[1] for c in sides[2]])
    upper = [2 * part >= axis.whole for axis, part in zip((z, y, x), parts, strict=True)]
    nearest = values.gather(0, (4 * upper[0].long() + 2 * upper[1] + upper[2])[None])[0]
    result[k, j, i] = _winner(values, votes, nearest)
    return result


def _winner(values: Tensor, votes: Tensor, nearest: Tensor) -> Tensor:
    """The value with most votes; of equals the nearest voxel's, then the lowest.

    Args:
        values: (8, voxels) labels.
        votes: (8, voxels) int64.
        nearest: (voxels,) labels.

    Returns:
        (voxels,) labels.
    """
    best, best_votes = values[0], torch.full_like(votes[0], -1)
    for value in values:
        total = torch.zeros_like(best_votes)
        for other, vote in zip(values, votes, strict=True):
            total += vote * (other == value)
        preferred = (value == nearest) | ((best != nearest) & (value < best))
        better = (total > best_votes) | ((total == best_votes) & preferred)
        best, best_votes = torch.where(better, value, best), torch.maximum(total, best_votes)
    return best


def _mixtures(logits: Tensor, shape: Shape, coarse_axis: int | None, planes: PlaneRange | None) -> list[_Mixture]:
    return [_Mixture.of(taps, logits.device) for taps in plane_taps(logits.shape[1:], shape, coarse_axis, planes)]


@torch.no_grad()
def _decide(
    function: Callable[[Tensor, _Mixture, _Mixture, _Mixture], Tensor],
    logits: Tensor,
    new_shape: Shape,
    coarse_axis: int | None,
    kind: torch.dtype,
    planes: PlaneRange | None,
) -> Tensor:
    """One decision per voxel, slab by slab."""
    z, y, x = _mixtures(logits, new_shape, coarse_axis, planes)
    if not len(logits):
        raise ValueError("logits need at least one class")
    result = torch.empty([len(axis.low) for axis in (z, y, x)], dtype=kind, device=logits.device)
    for start, stop in _slabs(result.shape, SLAB_VOXELS):
        result[start:stop] = function(logits, z.part_of(start, stop), y, x)
    return result


def _best_class(logits: Tensor, z: _Mixture, y: _Mixture, x: _Mixture) -> Tensor:
    """(planes, Y', X') int32 argmax over classes of some planes; only the best so far is kept."""
    best = torch.full((len(z.low), len(y.low), len(x.low)), -torch.inf, device=logits.device)
    winner = torch.zeros_like(best, dtype=torch.int32)
    for index, channel in enumerate(logits):
        value = _interpolated(channel, z, y, x)
        better = value > best
        winner.masked_fill_(better, index)
        torch.where(better, value, best, out=best)
    return winner


def _last_positive(logits: Tensor, z: _Mixture, y: _Mixture, x: _Mixture) -> Tensor:
    """(planes, Y', X') int32: 1 + the last region with a positive logit, 0 where there is none."""
    winner = torch.zeros((len(z.low), len(y.low), len(x.low)), dtype=torch.int32, device=logits.device)
    for index, channel in enumerate(logits):
        winner.masked_fill_(_interpolated(channel, z, y, x) > 0, index + 1)
    return winner


def _interpolated(channel: Tensor, z: _Mixture, y: _Mixture, x: _Mixture) -> Tensor:
    """One class (Z, Y, X) at the planes of ``z``: (planes, Y', X') float32. Axes in the order of the kernels."""
    return y.along(x.along(z.along(channel, 0), 2), 1)
