"""The named sets of transforms, in the order in which they are applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ukbob_seg.training.augmentation.batch import Transform
from ukbob_seg.training.augmentation.flips import RandomFlip, RandomRotate90
from ukbob_seg.training.augmentation.intensity import (
    RandomBrightness,
    RandomContrast,
    RandomGamma,
    RandomIntensityScale,
    RandomIntensityShift,
    RandomLinearIntensity,
    RandomNoise,
)
from ukbob_seg.training.augmentation.mri import (
    RandomBiasField,
    RandomChannelDropout,
    RandomGhosting,
    RandomGibbs,
    long_axes,
)
from ukbob_seg.training.augmentation.resolution import RandomBlur, RandomLowResolution
from ukbob_seg.training.augmentation.spatial import RandomSpatial, SpatialSettings

FLAT_PATCH = 3  # a patch whose longest edge is more than so many times its shortest is only moved in plane
LONG_SLICE = 1.5  # a 2D patch with such a ratio of edges is turned a little only


@dataclass(frozen=True)
class AugmentationSetup:
    """What the transforms must know of the data.

    Attributes:
        patch_size: voxels (z, y, x).
        spacing_mm: (z, y, x).
        mirror_axes: axes that may be flipped.
        left_right_axis: array axis that runs left-right, or None.
        swap: table that exchanges left and right label indices, or None.
        channels: of the image.
    """

    patch_size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    left_right_axis: int | None = None
    swap: Tensor | None = None
    channels: int = 1


def make_transforms(name: str, setup: AugmentationSetup) -> list[Transform]:
    """The transforms of a named set, in order.

    ``ukbob`` is the paper's, ``strong`` nnU-Net's, ``mri`` the same with elastic deformation, shear and the faults
    of MR images; ``none`` is empty.
    """
    return {"none": lambda _: [], "ukbob": _papers, "strong": _strong, "mri": _mri}[name](setup)


def read_size(transforms: Sequence[Transform], patch_size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Voxels (z, y, x) that must be read for these transforms to end in a patch."""
    for transform in transforms:
        if isinstance(transform, RandomSpatial):
            return transform.read_size
    return patch_size


def _papers(setup: AugmentationSetup) -> list[Transform]:
    planes = [
        (a, b)
        for a, b in ((0, 1), (0, 2), (1, 2))
        if setup.patch_size[a] == setup.patch_size[b]
        and max(setup.spacing_mm[a], setup.spacing_mm[b]) < 1.1 * min(setup.spacing_mm[a], setup.spacing_mm[b])
        and not _turns_sides(setup, a, b)
    ]
    return [
        RandomFlip(setup.mirror_axes, 0.5, setup.left_right_axis, setup.swap),
        RandomRotate90(planes),
        RandomLinearIntensity(RandomIntensityScale(), RandomIntensityShift()),
    ]


def _turns_sides(setup: AugmentationSetup, a: int, b: int) -> bool:
    """Whether a turn in the plane of two axes may move labels to the other side, which no exchange of labels follows.

    Half a turn is two flips, one of them of the left-right axis; where that axis is not known, it may be any.
    """
    return setup.swap is not None and setup.left_right_axis in (a, b, None)


def _strong(setup: AugmentationSetup) -> list[Transform]:
    axes, angle = moving_axes(setup)
    return [
        RandomSpatial(setup.patch_size, setup.spacing_mm, SpatialSettings((angle,) * 3, axes=axes)),
        *_intensities(setup, axes),
        RandomFlip(setup.mirror_axes, 0.5, setup.left_right_axis, setup.swap),
    ]


def _mri(setup: AugmentationSetup) -> list[Transform]:
    axes, angle = moving_axes(setup)
    nodes_mm = max(setup.patch_size[a] * setup.spacing_mm[a] for a in axes) / 4
    spatial = SpatialSettings(  # four spans of a spline across the patch, far from folding
        (angle,) * 3,
        axes=axes,
        p_shear=0.1,
        p_elastic=0.1,
        elastic_mm=(0.0, 0.3 * nodes_mm),
        elastic_spacing_mm=nodes_mm,
    )
    fourier_axes = long_axes(setup.patch_size)
    return [
        RandomSpatial(setup.patch_size, setup.spacing_mm, spatial),
        RandomBiasField(setup.patch_size),
        RandomGhosting(fourier_axes),
        RandomGibbs(fourier_axes),
        *_intensities(setup, axes),
        RandomChannelDropout(setup.channels),
        RandomFlip(setup.mirror_axes, 0.5, setup.left_right_axis, setup.swap),
    ]


def _intensities(setup: AugmentationSetup, axes: tuple[int, ...]) -> list[Transform]:
    """nnU-Net's, with its order and probabilities (the defaults of the classes)."""
    c = setup.channels
    return [
        RandomNoise(),
        RandomBlur(c),
        RandomBrightness(c),
        RandomContrast(c),
        RandomLowResolution(c, axes),
        RandomGamma(c, probability=0.1, inverted=True),
        RandomGamma(c, probability=0.3),
    ]


def moving_axes(setup: AugmentationSetup) -> tuple[tuple[int, ...], float]:
    """Axes along which voxels may move, and the largest angle in degrees; nnU-Net's rules.

    All axes and 30 degrees; in the plane of a flat patch any angle; in a slice any angle, or 15 degrees when one edge
    is more than 1.5 times the other. Where labels have a left and a right and the left-right axis lies in that plane
    (or is not known), at most 30 degrees: half a turn is the same as two flips, one of which would exchange the labels.
    """
    size, spacing = setup.patch_size, setup.spacing_mm
    if min(size) > 1 and max(size) <= FLAT_PATCH * min(size):
        return (0, 1, 2), 30.0
    normal = min(range(3), key=lambda axis: (size[axis], -spacing[axis]))
    axes = tuple(axis for axis in range(3) if axis != normal)
    edges = [size[axis] for axis in axes]
    angle = 15.0 if size[normal] == 1 and max(edges) > LONG_SLICE * min(edges) else 180.0
    if setup.swap is not None and setup.left_right_axis != normal:
        angle = min(angle, 30.0)
    return axes, angle
