"""Resampling against scipy and against a label-by-label brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ukbob_seg.preprocessing.resampling import (
    logits_to_indices,
    logits_to_regions,
    resample_image,
    resample_labels,
    resample_logits_planes,
)

SHAPES = [
    ((9, 11, 13), (14, 17, 20)),  # up
    ((14, 17, 20), (9, 11, 13)),  # down
    ((9, 11, 13), (9, 20, 7)),  # mixed, one axis unchanged
    ((1, 12, 10), (1, 18, 15)),  # one slice
    ((1, 12, 10), (3, 12, 5)),
    ((30, 5, 6), (7, 5, 9)),
]


def _zoom(array, shape, order):
    factors = [n / o for n, o in zip(shape, array.shape, strict=True)]
    return ndimage.zoom(array.astype(np.float64), factors, order=order, mode="nearest", grid_mode=True)


@pytest.mark.parametrize(("old", "new"), SHAPES)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_images_equal_scipy(rng, old, new, order):
    image = rng.normal(size=(2, *old)).cumsum(axis=-1)
    result = resample_image(image, new, order)
    assert result.dtype == np.float32
    expected = np.stack([_zoom(channel, new, order) for channel in image])
    assert np.abs(result - expected).max() <= 1e-5 * np.ptp(image)


def test_images_in_any_memory_order(rng):
    image = rng.normal(size=(2, 8, 9, 10)).astype(np.float32)
    expected = resample_image(image, (12, 7, 10))
    assert np.array_equal(resample_image(np.asfortranarray(image), (12, 7, 10)), expected)
    wide = np.zeros((2, 16, 9, 20), np.float32)
    wide[:, ::2, :, ::2] = image
    assert np.allclose(resample_image(wide[:, ::2, :, ::2], (12, 7, 10)), expected)


def test_an_unchanged_image_is_a_copy(rng):
    image = rng.normal(size=(1, 4, 5, 6)).astype(np.float32)
    result = resample_image(image, (4, 5, 6))
    assert np.array_equal(result, image)
    result[:] = 0
    assert image.any()


def test_the_coarse_axis_takes_nearest_slices(rng):
    image = rng.normal(size=(1, 5, 12, 10))
    result = resample_image(image, (10, 20, 15), 3, coarse_axis=0)
    expected = np.repeat(np.stack([_zoom(plane, (20, 15), 3) for plane in image[0]]), 2, axis=0)
    assert np.abs(result[0] - expected).max() <= 1e-5 * np.ptp(image)


def _brute_force_labels(labels, shape):
    """Votes per label by resampling its one-hot map; also where the winner is not clear."""
    values = np.unique(labels)
    votes = np.stack([_zoom((labels == v).astype(float), shape, 1) for v in values])
    ordered = np.sort(votes, axis=0)
    clear = np.ones(shape, bool) if len(values) == 1 else ordered[-1] - ordered[-2] > 1e-7
    return values[votes.argmax(axis=0)], clear


@pytest.mark.parametrize(("old", "new"), SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_labels_equal_one_hot_argmax(rng, old, new, dtype):
    labels = rng.integers(0, 5, old).astype(dtype)
    if dtype == np.uint16:
        labels = labels * 300
    result = resample_labels(labels, new)
    expected, clear = _brute_force_labels(labels, new)
    assert result.dtype == dtype
    assert clear.mean() > 0.1
    assert np.array_equal(result[clear], expected[clear])
    assert np.array_equal(resample_labels(np.asfortranarray(labels), new), result)
    assert np.array_equal(resample_labels(np.repeat(labels, 2, axis=2)[:, :, ::2], new), result)


def test_equal_votes_go_to_the_nearest_then_the_lower_label():
    # One axis doubled: positions -0.25, 0.25, 0.75, 1.25 have a nearest voxel with 0.75 of the votes.
    assert resample_labels(np.array([[[7, 3]]], np.uint8), (1, 1, 4)).ravel().tolist() == [7, 7, 3, 3]
    # Halved: the new voxel lies exactly between; both have half the votes, the upper one counts as nearest.
    assert resample_labels(np.array([[[7, 3]]], np.uint8), (1, 1, 1)).ravel().tolist() == [3]
    # Four corners with a quarter each, nearest is 9.
    assert resample_labels(np.array([[[4, 5], [6, 9]]], np.uint8), (1, 1, 1)).ravel().tolist() == [9]
    # Nearest (9) has a quarter, 4 has half.
    assert resample_labels(np.array([[[4, 4], [6, 9]]], np.uint8), (1, 1, 1)).ravel().tolist() == [4]


def test_no_holes_where_three_labels_meet():
    """At a junction no single label has half the votes; thresholding each label at 0.5 would leave background."""
    labels = np.ones((4, 8, 8), np.uint8)
    labels[:, :4, 4:] = 2
    labels[:, 4:, 4:] = 3
    assert (resample_labels(labels, (6, 13, 13)) > 0).all()


def test_one_voxel_label_survives_upsampling():
    labels = np.zeros((5, 5, 5), np.uint8)
    labels[2, 2, 2] = 1
    assert (resample_labels(labels, (15, 15, 15)) == 1).sum() > 0


@given(old=st.tuples(*[st.integers(1, 7)] * 3), new=st.tuples(*[st.integers(1, 9)] * 3), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_no_label_is_invented(old, new, seed):
    labels = np.random.default_rng(seed).integers(0, 300, old).astype(np.uint16)
    assert set(np.unique(resample_labels(labels, new))) <= set(np.unique(labels))


def test_labels_along_the_coarse_axis(rng):
    labels = rng.integers(0, 4, (4, 9, 8)).astype(np.uint8)
    result = resample_labels(labels, (8, 9, 8), nearest_axis=0)
    assert np.array_equal(result, np.repeat(labels, 2, axis=0))


@pytest.mark.parametrize(("old", "new"), [*SHAPES, ((6, 7, 8), (6, 7, 8))])
def test_logits_equal_zoom_then_argmax(rng, old, new):
    logits = rng.normal(size=(6, *old)).astype(np.float32)
    zoomed = np.stack([_zoom(channel, new, 1) for channel in logits])
    ordered = np.sort(zoomed, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-5
    result = logits_to_indices(logits, new)
    assert result.dtype == np.uint8
    assert np.array_equal(result[clear], zoomed.argmax(axis=0)[clear])
    regions = logits_to_regions(logits, new)
    expected = np.where((zoomed > 0).any(0), 6 - (zoomed > 0)[::-1].argmax(0), 0)
    clear = np.abs(zoomed).min(axis=0) > 1e-5
    assert np.array_equal(regions[clear], expected[clear])
    planes = resample_logits_planes(logits, new, 0, new[0])
    assert np.abs(planes - zoomed).max() < 1e-5
    assert np.array_equal(resample_logits_planes(logits, new, new[0] // 2, new[0]), planes[:, new[0] // 2 :])


def test_many_classes(rng):
    logits = rng.normal(size=(300, 3, 4, 5)).astype(np.float16)
    result = logits_to_indices(logits, (3, 4, 5))
    assert result.dtype == np.uint16
    assert np.array_equal(result, logits.argmax(axis=0))


def test_logits_along_the_coarse_axis(rng):
    logits = rng.normal(size=(3, 4, 6, 5)).astype(np.float32)
    assert np.array_equal(logits_to_indices(logits, (8, 6, 5), coarse_axis=0), np.repeat(logits.argmax(0), 2, axis=0))
