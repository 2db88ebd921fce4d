"""Planted faults do what their names say, and are recorded truthfully."""

import numpy as np
import pytest

from ukbob_seg.demo.faults import (
    MAX_DICE,
    count_components,
    dice,
    fragments,
    leakage,
    missing_half,
    plant_faults,
    swapped_left_right,
)
from ukbob_seg.errors import ConfigError


@pytest.fixture
def labels():
    """Two ellipsoids, 1 and 2."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (40, 24, 30)), indexing="ij"), axis=-1).astype(float)
    result = np.zeros((40, 24, 30), np.uint8)
    result[(((grid - (20, 12, 8)) / (12, 6, 5)) ** 2).sum(-1) < 1] = 1
    result[(((grid - (20, 12, 22)) / (11, 6, 5)) ** 2).sum(-1) < 1] = 2
    return result


def test_missing_half(labels, rng):
    result = missing_half(labels, 1, rng)
    share = (result == 1).sum() / (labels == 1).sum()
    assert 0.35 < share < 0.65
    assert ((result == 1) <= (labels == 1)).all()
    assert np.array_equal(result == 2, labels == 2)


def test_leakage(labels, rng):
    result = leakage(labels, 1, rng)
    assert (result == 1).sum() >= 1.5 * (labels == 1).sum()
    assert ((labels == 1) <= (result == 1)).all()
    assert count_components(result == 1) == 1


def test_fragments(labels, rng):
    result = fragments(labels, 1, rng)
    assert count_components(labels == 1) == 1
    assert count_components(result == 1) >= 3
    assert (result == 1).sum() < 0.7 * (labels == 1).sum()


def test_swap(labels):
    result = swapped_left_right(labels, 1, 2)
    assert np.array_equal(result == 1, labels == 2)
    assert np.array_equal(result == 2, labels == 1)


def test_dice():
    a = np.array([1, 1, 0], bool)
    assert dice(a, np.array([1, 0, 0], bool)) == pytest.approx(2 / 3)
    assert dice(a & False, a & False) == 1


def test_planting_is_recorded_and_repeatable(labels):
    kinds = set()
    for seed in range(25):
        spoilt, faults = plant_faults(labels, "case", [1, 2], [(1, 2)], np.random.default_rng(seed), 0.7)
        again, same = plant_faults(labels, "case", [1, 2], [(1, 2)], np.random.default_rng(seed), 0.7)
        assert np.array_equal(spoilt, again)
        assert faults == same
        recorded = {fault.label for fault in faults}
        for value in (1, 2):
            found = dice(spoilt == value, labels == value)
            assert (found <= MAX_DICE) == (value in recorded)
        for fault in faults:
            assert fault.dice_to_truth == pytest.approx(dice(spoilt == fault.label, labels == fault.label))
        kinds |= {fault.kind for fault in faults}
    assert kinds - {"overrun"} == {"missing_half", "leakage", "fragments", "swapped_left_right"}


def test_an_organ_that_another_leaked_over_is_recorded(labels):
    labels[labels == 2] = 0
    labels[18:22, 12:14, 13:15] = 3  # small, beside organ 1, and itself never a candidate
    overrun = 0
    for seed in range(40):
        spoilt, faults = plant_faults(labels, "case", [1], [], np.random.default_rng(seed), 1.0)
        wrong = {v for v in (1, 3) if dice(spoilt == v, labels == v) <= MAX_DICE}
        assert {fault.label for fault in faults} == wrong
        kinds = {fault.label: fault.kind for fault in faults}
        if 3 in kinds:
            overrun += 1
            assert kinds[3] == "overrun"
            assert kinds[1] == "leakage"
    assert overrun > 0


def test_an_organ_without_its_partner_is_not_swapped(labels):
    labels[labels == 2] = 0
    for seed in range(25):
        _, faults = plant_faults(labels, "case", [1, 2], [(1, 2)], np.random.default_rng(seed), 1.0)
        assert {fault.label for fault in faults} <= {1}
        assert "swapped_left_right" not in {fault.kind for fault in faults}


def test_nothing_to_plant(labels, rng):
    spoilt, faults = plant_faults(labels, "case", [1, 2, 3], [], rng, 0.0)
    assert faults == []
    assert np.array_equal(spoilt, labels)
    with pytest.raises(ConfigError, match="fraction of faults"):
        plant_faults(labels, "case", [1], [], rng, 1.5)
