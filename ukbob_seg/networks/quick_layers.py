"""Layers that PyTorch computes slowly on CPUs, done quicker where no gradients are wanted: the same values.

Instance norm is done by PyTorch as a batch norm of one map after the other, on one core; as a group norm of single
channels it takes a sixth of the time (of maps in the usual layout, where that is as exact). A transposed convolution
whose windows do not overlap, as decoders have it, is a matrix product; oneDNN's result has another layout, and copying
that takes as long again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ukbob_seg.networks.channels_last import is_quick, mean_of_blocks, normalised, normalised_batch, placed_products


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.instance_norm``."""
    if (
        running_mean is None
        and running_var is None
        and use_input_stats
        and not torch.is_grad_enabled()
        and input.dim() > 2
        and input.shape[2:].numel() > 1  # of a single value PyTorch refuses to take statistics
    ):
        if _is_plain(input):
            return F.group_norm(input, input.shape[1], weight, bias, eps)
        if is_quick(input):
            return normalised(input, weight, bias, eps)
    return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm``: exact statistics also of maps with channels last."""
    kept = None if running_mean is None or running_var is None else (running_mean, running_var)
    several = input.numel() > max(1, input.shape[1])  # of a single value PyTorch refuses to take statistics
    if training and several and is_quick(input) and not input.is_contiguous() and (kept or running_mean is None):
        return normalised_batch(input, kept, weight, bias, momentum, eps)
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """``torch.conv_transpose2d`` or ``torch.conv_transpose3d``, as the weight has axes."""
    call = torch.conv_transpose3d if weight.dim() == 5 else torch.conv_transpose2d
    if weight_learns_in_half(weight):
        return in_float32(call, input, weight, bias, stride, padding, output_padding, groups, dilation)
    if (
        groups == 1
        and not torch.is_grad_enabled()
        and input.dim() == 5
        and weight.dtype == torch.float32
        and input.shape[1] == weight.shape[0]
        and _all(stride, weight.shape[2:])
        and _all(padding, (0, 0, 0))
        and _all(output_padding, (0, 0, 0))
        and _all(dilation, (1, 1, 1))
    ):
        if _is_plain(input):
            return _placed_products(input, weight, bias)
        if is_quick(input):
            return placed_products(input, weight, bias)
    return call(input, weight, bias, stride, padding, output_padding, groups, dilation)


def weight_learns_in_half(weight: Tensor) -> bool:
    """Whether oneDNN would be asked for the gradient of a weight in half precision: of maps narrower than the kernel
    it is made of memory that was never written (seen in PyTorch 2.13).
    """
    wants = torch.is_grad_enabled() and weight.requires_grad and weight.dtype == torch.float32
    return wants and torch.is_autocast_enabled("cpu")


def in_float32(call: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """A convolution of ``call`` in float32, whose result is rounded as autocast has it."""
    half = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        wide = None if bias is None else bias.float()
        return call(input.float(), weight.float(), wide, *rest).to(half)


def average_pool(
    input: Tensor,
    kernel_size: int | list[int] | tuple[int, ...],
    stride: int | list[int] | tuple[int, ...] | None = None,
    padding: int | list[int] | tuple[int, ...] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``torch.nn.functional.avg_pool3d``."""
    blocks = [kernel_size] if isinstance(kernel_size, int) else list(kernel_size)
    blocks = blocks * 3 if len(blocks) == 1 else blocks
    if (
        is_quick(input)
        and len(blocks) == 3
        and (not stride or _all(stride, blocks))
        and _all(padding, (0, 0, 0))
        and divisor_override is None
        and not any(size % block for size, block in zip(input.shape[2:], blocks, strict=True))
    ):
        return mean_of_blocks(input, blocks)
    return F.avg_pool3d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _is_plain(input: Tensor) -> bool:
    return input.dtype == torch.float32 and input.is_contiguous() and not torch.is_autocast_enabled("cpu")


def _all(given: int | Sequence[int], wanted: Sequence[int]) -> bool:
    values = [given] if isinstance(given, int) else list(given)
    return (values * 3 if len(values) == 1 else values) == list(wanted)


def _placed_products(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each input voxel times the kernel, beside each other."""
    batch, channels, z, y, x = image.shape
    outputs, (a, b, c) = weight.shape[1], weight.shape[2:]
    rows = weight.permute(1, 2, 3, 4, 0).reshape(outputs * a * b * c, channels)
    voxels, rows = image.view(batch, channels, z * y * x), rows.expand(batch, -1, -1)
    if bias is None:
        products = torch.bmm(rows, voxels)
    else:
        products = torch.baddbmm(bias.repeat_interleave(a * b * c).unsqueeze(1), rows, voxels)
    result = image.new_empty(batch, outputs, z * a, y * b, x * c)
    placed = products.view(batch, outputs, a, b, c, z, y, x).permute(0, 1, 5, 2, 6, 3, 7, 4)
    result.view(batch, outputs, z, a, y, b, x, c).copy_(placed)
    return result
