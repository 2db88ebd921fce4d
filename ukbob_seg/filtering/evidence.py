"""Evidence beside SOLF's features: pieces of an organ, its principal axes and its place in the patient."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.filtering.components import organ_components, runs_of_labels
from ukbob_seg.filtering.shape_features import centroids, covariance_mm2, organ_sums

POSITION_COLUMNS = ("left_mm", "posterior_mm", "superior_mm")
AXIS_COLUMNS = ("axis1_mm", "axis2_mm", "axis3_mm")
EVIDENCE_COLUMNS = ("components", "largest_component", *AXIS_COLUMNS, *POSITION_COLUMNS)
STRAY_SHARE = 0.1
_SIDES = {"left": "right", "l": "r", "links": "rechts"}


def organ_evidence(labels: np.ndarray, geometry: Geometry) -> pd.DataFrame:
    """Pieces, axes and place of every organ.

    Args:
        labels: (Z, Y, X) uint8, uint16 or int32, 0 is background.
        geometry: of the label map.

    Returns:
        One row per label present, ascending: ``label``, ``components`` (26 neighbours), ``largest_component`` (share
        of the voxels in the largest one), ``axis1_mm`` to ``axis3_mm`` (standard deviation along the principal axes,
        longest first, of solid voxels: never 0), and the centroid in patient coordinates: ``left_mm``,
        ``posterior_mm``, ``superior_mm``.
    """
    labels = np.ascontiguousarray(labels)
    table = organ_components(runs_of_labels(labels))
    sums = organ_sums(labels)[table["label"].to_numpy()]
    spacing = np.asarray(geometry.spacing_mm)
    solid = covariance_mm2(sums, spacing) + np.diag(spacing**2 / 12)
    axes = np.sqrt(np.linalg.eigvalsh(solid)[:, ::-1])
    index_xyz = centroids(sums, labels.shape)[:, ::-1] * spacing[::-1]
    lps = np.asarray(geometry.origin_mm) + index_xyz @ np.reshape(geometry.direction, (3, 3)).T
    columns = dict(zip((*AXIS_COLUMNS, *POSITION_COLUMNS), np.hstack([axes, lps]).T, strict=True))
    return table.assign(**columns)


def paired_organs(names: Mapping[int, str]) -> list[tuple[int, int]]:
    """(left, right) label values of organs whose names differ only in the side.

    ``kidney_left`` / ``kidney_right``, ``Left-Hippocampus`` / ``Right-Hippocampus``, ``L kidney`` / ``R kidney``.
    """
    by_words = {_words(name): value for value, name in names.items()}
    pairs = []
    for words, value in by_words.items():
        for position, word in enumerate(words):
            if word in _SIDES:
                other = by_words.get((*words[:position], _SIDES[word], *words[position + 1 :]))
                if other is not None:
                    pairs.append((value, other))
    return sorted(pairs)


def stray(features: pd.DataFrame) -> np.ndarray:
    """Whether at least 10% more of an organ's voxels lie outside its largest piece than in its median label.

    Args:
        features: rows with label and largest_component, of a whole cohort (organs such as the ribs are many pieces).

    Returns:
        (rows,) bool.
    """
    usual = features.groupby("label")["largest_component"].transform("median")
    return (usual - features["largest_component"] >= STRAY_SHARE).to_numpy(bool)


def swapped(features: pd.DataFrame, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Whether a left organ lies to the right of its partner.

    Left is what most scans of the table call left, so that a cohort whose headers have the wrong handedness is judged
    by its own habit; with fewer than three scans, and when they are evenly divided, it is the patient's left.

    Args:
        features: rows with case, label and left_mm.
        pairs: (left, right) label values.

    Returns:
        (rows,) bool; both organs of an exchanged pair are marked. A pair that is not complete is not judged.
    """
    result = np.zeros(len(features), dtype=bool)
    place = features.pivot(index="case", columns="label", values="left_mm")
    for left, right in pairs:
        if left not in place or right not in place:
            continue
        distance = place[left] - place[right]
        distance = distance[distance.notna()]
        habit = np.sign(distance).sum() if len(distance) >= 3 else 0
        wrong = distance.index[(distance < 0) if habit >= 0 else (distance > 0)]
        result |= (features["case"].isin(wrong) & features["label"].isin((left, right))).to_numpy(bool)
    return result


def _words(name: str) -> tuple[str, ...]:
    return tuple(re.split(r"[\s_\-,.()]+", name.strip().lower()))
