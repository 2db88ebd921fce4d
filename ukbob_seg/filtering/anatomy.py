"""What an organ looks like beside the other organs of the same scan: its size, axes and place for that patient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ukbob_seg.filtering.evidence import AXIS_COLUMNS, POSITION_COLUMNS

LEAST_ORGANS = 4  # with fewer organs in a scan, what is usual for the patient cannot be told from what is wrong
ANATOMY_COLUMNS = ("volume_mm3", "sphericity", *AXIS_COLUMNS, *POSITION_COLUMNS)


@dataclass(frozen=True)
class Typical:
    """Medians of an organ over a cohort: log volume (mm^3), and the centroid in patient coordinates (mm)."""

    log_volume: float
    position: tuple[float, float, float]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"log_volume": self.log_volume, "position": list(self.position)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Typical:
        """Inverse of ``as_json``."""
        left, posterior, superior = (float(value) for value in content["position"])
        return cls(float(content["log_volume"]), (left, posterior, superior))


def learn_typical(features: pd.DataFrame) -> dict[int, Typical]:
    """The medians of every organ of a table with the columns of ``organ_evidence``."""
    table = features[["label", *POSITION_COLUMNS]].assign(log_volume=np.log(features["volume_mm3"]))
    medians = table.groupby("label")[["log_volume", *POSITION_COLUMNS]].median()
    return {
        int(label): Typical(float(volume), (float(left), float(posterior), float(superior)))
        for label, volume, left, posterior, superior in medians.itertuples(name=None)
    }


def anatomy_vectors(features: pd.DataFrame, typical: Mapping[int, Typical]) -> np.ndarray:
    """Log volume, log sphericity, log length of the three axes, and place, each relative to the scan's other organs.

    A scan's size is the median, over its organs, of log volume minus the organ's typical one; a third of it is its
    length. Its shift is the median distance of its centroids from their typical places, after these places have been
    scaled by the scan's length about their mean. Medians do not follow a few wrong organs. In scans with fewer than
    four organs size and shift are not corrected and the place is unknown (NaN).

    Args:
        features: rows with case, label and the columns of ``organ_features`` and ``organ_evidence``.
        typical: by label value; organs without an entry get NaN.

    Returns:
        (rows, 8)
    """
    labels = features["label"].to_numpy()
    known = np.array([int(label) in typical for label in labels], dtype=bool)
    usual = np.full((len(labels), 4), np.nan)
    for label in np.unique(labels[known]):
        entry = typical[int(label)]
        usual[labels == label] = (entry.log_volume, *entry.position)
    with np.errstate(divide="ignore", invalid="ignore"):
        volume, sphericity, *axes = np.log(features[list(ANATOMY_COLUMNS[:5])].to_numpy(np.float64)).T
    cases = features["case"].to_numpy()
    enough = pd.Series(known).groupby(cases).transform("sum").to_numpy() >= LEAST_ORGANS
    size = np.where(enough, _median_by(cases, volume - usual[:, 0]), 0.0)
    centre = np.mean([entry.position for entry in typical.values()], axis=0) if typical else np.zeros(3)
    expected = (usual[:, 1:] - centre) * np.exp(size / 3)[:, None] + centre
    place = features[list(POSITION_COLUMNS)].to_numpy(np.float64) - expected
    shift = np.stack([_median_by(cases, axis) for axis in place.T], axis=1)
    place = np.where(enough[:, None], place - shift, np.nan)
    vectors = np.column_stack([volume - size, sphericity, *(axis - size / 3 for axis in axes), place])
    return np.where(np.isfinite(vectors) & known[:, None], vectors, np.nan)


def _median_by(cases: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Median of the values of each row's case, NaN left out."""
    return pd.Series(values).groupby(cases).transform("median").to_numpy()
