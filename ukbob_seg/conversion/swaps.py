"""Stations whose water and fat were exchanged by the scanner's reconstruction: found, and set right on request.

Two facts speak for or against an exchange: the skin's fat lies at the border of the body, not inside; and neighbouring
stations show the same tissue where they overlap. The first is absolute but weak in lean people and at the neck, the
second is strong but only relative. All stations are decided together, by the assignment that fits both best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_fill_holes, distance_transform_edt, label

from ukbob_seg.conversion.dixon import FAT, INPHASE, WATER
from ukbob_seg.conversion.stitching import body_mask

SKIN_MM = 2.0  # partial volume and skin
RING_MM = 12.0  # of which most is subcutaneous fat
CORE_MM = 25.0  # from here on inside
DOUBTFUL = 0.2  # confidence below which a person should look
_FEWEST_VOXELS = 50


@dataclass(frozen=True)
class SwapVerdict:
    """What is known of one station.

    Attributes:
        border_fat: fat fraction near the skin minus that deep inside, in [-1, 1]; positive where all is well; NaN where
            there is too little body.
        agreement_below: with the next station, in [-1, 1]: 1 if both show the same, -1 if one shows as water what the
            other shows as fat; NaN for the last station.
        swapped: the decision.
        confidence: by how much the best assignment with this decision beats the best one without.
    """

    border_fat: float
    agreement_below: float
    swapped: bool
    confidence: float


def border_fat(voxels: np.ndarray, spacing_mm: tuple[float, float, float]) -> float:
    """Median fat fraction near the skin minus that deep inside the body.

    An exchange of water and fat turns its sign exactly. The body is filled slice by slice, of which the distance to
    the skin is taken, too: arms and legs have skin of their own.

    Args:
        voxels: (4, Z, Y, X) of a station.
        spacing_mm: (z, y, x).

    Returns:
        In [-1, 1]; NaN with too few voxels near the skin or inside.
    """
    signal = body_mask(voxels[INPHASE])
    depth = np.zeros(signal.shape, dtype=np.float32)
    for plane, inside in enumerate(signal):
        body = _filled(inside)
        if body.any() and not body.all():  # where the field of view cuts the body there is no skin, and no air either
            depth[plane] = distance_transform_edt(body, sampling=spacing_mm[1:])
    ring = signal & (depth > SKIN_MM) & (depth <= max(RING_MM, SKIN_MM + max(spacing_mm[1:])))
    core = signal & (depth > CORE_MM)
    if min(ring.sum(), core.sum()) < _FEWEST_VOXELS:
        return float("nan")
    return float(np.median(_fat_fraction(voxels, ring)) - np.median(_fat_fraction(voxels, core)))


def _filled(inside: np.ndarray) -> np.ndarray:
    """A slice of the body with its lungs and bowel gas, without specks of noise."""
    filled = binary_fill_holes(inside)
    pieces, count = label(filled)
    if count < 2:
        return filled
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return (sizes >= 0.05 * sizes.max())[pieces]


def _fat_fraction(voxels: np.ndarray, where: np.ndarray) -> np.ndarray:
    fat, water = voxels[FAT][where], voxels[WATER][where]
    return fat / np.maximum(fat + water, 1e-6)


def agreement(above: np.ndarray, below: np.ndarray) -> float:
    """Whether two stations call the same tissue water, from what both show of one piece of the body.

    With a = |water - water'| + |fat - fat'| and b = |water - fat'| + |fat - water'| summed over the body: (b - a) /
    (b + a). An exchange in either station turns the sign exactly.

    Args:
        above: (4, z, Y, X) of the upper station, with its gain.
        below: of the lower one, likewise.

    Returns:
        In [-1, 1]; NaN with too little body.
    """
    both = body_mask(above[INPHASE]) & body_mask(below[INPHASE])
    if both.sum() < _FEWEST_VOXELS:
        return float("nan")
    water, fat = above[WATER][both], above[FAT][both]
    other_water, other_fat = below[WATER][both], below[FAT][both]
    same = float(np.abs(water - other_water).sum() + np.abs(fat - other_fat).sum())
    exchanged = float(np.abs(water - other_fat).sum() + np.abs(fat - other_water).sum())
    return (exchanged - same) / (exchanged + same) if exchanged + same > 0 else float("nan")


def decide_swaps(border: Sequence[float], agreements: Sequence[float]) -> list[SwapVerdict]:
    """Decide all stations of a subject together.

    Of all assignments s of +1 (as it should be) and -1 (exchanged) the one with the largest
    sum_k s_k border_k + sum_k s_k s_(k+1) agreement_k, by dynamic programming; NaN counts as 0. Where nothing speaks
    for an exchange, there is none.

    Args:
        border: ``border_fat`` of each station.
        agreements: of each station with the next; one fewer.
    """
    unary, pair = np.nan_to_num(np.asarray(border, dtype=float)), np.nan_to_num(np.asarray(agreements, dtype=float))
    signs = np.array([1.0, -1.0])
    count = len(unary)
    forward, backward = np.zeros((count, 2)), np.zeros((count, 2))
    for k in range(count):
        reached = 0.0 if k == 0 else (forward[k - 1][:, None] + np.outer(signs, signs) * pair[k - 1]).max(axis=0)
        forward[k] = signs * unary[k] + reached
    for k in range(count - 2, -1, -1):
        following = backward[k + 1] + signs * unary[k + 1]
        backward[k] = (np.outer(signs, signs) * pair[k] + following[None, :]).max(axis=1)
    best = forward + backward  # the best total with either sign of station k
    swapped = best[:, 1] > best[:, 0] + 1e-9
    return [
        SwapVerdict(
            float(border[k]),
            float(agreements[k]) if k + 1 < count else float("nan"),
            bool(swapped[k]),
            float(abs(best[k, 0] - best[k, 1]) / 2),
        )
        for k in range(count)
    ]
