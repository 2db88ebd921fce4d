"""The numbers of a scaling study: a row per run from its summary.json, means over seeds, and a fitted line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ukbob_seg.benchmark.scaling import DOWNSTREAM, SUBSETS, Run, ScalingStudy
from ukbob_seg.errors import DatasetError, listing
from ukbob_seg.evaluation.summary import OVERALL
from ukbob_seg.files import atomic_path, read_json, write_json
from ukbob_seg.training.setup import DESCRIPTION

TABLE, CONTENT, PAGE = "scaling.csv", "scaling.json", "scaling.html"
COLUMNS = ("stage", "dataset", "fraction", "training_cases", "seed", "validation_cases", *OVERALL, "n_infinite")
FEWEST_SIZES = 3  # different sizes that a line is fitted to


@dataclass(frozen=True)
class Fit:
    """Least squares of Dice = a + b log10(n) over all runs of a stage.

    Attributes:
        a: Dice at one training case, as the line has it.
        b: gain per factor of ten.
        residual_sd: root of the sum of squared residuals over (runs - 2); NaN for two runs.
        smallest: training cases of the smallest run.
        largest: of the largest; beyond both the line says nothing.
    """

    a: float
    b: float
    residual_sd: float
    smallest: float
    largest: float

    def at(self, cases: float) -> float:
        """Dice of the line."""
        return self.a + self.b * math.log10(cases)


@dataclass(frozen=True)
class ScalingResults:
    """What a study found.

    Attributes:
        study: settings.
        table: a row per run, ``COLUMNS``; fraction 0 and no training cases for fresh weights. ``training_cases`` are
            those of the first stage, ``dice`` to ``assd`` means over classes, ``n_infinite`` infinite HD.
        classes: a row per run and class: stage, fraction, seed, class, dice.
    """

    study: ScalingStudy
    table: pd.DataFrame
    classes: pd.DataFrame

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that the study has, ``subsets`` first."""
        return tuple(stage for stage in (SUBSETS, DOWNSTREAM) if (self.table["stage"] == stage).any())

    def of_stage(self, stage: str, metric: str = "dice") -> pd.DataFrame:
        """One row per fraction: mean, sd (sample, NaN for one seed), seeds and mean training_cases."""
        rows = self.table[self.table["stage"] == stage]
        groups = rows.groupby("fraction")
        found = groups[metric].agg(["mean", "std", "count"])
        found.columns = pd.Index(["mean", "sd", "seeds"])
        return found.assign(training_cases=groups["training_cases"].mean())

    def class_means(self, stage: str) -> pd.DataFrame:
        """Dice, mean over seeds: a row per class in reporting order, a column per fraction."""
        rows = self.classes[self.classes["stage"] == stage]
        order = list(dict.fromkeys(rows["class"]))
        return rows.pivot_table(index="class", columns="fraction", values="dice", dropna=False).reindex(order)

    def fit(self, stage: str) -> Fit | None:
        """The line of a stage; None with fewer than three different sizes, or a Dice that is not known."""
        rows = self.table[(self.table["stage"] == stage) & (self.table["fraction"] > 0)]
        return fit_line(rows["training_cases"].to_numpy(float), rows["dice"].to_numpy(float))

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: NaN is null, infinity does not occur in means."""
        study = self.study
        stages = {SUBSETS: study.upstream, DOWNSTREAM: study.downstream}
        return {
            "version": 1,
            "configuration": study.configuration,
            "network": study.network,
            "checkpoint": study.checkpoint,
            "stages": {
                name: {
                    "dataset": stage.dataset,
                    "fold": stage.fold,
                    "steps": stage.config.epochs * stage.config.iterations_per_epoch,
                    "recipe": stage.config.to_json(),
                    "means": [_plain(row) for row in self.of_stage(name).reset_index().to_dict("records")],
                    "classes": {
                        str(key): {f"{fraction:g}": _number(value) for fraction, value in row.items()}
                        for key, row in self.class_means(name).iterrows()
                    },
                    "fit": None if (fit := self.fit(name)) is None else _plain(vars(fit)),
                }
                for name in self.stages
                if (stage := stages[name]) is not None
            },
            "runs": [_plain(row) for row in self.table.to_dict("records")],
        }

    def write(self, output: Path) -> None:
        """Write scaling.csv (an unknown value is an empty cell) and scaling.json."""
        with atomic_path(output / TABLE) as temporary:
            self.table.to_csv(temporary, index=False, na_rep="")
        write_json(output / CONTENT, self.to_json())


def collect_results(study: ScalingStudy, runs: Iterable[Run]) -> ScalingResults:
    """Read what runs left.

    Args:
        study: of the runs.
        runs: at least one, all finished.

    Raises:
        DatasetError: a run is not finished, or its files are damaged.
    """
    runs = list(runs)
    if lacking := [run.name for run in runs if not run.is_finished]:
        raise DatasetError(f"{len(lacking)} runs are not finished: {listing(lacking, 3)}; run ukbob_benchmark scaling")
    rows, classes = [], []
    for run in runs:
        row, of_classes = _read(run)
        rows.append(row)
        classes += of_classes
    table = pd.DataFrame(rows, columns=COLUMNS).sort_values(
        ["stage", "fraction", "seed"], ascending=[False, True, True], ignore_index=True
    )
    return ScalingResults(study, table, pd.DataFrame(classes))


def _read(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of a run, and those of its classes."""
    path = run.folder / "validation" / "summary.json"
    summary, source = read_json(path, "summary of a run"), run.source
    seen = run if source is None else source
    key = {"stage": run.kind, "fraction": run.fraction, "seed": run.seed}
    try:
        cases = read_json(seen.folder / DESCRIPTION, "description of a run")["cases"] if run.fraction else []
        means = {metric: _value(summary["overall"][metric]["mean"]) for metric in OVERALL}
        row = {
            **key,
            "dataset": run.stage.dataset,
            "training_cases": len(cases),
            "validation_cases": summary["cases"],
            **means,
            "n_infinite": summary["overall"]["hd"]["n_infinite"],
        }
        names = summary["classes"].items()
        return row, [{**key, "class": name, "dice": _value(entry["dice"]["mean"])} for name, entry in names]
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path} is not a summary of this version ({error}); delete {run.folder}") from error


def fit_line(cases: np.ndarray, dice: np.ndarray) -> Fit | None:
    """Fit Dice = a + b log10(n).

    Args:
        cases: (runs,) training cases, at least 1 each.
        dice: (runs,).

    Returns:
        None with fewer than ``FEWEST_SIZES`` different sizes, or values that are not finite.
    """
    if len(np.unique(cases)) < FEWEST_SIZES or not np.isfinite(dice).all():
        return None
    powers = np.stack([np.ones(len(cases)), np.log10(cases)], axis=1)
    (a, b), *_ = np.linalg.lstsq(powers, dice, rcond=None)
    left = dice - powers @ np.array([a, b])
    freedom = len(dice) - 2
    sd = math.sqrt(float(left @ left) / freedom) if freedom else math.nan
    return Fit(float(a), float(b), sd, float(cases.min()), float(cases.max()))


def _value(number: float | None) -> float:
    return math.nan if number is None else float(number)


def _number(value: Any) -> Any:
    """As strict JSON has it."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): _number(value) for key, value in values.items()}


def table_lines(results: ScalingResults) -> Sequence[str]:
    """The short table for a terminal."""
    lines = [f"{'fraction':>8}  {'cases':>7}  {'seeds':>5}" + "".join(f"  {_title(s):>17}" for s in results.stages)]
    means = {stage: results.of_stage(stage) for stage in results.stages}
    first = means[results.stages[0]]
    for fraction in sorted({*results.table["fraction"]}):
        known = first if fraction in first.index else means[results.stages[-1]]
        row = known.loc[fraction]
        cells = "".join(f"  {mean_sd(means[stage], fraction):>17}" for stage in results.stages)
        lines.append(f"{fraction:>8g}  {row['training_cases']:>7g}  {int(row['seeds']):>5}{cells}")
    return lines


def _title(stage: str) -> str:
    return "Dice" if stage == SUBSETS else "Dice downstream"


def mean_sd(means: pd.DataFrame, fraction: float) -> str:
    """``0.812 ± 0.004``, without the second for one seed; a dash where there is no run."""
    if fraction not in means.index or not math.isfinite(means.loc[fraction, "mean"]):
        return "-"
    mean, sd = means.loc[fraction, "mean"], means.loc[fraction, "sd"]
    return f"{mean:.4f}" + (f" ± {sd:.4f}" if math.isfinite(sd) else "")
