"""The transformer baselines' common parts against explicit loops."""

import pytest
import torch

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.baselines.transformer_blocks import (
    EncoderLayer,
    FeedForward,
    PositionEmbedding,
    SelfAttention,
    as_map,
    as_tokens,
    check_heads,
    check_rates,
    token_grid,
    triple,
)


def attend_by_loops(attention, tokens):
    """Softmax of scaled products, head by head and token by token."""
    b, n, dim = tokens.shape
    size = dim // attention.heads
    query, key, value = attention.qkv(tokens).split(dim, dim=2)
    mixed = torch.zeros_like(tokens)
    for element in range(b):
        for head in range(attention.heads):
            part = slice(head * size, (head + 1) * size)
            for i in range(n):
                scores = [query[element, i, part] @ key[element, j, part] / size**0.5 for j in range(n)]
                weights = torch.stack([score.exp() for score in scores])
                weights = weights / weights.sum()
                mixed[element, i, part] = sum(weights[j] * value[element, j, part] for j in range(n))
    return attention.proj(mixed)


@pytest.mark.parametrize("bias", [False, True])
def test_attention_is_an_explicit_softmax(bias):
    torch.manual_seed(0)
    attention = SelfAttention(6, 3, bias).double()
    assert (attention.qkv.bias is not None) == bias
    tokens = 3 * torch.randn(2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(attention(tokens), attend_by_loops(attention, tokens), rtol=1e-12, atol=1e-12)


def test_attention_drops_weights_and_outputs_only_while_training():
    torch.manual_seed(0)
    tokens = torch.randn(1, 40, 8)
    for rates in ((0.5, 0.0), (0.0, 0.5)):
        attention = SelfAttention(8, 2, False, *rates)
        assert not torch.equal(attention(tokens), attention(tokens))
        attention.eval()
        assert torch.equal(attention(tokens), attention(tokens))


def test_a_layer_normalises_before_each_part():
    torch.manual_seed(0)
    layer = EncoderLayer(SelfAttention(4, 2, False), FeedForward(4, 9, 0.0), 4)
    torch.nn.init.normal_(layer.norm1.weight)
    x = torch.randn(1, 3, 4)
    middle = x + layer.attention(layer.norm1(x))
    hidden = torch.nn.functional.gelu(layer.norm2(middle) @ layer.feed_forward.linear1.weight.T
                                      + layer.feed_forward.linear1.bias)  # fmt: skip
    expected = middle + hidden @ layer.feed_forward.linear2.weight.T + layer.feed_forward.linear2.bias
    torch.testing.assert_close(layer(x), expected)


def test_positions_of_the_own_grid_are_the_weights_in_token_order():
    embedding = PositionEmbedding(3, (2, 3, 4))
    torch.nn.init.normal_(embedding.weight)
    tokens = as_tokens(torch.arange(24.0).view(1, 1, 2, 3, 4))
    found = embedding((2, 3, 4))
    for z, y, x in [(0, 0, 0), (1, 2, 3), (0, 1, 2), (1, 0, 1)]:
        index = z * 12 + y * 4 + x
        assert tokens[0, index, 0] == index
        assert torch.equal(found[0, index], embedding.weight[0, :, z, y, x])


def sample(line, size):
    """Linear interpolation of a list between the centres of its cells, constant beyond the outermost."""
    result = []
    for i in range(size):
        position = min(max((i + 0.5) * len(line) / size - 0.5, 0), len(line) - 1)
        low = min(int(position), len(line) - 2) if len(line) > 1 else 0
        high, share = min(low + 1, len(line) - 1), position - low
        result.append((1 - share) * line[low] + share * line[high])
    return torch.stack(result)


def test_positions_of_another_grid_are_interpolated_along_each_axis():
    embedding = PositionEmbedding(2, (3, 4, 2)).double()
    torch.nn.init.normal_(embedding.weight)
    with torch.no_grad():
        expected = embedding.weight[0].permute(1, 2, 3, 0)  # (z, y, x, dim)
        for axis, size in enumerate((5, 2, 3)):
            expected = sample(list(expected.unbind(axis)), size).movedim(0, axis)
        found = embedding((5, 2, 3))
        assert found.shape == (1, 30, 2)
        torch.testing.assert_close(found[0], expected.reshape(30, 2))
    embedding((5, 2, 3)).sum().backward()
    assert embedding.weight.grad.abs().min() > 0


def test_maps_and_tokens_are_each_others_inverse():
    x = torch.randn(2, 3, 2, 4, 5)
    assert torch.equal(as_map(as_tokens(x), (2, 4, 5)), x)


def test_wrong_arguments_are_explained():
    assert triple("strides", 2) == (2, 2, 2)
    assert token_grid("It", [64, 32, 96], (8, 16, 32)) == (8, 2, 3)
    for wrong in ([2, 2], [2, 2, 0], 0, [2, 2, 1.5]):
        with pytest.raises(ConfigError, match="strides must be three whole numbers"):
            triple("strides", wrong)
    with pytest.raises(ConfigError, match=r"It needs a patch_size \(z, y, x\) divisible by \(8, 16, 32\)"):
        token_grid("It", [64, 40, 96], (8, 16, 32))
    with pytest.raises(ConfigError, match="dim must be a multiple of its attention heads, got 6 and 4"):
        check_heads(6, 4, "dim")
    with pytest.raises(ConfigError, match=r"dropout must be in \[0, 1\), got 1"):
        check_rates(other=0.5, dropout=1)
