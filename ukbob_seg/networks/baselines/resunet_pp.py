"""ResUNet++ (Jha et al., ISM 2019) with three axes: residual units, squeeze and excitation, ASPP, attention gates.

The paper's network is two-dimensional. In 3D every convolution of 3x3 and 1x1 is one of 3x3x3 and 1x1x1, strides,
pooling and nearest-neighbour upsampling are by two along each axis, and squeeze and excitation averages over the
volume; widths, order of the layers and dilation rates stay. The rates of the atrous pyramid were made for maps of 32
pixels: on a map no longer than a rate, all but the middle of that convolution sees zeros, so ``rates`` can be given.
The attention gate multiplies with a plain convolution's result, without a sigmoid, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.baselines.checks import Triple, check_bottleneck, check_channels, check_input, integers
from ukbob_seg.networks.instance_norm import InstanceNorm

NAME = "ResUNet++"
DIVISOR = (8, 8, 8)
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm3d,
    "instance": lambda width: InstanceNorm(width, affine=True),
}


def divisor(arguments: Mapping[str, Any]) -> Triple:
    """By what the patch (z, y, x) must be divisible: three encoder stages halve it, whatever the arguments."""
    return DIVISOR


class ResUNetPlusPlus(nn.Module):
    """ResUNet++ in 3D.

    Args:
        in_channels: image channels.
        out_channels: network outputs.
        widths: channels of the stem, the three encoder stages and the bridge. The defaults are those of the paper's
            own code (4.06 M parameters in 2D); the authors' later work (Jha et al., JBHI 2021) doubles them.
        reduction: by what squeeze and excitation narrows the channels.
        rates: dilations of the atrous pyramids, beside which there is always an undilated convolution.
        norm: ``batch`` as in the paper, or ``instance``, which does not depend on how many patches are a batch.
        deep_supervision: also return logits of the two coarser decoder maps (not in the paper); the attribute of this
            name switches that off and on again, for networks built with it.

    Raises:
        ConfigError: an argument that no network can be built with.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        reduction: int = 8,
        rates: Sequence[int] = (6, 12, 18),
        norm: str = "batch",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels)
        w1, w2, w3, w4, w5 = integers("widths", widths, 5)
        dilations = (1, *integers("rates", rates, len(rates)))
        integers("reduction", (reduction,), 1)
        if min(w1, w2, w3, w4) < reduction:
            raise ConfigError(f"the first four widths must be at least reduction {reduction}, got {tuple(widths)}")
        if norm not in NORMS:
            raise ConfigError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        make = NORMS[norm]
        self.in_channels, self.norm = in_channels, norm
        self.encoder = nn.ModuleList([ResidualUnit(in_channels, w1, 1, reduction, make, is_stem=True)])
        for a, b in ((w1, w2), (w2, w3), (w3, w4)):
            self.encoder.append(ResidualUnit(a, b, 2, reduction, make))
        self.bridge = AtrousPyramid(w4, w5, dilations, make)
        self.gates = nn.ModuleList([AttentionGate(a, b, make) for a, b in ((w3, w5), (w2, w4), (w1, w3))])
        self.decoder = nn.ModuleList()
        for coarse, skip, out in ((w5, w3, w4), (w4, w2, w3), (w3, w1, w2)):
            self.decoder.append(ResidualUnit(coarse + skip, out, 1, reduction, make))
        self.pyramid = AtrousPyramid(w2, w1, dilations, make)
        self.out = nn.Conv3d(w1, out_channels, 1)
        self.deep_supervision = deep_supervision
        self.coarse_outs = nn.ModuleList([nn.Conv3d(w, out_channels, 1) for w in (w3, w4) if deep_supervision])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(B, in_channels, D, H, W) -> (B, out_channels, D, H, W) logits.

        With deep supervision a list of three, finest first: also at 1/2 and 1/4.

        Raises:
            ConfigError: an edge is not divisible by 8, or the bottleneck would be a voxel without statistics.
        """
        check_input(NAME, x.shape, self.in_channels, DIVISOR)
        if self.norm == "instance" or (self.training and len(x) == 1):
            check_bottleneck(NAME, x.shape, DIVISOR)
        skips = []
        for unit in self.encoder:
            x = unit(x)
            skips.append(x)
        x = self.bridge(skips.pop())
        decoded = []
        for gate, unit in zip(self.gates, self.decoder, strict=True):
            skip = skips.pop()
            x = F.interpolate(gate(x, skip), scale_factor=2.0, mode="nearest")
            x = unit(torch.cat((x, skip), dim=1))
            decoded.append(x)
        logits = self.out(self.pyramid(x))
        if not (self.deep_supervision and len(self.coarse_outs)):
            return logits
        coarse = zip(self.coarse_outs, reversed(decoded[:-1]), strict=True)
        return [logits, *(head(x) for head, x in coarse)]


class ResidualUnit(nn.Module):
    """Two pre-activated convolutions, a normalised 1x1x1 shortcut, then squeeze and excitation.

    Args:
        in_channels: of the input.
        out_channels: of the result.
        stride: of the first convolution and the shortcut.
        reduction: of squeeze and excitation.
        make_norm: called with a width.
        is_stem: the first convolution sees the image as it is, neither normalised nor rectified.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        reduction: int,
        make_norm: Callable[[int], nn.Module],
        is_stem: bool = False,
    ) -> None:
        super().__init__()
        first = nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.first = first if is_stem else activated(first, make_norm)
        self.second = activated(nn.Conv3d(out_channels, out_channels, 3, padding=1), make_norm)
        shortcut = nn.Conv3d(in_channels, out_channels, 1, stride=stride)
        self.shortcut = nn.Sequential(shortcut, make_norm(out_channels))
        self.excite = SqueezeExcitation(out_channels, reduction)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, d, h, w) -> (B, out, d/stride, h/stride, w/stride)."""
        return self.excite(self.second(self.first(x)) + self.shortcut(x))


class SqueezeExcitation(nn.Module):
    """Multiply each channel by a number in (0, 1) made of the means of all channels (Hu et al., CVPR 2018)."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, width // reduction, bias=False)
        self.expand = nn.Linear(width // reduction, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, d, h, w) -> the same shape."""
        factors = self.expand(F.relu(self.squeeze(x.mean(dim=(2, 3, 4))))).sigmoid()
        return x * factors[:, :, None, None, None]


class AtrousPyramid(nn.Module):
    """The sum of normalised convolutions of several dilations, then one of 1x1x1 (ASPP; Chen et al., TPAMI 2018)."""

    def __init__(
        self, in_channels: int, out_channels: int, dilations: Sequence[int], make_norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        for dilation in dilations:
            convolution = nn.Conv3d(in_channels, out_channels, 3, padding=dilation, dilation=dilation)
            self.branches.append(nn.Sequential(convolution, make_norm(out_channels)))
        self.join = nn.Conv3d(out_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, d, h, w) -> (B, out, d, h, w)."""
        first, *rest = self.branches
        total = first(x)
        for branch in rest:
            total = total + branch(x)
        return self.join(total)


class AttentionGate(nn.Module):
    """Multiply the decoder's map by weights that the encoder's finer map has a say in.

    Args:
        skip_channels: of the encoder's map.
        width: channels of the decoder's map.
        make_norm: called with a width.
    """

    def __init__(self, skip_channels: int, width: int, make_norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.of_skip = activated(nn.Conv3d(skip_channels, width, 3, padding=1), make_norm)
        self.of_map = activated(nn.Conv3d(width, width, 3, padding=1), make_norm)
        self.of_sum = activated(nn.Conv3d(width, width, 3, padding=1), make_norm)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, width, d, h, w) and (B, skip_channels, 2d, 2h, 2w) -> (B, width, d, h, w)."""
        return x * self.of_sum(F.max_pool3d(self.of_skip(skip), 2) + self.of_map(x))


def activated(convolution: nn.Conv3d, make_norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Normalisation and ReLU before a convolution."""
    return nn.Sequential(make_norm(convolution.in_channels), nn.ReLU(inplace=True), convolution)
