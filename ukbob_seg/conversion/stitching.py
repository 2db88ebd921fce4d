"""One grid for all stations, the gain of each, their smooth blend. Arrays are (C, Z, Y, X), z along the slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import make_interp_spline
from skimage.filters import threshold_otsu

from ukbob_seg.conversion.dixon import INPHASE
from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.errors import DatasetError

_ON_GRID = 1e-3  # of a voxel: so near a sample, the sample itself is taken
_FEWEST_VOXELS = 200  # of body in an overlap, to judge a gain by
Axes = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Block:
    """A station's voxels where they lie.

    Attributes:
        voxels: (C, Z, Y, X) float32.
        geometry: their grid.
    """

    voxels: np.ndarray
    geometry: Geometry

    @property
    def coordinates_mm(self) -> Axes:
        """Of the voxels along the grid's own axes (z, y, x)."""
        return _coordinates(self.geometry)


@dataclass(frozen=True)
class Gain:
    """How one station's intensities follow from those of its upper neighbour.

    Attributes:
        log_ratio: natural logarithm of (upper / lower) in the overlap.
        spread: median absolute deviation of the voxels' logarithms from it.
        voxels: of body that it rests on; where they are too few the ratio is 1.
    """

    log_ratio: float
    spread: float
    voxels: int


def _coordinates(geometry: Geometry) -> Axes:
    matrix = np.asarray(geometry.direction).reshape(3, 3)
    start = (matrix.T @ np.asarray(geometry.origin_mm))[::-1]
    z, y, x = (
        first + step * np.arange(count)
        for first, step, count in zip(start, geometry.spacing_mm, geometry.shape, strict=True)
    )
    return z, y, x


def common_grid(grids: Sequence[Geometry], spacing_mm: tuple[float, float, float] | None = None) -> Geometry:
    """The grid that covers all stations, in their orientation.

    It begins at the first voxel of the station whose z is lowest along the slices' direction, so that stations that
    were acquired on one lattice keep their samples untouched.

    Args:
        grids: of the stations; one orientation.
        spacing_mm: (z, y, x); None for the finest that was acquired, along each axis.
    """
    spacing = spacing_mm or tuple(min(grid.spacing_mm[axis] for grid in grids) for axis in range(3))
    axes = [_coordinates(grid) for grid in grids]
    start = [min(each[axis][0] for each in axes) for axis in range(3)]
    stop = [max(each[axis][-1] for each in axes) for axis in range(3)]
    z, y, x = (int(np.floor((b - a) / s + _ON_GRID)) + 1 for a, b, s in zip(start, stop, spacing, strict=True))
    matrix = np.asarray(grids[0].direction).reshape(3, 3)
    origin = matrix @ np.asarray(start[::-1])
    return Geometry(
        (z, y, x),
        (spacing[0], spacing[1], spacing[2]),
        (float(origin[0]), float(origin[1]), float(origin[2])),
        grids[0].direction,
    )


def _weights(samples: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(points, samples) matrix of a cubic spline through the samples; 0 for points outside of them."""
    step = samples[1] - samples[0] if len(samples) > 1 else 1.0
    index = (points - samples[0]) / step
    nearest = np.rint(index)
    inside = (index > -_ON_GRID) & (index < len(samples) - 1 + _ON_GRID)
    if np.all(np.abs(index - nearest)[inside] < _ON_GRID):
        matrix = np.zeros((len(points), len(samples)))
        matrix[np.flatnonzero(inside), nearest[inside].astype(int)] = 1
        return matrix
    degree = min(3, len(samples) - 1)
    spline = make_interp_spline(np.arange(len(samples)), np.eye(len(samples)), k=degree)
    return spline(np.clip(index, 0, len(samples) - 1)) * inside[:, None]


def resample(voxels: np.ndarray, have: Axes, want: Axes) -> np.ndarray:
    """Cubic spline along each axis by itself; axes that already fit are copied. Negative overshoot becomes 0.

    Args:
        voxels: (C, Z, Y, X) on the coordinates ``have``.
        have: coordinates (z, y, x) of the samples, equally spaced.
        want: coordinates of the result; outside of the samples it is 0.

    Returns:
        (C, Z', Y', X') float32.
    """
    for axis, (samples, points) in enumerate(zip(have, want, strict=True), 1):
        if len(samples) == len(points) and np.allclose(samples, points, rtol=0, atol=_ON_GRID * _step(samples)):
            continue
        matrix = _weights(samples, points).astype(np.float32)
        voxels = np.moveaxis(np.tensordot(matrix, voxels, axes=(1, axis)), 0, axis)
    return np.maximum(voxels, 0, dtype=np.float32)


def _step(samples: np.ndarray) -> float:
    return float(samples[1] - samples[0]) if len(samples) > 1 else 1.0


def planes_between(grid: Geometry, low_mm: float, high_mm: float) -> slice:
    """Planes of a grid from one height to another, both included."""
    start = (_coordinates(grid)[0][0], grid.spacing_mm[0])
    first = int(np.ceil((low_mm - start[0]) / start[1] - _ON_GRID))
    last = int(np.floor((high_mm - start[0]) / start[1] + _ON_GRID))
    return slice(max(0, first), min(grid.shape[0], last + 1))


def overlap_of(one: Block, other: Block, grid: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """What two stations show of the planes that both have, on the common grid: two arrays (C, z, Y, X).

    Raises:
        DatasetError: the grid has no plane there.
    """
    first, second = one.coordinates_mm, other.coordinates_mm
    planes = planes_between(grid, max(first[0][0], second[0][0]), min(first[0][-1], second[0][-1]))
    z, y, x = _coordinates(grid)
    if planes.stop <= planes.start:
        raise DatasetError(f"no plane of the grid lies in an overlap; {grid.spacing_mm[0]:g} mm is too coarse")
    want = (z[planes], y, x)
    return resample(one.voxels, first, want), resample(other.voxels, second, want)


def body_mask(inphase: np.ndarray) -> np.ndarray:
    """Voxels with signal: above Otsu's threshold. Air and lungs are below; all False where there is no contrast.

    Values are cut off at the median of those above their mean first: the threshold then parts air from tissue, not
    tissue from whatever shines.
    """
    if inphase.min() == inphase.max():
        return np.zeros(inphase.shape, dtype=bool)
    bright = float(np.median(inphase[inphase > inphase.mean()]))
    return inphase > threshold_otsu(np.minimum(inphase, bright))


def gain_between(above: np.ndarray, below: np.ndarray) -> Gain:
    """The factor between two stations, from what both show of one piece of the body.

    The median of the voxels' log ratios in the in-phase image, which knows no exchange of water and fat: moving
    organs, coil edges and noise are far from half of the voxels. One factor holds for all contrasts of a station,
    which come out of one acquisition.

    Args:
        above: (C, z, Y, X) of the upper station.
        below: likewise of the lower one.
    """
    one, other = above[INPHASE], below[INPHASE]
    both = body_mask(one) & body_mask(other)
    count = int(both.sum())
    if count < _FEWEST_VOXELS:
        return Gain(0.0, float("nan"), count)
    ratios = np.log(one[both]) - np.log(other[both])
    middle = float(np.median(ratios))
    return Gain(middle, float(np.median(np.abs(ratios - middle))), count)


def chain_gains(steps: Sequence[Gain]) -> np.ndarray:
    """A factor for each station from the steps between neighbours; their geometric mean is 1."""
    logs = np.concatenate([[0.0], np.cumsum([step.log_ratio for step in steps])])
    return np.exp(logs - logs.mean())


def blend_weights(blocks: Sequence[Block], grid: Geometry) -> np.ndarray:
    """(stations, planes) weights along z; they add up to 1 where any station has the plane.

    A station has the weight 1 where it is alone. In an overlap it falls with a raised cosine, to 0 at its own end.
    """
    z = _coordinates(grid)[0]
    ends = [(block.coordinates_mm[0][0], block.coordinates_mm[0][-1]) for block in blocks]
    weights = np.zeros((len(blocks), len(z)))
    tolerance = _ON_GRID * grid.spacing_mm[0]
    for k, (low, high) in enumerate(ends):
        weight = ((z > low - tolerance) & (z < high + tolerance)).astype(float)
        for other, (a, b) in enumerate(ends):
            if other == k or min(b, high) <= max(a, low):
                continue
            if a < low:  # the neighbour below reaches up to b
                weight *= _rise((z - low) / (b - low))
            if b > high:
                weight *= _rise((high - z) / (high - a))
        weights[k] = weight
    total = weights.sum(axis=0)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def _rise(t: np.ndarray) -> np.ndarray:
    """From 0 at t = 0 to 1 at t = 1, smooth at both ends; never quite 0, so that a lone plane keeps its station."""
    return np.maximum(0.5 - 0.5 * np.cos(np.pi * np.clip(t, 0, 1)), 1e-6)


def stitch(blocks: Sequence[Block], gains: Sequence[float], grid: Geometry) -> np.ndarray:
    """All stations on one grid.

    Args:
        blocks: of the stations.
        gains: factor of each.
        grid: from ``common_grid``.

    Returns:
        (C, Z, Y, X) float32; 0 where no station has voxels.
    """
    z, y, x = _coordinates(grid)
    weights = blend_weights(blocks, grid)
    whole = np.zeros((len(blocks[0].voxels), *grid.shape), dtype=np.float32)
    covered = np.zeros(grid.shape, dtype=np.float32)
    for block, gain, weight in zip(blocks, gains, weights, strict=True):
        rows = np.flatnonzero(weight)
        if not len(rows):
            continue
        planes = slice(int(rows[0]), int(rows[-1]) + 1)
        have = block.coordinates_mm
        factor = weight[planes].astype(np.float32)[:, None, None]
        whole[:, planes] += resample(block.voxels, have, (z[planes], y, x)) * (factor * np.float32(gain))
        covered[planes] += factor * np.outer(_covers(have[1], y), _covers(have[2], x))
    # Stations of another field of view leave voxels to their neighbour alone.
    return np.divide(whole, covered, out=whole, where=covered > 0)


def _covers(samples: np.ndarray, points: np.ndarray) -> np.ndarray:
    margin = _ON_GRID * _step(samples)
    return ((points > samples[0] - margin) & (points < samples[-1] + margin)).astype(np.float32)
