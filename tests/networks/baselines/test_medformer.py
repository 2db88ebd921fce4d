"""MedFormer: the authors' size and stages, its parts against explicit loops, and what every baseline must do."""

from itertools import product
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformer_baselines import (
    check_all_parameters_learn,
    check_bfloat16,
    check_deep_supervision,
    check_elements_are_independent,
    check_window_errors,
    count,
    image,
    randomised,
    shapes_of,
)

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.baselines.medformer import MedFormer, divisor
from ukbob_seg.networks.baselines.medformer_blocks import (
    AttentionBlock,
    BasicBlock,
    BidirectionalAttention,
    InvertedResidual,
    MapFusion,
    PatchMerging,
    SemanticMap,
    Style,
)

SMALL = {
    "base_channels": 4,
    "channels": [4, 8, 12, 16, 12, 8, 4, 4],
    "conv_blocks": [1, 1, 0, 0, 0, 1, 1, 1],
    "attention_blocks": [0, 1, 2, 1, 2, 2, 0, 0],
    "heads": [1, 2, 3, 4, 3, 2, 1, 1],
    "map_size": [1, 2, 2],
    "expansion": 2,
    "fusion_dim": 8,
    "fusion_heads": 2,
    "fusion_layers": 1,
    "strides": [[1, 2, 2], 2, 2, 2],
    "kernels": [[1, 3, 3], 3, 3, 3, 3],
}
SHAPE = (16, 32, 16)
STYLE = Style(nn.ReLU, False, 3, 0.0, 0.0)
CUBE = (3, 3, 3)


def small(**options):
    torch.manual_seed(0)
    return MedFormer(2, 3, **{**SMALL, **options})


def authors_count(in_channels, out_channels, base, channels, conv, attention, strides, kernels, elements, fusion):
    """Parameters of the authors' MedFormer (model/dim3/medformer.py at f45a7b9, expansion 4), added up by hand."""

    def block(before, after, k):
        return (before + after) * after * k + (before * after * k if before != after else 0)

    def separable(before, after, k):
        return before * k + before * after

    def bidirectional(features, semantic, out, k, with_map=True):
        hidden = 4 * out
        attention = separable(features, 2 * out, k) + separable(out, out, k) + semantic * 2 * out
        attention += out * semantic if with_map else 0
        shortcut = features * out if features != out else 0
        squeeze = 2 * hidden * (hidden // 4) + hidden // 4 + hidden
        return attention + shortcut + out * hidden + hidden * k + squeeze + hidden * out

    k = [prod(kernel) for kernel in kernels]
    total = in_channels * base * k[0] + block(base, base, k[0])
    widths = [base, *channels]
    for i in range(4):
        c = widths[i + 1]
        total += separable(prod(strides[i]) * widths[i], c, k[i + 1]) + conv[i] * block(c, c, k[i + 1])
        total += 27 * c * (c + elements) if i else 0
        total += attention[i] * bidirectional(c, c, c, k[i + 1])
    total += 2 * sum(channels[1:4]) * fusion + 2 * (4 * fusion**2 + fusion + 2 * (fusion**2 + fusion) + 4 * fusion)
    for i in range(4, 8):
        width, c, kernel = widths[i] + widths[7 - i], channels[i], k[7 - i]
        if attention[i]:
            total += width * c  # joins maps
        for j in range(attention[i]):
            total += bidirectional(width if j == 0 else c, c, c, kernel, i < 5 or j < attention[i] - 1)
        for j in range(conv[i]):
            total += block(width if j == 0 and not attention[i] else c, c, kernel)
    return total + channels[7] * out_channels + out_channels


@pytest.mark.parametrize("name", ["amos", "bcv"])
def test_the_authors_size(name):
    """Less the values of the last block's features, which nothing uses (one output per channel of its input)."""
    channels = [64, 128, 256, 320, 256, 128, 64, 32]
    if name == "amos":
        conv, attention, strides, kernels = (
            (2, 1, 0, 0, 0, 1, 2, 2),
            (0, 1, 4, 6, 4, 1, 0, 0),
            [(2,) * 3] * 4,
            [CUBE] * 5,
        )
        outputs, options, into_last = 16, {}, 256 + 128
    else:
        conv, attention = (2, 0, 0, 0, 0, 0, 2, 2), (0, 2, 4, 6, 4, 2, 0, 0)
        strides, kernels = [(1, 2, 2)] * 2 + [(2, 2, 2)] * 2, [(1, 3, 3)] * 2 + [CUBE] * 3
        options = {"conv_blocks": conv, "attention_blocks": attention, "strides": strides, "kernels": kernels}
        outputs, into_last = 14, 128
    with torch.device("meta"):
        network = MedFormer(1, outputs, **options)
    expected = authors_count(1, outputs, 32, channels, conv, attention, strides, kernels, 64, 320)
    assert count(network) + into_last * 128 == expected
    if name == "amos":
        assert round(expected / 1e6, 2) == 39.59
        assert round(count(network) / 1e6, 2) == 39.54


def test_the_authors_stages():
    with torch.device("meta"):
        network = MedFormer(1, 16)
        window = torch.empty(1, 1, 128, 128, 96)
        at = {level: (128 // 2**level, 128 // 2**level, 96 // 2**level) for level in range(5)}
        found = shapes_of(
            [network.stem, *(stage.merging for stage in network.down), network.out], lambda: network(window)
        )
    assert found == [
        (1, 32, *at[0]), (1, 64, *at[1]), (1, 128, *at[2]), (1, 256, *at[3]), (1, 320, *at[4]), (1, 16, *at[0]),
    ]  # fmt: skip
    blocks = [[len(stage.conv_blocks), len(stage.attention_blocks)] for stage in (*network.down, *network.up)]
    assert blocks == [[2, 0], [1, 1], [0, 4], [0, 6], [0, 4], [1, 1], [2, 0], [2, 0]]
    assert [stage.semantic_map is not None for stage in network.down] == [False, True, True, True]


def bidirectional_by_loops(attention, features, semantic):
    """One matrix of scores; every voxel weighs the elements by it, every element the voxels."""
    out, heads = attention.out_features[1].out_channels, attention.heads
    size = out // heads
    feature_query, feature_value = attention.project_features(features).flatten(2).split(out, dim=1)
    map_query, map_value = attention.project_map(semantic).flatten(2).split(out, dim=1)
    voxels, elements = feature_query.shape[2], map_query.shape[2]
    new_features, new_map = torch.zeros_like(feature_query), torch.zeros_like(map_query)
    for b, head in product(range(len(features)), range(heads)):
        part = slice(head * size, (head + 1) * size)
        scores = [
            [(feature_query[b, part, i] @ map_query[b, part, j] / size**0.5).exp() for j in range(elements)]
            for i in range(voxels)
        ]
        for i in range(voxels):
            total = sum(scores[i])
            new_features[b, part, i] = sum(scores[i][j] / total * map_value[b, part, j] for j in range(elements))
        for j in range(elements):
            total = sum(scores[i][j] for i in range(voxels))
            new_map[b, part, j] = sum(scores[i][j] / total * feature_value[b, part, i] for i in range(voxels))
    shape = features.shape[2:]
    return (
        attention.out_features(new_features.unflatten(2, shape)),
        attention.out_map(new_map.unflatten(2, semantic.shape[2:])),
    )


def test_bidirectional_attention_shares_one_matrix_of_scores():
    torch.manual_seed(0)
    attention = BidirectionalAttention(STYLE, 5, 4, 6, 3, CUBE).double()
    features, semantic = torch.randn(2, 5, 2, 3, 2).double(), torch.randn(2, 4, 1, 2, 2).double()
    with torch.no_grad():
        for part in attention.parameters():
            part.mul_(3)  # scores far from even
        expected = bidirectional_by_loops(attention, features, semantic)
        found = attention(features, semantic)
    assert [tuple(x.shape) for x in found] == [(2, 6, 2, 3, 2), (2, 4, 1, 2, 2)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_without_a_new_map_the_features_are_the_same():
    torch.manual_seed(0)
    whole, half = (BidirectionalAttention(STYLE, 5, 4, 6, 3, CUBE, update) for update in (True, False))
    state = {name: value for name, value in whole.state_dict().items() if not name.startswith("out_map")}
    state["project_features.1.weight"] = state["project_features.1.weight"][:6]  # queries come first
    half.load_state_dict(state)
    features, semantic = torch.randn(1, 5, 2, 3, 2), torch.randn(1, 4, 1, 2, 2)
    new, none = half(features, semantic)
    torch.testing.assert_close(new, whole(features, semantic)[0])
    assert none is None


def test_an_attention_block_adds_to_both_maps():
    torch.manual_seed(0)
    for features, out in ((6, 6), (4, 6)):
        block = AttentionBlock(STYLE, features, 5, out, 2, CUBE)
        x, semantic = torch.randn(1, features, 3, 3, 3), torch.randn(1, 5, 1, 2, 2)
        change, map_change = block.attention(F.instance_norm(x), F.instance_norm(semantic))
        shortcut = x
        if features != out:
            shortcut = block.shortcut[-1](F.instance_norm(x, eps=1e-4).relu())
        new, new_map = block(x, semantic)
        torch.testing.assert_close(new, block.feed_forward(change + shortcut))
        torch.testing.assert_close(new_map, semantic + map_change)


def test_a_semantic_map_holds_weighted_means():
    torch.manual_seed(0)
    make = SemanticMap(3, (1, 2, 2)).double()
    x = 5 * torch.randn(2, 3, 2, 3, 4).double()
    values = F.conv3d(x, make.value.weight, padding=1)
    logits = F.conv3d(x, make.weight.weight, padding=1)
    found = make(x)
    assert found.shape == (2, 3, 1, 2, 2)
    for b, element in product(range(2), range(4)):
        weights = logits[b, element].exp() / logits[b, element].exp().sum()
        expected = (values[b] * weights).sum(dim=(1, 2, 3))
        torch.testing.assert_close(found[b].flatten(1)[:, element], expected)


def test_fusion_lets_every_map_see_every_other():
    torch.manual_seed(0)
    fusion = MapFusion([3, 5], 8, 2, 1, 0.0)
    maps = [torch.randn(1, 3, 1, 2, 2), torch.randn(1, 5, 1, 2, 2)]
    tokens = [
        [into.weight[:, :, 0, 0, 0] @ x[0].flatten(1)[:, j] for j in range(4)]
        for into, x in zip(fusion.into, maps, strict=True)
    ]
    mixed = fusion.layers(torch.stack([*tokens[0], *tokens[1]])[None])[0]
    found = fusion(maps)
    assert [x.shape for x in found] == [x.shape for x in maps]
    for number, out in enumerate(fusion.out):
        for j in range(4):
            expected = out.weight[:, :, 0, 0, 0] @ mixed[4 * number + j]
            torch.testing.assert_close(found[number][0].flatten(1)[:, j], expected)
    changed = fusion([maps[0], maps[1] + 1])
    assert (changed[0] - found[0]).abs().max() > 1e-4


def test_an_inverted_residual_block_written_out():
    torch.manual_seed(0)
    block = InvertedResidual(STYLE, 4, CUBE)
    x = torch.randn(1, 4, 3, 4, 5)
    hidden = F.conv3d(F.instance_norm(x, eps=1e-4).relu(), block.expand[-1].weight)
    hidden = F.conv3d(F.instance_norm(hidden, eps=1e-4).relu(), block.depthwise[-1].weight, padding=1, groups=12)
    means = hidden.mean(dim=(2, 3, 4))
    gate = block.squeeze_excitation.squeeze.weight.flatten(1) @ means[0] + block.squeeze_excitation.squeeze.bias
    gate = block.squeeze_excitation.excite.weight.flatten(1) @ gate.relu() + block.squeeze_excitation.excite.bias
    hidden = hidden * gate.sigmoid()[None, :, None, None, None]
    expected = x + F.conv3d(F.instance_norm(hidden, eps=1e-4), block.reduce[-1].weight)
    torch.testing.assert_close(block(x), expected)


def test_merging_stacks_neighbours_and_a_basic_block_has_a_shortcut():
    torch.manual_seed(0)
    merging = PatchMerging(STYLE, 2, 3, (1, 2, 2), CUBE)
    x = torch.randn(1, 2, 2, 4, 4)
    stacked = torch.cat([x[:, :, :, j::2, k::2] for j in (0, 1) for k in (0, 1)], dim=1)
    depthwise = F.conv3d(F.instance_norm(stacked), merging.reduction[0].weight, padding=1, groups=8)
    torch.testing.assert_close(merging(x), F.conv3d(depthwise, merging.reduction[1].weight))
    block = BasicBlock(STYLE, 2, 3, CUBE)
    active = F.instance_norm(x, eps=1e-4).relu()
    first = F.conv3d(active, block.conv1[-1].weight, padding=1)
    second = F.conv3d(F.instance_norm(first, eps=1e-4).relu(), block.conv2[-1].weight, padding=1)
    torch.testing.assert_close(block(x), second + F.conv3d(active, block.shortcut[-1].weight, padding=1))


def test_the_decoder_gets_the_fused_maps_of_its_resolution():
    """The deepest first, then those of the skip connections; the two finest stages get none."""
    network = small().eval()
    fused, joined = [], []
    network.map_fusion.register_forward_hook(lambda m, i, output: fused.extend(output))
    for stage in network.up:
        stage.register_forward_pre_hook(lambda m, inputs: joined.append(inputs[2:]))
    network(image(2, SHAPE))
    assert [x.shape[1] for x in fused] == [8, 12, 16]
    assert joined[0][0] is fused[2]
    assert joined[0][1] is fused[1]
    assert joined[1][1] is fused[0]
    assert [len(stage.attention_blocks) for stage in network.up] == [2, 2, 0, 0]
    assert [x[1] is None for x in joined] == [False, False, True, True]


@pytest.mark.parametrize("options", [{}, {"norm_affine": True, "activation": "gelu"}])
def test_all_parameters_learn_from_a_batch_of_one(options):
    network = small(**options)
    affine = [m.weight is not None for m in network.modules() if isinstance(m, nn.InstanceNorm3d)]
    assert set(affine) == {"norm_affine" in options}
    check_all_parameters_learn(randomised(network), image(2, SHAPE))


def test_bfloat16():
    check_bfloat16(small(), image(2, SHAPE))


def test_batch_elements_are_independent():
    check_elements_are_independent(randomised(small()), 2, SHAPE)


def test_deep_supervision():
    check_deep_supervision(
        lambda **options: MedFormer(2, 3, **SMALL, **options), image(2, SHAPE), [(16, 32, 16), (8, 8, 4), (4, 4, 2)]
    )


def test_dropout_only_while_training():
    window = image(2, SHAPE)
    for options in ({"attention_dropout": 0.3}, {"projection_dropout": 0.3}):
        network = small(**options)
        assert not torch.equal(network(window), network(window))
        network.eval()
        assert torch.equal(network(window), network(window))


def test_windows():
    assert divisor({}) == (16, 16, 16)
    assert divisor(SMALL) == (8, 16, 16)
    network = small().eval()
    with torch.no_grad():
        assert network(image(2, (8, 16, 32))).shape == (1, 3, 8, 16, 32)
    check_window_errors(ConfigError, network, 2, (8, 16, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": [4] * 7}, "channels must have 8 entries"),
        ({"conv_blocks": [0] * 8}, "the last two conv_blocks must be at least 1"),
        ({"attention_blocks": [1, 1, 2, 1, 2, 2, 0, 0]}, "attention_blocks must be at least 1 in stages 1 to 5"),
        ({"attention_blocks": [0, 1, 2, 1, 2, 0, 0, 0]}, "attention_blocks must be at least 1 in stages 1 to 5"),
        ({"heads": [1, 3, 3, 4, 3, 2, 1, 1]}, r"channels\[1\] must be a multiple of its attention heads, got 8 and 3"),
        ({"map_size": [1, 1, 1]}, "map_size of a single element"),
        ({"expansion": 0}, "must be at least 1"),
        ({"fusion_heads": 3}, "fusion_dim must be a multiple"),
        ({"strides": [2, 2, 2]}, "4 strides and 5 kernels, got 3 and 5"),
        ({"kernels": [3, 3, 3, 3, [3, 2, 3]]}, "kernels must be odd"),
        ({"activation": "tanh"}, "activation must be one of relu, gelu, silu"),
        ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_explained(options, message):
    with pytest.raises(ConfigError, match=message):
        small(**options)
