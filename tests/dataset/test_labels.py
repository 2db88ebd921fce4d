"""Label schemes: file values, indices, regions, ignore."""

import numpy as np
import pytest

from ukbob_seg.dataset.labels import LabelScheme, left_right_pairs
from ukbob_seg.errors import DatasetError


def test_non_consecutive_values_become_consecutive_indices():
    scheme = LabelScheme.from_json({"background": 0, "c5": 5, "c2": 2, "c9": 300}, None)
    assert scheme.values == (2, 5, 300)
    assert scheme.output_names == ("background", "c2", "c5", "c9")
    indices = scheme.to_indices(np.array([[0, 300], [5, 2]]))
    assert indices.dtype == np.uint8
    assert indices.tolist() == [[0, 3], [2, 1]]
    assert scheme.output_values[indices].tolist() == [[0, 300], [5, 2]]
    assert scheme.output_values.dtype == np.uint16


def test_unknown_values_are_listed_with_their_counts():
    scheme = LabelScheme.from_json({"background": 0, "a": 1}, None)
    with pytest.raises(DatasetError, match=r"case_1: unknown label values 2 \(3 voxels\), 7 \(1 voxels\)"):
        scheme.to_indices(np.array([0, 1, 2, 2, 2, 7]), "case_1")
    with pytest.raises(DatasetError, match=r"-1 \(1 voxels\)"):
        scheme.to_indices(np.array([0, 1, -1], dtype=np.int32))


def test_regions_and_ignore():
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    scheme = LabelScheme.from_json(labels, [1, 2, 3])
    assert scheme.has_regions
    assert scheme.num_outputs == 3
    assert scheme.region_table.tolist() == [
        [False, True, True, True],
        [False, False, True, True],
        [False, False, False, True],
    ]
    indices = scheme.to_indices(np.array([4, 3, 0]))
    assert indices.tolist() == [255, 3, 0]


def test_many_classes_need_sixteen_bits():
    scheme = LabelScheme.from_json({"background": 0, **{f"o{i}": i for i in range(1, 300)}}, None)
    assert scheme.dtype == np.uint16
    assert scheme.ignore_index == 65535
    assert scheme.to_indices(np.array([299])).tolist() == [299]


@pytest.mark.parametrize(
    ("labels", "order", "message"),
    [
        ({"background": 0}, None, "no foreground"),
        ({"background": 1, "a": 2}, None, "background must be 0"),
        ({"background": 0, "a": 1, "b": 1}, None, "share one value"),
        ({"background": 0, "a": "1"}, None, "must be an integer"),
        ({"background": 0, "a": [1, 2]}, None, "regions_class_order"),
        ({"background": 0, "a": [1, 2], "b": [2]}, [1], "1 entries for 2 regions"),
        ({"background": 0, "a": [1, 2]}, ["one"], "whole numbers from 1 to 65535"),
        ({"background": 0, "a": [1, 2]}, 5, "whole numbers"),
        ({"background": 0, "a": [1, 2]}, [None], "whole numbers"),
        ({"background": 0, "a": [1, 2]}, [99999], "whole numbers"),
        ({"background": 0, "a": [1, 2]}, [-3], "whole numbers"),
        ({"background": 0, "a": 3, "ignore": 2}, None, "highest value"),
        ({"background": 0, "a": -1}, None, "1..65534"),
    ],
)
def test_bad_schemes_are_refused(labels, order, message):
    with pytest.raises(DatasetError, match=message):
        LabelScheme.from_json(labels, order)


def test_left_right_pairs():
    names = ["background", "kidney_left", "liver", "kidney_right", "Left Lung", "right lung", "femur-left"]
    assert left_right_pairs(names) == ((1, 3), (4, 5))
    assert left_right_pairs(["liver", "heart"]) == ()
