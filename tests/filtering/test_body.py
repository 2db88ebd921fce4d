"""The body volume."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from skimage import filters, measure

from ukbob_seg.errors import DatasetError
from ukbob_seg.filtering.body import body_mask, body_voxels, otsu_threshold


def test_keeps_the_largest_component_and_fills_its_holes(rng: np.random.Generator) -> None:
    body = np.zeros((14, 16, 18), bool)
    body[2:12, 2:13, 2:14] = True
    image = np.where(body, 100.0, 5.0)
    image[5:8, 5:8, 5:8] = 5  # a closed cavity
    image[6, 6, 6] = 100  # tissue inside the cavity is inside the body
    image[4:6, 9:11, 2:6] = 5  # a cavity that opens to the air
    image[13, 15, 15:17] = 100  # a table, apart from the body
    image += rng.normal(0, 2, image.shape)
    expected = body.copy()
    expected[4:6, 9:11, 2:6] = False
    assert (body_mask(image) == expected).all()
    assert body_voxels(image) == expected.sum()


def test_agrees_with_another_implementation_on_noise(rng: np.random.Generator) -> None:
    for sigma in (0.6, 1.2, 2.0):
        image = ndimage.gaussian_filter(rng.normal(size=(20, 22, 24)), sigma)
        regions = measure.label(image > filters.threshold_otsu(image), connectivity=1)
        largest = max(measure.regionprops(regions), key=lambda region: region.area).label
        assert (body_mask(image) == ndimage.binary_fill_holes(regions == largest)).all()


def test_a_body_that_fills_the_volume_leaves_no_outside() -> None:
    image = np.full((6, 6, 6), 9.0)
    image[3, 3, 3] = 0
    assert body_voxels(image) == 216


def test_constant_image_is_refused() -> None:
    with pytest.raises(DatasetError, match="constant"):
        body_mask(np.full((3, 4, 5), 7.0))
    with pytest.raises(DatasetError, match=r"\(3, 4\)"):
        body_mask(np.zeros((3, 4)))


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.uint16, np.int32, np.float32, np.float64, np.dtype(">i2")])
def test_every_stored_type_gives_the_same_body(rng: np.random.Generator, dtype: type) -> None:
    image = np.rint(ndimage.gaussian_filter(rng.normal(size=(16, 18, 20)), 1.5) * 400 + 120).clip(0, 255)
    assert (body_mask(image.astype(dtype)) == body_mask(image)).all()
    assert body_voxels(image.astype(dtype)) == body_mask(image).sum()


def test_threshold_is_otsus(rng: np.random.Generator) -> None:
    for _ in range(5):
        image = np.concatenate([rng.normal(10, 3, 4000), rng.normal(60, 9, 2500)]).reshape(5, 50, 26)
        assert otsu_threshold(image) == pytest.approx(filters.threshold_otsu(image))


def test_nan_is_refused() -> None:
    image = np.zeros((4, 4, 4), np.float32)
    image[1:3, 1:3, 1:3] = 1
    image[3, 3, 3] = np.nan
    with pytest.raises(DatasetError, match="NaN"):
        body_mask(image)
