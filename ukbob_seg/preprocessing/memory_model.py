"""How much memory a training step takes, by network and size; checked by benchmarks/memory_model.py.

The peak is what the backward pass needs: values that the forward pass keeps, counted layer by layer, four copies of
the weights, some copies of the logits, and a base that does not grow. The constants are fitted to measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GIB = 2**30
FLOAT = 4
STATES_PER_WEIGHT = 4  # value, gradient, and two AdamW moments


@dataclass(frozen=True)
class Constants:
    """Of one network on one kind of device.

    Attributes:
        base_gb: interpreter, torch, workspace, and what the allocator cannot reuse.
        per_value: float32 values held per value that the forward pass keeps.
        per_output: float32 values held per voxel and network output: logits, their gradient, the loss.
        per_voxel: float32 values held per voxel whatever the width.
    """

    base_gb: float
    per_value: float
    per_output: float
    per_voxel: float = 0.0


SWIN_VALUES = 24.0  # kept per input voxel and unit of feature size, half of them at full resolution
# On the CPU a whole ukbob_train: its process grows a little for hundreds of steps. It computes cheap maps twice.
SWIN_CPU = Constants(base_gb=1.25, per_value=0.7, per_output=4.0)
# bfloat16, but more copies. Attention with fewer than 16 channels per head (feature sizes below 48) is not fused on
# CUDA and keeps its matrices; on the CPU they are recomputed.
SWIN_CUDA = Constants(base_gb=0.6, per_value=40 / SWIN_VALUES, per_output=7.0)
SWIN_CUDA_UNFUSED = Constants(base_gb=0.6, per_value=40 / SWIN_VALUES, per_output=7.0, per_voxel=800.0)
SWIN_FUSED_FEATURE_SIZE = 48
CONV = Constants(base_gb=0.95, per_value=1.2, per_output=4.0)  # measured on the CPU only


def swin_unetr_memory_gb(
    patch: tuple[int, int, int],
    batch: int,
    feature_size: int,
    in_channels: int,
    out_channels: int,
    device: str | None = None,
) -> float:
    """Peak memory of a Swin-UNETR training step, GiB.

    Without deep supervision, which no plan has unless edited; its outputs take a seventh of what the logits take.

    Args:
        patch: voxels (z, y, x).
        batch: patches per step.
        feature_size: channels of the first stage.
        in_channels: image channels.
        out_channels: network outputs.
        device: ``cpu`` or ``cuda``; None for the one that needs more, since plans are carried between machines.
    """
    if device is None:
        sizes = (patch, batch, feature_size, in_channels, out_channels)
        return max(swin_unetr_memory_gb(*sizes, device="cpu"), swin_unetr_memory_gb(*sizes, device="cuda"))
    constants = SWIN_CUDA if feature_size >= SWIN_FUSED_FEATURE_SIZE else SWIN_CUDA_UNFUSED
    weights = 27_000.0 * feature_size**2  # 62.2 M at feature size 48; all large layers grow with its square
    kept = SWIN_VALUES * feature_size
    return peak_gb(SWIN_CPU if device == "cpu" else constants, weights, patch, batch, kept, in_channels, out_channels)


def plain_conv_unet_memory_gb(
    patch: Sequence[int],
    batch: int,
    strides: Sequence[Sequence[int]],
    features: Sequence[int],
    in_channels: int,
    out_channels: int,
    residual_blocks: Sequence[int] | None = None,
) -> float:
    """Peak memory of a training step of nnU-Net's U-Nets with deep supervision, GiB; arguments as above.

    Strides of two axes mean a 2D network, whose kernels have 9 weights instead of 27; its patch is one voxel thick.

    Args:
        patch: see above.
        batch: see above.
        strides: per stage.
        features: channels per stage.
        in_channels: see above.
        out_channels: see above.
        residual_blocks: per encoder stage, for ``residual_encoder_unet`` with one convolution per decoder stage; None
            for ``plain_conv_unet`` with two per stage on both sides.
    """
    kernel, doubling = 3.0 ** len(strides[0]), 2.0 ** len(strides[0])
    share, kept, outputs, weights = 1.0, 0.0, 0.0, 0.0
    last, before = len(features) - 1, in_channels
    for stage, (stride, width) in enumerate(zip(strides, features, strict=True)):
        share /= float(np.prod(stride))
        # A convolution keeps its output and the normalised one; the decoder's input is a concatenation of two maps.
        if residual_blocks is None:
            encoder, decoder, small = 2, 2, 0
        else:  # a block has two convolutions; in front there is a stem, later a 1x1x1 projection of the shortcut
            encoder, decoder, small = 2 * residual_blocks[stage] + 1, 1, int(stage > 0)
        kept += 2 * (encoder + (decoder + 1 if stage < last else 0)) * width * share
        weights += kernel * width * (before + (encoder - small - 1) * width)
        if stage < last:
            outputs += out_channels * share
            weights += kernel * (decoder + 1) * width**2 + doubling * width * features[stage + 1]
        before = width
    return peak_gb(CONV, weights, patch, batch, kept, in_channels, outputs)


def peak_gb(
    constants: Constants,
    weights: float,
    patch: Sequence[int],
    batch: int,
    kept: float,
    in_channels: int,
    outputs: float,
) -> float:
    """Peak memory of a training step, GiB, from what is counted of a network.

    Args:
        constants: of the kind of network and device.
        weights: parameters.
        patch: voxels per axis.
        batch: patches per step.
        kept: values that the forward pass keeps, per input voxel.
        in_channels: image channels.
        outputs: values of all outputs, per input voxel.
    """
    held = constants.per_value * kept + constants.per_output * outputs + constants.per_voxel + 2 * in_channels
    return constants.base_gb + FLOAT * (STATES_PER_WEIGHT * weights + batch * float(np.prod(patch)) * held) / GIB
