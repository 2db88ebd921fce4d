"""nnFormer: the published structure, attention against a loop over voxels, and what the toolkit needs."""

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
from ukbob_seg.networks.baselines.nnformer import NNFormer, divisor
from ukbob_seg.networks.baselines.nnformer_attention import PositionBias, VolumeLayer

SMALL = {"embedding_dim": 8, "num_heads": (1, 2, 4, 2), "window_size": (2, 3, 4), "global_extent": (2, 3, 2)}


def _small(**options):
    torch.manual_seed(0)
    return NNFormer(2, 3, **{**SMALL, "drop_path_rate": 0.0, **options})


def test_it_has_the_parameters_of_the_authors_network():
    """For Synapse: one channel, 14 outputs, three resolutions. Published as 150.5 M; their layers add up to this."""
    with torch.device("meta"):
        network = NNFormer(1, 14, deep_supervision=True)
    assert parameter_count(network) == 150_054_210
    assert abs(parameter_count(network) / 150.5e6 - 1) < 0.005


def _layer_parameters(dim, heads, rows, over_skip):
    attention = (2 if over_skip else 3) * dim * (dim + 1) + dim * (dim + 1) + rows * heads
    return attention + 4 * dim + dim * 4 * dim * 2 + 5 * dim


def test_layers_add_up_from_the_papers_formulas():
    with torch.device("meta"):
        network = NNFormer(1, 14)
    rows = [7**3, 7**3, 15**3, 7**3]
    for stage, (dim, heads) in enumerate(zip((192, 384, 768, 1536), (6, 12, 24, 48), strict=True)):
        plain, over_skip = (_layer_parameters(dim, heads, rows[stage], kind) for kind in (False, True))
        assert [parameter_count(layer) for layer in network.encoder[stage]] == [plain, plain]
        if stage < 3:
            assert [parameter_count(layer) for layer in network.decoder[stage]] == [over_skip, plain]
            assert parameter_count(network.downs[stage]) == 27 * dim * 2 * dim + 2 * dim + 2 * dim
            assert parameter_count(network.ups[stage]) == 8 * 2 * dim * dim + dim + 4 * dim


def test_stages_have_the_published_widths_and_resolutions():
    """Two local stages, three global blocks around the bottleneck, two local stages; every second local one shifted."""
    with torch.device("meta"), torch.no_grad():
        network, shapes = NNFormer(1, 14).eval(), []
        for part in [*network.encoder, *network.decoder]:
            for layer in part:
                layer.register_forward_hook(
                    lambda layer, inputs, output: shapes.append((*output.shape[1:], layer.is_global, any(layer.shift)))
                )
        assert network(torch.empty(1, 1, 64, 128, 128)).shape == (1, 14, 64, 128, 128)
    local = [(32, 32, 32, 192, False, False), (32, 32, 32, 192, False, True),
             (16, 16, 16, 384, False, False), (16, 16, 16, 384, False, True)]  # fmt: skip
    whole = [(8, 8, 8, 768, True, False)] * 2
    bottleneck = [(4, 4, 4, 1536, True, False)] * 2
    assert shapes == local + whole + bottleneck + whole + local[2:] + local[:2]


def test_strides_per_axis():
    """As the authors do for ACDC: axes of few slices are halved less often."""
    options = {"embedding_strides": [1, 4, 4], "strides": [[1, 2, 2], [2, 2, 2], [1, 1, 2]]}
    assert divisor({}) == (16, 32, 32)
    assert divisor(options) == (2, 16, 32)
    assert divisor({"embedding_strides": [4, 4, 4]}) == (32, 32, 32)
    network = _small(**options, deep_supervision=True).eval()
    with torch.no_grad():
        outputs = network(noise(1, 2, 6, 16, 64))
    assert [tuple(o.shape[2:]) for o in outputs] == [(6, 16, 64), (6, 8, 32), (3, 4, 16)]


def test_every_offset_has_a_bias_and_those_beyond_share_the_edges():
    bias = PositionBias(2, (2, 3, 4))
    assert bias.table.shape == (3 * 5 * 7, 2)
    torch.nn.init.normal_(bias.table)
    shape = (3, 2, 6)
    found = bias(shape)
    grid = list(itertools.product(*map(range, shape)))
    for (i, p), (j, q) in itertools.product(enumerate(grid), repeat=2):
        z, y, x = (max(1 - e, min(e - 1, a - b)) + e - 1 for a, b, e in zip(p, q, (2, 3, 4), strict=True))
        assert torch.equal(found[:, i, j], bias.table[(z * 5 + y) * 7 + x])
    assert torch.equal(bias((2, 3, 4)).unique(), bias.table.unique())  # the whole table is used, nothing twice


def _attention_by_loops(layer, x, source, heads, window, shift):
    """Output of a layer's attention (D, H, W, C) before the residual connection, voxel after voxel.

    A voxel p of an axis is in the window floor((p - shift) / window): a shifted window is cut where the map ends.
    """
    attention, dim = layer.attention, x.shape[-1]
    size = x.shape[:3]
    extended = [math.ceil(n / w) * w for n, w in zip(size, window, strict=True)]  # padding is seen, too
    places = list(itertools.product(*map(range, extended)))

    def value_at(tensor, place):
        inside = all(p < n for p, n in zip(place, size, strict=True))
        return tensor[place] if inside else torch.zeros(dim, dtype=x.dtype)

    asked = torch.stack([value_at(x, place) for place in places])
    answers = torch.stack([value_at(source, place) for place in places])
    weight, bias = attention.project_in.weight, attention.project_in.bias
    if attention.over_skip:
        query, (key, value) = asked, (answers @ weight.T + bias).chunk(2, dim=-1)
    else:
        query, key, value = (asked @ weight.T + bias).chunk(3, dim=-1)
    ez, ey, ex = attention.bias.extent
    result = torch.empty_like(x)
    c = dim // heads
    for i, p in enumerate(places):
        if any(a >= n for a, n in zip(p, size, strict=True)):
            continue
        home = [(a - s) // w for a, s, w in zip(p, shift, window, strict=True)]
        seen = [j for j, q in enumerate(places)
                if [(a - s) // w for a, s, w in zip(q, shift, window, strict=True)] == home]  # fmt: skip
        mixed = []
        for head in range(heads):
            part = slice(head * c, (head + 1) * c)
            scores = []
            for j in seen:
                z, y, w = (max(1 - e, min(e - 1, a - b)) + e - 1
                           for a, b, e in zip(p, places[j], (ez, ey, ex), strict=True))  # fmt: skip
                row = (z * (2 * ey - 1) + y) * (2 * ex - 1) + w
                scores.append(query[i, part] @ key[j, part] / math.sqrt(c) + attention.bias.table[row, head])
            mixed.append(torch.stack(scores).softmax(0) @ value[seen, part])
        result[p] = torch.cat(mixed) @ attention.project_out.weight.T + attention.project_out.bias
    return result


CASES = {  # map, window (of a global layer: extent), options, window and shift that count
    "local": ((4, 3, 4), (2, 3, 2), {}, (2, 3, 2), (0, 0, 0)),
    "shifted": ((4, 6, 4), (2, 3, 2), {"shifted": True}, (2, 3, 2), (1, 1, 1)),
    "shifted and padded": ((3, 5, 5), (2, 2, 4), {"shifted": True}, (2, 2, 4), (1, 1, 2)),
    "shifted, one axis short": ((5, 2, 4), (2, 3, 2), {"shifted": True}, (2, 2, 2), (1, 0, 1)),
    "global": ((2, 3, 4), (2, 3, 4), {"is_global": True}, (2, 3, 4), (0, 0, 0)),
    "global on a larger map": ((3, 4, 3), (2, 3, 4), {"is_global": True, "shifted": True}, (3, 4, 3), (0, 0, 0)),
    "over a skip connection": ((4, 3, 4), (2, 3, 2), {"over_skip": True}, (2, 3, 2), (0, 0, 0)),
    "global over a skip connection": ((3, 2, 3), (2, 2, 2), {"over_skip": True, "is_global": True}, (3, 2, 3),
                                      (0, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("learning", [True, False])
def test_a_layer_is_attention_by_loops_then_an_mlp(name, learning):
    """By both ways that attention is computed: with and without gradients."""
    size, extent, options, window, shift = CASES[name]
    torch.manual_seed(0)
    layer = VolumeLayer(4, 2, extent, **options).double()
    torch.nn.init.normal_(layer.attention.bias.table)
    perturb(layer)
    maps = [noise(1, *size, 4, seed=seed).double() for seed in range(2)]
    given = maps if layer.attention.over_skip else maps[:1]
    with torch.set_grad_enabled(learning):
        found = layer(*given)[0].detach()
    with torch.no_grad():
        x, source = (layer.norm1(m)[0] for m in (given[0], given[-1]))
        after = sum(given)[0] + _attention_by_loops(layer, x, source, 2, window, shift)
        expected = after + layer.mlp.linear2(torch.nn.functional.gelu(layer.mlp.linear1(layer.norm2(after))))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_global", [True, False])
def test_global_layers_see_all_of_a_map_larger_than_planned(is_global):
    torch.manual_seed(0)
    layer, x = VolumeLayer(4, 1, (2, 2, 2), is_global=is_global), noise(1, 4, 6, 4, 4).requires_grad_()
    layer(x)[0, 0, 0, 0].sum().backward()
    assert bool(x.grad[0, -1, -1, -1].any()) == is_global


def test_the_embedding_is_four_convolutions_two_of_them_with_strides():
    for strides, first, second in (((2, 4, 4), (2, 2, 2), (1, 2, 2)), ((4, 1, 2), (2, 1, 2), (2, 1, 1))):
        layers = _small(embedding_strides=strides).embedding.layers
        convolutions = [part for part in layers if isinstance(part, torch.nn.Conv3d)]
        assert [part.stride for part in convolutions] == [first, (1, 1, 1), second, (1, 1, 1)]
        assert [part.out_channels for part in convolutions] == [4, 4, 8, 8]
    names = [type(part).__name__ for part in layers]
    assert names == ["Conv3d", "GELU", "ChannelNorm"] * 3 + ["Conv3d", "ChannelNorm"]
    x = noise(2, 8, 3, 4, 5)
    norm = layers[-1]
    perturb(norm)
    mean, deviation = x.mean(1, keepdim=True), (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = (x - mean) / deviation * norm.weight.view(-1, 1, 1, 1) + norm.bias.view(-1, 1, 1, 1)
    torch.testing.assert_close(norm(x), expected)


def test_the_whole_is_wired_as_published():
    network = _small().eval()
    perturb(network)
    x = noise(1, 2, 32, 96, 64)

    def up(index, x):
        part = network.ups[index]
        return part.expansion(part.norm(x).permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)

    with torch.no_grad():
        y, skips = network.embedding.layers(x).permute(0, 2, 3, 4, 1), []
        for stage in range(4):
            for layer in network.encoder[stage]:
                y = layer(y)
            skips.append(network.norms[stage](y))
            if stage < 3:
                part = network.downs[stage]
                y = part.norm(torch.nn.functional.gelu(y)).permute(0, 4, 1, 2, 3)
                y = part.reduction(y).permute(0, 2, 3, 4, 1)
        y = skips[3]
        for stage in (2, 1, 0):
            first, second = network.decoder[stage]
            y = second(first(up(stage, y), skips[stage]))
        torch.testing.assert_close(network(x), network.outs[0](y.permute(0, 4, 1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_stochastic_depth_rises_along_encoder_and_decoder():
    network = _small(drop_path_rate=0.7, depths=(2, 1, 2, 3))
    rates = [layer.drop_path.probability for stage in network.encoder for layer in stage]
    assert rates == pytest.approx([0.1 * n for n in range(8)])
    assert [len(stage) for stage in network.decoder] == [2, 1, 2]
    rates = [layer.drop_path.probability for stage in reversed(network.decoder) for layer in stage]
    assert rates == pytest.approx([0.7 * n / 4 for n in range(5)])


def test_every_parameter_learns_from_one_patch():
    assert_every_parameter_learns(_small(), (1, 2, 32, 96, 64))


def test_training_drops_whole_branches_and_evaluation_none():
    network, x = _small(drop_path_rate=0.5), noise(1, 2, 16, 64, 32)
    with torch.no_grad():
        assert not torch.equal(network(x), network(x))
        network.eval()
        assert torch.equal(network(x), network(x))


def test_elements_of_a_batch_are_independent():
    assert_elements_are_independent(_small(), (1, 2, 16, 64, 32))


def test_it_is_pickled_and_loaded():
    network = _small()
    perturb(network)
    assert_pickled_and_loaded_alike(network, NNFormer(2, 3, **SMALL), (1, 2, 48, 32, 64))


def test_deep_supervision():
    network = _small(deep_supervision=True)
    missing = assert_deep_supervision_trains(network, (1, 2, 32, 96, 64), [(n, n, n) for n in (1, 2, 4)])
    assert missing == {"outs.2.weight", "outs.2.bias"}  # the toolkit's loss leaves the coarsest out
    late = _small()
    late.deep_supervision = True
    assert isinstance(late(noise(1, 2, 16, 32, 64)), torch.Tensor)


@pytest.mark.parametrize("size", [(16, 32, 32), (48, 32, 96), (16, 160, 32)])
def test_any_patch_that_the_divisor_divides(size):
    with torch.no_grad():
        assert _small()(noise(1, 2, *size)).shape == (1, 3, *size)


def test_other_patches_are_refused():
    with pytest.raises(ConfigError, match=r"divisible by \(16, 32, 32\), got an input of \(24, 32, 32\)"):
        _small()(noise(1, 2, 24, 32, 32))
    with pytest.raises(ConfigError, match=r"takes \(batch, 2, z, y, x\)"):
        _small()(noise(1, 3, 16, 32, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_dim": 9}, "embedding_dim must be even"),
        ({"num_heads": [5, 12, 24, 48]}, r"num_heads \(5, 12, 24, 48\) must divide"),
        ({"num_heads": [6, 12, 24]}, "num_heads must be 4 integers"),
        ({"depths": [2, 2, 0, 2]}, "depths must be 4 integers"),
        ({"embedding_strides": [2, 4, 3]}, "embedding_strides must be 3 integers of 1, 2, 4"),
        ({"strides": [[2, 2, 2], [2, 2, 2]]}, "strides must be 3 lists"),
        ({"strides": [[2, 2, 2], [2, 2, 4], [2, 2, 2]]}, "strides must be 3 integers of 1, 2"),
        ({"strides": 2}, "strides must be 3 lists"),
        ({"window_size": 4}, "window_size must be 3 integers"),
        ({"global_extent": [8, 8, True]}, "global_extent must be 3 integers"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must leave"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate must be in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        NNFormer(1, 2, **options)
