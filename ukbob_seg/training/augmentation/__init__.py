"""Batch augmentation on the device: each transform first samples its parameters, then applies them.

The random foreground crop that belongs to every set is the patch sampler's (``sampling.py``).
"""

from ukbob_seg.training.augmentation.batch import Batch, Transform, augment
from ukbob_seg.training.augmentation.flips import FlipRecord, RandomFlip, RandomRotate90, Rotate90Record
from ukbob_seg.training.augmentation.intensity import (
    ChannelRecord,
    IntensityRecord,
    NoiseRecord,
    RandomBrightness,
    RandomContrast,
    RandomGamma,
    RandomIntensityScale,
    RandomIntensityShift,
    RandomLinearIntensity,
    RandomNoise,
)
from ukbob_seg.training.augmentation.mri import (
    BiasFieldRecord,
    ChannelDropoutRecord,
    FourierRecord,
    RandomBiasField,
    RandomChannelDropout,
    RandomGhosting,
    RandomGibbs,
)
from ukbob_seg.training.augmentation.resolution import AxesRecord, RandomBlur, RandomLowResolution
from ukbob_seg.training.augmentation.sets import AugmentationSetup, make_transforms, moving_axes, read_size
from ukbob_seg.training.augmentation.spatial import RandomSpatial, SpatialRecord, SpatialSettings, rotation_matrix

__all__ = [
    "AugmentationSetup",
    "AxesRecord",
    "Batch",
    "BiasFieldRecord",
    "ChannelDropoutRecord",
    "ChannelRecord",
    "FlipRecord",
    "FourierRecord",
    "IntensityRecord",
    "NoiseRecord",
    "RandomBiasField",
    "RandomBlur",
    "RandomBrightness",
    "RandomChannelDropout",
    "RandomContrast",
    "RandomFlip",
    "RandomGamma",
    "RandomGhosting",
    "RandomGibbs",
    "RandomIntensityScale",
    "RandomIntensityShift",
    "RandomLinearIntensity",
    "RandomLowResolution",
    "RandomNoise",
    "RandomRotate90",
    "RandomSpatial",
    "Rotate90Record",
    "SpatialRecord",
    "SpatialSettings",
    "Transform",
    "augment",
    "make_transforms",
    "moving_axes",
    "read_size",
    "rotation_matrix",
]
