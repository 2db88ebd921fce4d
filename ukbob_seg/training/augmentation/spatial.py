"""Rotation, scale, shear and elastic deformation in one: a single sampling grid for image and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ukbob_seg.errors import ConfigError
from ukbob_seg.training.augmentation.batch import Batch, chance, uniform
from ukbob_seg.training.augmentation.separable import along_axes, spline_matrix

# A cubic B-spline whose nodes move by less than this share of their distance never folds (Choi & Lee, 2000).
SAFE_DISPLACEMENT = 0.4
# nnU-Net reads patches for objects shrunk to this size, although it shrinks them further; zeros fill what is missing.
SMALLEST_SCALE = 0.85

Size = tuple[int, int, int]


@dataclass(frozen=True)
class SpatialSettings:
    """What is drawn, and how often.

    Attributes:
        rotation_deg: largest angle about each axis (z, y, x), to either side.
        scale: lowest and highest; above 1 a larger field is squeezed into the patch, and objects get smaller.
        shear: largest displacement across an axis per length along it, to either side.
        elastic_mm: lowest and highest bound on the displacement of the elastic grid's nodes along an axis.
        elastic_spacing_mm: distance between these nodes.
        p_rotation, p_scale, p_shear, p_elastic: probabilities, each independent of the others.
        p_isotropic: of one scale for all axes, rather than one each.
        axes: along which voxels may move (0 = z, 1 = y, 2 = x): all three, or the two of a plane.
    """

    rotation_deg: tuple[float, float, float] = (30.0, 30.0, 30.0)
    scale: tuple[float, float] = (0.7, 1.4)
    shear: float = 0.1
    elastic_mm: tuple[float, float] = (0.0, 0.0)
    elastic_spacing_mm: float = 32.0
    p_rotation: float = 0.2
    p_scale: float = 0.2
    p_shear: float = 0.0
    p_elastic: float = 0.0
    p_isotropic: float = 1.0
    axes: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"scale must be positive, lowest first, got {self.scale}")
        if not 0 <= self.elastic_mm[0] <= self.elastic_mm[1] <= SAFE_DISPLACEMENT * self.elastic_spacing_mm:
            raise ConfigError(
                f"elastic_mm must lie in [0, {SAFE_DISPLACEMENT} x elastic_spacing_mm], lowest first, or space would "
                f"fold; got {self.elastic_mm} with {self.elastic_spacing_mm}"
            )
        if self.axes not in ((0, 1, 2), (0, 1), (0, 2), (1, 2)):
            raise ConfigError(f"axes must be (0, 1, 2) or two of them in order, got {self.axes}")


@dataclass(frozen=True)
class SpatialRecord:
    """One value per element; an element with neither ``moved`` nor ``deformed`` is only cropped.

    Attributes:
        moved: (B,) bool: the matrix is not the identity.
        matrix: (B, 3, 3) float64, from mm in the result to mm in the input, both from the centre of the patch.
        deformed: (B,) bool.
        displacement_mm: (B, 3, n_z, n_y, n_x) float32, (z, y, x) displacement of the elastic grid's nodes.
    """

    moved: Tensor
    matrix: Tensor
    deformed: Tensor
    displacement_mm: Tensor


class RandomSpatial:
    """Rotate, scale, shear and deform in millimetres, so that a rotation stays one where voxels are not cubes.

    The point ``p`` of the result shows the point ``M (p + d(p))`` of the input: M rotates about x, then y, then z what
    was sheared after it was scaled. Images are interpolated linearly, with 0 outside; labels take the nearest voxel, 0
    (background) outside. nnU-Net's labels are -1 there, which it turns to 0 before training.

    The input may be larger than the patch (``read_size``), so that what turns in from outside is there; elements that
    were not drawn give the centre of their input, untouched.

    Args:
        patch_size: of the result, voxels (z, y, x).
        spacing_mm: (z, y, x).
        settings: what is drawn.
    """

    def __init__(self, patch_size: Size, spacing_mm: Sequence[float], settings: SpatialSettings | None = None) -> None:
        self.patch_size = patch_size
        self.spacing_mm = tuple(float(s) for s in spacing_mm)
        self.settings = settings or SpatialSettings()
        distance = self.settings.elastic_spacing_mm
        self._spans = tuple(n * s / distance for n, s in zip(patch_size, self.spacing_mm, strict=True))
        self._nodes = tuple(math.ceil(n) + 3 if a in self.settings.axes else 1 for a, n in enumerate(self._spans))

    @property
    def read_size(self) -> Size:
        """Voxels (z, y, x) that should be read for a patch: nnU-Net's rule, in mm and for turns to both sides.

        The patch's edges as seen after the largest turn about one axis, at most 90 degrees, divided by 0.85.
        """
        axes = self.settings.axes
        edges = [n * s for n, s in zip(self.patch_size, self.spacing_mm, strict=True)]
        size = list(self.patch_size)
        for axis in axes:
            longest = edges[axis]
            for other in axes:
                about = ({0, 1, 2} - {axis, other}).pop() if other != axis else axis
                if other != axis and self.settings.p_rotation:
                    angle = math.radians(min(90.0, self.settings.rotation_deg[about]))
                    longest = max(longest, math.cos(angle) * edges[axis] + math.sin(angle) * edges[other])
            smallest = max(SMALLEST_SCALE, 1 / self.settings.scale[1]) if self.settings.p_scale else 1.0
            size[axis] = max(size[axis], math.floor(longest / self.spacing_mm[axis] / smallest + 1e-6))
        return size[0], size[1], size[2]

    def sample(self, batch_size: int, generator: torch.Generator) -> SpatialRecord:
        """Draw matrices and displacements for all elements, whether they are used or not."""
        s = self.settings
        inside = torch.tensor([axis in s.axes for axis in range(3)])
        # A rotation about an axis moves the two others; in a plane only the one about its normal is left.
        turning = torch.ones(3, dtype=torch.bool) if len(s.axes) == 3 else ~inside
        rotated = chance(s.p_rotation, (batch_size, 1), generator)
        limits = torch.tensor(s.rotation_deg) * math.pi / 180
        angles = uniform(-1, 1, (batch_size, 3), generator) * limits * (rotated & turning)
        scaled = chance(s.p_scale, (batch_size, 1), generator)
        isotropic = chance(s.p_isotropic, (batch_size, 1), generator)
        drawn = uniform(*s.scale, (batch_size, 3), generator)
        scale = torch.where(scaled & inside, torch.where(isotropic, drawn[:, :1], drawn), 1.0)
        sheared = chance(s.p_shear, (batch_size, 1, 1), generator)
        shear = uniform(-s.shear, s.shear, (batch_size, 3, 3), generator) * sheared
        shear = shear * (inside[:, None] & inside & ~torch.eye(3, dtype=torch.bool))
        deformed = chance(s.p_elastic, (batch_size,), generator)
        bound = uniform(*s.elastic_mm, (batch_size, 1, 1, 1, 1), generator)
        displacement = uniform(-1, 1, (batch_size, 3, *self._nodes), generator) * bound * inside[:, None, None, None]
        sheared_matrix = torch.eye(3, dtype=torch.float64) + shear.double()
        matrix = rotation_matrix(angles.double()) @ sheared_matrix @ torch.diag_embed(scale.double())
        moved = (rotated | scaled | sheared[:, 0]).flatten()
        return SpatialRecord(moved, matrix, deformed, displacement)

    def apply(self, batch: Batch, record: SpatialRecord) -> Batch:
        """Sample the elements that were drawn, crop the others."""
        outer = batch.image.shape[2:]
        starts = [(n - p) // 2 for n, p in zip(outer, self.patch_size, strict=True)]
        if min(starts) < 0:
            raise ValueError(f"patch of {tuple(outer)} voxels is smaller than the result, {self.patch_size}")
        z, y, x = (slice(s, s + p) for s, p in zip(starts, self.patch_size, strict=True))
        drawn = (record.moved | record.deformed).nonzero().flatten().tolist()
        if not drawn and tuple(outer) == self.patch_size:
            return batch
        image = batch.image[..., z, y, x].clone(memory_format=torch.contiguous_format)
        maps = [labels[..., z, y, x].clone(memory_format=torch.contiguous_format) for labels in batch.label_maps()]
        for element in drawn:
            grid = self._grid(record, element, outer, starts, batch.image)
            image[element] = _sample(batch.image[element], grid, "bilinear")
            for labels, before in zip(maps, batch.label_maps(), strict=True):
                # float32 holds every label up to 2^24.
                labels[element] = _sample(before[element][None].float(), grid, "nearest")[0].to(labels.dtype)
        return batch.moved(image, maps)

    def _grid(
        self, record: SpatialRecord, element: int, outer: Sequence[int], starts: Sequence[int], like: Tensor
    ) -> Tensor:
        """(1, z, y, x, 3) positions in the input, as grid_sample wants them: (x, y, z), -1 and 1 at the outer edges.

        Components lie apart in memory: written so, and read so by grid_sample, the work takes half the time.
        """
        spacing = torch.tensor(self.spacing_mm, dtype=torch.float64)
        size = torch.tensor(outer, dtype=torch.float64)
        middle = torch.tensor([s + (p - 1) / 2 for s, p in zip(starts, self.patch_size, strict=True)])
        # mm from the centre -> -1..1 across the input.
        matrix = record.matrix[element] * (2 / (size * spacing))[:, None]
        offset = ((2 * middle + 1) / size - 1).tolist()
        points = [
            ((torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * s).to(like)
            for n, s in zip(self.patch_size, self.spacing_mm, strict=True)
        ]
        z, y, x = points[0][:, None, None], points[1][:, None], points[2]
        grid = like.new_empty((3, *self.patch_size))
        weights = matrix.tolist()
        for component, (a, b, c) in enumerate(weights):
            torch.add(z * a + (y * b + offset[component]), x * c, out=grid[2 - component])
        if bool(record.deformed[element]):
            nodes = record.displacement_mm[element].to(like)
            splines = [spline_matrix(*axis) for axis in zip(self.patch_size, nodes.shape[1:], self._spans, strict=True)]
            moves = along_axes(nodes, splines)
            for component in range(3):
                for source in self.settings.axes:
                    grid[2 - component].add_(moves[source], alpha=weights[component][source])
        return grid.permute(1, 2, 3, 0)[None]


def rotation_matrix(angles: Tensor) -> Tensor:
    """(..., 3, 3) that turns (z, y, x) vectors about x, then y, then z.

    Args:
        angles: (..., 3) about z, y and x, in radians.
    """
    result = torch.eye(3, dtype=angles.dtype).expand(*angles.shape[:-1], 3, 3)
    for axis in (2, 1, 0):
        first, second = [a for a in range(3) if a != axis]
        cosine, sine = angles[..., axis].cos(), angles[..., axis].sin()
        turn = torch.eye(3, dtype=angles.dtype).repeat(*angles.shape[:-1], 1, 1)
        turn[..., first, first], turn[..., second, second] = cosine, cosine
        turn[..., first, second], turn[..., second, first] = -sine, sine
        result = turn @ result
    return result


def _sample(volume: Tensor, grid: Tensor, mode: str) -> Tensor:
    """(C, z, y, x) at the positions of a grid."""
    return F.grid_sample(volume[None], grid, mode=mode, padding_mode="zeros", align_corners=False)[0]
