"""Unusual fields are divided out, those of the training images left alone."""

import numpy as np
import pytest
import torch
from field_images import coil, tissues
from scipy import ndimage

from ukbob_seg.inference.etta_config import EttaConfig
from ukbob_seg.inference.etta_field import flatten, remove_fields
from ukbob_seg.preprocessing.intensity_field import UsualField, find_field
from ukbob_seg.preprocessing.normalization import ChannelNormalization

ZSCORE = ChannelNormalization("zscore")
NONE = UsualField()
DEFAULT = EttaConfig()
LIMITS = DEFAULT.least_field_gain, DEFAULT.least_field_spread, DEFAULT.field_margin


def zscored(array):
    return torch.from_numpy(((array - array.mean()) / array.std()).astype(np.float32))


def unlike(a, b):
    """What of one image is not explained by the other."""
    return 1 - np.corrcoef(np.asarray(a).ravel(), np.asarray(b).ravel())[0, 1] ** 2


@pytest.mark.parametrize("shape", [(40, 44, 36), (1, 120, 130), (90, 70, 60)])
def test_a_coils_field_is_divided_out(shape):
    clean = tissues(shape)
    spoilt = clean * coil(shape)
    image, (field,), removed = remove_fields(zscored(spoilt)[None], [ZSCORE], [NONE], *LIMITS)
    assert removed == (0,)
    assert field.gain > 0.1
    assert field.spread() == pytest.approx(float(field.logarithm(shape).std()), rel=0.1)
    assert unlike(image[0], clean) < 0.1 * unlike(spoilt, clean)
    assert image.mean() == pytest.approx(0, abs=1e-3)
    assert image.std() == pytest.approx(1, abs=1e-3)


def test_without_a_field_nothing_is_changed():
    image = torch.stack([zscored(tissues()), zscored(tissues(seed=1))])
    # The third channel: labels of a previous stage.
    result, fields, removed = remove_fields(image, [ZSCORE, ZSCORE], [NONE, NONE], *LIMITS)
    assert result is image
    assert removed == ()
    assert max(field.spread() for field in fields) < 0.15


def test_each_channel_has_its_own_and_others_stay():
    clean = tissues()
    image = torch.stack([zscored(clean), zscored(clean * coil(clean.shape)), torch.ones(clean.shape) * 3])
    before = image.clone()
    result, fields, removed = remove_fields(image, [ZSCORE, ZSCORE], [NONE, NONE], *LIMITS)
    assert removed == (1,)
    assert torch.equal(image, before)
    assert torch.equal(result[[0, 2]], image[[0, 2]])
    assert not torch.equal(result[1], image[1])
    ct = ChannelNormalization("ct", -100, 300, 50, 60)
    result, fields, removed = remove_fields(image, [ct, ct], [NONE, NONE], *LIMITS)
    assert result is image
    assert fields == (None, None)


def test_voxels_outside_of_the_mask_stay_zero():
    clean = tissues()
    inside = ndimage.distance_transform_edt(np.pad(np.ones(np.array(clean.shape) - 2), 1)) > 4
    spoilt = clean * coil(clean.shape)
    values = (spoilt - spoilt[inside].mean()) / spoilt[inside].std()
    image = torch.from_numpy(np.where(inside, values, 0).astype(np.float32))
    result, _, removed = remove_fields(
        image[None], [ChannelNormalization("zscore", mask_nonzero=True)], [NONE], *LIMITS
    )
    assert removed == (0,)
    assert not result[0][~torch.from_numpy(inside)].any()
    assert unlike(result[0].numpy()[inside], clean[inside]) < 0.2 * unlike(spoilt[inside], clean[inside])


def test_a_field_of_the_training_images_stays():
    clean = [tissues(seed=seed) for seed in range(5)]
    shading = coil(clean[0].shape)
    usual = UsualField.of([find_field(image * shading) for image in clean[1:]])
    image = zscored(clean[0] * shading)[None]
    result, (field,), removed = remove_fields(image, [ZSCORE], [usual], *LIMITS)
    assert result is image
    assert removed == ()
    assert field.spread() > 0.2 > field.spread(usual)
    # One without it is unusual then, and gets it.
    result, _, removed = remove_fields(zscored(clean[0])[None], [ZSCORE], [usual], *LIMITS)
    assert removed == (0,)
    assert unlike(result[0], clean[0] * shading) < 0.1 * unlike(clean[0], clean[0] * shading)


def test_fields_that_vary_in_training_do_so_in_prediction():
    image = zscored(tissues() * coil((40, 44, 36)))[None]
    spread = find_field(image[0].numpy()).spread()
    for largest, removed in ((spread / 1.9, ()), (spread / 2.1, (0,))):
        assert remove_fields(image, [ZSCORE], [UsualField(spread=largest)], *LIMITS)[2] == removed


def test_channels_without_knowledge_stay():
    image = zscored(tissues() * coil((40, 44, 36)))[None]
    result, fields, removed = remove_fields(image, [ZSCORE], [None], *LIMITS)
    assert result is image
    assert (fields, removed) == ((None,), ())


@pytest.mark.parametrize("image", [torch.full((6, 7, 8), 2.0), torch.zeros(1, 1, 1)])
def test_a_constant_image_stays(image):
    assert torch.equal(flatten(image, find_field(image.numpy())), image)


def test_one_broken_voxel_decides_nothing():
    clean = tissues()
    spoilt = zscored(clean * coil(clean.shape))
    broken = spoilt.clone()
    broken[0, 0, 0] = -300.0
    (expected, _, _), (found, _, removed) = (
        remove_fields(image[None], [ZSCORE], [NONE], *LIMITS) for image in (spoilt, broken)
    )
    assert removed == (0,)
    rest = torch.ones(clean.shape, dtype=torch.bool)
    rest[0, 0, 0] = False
    assert unlike(found[0][rest], clean[rest.numpy()]) < 1.1 * unlike(expected[0][rest], clean[rest.numpy()]) + 1e-3
    assert found[0][rest].std() == pytest.approx(float(broken[rest].std()), rel=0.1)
