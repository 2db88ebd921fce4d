"""From the metrics of single cases to tables and means that no absent class and no missed organ can spoil."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv

from ukbob_seg.errors import DatasetError
from ukbob_seg.evaluation.intervals import Intervals, bootstrap_intervals
from ukbob_seg.evaluation.metrics import (
    COUNTS,
    DIFFERENCES,
    DISTANCES,
    OVERLAPS,
    VOLUMES,
    Tolerances,
    check_tolerances,
    metric_names,
    nsd_names,
)
from ukbob_seg.evaluation.scoring import metrics_table
from ukbob_seg.files import atomic_path, write_json

OVERALL = (*OVERLAPS, *DISTANCES)
MOST_ROWS_IN_JSON = 200_000


@dataclass(frozen=True)
class CaseMetrics:
    """The metrics of one case: class name -> what ``evaluate_case`` returns; and the files they came from."""

    case: str
    metrics: Mapping[str, Mapping[str, float]]
    prediction: str = ""
    reference: str = ""


@dataclass(frozen=True)
class OverallMean:
    """Mean over classes of the classes' means.

    Attributes:
        mean: NaN when no class has a finite value.
        classes: how many classes entered.
        values: how many single values (case and class) these classes' means were taken over.
        n_infinite: infinite values left out.
    """

    mean: float
    classes: int
    values: int
    n_infinite: int


@dataclass(frozen=True)
class EvaluationSummary:
    """All metrics of a set of cases, and their statistics.

    Attributes:
        table: one row per case and class; columns case, class and ``metric_names``.
        classes: class name -> file values, in reporting order.
        tolerances: of the normalized surface Dice, mm; ``nsd`` is at the first.
        files: case -> (prediction, reference).
        missing: cases without a prediction; they enter no mean.
        unmatched: predictions without a reference; not scored.
        ignore_value: file value in the reference that marks voxels left out.
    """

    table: pd.DataFrame
    classes: Mapping[str, tuple[int, ...]]
    tolerances: tuple[float, ...]
    files: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    ignore_value: int | None = None

    @property
    def cases(self) -> tuple[str, ...]:
        """Scored cases, in order."""
        return tuple(self.table["case"].unique())

    @property
    def averaged(self) -> tuple[str, ...]:
        """Metrics whose mean over classes is meaningful: ``OVERALL``, and the surface Dice at several tolerances."""
        return (*OVERALL, *nsd_names(self.tolerances))

    @property
    def absent_classes(self) -> tuple[str, ...]:
        """Classes that no prediction and no reference has."""
        present = set(self.table.loc[self.table["n_pred"] + self.table["n_ref"] > 0, "class"])
        return tuple(name for name in self.classes if name not in present)

    def statistics(self, metric: str) -> pd.DataFrame:
        """One row per class: mean, sd, median, n, n_infinite.

        NaN (class absent from both maps of a case) and infinite distances (absent from one) do not enter; ``n`` is
        the number of values that do, ``n_infinite`` the number of infinite ones. sd is the sample standard deviation
        (divided by n - 1). With n = 0 the statistics are NaN.
        """
        values = self.table[metric].to_numpy(np.float64)
        kept = self.table.loc[:, ["class"]].assign(
            value=np.where(np.isfinite(values), values, np.nan), infinite=np.isinf(values)
        )
        groups = kept.groupby("class", sort=False)
        statistics = groups["value"].agg(["mean", "std", "median", "count"])
        statistics.columns = pd.Index(["mean", "sd", "median", "n"])
        statistics["n_infinite"] = groups["infinite"].sum().astype(int)
        return statistics.reindex(list(self.classes))

    def overall(self, metric: str) -> OverallMean:
        """Mean over classes of the class means, classes without a finite value left out."""
        statistics = self.statistics(metric)
        counted = statistics[statistics["n"] > 0]
        mean = float(counted["mean"].mean()) if len(counted) else float("nan")
        return OverallMean(mean, len(counted), int(counted["n"].sum()), int(statistics["n_infinite"].sum()))

    @cached_property
    def intervals(self) -> Intervals:
        """95 % bootstrap intervals of the means of ``averaged``, classes' and overall."""
        return bootstrap_intervals({metric: self.wide(metric) for metric in self.averaged})

    def wide(self, metric: str) -> pd.DataFrame:
        """One row per case, one column per class."""
        values = self.table[metric].to_numpy(np.float64).reshape(len(self.cases), len(self.classes))
        return pd.DataFrame(values, index=list(self.cases), columns=list(self.classes))

    def mean(self, metric: str = "dice") -> float:
        """The headline number: ``overall(metric).mean``."""
        return self.overall(metric).mean

    def case_means(self, metric: str = "dice") -> pd.Series:
        """Mean over classes for every case (finite values only); NaN for a case without any."""
        values = self.table[metric].where(np.isfinite(self.table[metric].astype(np.float64)))
        return values.groupby(self.table["case"], sort=False).mean()

    def with_classes(self, classes: Mapping[str, tuple[int, ...]]) -> EvaluationSummary:
        """The same with further classes, which are in none of the maps."""
        return replace(self, table=complete_table(self.table, self.cases, tuple(classes)), classes=classes)

    def to_json(self) -> dict[str, Any]:
        """Content for a strict JSON file: NaN becomes null, an infinite distance the string "inf"."""
        few = len(self.table) <= MOST_ROWS_IN_JSON
        return {
            "version": 1,
            "tolerance_mm": self.tolerances[0],
            "tolerances_mm": list(self.tolerances),
            "cases": len(self.cases),
            "missing_predictions": list(self.missing),
            "predictions_without_reference": list(self.unmatched),
            "absent_classes": list(self.absent_classes),
            "overall": {
                metric: {**_strict(vars(self.overall(metric))), "ci95": self._interval(self.intervals.overall[metric])}
                for metric in self.averaged
            },
            "classes": self._classes_json(),
            "per_case": self._cases_json() if few else None,
        }

    def write(self, folder: Path) -> None:
        """Write ``summary.json`` and ``metrics.csv`` (empty cell: NaN; ``inf``: infinite) into ``folder``."""
        write_json(Path(folder) / "summary.json", self.to_json())
        with atomic_path(Path(folder) / "metrics.csv") as temporary:  # ten times faster than pandas, for large cohorts
            csv.write_csv(pa.Table.from_pandas(self.table, preserve_index=False), temporary)

    def _classes_json(self) -> dict[str, Any]:
        found: dict[str, dict[str, Any]] = {name: {"values": list(values)} for name, values in self.classes.items()}
        for metric in (*self.averaged, *DIFFERENCES, *VOLUMES):
            table = self.statistics(metric)
            for name, content in found.items():
                content[metric] = _strict(table.loc[name].to_dict())
                if metric in self.averaged:
                    content[metric]["ci95"] = self._interval(self.intervals.classes[metric].loc[name])
        return found

    def _cases_json(self) -> list[dict[str, Any]]:
        metrics = metric_names(self.tolerances)
        return [
            {
                "case": case,
                "prediction": self.files.get(case, ("", ""))[0],
                "reference": self.files.get(case, ("", ""))[1],
                "classes": {
                    row["class"]: _strict({metric: row[metric] for metric in metrics})
                    for row in rows.to_dict("records")
                },
            }
            for case, rows in self.table.groupby("case", sort=False)
        ]

    @staticmethod
    def _interval(limits: Sequence[float]) -> list[float] | None:
        low, high = limits
        return None if math.isnan(low) else [float(low), float(high)]


def collect(
    cases: Sequence[CaseMetrics],
    classes: Mapping[str, int | Sequence[int]] | None = None,
    tolerance_mm: Tolerances = 2.0,
    *,
    missing: Sequence[str] = (),
    unmatched: Sequence[str] = (),
    ignore_value: int | None = None,
) -> EvaluationSummary:
    """Put the metrics of all cases into one summary.

    Args:
        cases: at least one; a class that a case does not list counts as absent from both of its maps.
        classes: class name -> file value or values, in reporting order; None takes the names found, with no values.
        tolerance_mm: one or several, that the cases were scored with.
        missing: cases without a prediction.
        unmatched: predictions without a reference.
        ignore_value: that the cases were scored with.

    Raises:
        DatasetError: no case, no class, a case twice, or a case that lists a class that ``classes`` does not have.
    """
    tolerances = check_tolerances(tolerance_mm)
    twice = [case for case, count in Counter(case.case for case in cases).items() if count > 1]
    if twice:
        raise DatasetError(f"case {twice[0]} is listed twice")
    if classes is None:
        classes = {name: () for case in cases for name in case.metrics}
    names = {name: (v,) if isinstance(v, (int, np.integer)) else tuple(v) for name, v in classes.items()}
    table = metrics_table({case.case: case.metrics for case in cases}, tolerances)
    files = {case.case: (case.prediction, case.reference) for case in cases}
    complete = complete_table(table, tuple(files), tuple(names))
    return EvaluationSummary(complete, names, tolerances, files, tuple(missing), tuple(unmatched), ignore_value)


def complete_table(table: pd.DataFrame, cases: Sequence[str], classes: Sequence[str]) -> pd.DataFrame:
    """One row for every case and class, in their order; a class that a case does not list is absent from both maps.

    Raises:
        DatasetError: no case, no class, or a class that is not listed.
    """
    if not cases:
        raise DatasetError("there is no case to summarise")
    if not classes:
        raise DatasetError("there is no class to summarise: neither prediction nor reference has any foreground")
    unknown = table[~table["class"].isin(set(classes))]
    if len(unknown):
        case = unknown["case"].iloc[0]
        raise DatasetError(f"case {case} has unknown classes {unknown.loc[unknown['case'] == case, 'class'].tolist()}")
    rows = pd.MultiIndex.from_product([cases, classes], names=["case", "class"])
    complete = table.set_index(["case", "class"]).reindex(rows)
    zero = {metric: 0 for metric in (*VOLUMES, *COUNTS)}
    complete = complete.astype(dict.fromkeys(complete.columns, np.float64)).fillna(zero)
    return complete.astype(dict.fromkeys(COUNTS, np.int64)).reset_index()


def _strict(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as JSON knows them: null for NaN, "inf" for infinity, integers where they are counts."""
    return {key: _strict_number(value, key in COUNTS or key in _WHOLE) for key, value in values.items()}


_WHOLE = ("n", "n_infinite", "values", "classes")


def _strict_number(value: Any, whole: bool) -> int | float | str | None:
    if whole:
        return int(value)
    if math.isnan(value):
        return None
    return "inf" if math.isinf(value) else float(value)
