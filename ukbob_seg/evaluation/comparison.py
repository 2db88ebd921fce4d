"""Is one set of predictions better than another? Paired differences over the same cases, tested and corrected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ukbob_seg.errors import ConfigError, DatasetError, listing
from ukbob_seg.evaluation.intervals import LEAST_VALUES, percentile_interval, resampled_means
from ukbob_seg.evaluation.metrics import DISTANCES, nsd_names
from ukbob_seg.evaluation.summary import EvaluationSummary
from ukbob_seg.files import atomic_path, write_json

LEVEL = 0.05
MOST_EXACT = 50  # differences whose signed-rank test is exact
OVERALL_ROW = "mean over classes"
COLUMNS = (
    "metric", "class", "other", "n", "baseline_mean", "other_mean", "difference", "ci95_low", "ci95_high",
    "better", "worse", "n_infinite_baseline", "n_infinite_other", "n_unpaired", "p", "p_holm",
)  # fmt: skip
_WHOLE = ("n", "better", "worse", "n_infinite_baseline", "n_infinite_other", "n_unpaired")


@dataclass(frozen=True)
class Comparison:
    """Several sets of predictions against the first of them.

    Attributes:
        summaries: name -> scores of the same classes; the first is the baseline.
        cases: scored in all of them, in the order of the baseline.
        table: one row per metric, class and other set, the mean over classes first; columns ``COLUMNS``.
    """

    summaries: Mapping[str, EvaluationSummary]
    cases: tuple[str, ...]
    table: pd.DataFrame

    @property
    def baseline(self) -> str:
        """Name of the first."""
        return next(iter(self.summaries))

    @property
    def others(self) -> tuple[str, ...]:
        """Names of the rest."""
        return tuple(self.summaries)[1:]

    @property
    def metrics(self) -> tuple[str, ...]:
        """That were compared."""
        return tuple(self.table["metric"].unique())

    @cached_property
    def left_out(self) -> tuple[str, ...]:
        """Cases that some of the sets do not have, or none."""
        seen = dict.fromkeys(c for summary in self.summaries.values() for c in (*summary.cases, *summary.missing))
        return tuple(case for case in seen if case not in set(self.cases))

    @property
    def least_p(self) -> float:
        """The smallest p value that the test of so many cases can have, before any correction."""
        return 2.0 ** (1 - len(self.cases))

    def rows(self, metric: str, other: str) -> pd.DataFrame:
        """Rows of one metric and one other set, indexed by class."""
        table = self.table
        return table[(table["metric"] == metric) & (table["other"] == other)].set_index("class")

    def baseline_means(self, metric: str) -> pd.Series:
        """Mean of each class over the compared cases; of two sets alone, over those in which both have a value."""
        if len(self.others) == 1:
            return self.rows(metric, self.others[0])["baseline_mean"]
        values = self.summaries[self.baseline].wide(metric).loc[list(self.cases)]
        return values.where(np.isfinite(values)).mean()

    def case_differences(self, metric: str = "dice") -> pd.DataFrame:
        """(cases, others): mean over the classes that both have of other minus baseline; NaN without any."""
        return pd.DataFrame(
            {
                other: _paired(self.summaries[self.baseline], self.summaries[other], metric, self.cases).case_means
                for other in self.others
            },
            index=list(self.cases),
        )

    def to_json(self) -> dict[str, Any]:
        """Content for a strict JSON file: NaN becomes null."""
        rows = [
            {key: (int(value) if key in _WHOLE else value) if value == value else None for key, value in row.items()}
            for row in self.table.to_dict("records")
        ]
        return {
            "version": 1,
            "baseline": self.baseline,
            "others": list(self.others),
            "cases": len(self.cases),
            "left_out": list(self.left_out),
            "comparisons": rows,
        }

    def write(self, folder: Path) -> None:
        """Write ``comparison.json`` and ``comparison.csv`` into ``folder``."""
        write_json(Path(folder) / "comparison.json", self.to_json())
        with atomic_path(Path(folder) / "comparison.csv") as temporary:
            self.table.to_csv(temporary, index=False, na_rep="")


def compare(summaries: Mapping[str, EvaluationSummary], metrics: Sequence[str] | None = None) -> Comparison:
    """Compare sets of predictions with the first of them, case by case.

    For every class: the differences (other minus baseline) over the cases that both scored, their mean with its 95 %
    bootstrap interval over cases, and a two-sided Wilcoxon signed-rank test. An infinite distance in one of the two
    counts in the test as the largest difference, and as no difference in both; it stays out of the means. The mean
    over classes is tested on each case's mean difference over the classes with two finite values. P values are
    corrected by Holm's method within a metric: over all classes and others, and over all others for the mean.

    Args:
        summaries: name -> scores, at least two.
        metrics: any of the summaries' metrics; None takes Dice, the surface Dice of each tolerance, and HD95.

    Raises:
        ConfigError: fewer than two.
        DatasetError: different classes or tolerances, or no common case.

    References: Wilcoxon, Biometrics Bulletin 1, 1945; Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    names = list(summaries)
    if len(names) < 2:
        raise ConfigError("a comparison needs two sets of predictions or more")
    first = summaries[names[0]]
    for name in names[1:]:
        if list(summaries[name].classes) != list(first.classes):
            differing = sorted(set(summaries[name].classes) ^ set(first.classes)) or ["their order"]
            raise DatasetError(
                f"{names[0]} and {name} were scored on different classes ({listing(differing)}); "
                "give one dataset.json for both with --dataset-json"
            )
        if summaries[name].tolerances != first.tolerances:
            raise DatasetError(f"{names[0]} and {name} were scored with different tolerances")
    cases = [case for case in first.cases if all(case in set(summary.cases) for summary in summaries.values())]
    if not cases:
        raise DatasetError(f"no case was scored in all of {listing(names)}")
    if metrics is None:
        metrics = ("dice", *(nsd_names(first.tolerances) or ("nsd",)), "hd95")
    rows: list[dict[str, Any]] = []
    for metric in metrics:
        overall, by_class = [], []
        for name in names[1:]:
            pairs = _paired(first, summaries[name], metric, cases)
            overall.append({"metric": metric, "class": OVERALL_ROW, "other": name, **_overall_row(pairs)})
            by_class += [{"metric": metric, "class": c, "other": name, **_class_row(pairs, c)} for c in first.classes]
        for family in (overall, by_class):
            corrected = holm([row["p"] for row in family])
            rows += [{**row, "p_holm": p} for row, p in zip(family, corrected, strict=True)]
    return Comparison(dict(summaries), tuple(cases), pd.DataFrame(rows, columns=list(COLUMNS)))


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided p value of the signed-rank test that differences scatter symmetrically about 0.

    Zeros are left out (Wilcoxon's own way), equal differences share the mean of their ranks, and infinite ones rank
    highest. Exact for up to 50 differences, else by the normal approximation. 1 when all are zero, NaN without any.
    """
    from scipy import stats

    known = differences[~np.isnan(differences)]
    if not len(known):
        return float("nan")
    known = known[known != 0]
    count = len(known)
    if not count:
        return 1.0
    ranks = stats.rankdata(np.abs(known))
    positive = float(ranks[known > 0].sum())
    if count <= MOST_EXACT:
        doubled = np.rint(2 * ranks).astype(int)  # mean ranks of ties are halves
        ways = np.zeros(int(doubled.sum()) + 1)  # how many sets of ranks have each sum; exact below 2^53
        ways[0] = 1
        for rank in doubled:
            ways[rank:] = ways[rank:] + ways[: len(ways) - rank]
        at = round(2 * positive)
        tail = min(ways[: at + 1].sum(), ways[at:].sum()) / 2.0**count
        return float(min(1.0, 2 * tail))
    _, ties = np.unique(ranks, return_counts=True)
    variance = count * (count + 1) * (2 * count + 1) / 24 - float((ties.astype(float) ** 3 - ties).sum()) / 48
    return float(2 * stats.norm.sf(abs(positive - count * (count + 1) / 4) / np.sqrt(variance)))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """P values corrected for testing them all, in their order; NaN stay NaN and do not count as tests."""
    p = np.asarray(p_values, dtype=np.float64)
    corrected = np.full(len(p), np.nan)
    valid = np.flatnonzero(~np.isnan(p))
    order = valid[np.argsort(p[valid], kind="stable")]
    factors = len(order) - np.arange(len(order))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return corrected


def p_text(value: float) -> str:
    """A p value as people write it; a dash for NaN."""
    if np.isnan(value):
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


@dataclass(frozen=True)
class _Pairs:
    """Values of two sets for the same cases, (cases, classes)."""

    metric: str
    baseline: np.ndarray
    other: np.ndarray
    classes: list[str]

    @cached_property
    def differences(self) -> np.ndarray:
        """Other minus baseline: NaN where one has no value, infinite where one is, 0 where both are."""
        with np.errstate(invalid="ignore"):
            found = self.other - self.baseline
        return np.where(np.isinf(self.other) & np.isinf(self.baseline), 0.0, found)

    @cached_property
    def finite(self) -> np.ndarray:
        return np.isfinite(self.baseline) & np.isfinite(self.other)

    @cached_property
    def intervals(self) -> np.ndarray:
        """(classes, 2) of the mean finite differences."""
        found = percentile_interval(resampled_means(np.where(self.finite, self.differences, np.nan)))
        found[self.finite.sum(axis=0) < LEAST_VALUES] = np.nan
        return found

    @cached_property
    def case_means(self) -> np.ndarray:
        return _row_means(self.differences, self.finite)


def _paired(first: EvaluationSummary, second: EvaluationSummary, metric: str, cases: Sequence[str]) -> _Pairs:
    one, two = (summary.wide(metric).loc[list(cases)].to_numpy() for summary in (first, second))
    return _Pairs(metric, one, two, list(first.classes))


def _class_row(pairs: _Pairs, name: str) -> dict[str, Any]:
    column = pairs.classes.index(name)
    baseline, other = pairs.baseline[:, column], pairs.other[:, column]
    differences, finite = pairs.differences[:, column], pairs.finite[:, column]
    return {
        **_counts(pairs.metric, differences),
        "baseline_mean": _mean(baseline[finite]),
        "other_mean": _mean(other[finite]),
        "difference": _mean(differences[finite]),
        "ci95_low": pairs.intervals[column, 0],
        "ci95_high": pairs.intervals[column, 1],
        "n_infinite_baseline": int(np.isinf(baseline).sum()),
        "n_infinite_other": int(np.isinf(other).sum()),
        "n_unpaired": int((np.isnan(baseline) ^ np.isnan(other)).sum()),
        "p": wilcoxon_p(differences),
    }


def _overall_row(pairs: _Pairs) -> dict[str, Any]:
    """Means over cases of each case's mean over the classes with two finite values."""
    means = pairs.case_means
    low, high = percentile_interval(resampled_means(means[:, None]))[0]
    enough = int(np.isfinite(means).sum()) >= LEAST_VALUES
    return {
        **_counts(pairs.metric, means),
        "baseline_mean": _mean(_row_means(pairs.baseline, pairs.finite)),
        "other_mean": _mean(_row_means(pairs.other, pairs.finite)),
        "difference": _mean(means),
        "ci95_low": low if enough else float("nan"),
        "ci95_high": high if enough else float("nan"),
        "n_infinite_baseline": int(np.isinf(pairs.baseline).sum()),
        "n_infinite_other": int(np.isinf(pairs.other).sum()),
        "n_unpaired": int((np.isnan(pairs.baseline) ^ np.isnan(pairs.other)).sum()),
        "p": wilcoxon_p(means),
    }


def _counts(metric: str, differences: np.ndarray) -> dict[str, int]:
    gains = -differences if metric in DISTANCES else differences
    return {
        "n": int((~np.isnan(gains)).sum()), "better": int((gains > 0).sum()), "worse": int((gains < 0).sum())
    }  # fmt: skip


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def _row_means(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.where(counted, values, 0.0).sum(axis=1) / counted.sum(axis=1)
