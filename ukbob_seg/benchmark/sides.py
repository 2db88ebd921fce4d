"""Right and left of an organ pair that a model predicts as one class: told apart by where the parts lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.filtering.body import body_mask

# A part with more than this share on either side of the midline is two organs that touch, and is cut there.
_BRIDGE = 0.2
_ANY_NEIGHBOUR = np.ones((3, 3, 3), dtype=bool)


class Midline(NamedTuple):
    """Where the body's middle is: mm to the left of the patient's origin, and by what it was found."""

    left_mm: float
    landmark: str


def left_mm(indices: tuple[np.ndarray, ...], geometry: Geometry) -> np.ndarray:
    """Position of voxels along the patient's right-left axis; larger is more to the patient's left.

    Args:
        indices: z, y and x indices, as ``numpy.nonzero`` returns them.
        geometry: of the volume; any orientation.
    """
    z, y, x = indices
    to_left = np.asarray(geometry.direction).reshape(3, 3)[0]  # of the x, y, z index axes
    sz, sy, sx = geometry.spacing_mm
    return geometry.origin_mm[0] + to_left[0] * sx * x + to_left[1] * sy * y + to_left[2] * sz * z


def find_midline(organs: Mapping[str, np.ndarray], image: Callable[[], np.ndarray], geometry: Geometry) -> Midline:
    """The sagittal plane between right and left.

    It lies halfway between the inferior vena cava and the aorta, which run on either side of the spine; where one of
    them is missing, between the kidneys; without these, in the middle of the body's width.

    Args:
        organs: (Z, Y, X) bool masks by common name; absent ones may be missing or empty.
        image: reads the (Z, Y, X) image; called where the organs do not suffice.
        geometry: of both.
    """
    for right, left in (("inferior_vena_cava", "aorta"), ("kidney_right", "kidney_left")):
        masks = [organs.get(right), organs.get(left)]
        if all(mask is not None and mask.any() for mask in masks):
            centres = [left_mm(np.nonzero(mask), geometry).mean() for mask in masks if mask is not None]
            if centres[0] < centres[1]:  # as in all but mirrored patients
                return Midline(float(np.mean(centres)), f"{right} and {left}")
    coarse = body_mask(image())[::2, ::2, ::2]  # every other voxel tells the width well enough
    body = left_mm(tuple(2 * axis for axis in np.nonzero(coarse)), geometry)
    return Midline(float(body.min() + body.max()) / 2, "the body's width")


def split_sides(merged: np.ndarray, midline: Midline, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Divide a mask into its right and left half, connected part by connected part.

    A part belongs to the side of its centre of mass; a part that reaches far over to the other side is cut.

    Args:
        merged: (Z, Y, X) bool.
        midline: of the patient.
        geometry: of the mask.

    Returns:
        (right, left), both (Z, Y, X) bool; together the mask.
    """
    right = np.zeros_like(merged)
    parts, _ = ndimage.label(merged, structure=_ANY_NEIGHBOUR)
    indices = np.nonzero(merged)
    is_right = left_mm(indices, geometry) < midline.left_mm
    number = parts[indices]
    counts = np.bincount(number)
    share = np.bincount(number, weights=is_right) / np.maximum(counts, 1)
    centre = np.bincount(number, weights=left_mm(indices, geometry)) / np.maximum(counts, 1)
    cut = (share > _BRIDGE) & (share < 1 - _BRIDGE)
    right[indices] = np.where(cut[number], is_right, centre[number] < midline.left_mm)
    return right, merged & ~right
