"""Warnings about scans that lie in their files in another way than their headers say."""

import numpy as np
import pytest

from ukbob_seg.benchmark.totalvibe import TOTALVIBE_LABELS
from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.dataset.orientation import turn_to
from ukbob_seg.labelling.checks import orientation_warnings

SHAPE = (40, 20, 24)
GEOMETRY = Geometry(SHAPE, (3.0, 2.0, 2.5), (10.0, 20.0, -30.0))


def body() -> np.ndarray:
    """Some structures where an axial scan in LPS has them: z up, y to the back, x to the left."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    for name, z, y, x in (
        ("lung_upper_lobe_left", 32, 10, 18), ("lung_upper_lobe_right", 32, 10, 6), ("heart", 30, 7, 13),
        ("kidney_left", 20, 14, 17), ("kidney_right", 20, 14, 7), ("vertebra_body", 20, 16, 12),
        ("intestine", 14, 6, 12), ("urinary_bladder", 6, 7, 12), ("hip_left", 6, 12, 19), ("hip_right", 6, 12, 5),
    ):  # fmt: skip
        labels[z - 2 : z + 2, y - 2 : y + 2, x - 2 : x + 2] = TOTALVIBE_LABELS[name]
    return labels


def test_a_body_as_it_should_be():
    assert orientation_warnings(body(), GEOMETRY, TOTALVIBE_LABELS) == []


@pytest.mark.parametrize("code", ["RAS", "ASL", "PIR"])
def test_the_order_of_axes_in_the_file_does_not_matter(code):
    turn = turn_to(GEOMETRY, code)
    labels, geometry = np.ascontiguousarray(turn.apply(body())), turn.geometry(GEOMETRY)
    assert orientation_warnings(labels, geometry, TOTALVIBE_LABELS) == []


@pytest.mark.parametrize(
    ("axis", "said"), [(0, "below those of the pelvis"), (1, "spine lies before"), (2, "left structures lie right")]
)
def test_a_wrong_header(axis, said):
    warnings = orientation_warnings(np.flip(body(), axis), GEOMETRY, TOTALVIBE_LABELS)
    assert len(warnings) == 1
    assert said in warnings[0]
    assert "the file says LPS" in warnings[0]


def test_too_little_to_say_anything():
    labels = np.zeros(SHAPE, dtype=np.uint8)
    assert orientation_warnings(labels, GEOMETRY, TOTALVIBE_LABELS) == []
    labels[0, 0, :3] = TOTALVIBE_LABELS["hip_left"]  # three voxels on the wrong side
    labels[3, 3, 20:] = TOTALVIBE_LABELS["hip_right"]
    assert orientation_warnings(labels, GEOMETRY, TOTALVIBE_LABELS) == []


def test_oblique_images():
    cos, sin = np.cos(0.8), np.sin(0.8)
    oblique = Geometry(SHAPE, (3.0, 2.0, 2.5), (0, 0, 0), (cos, -sin, 0, sin, cos, 0, 0, 0, 1))
    assert "oblique" in orientation_warnings(np.zeros(SHAPE, np.uint8), oblique, {"organ": 1})[0]
