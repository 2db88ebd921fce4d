"""Quick layers against PyTorch's own in float64, which ones are quick, and that networks use them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ukbob_seg.inference.passes import forward
from ukbob_seg.networks import quick_layers
from ukbob_seg.networks.convolution import quick_convolutions

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def _values(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def quick(monkeypatch):
    """Names of the quick ways that were gone."""
    gone, group_norm, products = [], F.group_norm, quick_layers._placed_products
    monkeypatch.setattr(quick_layers.F, "group_norm", lambda *a: gone.append("norm") or group_norm(*a))
    monkeypatch.setattr(quick_layers, "_placed_products", lambda *a: gone.append("transposed") or products(*a))
    return gone


@pytest.mark.parametrize("shape", [(1, 3, 9, 8, 7), (2, 5, 4, 6, 2), (2, 3, 16, 12), (1, 2, 64, 64, 64)])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_instance_norm(quick, shape, affine, offset):
    image = _values(shape) + offset
    weight, bias = (_values((shape[1],), 1), _values((shape[1],), 2)) if affine else (None, None)
    wide = [None if each is None else each.double() for each in (weight, bias)]
    expected = F.instance_norm(image.double(), weight=wide[0], bias=wide[1], eps=1e-4)
    with torch.no_grad(), quick_convolutions(CPU):
        found = F.instance_norm(image, weight=weight, bias=bias, eps=1e-4)
    assert quick == ["norm"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("kernel", [(2, 2, 2), (1, 2, 2), (2, 1, 3)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_transposed_convolution(quick, kernel, batch, biased):
    image, weight = _values((batch, 5, 4, 6, 3)), _values((5, 4, *kernel), 1)
    bias = _values((4,), 2) if biased else None
    wide = None if bias is None else bias.double()
    expected = F.conv_transpose3d(image.double(), weight.double(), wide, stride=kernel)
    with torch.no_grad(), quick_convolutions(CPU):
        found = F.conv_transpose3d(image, weight, bias, stride=kernel)
    assert quick == ["transposed"]
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", [
    lambda: F.instance_norm(_values((1, 3, 4, 4, 4)).double()),
    lambda: F.instance_norm(_values((1, 3, 4, 4, 4)), torch.zeros(3), torch.ones(3), use_input_stats=False),
    lambda: F.conv_transpose3d(_values((1, 4, 3, 3, 3)), _values((4, 2, 3, 3, 3), 1), stride=2),
    lambda: F.conv_transpose3d(_values((1, 4, 3, 3, 3)), _values((4, 2, 2, 2, 2), 1), stride=2, padding=1),
    lambda: F.conv_transpose3d(_values((1, 4, 3, 3, 3)), _values((4, 2, 2, 2, 2), 1), stride=2, groups=2),
    lambda: F.conv_transpose3d(_values((4, 3, 3, 3)), _values((4, 2, 2, 2, 2), 1), stride=2),
], ids=["float64", "running", "overlap", "padding", "groups", "no batch"])  # fmt: skip
def test_the_others_are_as_ever(quick, call):
    with torch.no_grad():
        expected = call()
        with quick_convolutions(CPU):
            assert torch.equal(call(), expected)
    assert not quick


def test_errors_are_pytorchs_own(quick):
    with torch.no_grad(), quick_convolutions(CPU):
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            F.instance_norm(_values((1, 3, 1, 1, 1)))
        with pytest.raises(RuntimeError, match="channels"):
            F.conv_transpose3d(_values((1, 3, 4, 4, 4)), _values((4, 2, 2, 2, 2)), stride=2)
    assert not quick


def test_a_network_predicts_alike_and_gradients_go_the_usual_way(quick):
    network = nn.Sequential(
        nn.Conv3d(1, 6, 3, stride=2, padding=1), nn.InstanceNorm3d(6, affine=True), nn.ConvTranspose3d(6, 3, 2, 2)
    )
    image = _values((1, 1, 12, 16, 12))
    with torch.no_grad():
        expected = network(image)
        with quick_convolutions(CPU):  # in the layout of the image; networks that are known get channels last
            torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(forward(network, image), expected, rtol=1e-4, atol=1e-5)
    assert quick == ["norm", "transposed"]
    forward(network, image).sum().backward()
    assert quick == ["norm", "transposed"]
    assert network[0].weight.grad is not None
