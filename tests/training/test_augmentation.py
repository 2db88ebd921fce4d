"""Transforms: p = 0 is the identity, seeds reproduce, image and label move together, left and right swap."""

import dataclasses

import numpy as np
import pytest
import torch

from ukbob_seg.training.augmentation import (
    AugmentationSetup,
    Batch,
    FlipRecord,
    IntensityRecord,
    RandomFlip,
    RandomIntensityScale,
    RandomIntensityShift,
    RandomLinearIntensity,
    RandomRotate90,
    Rotate90Record,
    augment,
    make_transforms,
)


@pytest.fixture
def batch():
    labels = torch.arange(2 * 4 * 4 * 4).view(2, 4, 4, 4) % 7
    return Batch(labels[:, None].float() * 10, labels)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "transform",
    [
        RandomFlip(probability=0),
        RandomRotate90([(0, 1)], 0),
        RandomIntensityShift(0.1, 0),
        RandomIntensityScale(0.1, 0),
        RandomLinearIntensity(RandomIntensityScale(0.1, 0), RandomIntensityShift(0.1, 0)),
    ],
)
def test_probability_zero_is_the_identity(batch, transform):
    result = augment(batch, [transform], _generator())
    assert torch.equal(result.image, batch.image)
    assert torch.equal(result.labels, batch.labels)


def test_flips_equal_numpy_and_twice_is_the_identity(batch):
    record = FlipRecord(torch.tensor([[True, False, True], [False, True, False]]))
    once = RandomFlip().apply(batch, record)
    assert np.array_equal(once.labels[0].numpy(), np.flip(batch.labels[0].numpy(), (0, 2)))
    assert np.array_equal(once.image[1, 0].numpy(), np.flip(batch.image[1, 0].numpy(), 1))
    twice = RandomFlip().apply(once, record)
    assert torch.equal(twice.image, batch.image)
    assert torch.equal(twice.labels, batch.labels)


def test_a_batch_is_the_same_as_its_elements(batch):
    flip = RandomFlip()
    record = flip.sample(2, _generator(4))
    whole = flip.apply(batch, record)
    for i in range(2):
        one = flip.apply(Batch(batch.image[i : i + 1], batch.labels[i : i + 1]), FlipRecord(record.flipped[i : i + 1]))
        assert torch.equal(one.image[0], whole.image[i])


def test_left_and_right_swap_only_with_the_left_right_axis(batch):
    swap = torch.tensor([0, 2, 1, 3, 4, 5, 6])
    flip = RandomFlip(left_right_axis=2, swap=swap)
    record = FlipRecord(torch.tensor([[False, False, True], [True, False, False]]))
    result = flip.apply(batch, record)
    assert torch.equal(result.labels[0], swap[batch.labels[0].flip(2)])
    assert torch.equal(result.labels[1], batch.labels[1].flip(0))


def test_only_allowed_axes_are_flipped():
    flipped = RandomFlip(axes=(1,), probability=1.0).sample(50, _generator()).flipped
    assert flipped.any(dim=0).tolist() == [False, True, False]


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("plane", [(0, 1), (0, 2), (1, 2)])
def test_rotations_equal_numpy(plane, owned):
    shape = [5, 5, 5]
    shape[3 - sum(plane)] = 4
    labels = torch.randint(0, 99, (4, *shape), generator=_generator())
    image = torch.rand(4, 2, *shape, generator=_generator())
    batch = Batch(image.clone(), labels.clone(), previous=labels + 1, owned=owned)
    turns = [1, 0, 3, 2]
    result = RandomRotate90([(9, 9), plane]).apply(batch, Rotate90Record(torch.tensor(turns), torch.ones(4).long()))
    for element, n in enumerate(turns):
        expected = np.rot90(labels[element].numpy(), n, plane)
        assert np.array_equal(result.labels[element].numpy(), expected)
        assert np.array_equal(result.previous[element].numpy(), expected + 1)
        for channel in range(2):
            expected = np.rot90(image[element, channel].numpy(), n, plane)
            assert np.array_equal(result.image[element, channel].numpy(), expected)
    assert torch.equal(batch.labels, labels)
    assert torch.equal(batch.image, image) is not owned


def test_image_and_labels_stay_together(batch):
    transforms = [RandomFlip(), RandomRotate90([(0, 1), (0, 2), (1, 2)], 1.0)]
    for seed in range(20):
        result = augment(batch, transforms, _generator(seed))
        assert torch.equal(result.image[:, 0], result.labels.float() * 10)


def test_intensity_transforms(batch):
    shifted = RandomIntensityShift().apply(batch, IntensityRecord(torch.tensor([0.5, 0.0])))
    assert torch.allclose(shifted.image[0], batch.image[0] + 0.5)
    assert torch.equal(shifted.image[1], batch.image[1])
    scaled = RandomIntensityScale().apply(batch, IntensityRecord(torch.tensor([0.5, 0.0])))
    assert torch.allclose(scaled.image[0], batch.image[0] * 1.5)
    offsets = RandomIntensityShift(0.1, 0.5).sample(2000, _generator()).value
    assert offsets.abs().max() <= 0.1
    assert 0.4 < (offsets != 0).float().mean() < 0.6


@pytest.mark.parametrize("owned", [False, True])
def test_scale_and_shift_in_one_pass_are_both_in_turn(batch, owned):
    scale, shift = RandomIntensityScale(), RandomIntensityShift()
    both = RandomLinearIntensity(scale, shift)
    kinds = set()
    for seed in range(20):
        record = both.sample(2, _generator(seed))
        kinds |= {(bool(a), bool(b)) for a, b in zip(record.scale.value, record.shift.value, strict=True)}
        expected = shift.apply(scale.apply(batch, record.scale), record.shift)
        assert augment(batch, [scale, shift], _generator(seed)).image.equal(expected.image)  # the same draws
        given = dataclasses.replace(batch, image=batch.image.clone(), owned=owned)
        found = both.apply(given, record)
        torch.testing.assert_close(found.image, expected.image)
        if owned:
            assert found.image.data_ptr() == given.image.data_ptr()
        else:
            assert torch.equal(given.image, batch.image)
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}


def test_rates_of_the_papers_set():
    rotate = RandomRotate90([(0, 1)], 0.1)
    turned = rotate.sample(5000, _generator()).turns != 0
    assert 0.08 < turned.float().mean() < 0.12


def test_seeds_reproduce(batch):
    transforms = make_transforms("ukbob", AugmentationSetup((4, 4, 4), (1, 1, 1)))
    one, two, other = (augment(batch, transforms, _generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.image, two.image)
    assert not torch.equal(one.image, other.image)


def test_rotation_planes_need_equal_edges_and_spacing():
    def planes(**changes):
        setup = AugmentationSetup(**{"patch_size": (8, 8, 8), "spacing_mm": (1, 1, 1), **changes})
        return make_transforms("ukbob", setup)[1].planes

    assert planes() == ((0, 1), (0, 2), (1, 2))
    assert planes(patch_size=(4, 8, 8)) == ((1, 2),)
    assert planes(spacing_mm=(3, 1, 1)) == ((1, 2),)
    assert planes(swap=torch.arange(3), left_right_axis=2) == ((0, 1),)
    assert make_transforms("none", AugmentationSetup((8, 8, 8), (1, 1, 1))) == []
