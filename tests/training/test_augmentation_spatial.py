"""RandomSpatial: one grid for image and labels, in millimetres; scipy says what a matrix must give."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.interpolate import BSpline
from scipy.spatial.transform import Rotation

from ukbob_seg.errors import ConfigError
from ukbob_seg.training.augmentation import (
    AugmentationSetup,
    Batch,
    RandomSpatial,
    SpatialRecord,
    SpatialSettings,
    augment,
    make_transforms,
    moving_axes,
    read_size,
    rotation_matrix,
)

SPACING = (3.0, 1.0, 0.7)
PATCH = (9, 16, 20)
EVERYTHING = SpatialSettings(
    (30.0, 30.0, 30.0), p_rotation=1, p_scale=1, p_shear=1, p_elastic=1, p_isotropic=0, elastic_mm=(2, 3),
    elastic_spacing_mm=8,
)  # fmt: skip


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _batch(size=(13, 21, 28), elements=3, channels=2, previous=True, seed=0):
    generator = _generator(seed)
    labels = torch.randint(0, 65536, (elements, *size), generator=generator, dtype=torch.int32)
    image = torch.randn(elements, channels, *size, generator=generator)
    return Batch(image, labels, labels + 7 if previous else None)


def _record(matrices, nodes=(1, 1, 1), displacement=None):
    matrix = torch.as_tensor(np.stack(matrices), dtype=torch.float64)
    number = len(matrix)
    deformed = torch.full((number,), displacement is not None)
    if displacement is None:
        displacement = torch.zeros(number, 3, *nodes)
    return SpatialRecord(torch.ones(number, dtype=torch.bool), matrix, deformed, displacement)


def _random_matrix(seed):
    generator = np.random.default_rng(seed)
    turn = Rotation.from_rotvec(generator.uniform(-0.5, 0.5, 3)).as_matrix()
    return (
        turn @ np.diag(generator.uniform(0.7, 1.4, 3)) @ (np.eye(3) + 0.1 * np.triu(generator.normal(size=(3, 3)), 1))
    )


def _scipy(volume, matrix_mm, order, moved_mm=(0, 0, 0)):
    """The same by scipy: voxel o of the result shows voxel M (o - co + d) + ci of the input."""
    scale = np.diag(SPACING)
    matrix = np.linalg.inv(scale) @ matrix_mm @ scale
    outer = np.array(volume.shape)
    starts = (outer - PATCH) // 2
    middle = (np.array(PATCH) - 1) / 2
    offset = starts + middle + matrix @ (np.array(moved_mm) / SPACING - middle)
    return ndimage.affine_transform(volume, matrix, offset, output_shape=PATCH, order=order, mode="grid-constant")


@pytest.mark.parametrize("size", [(13, 21, 28), PATCH])
def test_an_affine_transform_equals_scipys(size):
    batch = _batch(size)
    matrices = [_random_matrix(seed) for seed in range(3)]
    result = RandomSpatial(PATCH, SPACING).apply(batch, _record(matrices))
    for element, matrix in enumerate(matrices):
        for channel in range(2):
            expected = _scipy(batch.image[element, channel].double().numpy(), matrix, 1)
            assert np.allclose(result.image[element, channel].numpy(), expected, atol=2e-4)
        for ours, before in ((result.labels, batch.labels), (result.previous, batch.previous)):
            expected = _scipy(before[element].numpy(), matrix, 0)
            assert (ours[element].numpy() != expected).mean() < 1e-3  # but for points halfway between voxels
            assert set(ours[element].unique().tolist()) <= {0, *before[element].unique().tolist()}


def test_labels_up_to_65535_are_exact():
    result = RandomSpatial(PATCH, SPACING).apply(
        Batch(torch.zeros(1, 1, *PATCH), torch.full((1, *PATCH), 65535, dtype=torch.int32)),
        _record([np.eye(3) * 0.5]),
    )
    assert bool((result.labels == 65535).all())
    assert result.labels.dtype == torch.int32


def test_a_ball_in_millimetres_stays_a_ball():
    patch, spacing = (17, 45, 61), SPACING
    points = np.stack(np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(patch, spacing, strict=True)],
                                  indexing="ij"))  # fmt: skip
    ball = torch.from_numpy(15 - np.sqrt((points**2).sum(axis=0))).float()  # distance to the surface
    inside = ball > 2
    turn = Rotation.from_euler("xyz", (40, -25, 60), degrees=True).as_matrix()
    result = RandomSpatial(patch, spacing).apply(Batch(ball[None, None], inside[None].int()), _record([turn]))
    near = ball > -3
    assert float((result.image[0, 0] - ball)[near].abs().max()) < 0.6  # what linear interpolation over 3 mm costs
    assert float((result.labels[0].bool() != inside).float().sum() / inside.sum()) < 0.15
    stretched = RandomSpatial(patch, (1, 1, 1)).apply(Batch(ball[None, None], inside[None].int()), _record([turn]))
    assert float((stretched.image[0, 0] - ball)[near].abs().max()) > 3


def test_rotations_turn_about_x_then_y_then_z():
    quarter = math.pi / 2
    z, y, x = np.eye(3)
    about = [rotation_matrix(torch.tensor(angles, dtype=torch.float64)).numpy() for angles in
             ((quarter, 0, 0), (0, quarter, 0), (0, 0, quarter))]  # fmt: skip
    assert np.allclose(about[0] @ y, x)
    assert np.allclose(about[0] @ z, z)
    assert np.allclose(about[1] @ z, x)
    assert np.allclose(about[2] @ z, y)
    angles = torch.tensor([0.3, -0.4, 0.5], dtype=torch.float64)
    single = [rotation_matrix(angles * torch.eye(3, dtype=torch.float64)[axis]).numpy() for axis in range(3)]
    whole = rotation_matrix(angles).numpy()
    assert np.allclose(whole, single[0] @ single[1] @ single[2])
    assert np.allclose(whole @ whole.T, np.eye(3))
    assert np.isclose(np.linalg.det(whole), 1)


def test_a_scale_above_one_makes_objects_smaller():
    labels = torch.zeros(1, 20, 20, 20, dtype=torch.int32)
    labels[:, 5:15, 5:15, 5:15] = 1
    transform = RandomSpatial((20, 20, 20), (1, 1, 1))
    small, large = (
        transform.apply(Batch(labels[:, None].float(), labels), _record([np.eye(3) * factor])).labels.sum()
        for factor in (1.25, 0.75)
    )
    assert small < labels.sum() < large


def test_elements_that_are_not_drawn_are_cropped_and_the_others_do_not_depend_on_their_neighbours():
    batch, transform = _batch(elements=4), RandomSpatial(PATCH, SPACING, EVERYTHING)
    drawn = transform.sample(4, _generator(5))
    which = torch.tensor([True, False, True, False])
    record = dataclasses.replace(drawn, moved=drawn.moved & which, deformed=drawn.deformed & which)
    whole = transform.apply(batch, record)
    for i in range(4):
        one = Batch(batch.image[i : i + 1], batch.labels[i : i + 1], batch.previous[i : i + 1])
        parts = [getattr(record, f.name)[i : i + 1] for f in dataclasses.fields(record)]
        alone = transform.apply(one, SpatialRecord(*parts))
        assert torch.equal(alone.image[0], whole.image[i])
        assert torch.equal(alone.labels[0], whole.labels[i])
        assert torch.equal(alone.previous[0], whole.previous[i])
        centre = (slice(2, 11), slice(2, 18), slice(4, 24))
        assert torch.equal(whole.labels[i], batch.labels[i][centre]) is not bool(which[i])


def test_the_identity_gives_the_crop_also_when_it_is_not_in_the_middle():
    batch = _batch((12, 21, 25))  # 3, 5 and 5 voxels more than the patch
    transform = RandomSpatial(PATCH, SPACING)
    sampled = transform.apply(batch, _record([np.eye(3)] * 3))
    nobody = torch.zeros(3, dtype=torch.bool)
    cropped = transform.apply(batch, dataclasses.replace(_record([np.eye(3)] * 3), moved=nobody))
    assert torch.allclose(sampled.image, cropped.image, atol=1e-4)
    assert torch.equal(sampled.labels, cropped.labels)
    assert torch.equal(cropped.image, batch.image[..., 1:10, 2:18, 2:22])
    assert torch.equal(cropped.previous, batch.previous[..., 1:10, 2:18, 2:22])


def test_probability_zero_is_the_identity():
    batch = _batch(PATCH)
    transform = RandomSpatial(PATCH, SPACING, SpatialSettings(p_rotation=0, p_scale=0))
    assert augment(batch, [transform], _generator()) is batch
    assert transform.read_size == PATCH


def test_a_patch_smaller_than_the_result_is_an_error():
    transform = RandomSpatial(PATCH, SPACING)
    with pytest.raises(ValueError, match=r"\(9, 16, 19\) voxels is smaller than the result, \(9, 16, 20\)"):
        transform.apply(_batch((9, 16, 19)), transform.sample(3, _generator()))


def test_elastic_deformation_of_zero_is_the_identity_and_of_one_value_a_shift():
    batch, transform = _batch(PATCH), RandomSpatial(PATCH, SPACING, EVERYTHING)
    nodes = transform.sample(1, _generator()).displacement_mm.shape[2:]
    still = transform.apply(batch, _record([np.eye(3)] * 3, displacement=torch.zeros(3, 3, *nodes)))
    assert torch.allclose(still.image, batch.image, atol=1e-5)
    assert torch.equal(still.labels, batch.labels)
    shift = torch.tensor([3.0, 2.0, -1.4]).view(1, 3, 1, 1, 1).expand(3, 3, *nodes)  # 1, 2 and -2 voxels
    moved = transform.apply(batch, _record([np.eye(3)] * 3, displacement=shift))
    assert torch.equal(moved.labels[:, :-1, :-2, 2:], batch.labels[:, 1:, 2:, :-2])
    assert int(moved.labels[:, -1].sum() + moved.labels[:, :, :, :2].sum()) == 0  # background outside


def test_a_deformation_comes_before_the_matrix():
    batch, shift = _batch(elements=1), (2.5, -1.2, 1.0)
    nodes = torch.tensor(shift).view(1, 3, 1, 1, 1).expand(1, 3, 4, 5, 6)
    matrix = _random_matrix(4)
    result = RandomSpatial(PATCH, SPACING).apply(batch, _record([matrix], displacement=nodes))
    expected = _scipy(batch.image[0, 1].double().numpy(), matrix, 1, shift)
    assert np.allclose(result.image[0, 1].numpy(), expected, atol=2e-4)


def test_an_elastic_grid_is_a_cubic_b_spline():
    transform = RandomSpatial(PATCH, SPACING, SpatialSettings(elastic_spacing_mm=12))
    nodes = transform.sample(1, _generator()).displacement_mm.shape[2:]
    assert nodes == (6, 5, 5)  # 27, 16 and 14 mm, and what a spline needs at both ends
    nodes = torch.from_numpy(np.random.default_rng(0).normal(size=(3, *nodes)))
    grid = transform._grid(
        _record([np.eye(3)], displacement=nodes[None].float()), 0, PATCH, (0, 0, 0), torch.zeros(1, dtype=torch.float64)
    )

    def spline(values, size, spacing):
        """Along the first axis, by scipy; nodes are 12 mm apart."""
        knots = 12.0 * np.arange(-3, len(values) + 1)
        return BSpline(knots, values, 3)((np.arange(size) + 0.5) * spacing)

    for axis in range(3):
        dense = nodes[axis].float().double().numpy()
        for size, spacing in zip(PATCH, SPACING, strict=True):  # each pass moves the axis that it treats to the back
            dense = np.moveaxis(spline(dense, size, spacing), 0, -1)
        position = (grid[0, ..., 2 - axis].numpy() + 1) / 2 * PATCH[axis] * SPACING[axis]
        steps = (np.arange(PATCH[axis]) + 0.5) * SPACING[axis]
        assert np.allclose(position, dense + np.expand_dims(steps, [a for a in range(3) if a != axis]), atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_space_never_folds(seed):
    patch, spacing = (12, 24, 24), (2.0, 1.0, 1.0)
    strongest = dataclasses.replace(EVERYTHING, elastic_mm=(6.0, 6.0), elastic_spacing_mm=15)  # 24 mm: 1.6 spans
    transform = RandomSpatial(patch, spacing, strongest)
    record = transform.sample(1, _generator(seed))
    record = dataclasses.replace(record, displacement_mm=6.0 * record.displacement_mm.sign())  # the worst there is
    grid = transform._grid(record, 0, patch, (0, 0, 0), torch.zeros(1, dtype=torch.float64))[0].flip(-1).numpy()
    gradient = np.stack([np.stack(np.gradient(grid[..., a]), axis=-1) for a in range(3)], axis=-2)
    assert np.linalg.det(gradient).min() > 0


def test_displacements_that_would_fold_space_are_refused():
    with pytest.raises(ConfigError, match=r"elastic_mm must lie in \[0, 0.4 x elastic_spacing_mm\]"):
        SpatialSettings(elastic_mm=(0, 5), elastic_spacing_mm=12)
    with pytest.raises(ConfigError, match="scale must be positive"):
        SpatialSettings(scale=(1.2, 0.8))
    with pytest.raises(ConfigError, match="axes must be"):
        SpatialSettings(axes=(2, 1))


def test_draws_have_the_stated_rates_and_ranges():
    transform = RandomSpatial(PATCH, SPACING, SpatialSettings())  # as in the set strong
    record = transform.sample(4000, _generator())
    assert 0.33 < record.moved.float().mean() < 0.39  # 1 - 0.8^2
    assert not bool(record.deformed.any())
    matrix = record.matrix[record.moved]
    scale = torch.linalg.det(matrix) ** (1 / 3)
    assert 0.7 <= scale.min() < 0.72
    assert 1.38 < scale.max() <= 1.4
    turn = matrix / scale[:, None, None]
    assert torch.allclose(turn @ turn.mT, torch.eye(3, dtype=torch.float64).expand_as(turn), atol=1e-6)  # one scale
    lone = RandomSpatial(PATCH, SPACING, SpatialSettings((20, 0, 0), p_scale=0)).sample(2000, _generator()).matrix
    angle = torch.atan2(lone[:, 2, 1], lone[:, 1, 1]).rad2deg()
    assert 19.5 < angle.abs().max() <= 20.0001
    each = RandomSpatial(PATCH, SPACING, SpatialSettings(p_rotation=0, p_scale=1, p_isotropic=0)).sample(
        9, _generator()
    )
    assert torch.equal(each.matrix, torch.diag_embed(each.matrix.diagonal(dim1=1, dim2=2)))
    assert not torch.allclose(each.matrix[:, 0, 0], each.matrix[:, 1, 1])


def test_seeds_reproduce():
    batch, transform = _batch(), RandomSpatial(PATCH, SPACING, EVERYTHING)
    one, two, other = (augment(batch, [transform], _generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.image, two.image)
    assert torch.equal(one.labels, two.labels)
    assert not torch.equal(one.image, other.image)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_in_a_plane_nothing_crosses_slices(axis):
    axes = tuple(a for a in range(3) if a != axis)
    size = [24, 24, 24]
    size[axis] = 5
    labels = torch.arange(5, dtype=torch.int32).view([5 if a == axis else 1 for a in range(3)]).expand(2, *size) + 1
    patch = tuple(5 if a == axis else 12 for a in range(3))
    transform = RandomSpatial(patch, SPACING, dataclasses.replace(EVERYTHING, axes=axes))
    result = augment(Batch(labels[:, None].float(), labels), [transform], _generator())
    cropped = labels[(slice(None), *[slice(0, n) for n in patch])]
    kept = result.labels > 0
    assert kept.float().mean() > 0.8
    assert torch.equal(result.labels[kept], cropped[kept])
    record = transform.sample(3, _generator())
    assert torch.equal(record.matrix[:, axis], torch.eye(3, dtype=torch.float64)[axis].expand(3, 3))
    assert not bool(record.displacement_mm[:, axis].any())


def test_a_slice_is_turned_in_its_plane():
    batch = _batch((1, 24, 24))
    transform = RandomSpatial((1, 16, 16), SPACING, dataclasses.replace(EVERYTHING, axes=(1, 2)))
    result = augment(batch, [transform], _generator())
    assert result.image.shape == (3, 2, 1, 16, 16)
    assert not torch.equal(result.labels, batch.labels[..., 4:20, 4:20])
    assert bool((result.labels > 0).float().mean() > 0.8)


def test_axes_and_angles_follow_nnunet():
    def rule(patch, spacing=(1, 1, 1), **more):
        return moving_axes(AugmentationSetup(patch, spacing, **more))

    assert rule((96, 96, 96)) == ((0, 1, 2), 30.0)
    assert rule((32, 96, 96)) == ((0, 1, 2), 30.0)  # not more than three times
    assert rule((28, 96, 96)) == ((1, 2), 180.0)
    assert rule((96, 28, 96)) == ((0, 2), 180.0)  # whichever axis is the flat one
    assert rule((16, 16, 64), (3, 1, 1)) == ((1, 2), 180.0)  # of two flat ones the one with the coarser voxels
    assert rule((1, 64, 96)) == ((1, 2), 180.0)
    assert rule((64, 1, 97)) == ((0, 2), 15.0)
    assert rule((1, 3, 2)) == ((1, 2), 180.0)
    swap = torch.arange(3)
    assert rule((28, 96, 96), swap=swap, left_right_axis=2) == ((1, 2), 30.0)
    assert rule((28, 96, 96), swap=swap, left_right_axis=0) == ((1, 2), 180.0)
    assert rule((28, 96, 96), swap=swap) == ((1, 2), 30.0)


def test_more_is_read_than_the_patch_as_nnunet_does():
    def size(name, patch, spacing=(1, 1, 1)):
        return read_size(make_transforms(name, AugmentationSetup(patch, spacing)), patch)

    # (cos 30 + sin 30) / 0.85 of a cube's edge
    assert size("strong", (96, 96, 96)) == size("mri", (96, 96, 96)) == (154, 154, 154)
    assert size("strong", (128, 128, 128)) == (205, 205, 205)
    assert size("strong", (28, 96, 96)) == (28, 112, 112)  # 96 / 0.85 in the plane
    assert size("strong", (1, 100, 64)) == (1, 133, 103)  # cos 15, sin 15
    # 60 mm x 40 mm x 40 mm: each edge against the longest other one
    assert size("strong", (20, 40, 40), (3, 1, 1)) == (28, 76, 76)
    for name in ("ukbob", "none"):
        assert size(name, (96, 96, 96)) == (96, 96, 96)
