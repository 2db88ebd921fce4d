"""Where the organs of the synthetic torso are, how they are shaped, and what they are made of.

Positions are in mm in a patient frame: x to the patient's left, y to the back, z to the head; the origin is the
middle of the body at mid-thigh. The grid covers mid-thigh to neck.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Tissue:
    """Proton density (relative) and fat fraction."""

    density: float
    fat: float


@dataclass(frozen=True)
class Ellipsoid:
    """A superellipsoid: sum of |offset / radius|^power below 1; powers above 2 are boxier."""

    centre: Point
    radii: Point
    power: float = 2.0


@dataclass(frozen=True)
class Tube:
    """A round tube through points, with one radius at each."""

    points: tuple[Point, ...]
    radii: tuple[float, ...]


@dataclass(frozen=True)
class Organ:
    """An organ: a union of parts, drawn over the organs before it."""

    name: str
    value: int
    parts: tuple[Ellipsoid | Tube, ...]
    tissue: Tissue


# In drawing order. Values are those of the written label maps.
ORGANS: tuple[Organ, ...] = (
    Organ("lung_left", 1, (Ellipsoid((78, 5, 560), (52, 74, 112), 2.4),), Tissue(0.10, 0.02)),
    Organ("lung_right", 2, (Ellipsoid((-78, 5, 565), (57, 76, 104), 2.4),), Tissue(0.10, 0.02)),
    Organ(
        "liver", 3, (Ellipsoid((-66, -5, 425), (76, 78, 62), 2.5), Ellipsoid((12, -38, 440), (58, 40, 38))),
        Tissue(0.80, 0.07),
    ),
    Organ(
        "stomach", 4, (Ellipsoid((62, -24, 430), (40, 42, 46)), Ellipsoid((34, -48, 388), (38, 26, 26))),
        Tissue(0.60, 0.10),
    ),
    Organ("spleen", 5, (Ellipsoid((104, 44, 432), (26, 36, 44)),), Tissue(1.00, 0.02)),
    Organ("heart", 6, (Ellipsoid((26, -36, 520), (48, 42, 50)), Ellipsoid((6, -20, 556), (30, 28, 24))),
          Tissue(0.88, 0.05)),
    Organ("kidney_left", 7, (Ellipsoid((64, 54, 372), (27, 23, 50)),), Tissue(1.08, 0.03)),
    Organ("kidney_right", 8, (Ellipsoid((-62, 56, 352), (28, 24, 48)),), Tissue(1.08, 0.03)),
    Organ(
        "vertebral_column", 9,
        (Tube(((0, 88, 225), (0, 62, 320), (0, 80, 450), (0, 92, 560), (0, 70, 680), (0, 55, 760)),
              (30, 27, 25, 22, 19, 16)),),
        Tissue(0.72, 0.42),
    ),
    Organ("aorta", 10, (Tube(((8, 36, 300), (14, 44, 420), (18, 52, 540), (10, 10, 618)), (12, 13, 15, 17)),),
          Tissue(0.45, 0.01)),
    Organ("urinary_bladder", 11, (Ellipsoid((0, -38, 205), (40, 33, 33)),), Tissue(1.30, 0.00)),
    Organ(
        "femur_left", 12,
        (Tube(((92, 6, -40), (96, 4, 100), (104, 8, 160)), (17, 18, 22)), Ellipsoid((84, 8, 172), (25, 25, 25))),
        Tissue(0.62, 0.78),
    ),
    Organ(
        "femur_right", 13,
        (Tube(((-92, 6, -40), (-96, 4, 100), (-104, 8, 160)), (17, 18, 22)), Ellipsoid((-84, 8, 172), (25, 25, 25))),
        Tissue(0.62, 0.78),
    ),
)  # fmt: skip

PAIRED = (("lung_left", "lung_right"), ("kidney_left", "kidney_right"), ("femur_left", "femur_right"))
MUSCLE, SUBCUTANEOUS_FAT, VISCERAL = Tissue(0.70, 0.07), Tissue(0.95, 0.93), Tissue(0.75, 0.45)

# Outline of the trunk: height, half width, half depth. Below the crotch there are two legs.
TRUNK = np.array(
    [
        (150, 168, 112), (230, 178, 118), (330, 155, 112), (430, 165, 116), (540, 182, 118), (620, 190, 106),
        (680, 150, 84), (715, 80, 66), (740, 62, 60), (800, 60, 60),
    ],
    dtype=float,
)  # fmt: skip
CROTCH_MM = 150.0
LEGS = np.array([(-60, 62, 78, 84), (60, 72, 88, 90), (150, 84, 104, 92), (220, 88, 110, 92)], dtype=float)
FAT_RING_MM = 17.0

organ_names: dict[str, int] = {organ.name: organ.value for organ in ORGANS}


def inside_ellipsoid(shape: Ellipsoid, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Whether points (broadcastable, mm) lie inside."""
    total = np.zeros(np.broadcast_shapes(x.shape, y.shape, z.shape), dtype=np.float32)
    for points, centre, radius in zip((x, y, z), shape.centre, shape.radii, strict=True):
        total += np.abs((points - centre) / radius) ** shape.power
    return total < 1


def inside_tube(shape: Tube, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Whether points lie within the tube; its axis is interpolated linearly over height."""
    heights = [p[2] for p in shape.points]
    axis_x = np.interp(z, heights, [p[0] for p in shape.points]).astype(np.float32)
    axis_y = np.interp(z, heights, [p[1] for p in shape.points]).astype(np.float32)
    radius = np.interp(z, heights, shape.radii).astype(np.float32)
    return ((x - axis_x) ** 2 + (y - axis_y) ** 2 < radius**2) & (z >= heights[0]) & (z <= heights[-1])


def inside_body(x: np.ndarray, y: np.ndarray, z: np.ndarray, inset_mm: float = 0.0) -> np.ndarray:
    """Whether points lie in the trunk or a leg, ``inset_mm`` below the skin."""
    half_width = np.interp(z, TRUNK[:, 0], TRUNK[:, 1]).astype(np.float32) - inset_mm
    half_depth = np.interp(z, TRUNK[:, 0], TRUNK[:, 2]).astype(np.float32) - inset_mm
    trunk = (np.abs(x / half_width) ** 2.5 + np.abs(y / half_depth) ** 2.5 < 1) & (z >= CROTCH_MM)
    leg_x = np.interp(z, LEGS[:, 0], LEGS[:, 3]).astype(np.float32)
    leg_a = np.interp(z, LEGS[:, 0], LEGS[:, 1]).astype(np.float32) - inset_mm
    leg_b = np.interp(z, LEGS[:, 0], LEGS[:, 2]).astype(np.float32) - inset_mm
    leg = (((np.abs(x) - leg_x) / leg_a) ** 2 + (y / leg_b) ** 2 < 1) & (z < LEGS[-1, 0])
    return trunk | leg
