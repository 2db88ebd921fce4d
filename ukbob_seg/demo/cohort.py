"""A synthetic neck-to-thigh Dixon MRI cohort with known truth, for the demo, tests and benchmarks.

Every case depends only on (seed, index), so any number of cases can be made in any order by any number of workers.
Grids are LPS: x increases to the patient's left, y to the back, z to the head.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import gaussian_filter

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.demo.anatomy import (
    FAT_RING_MM,
    MUSCLE,
    ORGANS,
    SUBCUTANEOUS_FAT,
    VISCERAL,
    Ellipsoid,
    Organ,
    Tube,
    inside_body,
    inside_ellipsoid,
    inside_tube,
)
from ukbob_seg.errors import ConfigError
from ukbob_seg.preprocessing.resampling import resample_image

CHANNELS = ("fat", "water", "in-phase", "out-of-phase")
EXTENT_MM = (768.0, 320.0, 448.0)  # of the standard body's grid, (z, y, x)
SCANNERS = ((310.0, 1.0, 0.035), (420.0, 0.94, 0.030), (900.0, 1.06, 0.045))  # gain, gamma, noise
OUTLIER_FACTOR = 1.3  # volume of a genuinely large organ


@dataclass(frozen=True)
class CohortConfig:
    """What cohort to make.

    Attributes:
        shape: voxels (z, y, x); the field of view is always mid-thigh to neck.
        seed: of the cohort.
        outlier_rate: share of organs that are genuinely 30% larger, and correctly labelled.
        shift: strength of an unknown scanner: 0 is none; 1 adds a strong bias field, noise and another contrast.
    """

    shape: tuple[int, int, int] = (96, 40, 56)
    seed: int = 0
    outlier_rate: float = 0.01
    shift: float = 0.0

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 16:
            raise ConfigError(f"a synthetic torso needs at least 16 voxels along each axis, got {self.shape}")
        if not 0 <= self.outlier_rate <= 1:
            raise ConfigError(f"outlier_rate must lie in [0, 1], got {self.outlier_rate}")
        if not 0 <= self.shift < float("inf"):
            raise ConfigError(f"shift must be a finite number and not negative, got {self.shift}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")

    @property
    def geometry(self) -> Geometry:
        """The grid of every case."""
        z, y, x = (extent / n for extent, n in zip(EXTENT_MM, self.shape, strict=True))
        return Geometry(self.shape, (z, y, x), (-EXTENT_MM[2] / 2 + x / 2, -EXTENT_MM[1] / 2 + y / 2, z / 2))


@dataclass(frozen=True)
class SyntheticCase:
    """One subject.

    Attributes:
        image: (4, Z, Y, X) float32: fat, water, in-phase, out-of-phase.
        labels: (Z, Y, X) uint8, the true organs.
        body: (Z, Y, X) bool.
        sex: ``F`` or ``M``.
        age: years.
        large_organs: names of organs that are genuine volume outliers.
    """

    image: np.ndarray
    labels: np.ndarray
    body: np.ndarray
    sex: str
    age: int
    large_organs: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class SyntheticLabels:
    """The part of a subject that needs no image: see ``SyntheticCase``."""

    labels: np.ndarray
    body: np.ndarray
    lean: np.ndarray
    sex: str
    age: int
    large_organs: tuple[str, ...]


def make_case(config: CohortConfig, index: int) -> SyntheticCase:
    """Make subject ``index`` of a cohort."""
    generator = np.random.default_rng([config.seed, index])
    subject = _make_subject(config, generator)
    image = _acquire(config, subject.labels, subject.body, subject.lean, generator)
    return SyntheticCase(image, subject.labels, subject.body, subject.sex, subject.age, subject.large_organs)


def make_labels(config: CohortConfig, index: int) -> SyntheticLabels:
    """Only the true labels, the body and the facts of subject ``index``: several times faster than ``make_case``."""
    return _make_subject(config, np.random.default_rng([config.seed, index]))


def _make_subject(config: CohortConfig, generator: np.random.Generator) -> SyntheticLabels:
    sex, age = ("F", "M")[int(generator.integers(2))], int(generator.integers(45, 83))
    size = float(np.exp(generator.normal(0.03 if sex == "M" else -0.03, 0.04)))
    x, y, z = _body_coordinates(config, generator, size)
    fat_mm = FAT_RING_MM * float(np.exp(generator.normal(0.1 if sex == "F" else -0.1, 0.25)))
    body = inside_body(x, y, z)
    labels = np.zeros(config.shape, dtype=np.uint8)
    large = []
    for organ in ORGANS:
        factor = 1.0
        if generator.random() < config.outlier_rate:
            factor = OUTLIER_FACTOR ** (1 / 3)
            large.append(organ.name)
        _draw(labels, organ, (x, y, z), factor, generator)
    labels[~inside_body(x, y, z, 6.0)] = 0
    return SyntheticLabels(labels, body, inside_body(x, y, z, fat_mm), sex, age, tuple(large))


def _body_coordinates(
    config: CohortConfig, generator: np.random.Generator, size: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each voxel lies in the standard body (mm), after this subject's size and smooth deformation."""
    geometry = config.geometry
    axes = [
        (np.arange(n, dtype=np.float32) * s + o).astype(np.float32)
        for n, s, o in zip(geometry.shape, geometry.spacing_mm, reversed(geometry.origin_mm), strict=True)
    ]
    z = axes[0][:, None, None] + np.zeros(config.shape, np.float32)
    y = axes[1][None, :, None] + np.zeros(config.shape, np.float32)
    x = axes[2][None, None, :] + np.zeros(config.shape, np.float32)
    moved = []
    for points, amplitude in ((x, 5.0), (y, 4.0), (z, 7.0)):
        coarse = generator.normal(0, amplitude, (5, 3, 4))
        moved.append(points / size + _smooth(coarse, config.shape))
    return moved[0], moved[1], moved[2] + float(generator.normal(0, 6))


def _smooth(coarse: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A smooth field from values on a coarse grid."""
    return resample_image(coarse[None], shape)[0]


def _draw(
    labels: np.ndarray,
    organ: Organ,
    coordinates: tuple[np.ndarray, np.ndarray, np.ndarray],
    factor: float,
    generator: np.random.Generator,
) -> None:
    """Draw one organ with this subject's size and place, inside its bounding box only."""
    scale = factor * float(np.exp(generator.normal(0, 0.045)))
    stretch = np.exp(generator.normal(0, 0.03, 3)) * scale
    shift = generator.normal(0, (4.0, 3.0, 6.0))
    x, y, z = coordinates
    for part in organ.parts:
        placed = _place(part, _middle(organ), stretch, shift)
        low, high = _limits(placed)
        near = (z[:, 0, 0] > low[2] - 40) & (z[:, 0, 0] < high[2] + 40)
        rows = np.flatnonzero(near)
        if not len(rows):
            continue
        box = slice(int(rows[0]), int(rows[-1]) + 1)
        inside = inside_ellipsoid if isinstance(placed, Ellipsoid) else inside_tube
        labels[box][inside(placed, x[box], y[box], z[box])] = organ.value  # type: ignore[arg-type]


def _middle(organ: Organ) -> np.ndarray:
    """Centre of an organ's first part, about which it grows."""
    part = organ.parts[0]
    points = [part.centre] if isinstance(part, Ellipsoid) else list(part.points)
    return np.asarray(points, dtype=float).mean(axis=0)


def _place(part: Ellipsoid | Tube, middle: np.ndarray, stretch: np.ndarray, shift: np.ndarray) -> Ellipsoid | Tube:
    def point(p: tuple[float, float, float]) -> tuple[float, float, float]:
        a, b, c = (np.asarray(p) - middle) * stretch + middle + shift
        return float(a), float(b), float(c)

    if isinstance(part, Ellipsoid):
        a, b, c = np.asarray(part.radii) * stretch
        return dataclasses.replace(part, centre=point(part.centre), radii=(float(a), float(b), float(c)))
    width = float(stretch[:2].mean())
    return Tube(tuple(point(p) for p in part.points), tuple(r * width for r in part.radii))


def _limits(part: Ellipsoid | Tube) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(part, Ellipsoid):
        return np.asarray(part.centre) - part.radii, np.asarray(part.centre) + part.radii
    points = np.asarray(part.points)
    return points.min(axis=0) - max(part.radii), points.max(axis=0) + max(part.radii)


def _acquire(
    config: CohortConfig, labels: np.ndarray, body: np.ndarray, lean: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Water and fat of each tissue, partial volume, texture, bias field, scanner and Rician noise."""
    density = np.where(lean, np.float32(MUSCLE.density), np.float32(SUBCUTANEOUS_FAT.density))
    fat = np.where(lean, np.float32(MUSCLE.fat), np.float32(SUBCUTANEOUS_FAT.fat))
    patches = gaussian_filter(generator.normal(0, 1, labels.shape).astype(np.float32), 2.0)
    belly = lean & (labels == 0) & (patches > 0.02)
    density[belly], fat[belly] = VISCERAL.density, VISCERAL.fat
    density_of = np.zeros(256, np.float32)
    fat_of = np.zeros(256, np.float32)
    for organ in ORGANS:
        density_of[organ.value] = organ.tissue.density * np.exp(generator.normal(0, 0.05))
        fat_of[organ.value] = np.clip(organ.tissue.fat * np.exp(generator.normal(0, 0.25)), 0, 0.95)
    drawn = labels > 0
    density[drawn], fat[drawn] = density_of[labels[drawn]], fat_of[labels[drawn]]
    density[~body & ~drawn] = 0
    texture = gaussian_filter(generator.normal(0, 1, labels.shape).astype(np.float32), 1.0)
    density *= 1 + 0.25 * texture
    water, lipid = gaussian_filter(density * (1 - fat), 0.5), gaussian_filter(density * fat, 0.5)
    gain, gamma, noise = SCANNERS[int(generator.integers(len(SCANNERS)))]
    bias = 0.12 + 0.35 * config.shift
    field_ = np.exp(_smooth(generator.normal(0, bias, (4, 3, 3)), config.shape))
    gamma *= 1 + 0.35 * config.shift
    noise *= 1 + 1.5 * config.shift
    image = np.empty((4, *labels.shape), np.float32)
    for channel, signal in enumerate((lipid, water, water + lipid, np.abs(water - lipid))):
        clean = (np.clip(signal, 0, None) ** gamma) * field_
        real = clean + generator.normal(0, noise, labels.shape).astype(np.float32)
        image[channel] = gain * np.hypot(real, generator.normal(0, noise, labels.shape).astype(np.float32))
    return image
