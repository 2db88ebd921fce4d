"""3D TransUNet: nnU-Net's and ViT-B's sizes, its parts against explicit loops, and what every baseline must do."""

import math
from itertools import product

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
    dropouts,
    image,
    randomised,
    shapes_of,
)

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.baselines.transformer_blocks import as_tokens
from ukbob_seg.networks.baselines.transunet import TransUNet, divisor
from ukbob_seg.networks.baselines.transunet_decoder import OrganQueryDecoder, _Attention, outside, position_code

SMALL = {
    "features_per_stage": [4, 6, 8, 10],
    "strides": [1, [1, 2, 2], 2, 2],
    "kernel_sizes": [[1, 3, 3], 3, 3, 3],
    "vit_layers": 2,
    "vit_dim": 12,
    "vit_heads": 3,
    "vit_hidden_dim": 20,
    "decoder_dim": 96,
    "decoder_heads": 4,
}
SHAPE = (8, 16, 16)
QUERIES = {"decoder_layers": 4}


def small(**options):
    torch.manual_seed(0)
    return TransUNet(2, 3, **{**SMALL, "patch_size": SHAPE, **options})


def test_the_sizes_of_its_halves():
    """nnU-Net's U-Net on BraTS has 31.2 M parameters, ViT-B's twelve layers 85.05 M (Dosovitskiy et al., Table 1: 86 M
    with the embedding of patches of 16 x 16 pixels)."""
    with torch.device("meta"):
        network = TransUNet(4, 4)
    unet = count(network.encoder) + count(network.ups) + count(network.decoder) + count(network.out)
    assert round(unet / 1e6, 1) == 31.2
    layer = 4 * 768**2 + 4 * 768 + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert count(network.vit.layers) == 12 * layer == 85_054_464
    assert [part.attention.heads for part in network.vit.layers] == [12] * 12
    embedding = 2 * 320 * 768 + 768 + 320 + 4**3 * 768 + 2 * 768  # in and out, positions, last norm
    assert count(network.vit) == 12 * layer + embedding
    assert count(network) == unet + count(network.vit)
    assert sorted(set(dropouts(network))) == [0.1]


def test_the_u_net_is_nnunets():
    """The same numbers from nnU-Net's network with our weights; its upsampling and outputs have a bias that the paper's
    (of nnU-Net's first version) have not."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    strides = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)]
    kernels = [(1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)]
    reference = unet.PlainConvUNet(
        2, 4, SMALL["features_per_stage"], nn.Conv3d, kernels, strides, [2] * 4, 3, [2] * 3, True, nn.InstanceNorm3d,
        {"affine": True}, None, None, nn.LeakyReLU, {"inplace": True}, deep_supervision=True,
    )  # fmt: skip
    network = randomised(small(deep_supervision=True))
    network.vit = None
    kinds = (nn.Conv3d, nn.ConvTranspose3d, nn.InstanceNorm3d)

    def layers(*parts):
        return [layer for part in parts for layer in part.modules() if isinstance(layer, kinds)]

    heads = [*[*network.coarse_outs][::-1], network.out]
    ours = layers(network.encoder, network.decoder, network.ups, nn.ModuleList(heads))
    theirs = layers(
        reference.encoder, reference.decoder.stages, reference.decoder.transpconvs, reference.decoder.seg_layers
    )
    with torch.no_grad():
        for one, other in zip(ours, theirs, strict=True):
            other.weight.copy_(one.weight)
            other.bias.zero_() if one.bias is None else other.bias.copy_(one.bias)
        window = image(2, SHAPE, batch=2)
        for one, other in zip(network(window), reference(window), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_stages_and_tokens():
    with torch.device("meta"):
        network = TransUNet(1, 5)
        window = torch.empty(1, 1, 128, 64, 128)
        found = shapes_of(
            [*network.encoder, network.vit.layers, network.vit, *network.decoder], lambda: network(window)
        )
    at = [(128 // 2**level, 64 // 2**level, 128 // 2**level) for level in range(6)]
    widths = [32, 64, 128, 256, 320, 320]
    maps = [(1, width, *shape) for width, shape in zip(widths, at, strict=True)]
    assert found == [*maps, (1, 4 * 2 * 4, 768), maps[5], *maps[4::-1]]


def test_the_vit_is_written_out():
    network = randomised(small()).eval()
    vit = network.vit
    for grid in ((2, 2, 2), (1, 3, 2)):
        x = image(10, grid)
        with torch.no_grad():
            tokens = as_tokens(vit.embed(x)) + vit.position(grid)
            for layer in vit.layers:
                tokens = layer(tokens)
            tokens = F.layer_norm(tokens, (12,), vit.norm.weight, vit.norm.bias, 1e-6)
            expected = tokens @ vit.out.weight.flatten(1).T + vit.out.bias
            torch.testing.assert_close(vit(x).flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)
    assert tuple(vit.position.weight.shape) == (1, 12, 2, 2, 2)


def test_masked_attention_is_an_explicit_softmax_over_what_is_allowed():
    torch.manual_seed(0)
    attention = _Attention(6, 2).double()
    query, key = torch.randn(2, 3, 6).double(), torch.randn(2, 5, 6).double()
    value = torch.randn(2, 5, 6).double()
    blocked = torch.rand(2, 3, 5) < 0.5
    blocked[..., 0] = False
    q, k, v = attention.query(query), attention.key(key), attention.value(value)
    mixed = torch.zeros_like(query)
    for b, head, i in product(range(2), range(2), range(3)):
        part = slice(3 * head, 3 * head + 3)
        seen = [j for j in range(5) if not blocked[b, i, j]]
        weights = [(q[b, i, part] @ k[b, j, part] / 3**0.5).exp() for j in seen]
        mixed[b, i, part] = sum(w / sum(weights) * v[b, j, part] for w, j in zip(weights, seen, strict=True))
    torch.testing.assert_close(attention(query, key, value, blocked), attention.out(mixed))
    assert (attention(query, key, value) - attention(query, key, value, blocked)).abs().max() > 1e-3


def test_queries_look_where_their_mask_is_and_everywhere_without_one():
    mask = torch.full((1, 3, 2, 4, 4), -1.0)
    mask[0, 0, :, :2, :2] = 2.0  # one coarse voxel
    mask[0, 1] = 3.0  # all of them; query 2 has none
    assert outside(mask, (1, 2, 2))[0].tolist() == [[False, True, True, True], [False] * 4, [False] * 4]


def test_the_position_code_is_sines_and_cosines_of_each_axis():
    code = position_code((2, 3, 4), 12, torch.device("cpu"))
    assert code.shape == (24, 12)
    for z, y, x in product(range(2), range(3), range(4)):
        expected = []
        for place, n in ((z, 2), (y, 3), (x, 4)):
            angle = (place + 1) / n * 2 * math.pi
            for rate in (1.0, 10_000 ** (-2 / 4)):
                expected += [math.sin(angle * rate), math.cos(angle * rate)]
        torch.testing.assert_close(code[z * 12 + y * 4 + x], torch.tensor(expected))


def test_masks_are_products_of_queries_and_voxels():
    torch.manual_seed(0)
    decoder = OrganQueryDecoder([5, 4, 3], 2, 7, 2, 96, 4).double()
    finest, queries = torch.randn(2, 2, 2, 3, 4).double(), torch.randn(2, 7, 96).double()
    voxels = decoder.mask_features(finest)
    embedded = decoder.embed(decoder.norm(queries))
    found = decoder.masks(queries, finest)
    for b, q, z in product(range(2), range(7), range(2)):
        expected = (embedded[b, q][:, None, None] * voxels[b, :, z]).sum(dim=0)
        torch.testing.assert_close(found[b, q, z], expected)


def test_layers_refine_queries_map_by_map():
    """Cross-attention with the mask of the layer before, self-attention, feed-forward; coarsest map first, in turn."""
    torch.manual_seed(0)
    decoder = OrganQueryDecoder([5, 4, 3], 2, 7, 4, 96, 4).double()
    maps = [torch.randn(1, c, n, n, n).double() for c, n in ((5, 1), (4, 2), (3, 3))]
    finest = torch.randn(1, 2, 6, 6, 6).double()
    queries, place = decoder.query[None], decoder.query_position
    masks = [decoder.masks(queries, finest)]
    for i, layer in enumerate(decoder.layers):
        x = maps[i % 3]
        memory = decoder.project[i % 3](x)
        value = memory.flatten(2).transpose(1, 2) + decoder.level[i % 3]
        key = value + position_code(x.shape[2:], 96, x.device)
        blocked = outside(masks[-1], x.shape[2:])
        queries = layer.norm1(queries + layer.cross_attention(queries + place, key, value, blocked))
        queries = layer.norm2(queries + layer.self_attention(queries + place, queries + place, queries))
        queries = layer.norm3(queries + layer.linear2(layer.linear1(queries).relu()))
        masks.append(decoder.masks(queries, finest))
    for one, other in zip(decoder(maps, finest, every=True), masks[::-1], strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(decoder(maps, finest), [masks[-1]])


@pytest.mark.parametrize(
    "options", [{}, QUERIES, {"decoder_layers": 2, "vit_layers": 0}], ids=["encoder", "both", "decoder"]
)
def test_all_parameters_learn_from_a_batch_of_one(options):
    network = randomised(small(**options))
    assert (network.out is None) == bool(options)
    assert (network.vit is None) == (options.get("vit_layers") == 0)
    check_all_parameters_learn(network, image(2, SHAPE))


@pytest.mark.parametrize("options", [{}, QUERIES], ids=["encoder", "both"])
def test_bfloat16(options):
    network = small(**options)
    check_bfloat16(network, image(2, SHAPE))
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("options", [{}, QUERIES], ids=["encoder", "both"])
def test_batch_elements_are_independent(options):
    check_elements_are_independent(randomised(small(**options)), 2, SHAPE)


def test_deep_supervision():
    check_deep_supervision(
        lambda **options: TransUNet(2, 3, **SMALL, patch_size=SHAPE, vit_dropout=0.0, **options), image(2, SHAPE),
        [(8, 16, 16), (8, 8, 8), (4, 4, 4)],
    )  # fmt: skip


def test_deep_supervision_of_queries():
    check_deep_supervision(
        lambda **options: TransUNet(2, 3, **SMALL, **QUERIES, patch_size=SHAPE, **options), image(2, SHAPE), [SHAPE] * 5
    )


def test_windows():
    assert divisor({}) == (32, 32, 32)
    assert divisor(SMALL) == (4, 8, 8)
    network = small(patch_size=[4, 8, 16], **QUERIES).eval()
    with torch.no_grad():
        assert network(image(2, (4, 24, 16))).shape == (1, 3, 4, 24, 16)
    check_window_errors(ConfigError, network, 2, (4, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": [1, 2, 2]}, "strides must have 4 entries"),
        ({"n_conv_per_stage": [2, 2, 0, 2]}, "n_conv_per_stage must have 4 entries of at least 1"),
        ({"n_conv_per_stage_decoder": [2, 2]}, "n_conv_per_stage_decoder must have 3 entries"),
        ({"kernel_sizes": [3, 3, 3, 2]}, "odd kernel_sizes"),
        ({"vit_layers": 0}, "one of vit_layers and decoder_layers must be above 0"),
        ({"features_per_stage": [4, 0, 8, 10]}, "features_per_stage must have 4 entries of at least 1"),
        ({"vit_hidden_dim": 0}, "vit_hidden_dim must be at least 1"),
        ({"vit_heads": 5}, "vit_dim must be a multiple of its attention heads"),
        ({"vit_dropout": 1}, r"vit_dropout must be in \[0, 1\)"),
        ({"patch_size": [8, 12, 16]}, "TransUNet needs a patch_size"),
        ({**QUERIES, "decoder_dim": 64}, "decoder_dim must be a multiple of 96"),
        ({**QUERIES, "decoder_heads": 5}, "decoder_dim must be a multiple of its attention heads"),
    ],
)
def test_wrong_arguments_are_explained(options, message):
    with pytest.raises(ConfigError, match=message):
        small(**options)


def test_queries_need_three_coarser_maps():
    shallow = {key: SMALL[key][:3] for key in ("features_per_stage", "strides", "kernel_sizes")}
    small(**shallow)
    with pytest.raises(ConfigError, match="decoder_layers need at least 4 stages, got 3"):
        small(**shallow, **QUERIES)
