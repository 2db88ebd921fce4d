"""Normalization against plain numpy in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ukbob_seg.errors import ConfigError
from ukbob_seg.preprocessing.normalization import NORMALIZERS, ChannelNormalization, normalize, scheme_for_channel


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1.7e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zscore_at_every_scanner_scale(rng, scale, dtype):
    image = (rng.normal(3, 1, size=(2, 6, 7, 8)) * scale).astype(dtype)
    before = image.copy()
    result = normalize(image, [ChannelNormalization("zscore")] * 2)
    for channel in range(2):
        exact = image[channel].astype(np.float64)
        assert np.abs(result[channel] - (exact - exact.mean()) / exact.std()).max() < 1e-6
    assert result.dtype == np.float32
    assert np.array_equal(image, before)


def test_zscore_of_a_small_contrast_on_a_large_offset(rng):
    """float32 sums would lose this contrast altogether."""
    image = (1.7e6 + rng.normal(0, 5, size=(1, 20, 30, 40))).astype(np.float32)
    exact = image.astype(np.float64)
    result = normalize(image, [ChannelNormalization("zscore")])
    assert np.abs(result - (exact - exact.mean()) / exact.std()).max() < 1e-6


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_integer_images_in_any_memory_order(rng, dtype):
    image = rng.integers(0, 200, (1, 5, 6, 7)).astype(dtype)
    exact = image.astype(np.float64)
    expected = ((exact - exact.mean()) / exact.std()).astype(np.float32)
    for view in (image, np.asfortranarray(image), np.repeat(image, 2, axis=3)[..., ::2]):
        assert np.abs(normalize(view, [ChannelNormalization("zscore")]) - expected).max() < 1e-6


def test_zscore_inside_a_mask(rng):
    image = rng.normal(5, 2, size=(1, 6, 7, 8)).astype(np.float32)
    mask = rng.random((6, 7, 8)) > 0.4
    result = normalize(image, [ChannelNormalization("zscore", mask_nonzero=True)], mask)[0]
    assert (result[~mask] == 0).all()
    assert not np.signbit(result[~mask]).any()  # -0.0 would spoil the compression
    exact = image[0][mask].astype(np.float64)
    assert np.abs(result[mask] - (exact - exact.mean()) / exact.std()).max() < 1e-6
    with pytest.raises(ConfigError, match="needs a mask"):
        normalize(image, [ChannelNormalization("zscore", mask_nonzero=True)])


def test_ct_and_window():
    image = np.array([-2000.0, -100, 0, 50, 3000], np.float32).reshape(1, 1, 1, 5)
    ct = ChannelNormalization("ct", clip_low=-100, clip_high=100, mean=20, std=40)
    assert normalize(image, [ct]).ravel().tolist() == [-3.0, -3.0, -0.5, 0.75, 2.0]
    window = ChannelNormalization("ct_window", clip_low=-100, clip_high=100)
    assert normalize(image, [window]).ravel().tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]
    from_zero = ChannelNormalization("ct_window", clip_low=0, clip_high=100)
    assert normalize(image, [from_zero]).ravel().tolist() == [0.0, 0.0, 0.0, 0.5, 1.0]


def test_the_other_schemes():
    image = np.array([0.0, 51, 255], np.float32).reshape(1, 1, 1, 3)
    for scheme, expected in (("rescale_to_0_1", [0, 0.2, 1]), ("rgb_to_0_1", [0, 0.2, 1]), ("no_norm", [0, 51, 255])):
        assert normalize(image, [ChannelNormalization(scheme)]).ravel().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("scheme", ["zscore", "rescale_to_0_1"])
@pytest.mark.parametrize("value", [0, 0.1, 7.0, 1.7e6 + 0.125, -1e9])
def test_a_constant_image_gives_zeros(scheme, value):
    image = np.full((1, 13, 17, 11), value, np.float32)
    assert (normalize(image, [ChannelNormalization(scheme)]) == 0).all()


def test_a_constant_inside_or_an_empty_mask_gives_zeros(rng):
    image = rng.normal(size=(1, 4, 5, 6)).astype(np.float32)
    mask = np.zeros((4, 5, 6), bool)
    masked = [ChannelNormalization("zscore", mask_nonzero=True)]
    assert (normalize(image, masked, mask) == 0).all()
    mask[1:3] = True
    image[:, 1:3] = 4
    assert (normalize(image, masked, mask) == 0).all()


@given(
    arrays(np.float32, (1, 2, 3, 4), elements=st.floats(-1e6, 1e6, width=32)),
    st.sampled_from(sorted(NORMALIZERS)),
    arrays(bool, (2, 3, 4)),
)
@settings(max_examples=150, deadline=None)
def test_results_are_finite(image, name, mask):
    numbers = {"clip_low": -5.0, "clip_high": 9.0, "mean": 1.0, "std": 2.0}
    result = normalize(image, [ChannelNormalization(name, **numbers, mask_nonzero=name == "zscore")], mask)
    assert np.isfinite(result).all()
    if name in ("rescale_to_0_1", "ct_window"):
        assert result.min() >= 0
        assert result.max() <= 1


def test_channels_are_independent(rng):
    image = rng.normal(40, 9, size=(3, 4, 5, 6)).astype(np.float32)
    schemes = [
        ChannelNormalization("zscore"),
        ChannelNormalization("no_norm"),
        ChannelNormalization("ct_window", clip_low=30, clip_high=50),
    ]
    result = normalize(image, schemes)
    for channel, scheme in enumerate(schemes):
        assert np.array_equal(result[channel], normalize(image[channel : channel + 1], [scheme])[0])


def test_channel_names_as_in_nnunet():
    names = ["CT", "ct", "noNorm", "zscore", "rescale_to_0_1", "rgb_to_0_1", "MRI", "T1", "rescale_0_1"]
    expected = ["ct", "ct", "no_norm", "zscore", "rescale_to_0_1", "rgb_to_0_1", "zscore", "zscore", "zscore"]
    assert [scheme_for_channel(name) for name in names] == expected


def test_unusable_schemes():
    with pytest.raises(ConfigError, match="normalization must be one of"):
        ChannelNormalization("median")
    with pytest.raises(ConfigError, match="needs mean"):
        ChannelNormalization("ct", clip_low=0, clip_high=1)
    with pytest.raises(ConfigError, match="std must not be negative, got -1"):
        ChannelNormalization("ct", clip_low=0, clip_high=1, mean=0, std=-1)
    with pytest.raises(ConfigError, match="clip_high must be a finite number, got inf"):
        ChannelNormalization("ct_window", clip_low=0, clip_high=float("inf"))
    with pytest.raises(ConfigError, match="clip_low must not exceed clip_high, got 2 and 1"):
        ChannelNormalization("ct_window", clip_low=2, clip_high=1)
    with pytest.raises(ConfigError, match="the mask has"):
        normalize(np.zeros((1, 2, 2, 2)), [ChannelNormalization("zscore", mask_nonzero=True)], np.ones((2, 2, 3), bool))
    with pytest.raises(ConfigError, match="2 normalization schemes for 1"):
        normalize(np.zeros((1, 2, 2, 2)), [ChannelNormalization("zscore")] * 2)
