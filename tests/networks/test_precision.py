"""Networks in a chosen precision, against products of numbers that were rounded by hand."""

import copy

import pytest
import torch
from small_networks import SMALL
from torch import nn
from torch.utils.checkpoint import checkpoint

from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.passes import forward
from ukbob_seg.networks.precision import in_precision
from ukbob_seg.networks.registry import build_network, set_deep_supervision
from ukbob_seg.networks.wrappers import SliceNetwork, unwrapped


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(8, 8, 3, padding=1), nn.LeakyReLU(),
        nn.Conv3d(8, 8, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(8, 6, 3, padding=1), nn.LeakyReLU(),
        nn.Conv3d(6, 3, 1),
    ).eval()  # fmt: skip


@pytest.fixture
def image():
    return torch.randn(2, 2, 9, 12, 10, generator=torch.Generator().manual_seed(1))


def _rounded(tensor):
    return tensor.detach().bfloat16().double()


def _by_hand(network, image, exact):
    """In float64; factors and results of all but some convolutions are rounded."""
    number = -1
    for layer in network:
        if not isinstance(layer, nn.Conv3d):
            image = layer(image)
            continue
        number += 1
        factors, parts = (image, layer.weight, layer.bias), {"padding": layer.padding}
        if number in exact:
            image = nn.functional.conv3d(*(part.detach().double() for part in factors), **parts)
        else:
            image = _rounded(nn.functional.conv3d(*map(_rounded, factors), **parts))
    return image


def test_all_but_both_ends_is_rounded(network, image):
    with torch.no_grad():
        found = forward(in_precision(network, "bfloat16"), image)
        close, plain = _by_hand(network, image, {0, 3, 4}), _by_hand(network, image, range(5))
        all_rounded = _by_hand(network, image, ())
    assert found.dtype == torch.float32
    # A sum of float32 that lies between two numbers of bfloat16 may be rounded to the other one.
    error = (found - close).abs().mean()
    assert error < 0.2 * (found - plain).abs().mean()
    assert error < 0.1 * (found - all_rounded).abs().mean()
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_a_network_that_learns_is_not_called_once_more(network, image):
    calls = []
    network[0].register_forward_hook(lambda *_: calls.append(1))
    precise = in_precision(network.train(), "bfloat16")
    assert precise(image).dtype == torch.bfloat16  # the ends are not known yet
    assert len(calls) == 1
    network.eval()
    assert [precise(image).dtype, precise(image).dtype, len(calls)] == [torch.float32, torch.float32, 4]


def test_copies_and_recomputed_passes_are_exact_at_both_ends(network, image):
    precise = in_precision(network, "bfloat16")
    with torch.no_grad():
        expected = precise(image)
        assert torch.equal(copy.deepcopy(precise)(image), expected)
    assert [type(layer).__name__ for layer in network[::2]] == ["Conv3d"] * 5
    with torch.autocast("cpu", torch.bfloat16):
        found = checkpoint(network, image.requires_grad_(), use_reentrant=False)
    found.sum().backward()
    assert torch.equal(found, expected)
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["swin_unetr", "ux_net", "segresnet"])
def test_networks_adapt_in_it(name):
    """Two recompute maps in the backward pass, in which layers must be as in the first; logits are not rounded."""
    arguments, patch = SMALL[name]
    torch.manual_seed(0)
    network = build_network(name, 1, 3, arguments).eval()
    window = torch.randn(1, 1, *patch, generator=torch.Generator().manual_seed(1))
    set_deep_supervision(network, False)
    precise = in_precision(network, "bfloat16")
    with torch.no_grad():
        exact, rounded = forward(network, window), forward(precise, window)
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).std() < 0.1 * exact.std()
    forward(precise, window).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())


def test_float32_stays_it_under_autocast(network, image):
    with torch.no_grad():
        expected = network(image)
        with torch.autocast("cpu", torch.bfloat16):
            assert network(image).dtype == torch.bfloat16
            assert torch.equal(in_precision(network, "float32")(image), expected)


def test_the_last_choice_counts_and_auto_leaves_the_network_alone(network):
    wrapped = SliceNetwork(network, 0)
    rounded = in_precision(wrapped, "bfloat16")
    assert unwrapped(rounded) is network
    again = in_precision(rounded, "float32")
    assert (again.network, again.rounded_to) == (wrapped, None)
    assert in_precision(again, "auto") is wrapped
    assert in_precision(wrapped, "auto") is wrapped


def test_unknown_precisions_are_refused():
    with pytest.raises(ConfigError, match=r"--precision must be one of auto, float32, bfloat16, got 'fp8'"):
        in_precision(nn.Identity(), "fp8")
