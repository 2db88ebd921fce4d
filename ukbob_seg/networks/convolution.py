"""Convolutions of windows on CPUs: small ones by oneDNN as large ones are, and not those that it does wrongly.

PyTorch gives 3D convolutions of float32 to oneDNN, but for one exception that meets every small patch and the deep
stages of others: a single map whose channels x depth x height do not exceed 20,480 (``use_mkldnn`` in
aten/src/ATen/native/Convolution.cpp). Its own kernel takes up to fifteen times as long.

In bfloat16, where a stride leaves a map one voxel wide, oneDNN's kernel for AMX (seen in PyTorch 2.13) multiplies by
zero what was never written, and that may happen to be infinite or no number.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ukbob_seg.networks.channels_last import HALF, LAYOUT, types_with_channels_last, with_channels_last
from ukbob_seg.networks.quick_layers import (
    average_pool,
    batch_norm,
    in_float32,
    instance_norm,
    transposed_convolution,
    weight_learns_in_half,
)

MOST_ROWS = 20_480  # up to this PyTorch does not ask oneDNN
# Of the output; below, oneDNN is no quicker: with gradients, and without.
LEAST_VOXELS = 512
LEAST_WITHOUT_GRADIENTS = 64
_OPEN = threading.local()  # ``quick``: of the innermost context of this thread


def quick_convolutions(device: torch.device, network: nn.Module | None = None) -> AbstractContextManager[Any]:
    """While the context is open, ``conv3d`` of one small float32 map is done by oneDNN; nothing changes on a GPU.

    Without gradients the layers of ``quick_layers`` are quick as well, and maps have their channels last, if the
    network can do with that. For networks called as they are, with or without gradients; not for calls of
    ``torch.compile``.

    Args:
        device: of the maps.
        network: that is called; with None only maps in half precision get their channels last.
    """
    wanted = torch.backends.mkldnn.is_available() and getattr(torch.backends.mkldnn, "enabled", True)
    if device.type != "cpu" or not wanted:
        return nullcontext()
    return _QuickConvolutions(_layers(HALF if network is None else types_with_channels_last(network)))


def same_layers_again() -> Callable[[], AbstractContextManager[Any]] | None:
    """What opens the context of now once more, for maps that the backward pass computes again; None where none is open.

    When that pass comes, the context may be closed, and PyTorch's own layers may return other types of maps.
    """
    quick = getattr(_OPEN, "quick", None)
    return None if quick is None else lambda: _QuickConvolutions(quick)


class _QuickConvolutions(TorchFunctionMode):
    """Sees every call of a PyTorch function in this thread; ``quick`` has those that are done otherwise."""

    def __init__(self, quick: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._quick = quick

    def __enter__(self) -> Self:
        self._before = getattr(_OPEN, "quick", None)
        _OPEN.quick = self._quick
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _OPEN.quick = self._before
        super().__exit__(*exception)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._quick.get(func, func)(*args, **(kwargs or {}))


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    types: Container[torch.dtype] = HALF,
) -> Tensor:
    """``torch.conv2d`` or ``torch.conv3d``, as the weight has axes; maps of these types get their channels last."""
    axes = weight.dim() - 2
    call = torch.conv3d if axes == 3 else torch.conv2d
    half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    if weight_learns_in_half(weight):
        return in_float32(call, input, weight, bias, stride, padding, dilation, groups)
    if groups == 1 and not isinstance(padding, str) and input.dim() == weight.dim():
        steps, margins, spread = (_of_axes(value, axes) for value in (stride, padding, dilation))
        if half is not None and _leaves_one_column(input, weight, steps, margins, spread):
            return in_float32(call, input, weight, bias, steps, margins, spread)
        last = torch.float32 in types and not torch.is_grad_enabled()
        if axes == 3 and half is None and last and input.dtype == torch.float32:
            input = with_channels_last(input)
        if axes == 3 and half is None and _is_left_out(input, weight, steps, margins, spread, last):
            if torch.is_grad_enabled():
                return _Convolution.apply(input, weight, bias, steps, margins, spread)
            return torch.mkldnn_convolution(input, weight, bias, margins, steps, spread, 1)
        if axes == 3 and half in types and not torch.is_grad_enabled() and min(weight.shape[:2]) > 1:
            input = input.to(half).contiguous(memory_format=LAYOUT)
    return call(input, weight, bias, stride, padding, dilation, groups)


def _of_axes(value: int | Sequence[int], axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _width(count: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Voxels of the output along an axis."""
    return max(0, (count + 2 * padding - dilation * (kernel - 1) - 1) // max(1, stride) + 1)


def _leaves_one_column(
    image: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> bool:
    """Whether an output of this strided convolution is one voxel wide, which oneDNN does wrongly in bfloat16."""
    return stride[-1] > 1 and _width(image.shape[-1], weight.shape[-1], stride[-1], padding[-1], dilation[-1]) == 1


def _is_left_out(
    image: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], last: bool
) -> bool:
    """Whether oneDNN is not asked, but would be quicker; of single voxels with ``last`` only, else they are a matrix
    product, and on one thread PyTorch never asks it for them.
    """
    _, channels, depth, height, _ = image.shape
    kernel = weight.shape[2:]
    is_point = kernel.numel() == 1
    voxels = 1
    for n, k, s, p, d in zip(image.shape[2:], kernel, stride, padding, dilation, strict=True):
        voxels *= _width(n, k, s, p, d)
    return (
        image.shape[0] == 1
        and (channels * depth * height <= MOST_ROWS or is_point)
        and (last or not is_point)
        and image.dtype == weight.dtype == torch.float32
        and weight.shape[1] == channels
        and not (kernel[1] > 3 and kernel[2] > 3)
        and voxels >= (LEAST_VOXELS if torch.is_grad_enabled() else LEAST_WITHOUT_GRADIENTS)
        and min(stride) >= 1
    )


class _Convolution(torch.autograd.Function):
    """The gradient of the image is a convolution too; that of the weights is left to PyTorch."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> Tensor:
        ctx.save_for_backward(image, weight)
        ctx.shape = stride, padding, dilation
        return torch.mkldnn_convolution(image, weight, bias, padding, stride, dilation, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.shape
        wanted = list(ctx.needs_input_grad[:3])
        of_image = None
        margins = [d * (k - 1) - p for k, p, d in zip(weight.shape[2:], padding, dilation, strict=True)]
        if wanted[0] and stride == [1, 1, 1] and min(margins) >= 0:
            turned = weight.flip(2, 3, 4).transpose(0, 1).contiguous()
            of_image = torch.mkldnn_convolution(gradient, turned, None, margins, stride, dilation, 1)
            wanted[0] = False
        rest: Sequence[Tensor | None] = (None, None, None)
        if any(wanted):
            rest = torch.ops.aten.convolution_backward(
                gradient, image, weight, [len(weight)], stride, padding, dilation, False, [0, 0, 0], 1, wanted
            )
        return (of_image if of_image is not None else rest[0]), rest[1], rest[2], None, None, None


_Layers = dict[Callable[..., Any], Callable[..., Any]]
_QUICK: _Layers = {
    torch.conv2d: _convolution,
    torch.conv_transpose2d: transposed_convolution,
    torch.conv_transpose3d: transposed_convolution,
    F.instance_norm: instance_norm,
    F.batch_norm: batch_norm,
    F.avg_pool3d: average_pool,
}


@functools.cache
def _layers(types: frozenset[torch.dtype]) -> _Layers:
    """What is done otherwise, where maps of these types get their channels last."""
    return {**_QUICK, torch.conv3d: functools.partial(_convolution, types=types)}
