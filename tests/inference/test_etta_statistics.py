"""Statistics of a case: measured without a trace, their distance in closed form, mixes between both."""

import math

import pytest
import torch
from torch import nn

from ukbob_seg.inference.etta_statistics import CaseStatistics


def _measured(network, windows):
    layers = [layer for layer in network.modules() if getattr(layer, "running_mean", None) is not None]
    with torch.no_grad():
        return layers, CaseStatistics.measure(layers, windows, network)


def _network():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(2, 5, 3, padding=1), nn.BatchNorm3d(5), nn.ReLU(), nn.Conv3d(5, 3, 1), nn.BatchNorm3d(3)
    )
    for _ in range(3):
        network(torch.randn(2, 2, 5, 6, 7))
    return network.eval()


def test_measuring_leaves_no_trace():
    network = _network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    windows = [torch.randn(1, 2, 5, 6, 7) * 3 + 1 for _ in range(2)]
    layers, statistics = _measured(network, windows)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not network.training
    assert not any(layer.training for layer in layers)
    assert layers[0].momentum == 0.1
    features = [network[0](window) for window in windows]
    expected = torch.stack([f.mean((0, 2, 3, 4)) for f in features]).mean(0)
    torch.testing.assert_close(statistics.own[0][0], expected)
    second = [network[3](torch.relu(nn.functional.batch_norm(
        f, None, None, network[1].weight, network[1].bias, training=True))) for f in features]  # fmt: skip
    torch.testing.assert_close(statistics.own[1][0], torch.stack([f.mean((0, 2, 3, 4)) for f in second]).mean(0))
    torch.testing.assert_close(statistics.own[1][1], torch.stack([f.var((0, 2, 3, 4)) for f in second]).mean(0))


@pytest.mark.parametrize("norm", [nn.BatchNorm3d, nn.InstanceNorm3d])
def test_every_layer_that_keeps_statistics_is_measured(norm):
    layer = norm(2, track_running_stats=True).eval()
    windows = [torch.randn(1, 2, 5, 6, 7) * 5 + 20 + 3 * number for number in range(3)]
    _, statistics = _measured(layer, windows)
    expected = torch.stack([window.mean((0, 2, 3, 4)) for window in windows]).mean(0)
    torch.testing.assert_close(statistics.own[0][0], expected)
    torch.testing.assert_close(statistics.own[0][1], torch.stack([w.var((0, 2, 3, 4)) for w in windows]).mean(0))
    assert statistics.distance() > 1


def test_restored_when_the_network_fails():
    network = _network()
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def fails(window):
        network(window)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        CaseStatistics.measure([network[1], network[4]], [torch.randn(1, 2, 5, 6, 7)], fails)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not network[1].training


def _single(mean, variance, own_mean, own_variance, eps=0.0):
    layer = nn.BatchNorm3d(1, eps=eps)
    values = (torch.tensor([float(v)]) for v in (mean, variance, own_mean, own_variance))
    a, b, c, d = values
    return CaseStatistics((layer,), ((a, b),), ((c, d),))


def test_distance_is_jeffreys_divergence():
    assert _single(1, 4, 1, 4).distance() == pytest.approx(0, abs=1e-12)
    # Means one standard deviation apart: J = 1/2 for equal variances of 1.
    assert _single(0, 1, 1, 1).distance() == pytest.approx(math.log(1.5))
    # Against an integral of (p - q) log(p / q) / 2 for Gaussians.
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    p = torch.distributions.Normal(torch.tensor(0.5).double(), torch.tensor(2.0).double()).log_prob(x)
    q = torch.distributions.Normal(torch.tensor(-1.0).double(), torch.tensor(3.0).double()).log_prob(x)
    integral = float(torch.trapezoid((p.exp() - q.exp()) * (p - q), x)) / 2
    assert _single(0.5, 4, -1, 9).distance() == pytest.approx(math.log1p(integral), rel=1e-4)
    assert _single(-1, 9, 0.5, 4).distance() == pytest.approx(math.log1p(integral), rel=1e-4)  # symmetric
    assert math.isfinite(_single(0, 0, 0, 0, eps=1e-5).distance())  # a dead channel


def test_mixing():
    network = _network()
    layers, statistics = _measured(network, [torch.randn(1, 2, 5, 6, 7) * 3 + 1])
    for share in (0.0, 0.25, 1.0):
        statistics.mix(share)
        for layer, (mean, variance), (own_mean, own_variance) in zip(
            layers, statistics.stored, statistics.own, strict=True
        ):
            torch.testing.assert_close(layer.running_mean, (1 - share) * mean + share * own_mean)
            torch.testing.assert_close(layer.running_var, (1 - share) * variance + share * own_variance)
