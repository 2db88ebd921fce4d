"""Evidence beside size and shape: into how many pieces an organ falls, and whether left and right are exchanged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.filtering.components import organ_components, runs_of_labels

POSITION_COLUMNS = ("left_mm", "posterior_mm", "superior_mm")
EVIDENCE_COLUMNS = ("components", "largest_component", *POSITION_COLUMNS)
STRAY_SHARE = 0.1
_SIDES = {"left": "right", "l": "r", "links": "rechts"}


def organ_evidence(labels: np.ndarray, geometry: Geometry) -> pd.DataFrame:
    """Pieces and place of every organ.

    Args:
        labels: (Z, Y, X) integers, 0 is background.
        geometry: of the label map.

    Returns:
        One row per label present, ascending: ``label``, ``components`` (26 neighbours), ``largest_component`` (share
        of the voxels in the largest one), and the centroid in patient coordinates: ``left_mm``, ``posterior_mm``,
        ``superior_mm``.
    """
    runs = runs_of_labels(labels)
    table = organ_components(runs)
    row = np.searchsorted(table["label"].to_numpy(), runs.value)
    line = np.repeat(np.arange(len(runs.first) - 1), np.diff(runs.first))
    voxels = runs.voxels
    total = np.bincount(row, weights=voxels, minlength=len(table))
    index_xyz = [
        np.bincount(row, weights=voxels * position, minlength=len(table)) / total
        for position in ((runs.start + runs.stop - 1) / 2, line % labels.shape[1], line // labels.shape[1])
    ]
    step = np.asarray(geometry.spacing_mm)[::-1, None]
    lps = np.asarray(geometry.origin_mm)[:, None] + np.reshape(geometry.direction, (3, 3)) @ (step * index_xyz)
    return table.assign(**dict(zip(POSITION_COLUMNS, lps, strict=True)))


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
