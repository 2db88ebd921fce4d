"""Instance normalisation of maps whose channels lie together in memory (channels last), on CPUs.

PyTorch has no kernel for it: it copies into another layout, or, as a group norm of single channels, adds up squares in
float32 one after the other, which is wrong by 1e-3 for 96^3 voxels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ukbob_seg.networks.channels_last import LAYOUT, has_channels_last, is_quick, normalised


class InstanceNorm(nn.InstanceNorm3d):
    """``nn.InstanceNorm3d`` without running statistics, quick in both layouts."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, d, h, w) -> the same shape and layout."""
        if x.is_cuda or x.dtype not in (torch.float32, torch.float64) or not has_channels_last(x):
            return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        if is_quick(x) and not torch.compiler.is_compiling():
            return normalised(x, self.weight, self.bias, self.eps)
        return _Normalise.apply(x, self.weight, self.bias, self.eps)


class _Normalise(torch.autograd.Function):
    """Statistics by matrix products, of the map less its mean; the gradient likewise.

    The difference of mean square and squared mean would save a pass, but has no digits left where the mean is a hundred
    standard deviations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        count = x[0, 0].numel()
        mean = _sums(x) / count
        result = x - _per_channel(mean, x)
        deviation = (_products(result, result) / count + eps).sqrt()
        scale = 1 / deviation if weight is None else weight / deviation
        ctx.save_for_backward(x, weight, mean, deviation)
        result.mul_(_per_channel(scale, x))
        return result if bias is None else result.add_(bias[:, None, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, deviation = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=LAYOUT)
        count = x[0, 0].numel()
        of_shift = _sums(gradient)
        result = x - _per_channel(mean, x)
        of_scale = _products(gradient, result) / deviation  # of the normalised map
        # scale * (gradient - mean gradient - normalised map * its mean product with the gradient)
        scale = 1 / deviation if weight is None else weight / deviation
        result.mul_(_per_channel(-scale * of_scale / (count * deviation), x)).sub_(
            _per_channel(scale * of_shift / count, x)
        )
        result.addcmul_(gradient, _per_channel(scale, x))
        if weight is None:
            return result, None, None, None
        return result, of_scale.sum(dim=0).to(weight.dtype), of_shift.sum(dim=0).to(weight.dtype), None


def _rows(x: Tensor) -> Tensor:
    """(B, C, d, h, w) with channels last -> (B, d, h w, C), a view."""
    return x.permute(0, 2, 3, 4, 1).flatten(2, 3)


def _sums(x: Tensor) -> Tensor:
    """(B, C) float64 sums over voxels; slices are added up in float32."""
    return _rows(x).sum(dim=2).sum(dim=1, dtype=torch.float64)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """(B, C) float64 sums of x y over voxels.

    The diagonal of a product of matrices, most of which is thrown away: at the memory's speed, where sums of products
    by channel take three to five times as long.
    """
    a, b = _rows(x).flatten(0, 1), _rows(y).flatten(0, 1)  # (B d, h w, C)
    products = torch.bmm(a.transpose(1, 2), b).flatten(1)
    diagonal = products[:, :: a.shape[-1] + 1]  # not diagonal(), at which the compiler warns
    return diagonal.unflatten(0, (len(x), -1)).sum(dim=1, dtype=torch.float64)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """(B, C) -> (B, C, 1, 1, 1) of the map's type."""
    return values.to(like.dtype)[:, :, None, None, None]
