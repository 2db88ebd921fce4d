"""How unusual several features of an organ are together, by a covariance that faults in the cohort cannot bend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import chi2, f, norm, rankdata

SHAPE_FEATURES = ("normalized_volume", "sphericity", "eccentricity")
CONFIDENCE = 0.999
LEAST_ROUNDNESS = 1e-4  # smallest 1 - E^2 that is told apart: an organ in one plane has 0
MOST_DOUBT = 300.0  # probabilities below 1e-300 are zero in floating point
_REWEIGHT = 0.975
_MAX_STEPS = 100


@dataclass(frozen=True)
class JointModel:
    """What is ordinary for one organ in a space of features.

    Attributes:
        entries: which entries of a vector the model is about: those that most labels of the organ have.
        centre: (d,) robust mean of these.
        scatter: (d, d) robust covariance, scaled so that half of the cohort lies within the ellipsoid that should hold
            half of it.
        samples: labels that mean and covariance were taken over in the end.
    """

    entries: tuple[int, ...]
    centre: tuple[float, ...]
    scatter: tuple[tuple[float, ...], ...]
    samples: int

    def doubt(self, vectors: np.ndarray) -> np.ndarray:
        """How improbable vectors are: -log10 of the share of ordinary labels that lie further out.

        The squared Mahalanobis distance is held against its distribution for a new normal vector when mean and
        covariance come from ``samples`` others: Hotelling's, which for many samples is the chi-square distribution
        of as many degrees of freedom as the vector has finite entries (an organ of one voxel has no eccentricity).

        Args:
            vectors: (rows, entries), may hold NaN.

        Returns:
            (rows,) from 0 to 300; 3 means: one ordinary label in 1,000 is as unusual. NaN without a finite entry.
        """
        vectors = vectors[:, self.entries]
        centre, scatter = np.asarray(self.centre), np.asarray(self.scatter)
        result = np.full(len(vectors), np.nan)
        finite = np.isfinite(vectors)
        for pattern in np.unique(finite, axis=0):
            rows = (finite == pattern).all(axis=1)
            if pattern.any():
                distance = _squared_distances(
                    vectors[np.ix_(rows, pattern)], centre[pattern], scatter[np.ix_(pattern, pattern)]
                )
                result[rows] = np.clip(-self._log_tail(distance, int(pattern.sum())) / np.log(10), 0, MOST_DOUBT)
        return result

    def _log_tail(self, distance: np.ndarray, d: int) -> np.ndarray:
        n = self.samples
        with np.errstate(divide="ignore"):
            return f.logsf(distance * n / (n + 1) * (n - d) / (d * (n - 1)), d, n - d)

    def as_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {
            "entries": list(self.entries),
            "centre": list(self.centre),
            "scatter": [list(row) for row in self.scatter],
            "samples": self.samples,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> JointModel:
        """Inverse of ``as_json``."""
        return cls(
            tuple(int(entry) for entry in content["entries"]),
            tuple(float(value) for value in content["centre"]),
            tuple(tuple(float(value) for value in row) for row in content["scatter"]),
            int(content["samples"]),
        )


def shape_vectors(features: pd.DataFrame) -> np.ndarray:
    """(rows, 3): log normalized volume, log sphericity, and -log(1 - E^2): how elongated, on a logarithmic scale.

    1 - E^2 is the ratio of the smallest to the largest eigenvalue; it is not followed below 1e-4.
    """
    volume, sphericity, eccentricity = (features[name].to_numpy(np.float64) for name in SHAPE_FEATURES)
    with np.errstate(divide="ignore", invalid="ignore"):
        roundness = np.maximum(1 - eccentricity**2, LEAST_ROUNDNESS)
        vectors = np.stack([np.log(volume), np.log(sphericity), -np.log(roundness)], axis=1)
    return np.where(np.isfinite(vectors), vectors, np.nan)


def learn_joint(vectors: np.ndarray, min_samples: int) -> JointModel | None:
    """Fit one organ's model.

    Args:
        vectors: (labels, entries), may hold NaN. Entries that most labels lack are left out of the model.
        min_samples: complete rows needed.

    Returns:
        None with too few rows, or when the features do not vary.
    """
    finite = np.isfinite(vectors)
    entries = np.flatnonzero(finite.mean(axis=0) > 0.5) if len(vectors) else np.zeros(0, int)
    points = vectors[:, entries][finite[:, entries].all(axis=1)]
    d = len(entries)
    if d == 0 or len(points) < max(min_samples, 2 * d):
        return None
    try:
        centre, scatter, samples = minimum_covariance_determinant(points)
    except np.linalg.LinAlgError:
        return None
    if samples <= 2 * d:
        return None
    scatter *= np.median(_squared_distances(points, centre, scatter)) / chi2.ppf(0.5, d)
    return JointModel(
        tuple(entries.tolist()), tuple(centre.tolist()), tuple(tuple(row) for row in scatter.tolist()), samples
    )


def minimum_covariance_determinant(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and covariance of the half of the points that lies closest together, reweighted.

    Concentration steps lead from several deterministic starts to the (n + d + 1) // 2 points whose covariance has the
    smallest determinant; points within the 97.5% ellipsoid of that solution then give the result. Both covariances
    are scaled to be consistent for normal data. No random numbers: the same points give the same bits. The starts
    are the first five of Hubert's, with the median absolute deviation as the measure of scale.

    Args:
        points: (n, d) finite.

    Returns:
        (centre (d,), covariance (d, d), points that these were taken over after reweighting).

    Raises:
        numpy.linalg.LinAlgError: more than half of the points lie in a hyperplane.

    Reference: Rousseeuw, Van Driessen: A fast algorithm for the minimum covariance determinant estimator,
    Technometrics 41(3), 1999; Hubert, Rousseeuw, Verdonck: A deterministic algorithm for robust location and scatter,
    J. Computational and Graphical Statistics 21(3), 2012.
    """
    n, d = points.shape
    middle = np.median(points, axis=0)
    scale = _mad(points)
    if not (scale > 0).all():
        raise np.linalg.LinAlgError("more than half of the points agree in a coordinate")
    scaled = (points - middle) / scale
    core = central_half(scaled)
    centre, covariance = _moments(scaled[core])
    covariance *= _consistency(len(core) / n, d)
    near = _squared_distances(scaled, centre, covariance) <= chi2.ppf(_REWEIGHT, d)
    centre, covariance = _moments(scaled[near])
    covariance *= _consistency(_REWEIGHT, d)
    np.linalg.cholesky(covariance)
    return centre * scale + middle, covariance * np.outer(scale, scale), int(near.sum())


def central_half(scaled: np.ndarray) -> np.ndarray:
    """Indices of the (n + d + 1) // 2 points whose covariance has the smallest determinant of all that were tried.

    Args:
        scaled: (n, d) finite, with median 0 and median absolute deviation 1 (of normal data) in each column.

    Raises:
        numpy.linalg.LinAlgError: more than half of the points lie in a hyperplane.
    """
    n, d = scaled.shape
    best, smallest = None, np.inf
    for start in _starts(scaled):
        subset, log_determinant = _concentrate(scaled, start, (n + d + 1) // 2)
        if log_determinant < smallest:
            best, smallest = subset, log_determinant
    if best is None:
        raise np.linalg.LinAlgError("half of the points lie in a hyperplane")
    return best


def _starts(scaled: np.ndarray) -> list[np.ndarray]:
    """Indices of the half of the points that each of five simple robust covariances calls central."""
    n, d = scaled.shape
    ranks = rankdata(scaled, axis=0)
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    central = np.argsort(lengths[:, 0], kind="stable")[: -(-n // 2)]
    shapes = [
        np.corrcoef(np.tanh(scaled), rowvar=False),
        np.corrcoef(ranks, rowvar=False),
        np.corrcoef(norm.ppf((ranks - 1 / 3) / (n + 1 / 3)), rowvar=False),
        (lambda signs: signs.T @ signs / n)(scaled / np.where(lengths > 0, lengths, 1)),
        np.cov(scaled[central], rowvar=False),
    ]
    result = []
    for shape in shapes:
        vectors = np.linalg.eigh(np.atleast_2d(shape))[1]
        projected = scaled @ vectors
        spread = _mad(projected)
        if not (spread > 0).all():
            continue
        covariance = vectors @ np.diag(spread**2) @ vectors.T
        root = vectors @ np.diag(spread) @ vectors.T
        centre = root @ np.median(np.linalg.solve(root, scaled.T).T, axis=0)
        distance = _squared_distances(scaled, centre, covariance)
        result.append(np.argsort(distance, kind="stable")[: max(-(-n // 2), d + 1)])
    return result


def _concentrate(points: np.ndarray, subset: np.ndarray, half: int) -> tuple[np.ndarray, float]:
    """Repeat: take the ``half`` points nearest to the subset's own ellipsoid, until its volume no longer shrinks."""
    before = np.inf
    for _ in range(_MAX_STEPS):
        centre, covariance = _moments(points[subset])
        sign, log_determinant = np.linalg.slogdet(covariance)
        if sign <= 0 or not np.isfinite(log_determinant):
            return subset, np.inf
        if len(subset) == half and log_determinant >= before - 1e-12:
            break
        before = log_determinant if len(subset) == half else np.inf
        subset = np.argsort(_squared_distances(points, centre, covariance), kind="stable")[:half]
    return subset, float(log_determinant)


def _moments(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centre = points.mean(axis=0)
    offsets = points - centre
    return centre, offsets.T @ offsets / len(points)


def _squared_distances(points: np.ndarray, centre: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    offsets = points - centre
    return np.einsum("ij,ij->i", offsets, np.linalg.solve(covariance, offsets.T).T)


def _mad(points: np.ndarray) -> np.ndarray:
    """Median absolute deviation per column, scaled to the standard deviation of normal data."""
    return np.median(np.abs(points - np.median(points, axis=0)), axis=0) / norm.ppf(0.75)


def _consistency(share: float, d: int) -> float:
    """Factor that makes the covariance of the central ``share`` of normal points that of all."""
    return share / chi2.cdf(chi2.ppf(share, d), d + 2)
