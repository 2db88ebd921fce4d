"""The nonzero box against a loop over voxels, the filled mask against a flood from the border."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ukbob_seg.preprocessing.cropping import nonzero_box, nonzero_mask


def _loop_box(image):
    voxels = np.argwhere((image != 0).any(axis=0))
    if not len(voxels):
        return tuple(slice(0, n) for n in image.shape[1:])
    return tuple(slice(int(a), int(b) + 1) for a, b in zip(voxels.min(axis=0), voxels.max(axis=0), strict=True))


def _flooded_mask(image):
    """Everything that a walk over face neighbours from outside the volume does not reach."""
    padded = np.pad((image != 0).any(axis=0), 1)
    outside = np.zeros_like(padded)
    stack = [(0, 0, 0)]
    while stack:
        voxel = stack.pop()
        if all(0 <= v < n for v, n in zip(voxel, padded.shape, strict=True)):
            if padded[voxel] or outside[voxel]:
                continue
            outside[voxel] = True
            for axis in range(3):
                for step in (-1, 1):
                    stack.append(tuple(v + step * (a == axis) for a, v in enumerate(voxel)))
    return ~outside[1:-1, 1:-1, 1:-1]


def _image(channels, shape, density, seed):
    generator = np.random.default_rng(seed)
    image = generator.normal(size=(channels, *shape)) * (generator.random((channels, *shape)) < density)
    return image.astype(np.float32)


any_image = st.builds(
    _image, st.integers(1, 3), st.tuples(*[st.integers(1, 7)] * 3), st.sampled_from([0, 0.01, 0.1, 0.6, 1]),
    st.integers(0, 999),
)  # fmt: skip


@given(any_image)
@settings(max_examples=150, deadline=None)
def test_the_box_equals_a_loop(image):
    assert nonzero_box(image) == _loop_box(image)
    assert nonzero_box(np.asfortranarray(image)) == _loop_box(image)


@given(any_image)
@settings(max_examples=80, deadline=None)
def test_the_mask_equals_a_flood_and_fits_the_box(image):
    mask = nonzero_mask(image)
    assert mask.dtype == bool
    assert np.array_equal(mask, _flooded_mask(image))
    box = nonzero_box(image)
    assert nonzero_box(mask[None]) == box
    assert np.array_equal(nonzero_mask(image[(slice(None), *box)]), mask[box])


def test_two_channels_share_one_box():
    image = np.zeros((2, 9, 10, 11), np.float32)
    image[0, 3, 4, 5] = 1
    image[1, 6, 2, 8] = -2
    assert nonzero_box(image) == (slice(3, 7), slice(2, 5), slice(5, 9))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.uint8, bool])
def test_an_empty_image_keeps_its_whole_volume(dtype):
    assert nonzero_box(np.zeros((1, 2, 3, 4), dtype)) == (slice(0, 2), slice(0, 3), slice(0, 4))
    assert not nonzero_mask(np.zeros((1, 2, 3, 4), dtype)).any()


def test_holes_are_filled_and_bays_are_not():
    image = np.zeros((1, 5, 6, 7))
    image[0, 1:4, 1:5, 1:6] = 1
    image[0, 2, 2, 2] = 0  # a hole
    image[0, 2, 4, 3] = 0  # open towards y
    mask = nonzero_mask(image)
    assert mask[2, 2, 2]
    assert not mask[2, 4, 3]
    assert mask.sum() == 3 * 4 * 5 - 1
