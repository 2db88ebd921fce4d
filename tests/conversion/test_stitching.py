"""Grids, gains, blends and exchanged channels, against closed forms."""

import itertools

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

from ukbob_seg.conversion.dixon import FAT, INPHASE, WATER
from ukbob_seg.conversion.stitching import (
    Block,
    Gain,
    blend_weights,
    chain_gains,
    common_grid,
    gain_between,
    resample,
    stitch,
)
from ukbob_seg.conversion.swaps import agreement, border_fat, decide_swaps
from ukbob_seg.dataset.image_io import Geometry


def _block(voxels, spacing, origin):
    return Block(voxels.astype(np.float32), Geometry(voxels.shape[1:], spacing, origin))


def test_the_common_grid_covers_all_stations_at_the_finest_spacing():
    grids = [
        Geometry((10, 6, 5), (3.0, 1.0, 0.7), (1.0, 2.0, 50.0)),
        Geometry((9, 5, 6), (4.0, 1.2, 0.7), (1.0, 2.4, 20.0)),
    ]
    grid = common_grid(grids)
    assert grid.spacing_mm == (3.0, 1.0, 0.7)
    assert grid.origin_mm == pytest.approx((1.0, 2.0, 20.0))
    # z: 20 .. 77 mm; y: 2 .. 7.2 mm; x: 1 .. 4.5 mm
    assert grid.shape == (20, 6, 6)
    assert common_grid(grids, (19.0, 1.0, 0.7)).shape == (4, 6, 6)


def test_the_common_grid_keeps_an_oblique_orientation():
    angle = np.deg2rad(10)
    direction = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    low = Geometry((8, 4, 4), (3.0, 1.0, 0.7), (5.0, 6.0, 7.0), tuple(direction.ravel()))
    high = Geometry((8, 4, 4), (3.0, 1.0, 0.7), tuple(direction @ [0, 0, 18.0] + [5, 6, 7]), low.direction)
    grid = common_grid([high, low])
    assert grid.shape == (14, 4, 4)
    assert grid.origin_mm == pytest.approx(low.origin_mm)
    assert grid.direction == low.direction


def test_resampling_is_exact_for_cubics_and_at_samples(rng):
    z, y, x = np.arange(9) * 3.0 + 2, np.arange(8) * 1.0, np.arange(7) * 0.7 - 1
    cubic = 500 + 0.01 * (z[:, None, None] - 9) ** 3 + y[None, :, None] ** 2 + 2 * x[None, None, :]
    want = (np.array([2.0, 7.3, 25.9]), y, np.array([-0.9, 1.234]))
    found = resample(cubic[None].astype(np.float32), (z, y, x), want)[0]
    truth = 500 + 0.01 * (want[0][:, None, None] - 9) ** 3 + y[None, :, None] ** 2 + 2 * want[2][None, None, :]
    assert np.allclose(found, truth, atol=1e-2)
    noise = rng.uniform(0, 1, (1, 9, 8, 7)).astype(np.float32)
    assert np.array_equal(resample(noise, (z, y, x), (z[3:7], y, x[::-1][::-1]))[0], noise[0, 3:7])
    assert (resample(noise, (z, y, x), (np.array([-5.0, 40.0]), y, x)) == 0).all()  # nothing is invented outside


def test_resampling_agrees_with_an_independent_interpolator(rng):
    axes = (np.arange(6) * 3.0, np.arange(7) * 1.0, np.arange(8) * 0.7)
    smooth = np.add.outer(np.add.outer(np.sin(axes[0] / 9), np.cos(axes[1] / 5)), np.sin(axes[2] / 3)) + 5
    want = tuple(rng.uniform(axis[0], axis[-1], 5) for axis in axes)
    oracle = RegularGridInterpolator(axes, smooth, method="cubic")
    points = np.stack(np.meshgrid(*want, indexing="ij"), axis=-1)
    # Wanted points need not be equally spaced; the matrix is per point.
    assert np.allclose(resample(smooth[None].astype(np.float32), axes, want)[0], oracle(points), atol=1e-3)


def test_blend_weights_add_up_and_fall_smoothly():
    blocks = [_block(np.ones((4, 11, 3, 3)), (2.0, 1, 1), (0, 0, start)) for start in (28.0, 14.0, 0.0)]
    grid = common_grid([block.geometry for block in blocks])
    weights = blend_weights(blocks, grid)
    assert weights.shape == (3, 25)
    assert np.allclose(weights.sum(axis=0), 1)
    assert np.allclose(weights[2, :8], 1)  # alone up to 14 mm
    overlap = weights[2, 7:11]  # 14 .. 20 mm
    assert np.allclose(overlap, 0.5 + 0.5 * np.cos(np.pi * np.arange(4) / 3), atol=1e-5)
    assert np.allclose(weights[2, 11:], 0)
    for weight in weights:
        assert np.abs(np.diff(weight)).max() < 0.51


def test_stations_of_one_body_are_stitched_to_it(rng):
    body = rng.uniform(50, 400, (4, 25, 6, 5)).astype(np.float32)
    blocks = [_block(body[:, a : a + 11], (2.0, 1.0, 0.7), (3.0, 4.0, 5.0 + 2 * a)) for a in (14, 7, 0)]
    grid = common_grid([block.geometry for block in blocks])
    assert np.allclose(stitch(blocks, (1, 1, 1), grid), body, rtol=1e-5)
    louder = [Block(block.voxels * k, block.geometry) for block, k in zip(blocks, (1, 2, 0.5), strict=True)]
    assert np.allclose(stitch(louder, (1, 0.5, 2), grid), body, rtol=1e-5)


def test_stacks_that_run_to_the_feet_are_stitched_too(rng):
    body = rng.uniform(50, 400, (4, 25, 6, 5)).astype(np.float32)
    down = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0)
    blocks = [
        Block(body[:, a : a + 11], Geometry((11, 6, 5), (2.0, 1.0, 0.7), (3.0, 40.0, 90.0 - 2 * a), down))
        for a in (0, 7, 14)
    ]  # head first: the first plane is the highest
    grid = common_grid([block.geometry for block in blocks])
    assert grid == Geometry((25, 6, 5), (2.0, 1.0, 0.7), (3.0, 40.0, 90.0), down)
    assert np.allclose(stitch(blocks, (1, 1, 1), grid), body, rtol=1e-5)


def test_a_smaller_field_of_view_leaves_voxels_to_its_neighbour(rng):
    body = rng.uniform(50, 400, (4, 18, 6, 6)).astype(np.float32)
    upper = _block(body[:, 7:], (2.0, 1.0, 1.0), (0, 0, 14.0))
    lower = _block(body[:, :11, 1:-1, 1:-1], (2.0, 1.0, 1.0), (1.0, 1.0, 0))
    grid = common_grid([upper.geometry, lower.geometry])
    whole = stitch([upper, lower], (1, 1), grid)
    assert np.allclose(whole[:, 7:], body[:, 7:], rtol=1e-5)
    assert (whole[:, :7, 0] == 0).all()
    assert np.allclose(whole[:, :7, 1:-1, 1:-1], body[:, :7, 1:-1, 1:-1], rtol=1e-5)


def test_the_gain_is_robust_to_motion_and_noise(rng):
    body = np.zeros((4, 6, 30, 30))
    body[:, :, 4:26, 4:26] = rng.uniform(200, 600, (4, 6, 22, 22))
    above = body + rng.normal(0, 15, body.shape)
    below = body / 1.7 + rng.normal(0, 15, body.shape)
    below[:, :, 8:16, 8:16] *= 3  # an organ that moved: 13 % of the body
    step = gain_between(np.abs(above), np.abs(below))
    assert np.exp(step.log_ratio) == pytest.approx(1.7, rel=0.05)
    assert step.voxels > 1000
    empty = gain_between(np.zeros((4, 6, 30, 30)), below)
    assert (empty.log_ratio, empty.voxels) == (0.0, 0)


def test_gains_chain_to_a_geometric_mean_of_one():
    truth = np.array([1.0, 1.5, 0.7, 2.0])
    steps = [Gain(float(np.log(b / a)), 0.0, 999) for a, b in itertools.pairwise(1 / truth[::1])]
    # The step is log(upper / lower): an upper station twice as loud asks for a lower gain of 2.
    gains = chain_gains([Gain(-step.log_ratio, 0, 1) for step in steps])
    assert np.prod(gains) == pytest.approx(1)
    assert np.allclose(gains * (1 / truth), (gains * (1 / truth))[0])


def _torso():
    """A disc with a ring of fat and a core of water; 20 slices."""
    y, x = np.mgrid[-40:41, -40:41] * 2.0
    radius = np.hypot(x, y)
    fat = np.where(radius < 70, np.where(radius > 58, 100.0, 12.0), 0.0)
    water = np.where(radius < 70, np.where(radius > 58, 9.0, 80.0), 0.0)
    voxels = np.stack([fat, water, fat + water, np.abs(water - fat)])[:, None]
    return np.repeat(voxels, 6, axis=1).astype(np.float32)


def test_border_fat_and_agreement_turn_their_sign_with_an_exchange():
    right = _torso()
    swapped = right.copy()
    swapped[[FAT, WATER]] = swapped[[WATER, FAT]]
    value = border_fat(right, (4.0, 2.0, 2.0))
    assert value == pytest.approx(100 / 109 - 12 / 92, abs=1e-5)
    assert border_fat(swapped, (4.0, 2.0, 2.0)) == pytest.approx(-value, abs=1e-5)
    assert agreement(right, right) == 1
    assert agreement(right, swapped) == -1
    noisy = right * np.float32(0.9)
    noisy[INPHASE] = right[INPHASE]
    assert agreement(noisy, swapped) == pytest.approx(-agreement(noisy, right))
    assert np.isnan(border_fat(np.zeros_like(right), (4.0, 2.0, 2.0)))
    assert np.isnan(agreement(np.zeros_like(right), right))


def test_the_decision_is_the_best_of_all_assignments(rng):
    for count in (1, 2, 5):
        for _ in range(20):
            border, pair = rng.uniform(-1, 1, count), rng.uniform(-1, 1, count - 1)
            scores = {
                signs: np.dot(signs, border) + sum(a * b * w for a, b, w in zip(signs, signs[1:], pair, strict=False))
                for signs in itertools.product((1, -1), repeat=count)
            }
            best = max(scores, key=scores.get)
            found = decide_swaps(border, pair)
            assert tuple(-1 if verdict.swapped else 1 for verdict in found) == best
            for k, verdict in enumerate(found):
                otherwise = max(value for signs, value in scores.items() if signs[k] != best[k])
                assert verdict.confidence == pytest.approx((scores[best] - otherwise) / 2)


def test_neighbours_decide_where_the_skin_says_nothing():
    verdicts = decide_swaps([0.8, float("nan"), 0.1, 0.7], [0.9, -0.8, -0.9])
    assert [verdict.swapped for verdict in verdicts] == [False, False, True, False]
    nothing = decide_swaps([float("nan")] * 3, [float("nan")] * 2)
    assert [verdict.swapped for verdict in nothing] == [False] * 3
    assert {verdict.confidence for verdict in nothing} == {0}
