"""Between which limits an organ's features are ordinary, learnt on a cohort."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ukbob_seg.errors import ConfigError
from ukbob_seg.filtering.anatomy import ANATOMY_COLUMNS, Typical, anatomy_vectors, learn_typical
from ukbob_seg.filtering.joint import CONFIDENCE, JointModel, learn_joint, shape_vectors

SOLF_FEATURES = ("normalized_volume", "sphericity", "eccentricity")
PLAIN_VOLUME = "volume_mm3"
EPSILON = 2.0
MIN_SAMPLES = 20
IQR_FACTOR = 1.5


@dataclass(frozen=True)
class OrganBounds:
    """Limits of one organ.

    Attributes:
        cases: labels that the limits were learnt from.
        limits: feature -> (lowest, highest ordinary value); a feature with too few samples has no entry.
        name: the organ's name, for readers and for a check when the bounds are applied to another dataset.
        joint: size and shape together, where it was learnt.
        anatomy: size, axes and place beside the other organs, where it was learnt.
        typical: what ``anatomy`` needs to know about the organ in other scans.
    """

    cases: int
    limits: Mapping[str, tuple[float, float]]
    name: str = ""
    joint: JointModel | None = None
    anatomy: JointModel | None = None
    typical: Typical | None = None


@dataclass(frozen=True)
class CohortBounds:
    """Limits of all organs of a cohort.

    Attributes:
        epsilon: share in percent that the percentile limits cut off, half at each end.
        min_samples: fewest samples that limits were learnt from.
        organs: by label value.
        confidence: share of normally distributed labels that the joint model calls ordinary.
    """

    epsilon: float
    min_samples: int
    organs: Mapping[int, OrganBounds]
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 100:
            raise ConfigError(f"epsilon must be a percentage from 0 to below 100, got {self.epsilon}")
        if self.min_samples < 1:
            raise ConfigError(f"min_samples must be at least 1, got {self.min_samples}")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence must lie between 0 and 1 (for example 0.999), got {self.confidence}")

    @property
    def most_doubt(self) -> float:
        """Doubt beyond which a label is outside the joint model."""
        return float(-np.log10(1 - self.confidence))

    def limits(self, label: int, feature: str) -> tuple[float, float]:
        """(lowest, highest) ordinary value, NaN where unknown."""
        organ = self.organs.get(int(label))
        return organ.limits.get(feature, (np.nan, np.nan)) if organ else (np.nan, np.nan)

    def as_json(self) -> dict[str, Any]:
        """Plain content for a file."""
        organs = {
            str(label): {
                "name": organ.name,
                "cases": organ.cases,
                "limits": {feature: list(pair) for feature, pair in organ.limits.items()},
                **{
                    part: model.as_json()
                    for part, model in (("joint", organ.joint), ("anatomy", organ.anatomy), ("typical", organ.typical))
                    if model is not None
                },
            }
            for label, organ in sorted(self.organs.items())
        }
        return {
            "epsilon": self.epsilon,
            "min_samples": self.min_samples,
            "confidence": self.confidence,
            "organs": organs,
        }

    @classmethod
    def from_json(cls, content: Any) -> CohortBounds:
        """Inverse of ``as_json``; raises KeyError, TypeError, ValueError or AttributeError on other content."""
        organs = {int(label): _organ_from_json(entry) for label, entry in content["organs"].items()}
        return cls(
            float(content["epsilon"]),
            int(content["min_samples"]),
            organs,
            float(content.get("confidence", CONFIDENCE)),
        )


def learn_bounds(
    features: pd.DataFrame,
    epsilon: float = EPSILON,
    min_samples: int = MIN_SAMPLES,
    names: Mapping[int, str] | None = None,
    confidence: float = CONFIDENCE,
    joint: bool = True,
) -> CohortBounds:
    """Learn every organ's limits from a cohort.

    The three SOLF features get the percentiles [P_{epsilon/2}, P_{100 - epsilon/2}] (numpy's linear interpolation);
    ``volume_mm3``, where the table has it, gets Tukey's fences [Q1 - 1.5 IQR, Q3 + 1.5 IQR]. The joint model is a
    robust mean and covariance of the three features on logarithmic scales.

    Args:
        features: one row per case and label; NaN and infinite values are left out.
        epsilon: percent, 0 to below 100.
        min_samples: a feature with fewer finite values than this in an organ gets no limits there.
        names: organ names by label value.
        confidence: of the joint model.
        joint: learn the joint models too (and the anatomy models where the table has evidence); it takes a second
            for an organ of 50,000 labels.

    Raises:
        ConfigError: epsilon, min_samples or confidence out of range.
    """
    bounds = CohortBounds(float(epsilon), min_samples, {}, confidence)  # validates before the work
    vectors = shape_vectors(features) if joint else None
    typical: dict[int, Typical] = {}
    anatomy = None
    if joint and has_anatomy(features):
        typical = learn_typical(features)
        anatomy = anatomy_vectors(features, typical)
    organs = {}
    for label, rows in _by_label(features):
        limits = {}
        for feature in (*SOLF_FEATURES, PLAIN_VOLUME):
            if feature not in features.columns:
                continue
            values = features[feature].to_numpy(np.float64)[rows]
            values = values[np.isfinite(values)]
            if len(values) >= min_samples:
                limits[feature] = _fences(values) if feature == PLAIN_VOLUME else _percentiles(values, bounds.epsilon)
        organs[label] = OrganBounds(
            len(rows),
            limits,
            (names or {}).get(label, ""),
            None if vectors is None else learn_joint(vectors[rows], min_samples),
            None if anatomy is None else learn_joint(anatomy[rows], min_samples),
            typical.get(label),
        )
    return CohortBounds(bounds.epsilon, bounds.min_samples, organs, confidence)


def has_anatomy(features: pd.DataFrame) -> bool:
    """Whether a table has the columns that the rule ``anatomy`` needs (those of ``organ_evidence``)."""
    return all(column in features.columns for column in ANATOMY_COLUMNS)


def outside(features: pd.DataFrame, feature: str, bounds: CohortBounds) -> np.ndarray:
    """Whether each row's feature lies beyond its organ's limits; False where value or limits are unknown.

    Args:
        features: table with ``label`` and ``feature``.

    Returns:
        (rows,) bool, in row order.
    """
    result = np.zeros(len(features), dtype=bool)
    values = features[feature].to_numpy(np.float64)
    for label, rows in _by_label(features):
        low, high = bounds.limits(label, feature)
        here = values[rows]
        result[rows] = np.isfinite(here) & ((here < low) | (here > high))
    return result


def doubts(features: pd.DataFrame, bounds: CohortBounds, model: str) -> np.ndarray:
    """How improbable each row is (see ``JointModel.doubt``); NaN where its organ has no model.

    Args:
        features: table of one or more whole scans.
        bounds: with models.
        model: ``joint`` or ``anatomy``.
    """
    result = np.full(len(features), np.nan)
    if model == "joint":
        vectors = shape_vectors(features)
    else:
        typical = {label: organ.typical for label, organ in bounds.organs.items() if organ.typical is not None}
        vectors = anatomy_vectors(features, typical)
    for label, rows in _by_label(features):
        organ = bounds.organs.get(label)
        fitted = getattr(organ, model) if organ is not None else None
        if fitted is not None:
            result[rows] = fitted.doubt(vectors[rows])
    return result


def excess(features: pd.DataFrame, feature: str, bounds: CohortBounds) -> np.ndarray:
    """How far each row's feature lies beyond the nearer limit, in widths of its organ's bounds.

    Returns:
        (rows,) float64: 0 inside or where value or limits are unknown; inf outside bounds of width 0.
    """
    result = np.zeros(len(features))
    values = features[feature].to_numpy(np.float64)
    for label, rows in _by_label(features):
        low, high = bounds.limits(label, feature)
        beyond = np.fmax(np.fmax(low - values[rows], values[rows] - high), 0.0)
        result[rows] = beyond / (high - low) if high > low else np.where(beyond > 0, np.inf, 0.0)
    return result


def _by_label(features: pd.DataFrame) -> Iterator[tuple[int, np.ndarray]]:
    """(label, row positions) of every label, ascending."""
    labels = features["label"].to_numpy()
    if not len(labels):
        return
    order = np.argsort(labels, kind="stable")
    values, starts = np.unique(labels[order], return_index=True)
    for label, rows in zip(values, np.split(order, starts[1:]), strict=True):
        yield int(label), rows


def _percentiles(values: np.ndarray, epsilon: float) -> tuple[float, float]:
    low, high = np.percentile(values, (epsilon / 2, 100 - epsilon / 2))
    return float(low), float(high)


def _fences(values: np.ndarray) -> tuple[float, float]:
    first, third = np.percentile(values, (25, 75))
    reach = IQR_FACTOR * (third - first)
    return float(first - reach), float(third + reach)


def _organ_from_json(entry: Mapping[str, Any]) -> OrganBounds:
    limits = {str(feature): (float(low), float(high)) for feature, (low, high) in entry["limits"].items()}
    joint, anatomy = (JointModel.from_json(entry[part]) if part in entry else None for part in ("joint", "anatomy"))
    typical = Typical.from_json(entry["typical"]) if "typical" in entry else None
    return OrganBounds(int(entry["cases"]), limits, str(entry["name"]), joint, anatomy, typical)
