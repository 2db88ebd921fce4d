"""Shifts: reproducible, in the image's units, and what their names say."""

import numpy as np
import pytest
from scipy import ndimage

from ukbob_seg.errors import ConfigError
from ukbob_seg.evaluation.shifts import BIAS_LOG_AMPLITUDE, GHOST_LINES, NOISE_SHARE, SHIFTS, apply_shift

SPACING = (3.0, 1.0, 0.7)
CHANGING = [name for name in SHIFTS if name != "none"]


@pytest.fixture
def image():
    generator = np.random.default_rng(0)
    return ndimage.gaussian_filter(generator.uniform(0, 1, (2, 12, 20, 17)), (0, 1, 1, 1)).astype(np.float32)


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_is_reproducible_and_has_the_units_of_the_image(name, image):
    shifted = apply_shift(image, name, SPACING, seed=3)
    assert shifted.shape == image.shape
    assert shifted.dtype == np.float32
    assert np.isfinite(shifted).all()
    assert np.array_equal(shifted, apply_shift(image, name, SPACING, seed=3))
    other_units = apply_shift(200 * image - 1000, name, SPACING, seed=3)
    np.testing.assert_allclose((other_units + 1000) / 200, shifted, atol=2e-4)
    assert np.array_equal(shifted, image) == (name == "none")


@pytest.mark.parametrize("name", ["bias field", "noise"])
def test_seeds_differ_and_channels_share_the_draw(name, image):
    first, second = (apply_shift(image, name, SPACING, seed=seed) for seed in (0, 1))
    assert np.abs(first - second).max() > 0.01
    twice = apply_shift(np.stack([image[0], image[0]]), name, SPACING, seed=0)
    assert np.array_equal(twice[0], twice[1])


def test_the_bias_field_is_a_smooth_factor(image):
    positive = image - image.min(axis=(1, 2, 3), keepdims=True) + 0.1
    shifted = apply_shift(positive, "bias field", SPACING)
    lows = positive.min(axis=(1, 2, 3), keepdims=True)
    signal = positive[0] > lows[0] + 0.02
    field = ((shifted - lows)[0] / np.where(signal, (positive - lows)[0], 1))[signal]
    assert 2 < field.max() / field.min() <= np.exp(2 * BIAS_LOG_AMPLITUDE) * 1.001
    whole = apply_shift(np.pad(np.ones((1, 40, 40, 40)), ((0, 0), (1, 0), (0, 0), (0, 0))), "bias field", (1, 1, 1))
    logarithm = np.log(whole[0, 1:])
    for axis in range(3):  # from one voxel to the next it changes by little of what it changes by in all
        assert np.abs(np.diff(logarithm, axis=axis)).max() < 0.1 * np.ptp(logarithm)
    places = np.linspace(-1, 1, 40)
    powers = np.polynomial.polynomial.polyvander3d(*np.meshgrid(places, places, places, indexing="ij"), [2, 2, 2])
    rest = np.linalg.lstsq(powers.reshape(40**3, 27), logarithm.ravel(), rcond=None)[1]
    assert rest > 0.02 * np.sum((logarithm - logarithm.mean()) ** 2)  # no polynomial, as a correction may fit


def test_blur_is_in_millimetres(image):
    image[:] = image[:1]
    shifted = apply_shift(image, "blur", SPACING)
    expected = ndimage.gaussian_filter(image[0].astype(float), [1.2 / mm for mm in SPACING])
    np.testing.assert_allclose(shifted[0], expected, atol=1e-5)


def test_noise_has_its_strength():
    flat = np.full((1, 40, 40, 40), 1.0)
    flat[:, :20] = 0.0
    shifted = apply_shift(flat, "noise", (1, 1, 1))[0]
    assert shifted[20:].std() == pytest.approx(NOISE_SHARE, rel=0.05)
    assert shifted[:20].mean() == pytest.approx(NOISE_SHARE * np.sqrt(np.pi / 2), rel=0.05)  # Rayleigh, no signal


def test_a_ghost_lies_half_the_field_of_view_away():
    image = np.zeros((1, 4, 32, 8))
    image[:, :, 4:8] = 1.0
    shifted = apply_shift(image, "ghosting", (1, 1, 1))[0]
    assert shifted[:, 20:24].mean() == pytest.approx((1 - GHOST_LINES) / 2, abs=1e-5)
    assert shifted[:, 4:8].mean() == pytest.approx((1 + GHOST_LINES) / 2, abs=1e-5)


def test_low_resolution_leaves_axes_alone_that_are_coarse(image):
    image[:] = image[:, :, :1, :1]  # varies along z only, where voxels are 3 mm
    np.testing.assert_allclose(apply_shift(image, "low resolution", SPACING), image, atol=1e-5)
    along_x = np.zeros((1, 4, 4, 16))
    along_x[..., ::2] = 1.0
    assert apply_shift(along_x, "low resolution", (1, 1, 1))[..., 4:-4].std() < 0.02


def test_intensity_curves_keep_the_order_and_the_ends(image):
    for name in ("gamma 0.5", "gamma 2", "contrast"):
        shifted = apply_shift(image, name, SPACING)
        high = np.percentile(image[0], 99.5)
        values = image[0][image[0] < high]
        order = np.argsort(values)
        assert (np.diff(shifted[0][image[0] < high][order]) >= -1e-6).all()
        assert shifted[0].min() == pytest.approx(image[0].min(), abs=1e-5)
    assert (
        apply_shift(image, "gamma 0.5", SPACING).mean() > image.mean() > apply_shift(image, "gamma 2", SPACING).mean()
    )


@pytest.mark.parametrize("name", CHANGING)
def test_a_constant_image_and_a_slice_are_no_error(name):
    assert np.isfinite(apply_shift(np.full((1, 4, 5, 6), 7), name, (1, 1, 1))).all()
    assert apply_shift(np.random.default_rng(0).uniform(size=(1, 1, 8, 9)), name, (5, 1, 1)).shape == (1, 1, 8, 9)


def test_unknown_shifts_are_refused(image):
    with pytest.raises(ConfigError, match="unknown shift 'rotation'; choose from none, bias field"):
        apply_shift(image, "rotation", SPACING)
