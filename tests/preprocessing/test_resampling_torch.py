"""The torch functions against the compiled kernels: the same labels and decisions in every voxel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ukbob_seg.preprocessing import resampling, resampling_torch
from ukbob_seg.preprocessing.resampling_taps import PlaneRange

SHAPES = [
    ((9, 11, 13), (14, 17, 20)),  # up
    ((14, 17, 20), (9, 11, 13)),  # down
    ((10, 12, 14), (5, 6, 7)),  # halved: every vote is a tie of eighths
    ((9, 11, 13), (9, 20, 7)),  # mixed, one axis unchanged
    ((1, 12, 10), (1, 18, 15)),  # one slice
    ((1, 12, 10), (3, 12, 5)),
    ((4, 5, 6), (1, 1, 1)),
    ((6, 7, 8), (6, 7, 8)),
]
LABEL_TYPES = [np.uint8, np.uint16, np.int8, np.int16, np.int32, np.int64, np.uint32]
shapes = st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 13)] * 3)
axes = st.sampled_from([None, 0, 1, 2])


@pytest.fixture
def small_slabs(monkeypatch):
    """So that small volumes take several slabs, one plane each at times."""
    monkeypatch.setattr(resampling_torch, "SLAB_VOXELS", 500)
    monkeypatch.setattr(resampling_torch, "VOTE_VOXELS", 500)


def strided(tensor):
    """The same values in every other column of something larger, first and last axis exchanged in memory."""
    last = tensor.dim() - 1
    wide = torch.repeat_interleave(tensor.transpose(0, last).contiguous(), 2, dim=last)
    return wide[..., ::2].transpose(0, last)


@pytest.mark.parametrize(("old", "new"), SHAPES)
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_are_the_same(rng, small_slabs, old, new, axis, dtype):
    labels = rng.integers(0, 4, old).astype(dtype) * (9000 if dtype == np.uint16 else 60)
    expected = resampling.resample_labels(labels, new, axis)
    result = resampling_torch.resample_labels(torch.from_numpy(labels), new, axis)
    assert np.array_equal(result.numpy(), expected)
    assert result.numpy().dtype == dtype
    other = strided(torch.from_numpy(labels.astype(np.int32))).to(torch.from_numpy(labels).dtype)
    assert np.array_equal(resampling_torch.resample_labels(other, new, axis).numpy(), expected)


@pytest.mark.parametrize("dtype", LABEL_TYPES)
def test_labels_of_every_type(rng, dtype):
    labels = (rng.integers(0, 5, (6, 7, 8)) * (np.iinfo(dtype).max // 4)).astype(dtype)
    labels[3, 3, 3] = np.iinfo(dtype).min
    for shape in ((9, 5, 16), (6, 7, 8)):
        source = torch.from_numpy(labels)
        result = resampling_torch.resample_labels(source, shape)
        assert np.array_equal(result.numpy(), resampling.resample_labels(labels, shape))
        assert result.dtype == source.dtype
        assert result.data_ptr() != source.data_ptr()


@given(old=shapes[0], new=shapes[1], axis=axes, count=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_any_label_map(old, new, axis, count, seed):
    """Few labels make many ties, three hundred make none alike."""
    labels = np.random.default_rng(seed).integers(0, count, old).astype(np.uint16)
    result = resampling_torch.resample_labels(torch.from_numpy(labels), new, axis)
    assert np.array_equal(result.numpy(), resampling.resample_labels(labels, new, axis))


@pytest.mark.parametrize("shape", [(5, 5, 5), (7, 8, 9), (15, 15, 15), (3, 2, 5)])
@pytest.mark.parametrize("place", [(2, 2, 2), (0, 0, 0), (4, 0, 2)])
def test_labels_of_one_voxel(shape, place):
    labels = np.zeros((5, 5, 5), np.uint8)
    labels[place] = 9
    result = resampling_torch.resample_labels(torch.from_numpy(labels), shape)
    assert np.array_equal(result.numpy(), resampling.resample_labels(labels, shape))
    assert (result == 9).any() or min(shape) < 5


def _compare_decisions(logits, new, axis=None):
    """Decisions, and the numbers they rest on, are equal to the last bit."""
    source = torch.from_numpy(logits)
    for name in ("logits_to_indices", "logits_to_regions"):
        expected = getattr(resampling, name)(logits, new, axis)
        result = getattr(resampling_torch, name)(source, new, axis).numpy()
        assert result.dtype == expected.dtype
        assert np.array_equal(result, expected)
        assert np.array_equal(getattr(resampling_torch, name)(strided(source), new, axis).numpy(), expected)
    for start, stop in ((0, new[0]), (new[0] // 2, new[0]), (0, 0)):
        expected = resampling.resample_logits_planes(logits, new, PlaneRange(start, stop), axis)
        result = resampling_torch.resample_logits_planes(source, new, PlaneRange(start, stop), axis)
        assert result.dtype == torch.float32
        assert np.array_equal(result.numpy(), expected)


@pytest.mark.parametrize(("old", "new"), SHAPES)
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_logits_are_the_same(rng, small_slabs, old, new, axis):
    _compare_decisions(rng.normal(size=(6, *old)).astype(np.float32), new, axis)


@given(old=shapes[0], new=shapes[1], axis=axes, classes=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_logits_ties_and_forbidden_classes_included(old, new, axis, classes, seed):
    generator = np.random.default_rng(seed)
    logits = generator.integers(-2, 3, (classes, *old)).astype(np.float32)
    logits[generator.random(logits.shape) < 0.1] = -np.inf
    _compare_decisions(logits, new, axis)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_logits_of_other_types(rng, dtype):
    _compare_decisions(rng.normal(size=(3, 5, 6, 7)).astype(dtype), (9, 8, 4))


def test_more_classes_than_a_byte_holds(rng):
    _compare_decisions(rng.normal(size=(300, 3, 4, 5)).astype(np.float32), (5, 4, 7))
    _compare_decisions(rng.normal(size=(256, 2, 2, 2)).astype(np.float32), (3, 3, 3))


@pytest.mark.parametrize(("old", "new"), SHAPES)
@pytest.mark.parametrize("options", [
    {}, {"order": 1}, {"order": 0}, {"anti_alias": True}, {"order": 0, "anti_alias": True}, {"coarse_axis": 0},
    {"coarse_axis": 1, "coarse_order": 1}, {"coarse_axis": 2, "coarse_order": 1, "anti_alias": True},
])  # fmt: skip
def test_images_are_the_same(rng, small_slabs, old, new, options):
    image = rng.normal(size=(2, *old)).astype(np.float32)
    expected = resampling.resample_image(image, new, **options)
    result = resampling_torch.resample_image(torch.from_numpy(image), new, **options)
    assert result.dtype == torch.float32
    assert np.abs(result.numpy() - expected).max() <= 1e-6 * np.ptp(image)
    assert torch.equal(resampling_torch.resample_image(strided(torch.from_numpy(image)), new, **options), result)
    assert torch.equal(resampling_torch.resample_image(torch.from_numpy(image).double(), new, **options), result)


class _Largest(TorchDispatchMode):
    """Remembers how many values the largest tensor has that an operation returns."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.values = max([self.values, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


def test_memory_is_a_slab_of_one_class(rng, small_slabs):
    """Nothing is made that is larger than the result, however many classes there are."""
    logits = torch.from_numpy(rng.normal(size=(40, 6, 7, 8)).astype(np.float16))
    new = (12, 14, 16)
    for function in (resampling_torch.logits_to_indices, resampling_torch.logits_to_regions):
        with _Largest() as largest:
            function(logits, new)
        assert largest.values == np.prod(new)  # the result; the input is five times as large
    labels = torch.from_numpy(rng.integers(0, 200, (6, 7, 8)).astype(np.uint8))
    with _Largest() as largest:
        resampling_torch.resample_labels(labels, (24, 14, 16))
    assert largest.values == 24 * 14 * 16


def test_an_unchanged_image_is_a_copy(rng):
    image = torch.from_numpy(rng.normal(size=(1, 4, 5, 6)).astype(np.float32))
    result = resampling_torch.resample_image(image, (4, 5, 6))
    assert torch.equal(result, image)
    assert result.data_ptr() != image.data_ptr()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: resampling_torch.resample_image(torch.zeros(2, 3, 4), (2, 3, 4)), "three axes"),
    (lambda: resampling_torch.resample_image(torch.zeros(1, 2, 3, 4), (2, 3, 5), order=6), "0 to 5, got 6"),
    (lambda: resampling_torch.resample_labels(torch.zeros(2, 3, 4), (2, 3, 5)), "whole numbers"),
    (lambda: resampling_torch.logits_to_indices(torch.zeros(0, 3, 4, 5), (2, 3, 4)), "at least one class"),
    (lambda: resampling_torch.resample_logits_planes(torch.zeros(1, 3, 4, 5), (2, 3, 4), PlaneRange(0, 3)),
     "planes 0 to 3"),
])  # fmt: skip
def test_impossible_requests(call, message):
    with pytest.raises(ValueError, match=message):
        call()
