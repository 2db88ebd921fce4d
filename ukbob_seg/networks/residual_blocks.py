"""The convolutional half of Swin-UNETR: residual blocks, upsampling and the projection to the outputs.

Names of submodules are MONAI's, so that state dicts agree. On a CPU, where maps have their channels last, the same
numbers are computed along shorter ways; CUDA takes the plain ones.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ukbob_seg.networks.channels_last import has_channels_last
from ukbob_seg.networks.instance_norm import InstanceNorm
from ukbob_seg.networks.recompute import recomputed

NEGATIVE_SLOPE = 0.01


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions with InstanceNorm; the shortcut is a normalised 1x1x1 convolution where widths differ."""

    def __init__(self, in_channels: int, out_channels: int, norm_affine: bool) -> None:
        super().__init__()
        self.conv1 = named(nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False))
        self.conv2 = named(nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False))
        self.norm1 = InstanceNorm(out_channels, affine=norm_affine)
        self.norm2 = InstanceNorm(out_channels, affine=norm_affine)
        self.has_projection = in_channels != out_channels
        if self.has_projection:
            self.conv3 = named(nn.Conv3d(in_channels, out_channels, 1, bias=False))
            self.norm3 = InstanceNorm(out_channels, affine=norm_affine)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, d, h, w) -> (B, out, d, h, w)."""
        shortcut = recomputed(lambda x: self.norm3(self.conv3(x)), x) if self.has_projection else x
        return self.after_first(self.conv1(x), shortcut)

    def after_first(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """The rest of the block, from the first convolution's result and the normalised (or plain) shortcut."""
        x = recomputed(self._activated_and_convolved, x)
        return F.leaky_relu(self.norm2(x).add_(shortcut), NEGATIVE_SLOPE, inplace=True)

    def _activated_and_convolved(self, x: Tensor) -> Tensor:
        return self.conv2(F.leaky_relu(self.norm1(x), NEGATIVE_SLOPE, inplace=True))


class SkipBlock(nn.Module):
    """A residual block on the way from encoder to decoder."""

    def __init__(self, in_channels: int, out_channels: int, norm_affine: bool) -> None:
        super().__init__()
        self.layer = ResidualBlock(in_channels, out_channels, norm_affine)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, d, h, w) -> (B, out, d, h, w)."""
        return self.layer(x)


class UpBlock(nn.Module):
    """Double the resolution, append the skip connection, apply a residual block.

    Upsampling and the convolution after it are both linear: at fine levels they are one transposed convolution, which
    needs 64 products where the two need 216 and more, and no map of the upsampled or the appended channels.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int, norm_affine: bool) -> None:
        super().__init__()
        self.transp_conv = named(nn.ConvTranspose3d(in_channels, out_channels, factor, stride=factor, bias=False))
        self.conv_block = ResidualBlock(2 * out_channels, out_channels, norm_affine)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, in, d, h, w) and (B, out, 2d, 2h, 2w) -> (B, out, 2d, 2h, 2w)."""
        if not self._composing_pays(x):
            return self.conv_block(torch.cat((self.transp_conv(x), skip), dim=1))
        block = self.conv_block
        shortcut = recomputed(lambda x, skip: block.norm3(self.composed_projection(x, skip)), x, skip)
        return block.after_first(self.composed_first(x, skip), shortcut)

    def composed_first(self, x: Tensor, skip: Tensor) -> Tensor:
        """The block's first convolution, of the upsampled and appended map that is never made.

        A point p of the result sees the upsampled point p + k - 1 through element k of the convolution (0 to 2), and
        that is 2i + a for element a of the upsampling (0 or 1): so p = 2i + t - 1 with t = a - k + 2. Summed over the
        channels between, elements with the same t are one element of a transposed convolution of 4 voxels, stride 2
        and padding 1; it leaves out the same points as the zeros around the upsampled map do.
        """
        of_up, of_skip = _weight(self.conv_block.conv1).chunk(2, dim=1)
        weight = F.conv3d(_weight(self.transp_conv), of_up, padding=2)  # (in, out, 4, 4, 4)
        return F.conv3d(skip, of_skip, padding=1).add_(F.conv_transpose3d(x, weight, stride=2, padding=1))

    def composed_projection(self, x: Tensor, skip: Tensor) -> Tensor:
        """The block's projection of the same map: a transposed convolution of 2 voxels, as the upsampling is."""
        of_up, of_skip = _weight(self.conv_block.conv3).chunk(2, dim=1)
        weight = F.conv3d(_weight(self.transp_conv), of_up)  # (in, out, 2, 2, 2)
        return F.conv3d(skip, of_skip).add_(F.conv_transpose3d(x, weight, stride=2))

    def _composing_pays(self, x: Tensor) -> bool:
        """Whether it saves more products than making the composed weights takes. Not tried on CUDA."""
        into, out, *factor = _weight(self.transp_conv).shape
        if x.is_cuda or factor != [2, 2, 2]:
            return False
        voxels = x.shape[0] * x.shape[2] * x.shape[3] * x.shape[4]
        saved = voxels * (216 * out * out + 8 * into * out - 64 * into * out)
        return saved > 27 * 8 * into * out * out


class Projection(nn.Conv3d):
    """The 1x1x1 convolution to the outputs, with a bias; its result has its voxels together in whatever layout it came.

    Args:
        in_channels: of the features.
        out_channels: outputs.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, d, h, w) -> (B, K, d, h, w), contiguous."""
        if input.is_cuda or not has_channels_last(input):
            return super().forward(input)
        weight, bias = self.weight.flatten(1), self.bias
        assert bias is not None
        voxels = input.permute(0, 2, 3, 4, 1).flatten(1, 3)  # (B, N, C), a view
        outputs = torch.baddbmm(bias[:, None], weight.expand(len(input), -1, -1), voxels.transpose(1, 2))
        return outputs.view(len(input), len(weight), *input.shape[2:])


def _weight(part: nn.Module) -> Tensor:
    """That of a convolution in the wrapping of ``named``."""
    wrapping: Any = part
    return wrapping.conv.weight


def named(convolution: nn.Module) -> nn.Sequential:
    """Wrap a convolution so that its parameters are called ``conv.*``, as in MONAI."""
    return nn.Sequential(OrderedDict(conv=convolution))
