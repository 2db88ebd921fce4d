"""Normalization against plain numpy, cropping against a loop, storage round trips."""

import numpy as np
import pytest

from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.preprocessing.cropping import nonzero_box, nonzero_mask
from ukbob_seg.preprocessing.normalization import ChannelNormalization, normalize, scheme_for_channel
from ukbob_seg.preprocessing.storage import open_array, save_array


def test_zscore_at_every_scanner_scale(rng):
    for scale in (1e-3, 1.0, 1.7e6):
        image = (rng.normal(3, 1, size=(1, 6, 7, 8)) * scale).astype(np.float32)
        result = normalize(image, [ChannelNormalization("zscore")])
        expected = (image.astype(float) - image.astype(float).mean()) / image.astype(float).std()
        assert result.dtype == np.float32
        assert np.abs(result - expected).max() < 1e-4


def test_zscore_inside_a_mask(rng):
    image = rng.normal(5, 2, size=(1, 6, 7, 8)).astype(np.float32)
    mask = rng.random((6, 7, 8)) > 0.4
    result = normalize(image, [ChannelNormalization("zscore", mask_nonzero=True)], mask)[0]
    assert (result[~mask] == 0).all()
    assert abs(result[mask].mean()) < 1e-5
    assert abs(result[mask].std() - 1) < 1e-5
    with pytest.raises(ConfigError, match="needs a mask"):
        normalize(image, [ChannelNormalization("zscore", mask_nonzero=True)])


def test_ct_and_window():
    image = np.array([-2000.0, -100, 0, 50, 3000], np.float32).reshape(1, 1, 1, 5)
    ct = ChannelNormalization("ct", clip_low=-100, clip_high=100, mean=20, std=40)
    assert normalize(image, [ct]).ravel().tolist() == [-3.0, -3.0, -0.5, 0.75, 2.0]
    window = ChannelNormalization("ct_window", clip_low=-100, clip_high=100)
    assert normalize(image, [window]).ravel().tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]


def test_the_other_schemes():
    image = np.array([0.0, 51, 255], np.float32).reshape(1, 1, 1, 3)
    for scheme, expected in (("rescale_to_0_1", [0, 0.2, 1]), ("rgb_to_0_1", [0, 0.2, 1]), ("no_norm", [0, 51, 255])):
        assert normalize(image, [ChannelNormalization(scheme)]).ravel().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("scheme", ["zscore", "rescale_to_0_1"])
def test_a_constant_image_gives_zeros(scheme):
    assert (normalize(np.full((1, 3, 3, 3), 7.0), [ChannelNormalization(scheme)]) == 0).all()


def test_channel_names_as_in_nnunet():
    names = ["CT", "ct", "noNorm", "zscore", "rescale_to_0_1", "rgb_to_0_1", "MRI", "T1", "rescale_0_1"]
    expected = ["ct", "ct", "no_norm", "zscore", "rescale_to_0_1", "rgb_to_0_1", "zscore", "zscore", "zscore"]
    assert [scheme_for_channel(name) for name in names] == expected


def test_unusable_schemes():
    with pytest.raises(ConfigError, match="normalization must be one of"):
        ChannelNormalization("median")
    with pytest.raises(ConfigError, match="needs mean"):
        ChannelNormalization("ct", clip_low=0, clip_high=1)
    with pytest.raises(ConfigError, match="2 normalization schemes for 1"):
        normalize(np.zeros((1, 2, 2, 2)), [ChannelNormalization("zscore")] * 2)


def test_the_box_equals_a_loop(rng):
    image = np.zeros((2, 9, 10, 11), np.float32)
    image[0, 3, 4, 5] = 1
    image[1, 6, 2, 8] = -2
    voxels = np.argwhere((image != 0).any(0))
    low, high = voxels.min(0), voxels.max(0) + 1
    assert [(s.start, s.stop) for s in nonzero_box(image)] == list(zip(low, high, strict=True))
    assert nonzero_box(np.zeros((1, 2, 3, 4))) == (slice(0, 2), slice(0, 3), slice(0, 4))


def test_holes_of_the_mask_are_filled():
    image = np.zeros((1, 5, 5, 5))
    image[0, 1:4, 1:4, 1:4] = 1
    image[0, 2, 2, 2] = 0
    assert nonzero_mask(image).sum() == 27


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(2, 40, 50, 30), (1, 1, 5, 3), (70, 33, 65)])
def test_storage_round_trip_and_partial_reads(tmp_path, rng, dtype, shape):
    array = (rng.random(shape) * 200).astype(dtype)
    save_array(tmp_path / "a.b2nd", np.asfortranarray(array), (32, 32, 32))
    stored = open_array(tmp_path / "a.b2nd")
    assert stored.shape == shape
    assert stored.dtype == dtype
    assert np.array_equal(stored[:], array)
    part = (..., slice(0, 1), slice(1, 5), slice(2, 3))
    assert np.array_equal(stored[part], array[part])
    assert [path.name for path in tmp_path.iterdir()] == ["a.b2nd"]


def test_damaged_arrays_are_named(tmp_path, rng):
    path = tmp_path / "a.b2nd"
    save_array(path, rng.random((40, 40, 40)), (32, 32, 32))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"garbage" * 100, b""):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"a\.b2nd is damaged; delete it and run ukbob_preprocess"):
            open_array(path)[:]
    with pytest.raises(DatasetError, match="does not exist"):
        open_array(tmp_path / "b.b2nd")
