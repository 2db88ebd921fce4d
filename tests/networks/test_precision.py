"""Networks in a chosen precision, against products of numbers that were rounded by hand."""

import pytest
import torch
from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.passes import forward
from ukbob_seg.networks.precision import check_precision, in_precision
from ukbob_seg.networks.wrappers import SliceNetwork, unwrapped


@pytest.fixture
def convolution():
    torch.manual_seed(0)
    return nn.Conv3d(3, 5, 3, padding=1).eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 9, 12, 10, generator=torch.Generator().manual_seed(1))


def _rounded(tensor):
    return tensor.bfloat16().double()


def test_factors_are_rounded_and_sums_are_not(convolution, image):
    weight, bias = _rounded(convolution.weight), _rounded(convolution.bias)
    expected = nn.functional.conv3d(_rounded(image), weight, bias, padding=1)
    with torch.no_grad():
        found = forward(in_precision(convolution, "bfloat16"), image)
    assert found.dtype == torch.bfloat16
    # The result is rounded once: half a unit in its eighth binary digit, and little more for sums in float32.
    assert ((found.double() - expected).abs() <= expected.abs() * 2.0**-8 + 1e-6).all()
    assert convolution.weight.dtype == torch.float32


def test_float32_stays_it_under_autocast(convolution, image):
    with torch.no_grad():
        expected = convolution(image)
        with torch.autocast("cpu", torch.bfloat16):
            assert convolution(image).dtype == torch.bfloat16
            assert torch.equal(in_precision(convolution, "float32")(image), expected)


def test_the_last_choice_counts_and_auto_leaves_the_network_alone(convolution):
    network = SliceNetwork(convolution, 0)
    rounded = in_precision(network, "bfloat16")
    assert unwrapped(rounded) is convolution
    again = in_precision(rounded, "float32")
    assert (again.network, again.half) == (network, None)
    assert in_precision(again, "auto") is network
    assert in_precision(network, "auto") is network


def test_unknown_precisions_are_refused():
    with pytest.raises(ConfigError, match=r"--precision must be one of auto, float32, bfloat16, got 'fp8'"):
        check_precision("fp8")
