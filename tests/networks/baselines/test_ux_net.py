"""3D UX-Net: the published structure, the block against loops, and what the toolkit needs."""

import itertools
import math

import pytest
import torch
from baseline_properties import (
    assert_deep_supervision_trains,
    assert_elements_are_independent,
    assert_every_parameter_learns,
    assert_pickled_and_loaded_alike,
    noise,
    parameter_count,
    perturb,
)

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.baselines.ux_net import UXBlock, UXNet, divisor

SMALL = {"feature_sizes": (4, 6, 8, 10), "hidden_size": 12, "depths": (1, 2, 1, 1)}


def _small(**options):
    torch.manual_seed(0)
    return UXNet(2, 3, **{**SMALL, **options})


@pytest.mark.parametrize(("outputs", "parameters"), [(5, 53_006_069), (14, 53_006_510), (16, 53_006_608)])
def test_it_has_the_53_million_parameters_of_the_paper(outputs, parameters):
    """For the tasks of its tables: FLARE (4 organs), 13 organs, AMOS (15)."""
    with torch.device("meta"):
        assert parameter_count(UXNet(1, outputs)) == parameters


def test_blocks_have_the_parameters_of_scaling_instead_of_an_mlp():
    """Four plus four weights and four plus one biases per channel; an MLP of 384 channels has 3,077."""
    with torch.device("meta"):
        network = UXNet(1, 14)
    for stage, width in zip(network.encoder.stages, (48, 96, 192, 384), strict=True):
        assert len(stage) == 2
        for block in stage:
            assert parameter_count(block) == width * (7**3 + 1 + 2 + 8 + 5 + 1)
            assert block.depthwise.weight.shape == (width, 1, 7, 7, 7)


def test_stages_have_the_published_widths_and_resolutions():
    with torch.device("meta"):
        network, shapes = UXNet(1, 14), []
        for part in [*network.encoder.norms, *network.skips, *reversed(network.ups), network.last]:
            part.register_forward_hook(lambda part, inputs, output: shapes.append(tuple(output.shape[1:])))
        assert network(torch.empty(1, 1, 96, 64, 128)).shape == (1, 14, 96, 64, 128)
    encoder = [(48, 48, 32, 64), (96, 24, 16, 32), (192, 12, 8, 16), (384, 6, 4, 8)]
    decoder = [(384, 12, 8, 16), (192, 24, 16, 32), (96, 48, 32, 64), (48, 96, 64, 128)]
    assert shapes[:4] == encoder
    assert shapes[4] == (768, 6, 4, 8)
    assert shapes[5:13:2] == shapes[6:13:2] == decoder  # each skip block, then the block that takes its map in
    assert shapes[13] == (48, 96, 64, 128)


def _normalised(channels, norm):
    mean = sum(channels) / len(channels)
    variance = sum((c - mean) ** 2 for c in channels) / len(channels)
    return [(c - mean) / math.sqrt(variance + 1e-6) * w + b for c, w, b in zip(channels, *norm, strict=True)]


@pytest.mark.parametrize("layer_scale", [0.5, 0.0])
def test_a_block_is_seven_taps_along_each_axis_and_channels_scaled_alone(layer_scale):
    torch.manual_seed(0)
    block, size = UXBlock(3, 7, 4, layer_scale, 0.0).double(), (5, 9, 6)
    perturb(block)
    x = noise(1, 3, *size).double()
    found = block(x)[0]
    norm = (block.norm.weight.tolist(), block.norm.bias.tolist())
    for voxel in ((0, 0, 0), (2, 4, 3), (4, 8, 5), (1, 7, 0)):
        ranges = [range(max(0, v - 3), min(n, v + 4)) for v, n in zip(voxel, size, strict=True)]
        seen = []
        for channel in range(3):
            total = block.depthwise.bias[channel].item()
            for place in itertools.product(*ranges):
                tap = tuple(p - v + 3 for p, v in zip(place, voxel, strict=True))
                total += (block.depthwise.weight[(channel, 0, *tap)] * x[(0, channel, *place)]).item()
            seen.append(total)
        for channel, value in enumerate(_normalised(seen, norm)):
            result = block.reduce.bias[channel].item()
            for j in range(4):
                row = 4 * channel + j
                hidden = block.expand.weight[row].item() * value + block.expand.bias[row].item()
                result += block.reduce.weight[channel, j].item() * hidden * (1 + math.erf(hidden / math.sqrt(2))) / 2
            scale = block.scale[channel].item() if layer_scale else 1.0
            expected = x[(0, channel, *voxel)].item() + scale * result
            assert found[(channel, *voxel)].item() == pytest.approx(expected, rel=1e-9)


def test_the_scales_begin_at_a_millionth():
    block = UXNet(1, 2, **SMALL).encoder.stages[3][0]
    assert torch.equal(block.scale, torch.full((10,), 1e-6))


def test_stochastic_depth_rises_along_the_encoder():
    network = _small(drop_path_rate=0.4)
    rates = [block.drop_path.probability for stage in network.encoder.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_the_whole_is_wired_as_published():
    network = _small()
    perturb(network)
    x = noise(1, 2, 32, 16, 48)
    with torch.no_grad():
        maps, y = [], x
        for stage in range(4):
            y = network.encoder.stages[stage](network.encoder.downs[stage](y))
            maps.append(network.encoder.norms[stage](y))
        y = network.ups[3](network.skips[4](maps[3]), network.skips[3](maps[2]))
        y = network.ups[2](y, network.skips[2](maps[1]))
        y = network.ups[1](y, network.skips[1](maps[0]))
        y = network.ups[0](y, network.skips[0](x))
        torch.testing.assert_close(network(x), network.out(network.last(y)), rtol=1e-4, atol=1e-4)


def test_every_parameter_learns_from_one_patch():
    network = _small(norm_affine=True, drop_path_rate=0.0)
    assert_every_parameter_learns(network, (1, 2, 32, 16, 48))
    assert sum("norm1.weight" in name for name, _ in network.named_parameters()) == 10


def test_elements_of_a_batch_are_independent():
    assert_elements_are_independent(_small(), (1, 2, 32, 16, 16))


def test_it_is_pickled_and_loaded():
    network = _small()
    perturb(network)
    assert_pickled_and_loaded_alike(network, UXNet(2, 3, **SMALL), (1, 2, 16, 32, 16))


def test_deep_supervision():
    scales = [(n, n, n) for n in (1, 2, 4, 8)]
    missing = assert_deep_supervision_trains(_small(deep_supervision=True), (1, 2, 32, 16, 48), scales)
    assert missing == {"coarse_outs.2.weight", "coarse_outs.2.bias"}  # the toolkit's loss leaves the coarsest out
    late = _small()
    late.deep_supervision = True
    assert isinstance(late(noise(1, 2, 32, 16, 16)), torch.Tensor)


def test_patches():
    assert divisor({"kernel_size": 13}) == (16, 16, 16)
    network = _small()
    with pytest.raises(ConfigError, match="one voxel at the bottleneck"):
        network(noise(2, 2, 16, 16, 16))
    with pytest.raises(ConfigError, match=r"divisible by \(16, 16, 16\), got an input of \(16, 24, 32\)"):
        network(noise(1, 2, 16, 24, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_sizes": [48, 96, 192]}, "feature_sizes must be 4 integers"),
        ({"depths": [2, 2, 0, 2]}, "depths must be 4 integers from 1"),
        ({"kernel_size": 6}, "kernel_size must be odd"),
        ({"hidden_size": 0}, "hidden_size and expansion"),
        ({"layer_scale": -1.0}, "layer_scale must not be negative"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        UXNet(1, 2, **options)
