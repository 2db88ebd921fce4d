"""TransBTS: the paper's size and stages, and what every baseline must do."""

import pytest
import torch
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
from ukbob_seg.networks.baselines.transbts import TransBTS, divisor
from ukbob_seg.networks.baselines.transformer_blocks import as_tokens

SMALL = {"base_channels": 8, "embedding_dim": 12, "heads": 3, "layers": 2, "hidden_dim": 20}
SHAPE = (16, 24, 8)


def small(**options):
    torch.manual_seed(0)
    return TransBTS(2, 3, **{**SMALL, "patch_size": SHAPE, **options})


def test_the_papers_size():
    """32.99 M parameters on BraTS (four images, background and three tumour classes), of which the code leaves two
    layers without use: Linear(512, 512) and LayerNorm(512)."""
    with torch.device("meta"):
        network = TransBTS(4, 4)
    unused = 512 * 512 + 512 + 2 * 512
    assert count(network) + unused == 32_987_588
    assert round((count(network) + unused) / 1e6, 2) == 32.99
    # Of that the transformer: four times 12 d^2 less the usual width, as in the paper's d = 512, 8 heads, 4,096 wide.
    layer = 3 * 512**2 + 512**2 + 512 + 2 * 512 * 4096 + 4096 + 512 + 4 * 512
    assert count(network.transformer) == 4 * layer
    assert count(network.position) == 16**3 * 512
    assert [block.attention.heads for block in network.transformer] == [8] * 4


def test_the_papers_stages():
    """Figure 1: 16 channels at full resolution, 128 at an eighth; 512 for the transformer; and back."""
    with torch.device("meta"):
        network = TransBTS(4, 4).eval()
        window = torch.empty(1, 4, 128, 128, 128)
        found = shapes_of(
            [*network.encoder.stages, network.linear_projection, network.transformer, network.feature_mapping,
             *network.decoder],
            lambda: network(window),
        )  # fmt: skip
        assert network(window).shape == (1, 4, 128, 128, 128)
    at = {level: (128 // 2**level,) * 3 for level in range(4)}
    assert found == [
        (1, 16, *at[0]), (1, 32, *at[1]), (1, 64, *at[2]), (1, 128, *at[3]),
        (1, 512, *at[3]), (1, 4096, 512), (1, 128, *at[3]),
        (1, 64, *at[2]), (1, 32, *at[1]), (1, 16, *at[0]),
    ]  # fmt: skip


def test_dropout_is_the_papers_and_only_while_training():
    with torch.device("meta"):
        network = TransBTS(4, 4)
    rates = sorted({round(rate, 3) for rate in dropouts(network)})
    assert rates == [0.1, 0.19, 0.2]  # 0.19: two of 0.1 in a row
    assert all(layer.attention.dropout == 0.1 for layer in network.transformer)
    network = small()
    window = image(2, SHAPE)
    assert not torch.equal(network(window), network(window))
    network.eval()
    assert torch.equal(network(window), network(window))


def test_positions_reach_the_transformer():
    """Without the embedding a permutation of the tokens would permute the transformer's result; with it, not."""
    network = randomised(small()).eval()
    seen = []
    network.transformer.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    network.linear_projection.register_forward_hook(lambda m, i, output: seen.append(as_tokens(output)))
    with torch.no_grad():
        network(image(2, SHAPE))
        network(image(2, (24, 16, 16)))  # another grid
    assert (network.position.weight.abs() > 0).all()
    torch.testing.assert_close(seen[1] - seen[0], network.position((2, 3, 1)).detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(seen[3] - seen[2], network.position((3, 2, 2)).detach(), rtol=1e-3, atol=1e-5)


def test_all_parameters_learn_from_a_batch_of_one():
    check_all_parameters_learn(small(), image(2, SHAPE))


def test_bfloat16():
    wide = (16, 24, 16)  # deepest maps one voxel wide would meet a fault of oneDNN, see networks/convolution.py
    check_bfloat16(small(patch_size=wide), image(2, wide))


def test_batch_elements_are_independent():
    check_elements_are_independent(randomised(small()), 2, SHAPE)


def test_deep_supervision():
    check_deep_supervision(
        lambda **options: TransBTS(2, 3, **SMALL, patch_size=SHAPE, **options), image(2, SHAPE),
        [(16, 24, 8), (8, 12, 4), (4, 6, 2)],
    )  # fmt: skip


def test_windows():
    assert divisor({}) == (8, 8, 8)
    assert divisor({"patch_size": [96, 96, 96]}) == (8, 8, 8)
    network = small(patch_size=[8, 16, 8]).eval()
    with torch.no_grad():
        assert network(image(2, (8, 32, 24))).shape == (1, 3, 8, 32, 24)
    check_window_errors(ConfigError, network, 2, (8, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_channels": 12}, "base_channels must be a multiple of 8"),
        ({"embedding_dim": 10}, "embedding_dim must be a multiple of its attention heads"),
        ({"layers": 0}, "layers and hidden_dim must be at least 1"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
        ({"patch_size": (16, 20, 16)}, "divisible by"),
    ],
)
def test_wrong_arguments_are_explained(options, message):
    with pytest.raises(ConfigError, match=message):
        small(**options)
