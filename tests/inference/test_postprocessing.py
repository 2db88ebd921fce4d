"""Largest components against scipy, and what a model folder says."""

import json

import numpy as np
import pytest
from scipy import ndimage

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import CheckpointError
from ukbob_seg.inference.postprocessing import Postprocessing, keep_largest

SCHEME = LabelScheme.from_json({"background": 0, "liver": 3, "spleen": 7, "aorta": 300}, None)


def _by_scipy(labels, values):
    cleaned = labels.copy()
    for value in values:
        parts, count = ndimage.label(labels == value, np.ones((3, 3, 3)))
        if count > 1:
            sizes = ndimage.sum_labels(np.ones_like(parts), parts, range(1, count + 1))
            cleaned[(parts > 0) & (parts != 1 + int(np.argmax(sizes)))] = 0
    return cleaned


@pytest.mark.parametrize("seed", range(6))
def test_the_largest_part_is_scipys(seed):
    generator = np.random.default_rng(seed)
    labels = generator.choice([0, 0, 0, 0, 0, 3, 7, 300], (9, 11, 13)).astype(np.uint16)
    before = labels.copy()
    for values in ([3], [7, 300], [3, 7, 300], [5], []):
        assert np.array_equal(keep_largest(labels, values), _by_scipy(labels, values))
    assert np.array_equal(labels, before)


def test_touching_corners_are_one_part_and_the_first_of_equals_stays():
    labels = np.zeros((3, 3, 9), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = 3  # by a corner
    labels[0, 0, 4:6] = labels[2, 2, 7:9] = 3
    kept = keep_largest(labels, [3])
    assert np.argwhere(kept).tolist() == [[0, 0, 0], [1, 1, 1]]


def test_a_model_folder_says_which(tmp_path):
    assert Postprocessing.of_model(tmp_path, SCHEME) == Postprocessing()
    path = tmp_path / "postprocessing.json"
    path.write_text(json.dumps({"largest_component": ["aorta"], "folds": ["0"]}))
    found = Postprocessing.of_model(tmp_path, SCHEME)
    labels = np.zeros((4, 4, 9), np.uint16)
    labels[0, 0, :3] = labels[3, 3, 8] = 300
    labels[1, 1, 0] = labels[3, 1, 8] = 3
    cleaned = found.apply(labels, SCHEME)
    assert (cleaned == 300).sum() == 3
    assert (cleaned == 3).sum() == 2  # no other class
    assert Postprocessing().apply(labels, SCHEME) is labels
    for wrong in (
        {"largest_component": ["kidney"]},
        {"largest_component": ["background"]},
        {"largest_component": "aorta"},
        [],
        {},
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(
            CheckpointError, match=r"of class names \(liver, spleen, aorta\); make it with ukbob_find_p"
        ):
            Postprocessing.of_model(tmp_path, SCHEME)
    regions = LabelScheme.from_json({"background": 0, "whole": [1, 2], "core": [2]}, [1, 2])
    path.write_text(json.dumps({"largest_component": ["core"]}))
    with pytest.raises(CheckpointError, match=r"class names \(none: regions\)"):
        Postprocessing.of_model(tmp_path, regions)
