"""Pieces, places and sides of organs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from scipy import ndimage

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.filtering.evidence import organ_evidence, paired_organs, stray, swapped


def test_centroids_in_patient_coordinates_are_those_of_simpleitk(rng: np.random.Generator) -> None:
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    geometry = Geometry((9, 11, 13), (3.0, 1.5, 0.7), (-20.0, 35.0, 7.0), tuple(turn.ravel()))
    labels = (ndimage.gaussian_filter(rng.normal(size=(4, 9, 11, 13)), (0, 1, 1, 1)).argmax(axis=0) * 3).astype(
        np.uint16
    )
    table = organ_evidence(labels, geometry).set_index("label")
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction)
    statistics = sitk.LabelShapeStatisticsImageFilter()
    statistics.Execute(image)
    assert tuple(table.index) == statistics.GetLabels() == (3, 6, 9)
    for value in statistics.GetLabels():
        found = table.loc[value, ["left_mm", "posterior_mm", "superior_mm"]].to_numpy(float)
        assert found == pytest.approx(statistics.GetCentroid(value))
        axes = table.loc[value, ["axis1_mm", "axis2_mm", "axis3_mm"]].to_numpy(float)
        points = np.argwhere(labels == value) * geometry.spacing_mm
        solid = np.cov(points.T, bias=True) + np.diag(np.square(geometry.spacing_mm) / 12)
        assert axes == pytest.approx(np.sqrt(np.linalg.eigvalsh(solid)[::-1]))


def test_a_box_has_the_axes_of_a_solid_box() -> None:
    labels = np.zeros((9, 12, 15), np.uint8)
    labels[2:3, 3:9, 2:14] = 5
    row = organ_evidence(labels, Geometry(labels.shape, (4.0, 2.0, 0.5))).iloc[0]
    assert row[["axis1_mm", "axis2_mm", "axis3_mm"]].tolist() == pytest.approx(np.array([12, 6, 4]) / np.sqrt(12))


def test_no_organs() -> None:
    geometry = Geometry((3, 4, 5), (1.0, 1.0, 1.0))
    assert organ_evidence(np.zeros((3, 4, 5), np.uint8), geometry).empty


def test_pairs_are_found_by_name() -> None:
    names = {
        1: "kidney_left",
        2: "kidney_right",
        3: "Right-Hippocampus",
        4: "Left-Hippocampus",
        5: "left lung upper",
        6: "right lung upper",
        7: "liver_left_lobe",
        8: "l femur",
        9: "r femur",
        10: "heart",
    }
    assert paired_organs(names) == [(1, 2), (4, 3), (5, 6), (8, 9)]


def places(sides: Sequence[tuple[float, float]]) -> pd.DataFrame:
    rows = [
        (f"case_{k}", label, side) for k, pair in enumerate(sides) for label, side in zip((1, 2), pair, strict=True)
    ]
    return pd.DataFrame(rows, columns=["case", "label", "left_mm"])


def test_exchanged_sides_are_found() -> None:
    table = places([(30, -30), (28, -25), (-31, 29), (33, -20)])
    assert swapped(table, [(1, 2)]).tolist() == [False] * 4 + [True] * 2 + [False] * 2
    mirrored = table.assign(left_mm=-table["left_mm"])  # a cohort whose headers are mirrored
    assert swapped(mirrored, [(1, 2)]).tolist() == swapped(table, [(1, 2)]).tolist()
    alone = table[table["case"] == "case_2"]
    assert swapped(alone, [(1, 2)]).tolist() == [True, True]
    assert not swapped(alone[alone["label"] == 1], [(1, 2)]).any()
    assert not swapped(table, []).any()
    assert not swapped(table, [(7, 8)]).any()


def test_stray_pieces_are_judged_by_the_organs_habit() -> None:
    table = pd.DataFrame(
        {"label": [1] * 5 + [2] * 5, "largest_component": [1, 1, 1, 0.85, 0.95, 0.1, 0.12, 0.1, 0.3, 0.05]}
    )
    assert stray(table).tolist() == [False, False, False, True, False] + [False] * 5
