"""How much memory a training step takes, by network and size; checked by benchmarks/memory_model.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GIB = 2**30
BASE_GB = 0.6  # interpreter, torch and its thread pools
FLOAT = 4
STATES_PER_WEIGHT = 4  # value, gradient, and two AdamW moments

# Float32 values held per input voxel of a patch, per unit of feature size / per output class.
SWIN_PER_FEATURE = 40.0
# Attention with fewer than 16 channels per head (feature sizes below 48) is not fused on CUDA and keeps its matrices;
# on the CPU they are recomputed, so that the model errs on the high side there.
SWIN_UNFUSED_ATTENTION = 800.0
SWIN_FUSED_FEATURE_SIZE = 48
SWIN_PER_OUTPUT = 7.0
CONV_PER_FEATURE = 3.2
CONV_PER_OUTPUT = 7.0


def swin_unetr_memory_gb(
    patch: tuple[int, int, int], batch: int, feature_size: int, in_channels: int, out_channels: int
) -> float:
    """Peak memory of a Swin-UNETR training step, GiB.

    Args:
        patch: voxels (z, y, x).
        batch: patches per step.
        feature_size: channels of the first stage.
        in_channels: image channels.
        out_channels: network outputs.
    """
    weights = 27_000 * feature_size**2  # 62.2 M at feature size 48; all large layers grow with its square
    voxels = batch * float(np.prod(patch))
    per_voxel = SWIN_PER_FEATURE * feature_size + SWIN_PER_OUTPUT * out_channels + 2 * in_channels
    if feature_size < SWIN_FUSED_FEATURE_SIZE:
        per_voxel += SWIN_UNFUSED_ATTENTION
    return BASE_GB + FLOAT * (STATES_PER_WEIGHT * weights + voxels * per_voxel) / GIB


def plain_conv_unet_memory_gb(
    patch: Sequence[int],
    batch: int,
    strides: Sequence[Sequence[int]],
    features: Sequence[int],
    in_channels: int,
    out_channels: int,
) -> float:
    """Peak memory of a PlainConvUNet training step with deep supervision, GiB; arguments as above, per stage.

    Strides of two axes mean a 2D network, whose kernels have 9 weights instead of 27; its patch is one voxel thick.
    """
    kernel = 3.0 ** len(strides[0])
    voxels, shrink = batch * float(np.prod(patch)), 1.0
    held, weights = 2.0 * in_channels, 0.0
    for stage, (stride, width) in enumerate(zip(strides, features, strict=True)):
        shrink /= float(np.prod(stride))
        convolutions = 2 if stage == len(features) - 1 else 5  # encoder 2, decoder 2 and the concatenated input
        held += CONV_PER_FEATURE * convolutions * width * shrink
        held += CONV_PER_OUTPUT * out_channels * shrink if stage < len(features) - 1 else 0.0
        weights += kernel * width * width * (convolutions + 1)
    return BASE_GB + FLOAT * (STATES_PER_WEIGHT * weights + voxels * held) / GIB
