"""The table of the robustness protocol: means, losses under a shift, and what a method gains over plain prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ukbob_seg.benchmark.robustness_cases import JudgedCases, shift_seed
from ukbob_seg.benchmark.robustness_options import PLAIN, UNSHIFTED, RobustnessOptions
from ukbob_seg.benchmark.robustness_records import Scores, strict
from ukbob_seg.evaluation.metrics import COUNTS, METRICS
from ukbob_seg.evaluation.shift_strengths import definitions
from ukbob_seg.files import atomic_path, write_json
from ukbob_seg.inference.earlier import what_matters

MEAN = "mean of the shifts"
KEYS = ("case", "shift", "method", "class")


@dataclass(frozen=True)
class Gain:
    """A method against plain prediction, case by case.

    Attributes:
        mean: of the differences of the cases' mean Dice; NaN without cases.
        better: cases that gained.
        worse: cases that lost.
        cases: that have a Dice with both.
        worst: the lowest difference.
    """

    mean: float
    better: int
    worse: int
    cases: int
    worst: float

    @classmethod
    def of(cls, differences: pd.Series) -> Gain:
        """Of one difference per case, NaN where a Dice is lacking."""
        known = differences.dropna()
        better, worse = int((known > 0).sum()), int((known < 0).sum())
        return cls(_mean(known), better, worse, len(known), float(known.min()) if len(known) else float("nan"))


@dataclass(frozen=True)
class RobustnessTable:
    """All scores, and what they come to.

    A cell is the mean over cases of each case's mean over classes. Classes that neither map of a case has, and infinite
    distances (of classes that only one of them has), stay out; ``infinite`` counts the latter.

    Attributes:
        scores: one row per case, shift, method and class; columns ``KEYS`` and ``METRICS``.
        shifts: rows, the unshifted images first.
        methods: columns.
        classes: in the order of dataset.json.
    """

    scores: pd.DataFrame
    shifts: tuple[str, ...]
    methods: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def cases(self) -> tuple[str, ...]:
        """In order."""
        return tuple(self.scores["case"].unique())

    @property
    def shifted(self) -> tuple[str, ...]:
        """The shifts but for the unshifted images."""
        return tuple(name for name in self.shifts if name != UNSHIFTED)

    def by_case(self, metric: str = "dice") -> pd.DataFrame:
        """Mean over classes: a row per case, columns (shift, method)."""
        values = self.scores[metric].astype(float)
        finite = self.scores.assign(value=values.where(np.isfinite(values)))
        return finite.groupby(["case", "shift", "method"], sort=False)["value"].mean().unstack(["shift", "method"])

    def means(self, metric: str = "dice") -> pd.DataFrame:
        """A row per shift, then ``MEAN`` where there is a shift; a column per method."""
        table = self.by_case(metric).mean().unstack("method").reindex(index=self.shifts, columns=self.methods)
        if self.shifted:
            table.loc[MEAN] = table.loc[list(self.shifted)].mean()
        return table

    def changes(self) -> pd.DataFrame:
        """Of the mean Dice against that of the unshifted images with the same method: as ``means``, without its row."""
        means = self.means()
        return (means - means.loc[UNSHIFTED]).drop(index=UNSHIFTED)

    def infinite(self) -> pd.DataFrame:
        """Classes of cases that only one of the two maps has: as ``means``; ``MEAN`` has the mean, too."""
        values = self.scores.assign(value=np.isinf(self.scores["hd95"].astype(float)))
        table = values.groupby(["shift", "method"])["value"].sum().unstack("method")
        table = table.reindex(index=self.shifts, columns=self.methods)
        if self.shifted:
            table.loc[MEAN] = table.loc[list(self.shifted)].mean()
        return table

    @cached_property
    def gains(self) -> dict[tuple[str, str], Gain]:
        """(shift or ``MEAN``, method) -> gain over ``none``; empty without that method or without another."""
        if PLAIN not in self.methods:
            return {}
        dice = self.by_case()
        found: dict[tuple[str, str], Gain] = {}
        for method in self.methods:
            if method == PLAIN:
                continue
            differences = {shift: dice[shift, method] - dice[shift, PLAIN] for shift in self.shifts}
            found |= {(shift, method): Gain.of(values) for shift, values in differences.items()}
            if self.shifted:
                together = pd.DataFrame({shift: differences[shift] for shift in self.shifted})
                found[MEAN, method] = Gain.of(together.mean(axis=1))
        return found

    def by_class(self) -> pd.DataFrame:
        """A row per shift, method and class; the columns of ``robustness.csv``."""
        groups = self.scores.groupby(["shift", "method", "class"], sort=False)
        columns = {}
        for metric in ("dice", "nsd", "hd95"):
            values = self.scores[metric].astype(float)
            kept = self.scores.assign(value=values.where(np.isfinite(values)))
            columns[metric] = kept.groupby(["shift", "method", "class"], sort=False)["value"].agg(["count", "mean"])
        infinite = groups["hd95"].agg(lambda values: int(np.isinf(values).sum()))
        table = pd.DataFrame(
            {
                "n": columns["dice"]["count"],
                "mean_dice": columns["dice"]["mean"],
                "mean_nsd": columns["nsd"]["mean"],
                "mean_hd95_mm": columns["hd95"]["mean"],
                "n_infinite": infinite,
            }
        )
        order = pd.MultiIndex.from_product(
            [self.shifts, self.methods, self.classes], names=["shift", "method", "class"]
        )
        return table.reindex(order).reset_index()


def make_table(
    scores: Mapping[tuple[str, str, str], Scores],
    shifts: Sequence[str],
    methods: Sequence[str],
    classes: Sequence[str],
) -> RobustnessTable:
    """Of the scores of every (case, shift, method), in the order of cases."""
    rows = [
        {"case": case, "shift": shift, "method": method, "class": name, **values}
        for (case, shift, method), by_class in scores.items()
        for name, values in by_class.items()
    ]
    frame = pd.DataFrame(rows, columns=[*KEYS, *METRICS])
    frame = frame.astype({metric: np.int64 if metric in COUNTS else np.float64 for metric in METRICS})
    return RobustnessTable(frame, tuple(shifts), tuple(methods), tuple(classes))


def write_tables(
    folder: Path,
    table: RobustnessTable,
    judged: JudgedCases,
    options: RobustnessOptions,
    networks: Sequence[Mapping[str, Any]],
) -> None:
    """Write ``robustness.parquet`` (every score), ``.csv`` (means by class) and ``.json`` (the table and its origin).

    Args:
        folder: exists.
        table: what to write.
        judged: its cases.
        options: how they were predicted.
        networks: which networks predicted which cases, as plain values.
    """
    with atomic_path(folder / "robustness.parquet") as temporary:
        table.scores.to_parquet(temporary, index=False)
    by_class = table.by_class()
    with atomic_path(folder / "robustness.csv") as temporary:
        by_class.to_csv(temporary, index=False, na_rep="", lineterminator="\n")
    content = {
        "version": 1,
        "cases": len(table.cases),
        "cases_from": judged.source,
        "seed": options.seed,
        "shift_seeds": {case: shift_seed(case) for case in table.cases},
        "tolerance_mm": options.tolerance_mm,
        "networks": networks,
        "methods": {method: what_matters(options.settings(method)) for method in table.methods},
        "shifts": {shift: definitions()[shift] for shift in table.shifts},
        "table": _cells(table),
        "classes": by_class.to_dict("records"),
    }
    write_json(folder / "robustness.json", strict(content))


def plain(table: RobustnessTable) -> str:
    """For a terminal: Dice with its change from the unshifted images, then gains over ``none``."""
    means, changes = table.means(), table.changes()

    def cell(row: str, method: str) -> str:
        change = f" {changes.loc[row, method]:+.4f}" if row in changes.index else " " * 8 * bool(len(changes))
        return f"{means.loc[row, method]:.4f}{change}"

    text = [
        f"mean Dice of {count_cases(table)}" + (", and its change from the unshifted images" if len(changes) else ""),
        *_columns(
            ["shift", *table.methods],
            list(means.index),
            [[cell(row, method) for method in table.methods] for row in means.index],
        ),
    ]
    others = [method for method in table.methods if (UNSHIFTED, method) in table.gains]
    if others:
        cells = [[gain_text(table.gains[row, method]) for method in others] for row in means.index]
        text += [
            f"gain over {PLAIN}: mean (cases better / worse)",
            *_columns(["shift", *others], list(means.index), cells),
        ]
    return "\n".join(text)


def count_cases(table: RobustnessTable) -> str:
    """Such as ``20 cases``."""
    return f"{len(table.cases)} case{'' if len(table.cases) == 1 else 's'}"


def gain_text(gain: Gain) -> str:
    """Such as ``+0.0123 (15 / 5)``."""
    return f"{gain.mean:+.4f} ({gain.better} / {gain.worse})"


def _columns(header: Sequence[str], names: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(header[k + 1]), *(len(row[k]) for row in cells)) for k in range(len(header) - 1)]
    first = max(len(header[0]), *map(len, names))
    lines = [
        header[0].ljust(first) + "".join(f"  {name:>{width}}" for name, width in zip(header[1:], widths, strict=True))
    ]
    for name, row in zip(names, cells, strict=True):
        lines.append(name.ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    return [line.rstrip() for line in lines]


def _cells(table: RobustnessTable) -> list[dict[str, Any]]:
    """The table as plain values, a record per cell."""
    dice, changes, infinite = table.means(), table.changes(), table.infinite()
    nsd, hd95 = table.means("nsd"), table.means("hd95")
    scored = table.by_case().count()
    return [
        {
            "shift": row,
            "method": method,
            "dice": float(dice.loc[row, method]),
            "change": float(changes.loc[row, method]) if row in changes.index else 0.0,
            "nsd": float(nsd.loc[row, method]),
            "hd95_mm": float(hd95.loc[row, method]),
            "n_infinite": float(infinite.loc[row, method]),
            "cases": None if row == MEAN else int(scored[row, method]),
            "gain": vars(table.gains[row, method]) if (row, method) in table.gains else None,
        }
        for row in dice.index
        for method in table.methods
    ]


def _mean(values: pd.Series) -> float:
    return float(values.mean()) if len(values) else float("nan")
