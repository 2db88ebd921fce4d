"""Borders, anti-aliasing and the coarse axis of image resampling, against scipy, skimage and nnU-Net's own steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.transform import resize

from ukbob_seg.preprocessing.resampling import resample_image

SHRINKING = [
    ((20, 18, 30), (9, 18, 11)),
    ((9, 30, 17), (14, 7, 17)),  # one axis grows, one shrinks, one stays
    ((1, 40, 23), (1, 13, 22)),  # one slice
    ((12, 5, 40), (3, 1, 2)),
    ((3, 4, 5), (1, 1, 1)),  # the Gaussian is wider than the image
]


def zoom(array, shape, order):
    factors = [n / o for n, o in zip(shape, array.shape, strict=True)]
    return ndimage.zoom(array.astype(np.float64), factors, order=order, mode="nearest", grid_mode=True)


def blurred(array, shape):
    """What skimage.transform.resize does before it interpolates."""
    sigma = [max(0.0, (o / n - 1) / 2) for o, n in zip(array.shape, shape, strict=True)]
    return ndimage.gaussian_filter(array.astype(np.float64), sigma, mode="nearest")


@given(old=st.tuples(*[st.integers(1, 25)] * 3), new=st.tuples(*[st.integers(1, 40)] * 3), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_voxel_equals_scipy_the_border_too(old, new, seed):
    """White noise, the worst there is for a spline; the largest difference of all voxels, corners included."""
    image = np.random.default_rng(seed).normal(size=(1, *old))
    difference = np.abs(resample_image(image, new)[0] - zoom(image[0], new, 3))
    assert difference.max() <= 1e-5 * max(np.ptp(image), np.abs(image).max())


@pytest.mark.parametrize("factor", [0.31, 0.5, 0.77, 1.3, 1.5, 2.0, 3.7])
def test_large_images_equal_scipy_at_the_border(rng, factor):
    image = rng.normal(size=(1, 31, 44, 57))
    image[0, 0], image[0, :, :, -1] = 40, -40  # a step at the border
    shape = tuple(round(n * factor) for n in image.shape[1:])
    difference = np.abs(resample_image(image, shape)[0] - zoom(image[0], shape, 3))
    inner = difference[3:-3, 3:-3, 3:-3].max()
    difference[3:-3, 3:-3, 3:-3] = 0
    assert max(inner, difference.max()) <= 1e-5 * np.ptp(image)


def test_clipped_to_its_range_an_image_equals_nnunets(rng):
    """skimage cuts off what a spline overshoots, nnU-Net therefore too; scipy and this package keep it."""
    image = rng.normal(size=(1, 14, 17, 12)).astype(np.float32)
    image[0, :3] += 8
    for shape in ((21, 25, 18), (9, 30, 12)):
        ours = resample_image(image, shape)[0]
        theirs = resize(image[0].astype(float), shape, order=3, mode="edge", anti_aliasing=False)
        assert np.abs(ours - theirs).max() > 1e-2 * np.ptp(image)
        assert np.abs(ours.clip(image.min(), image.max()) - theirs).max() <= 1e-5 * np.ptp(image)


@pytest.mark.parametrize(("old", "new"), SHRINKING)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_anti_aliasing_is_a_gaussian_before_the_spline(rng, old, new, order):
    image = rng.normal(size=(2, *old))
    result = resample_image(image, new, order, anti_alias=True)
    assert result.dtype == np.float32
    for ours, channel in zip(result, image, strict=True):
        assert np.abs(ours - zoom(blurred(channel, new), new, order)).max() <= 1e-5 * np.ptp(channel)
        theirs = resize(channel, new, order=order, mode="edge", anti_aliasing=True, clip=False, preserve_range=True)
        assert np.abs(ours - theirs).max() <= 1e-5 * np.ptp(channel)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_anti_aliasing_leaves_growing_images_alone(rng, order):
    image = rng.normal(size=(1, 7, 8, 9)).astype(np.float32)
    for shape in ((7, 8, 9), (11, 8, 14)):
        assert np.array_equal(resample_image(image, shape, order, anti_alias=True), resample_image(image, shape, order))


def test_anti_aliasing_removes_what_the_new_grid_cannot_hold():
    """A wave of three voxels on a grid of four must not come back as a slow one."""
    wave = np.broadcast_to(np.cos(2 * np.pi * np.arange(120) / 3), (1, 2, 2, 120))
    inner = slice(3, -3)
    assert np.ptp(resample_image(wave, (2, 2, 30))[..., inner]) > 1
    assert np.ptp(resample_image(wave, (2, 2, 30), anti_alias=True)[..., inner]) < 0.1


def _slice_by_slice(image, shape, axis, coarse_order, order=3):
    """Every slice by scipy's zoom, then along the axis as nnU-Net does: map_coordinates at voxel centres."""
    inner = tuple(n for a, n in enumerate(shape) if a != axis)
    planes = np.stack([zoom(plane, inner, order) for plane in np.moveaxis(image, axis, 0)], axis=axis)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(float)
    grid[axis] = image.shape[axis] / shape[axis] * (grid[axis] + 0.5) - 0.5
    return ndimage.map_coordinates(planes, grid, order=coarse_order, mode="nearest")


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("coarse_order", [0, 1])
@pytest.mark.parametrize("coarse", [(5, 11), (11, 4), (1, 3), (6, 6)])
def test_the_coarse_axis_equals_nnunets_steps(rng, axis, coarse_order, coarse):
    old, new = [14, 14, 14], [21, 21, 21]
    old[(axis + 1) % 3], new[(axis + 1) % 3] = 17, 9
    old[axis], new[axis] = coarse
    image = rng.normal(size=(1, *old))
    result = resample_image(image, new, 3, coarse_axis=axis, coarse_order=coarse_order)
    expected = _slice_by_slice(image[0], new, axis, coarse_order)
    assert np.abs(result[0] - expected).max() <= 1e-5 * np.ptp(image)


def test_linear_along_the_coarse_axis_equals_scipys_zoom(rng):
    image = rng.normal(size=(1, 5, 8, 9))
    result = resample_image(image, (12, 8, 9), 3, coarse_axis=0, coarse_order=1)
    assert np.abs(result[0] - zoom(image[0], (12, 8, 9), 1)).max() <= 1e-6 * np.ptp(image)


@pytest.mark.parametrize("coarse_order", [0, 1])
def test_a_coarse_axis_that_shrinks_is_blurred_as_well(rng, coarse_order):
    image = rng.normal(size=(1, 15, 20, 18))
    shape = (4, 13, 27)
    result = resample_image(image, shape, 3, coarse_axis=0, coarse_order=coarse_order, anti_alias=True)
    expected = _slice_by_slice(blurred(image[0], shape), shape, 0, coarse_order)
    assert np.abs(result[0] - expected).max() <= 1e-5 * np.ptp(image)


@pytest.mark.parametrize("options", [{}, {"anti_alias": True}, {"coarse_axis": 0, "coarse_order": 1}])
def test_any_stride_gives_the_same(rng, options):
    image = rng.normal(size=(2, 8, 9, 10)).astype(np.float32)
    expected = resample_image(image, (5, 13, 7), **options)
    wide = np.zeros((2, 16, 9, 20), np.float32)
    wide[:, ::2, :, ::2] = image
    for other in (
        np.asfortranarray(image), wide[:, ::2, :, ::2], np.ascontiguousarray(image[:, ::-1, :, ::-1])[:, ::-1, :, ::-1],
        np.ascontiguousarray(image.transpose(3, 1, 0, 2)).transpose(2, 1, 3, 0),
    ):  # fmt: skip
        assert np.array_equal(resample_image(other, (5, 13, 7), **options), expected)


def test_impossible_orders():
    with pytest.raises(ValueError, match=r"coarse_order must be 0 \(nearest\) or 1 \(linear\), got 3"):
        resample_image(np.zeros((1, 2, 3, 4)), (2, 3, 5), coarse_axis=0, coarse_order=3)
