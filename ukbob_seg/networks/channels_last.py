"""Layers of maps whose channels lie together in memory (channels last), on CPUs where no gradients are wanted.

oneDNN takes and gives such maps as they are, in float32 and in the half precision of autocast, where in the usual
layout it copies every map before and after. The layers here keep the layout; PyTorch's own either do not, or add up in
float32 one value after the other, which is wrong by 1e-3 for 128^3 voxels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYOUT = torch.channels_last_3d
HALF = frozenset({torch.bfloat16, torch.float16})
KNOWN_PACKAGES = ("torch", "ukbob_seg", "monai", "einops", "dynamic_network_architectures")  # take either layout
FAR = 16.0  # standard deviations from 0 to the mean: beyond, the mean is taken off first
MANY_CHANNELS = 32  # from here on copying matrices is quicker


def has_channels_last(x: Tensor) -> bool:
    """Whether the channels of a voxel of (B, C, d, h, w) lie together, so that voxels are the rows of a matrix."""
    return x.is_contiguous(memory_format=LAYOUT)


def working_type() -> torch.dtype:
    """In which type convolutions on CPUs compute just now: autocast's, or float32."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def with_channels_last(x: Tensor) -> Tensor:
    """The map in this layout; also one of a single channel says so, which for PyTorch has either."""
    x = x.contiguous(memory_format=LAYOUT)
    _, channels, depth, height, width = x.shape
    if channels > 1:
        return x
    return x.as_strided(x.shape, (depth * height * width, 1, height * width, width, 1))


def with_channels_first(x: Tensor) -> Tensor:
    """The map in PyTorch's usual layout, in which sums of windows are held; many channels in blocks."""
    channels = x.shape[1]
    if channels < MANY_CHANNELS or not has_channels_last(x):
        return x.contiguous()
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for sample, target in zip(x.permute(0, 2, 3, 4, 1).flatten(1, 3), result, strict=True):
        target.view(channels, -1).copy_(sample.t())  # of a matrix PyTorch takes blocks that the cache holds
    return result


def is_quick(input: Tensor) -> bool:
    """Whether maps are as the layers of this module take them, and no gradients are wanted."""
    return (
        not torch.is_grad_enabled()
        and input.device.type == "cpu"
        and input.dim() == 5
        and input.dtype == working_type()
        and has_channels_last(input)
    )


def types_with_channels_last(network: nn.Module) -> frozenset[torch.dtype]:
    """In which types the maps of a network may have their channels last.

    None where somebody else wrote a part of it, who may ask for a view of the usual layout; with group norms not
    float32, in which PyTorch's kernel for them is not exact.
    """
    layers = list(network.modules())
    if not all(type(layer).__module__.partition(".")[0] in KNOWN_PACKAGES for layer in layers):
        return frozenset()
    return HALF if any(isinstance(layer, nn.GroupNorm) for layer in layers) else HALF | {torch.float32}


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every map of (B, C, d, h, w) with channels last: (B, C) float64 each.

    The voxels of a row along w are statistics of their own first, so that float32 adds up a d h-th part of them one
    after the other, and lanes that all lie together; all rows' statistics are joined in float64.
    """
    _, channels, depth, height, width = x.shape
    means, variances = [], []
    for sample in x.permute(0, 2, 3, 4, 1):
        lanes = sample.reshape(depth * height, width * channels)
        running = torch.zeros(width * channels)  # of float32, so that statistics of half precision are, too
        mean, variance = torch.batch_norm_update_stats(lanes, running, running.clone(), 0.0)
        mean, variance = mean.view(width, channels).double(), variance.view(width, channels).double()
        means.append(mean.mean(0))
        variances.append((variance + (mean - means[-1]).square()).mean(0))
    return torch.stack(means), torch.stack(variances)


def normalised(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Instance norm; the same layout and type."""
    mean, variance = statistics(input)
    scale = (variance + eps).rsqrt()
    if input.dtype == torch.float32 and (mean.abs() * scale).max() > FAR:
        input, mean = input - mean.float()[:, :, None, None, None], torch.zeros_like(mean)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    scale, shift = (each.float()[:, :, None, None, None] for each in (scale, shift))
    if input.dtype == torch.float32:
        return torch.addcmul(shift, input, scale)
    channels = input.shape[1]
    zero, one = torch.zeros(channels), torch.ones(channels)
    parts = [  # rounded once, in one pass
        F.batch_norm(part, zero, one, factor.flatten(), offset.flatten(), False, 0.0, 0.0)
        for part, factor, offset in zip(input.split(1), scale, shift, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def normalised_batch(
    input: Tensor,
    running: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch norm by the batch's own statistics, which go into the ``running`` mean and variance; the same layout."""
    means, variances = statistics(input)
    mean = means.mean(0)
    variance = (variances + (means - mean).square()).mean(0)
    if running is not None:
        count = input.numel() // input.shape[1]
        for kept, new in zip(running, (mean, variance * (count / (count - 1))), strict=True):
            kept.lerp_(new.to(kept.dtype), momentum)
    return F.batch_norm(input, mean.float(), variance.float(), weight, bias, False, 0.0, eps)


def mean_of_blocks(input: Tensor, blocks: Sequence[int]) -> Tensor:
    """Average of blocks (d, h, w) of voxels that lie side by side and fill the map; the same layout and type."""
    batch, channels, depth, height, width = input.shape
    planes = input.permute(0, 2, 1, 3, 4).reshape(batch * depth, channels, height, width)  # a view
    planes = F.avg_pool2d(planes, tuple(blocks[1:])).permute(0, 2, 3, 1)
    first, *others = planes.unflatten(0, (batch, depth // blocks[0], blocks[0])).unbind(2)
    for other in others:
        first = first + other
    return (first / blocks[0] if others else first).permute(0, 4, 1, 2, 3)


def placed_products(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A transposed convolution whose windows lie side by side: each input voxel times the kernel."""
    batch, channels, z, y, x = image.shape
    outputs, (a, b, c) = weight.shape[1], weight.shape[2:]
    columns = weight.permute(0, 2, 3, 4, 1).reshape(channels, a * b * c * outputs).to(image.dtype)
    voxels = image.permute(0, 2, 3, 4, 1).reshape(-1, channels)
    if bias is None:
        products = voxels @ columns
    else:
        products = torch.addmm(bias.repeat(a * b * c).to(image.dtype), voxels, columns)
    result = image.new_empty(batch, z * a, y * b, x * c, outputs)
    placed = products.view(batch, z, y, x, a, b, c * outputs).permute(0, 1, 4, 2, 5, 3, 6)
    result.view(batch, z, a, y, b, x, c * outputs).copy_(placed)
    return result.permute(0, 4, 1, 2, 3)
