"""Instance normalisation with channels last: torch's own in float64 is the oracle."""

import pytest
import torch
import torch.nn.functional as F

from ukbob_seg.networks.instance_norm import InstanceNorm, has_channels_last


def _map(shape, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(shape, generator=generator) + mean
    return x.contiguous(memory_format=torch.channels_last_3d)


def _norm(channels, affine, seed=1):
    norm = InstanceNorm(channels, affine=affine)
    if affine:
        generator = torch.Generator().manual_seed(seed)
        norm.weight.data = torch.randn(channels, generator=generator)
        norm.bias.data = torch.randn(channels, generator=generator)
    return norm


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(1, 7, 3, 4, 5), (3, 5, 1, 2, 2), (2, 1, 4, 4, 4), (2, 12, 9, 8, 7)])
def test_numbers_and_gradients_are_torchs(shape, affine):
    norm, x = _norm(shape[1], affine), _map(shape, mean=1.5).requires_grad_()
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    result = norm(x)
    result.backward(gradient)
    exact = [None if p is None else p.detach().double().requires_grad_() for p in (x, norm.weight, norm.bias)]
    expected = F.instance_norm(exact[0], weight=exact[1], bias=exact[2], eps=norm.eps)
    expected.backward(gradient.double())
    assert has_channels_last(result)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-6)
    for found, true in zip((x, norm.weight, norm.bias), exact, strict=True):
        if true is not None:
            torch.testing.assert_close(found.grad.double(), true.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 5.0, 200.0])
def test_large_maps_keep_their_precision(mean):
    """What a group norm of single channels loses: 4e-4 to 3e-3 at 96^3; and a difference of squares at large means."""
    x = _map((1, 4, 96, 96, 96), mean).requires_grad_()
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    found = InstanceNorm(4)(x)
    found.backward(gradient)
    exact = x.detach().double().requires_grad_()
    expected = F.instance_norm(exact)
    expected.backward(gradient.double())
    assert (found - expected).abs().max() < 2e-6 + 1e-7 * mean  # rounding of x itself is 6e-8 of it
    assert (x.grad - exact.grad).abs().max() < 2e-6 + 1e-7 * mean


def test_constant_maps_are_zero_and_other_layouts_torchs_own():
    constant = torch.full((1, 3, 4, 4, 4), 7.0).contiguous(memory_format=torch.channels_last_3d)
    assert InstanceNorm(3)(constant).abs().max() < 1e-3  # rounding, magnified by 1 / sqrt(eps)
    x = torch.randn(2, 3, 4, 5, 6)
    assert not has_channels_last(x)
    assert torch.equal(InstanceNorm(3)(x), F.instance_norm(x))
    half = _map((1, 3, 4, 4, 4)).bfloat16()
    assert InstanceNorm(3)(half).dtype == torch.bfloat16


def test_only_weights_are_adapted_when_only_they_may_change():
    """What ETTA does: gradients of weight and bias without one of the input."""
    norm, x = _norm(4, affine=True), _map((1, 4, 3, 3, 3))
    norm(x).square().sum().backward()
    assert norm.weight.grad.abs().min() > 0
    assert norm.bias.grad is not None
    norm.requires_grad_(False)
    assert not norm(x).requires_grad
