"""Volumes and intensities of predicted classes, against a loop over voxels and numbers made by hand."""

import json

import numpy as np
import pytest

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.inference import statistics
from ukbob_seg.inference.export import WrittenClasses
from ukbob_seg.inference.statistics import case_statistics

CLASSES = WrittenClasses.of(LabelScheme.from_json({"background": 0, "spleen": 300, "liver": 7, "none": 9}, None))
REGIONS = WrittenClasses.of(
    LabelScheme.from_json({"background": 0, "whole": [1, 2, 5], "core": [2, 5], "active": [5]}, [1, 2, 5])
)
SPACING = (3.0, 1.0, 0.7)


def _by_loop(image, labels, members):
    """Voxels, means and standard deviations, one voxel after the other."""
    inside = [place for place in np.ndindex(labels.shape) if labels[place] in members]
    if not inside:
        return 0, [None] * len(image), [None] * len(image)
    values = [[float(channel[place]) for place in inside] for channel in image]
    means = [sum(row) / len(row) for row in values]
    sds = [(sum((v - m) ** 2 for v in row) / len(row)) ** 0.5 for row, m in zip(values, means, strict=True)]
    return len(inside), means, sds


@pytest.mark.parametrize("at_once", [1, 50, 2**22])
@pytest.mark.parametrize("written", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_they_are_those_of_a_loop_over_voxels(monkeypatch, rng, written, at_once):
    monkeypatch.setattr(statistics, "_VOXELS_AT_ONCE", at_once)
    shape = (7, 5, 6)
    labels = rng.choice([0, *[value for value in written.values if value != 9]], shape).astype(np.uint16)
    labels[2:4] = 0  # planes without foreground
    image = rng.normal(1000, 3, (2, *shape)).astype(np.float32)
    found = case_statistics(image, labels, Geometry(shape, SPACING), written, ("fat", "water"))
    assert found["spacing_mm"] == [3.0, 1.0, 0.7]
    assert found["channel_names"] == ["fat", "water"]
    assert list(found["classes"]) == list(written.names)
    for name, members in zip(written.names, written.members, strict=True):
        voxels, means, sds = _by_loop(image, labels, members)
        entry = found["classes"][name]
        assert entry["voxels"] == voxels
        assert entry["volume_ml"] == pytest.approx(voxels * 3 * 1 * 0.7 / 1000, rel=1e-12)
        assert entry["mean"] == (means if not voxels else pytest.approx(means, rel=1e-12))
        assert entry["sd"] == (sds if not voxels else pytest.approx(sds, rel=1e-9))


def test_numbers_made_by_hand():
    labels = np.zeros((2, 2, 2), np.uint16)
    labels[0, 0] = 300
    labels[1, 1, 1] = 7
    image = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2) * 10
    classes = case_statistics(image, labels, Geometry((2, 2, 2), SPACING), CLASSES, ("CT",))["classes"]
    assert classes["spleen"] == {"voxels": 2, "volume_ml": pytest.approx(0.0042), "mean": [5.0], "sd": [5.0]}
    assert classes["liver"] == {"voxels": 1, "volume_ml": pytest.approx(0.0021), "mean": [70.0], "sd": [0.0]}
    assert classes["none"] == {"voxels": 0, "volume_ml": 0.0, "mean": [None], "sd": [None]}


def test_nothing_predicted_gives_no_nan():
    labels = np.zeros((2, 3, 4), np.uint8)
    found = case_statistics(np.ones((2, 2, 3, 4), np.float32), labels, Geometry((2, 3, 4), SPACING), REGIONS, "ab")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all(entry["voxels"] == 0 and entry["mean"] == [None, None] for entry in found["classes"].values())


def test_large_means_keep_small_deviations():
    """Sums of squares would lose all digits here."""
    labels = np.full((1, 2, 500), 7, np.uint16)
    image = np.where(np.arange(1000) % 2, 16777200.0, 16777202.0).astype(np.float32).reshape(1, 1, 2, 500)
    entry = case_statistics(image, labels, Geometry((1, 2, 500), SPACING), CLASSES, ("CT",))["classes"]["liver"]
    assert entry["mean"] == [16777201.0]
    assert entry["sd"] == pytest.approx([1.0], rel=1e-12)
