"""Label maps of a first stage brought to the second's grid: the same voxels as nnU-Net's, to the last tie."""

import numpy as np
import pytest
from nnunet_models import resample

from ukbob_seg.nnunet.resampling import ResamplingRule, resample_segmentation

RATIOS = (0.5, 0.75, 0.8, 1.0, 1.1, 1.25, 4 / 3, 1.5, 2.0)  # at which many shares are equal


def maps(count=24):
    """Label maps in blocks and of noise, with -1 outside, and shapes to bring them to."""
    generator = np.random.default_rng(4)
    for number in range(count):
        shape = generator.integers(4, 24, 3)
        blocks = np.kron(generator.integers(-1, 4, (6, 6, 6)), np.ones((4, 4, 4), dtype=int))
        noise = generator.integers(-1, 3, tuple(shape))
        labels = (noise if number % 2 else blocks[tuple(map(slice, shape))]).astype(np.int16)
        z, y, x = np.maximum(1, (shape * generator.choice(RATIOS, 3)).round()).astype(int)
        yield labels, (int(z), int(y), int(x))


@pytest.mark.parametrize("axis", [None, 0, 2])
def test_the_label_with_the_largest_share(axis):
    spacing = [5.0 if k == axis else 1.0 for k in range(3)]
    options = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
    rule = ResamplingRule(order=1, order_z=0, separate=None)
    assert rule.coarse_axis(tuple(spacing), (1.0, 1.0, 1.0)) == axis
    changed = 0
    for labels, shape in maps():
        expected = resample(labels[None], shape, spacing, (1.0, 1.0, 1.0), options)[0]
        found = resample_segmentation(labels, shape, rule, axis)
        assert found.dtype == labels.dtype
        assert np.array_equal(found, expected)
        changed += found.shape != labels.shape
    assert changed > 20


def test_a_map_of_one_label_stays_one():
    found = resample_segmentation(np.full((4, 5, 6), 3, dtype=np.uint8), (8, 4, 6), ResamplingRule(order=1), None)
    assert found.shape == (8, 4, 6)
    assert (found == 3).all()
