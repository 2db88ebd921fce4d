"""Layers under autocast on CPUs against PyTorch's own of rounded numbers in float64, and which ones go another way."""

import pytest
import torch
from torch.nn import functional as F

from ukbob_seg.networks import quick_layers
from ukbob_seg.networks.convolution import quick_convolutions

CPU = torch.device("cpu")
LAST = torch.channels_last_3d
UNIT = 2.0**-8  # largest relative error of rounding once
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def _values(shape, seed=0):
    """What bfloat16 holds."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _found(call):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), quick_convolutions(CPU):
        return call()


def _check(found, expected, units=1.0):
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= units * UNIT * expected.abs().max()


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 1, "stride": 2}, {"padding": 2, "dilation": 2}])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_convolution(options, batch, layout):
    image, weight, bias = _values((batch, 5, 9, 8, 7)), _values((6, 5, 3, 3, 3), 1), _values((6,), 2)
    expected = F.conv3d(image.double(), weight.double(), bias.double(), **options)
    found = _found(lambda: F.conv3d(image.contiguous(memory_format=layout), weight.float(), bias.float(), **options))
    _check(found, expected)
    assert found.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("offset", [0.0, 8.0])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 4, 6, 3), (1, 4, 48, 48, 48)])
def test_instance_norm(monkeypatch, shape, affine, offset):
    gone, real = [], F.batch_norm
    monkeypatch.setattr(F, "batch_norm", lambda *a: gone.append(1) or real(*a))
    image = (_values(shape) + offset).bfloat16().contiguous(memory_format=LAST)
    weight, bias = (_values((shape[1],), 1).float(), _values((shape[1],), 2).float()) if affine else (None, None)
    wide = [None if each is None else each.double() for each in (weight, bias)]
    expected = F.instance_norm(image.double(), weight=wide[0], bias=wide[1], eps=1e-4)
    found = _found(lambda: F.instance_norm(image, weight=weight, bias=bias, eps=1e-4))
    _check(found, expected)
    assert gone == [1]
    assert found.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("kernel", [(2, 2, 2), (1, 2, 2), (2, 1, 3)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_transposed_convolution(monkeypatch, kernel, batch, biased):
    gone, real = [], quick_layers.placed_products
    monkeypatch.setattr(quick_layers, "placed_products", lambda *a: gone.append(1) or real(*a))
    image, weight = _values((batch, 5, 4, 6, 3)).contiguous(memory_format=LAST), _values((5, 4, *kernel), 1)
    bias = _values((4,), 2) if biased else None
    wide = None if bias is None else bias.double()
    expected = F.conv_transpose3d(image.double(), weight.double(), wide, stride=kernel)
    given = None if bias is None else bias.float()
    found = _found(lambda: F.conv_transpose3d(image, weight.float(), given, stride=kernel))
    _check(found, expected, 2)  # PyTorch rounds the product once more before it adds the bias
    assert gone == [1]


@pytest.mark.parametrize("call", [
    lambda: F.conv3d(_values((1, 1, 4, 5, 6)), _values((3, 1, 3, 3, 3), 1), padding=1),
    lambda: F.conv3d(_values((1, 4, 4, 5, 6)), _values((4, 1, 3, 3, 3), 1), padding=1, groups=4),
    lambda: F.instance_norm(_values((2, 3, 4, 4, 4))),
    lambda: F.instance_norm(_values((1, 3, 4, 4, 4)), torch.zeros(3), torch.ones(3), use_input_stats=False),
    lambda: F.conv_transpose3d(_values((1, 4, 3, 3, 3)), _values((4, 2, 3, 3, 3), 1), stride=2),
    lambda: F.conv_transpose3d(_values((1, 4, 3, 3, 3)), _values((4, 2, 2, 2, 2), 1), stride=2, groups=2),
], ids=["one channel", "groups", "batch", "running", "overlap", "transposed groups"])  # fmt: skip
def test_the_others_are_as_ever(call):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = call()
    assert torch.equal(_found(call), expected)


def test_gradients_go_the_usual_way(monkeypatch):
    for name in ("norm_of_one", "placed_products"):
        monkeypatch.setattr(quick_layers, name, None)  # calling it would fail
    image = _values((1, 3, 6, 6, 6)).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), quick_convolutions(CPU):
        F.instance_norm(F.conv3d(image, _values((4, 3, 3, 3, 3), 1).float())).sum().backward()
    assert image.grad is not None
