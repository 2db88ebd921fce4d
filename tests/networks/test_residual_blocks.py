"""The decoder's shorter ways against the plain ones, in float64 where rounding would hide a mistake."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ukbob_seg.networks import residual_blocks
from ukbob_seg.networks.residual_blocks import Projection, ResidualBlock, UpBlock


def _plain(block, x, skip):
    """Upsample, append, convolve."""
    joined = torch.cat((block.transp_conv(x), skip), dim=1)
    return block.conv_block.conv1(joined), block.conv_block.conv3(joined)


def _composed(block, x, skip):
    return block.composed_first(x, skip), block.composed_projection(x, skip)


def _inputs(block_in, out, shape, batch=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, block_in, *shape, generator=generator, dtype=torch.float64)
    skip = torch.randn(batch, out, *(2 * n for n in shape), generator=generator, dtype=torch.float64)
    return x, skip


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 5), (1, 1, 1)])
@pytest.mark.parametrize(("block_in", "out"), [(4, 4), (6, 3)])
def test_upsampling_and_convolution_are_one_transposed_convolution(block_in, out, shape):
    """Also at the borders, where the convolution sees zeros around the upsampled map."""
    torch.manual_seed(0)
    block = UpBlock(block_in, out, 2, norm_affine=True).double()
    x, skip = _inputs(block_in, out, shape)
    gradients = []
    for way in (_plain, _composed):
        block.zero_grad()
        source = x.clone().requires_grad_()
        first, shortcut = way(block, source, skip)
        (first.square().sum() + shortcut.pow(3).sum()).backward()
        named = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
        gradients.append((first.detach(), shortcut.detach(), source.grad, *named.values()))
    assert len(gradients[0]) == 6
    for plain, composed in zip(*gradients, strict=True):
        torch.testing.assert_close(composed, plain, rtol=1e-10, atol=1e-10)


def test_composing_is_for_fine_levels(monkeypatch):
    fine, coarse = UpBlock(48, 48, 2, False), UpBlock(768, 384, 2, False)
    calls = []
    composed = UpBlock.composed_first
    monkeypatch.setattr(UpBlock, "composed_first", lambda self, *a: calls.append(self) or composed(self, *a))
    with torch.no_grad():
        fine(torch.randn(1, 48, 16, 16, 16), torch.randn(1, 48, 32, 32, 32))
        assert calls == [fine]
        coarse(torch.randn(1, 768, 1, 1, 2), torch.randn(1, 384, 2, 2, 4))
        assert calls == [fine]
        UpBlock(4, 4, 4, False)(torch.randn(1, 4, 8, 8, 8), torch.randn(1, 4, 32, 32, 32))
        assert calls == [fine]


@pytest.mark.parametrize("widths", [(3, 3), (3, 5)])
def test_layouts_give_the_same_numbers(widths):
    torch.manual_seed(0)
    block = ResidualBlock(*widths, norm_affine=True)
    x = torch.randn(2, widths[0], 6, 5, 4)
    expected = block(x)
    found = block(x.contiguous(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_projection_is_a_convolution_with_voxels_together(batch):
    torch.manual_seed(0)
    convolution = Projection(5, 7)
    x = torch.randn(batch, 5, 4, 3, 6)
    last = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    found, expected = convolution(last), F.conv3d(x, convolution.weight, convolution.bias)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    weights = torch.randn_like(expected)
    source = x.clone().requires_grad_()
    parameters = list(convolution.parameters())
    ours = torch.autograd.grad((found * weights).sum(), [last, *parameters])
    plain = F.conv3d(source, convolution.weight, convolution.bias)
    theirs = torch.autograd.grad((plain * weights).sum(), [source, *parameters])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_block_with_wrong_skip_is_an_error():
    with pytest.raises(RuntimeError):
        UpBlock(4, 4, 2, False)(torch.randn(1, 4, 8, 8, 8), torch.randn(1, 4, 8, 8, 8))


def test_module_names_are_monais():
    assert residual_blocks.InstanceNorm.__mro__[1] is nn.InstanceNorm3d  # what ETTA looks for
    assert list(ResidualBlock(2, 3, False).state_dict()) == [
        "conv1.conv.weight",
        "conv2.conv.weight",
        "conv3.conv.weight",
    ]
