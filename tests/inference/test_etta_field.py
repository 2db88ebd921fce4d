"""The smooth field of a case: found, divided out, and left alone where there is none."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.stats import entropy

from ukbob_seg.inference import etta_field
from ukbob_seg.inference.etta_config import EttaConfig
from ukbob_seg.inference.etta_field import find_field, flatten, remove_fields
from ukbob_seg.preprocessing.normalization import ChannelNormalization

ZSCORE = ChannelNormalization("zscore")
LIMITS = EttaConfig().least_field_gain, EttaConfig().least_field_spread


def tissues(shape=(40, 44, 36), seed=0):
    """Blobs of a few intensities with a little noise, in no relation to the axes."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), [3 if n > 1 else 0 for n in shape], mode="wrap")
    kinds = np.digitize(smooth, np.quantile(smooth, [0.3, 0.55, 0.8]))
    return np.array([0.2, 1.0, 1.6, 2.3])[kinds] + rng.normal(scale=0.03, size=shape)


def coil(shape, strength=1.0):
    """Sensitivity that falls with the distance from a point beside the image: no polynomial."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape), indexing="ij")
    return (2.0 / (1 + (z - 1.2) ** 2 + (y + 0.8) ** 2 + (x - 0.3) ** 2)) ** strength


def zscored(array):
    return torch.from_numpy(((array - array.mean()) / array.std()).astype(np.float32))


def unlike(a, b):
    """What of one image is not explained by the other."""
    return 1 - np.corrcoef(np.asarray(a).ravel(), np.asarray(b).ravel())[0, 1] ** 2


@pytest.mark.parametrize("shape", [(40, 44, 36), (1, 120, 130), (90, 70, 60)])
def test_a_coils_field_is_divided_out(shape):
    clean = tissues(shape)
    spoilt = clean * coil(shape)
    image, (field,), removed = remove_fields(zscored(spoilt)[None], [ZSCORE], *LIMITS)
    assert removed == (0,)
    assert field.gain > 0.1
    assert field.spread == pytest.approx(float(field.logarithm(shape).std()), rel=0.1)
    assert unlike(image[0], clean) < 0.1 * unlike(spoilt, clean)
    assert image.mean() == pytest.approx(0, abs=1e-3)
    assert image.std() == pytest.approx(1, abs=1e-3)


def test_an_exact_field_is_recovered():
    clean = tissues()
    weights = np.random.default_rng(0).normal(scale=[0.2 if sum(term) < 3 else 0.1 for term in etta_field.TERMS])
    truth = etta_field.Field(tuple(weights), 0, 0)
    spoilt = (clean - clean.min()) * np.exp(-truth.logarithm(clean.shape).numpy())
    found = find_field(torch.from_numpy(spoilt)).logarithm(clean.shape).numpy()
    error = found - truth.logarithm(clean.shape).numpy()
    assert np.std(error) < 0.1 * np.std(truth.logarithm(clean.shape).numpy())


def test_without_a_field_nothing_is_changed():
    image = torch.stack([zscored(tissues()), zscored(tissues(seed=1))])
    result, fields, removed = remove_fields(image, [ZSCORE, ZSCORE], *LIMITS)
    assert result is image
    assert removed == ()
    assert max(field.spread for field in fields) < 0.15


def test_each_channel_has_its_own_and_others_stay():
    clean = tissues()
    image = torch.stack([zscored(clean), zscored(clean * coil(clean.shape)), torch.ones(clean.shape) * 3])
    before = image.clone()
    result, fields, removed = remove_fields(image, [ZSCORE, ZSCORE], *LIMITS)  # the third: labels of a previous stage
    assert removed == (1,)
    assert torch.equal(image, before)
    assert torch.equal(result[[0, 2]], image[[0, 2]])
    assert not torch.equal(result[1], image[1])
    ct = ChannelNormalization("ct", -100, 300, 50, 60)
    result, fields, removed = remove_fields(image, [ct, ct], *LIMITS)
    assert result is image
    assert fields == (None, None)


def test_voxels_outside_of_the_mask_stay_zero():
    clean = tissues()
    inside = ndimage.distance_transform_edt(np.pad(np.ones(np.array(clean.shape) - 2), 1)) > 4
    spoilt = clean * coil(clean.shape)
    values = (spoilt - spoilt[inside].mean()) / spoilt[inside].std()
    image = torch.from_numpy(np.where(inside, values, 0).astype(np.float32))
    result, _, removed = remove_fields(image[None], [ChannelNormalization("zscore", mask_nonzero=True)], *LIMITS)
    assert removed == (0,)
    assert not result[0][~torch.from_numpy(inside)].any()
    assert unlike(result[0].numpy()[inside], clean[inside]) < 0.2 * unlike(spoilt[inside], clean[inside])


@pytest.mark.parametrize("image", [torch.full((6, 7, 8), 2.0), torch.zeros(1, 1, 1)])
def test_a_constant_image_has_no_field(image):
    field = find_field(image)
    assert field.gain == 0
    assert not field.logarithm(image.shape).any()
    assert torch.equal(flatten(image, field), image)


def test_the_entropy_is_that_of_a_histogram_with_overlapping_bins():
    values = np.exp(np.random.default_rng(0).normal(size=500))
    found, _ = etta_field._entropy(np.zeros(1), values, np.zeros((1, len(values))), np.zeros(1))
    centres = np.linspace(np.log(0.2), np.log(10.2), 192)
    places = np.minimum(np.log(values / values.mean() + 0.2), centres[-1])
    triangles = np.clip(1 - np.abs(places - centres[:, None]) / (centres[1] - centres[0]), 0, None)
    smooth = ndimage.convolve1d(triangles.sum(1), [1, 4, 6, 4, 1], mode="constant")
    assert found == pytest.approx(entropy(smooth), rel=1e-3)  # which normalises: a trace is lost at the ends


def test_the_gradient_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    values, terms, weights = np.abs(rng.normal(size=4000)), rng.normal(size=(19, 4000)) * 0.2, rng.normal(size=19) * 0.1
    _, gradient = etta_field._entropy(weights, values, terms)
    for number, step in enumerate(1e-5 * np.eye(19)):
        up, down = (etta_field._entropy(weights + sign * step, values, terms)[0] for sign in (1, -1))
        assert gradient[number] == pytest.approx((up - down) / 2e-5, abs=2e-3)
