"""Left and right: the table follows the regions, and where it cannot, nothing is flipped or turned."""

import logging

import numpy as np
import pytest
import torch

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.training.augmentation import AugmentationSetup, make_transforms
from ukbob_seg.training.augmentation.flips import RandomFlip, RandomRotate90
from ukbob_seg.training.left_right import label_swap, output_swap, safe_mirror_axes

SIDED = {"kidney_left": 3, "liver": 5, "kidney_right": 9}


def _scheme(labels):
    regions = any(isinstance(value, list) for value in labels.values())
    return LabelScheme.from_json({"background": 0, **labels}, list(range(1, len(labels) + 1)) if regions else None)


def test_exclusive_labels_go_to_those_of_the_mirrored_name():
    scheme = _scheme(SIDED)
    table = label_swap(scheme)
    assert table[[0, 1, 2, 3, 255]].tolist() == [0, 3, 2, 1, 255]
    assert output_swap(scheme) == (0, 3, 2, 1)
    assert np.array_equal(table[table], np.arange(256))
    assert label_swap(_scheme({"liver": 5})) is None
    assert output_swap(_scheme({"liver": 5})) is None


REGIONS = {
    "pairs": {"left lung": [1, 2], "right lung": [3, 4], "liver": [5]},
    "another order": {"left lung": [1, 2], "right lung": [4, 3], "lungs": [1, 2, 3, 4]},
    # By position 2 would go to 4 in the first pair and to 3 in the second.
    "overlapping": {"left lung": [1, 2], "right lung": [3, 4], "left lobe": [2], "right lobe": [3]},
    "single": {"left kidney": [1], "right kidney": [2], "kidneys": [1, 2]},
}
UNEQUAL = {
    "unequal": {"left kidney": [1, 2], "right kidney": [3], "liver": [4]},
    "one side divided": {"left lung": [1, 2], "right lung": [3, 4], "lingula": [2]},
}


@pytest.mark.parametrize("name", REGIONS)
def test_a_flip_moves_every_region_to_its_partner(name):
    """The regions of exchanged labels are the exchanged regions, and doing it twice changes nothing."""
    scheme = _scheme(REGIONS[name])
    table = label_swap(scheme)[: len(scheme.values) + 1]
    assert table[table].tolist() == list(range(len(table)))
    assert np.array_equal(scheme.region_table[:, table], scheme.region_table[list(output_swap(scheme))])
    assert safe_mirror_axes((0, 1, 2), scheme, 2) == (0, 1, 2)


def test_a_name_with_two_partners_and_many_labels():
    scheme = _scheme({"left kidney": 1, "left_kidney": 2, "right kidney": 3})
    assert label_swap(scheme).tolist() == list(range(256))
    assert output_swap(scheme) == (0, 1, 2, 3)
    assert safe_mirror_axes((0, 1, 2), scheme, 0) == (1, 2)
    many = {f"{side} {number}": number + 20_000 * (side == "right") for number in range(1, 20_001)
            for side in ("left", "right")}  # fmt: skip
    table = label_swap(_scheme(many))  # a table of labels times labels would take minutes
    assert table[[1, 20_000, 20_001, 0]].tolist() == [20_001, 40_000, 1, 0]


@pytest.mark.parametrize("name", UNEQUAL)
def test_sides_that_cannot_be_exchanged_are_not_flipped(name, caplog):
    scheme = _scheme(UNEQUAL[name])
    assert label_swap(scheme).tolist() == list(range(256))
    with caplog.at_level(logging.WARNING, "ukbob_seg"):
        assert safe_mirror_axes((0, 1, 2), scheme, 2) == (0, 1)
    (record,) = caplog.records
    assert "such as 'left" in record.getMessage()
    assert "some label has no partner on the other side" in record.getMessage()
    assert safe_mirror_axes((0, 1), scheme, 2) == (0, 1)
    assert len(caplog.records) == 1  # nothing was left out, nothing is said
    assert safe_mirror_axes((), scheme, None) == ()


def test_without_a_left_right_axis_nothing_is_flipped(caplog):
    with caplog.at_level(logging.WARNING, "ukbob_seg"):
        assert safe_mirror_axes((0, 1, 2), _scheme(SIDED), None) == ()
    assert "orientations differ" in caplog.text
    assert safe_mirror_axes((0, 2), _scheme({"liver": 1}), None) == (0, 2)


@pytest.mark.parametrize("labels", [SIDED, UNEQUAL["unequal"]])
@pytest.mark.parametrize(("axis", "planes"), [(2, ((0, 1),)), (0, ((1, 2),)), (None, ())])
def test_quarter_turns_avoid_the_left_right_axis(labels, axis, planes):
    """All of them where the axis is not known: half a turn would exchange the sides and not their labels."""
    scheme = _scheme(labels)
    mirror_axes = safe_mirror_axes((0, 1, 2), scheme, axis)
    setup = AugmentationSetup((8, 8, 8), (1.0, 1.0, 1.0), mirror_axes, axis, label_swap(scheme))
    transforms = make_transforms("ukbob", setup)
    (turn,) = (t for t in transforms if isinstance(t, RandomRotate90))
    (flip,) = (t for t in transforms if isinstance(t, RandomFlip))
    assert turn.planes == planes
    assert flip.axes == mirror_axes
    if axis is None:
        assert not bool(flip.sample(50, torch.Generator()).flipped.any())
