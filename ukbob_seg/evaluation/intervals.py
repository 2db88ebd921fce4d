"""How far a mean over cases can be trusted: bootstrap intervals over whole cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

REPLICATES = 2000
LEAST_VALUES = 5  # fewer cannot say how far they scatter
_LIMITS = (2.5, 97.5)
_DRAWS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Intervals:
    """95 % intervals of means.

    Attributes:
        classes: metric -> one row per class, columns low and high; NaN with fewer than ``LEAST_VALUES`` values.
        overall: metric -> (low, high) of the mean over classes; NaN with fewer cases that have a value.
    """

    classes: Mapping[str, pd.DataFrame]
    overall: Mapping[str, tuple[float, float]]


def bootstrap_intervals(tables: Mapping[str, pd.DataFrame], replicates: int = REPLICATES, seed: int = 0) -> Intervals:
    """95 % percentile bootstrap intervals of each class's mean, and of the mean over classes.

    Cases are drawn with replacement, each with all of its classes and metrics: organs of one scan fail together, and
    the mean over classes scatters accordingly. NaN and infinite values stay out of the means, as everywhere; a class
    that none of the cases drawn has stays out of that draw's mean over classes.

    Args:
        tables: metric -> (cases, classes), the same for all metrics.
        replicates: draws.
        seed: of the draws; the same values always get the same intervals.

    Reference: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    values = np.stack([table.to_numpy(np.float64) for table in tables.values()], axis=1)  # (cases, metrics, classes)
    cases, metrics, classes = values.shape
    means = resampled_means(values.reshape(cases, -1), replicates, seed).reshape(replicates, metrics, classes)
    enough = np.isfinite(values).sum(axis=0) >= LEAST_VALUES
    scored = np.isfinite(values).any(axis=2).sum(axis=0)  # cases, of each metric
    by_class, overall = {}, {}
    for number, (metric, table) in enumerate(tables.items()):
        limits = percentile_interval(means[:, number])
        limits[~enough[number]] = np.nan
        by_class[metric] = pd.DataFrame(limits, index=table.columns, columns=["low", "high"])
        low, high = percentile_interval(_mean_over_classes(means[:, number])[:, None])[0]
        overall[metric] = (float(low), float(high)) if scored[number] >= LEAST_VALUES else (float("nan"), float("nan"))
    return Intervals(by_class, overall)


def resampled_means(values: np.ndarray, replicates: int = REPLICATES, seed: int = 0) -> np.ndarray:
    """Means over cases drawn with replacement.

    Args:
        values: (cases, columns); what is not finite stays out.
        replicates: draws; all columns share them.
        seed: of the draws.

    Returns:
        (replicates, columns); NaN where none of the cases drawn has a value.
    """
    cases = len(values)
    finite = np.isfinite(values)
    filled = np.where(finite, values, 0.0)
    present = finite.astype(np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty((replicates, values.shape[1]))
    step = max(1, _DRAWS_AT_ONCE // cases)
    for start in range(0, replicates, step):
        count = min(step, replicates - start)
        drawn = generator.integers(0, cases, (count, cases)) + cases * np.arange(count)[:, None]
        # How often each case was drawn; the sums over draws are then one product of matrices.
        weights = np.bincount(drawn.ravel(), minlength=count * cases).reshape(count, cases).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means[start : start + count] = (weights @ filled) / (weights @ present)
    return means


def _mean_over_classes(means: np.ndarray) -> np.ndarray:
    finite = np.isfinite(means)
    with np.errstate(invalid="ignore"):
        return np.where(finite, means, 0.0).sum(axis=1) / finite.sum(axis=1)


def percentile_interval(means: np.ndarray) -> np.ndarray:
    """(columns, 2): percentiles 2.5 and 97.5 of the finite values of each of (replicates, columns); NaN without any."""
    ordered = np.sort(means, axis=0)  # NaN comes last
    last = np.maximum(np.isfinite(ordered).sum(axis=0) - 1, 0)
    limits = []
    for percent in _LIMITS:
        place = last * percent / 100
        below = np.floor(place).astype(int)
        low, high = (np.take_along_axis(ordered, at[None], 0)[0] for at in (below, np.minimum(below + 1, last)))
        limits.append(low + (high - low) * (place - below))
    return np.stack(limits, axis=1)
