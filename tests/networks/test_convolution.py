"""Convolutions through oneDNN against PyTorch's own in float64, and which ones go there."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ukbob_seg.inference.passes import forward
from ukbob_seg.networks import convolution
from ukbob_seg.networks.convolution import quick_convolutions

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the maps that oneDNN was asked for."""
    shapes, real = [], torch.mkldnn_convolution

    def watched(image, *rest):
        shapes.append(tuple(image.shape))
        return real(image, *rest)

    monkeypatch.setattr(convolution.torch, "mkldnn_convolution", watched)
    return shapes


def _values(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kernel", "options"), [
    ((3, 3, 3), {"padding": 1}),
    ((3, 3, 3), {"padding": (0, 1, 2)}),
    ((3, 3, 3), {"padding": 1, "stride": (1, 2, 2)}),
    ((3, 3, 3), {"padding": 2, "dilation": 2}),
    ((1, 3, 3), {"padding": (0, 1, 1)}),
    ((2, 2, 2), {"stride": 2}),
    ((3, 1, 1), {"padding": (4, 0, 0)}),  # more zeros than the kernel reaches
    ((7, 3, 5), {"padding": (3, 1, 2)}),
])  # fmt: skip
@pytest.mark.parametrize("last", [False, True])
def test_values_and_gradients(calls, kernel, options, last):
    image, weight, bias = _values((1, 5, 14, 20, 22), 0), _values((4, 5, *kernel), 1), _values((4,), 2)
    if last:
        image = image.contiguous(memory_format=torch.channels_last_3d)
    expected_in = [value.double().requires_grad_() for value in (image, weight, bias)]
    found_in = [value.clone().requires_grad_() for value in (image, weight, bias)]
    expected = F.conv3d(*expected_in, **options)
    with quick_convolutions(CPU):
        found = F.conv3d(*found_in, **options)
        with torch.no_grad():
            assert torch.equal(F.conv3d(image, weight, bias, **options), found)
    assert calls[:2] == [image.shape] * 2
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    direction = _values(found.shape, 3)
    expected.backward(direction.double())
    found.backward(direction)
    for ours, reference in zip(found_in, expected_in, strict=True):
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("image", "weight", "options"), [
    (_values((2, 4, 12, 12, 12), 0), _values((4, 4, 3, 3, 3), 1), {}),
    (_values((1, 40, 24, 24, 4), 0), _values((4, 40, 3, 3, 3), 1), {}),
    (_values((1, 4, 12, 12, 12), 0).double(), _values((4, 4, 3, 3, 3), 1).double(), {}),
    (_values((1, 4, 12, 12, 12), 0), _values((4, 2, 3, 3, 3), 1), {"groups": 2}),
    (_values((1, 4, 12, 12, 12), 0), _values((4, 4, 1, 1, 1), 1), {}),
    (_values((1, 4, 12, 12, 12), 0), _values((4, 4, 3, 3, 3), 1), {"padding": "same"}),
    (_values((4, 12, 12, 12), 0), _values((4, 4, 3, 3, 3), 1), {}),
    (_values((1, 4, 3, 3, 3), 0), _values((4, 4, 3, 3, 3), 1), {"padding": 1}),
], ids=["batch", "large", "float64", "groups", "kernel of one", "same", "no batch", "tiny"])  # fmt: skip
def test_the_others_are_as_ever(calls, image, weight, options):
    with quick_convolutions(CPU):
        found = F.conv3d(image, weight, **options)
    assert torch.equal(found, F.conv3d(image, weight, **options))
    assert not calls


def test_wrong_shapes_raise_pytorchs_own_error():
    with quick_convolutions(CPU), pytest.raises(RuntimeError, match="channels"):
        F.conv3d(_values((1, 4, 12, 12, 12), 0), _values((4, 3, 3, 3, 3), 1))


def test_a_network_predicts_and_adapts_alike(calls):
    network = nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1), nn.InstanceNorm3d(6, affine=True), nn.LeakyReLU(), nn.Conv3d(6, 3, 3, padding=1)
    ).requires_grad_(False)
    for parameter in network[1].parameters():
        parameter.requires_grad_(True)
    image = _values((1, 1, 12, 16, 12), 0)
    found, expected = forward(network, image), network(image)
    assert len(calls) == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(logits.square().sum(), network[1].parameters()) for logits in (found, expected)]
    assert calls[2:] == [found.shape]  # the gradient of the last convolution's input; the first one's nobody asks for
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 4, 2, 40, 40), (1, 4, 1, 1, 600)])
def test_a_map_smaller_than_its_kernel_raises(shape):
    with quick_convolutions(CPU), pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        F.conv3d(_values(shape, 0), _values((4, 4, 3, 3, 3), 1))


def test_onednn_may_be_switched_off(calls):
    image, weight = _values((1, 4, 12, 12, 12), 0), _values((4, 4, 3, 3, 3), 1)
    torch._C._set_mkldnn_enabled(False)  # what ``torch.backends.mkldnn.flags`` does, without a warning of its own
    try:
        with quick_convolutions(CPU):
            F.conv3d(image, weight)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert not calls


@pytest.mark.parametrize(("shape", "stride", "exact"), [
    ((4, 6, 2), 2, True), ((12, 12, 1), 2, True), ((12, 12, 2), (1, 1, 2), True), ((12, 12, 4), 2, False),
    ((12, 2, 12), 2, False), ((12, 12, 1), (2, 2, 1), False),
])  # fmt: skip
@pytest.mark.parametrize("flat", [False, True])
def test_columns_in_bfloat16_are_computed_in_float32(shape, stride, exact, flat, monkeypatch):
    """Where memory that was not written may hold anything: here NaN, in what was just set free."""
    image, weight, bias = _values((1, 32, *shape), 0), _values((64, 32, 3, 3, 3), 1), _values((64,), 2)
    name = "conv2d" if flat else "conv3d"
    if flat:
        image, weight, stride = image[:, :, 0], weight[:, :, 1], stride if isinstance(stride, int) else stride[1:]
    seen, real, call = [], getattr(torch, name), getattr(F, name)
    monkeypatch.setattr(convolution.torch, name, lambda *a: seen.append(a[0].dtype) or real(*a))
    image = image.bfloat16()
    expected = call(image.double(), weight.double(), bias.double(), stride=stride, padding=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), quick_convolutions(CPU):
        if exact:
            junk = [torch.full((2**n,), float("nan")) for n in range(6, 17) for _ in range(20)]
            del junk
        found = call(image, weight, bias, stride=stride, padding=1)
    assert found.dtype == torch.bfloat16
    assert seen == [torch.float32 if exact else torch.bfloat16]
    close = 2.0**-8 if exact else 2.0**-4
    assert (found.double() - expected).abs().max() <= close * expected.abs().max()
