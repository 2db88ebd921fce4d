"""From the metrics of single cases to tables and means that no absent class and no missed organ can spoil."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ukbob_seg.errors import DatasetError
from ukbob_seg.evaluation.metrics import COUNTS, DIFFERENCES, DISTANCES, METRICS, OVERLAPS, VOLUMES, absent_from_both
from ukbob_seg.files import atomic_path, write_json

SUMMARISED = (*OVERLAPS, *DISTANCES, *DIFFERENCES, *VOLUMES)
OVERALL = (*OVERLAPS, *DISTANCES)


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
        table: one row per case and class; columns case, class and ``METRICS``.
        classes: class name -> file values, in reporting order.
        tolerance_mm: of the normalized surface Dice.
        files: case -> (prediction, reference).
        missing: cases without a prediction; they enter no mean.
        unmatched: predictions without a reference; not scored.
        ignore_value: file value in the reference that marks voxels left out.
    """

    table: pd.DataFrame
    classes: Mapping[str, tuple[int, ...]]
    tolerance_mm: float
    files: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    ignore_value: int | None = None

    @property
    def cases(self) -> tuple[str, ...]:
        """Scored cases, in order."""
        return tuple(self.table["case"].unique())

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

    def mean(self, metric: str = "dice") -> float:
        """The headline number: ``overall(metric).mean``."""
        return self.overall(metric).mean

    def case_means(self, metric: str = "dice") -> pd.Series:
        """Mean over classes for every case (finite values only); NaN for a case without any."""
        values = self.table[metric].where(np.isfinite(self.table[metric].astype(np.float64)))
        return values.groupby(self.table["case"], sort=False).mean()

    def to_json(self) -> dict[str, Any]:
        """Content for a strict JSON file: NaN becomes null, an infinite distance the string "inf"."""
        statistics = {metric: self.statistics(metric) for metric in SUMMARISED}
        return {
            "version": 1,
            "tolerance_mm": self.tolerance_mm,
            "cases": len(self.cases),
            "missing_predictions": list(self.missing),
            "predictions_without_reference": list(self.unmatched),
            "absent_classes": list(self.absent_classes),
            "overall": {metric: _strict(vars(self.overall(metric))) for metric in OVERALL},
            "classes": {
                name: {
                    "values": list(values),
                    **{metric: _strict(table.loc[name].to_dict()) for metric, table in statistics.items()},
                }
                for name, values in self.classes.items()
            },
            "per_case": [
                {
                    "case": case,
                    "prediction": self.files.get(case, ("", ""))[0],
                    "reference": self.files.get(case, ("", ""))[1],
                    "classes": {
                        row["class"]: _strict({metric: row[metric] for metric in METRICS})
                        for row in rows.to_dict("records")
                    },
                }
                for case, rows in self.table.groupby("case", sort=False)
            ],
        }

    def write(self, folder: Path) -> None:
        """Write ``summary.json`` and ``metrics.csv`` (empty cell: NaN; ``inf``: infinite) into ``folder``."""
        write_json(Path(folder) / "summary.json", self.to_json())
        with atomic_path(Path(folder) / "metrics.csv") as temporary:
            self.table.to_csv(temporary, index=False, na_rep="")


def collect(
    cases: Sequence[CaseMetrics],
    classes: Mapping[str, int | Sequence[int]] | None = None,
    tolerance_mm: float = 2.0,
    *,
    missing: Sequence[str] = (),
    unmatched: Sequence[str] = (),
    ignore_value: int | None = None,
) -> EvaluationSummary:
    """Put the metrics of all cases into one summary.

    Args:
        cases: at least one; a class that a case does not list counts as absent from both of its maps.
        classes: class name -> file value or values, in reporting order; None takes the names found, with no values.
        tolerance_mm: that the cases were scored with.
        missing: cases without a prediction.
        unmatched: predictions without a reference.
        ignore_value: that the cases were scored with.

    Raises:
        DatasetError: no case, no class, a case twice, or a case that lists a class that ``classes`` does not have.
    """
    if not cases:
        raise DatasetError("there is no case to summarise")
    names: dict[str, tuple[int, ...]]
    if classes is None:
        names = {name: () for case in cases for name in case.metrics}
    else:
        names = {name: (v,) if isinstance(v, (int, np.integer)) else tuple(v) for name, v in classes.items()}
    if not names:
        raise DatasetError("there is no class to summarise: neither prediction nor reference has any foreground")
    rows = []
    seen: set[str] = set()
    for case in cases:
        unknown = [name for name in case.metrics if name not in names]
        if unknown or case.case in seen:
            reason = f"has unknown classes {unknown}" if unknown else "is listed twice"
            raise DatasetError(f"case {case.case} {reason}")
        seen.add(case.case)
        rows += [{"case": case.case, "class": name, **(case.metrics.get(name) or absent_from_both())} for name in names]
    table = pd.DataFrame(rows, columns=["case", "class", *METRICS])
    table = table.astype({metric: np.int64 if metric in COUNTS else np.float64 for metric in METRICS})
    files = {case.case: (case.prediction, case.reference) for case in cases}
    return EvaluationSummary(table, names, tolerance_mm, files, tuple(missing), tuple(unmatched), ignore_value)


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
