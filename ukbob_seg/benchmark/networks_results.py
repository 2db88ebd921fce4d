"""The numbers of a comparison of networks: a row per run, a row per network as in the paper's tables."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ukbob_seg.benchmark.networks import NetworkRun, NetworkStudy
from ukbob_seg.benchmark.networks_run import RECORD
from ukbob_seg.benchmark.table import paper_table, write_table
from ukbob_seg.errors import DatasetError, listing
from ukbob_seg.evaluation.summary import OVERALL
from ukbob_seg.files import atomic_path, read_json, write_json
from ukbob_seg.training.state import CURVES

RUNS, CONTENT, TABLE, PAGE = "networks.csv", "networks.json", "networks.md", "networks.html"
MEASURED = ("parameters", "peak_gb", "patch_size", "batch_size", "device")
COLUMNS = ("network", "fold", "seed", "cases", *OVERALL, "n_infinite", "training_seconds", *MEASURED)
AVERAGED = ("dice", "hd", "hd95", "nsd")
HEADER = ["system", "source", "Dice", "HD mm", "HD95 mm", "NSD", "n infinite", "runs", "parameters M", "training h",
          "memory GiB", "patch", "batch"]  # fmt: skip


@dataclass(frozen=True)
class NetworkResults:
    """What a comparison found.

    Attributes:
        study: settings.
        table: a row per run, ``COLUMNS``.
        classes: a row per run and class: network, fold, seed, class, dice.
    """

    study: NetworkStudy
    table: pd.DataFrame
    classes: pd.DataFrame

    @property
    def networks(self) -> list[str]:
        """In the order that they were asked for; those with a finished run."""
        there = set(self.table["network"])
        return [network for network in self.study.recipes if network in there]

    def of_network(self, network: str) -> dict[str, Any]:
        """Means over runs, ``X_sd`` (sample, NaN for one run), largest peak, and what is equal in all runs."""
        rows = self.table[self.table["network"] == network]
        found: dict[str, Any] = {"network": network, "runs": len(rows)}
        for metric in AVERAGED:
            found[metric], found[f"{metric}_sd"] = float(rows[metric].mean()), float(rows[metric].std())
        first = rows.iloc[0]
        return {
            **found,
            "n_infinite": int(rows["n_infinite"].sum()),
            "training_seconds": float(rows["training_seconds"].mean()),
            "peak_gb": float(rows["peak_gb"].max()),
            **{name: first[name] for name in ("parameters", "patch_size", "batch_size")},
            "device": "/".join(dict.fromkeys(rows["device"])),
        }

    def class_means(self) -> pd.DataFrame:
        """Dice, mean over runs: a row per class in reporting order, a column per network."""
        order = list(dict.fromkeys(self.classes["class"]))
        found = self.classes.pivot_table(index="class", columns="network", values="dice", dropna=False)
        return found.reindex(index=order, columns=self.networks)

    def cells(self, paper: str | None = None) -> list[list[str]]:
        """Header and rows as text, in the paper's layout; its own rows of a table first, where one is named."""
        content = [list(HEADER)]
        if paper is not None:
            for row in paper_table(paper).rows:
                distance = "-" if row.hd_mm is None else f"{row.hd_mm:.2f}"
                content.append([row.system, "paper", f"{row.dice:.3f}", distance, *["-"] * (len(HEADER) - 4)])
        for network in self.networks:
            found = self.of_network(network)
            scores = [mean_sd(found, metric, digits) for metric, digits in zip(AVERAGED, (3, 2, 2, 3), strict=True)]
            content.append(
                [
                    network, "you", *scores, str(found["n_infinite"]), str(found["runs"]),
                    f"{found['parameters'] / 1e6:.1f}", f"{found['training_seconds'] / 3600:.2f}",
                    f"{found['peak_gb']:.2f}", found["patch_size"], str(found["batch_size"]),
                ]
            )  # fmt: skip
        return content

    def to_json(self, failed: Mapping[str, str]) -> dict[str, Any]:
        """Strict JSON: NaN is null."""
        study = self.study
        recipe = next(iter(study.recipes.values()))
        return {
            "version": 1,
            "dataset": study.dataset,
            "configuration": study.configuration,
            "checkpoint": study.checkpoint,
            "steps": recipe.epochs * recipe.iterations_per_epoch,
            "recipes": {network: config.to_json() for network, config in study.recipes.items()},
            "networks": [_plain(self.of_network(network)) for network in self.networks],
            "classes": {
                str(name): {str(network): _number(value) for network, value in row.items()}
                for name, row in self.class_means().iterrows()
            },
            "runs": [_plain(row) for row in self.table.to_dict("records")],
            "failed": dict(failed),
        }

    def write(self, output: Path, failed: Mapping[str, str], paper: str | None = None) -> None:
        """Write networks.csv (a row per run), networks.json and networks.md (the table)."""
        with atomic_path(output / RUNS) as temporary:
            self.table.to_csv(temporary, index=False, na_rep="")
        write_json(output / CONTENT, self.to_json(failed))
        notes = [f"{name} failed: {message.rstrip('.')}" for name, message in failed.items()]
        title = self.study.dataset if paper is None else f"{self.study.dataset}, beside {paper_table(paper).title}"
        write_table(output / TABLE, title, self.cells(paper), notes)


def collect_results(study: NetworkStudy, runs: Iterable[NetworkRun]) -> NetworkResults:
    """Read what finished runs left.

    Raises:
        DatasetError: none is finished, or the files of one are damaged.
    """
    runs = list(runs)
    if not runs:
        raise DatasetError("no run is finished, so that there is nothing to compare")
    if lacking := [run.name for run in runs if not run.is_finished]:
        raise DatasetError(f"{len(lacking)} runs are not finished: {listing(lacking, 3)}")
    rows, classes = [], []
    for run in runs:
        row, of_classes = _read(run)
        rows.append(row)
        classes += of_classes
    return NetworkResults(study, pd.DataFrame(rows, columns=list(COLUMNS)), pd.DataFrame(classes))


def _read(run: NetworkRun) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of a run, and those of its classes."""
    summary, measured = read_json(run.summary, "summary of a run"), read_json(run.folder / RECORD, "record of a run")
    key = {"network": run.network, "fold": run.fold, "seed": run.seed}
    try:
        with (run.folder / CURVES[0]).open(encoding="utf-8", newline="") as file:
            seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
        means = {metric: _value(summary["overall"][metric]["mean"]) for metric in OVERALL}
        row = {
            **key,
            "cases": summary["cases"],
            **means,
            "n_infinite": summary["overall"]["hd"]["n_infinite"],
            "training_seconds": seconds,
            **{name: measured[name] for name in MEASURED},
            "patch_size": "x".join(map(str, measured["patch_size"])),
        }
        entries = summary["classes"].items()
        return row, [{**key, "class": name, "dice": _value(entry["dice"]["mean"])} for name, entry in entries]
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise DatasetError(f"{run.folder} is not a run of this version ({error}); delete it") from error


def mean_sd(found: Mapping[str, Any], metric: str, digits: int) -> str:
    """``0.812 ± 0.004``, without the second for one run; a dash where the mean is not known."""
    mean, sd = found[metric], found[f"{metric}_sd"]
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if math.isfinite(sd) else "")


def _value(number: float | None) -> float:
    return math.nan if number is None else float(number)


def _number(value: Any) -> Any:
    """As strict JSON has it."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): _number(value) for key, value in values.items()}


def definitions(study: NetworkStudy) -> Sequence[str]:
    """What the numbers mean, for the page."""
    chosen = (
        "Scored: the last checkpoint, which no scored case has chosen."
        if study.checkpoint == "final"
        else "Scored: the checkpoint with the best validation Dice, which held-out cases have chosen."
    )
    recipe = next(iter(study.recipes.values()))
    return [
        f"Budget: {recipe.epochs} epochs of {recipe.iterations_per_epoch} steps for every network. A step is a batch "
        "of patches, whose sizes the planner chose for each network under one memory budget: see patch and batch.",
        "Dice, HD, HD95, NSD: mean over classes of each class's mean over cases, as ukbob_evaluate gives them; "
        "distances over finite ones. ± sample standard deviation over runs, that is folds and seeds.",
        "n infinite: class and case pairs that only one of both maps has, of all runs.",
        "Training h: mean over runs, with the validations within training. Memory: on a CPU the peak resident size of "
        "the process that trained, on CUDA the most that was allocated; the largest of the runs.",
        chosen,
    ]
