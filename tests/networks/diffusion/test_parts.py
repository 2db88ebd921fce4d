"""FF-Parser, NBP-Filter, spectrum attention and U-SA against direct computation."""

import math

import pytest
import torch
import torch.nn.functional as F

from ukbob_seg.networks.diffusion.anchor import UncertainSpatialAttention
from ukbob_seg.networks.diffusion.medsegdiff_v1 import DynamicConditionalEncoding
from ukbob_seg.networks.diffusion.spectrum import FFParser, NeuralBandPassFilter, SpectrumAttention, frequency_pairs
from ukbob_seg.networks.diffusion.unet import ResidualBlock, TimeEmbedding, group_norm

SHAPE = (4, 6, 5)  # an odd axis too


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _randomised(module, seed=0):
    """Every parameter drawn anew: zeros and ones would hide what is left out."""
    generator = _generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.requires_grad_(False)


def test_the_parser_passes_everything_at_first():
    x = torch.randn(2, 3, *SHAPE, generator=_generator())
    assert torch.allclose(FFParser(3, SHAPE)(x), x, atol=1e-5)


def test_the_parser_is_a_product_with_the_whole_spectrum():
    """The half table continued to the whole spectrum of a real map by symmetry, and complex transforms."""
    parser = FFParser(2, SHAPE)
    kernel = torch.randn(2, *SHAPE, generator=_generator(1))  # a real filter has a symmetric spectrum
    whole = torch.fft.fftn(kernel, dim=(1, 2, 3))
    with torch.no_grad():
        parser.weight.copy_(torch.view_as_real(whole[..., : SHAPE[2] // 2 + 1]))
    x = torch.randn(3, 2, *SHAPE, generator=_generator(2))
    expected = torch.fft.ifftn(torch.fft.fftn(x, dim=(2, 3, 4)) * whole, dim=(2, 3, 4)).real
    assert torch.allclose(parser(x), expected, atol=1e-4)
    # And a product of spectra is a circular convolution.
    shifted = sum(
        kernel[:, a, b, c].view(1, 2, 1, 1, 1) * x.roll((a, b, c), dims=(2, 3, 4))
        for a in range(SHAPE[0]) for b in range(SHAPE[1]) for c in range(SHAPE[2])
    )  # fmt: skip
    assert torch.allclose(parser(x), shifted, atol=1e-3)


def test_a_parser_for_another_size_keeps_its_frequencies():
    """A table that is linear in each frequency is the same function of frequency at another size."""
    parser, size = FFParser(1, (8, 8, 8)), (16, 4, 12)

    def line(z, y, x):
        axes = torch.meshgrid(torch.fft.fftfreq(z), torch.fft.fftfreq(y), torch.fft.rfftfreq(x), indexing="ij")
        return torch.stack([1 + axes[0] + 2 * axes[1] + 3 * axes[2], axes[0] - axes[2]], dim=-1)

    with torch.no_grad():
        parser.weight.copy_(line(8, 8, 8)[None])
    found = parser._resampled(size)[0]
    inside = torch.fft.fftfreq(16) <= 3 / 8  # beyond its last frequency a table has no more to say
    assert torch.allclose(found[inside], line(*size)[inside], atol=1e-5)
    assert torch.allclose(parser._resampled((8, 8, 8)), parser.weight, atol=1e-6)
    x = torch.randn(1, 1, *size, generator=_generator())
    assert torch.allclose(FFParser(1, (8, 8, 8))(x), x, atol=1e-5)


def test_dynamic_encoding_is_the_papers_product():
    encoding = DynamicConditionalEncoding(3, SHAPE)
    image, noisy = torch.randn(2, 2, 3, *SHAPE, generator=_generator(3))
    assert torch.equal(encoding(image, noisy), image)  # at first
    _randomised(encoding)

    def norm(x, layer):
        whole = F.layer_norm(x, x.shape[1:])
        return whole * layer.weight.view(-1, 1, 1, 1) + layer.bias.view(-1, 1, 1, 1)

    expected = norm(image, encoding.norm_image) * norm(encoding.parser(noisy), encoding.norm_noisy) * image
    assert torch.allclose(encoding(image, noisy), expected, atol=1e-4)


def test_pairs_of_frequencies():
    pairs = frequency_pairs((2, 3, 4))
    assert pairs.shape == (24, 24, 6)
    point = 1 * 12 + 2 * 4 + 3  # (z, y, x) = (1, 2, 3)
    assert pairs[point, 0].tolist() == pytest.approx([-0.5, -1 / 3, -0.25, 0, 0, 0])
    assert pairs[0, point].tolist() == pytest.approx([0, 0, 0, -0.5, -1 / 3, -0.25])


def test_the_band_pass_filter_by_hand():
    """One block and width 2, every step written out for one pair of frequencies."""
    band = _randomised(NeuralBandPassFilter(3, 2, 1), 4)
    positions, embedding = frequency_pairs((1, 2, 2)), torch.randn(2, 3, generator=_generator(5))
    found = band(positions, embedding)
    assert found.shape == (2, 4, 4)
    for element, row, column in ((0, 0, 0), (1, 3, 2)):
        x = band.layers[0](band.project(positions[row, column]))
        mean = (x[0] + x[1]) / 2
        deviation = math.sqrt(float(((x - mean) ** 2).mean()) + 1e-5)
        x = (x - mean) / deviation * band.norms[0].weight + band.norms[0].bias
        time = embedding[element] * embedding[element].sigmoid()
        modulation = band.modulation[0][1].weight @ time + band.modulation[0][1].bias
        x = x * (1 + modulation[:2]) + modulation[2:]
        x = x * x.sigmoid()
        value = 1 / (1 + math.exp(-float(band.gate.weight @ x + band.gate.bias)))
        assert float(found[element, row, column]) == pytest.approx(value, abs=1e-5)


def test_a_filter_that_passes_everything_leaves_plain_attention():
    attention = _randomised(SpectrumAttention(6, 3, 2, 1), 6)
    with torch.no_grad():
        attention.filter.gate.weight.zero_()
        attention.filter.gate.bias.fill_(50.0)
    query, key = torch.randn(2, 2, 8, 6, generator=_generator(7))
    found = attention.attended(query, key, torch.zeros(2, 3), (2, 2, 2))
    affinity = attention.query(query) @ attention.key(key).transpose(1, 2)
    assert torch.allclose(found, affinity @ attention.value(key) / (math.sqrt(6) * 8), atol=1e-4)


def test_a_filter_weighs_single_frequencies():
    """Against sums over all pairs of frequencies, with complex exponentials written out."""
    attention = _randomised(SpectrumAttention(2, 3, 2, 1), 8)
    shape, count = (1, 2, 3), 6
    query, key = torch.randn(2, 1, count, 2, generator=_generator(9))
    embedding = torch.randn(1, 3, generator=_generator(10))
    passed = attention.filter(frequency_pairs(shape), embedding)[0].to(torch.complex128)
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1).flatten(0, 2).double()
    frequencies = frequency_pairs(shape)[:, 0, :3].double()
    waves = torch.exp(-2j * math.pi * (frequencies @ places.T)) / math.sqrt(count)  # (frequency, place)
    spectra = [waves @ part[0].to(torch.complex128) for part in (attention.query(query), attention.key(key))]
    affinity = spectra[0] @ spectra[1].T * passed
    weights = (waves.conj().T @ affinity @ waves.conj()).real
    expected = weights @ attention.value(key)[0].double() / (math.sqrt(2) * count)
    assert torch.allclose(attention.attended(query, key, embedding, shape)[0].double(), expected, atol=1e-5)


def test_uncertain_attention_against_a_loop():
    layer = _randomised(UncertainSpatialAttention(2), 11)
    noise, features = torch.randn(1, 3, 4, 3, 5, generator=_generator(12)), torch.randn(1, 2, 4, 3, 5)
    kernel = torch.zeros(5, 5, 5)
    deviation = layer.log_deviation.exp()
    for z in range(5):
        for y in range(5):
            for x in range(5):
                offset = (torch.tensor([z, y, x]) - 2 - layer.mean) / deviation
                kernel[z, y, x] = math.exp(-0.5 * float((offset**2).sum()))
    kernel /= kernel.sum()
    padded = F.pad(features, (2, 2, 2, 2, 2, 2))
    expected = torch.empty_like(noise)
    for z in range(4):
        for y in range(3):
            for x in range(5):
                smooth = (padded[0, :, z : z + 5, y : y + 5, x : x + 5] * kernel).sum((1, 2, 3))
                anchor = torch.maximum(smooth, features[0, :, z, y, x])
                weight = torch.sigmoid((layer.project.weight.view(-1) * anchor).sum() + layer.project.bias)
                expected[0, :, z, y, x] = (weight + 1) * noise[0, :, z, y, x]
    assert torch.allclose(layer(noise, features), expected, atol=1e-5)


def test_the_anchors_kernel_moves_and_widens_with_what_is_learned():
    layer = UncertainSpatialAttention(1)
    with torch.no_grad():
        layer.mean.copy_(torch.tensor([0.0, 1.0, 0.0]))
        layer.log_deviation.copy_(torch.tensor([math.log(0.05), math.log(0.05), math.log(100.0)]))
    z, y, x = layer.kernels()
    assert z.tolist() == pytest.approx([0, 0, 1, 0, 0])
    assert y.tolist() == pytest.approx([0, 0, 0, 1, 0])
    assert x.tolist() == pytest.approx([0.2] * 5, abs=1e-3)


def test_time_by_hand():
    embedding = TimeEmbedding(4)
    first = embedding.layers[0]
    with torch.no_grad():
        first.weight.copy_(torch.eye(4).repeat(4, 1))
        first.bias.zero_()
    seen = []
    embedding.layers[0].register_forward_hook(lambda module, given, result: seen.append(result[:, :4]))
    embedding(torch.tensor([0, 50]))
    t = 50.0
    assert seen[0][0].tolist() == pytest.approx([1, 1, 0, 0])
    assert seen[0][1].tolist() == pytest.approx(
        [math.cos(t), math.cos(t / 100), math.sin(t), math.sin(t / 100)], abs=1e-4
    )


def test_a_fresh_block_is_its_shortcut_and_time_moves_a_trained_one():
    x, times = torch.randn(2, 8, 4, 4, 4, generator=_generator(13)), torch.randn(2, 2, 6, generator=_generator(14))
    block = ResidualBlock(8, 8, 6)
    assert torch.equal(block(x, times[0]), x)
    _randomised(block)
    assert not torch.allclose(block(x, times[0]), block(x, times[1]), atol=1e-2)
    assert ResidualBlock(8, 12, None)(x).shape == (2, 12, 4, 4, 4)


@pytest.mark.parametrize(("channels", "groups"), [(2, 1), (6, 1), (8, 2), (32, 8), (128, 32), (320, 32)])
def test_groups(channels, groups):
    assert group_norm(channels).num_groups == groups
