"""Label maps against one-hot interpolation in whole numbers, ties included, and against nnU-Net where there is one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ukbob_seg.preprocessing.resampling import resample_labels

old_shapes, new_shapes = st.tuples(*[st.integers(1, 10)] * 3), st.tuples(*[st.integers(1, 16)] * 3)
axes = st.sampled_from([None, 0, 1, 2])


def _axis(old, new, nearest):
    """Linear interpolation as a (new, old) matrix of whole numbers, rows of one sum, and the nearest voxels."""
    matrix, near = np.zeros((new, old), np.int64), np.zeros(new, np.int64)
    for k in range(new):
        position = min(max((2 * k + 1) * old - new, 0), (old - 1) * 2 * new)  # voxel centre, in units of 1 / (2 new)
        low, part = divmod(position, 2 * new)
        near[k] = low + (part >= new)
        if nearest:
            matrix[k, near[k]] = 1
        else:
            matrix[k, low] += 2 * new - part
            matrix[k, min(low + 1, old - 1)] += part
    return matrix, near


def exact(labels, shape, nearest_axis=None):
    """Every label's one-hot map interpolated exactly; the label with most, then the nearest voxel's, then the lower."""
    given = [_axis(o, n, a == nearest_axis) for a, (o, n) in enumerate(zip(labels.shape, shape, strict=True))]
    values = np.unique(labels)
    matrices = [matrix for matrix, _ in given]
    votes = np.stack([np.einsum("ka,jb,ic,abc->kji", *matrices, (labels == v).astype(np.int64), optimize=True)
                      for v in values])  # fmt: skip
    nearest = labels[np.ix_(*(near for _, near in given))]
    tied = votes == votes.max(axis=0)
    return np.where(np.take_along_axis(tied, np.searchsorted(values, nearest)[None], 0)[0],
                    nearest, values[tied.argmax(axis=0)])  # fmt: skip


@given(
    old=old_shapes, new=new_shapes, axis=axes, count=st.integers(1, 12), seed=st.integers(0, 999),
    dtype=st.sampled_from([np.uint8, np.uint16]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_any_label_map_equals_the_exact_votes(old, new, axis, count, seed, dtype):
    """Sides of few voxels and factors of small whole numbers: many ties."""
    labels = np.random.default_rng(seed).integers(0, count, old).astype(dtype) * (5000 if dtype == np.uint16 else 20)
    result = resample_labels(labels, new, axis)
    assert result.dtype == dtype
    assert np.array_equal(result, exact(labels, new, axis))


@pytest.mark.parametrize("factor", [1.5, 2.0, 0.5, 1 / 3, 0.77, 3.0])
@pytest.mark.parametrize("axis", [None, 0])
def test_organs_at_usual_factors(rng, factor, axis):
    labels = rng.integers(0, 40, (8, 12, 12)).astype(np.uint16).repeat(3, 1).repeat(3, 2)
    shape = tuple(round(n * factor) for n in labels.shape)
    assert np.array_equal(resample_labels(labels, shape, axis), exact(labels, shape, axis))


@pytest.mark.parametrize("new", [(1, 18, 15), (1, 6, 5), (4, 12, 10), (1, 7, 23)])
def test_single_slices(rng, new):
    labels = rng.integers(0, 4, (1, 12, 10)).astype(np.uint8)
    for axis in (None, 0):
        assert np.array_equal(resample_labels(labels, new, axis), exact(labels, new, axis))


@pytest.mark.parametrize("place", [(2, 2, 2), (0, 0, 0), (4, 4, 0), (0, 2, 4)])
@pytest.mark.parametrize("new", [(5, 5, 9), (10, 10, 10), (3, 3, 3), (7, 4, 5), (15, 1, 15)])
def test_labels_of_one_voxel(place, new):
    labels = np.zeros((5, 5, 5), np.uint8)
    labels[place] = 200
    assert np.array_equal(resample_labels(labels, new), exact(labels, new))


def test_any_stride(rng):
    labels = rng.integers(0, 5, (6, 7, 8)).astype(np.uint8)
    shape = (9, 5, 13)
    expected = exact(labels, shape)
    wide = np.zeros((12, 7, 24), np.uint8)
    wide[::2, :, ::3] = labels
    for other in (
        labels, np.asfortranarray(labels), wide[::2, :, ::3],
        np.ascontiguousarray(labels[::-1, :, ::-1])[::-1, :, ::-1],
        np.ascontiguousarray(labels.transpose(2, 0, 1)).transpose(1, 2, 0),
    ):  # fmt: skip
        assert np.array_equal(resample_labels(other, shape), expected)


@pytest.mark.parametrize("shape", [(9, 15, 17), (5, 7, 8), (12, 10, 22)])
def test_nnunets_own_labels(rng, shape):
    """nnU-Net takes the argmax over labels since batchgenerators does; before, it thresholded label by label."""
    utilities = pytest.importorskip("batchgenerators.augmentations.utils", reason="nnU-Net is not installed")
    labels = rng.integers(0, 6, (6, 10, 11)).astype(np.uint8)
    theirs = utilities.resize_segmentation(labels, shape, 1)
    values = np.unique(labels)
    matrices = [_axis(o, n, False)[0] for o, n in zip(labels.shape, shape, strict=True)]
    votes = np.sort([np.einsum("ka,jb,ic,abc->kji", *matrices, (labels == v).astype(np.int64)) for v in values], 0)
    clear = (votes[-1] > votes[-2]) & (2 * votes[-1] > votes.sum(0))  # by either rule
    assert clear.mean() > 0.1
    assert np.array_equal(resample_labels(labels, shape)[clear], theirs[clear])
