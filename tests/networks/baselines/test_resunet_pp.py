"""ResUNet++: the published structure, every part against its formula, and what the toolkit needs."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from baseline_properties import (
    assert_deep_supervision_trains,
    assert_elements_are_independent,
    assert_every_parameter_learns,
    assert_pickled_and_loaded_alike,
    noise,
    perturb,
)
from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.baselines.resunet_pp import (
    AtrousPyramid,
    AttentionGate,
    ResidualUnit,
    ResUNetPlusPlus,
    SqueezeExcitation,
    divisor,
)

SMALL = {"widths": (8, 8, 12, 16, 20), "reduction": 2, "rates": (2, 3)}


def _small(**options):
    torch.manual_seed(0)
    return ResUNetPlusPlus(2, 3, **{**SMALL, **options})


@pytest.mark.parametrize(
    ("options", "trained", "total"),
    [({}, 4_062_993, 4_070_385), ({"widths": (32, 64, 128, 256, 512)}, 16_228_001, 16_242_785)],
)
def test_flattened_to_two_axes_it_has_the_published_parameters(options, trained, total):
    """Those of the authors' 2D code, for three channels and one output, without and with the running statistics."""
    with torch.device("meta"):
        network = ResUNetPlusPlus(3, 1, **options)
    flat = sum(p[..., 0].numel() if p.dim() == 5 else p.numel() for p in network.parameters())
    statistics = [b for name, b in network.named_buffers() if not name.endswith("num_batches_tracked")]
    assert flat == trained
    assert flat + sum(b.numel() for b in statistics) == total


def test_stages_have_the_published_widths_and_resolutions():
    with torch.device("meta"):
        network = ResUNetPlusPlus(1, 73).eval()
        shapes = []
        parts = [*network.encoder, network.bridge, *network.gates, *network.decoder, network.pyramid]
        for part in parts:
            part.register_forward_hook(lambda part, inputs, output: shapes.append(tuple(output.shape[1:])))
        assert network(torch.empty(2, 1, 64, 96, 128)).shape == (2, 73, 64, 96, 128)
    assert shapes == [
        (16, 64, 96, 128), (32, 32, 48, 64), (64, 16, 24, 32), (128, 8, 12, 16), (256, 8, 12, 16),
        (256, 8, 12, 16), (128, 16, 24, 32), (128, 16, 24, 32), (64, 32, 48, 64), (64, 32, 48, 64), (32, 64, 96, 128),
        (16, 64, 96, 128),
    ]  # fmt: skip
    dilations = [branch[0].dilation for branch in network.bridge.branches]
    assert dilations == [(n, n, n) for n in (1, 6, 12, 18)]


def test_squeeze_and_excitation_scales_channels_by_their_means():
    torch.manual_seed(0)
    part, x = SqueezeExcitation(6, 2), noise(2, 6, 3, 4, 5)
    found = part(x)
    for element in range(2):
        means = [x[element, c].mean() for c in range(6)]
        hidden = [max(sum(part.squeeze.weight[h, c] * means[c] for c in range(6)), torch.zeros(())) for h in range(3)]
        assert any(h > 0 for h in hidden)
        for c in range(6):
            score = sum(part.expand.weight[c, h] * hidden[h] for h in range(3))
            torch.testing.assert_close(found[element, c], x[element, c] / (1 + torch.exp(-score)))


def test_atrous_pyramid_sums_dilated_taps_inside_the_map():
    torch.manual_seed(0)
    dilations, size = (1, 2, 5), (4, 5, 6)
    part, x = AtrousPyramid(2, 3, dilations, lambda width: nn.Identity()).double(), noise(1, 2, *size).double()
    found = part(x)[0]
    for voxel in itertools.product(*((0, n // 2, n - 1) for n in size)):
        total = torch.zeros(3, dtype=torch.float64)
        for dilation, branch in zip(dilations, part.branches, strict=True):
            total += branch[0].bias
            for tap in itertools.product(range(3), repeat=3):
                place = [v + (t - 1) * dilation for v, t in zip(voxel, tap, strict=True)]
                if all(0 <= p < n for p, n in zip(place, size, strict=True)):
                    total += branch[0].weight[(..., *tap)] @ x[(0, slice(None), *place)]
        expected = part.join.weight[:, :, 0, 0, 0] @ total + part.join.bias
        torch.testing.assert_close(found[(slice(None), *voxel)], expected)


def _batch_norm_relu(norm, x):
    """In evaluation mode, written out."""
    view = (1, -1, 1, 1, 1)
    x = (x - norm.running_mean.view(view)) / (norm.running_var.view(view) + 1e-5).sqrt()
    return (x * norm.weight.view(view) + norm.bias.view(view)).clamp(min=0)


def _normed_convolution(part, x, **options):
    norm, _, convolution = part
    return F.conv3d(_batch_norm_relu(norm, x), convolution.weight, convolution.bias, padding=1, **options)


def test_attention_gate_multiplies_by_both_maps_convolved():
    torch.manual_seed(0)
    gate = AttentionGate(3, 5, nn.BatchNorm3d).eval()
    perturb(gate)
    x, skip = noise(2, 5, 2, 3, 4), noise(2, 3, 4, 6, 8, seed=1)
    fine = _normed_convolution(gate.of_skip, skip)
    pooled = fine.unflatten(4, (4, 2)).unflatten(3, (3, 2)).unflatten(2, (2, 2)).amax(dim=(3, 5, 7))
    expected = x * _normed_convolution(gate.of_sum, pooled + _normed_convolution(gate.of_map, x))
    torch.testing.assert_close(gate(x, skip), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("stride", "is_stem"), [(1, False), (2, False), (1, True)])
def test_residual_unit_is_preactivated_but_for_the_stem(stride, is_stem):
    torch.manual_seed(0)
    unit = ResidualUnit(3, 8, stride, 4, nn.BatchNorm3d, is_stem).eval()
    perturb(unit)
    x = noise(2, 3, 4, 6, 8)
    if is_stem:
        first = F.conv3d(x, unit.first.weight, unit.first.bias, padding=1)
    else:
        first = _normed_convolution(unit.first, x, stride=stride)
    shortcut = unit.shortcut[1](F.conv3d(x, unit.shortcut[0].weight, unit.shortcut[0].bias, stride=stride))
    expected = unit.excite(_normed_convolution(unit.second, first) + shortcut)
    torch.testing.assert_close(unit(x), expected, rtol=1e-4, atol=1e-5)


def test_the_whole_is_wired_as_published():
    network = _small().eval()
    perturb(network)
    x = noise(1, 2, 16, 8, 24)
    with torch.no_grad():
        c1 = network.encoder[0](x)
        c2 = network.encoder[1](c1)
        c3 = network.encoder[2](c2)
        d = network.bridge(network.encoder[3](c3))
        for gate, unit, skip in zip(network.gates, network.decoder, (c3, c2, c1), strict=True):
            d = gate(d, skip).repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
            d = unit(torch.cat([d, skip], dim=1))
        assert torch.equal(network(x), network.out(network.pyramid(d)))


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_every_parameter_learns_from_one_patch(norm):
    """The gradient of a bias that a norm takes away again is zero up to rounding."""
    assert_every_parameter_learns(_small(norm=norm), (1, 2, 16, 24, 32), but=(".bias",))


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_elements_of_a_batch_are_independent(norm):
    assert_elements_are_independent(_small(norm=norm), (1, 2, 16, 8, 24))


def test_it_is_pickled_and_loaded():
    assert_pickled_and_loaded_alike(_small(), ResUNetPlusPlus(2, 3, **SMALL), (1, 2, 8, 16, 8))


def test_deep_supervision():
    scales = [(1, 1, 1), (2, 2, 2), (4, 4, 4)]
    missing = assert_deep_supervision_trains(_small(deep_supervision=True), (1, 2, 16, 24, 32), scales)
    assert missing == {"coarse_outs.1.weight", "coarse_outs.1.bias"}  # the toolkit's loss leaves the coarsest out
    late = _small()
    late.deep_supervision = True
    assert isinstance(late(noise(1, 2, 16, 8, 8)), torch.Tensor)


def test_patches():
    assert divisor({"widths": [32, 64, 128, 256, 512]}) == (8, 8, 8)
    network = _small()
    assert network.eval()(noise(1, 2, 8, 8, 8)).shape == (1, 3, 8, 8, 8)
    assert network.train()(noise(2, 2, 8, 8, 8)).shape == (2, 3, 8, 8, 8)
    with pytest.raises(ConfigError, match="one voxel at the bottleneck"):
        network(noise(1, 2, 8, 8, 8))
    with pytest.raises(ConfigError, match="one voxel at the bottleneck"):
        _small(norm="instance")(noise(2, 2, 8, 8, 8))
    with pytest.raises(ConfigError, match=r"divisible by \(8, 8, 8\), got an input of \(8, 12, 16\)"):
        network(noise(1, 2, 8, 12, 16))
    with pytest.raises(ConfigError, match=r"takes \(batch, 2, z, y, x\)"):
        network(noise(1, 1, 8, 16, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": [16, 32, 64]}, "widths must be 5 integers from 1"),
        ({"widths": [16, 32, 64, 128, 2.5]}, "widths must be 5 integers"),
        ({"widths": [4, 32, 64, 128, 256]}, "at least reduction 8"),
        ({"reduction": 0}, "reduction must be"),
        ({"rates": [6, 0]}, "rates must be"),
        ({"norm": "group"}, "norm must be one of batch, instance"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        ResUNetPlusPlus(1, 2, **options)


@pytest.mark.parametrize(("channels", "outputs"), [(0, 2), (1, 0), (1, 70_000)])
def test_a_network_has_inputs_and_outputs(channels, outputs):
    with pytest.raises(ConfigError, match="image channels from 1"):
        ResUNetPlusPlus(channels, outputs)
