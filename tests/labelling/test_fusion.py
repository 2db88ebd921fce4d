"""Merging label maps of several channels, on maps made by hand."""

import numpy as np
import pytest

from ukbob_seg.benchmark.totalvibe import TOTALVIBE_LABELS
from ukbob_seg.labelling.fusion import clean, drop_small, fuse
from ukbob_seg.labelling.priorities import GROUPS, FusionGroup

HAND = (
    FusionGroup("tubes", several=("vessel",), least_mm3=4.0),
    FusionGroup("solid", single=("liver",)),
    FusionGroup("spreading", single=("muscle",), channels=("water",)),
    FusionGroup("rest", several=("fat",)),
)
VALUES = {"liver": 1, "vessel": 2, "muscle": 3, "fat": 4}


def row(*values: int) -> np.ndarray:
    """A map of one row of voxels."""
    return np.array(values, dtype=np.uint8)[None, None]


def merged(voxel_mm3: float = 10.0, **maps: np.ndarray) -> list[int]:
    return fuse(maps, VALUES, voxel_mm3, HAND)[0, 0].tolist()


def test_the_first_group_wins_whatever_the_channel():
    assert merged(water=row(1, 1, 1), inphase=row(1, 2, 2)) == [1, 2, 2]
    assert merged(inphase=row(1, 2, 2), water=row(1, 1, 1)) == [1, 2, 2]


def test_within_a_group_the_first_channel_wins_and_gaps_are_filled():
    groups = (FusionGroup("all", several=("liver", "fat")),)
    maps = {"a": row(1, 1, 0, 0), "b": row(4, 4, 4, 0)}
    assert fuse(maps, VALUES, 1.0, groups)[0, 0].tolist() == [1, 1, 4, 0]
    assert fuse(dict(reversed(maps.items())), VALUES, 1.0, groups)[0, 0].tolist() == [4, 4, 4, 0]


def test_some_groups_are_taken_from_one_channel_alone():
    assert merged(inphase=row(3, 3, 0), water=row(0, 3, 3)) == [0, 3, 3]
    assert merged(inphase=row(3, 3, 0), outphase=row(0, 0, 3)) == [3, 3, 3]  # no water image at all


def test_of_single_structures_each_channel_contributes_its_largest_piece():
    assert merged(water=row(1, 1, 0, 1, 0), inphase=row(0, 0, 0, 0, 0)) == [1, 1, 0, 0, 0]
    # A stray piece gives way to what lies below it.
    assert merged(water=row(1, 1, 0, 1, 0), inphase=row(0, 0, 0, 4, 4)) == [1, 1, 0, 4, 4]


def test_small_pieces_of_branching_structures_are_left_out_by_volume():
    pieces = row(2, 2, 0, 2, 0, 0)
    assert merged(water=pieces, voxel_mm3=2.0) == [2, 2, 0, 0, 0, 0]
    assert merged(water=pieces, voxel_mm3=4.0) == [2, 2, 0, 2, 0, 0]
    assert merged(water=pieces, voxel_mm3=1.0) == [0] * 6


def test_pieces_hang_together_over_corners():
    labels = np.zeros((2, 2, 2), dtype=np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = 5
    assert np.array_equal(drop_small(labels, {5: 2}), labels)
    assert drop_small(labels, {5: 3}).max() == 0
    assert np.array_equal(drop_small(labels, {4: 9}), labels)


def test_the_maps_themselves_stay_as_they_are():
    labels = row(1, 0, 1, 1)
    before = labels.copy()
    assert clean(labels, VALUES, 1.0, HAND)[0, 0].tolist() == [0, 0, 1, 1]
    assert np.array_equal(labels, before)


def test_the_table_has_every_structure_once():
    names = [name for group in GROUPS for name in (*group.single, *group.several)]
    assert sorted(names) == sorted(TOTALVIBE_LABELS)
    assert [group.name for group in GROUPS] == [
        "vessels", "lung", "nervous system", "prone to over-segmentation", "bone", "digestion", "muscle", "organs",
        "rest",
    ]  # fmt: skip
    assert [group.name for group in GROUPS if group.channels] == ["prone to over-segmentation", "muscle"]


def test_structures_of_the_table_in_their_order():
    value = TOTALVIBE_LABELS
    aorta, liver, fat = value["aorta"], value["liver"], value["inner_fat"]
    water = np.full((6, 6, 6), fat, dtype=np.uint8)
    water[1:5, 1:5, 1:5] = liver
    inphase = np.zeros_like(water)
    inphase[:, 2:5, 2:5] = aorta  # 54 voxels of 60 mm3 are more than enough
    result = fuse({"water": water, "inphase": inphase}, value, 60.0)
    assert np.all(result[:, 2:5, 2:5] == aorta)
    assert result[1, 1, 1] == liver
    assert result[0, 0, 0] == fat
    assert fuse({"water": water, "inphase": inphase}, value, 10.0)[2, 2, 2] == liver  # 540 mm3 of aorta are a stray


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_the_type_is_kept(kind):
    assert fuse({"water": row(1, 0).astype(kind)}, VALUES, 1.0, HAND).dtype == kind
