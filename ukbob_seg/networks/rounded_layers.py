"""Layers under autocast on CPUs: channels last, which units for bfloat16 take as it is.

In the usual layout oneDNN copies every map before and after. Norms and transposed convolutions keep the layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUT = torch.channels_last_3d


def is_rounded(input: Tensor) -> bool:
    """Whether maps are in autocast's half precision with channels last, and no gradients are wanted."""
    return (
        torch.is_autocast_enabled("cpu")
        and not torch.is_grad_enabled()
        and input.dim() == 5
        and input.dtype == torch.get_autocast_dtype("cpu")
        and input.is_contiguous(memory_format=LAYOUT)
    )


def norm_of_one(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Instance norm of a batch of one: a batch norm, whose statistics are in float32."""
    # Without parameters in float32 the statistics would be rounded, too.
    weight = input.new_ones(input.shape[1], dtype=torch.float32) if weight is None else weight
    bias = input.new_zeros(input.shape[1], dtype=torch.float32) if bias is None else bias
    return F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)


def placed_products(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A transposed convolution whose windows lie side by side: each input voxel times the kernel; channels last."""
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
