"""Layers under autocast on CPUs, where no gradients are wanted: channels last, which bfloat16's units take as it is.

In the usual layout oneDNN copies every map before and after. Norms and transposed convolutions keep the layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ukbob_seg.networks.quick_layers import fits_blocks

LAYOUT = torch.channels_last_3d


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
    """``torch.nn.functional.instance_norm``; of one element it is a batch norm, whose statistics are in float32."""
    if (
        running_mean is None
        and running_var is None
        and use_input_stats
        and input.dim() == 5
        and len(input) == 1
        and input[0, :1].numel() > 1
        and input.dtype == torch.get_autocast_dtype("cpu")
        and input.is_contiguous(memory_format=LAYOUT)
    ):
        # Without parameters in float32 the statistics would be rounded, too.
        weight = input.new_ones(input.shape[1], dtype=torch.float32) if weight is None else weight
        bias = input.new_zeros(input.shape[1], dtype=torch.float32) if bias is None else bias
        return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)
    return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


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
    """``torch.conv_transpose3d``; a matrix product where its windows do not overlap."""
    half = torch.get_autocast_dtype("cpu")
    if (
        groups == 1
        and input.dim() == 5
        and input.dtype == half
        and input.shape[1] == weight.shape[0]
        and input.is_contiguous(memory_format=LAYOUT)
        and fits_blocks(weight, stride, padding, output_padding, dilation)
    ):
        return _placed_products(input, weight.to(half), None if bias is None else bias.to(half))
    return torch.conv_transpose3d(input, weight, bias, stride, padding, output_padding, groups, dilation)


def _placed_products(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each input voxel times the kernel, beside each other; channels last."""
    batch, channels, z, y, x = image.shape
    outputs, (a, b, c) = weight.shape[1], weight.shape[2:]
    columns = weight.permute(0, 2, 3, 4, 1).reshape(channels, a * b * c * outputs)
    voxels = image.permute(0, 2, 3, 4, 1).reshape(-1, channels)
    products = voxels @ columns if bias is None else torch.addmm(bias.repeat(a * b * c), voxels, columns)
    result = image.new_empty(batch, z * a, y * b, x * c, outputs)
    placed = products.view(batch, z, y, x, a, b, c * outputs).permute(0, 1, 4, 2, 5, 3, 6)
    result.view(batch, z, a, y, b, x, c * outputs).copy_(placed)
    return result.permute(0, 4, 1, 2, 3)
