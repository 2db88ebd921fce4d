"""Resampling against scipy, against a label-by-label brute force and against exact fractions."""

import itertools
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joblib import Parallel, delayed
from scipy import ndimage

from ukbob_seg.preprocessing.resampling import (
    SMALL,
    logits_to_indices,
    logits_to_regions,
    resample_image,
    resample_labels,
    resample_logits_planes,
)
from ukbob_seg.preprocessing.resampling_taps import PlaneRange

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


@pytest.mark.parametrize("order", [2, 4, 5])
def test_the_other_orders_equal_scipy_too(rng, order):
    image = rng.normal(size=(1, 9, 8, 30))
    expected = _zoom(image[0], (12, 8, 17), order)
    assert np.abs(resample_image(image, (12, 8, 17), order)[0] - expected).max() <= 1e-5 * np.ptp(image)


def test_large_images_are_shared_between_threads(rng):
    """More values than one thread takes, edges longer than a block, and every axis a different prime."""
    image = rng.normal(size=(1, 37, 53, 307)).astype(np.float32)
    assert SMALL < 59 * 53 * 307
    for shape in ((59, 53, 307), (37, 71, 307), (37, 53, 401), (23, 59, 293)):
        assert np.abs(resample_image(image, shape)[0] - _zoom(image[0], shape, 3)).max() <= 1e-5 * np.ptp(image)


def test_an_image_far_from_zero_keeps_its_contrast(rng):
    """Dropping the far weights of the spline must not show where the offset is a thousand times the contrast."""
    image = (1000 + rng.random((1, 60, 5, 6))).astype(np.float32)
    assert np.abs(resample_image(image, (90, 5, 6))[0] - _zoom(image[0], (90, 5, 6), 3)).max() < 1e-3


def test_images_in_any_memory_order(rng):
    image = rng.normal(size=(2, 8, 9, 10)).astype(np.float32)
    expected = resample_image(image, (12, 7, 10))
    assert np.array_equal(resample_image(np.asfortranarray(image), (12, 7, 10)), expected)
    wide = np.zeros((2, 16, 9, 20), np.float32)
    wide[:, ::2, :, ::2] = image
    assert np.array_equal(resample_image(wide[:, ::2, :, ::2], (12, 7, 10)), expected)
    assert np.array_equal(resample_image(image.astype(">f4"), (12, 7, 10)), expected)
    assert np.array_equal(resample_image(image.astype(np.float64), (12, 7, 10)), expected)


@pytest.mark.parametrize("memory", [np.asarray, np.asfortranarray, lambda a: a.view(np.memmap)])
def test_an_unchanged_shape_gives_a_copy(rng, memory):
    image = memory(rng.normal(size=(1, 4, 5, 6)).astype(np.float32))
    result = resample_image(image, (4, 5, 6))
    assert np.array_equal(result, image)
    assert not np.shares_memory(result, image)
    labels = memory(rng.integers(0, 9, (4, 5, 6)).astype(np.uint8))
    result = resample_labels(labels, (4, 5, 6))
    assert np.array_equal(result, labels)
    assert not np.shares_memory(result, labels)


@given(
    old=st.tuples(*[st.integers(1, 9)] * 3), new=st.tuples(*[st.integers(1, 12)] * 3),
    order=st.sampled_from([0, 1, 3]), axis=st.sampled_from([None, 0, 1, 2]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_constant_stays_constant(old, new, order, axis):
    assert np.abs(resample_image(np.full((1, *old), 7.0), new, order, axis) - 7).max() < 1e-5
    assert (resample_labels(np.full(old, 7, np.uint8), new, axis) == 7).all()
    logits = np.zeros((3, *old), np.float32)
    logits[1] = 2
    assert (logits_to_indices(logits, new, axis) == 1).all()
    assert (logits_to_regions(logits, new, axis) == 2).all()
    planes = resample_logits_planes(logits, new, PlaneRange(0, new[0]), axis)
    assert np.abs(planes - np.array([0, 2, 0]).reshape(3, 1, 1, 1)).max() < 1e-6


def test_the_coarse_axis_takes_nearest_slices(rng):
    image = rng.normal(size=(1, 5, 12, 10))
    result = resample_image(image, (10, 20, 15), 3, coarse_axis=0)
    expected = np.repeat(np.stack([_zoom(plane, (20, 15), 3) for plane in image[0]]), 2, axis=0)
    assert np.abs(result[0] - expected).max() <= 1e-5 * np.ptp(image)


@pytest.mark.parametrize("axis", [1, 2])
def test_any_axis_can_be_the_coarse_one(rng, axis):
    image = rng.normal(size=(1, 6, 7, 8))
    shape = [9, 9, 9]
    expected = ndimage.zoom(
        image[0].take(np.clip(np.floor((np.arange(9) + 0.5) * image.shape[axis + 1] / 9), 0, None).astype(int), axis),
        [1 if a == axis else 9 / n for a, n in enumerate(image.shape[1:])], order=3, mode="nearest", grid_mode=True,
    )  # fmt: skip
    assert np.abs(resample_image(image, shape, 3, coarse_axis=axis)[0] - expected).max() <= 1e-5 * np.ptp(image)


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


def test_300_labels(rng):
    labels = rng.permutation(np.arange(360) % 300).reshape(6, 10, 6).astype(np.uint16)
    for shape in ((9, 13, 7), (4, 7, 5)):
        expected, clear = _brute_force_labels(labels, shape)
        assert clear.mean() > 0.2
        assert np.array_equal(resample_labels(labels, shape)[clear], expected[clear])


def _votes_in_fractions(labels, shape):
    """The definition, in exact arithmetic: trilinear votes, then the nearest voxel's label, then the lower one."""
    result = np.empty(shape, labels.dtype)
    for target in np.ndindex(*shape):
        near, sides = [], []
        for k, old, new in zip(target, labels.shape, shape, strict=True):
            position = min(max(Fraction((2 * k + 1) * old, 2 * new) - Fraction(1, 2), 0), old - 1)
            low = int(position)
            part = position - low
            sides.append([(low, 1 - part), (min(low + 1, old - 1), part)])
            near.append(low + (part >= Fraction(1, 2)))
        votes = defaultdict(Fraction)
        for corner in itertools.product(*sides):
            votes[labels[tuple(voxel for voxel, _ in corner)]] += corner[0][1] * corner[1][1] * corner[2][1]
        most = max(votes.values())
        tied = sorted(label for label, vote in votes.items() if vote == most)
        nearest = labels[tuple(near)]
        result[target] = nearest if nearest in tied else tied[0]
    return result


@pytest.mark.parametrize(("old", "new"), [
    ((4, 6, 4), (2, 3, 2)), ((6, 6, 3), (9, 9, 1)), ((3, 5, 6), (5, 3, 10)), ((1, 6, 5), (1, 9, 4)),
    ((6, 3, 7), (4, 4, 5)),
])  # fmt: skip
def test_votes_equal_exact_fractions_ties_included(rng, old, new):
    """No rounding decides anything, so the result is the same on every machine."""
    for _ in range(4):
        labels = rng.integers(0, 4, old).astype(np.int16) - 1
        assert np.array_equal(resample_labels(labels, new), _votes_in_fractions(labels, new))


def test_halving_prefers_neither_background_nor_organ(rng):
    """Each new voxel is the mean of eight; ties must not make organs grow or shrink."""
    smooth = ndimage.gaussian_filter(rng.normal(size=(40, 40, 40)), 3)
    labels = (smooth > 0).astype(np.uint8)
    fine = labels.mean()
    assert abs(resample_labels(labels, (20, 20, 20)).mean() - fine) < 0.02 * fine


def test_labels_of_any_byte_order_or_permission(rng):
    labels = rng.integers(0, 5, (6, 7, 8)).astype(np.uint16)
    expected = resample_labels(labels, (9, 5, 12))
    frozen = labels.copy()
    frozen.setflags(write=False)
    assert np.array_equal(resample_labels(frozen, (9, 5, 12)), expected)
    assert np.array_equal(resample_labels(labels.astype(">u2"), (9, 5, 12)), expected)


def test_large_label_maps_are_shared_between_threads(rng):
    labels = (rng.random((20, 9, 80)) * 7).astype(np.uint8).repeat(9, axis=1)
    shape = (23, 90, 160)
    assert np.prod(shape) > SMALL
    expected, clear = _brute_force_labels(labels, shape)
    assert np.array_equal(resample_labels(labels, shape)[clear], expected[clear])


def test_equal_votes_go_to_the_nearest_then_the_lower_label():
    # One axis doubled: positions -0.25, 0.25, 0.75, 1.25 have a nearest voxel with 0.75 of the votes.
    assert resample_labels(np.array([[[7, 3]]], np.uint8), (1, 1, 4)).ravel().tolist() == [7, 7, 3, 3]
    # Halved: the new voxel lies exactly between; both have half the votes, the upper one counts as nearest.
    assert resample_labels(np.array([[[7, 3]]], np.uint8), (1, 1, 1)).ravel().tolist() == [3]
    # Four corners with a quarter each, nearest is 9.
    assert resample_labels(np.array([[[4, 5], [6, 9]]], np.uint8), (1, 1, 1)).ravel().tolist() == [9]
    # Nearest (9) has a quarter, 4 has half.
    assert resample_labels(np.array([[[4, 4], [6, 9]]], np.uint8), (1, 1, 1)).ravel().tolist() == [4]


@pytest.mark.parametrize(("one", "other"), [(7, 4), (4, 7)])
def test_equal_votes_away_from_the_nearest_voxel_go_to_the_lower_label(one, other):
    """At 0.4 of the way along each axis the nearest voxel has 0.216 of the votes, ``one`` and ``other`` 0.24 each."""
    labels = np.zeros((3, 3, 3), np.uint8)
    labels[:2, :2, :2] = [[[9, one], [other, one]], [[1, 2], [other, 3]]]
    assert resample_labels(labels, (5, 5, 5))[1, 1, 1] == 4


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


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_labels_along_the_coarse_axis(rng, axis):
    labels = rng.integers(0, 4, (4, 9, 8)).astype(np.uint8)
    doubled = [n * (2 if a == axis else 1) for a, n in enumerate(labels.shape)]
    assert np.array_equal(resample_labels(labels, doubled, nearest_axis=axis), np.repeat(labels, 2, axis=axis))
    # In plane, votes as ever.
    larger = [n if a == axis else n + 5 for a, n in enumerate(labels.shape)]
    planes = [resample_labels(plane, [1 if a == axis else n for a, n in enumerate(larger)])
              for plane in np.split(labels, labels.shape[axis], axis)]  # fmt: skip
    assert np.array_equal(resample_labels(labels, larger, nearest_axis=axis), np.concatenate(planes, axis))


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
    planes = resample_logits_planes(logits, new, PlaneRange(0, new[0]))
    assert np.abs(planes - zoomed).max() < 1e-5
    assert np.array_equal(
        resample_logits_planes(logits, new, PlaneRange(new[0] // 2, new[0])), planes[:, new[0] // 2 :]
    )
    assert np.array_equal(planes.argmax(axis=0), result)  # the very numbers that were compared
    assert resample_logits_planes(logits, new, PlaneRange(1, 1)).shape == (6, 0, *new[1:])


def test_logits_in_any_type_and_memory_order(rng):
    """More planes than are converted at once, and enough values for several threads."""
    half = rng.normal(size=(5, 21, 12, 14)).astype(np.float16)
    logits = half.astype(np.float32)
    shape = (33, 40, 41)
    assert 5 * np.prod(shape) > SMALL
    for function in (
        logits_to_indices,
        logits_to_regions,
        lambda a, s: resample_logits_planes(a, s, PlaneRange(3, 30)),
    ):
        expected = function(logits, shape)
        for other in (half, logits.astype(np.float64), np.asfortranarray(logits), np.repeat(logits, 2, 3)[..., ::2]):
            assert np.array_equal(function(other, shape), expected)


def test_equal_logits_go_to_the_lower_class(rng):
    logits = rng.integers(0, 2, (4, 3, 4, 5)).astype(np.float32)
    assert np.array_equal(logits_to_indices(logits, (3, 4, 5)), logits.argmax(axis=0))
    assert (logits_to_indices(np.zeros((4, 3, 4, 5), np.float32), (6, 7, 8)) == 0).all()
    assert (logits_to_regions(np.zeros((4, 3, 4, 5), np.float32), (6, 7, 8)) == 0).all()


def test_forbidden_classes_never_win(rng):
    """-inf is the usual way to exclude a class."""
    logits = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
    logits[0] = -np.inf
    for shape in ((4, 5, 6), (8, 5, 6), (7, 8, 9)):
        assert np.array_equal(logits_to_indices(logits, shape), logits_to_indices(logits[1:], shape) + 1)
    logits[1:][rng.random((2, 4, 5, 6)) < 0.4] = -np.inf  # here and there
    assert np.array_equal(logits_to_indices(logits, (4, 5, 6)), logits.argmax(axis=0))


def test_many_classes(rng):
    logits = rng.normal(size=(300, 3, 4, 5)).astype(np.float16)
    result = logits_to_indices(logits, (3, 4, 5))
    assert result.dtype == np.uint16
    assert np.array_equal(result, logits.argmax(axis=0))


def test_logits_along_the_coarse_axis(rng):
    logits = rng.normal(size=(3, 4, 6, 5)).astype(np.float32)
    assert np.array_equal(logits_to_indices(logits, (8, 6, 5), coarse_axis=0), np.repeat(logits.argmax(0), 2, axis=0))


def _work(seed):
    generator = np.random.default_rng(seed)
    image = generator.normal(size=(1, 40, 60, 70)).astype(np.float32)
    labels = generator.integers(0, 5, (40, 60, 70)).astype(np.uint8)
    return resample_image(image, (60, 70, 80)), resample_labels(labels, (60, 70, 80))


def test_worker_processes_give_the_same(rng):
    here = [_work(seed) for seed in (1, 2)]
    there = Parallel(n_jobs=2, inner_max_num_threads=1)(delayed(_work)(seed) for seed in (1, 2))
    for one, other in zip(here, there, strict=True):
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])


@pytest.mark.parametrize(("call", "message"), [
    (lambda: resample_image(np.zeros((2, 3, 4)), (2, 3, 4)), "three axes"),
    (lambda: resample_image(np.zeros((1, 2, 3, 4)), (2, 0, 4)), r"at least one voxel, got \(2, 3, 4\) to \(2, 0, 4\)"),
    (lambda: resample_image(np.zeros((1, 2, 3, 4)), (2, 3, 5), order=6), "order must be 0 to 5, got 6"),
    (lambda: resample_image(np.zeros((1, 2, 3, 4)), (2, 3, 5), coarse_axis=-1), "must be 0, 1, 2 or None, got -1"),
    (lambda: resample_labels(np.zeros((3, 4), np.uint8), (2, 3, 4)), "three axes"),
    (lambda: logits_to_indices(np.zeros((0, 3, 4, 5), np.float32), (2, 3, 4)), "at least one class"),
    (lambda: resample_logits_planes(np.zeros((1, 3, 4, 5)), (2, 3, 4), PlaneRange(0, 3)),
     "planes 0 to 3 are not within the 2"),
])  # fmt: skip
def test_impossible_requests(call, message):
    with pytest.raises(ValueError, match=message):
        call()
