"""Does adaptation help, and when? Trained networks under nine conditions, with and without test-time adaptation.

    python benchmarks/etta_networks.py --dataset DIR/Dataset004_Hippocampus --work DIR     # first: trains them
    python benchmarks/etta_study.py --dataset DIR/Dataset004_Hippocampus --work DIR
    python benchmarks/etta_study.py --dataset DIR/Dataset004_Hippocampus --work DIR --report
    python benchmarks/etta_study.py ... --networks batch_0 --cases 4 --methods none default    # a quick look
    python benchmarks/etta_study.py ... --cases 8 --methods ablations    # the defaults without one of their parts each

Test cases are drawn by seed. Each is shifted (``ukbob_seg/evaluation/shifts.py``) and predicted by every network with
every method, through the package's ``Predictor``; the score is the mean Dice of the two classes at the file's
resolution. Every result is kept in a table as it comes, and not computed again with the same settings; after a change
of code delete the table. ``--report`` prints the tables and the bars that the defaults were built to reach, and draws
``study.png``. Start several processes with other ``--networks`` to use several cores. ``--others`` takes cases that are
not drawn: rates and limits were chosen with these.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from etta_networks import NETWORKS, StudyNetwork

from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.evaluation.shifts import SHIFTS, apply_shift
from ukbob_seg.inference.etta import EttaConfig
from ukbob_seg.inference.predictor import PredictionSettings, Predictor

METHODS = {
    "none": PredictionSettings(),
    "TTA": PredictionSettings(tta=True),
    "statistics only": PredictionSettings(etta=EttaConfig.of_mode("paper", steps=0)),
    "paper": PredictionSettings(etta=EttaConfig.of_mode("paper")),
    "default": PredictionSettings(etta=EttaConfig()),
    "default + TTA": PredictionSettings(etta=EttaConfig(), tta=True),
}
LARGE: dict[str, Any] = {"steps": 10, "learning_rate": 1e-2}
ABLATIONS = {
    "no field step": EttaConfig(least_field_gain=None),
    "field step always": EttaConfig(least_field_gain=0.0, least_field_spread=0.0, field_margin=0.0),
    "windows are not chosen": EttaConfig(candidates=EttaConfig().max_patches),
    "windows count alike": EttaConfig(weigh_windows=False),
    "a quarter of the case's statistics": EttaConfig(statistics_share=0.25),
    "half of them": EttaConfig(statistics_share=0.5),
    "three quarters": EttaConfig(statistics_share=0.75),
    "statistics of the case alone": EttaConfig(statistics_share=1.0),
    "no entropy steps": EttaConfig(steps=0),
    "entropy of all voxels": EttaConfig(certain_background=1.0),
    "rate 1e-3": EttaConfig(learning_rate=1e-3),
    "rate 4e-3": EttaConfig(learning_rate=4e-3),
    "twice the steps": EttaConfig(steps=2 * EttaConfig().steps),
    "entropy may rise": EttaConfig(stop_early=False),
    "any drift": EttaConfig(most_drift=math.inf),
    "no fall-back": EttaConfig(least_foreground=0.0),
    "large steps": EttaConfig(**LARGE),
    "large steps, entropy may rise": EttaConfig(**LARGE, stop_early=False),
    "large steps, any drift": EttaConfig(**LARGE, most_drift=math.inf),
    "large steps, no guard": EttaConfig(**LARGE, stop_early=False, most_drift=math.inf, least_foreground=0.0),
}
SETTINGS = {**METHODS, **{name: PredictionSettings(etta=config) for name, config in ABLATIONS.items()}}
COLUMNS = ("network", "shift", "case", "method", "digest", "dice", "decision", "field", "share", "steps", "growth",
           "seconds")  # fmt: skip
WORST_LOSS, DRAWN = 0.05, 20


def draw_cases(dataset: Path, count: int, seed: int, after: int = 0) -> list[str]:
    """Names of some test cases; after so many others."""
    names = sorted(path.name.removesuffix(".nii.gz") for path in (dataset / "labelsTs").glob("*.nii.gz"))
    return sorted(np.random.default_rng(seed).permutation(names)[after : after + count].tolist())


def mean_dice(labels: np.ndarray, truth: np.ndarray) -> float:
    """Of the two classes."""
    scores = []
    for value in (1, 2):
        found, true = labels == value, truth == value
        scores.append(2 * np.count_nonzero(found & true) / max(1, np.count_nonzero(found) + np.count_nonzero(true)))
    return float(np.mean(scores))


def run(network: StudyNetwork, options: argparse.Namespace, cases: list[str]) -> None:
    """Every case, shift and method that is not in the network's table yet."""
    table = options.work / "study" / f"{network.name}.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    if not table.is_file():
        table.write_text(",".join(COLUMNS) + "\n")
    known = pd.read_csv(table)
    done = set(zip(known["shift"], known["case"], known["method"], known["digest"], strict=True))
    folder = network.model_folder(options.work, options.dataset.name)
    predictors = {
        method: Predictor.from_model_folder(folder, ["all"], "final", options.device, SETTINGS[method])
        for method in options.methods
    }
    for case in cases:
        image, geometry = read_image([options.dataset / "imagesTs" / f"{case}_0000.nii.gz"])
        truth, _ = read_labels(options.dataset / "labelsTs" / f"{case}.nii.gz")
        for shift in SHIFTS:
            shifted = apply_shift(image, shift, geometry.spacing_mm, seed=int(case.rsplit("_", 1)[1]))
            for method, predictor in predictors.items():
                digest = zlib.crc32(repr(SETTINGS[method]).encode())
                if (shift, case, method, digest) in done:
                    continue
                start = time.perf_counter()
                prediction = predictor.predict_array(shifted, geometry)
                seconds = time.perf_counter() - start
                record = prediction.etta[0] if prediction.etta else {}
                before, after = record.get("foreground_before", 0), record.get("foreground_after", 0)
                row = (network.name, shift, case, method, digest, f"{mean_dice(prediction.labels, truth):.5f}",
                       record.get("decision", ""), record.get("field_decision", ""),
                       record.get("statistics_share", ""), record.get("steps", ""),
                       f"{after / before:.3f}" if before else "", f"{seconds:.2f}")  # fmt: skip
                with open(table, "a", newline="") as file:
                    csv.writer(file).writerow(row)
        print(f"{network.name}: {case}", flush=True)


def report(work: Path) -> None:
    """Print means by network, shift and method, and the bars; draw the picture."""
    rows = pd.concat([pd.read_csv(path) for path in sorted((work / "study").glob("*.csv"))])
    current = {method: zlib.crc32(repr(settings).encode()) for method, settings in SETTINGS.items()}
    rows = rows[rows["digest"] == rows["method"].map(current)]  # not those of settings that were changed since
    rows["kind"] = rows["network"].str.split("_").str[0]
    ablations(rows)
    rows = rows[rows["method"].isin(METHODS)]
    methods = [method for method in METHODS if method in set(rows["method"])]
    cases = rows.groupby("network")["case"].nunique()
    print("networks and cases:", ", ".join(f"{name} {count}" for name, count in cases.items()), "\n")
    means = rows.groupby(["kind", "shift", "method"])["dice"].mean().unstack("method")[methods]
    for kind, part in means.groupby(level="kind"):
        print(f"| {kind} | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}")
        part = part.droplevel("kind").reindex(SHIFTS)
        part.loc["mean of the shifts"] = part.drop(index="none").mean()
        for name, values in part.iterrows():
            shift = "no shift" if name == "none" else name
            print(f"| {shift} | {' | '.join(f'{value:.4f}' for value in values)} |")
        print()
    seconds = rows.groupby(["kind", "method"])["seconds"].median().unstack("method")[methods]
    print("median seconds per case\n", seconds.round(2).to_string(), "\n")
    if {"none", "default"} <= set(methods):
        bars(rows, means)
        by_growth(rows)
    draw(means, work / "study" / "study.png")


def ablations(rows: pd.DataFrame) -> None:
    """What each part of the defaults is good for, on the networks and cases that were predicted without it."""
    wide = rows.pivot_table(index=["kind", "network", "shift", "case"], columns="method", values="dice")
    names = [name for name in ABLATIONS if name in wide]
    if not names:
        return
    wide = wide.dropna(subset=[*names, "default", "none"])
    gain = wide[["default", *names]].sub(wide["none"], axis=0)
    for kind, part in gain.groupby(level="kind"):
        cases = part.index.unique("case")
        print(f"| {kind}: gain over no adaptation, {len(cases)} cases | no shift | bias field | mean of the shifts |")
        print("|---|---|---|---|")
        means = part.groupby(level="shift").mean()
        for name in means:
            shifts = means[name].drop("none").mean()
            print(f"| {name} | {means[name]['none']:+.4f} | {means[name]['bias field']:+.4f} | {shifts:+.4f} |")
        print()
    for name in gain:
        lost = (wide["none"] >= 0.5) & (gain[name] < -WORST_LOSS)
        print(
            f"{name}: {int(lost.sum())} of {len(gain)} lose more than {WORST_LOSS}; the worst {gain[name].min():+.3f}"
        )
    print()


def bars(rows: pd.DataFrame, means: pd.DataFrame) -> None:
    """What the defaults must reach, and do."""
    gain = (means["default"] - means["none"]).unstack("kind")
    shifts = [name for name in SHIFTS if name != "none"]
    print(f"default - none, no shift, mean over networks: {gain.loc['none'].mean():+.4f} (bar -0.002)")
    print(f"default - none, mean of the shifts and networks: {gain.loc[shifts].to_numpy().mean():+.4f} (bar +0.02)")
    if "TTA" in means:
        over = (means["TTA"] - means["none"]).unstack("kind").loc[shifts].to_numpy().mean()
        print(f"TTA - none, mean of the shifts and networks: {over:+.4f} (bar: less than default)")
    if "batch" in gain:
        print(f"BatchNorm under the bias field: {gain.loc['bias field', 'batch']:+.4f} (bar +0.35)")
    wide = rows.pivot_table(index=["network", "shift", "case"], columns="method", values="dice")
    lost = wide[(wide["none"] >= 0.5) & (wide["default"] < wide["none"] - WORST_LOSS)]
    print(f"cases that lose more than {WORST_LOSS} from 0.5 or more: {len(lost)} of {len(wide)} (bar 0)")
    if len(lost):
        print(lost[["none", "default"]].round(3).to_string())


def by_growth(rows: pd.DataFrame) -> None:
    """Whether cases lose whose foreground, in the chosen windows, changed much: what a guard could go by."""
    wide = rows.pivot_table(index=["network", "shift", "case"], columns="method", values="dice")
    growth = rows[rows["method"] == "default"].set_index(["network", "shift", "case"])["growth"]
    gain = wide["default"] - wide["none"]
    ranges = pd.cut(growth.reindex(gain.index), [0, 0.5, 0.75, 1.33, 2, math.inf])
    print("\nforeground after / before   cases   mean gain   worst")
    for name, part in gain.groupby(ranges, observed=True):
        print(f"{name!s:27} {len(part):5}   {part.mean():+.4f}     {part.min():+.3f}")


def draw(means: pd.DataFrame, path: Path) -> None:
    """One panel per kind of network: Dice of each method under each condition."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kinds = list(means.index.unique("kind"))
    figure = Figure(figsize=(4.2 * len(kinds), 4.4))
    colours = dict(zip(means.columns, ("#8a939d", "#e3a857", "#7bb274", "#d1495b", "#1f6feb", "#123a7a"), strict=False))
    axes = np.atleast_1d(figure.subplots(1, len(kinds), sharey=True))
    for axis, kind in zip(axes, kinds, strict=True):
        part = means.loc[kind].reindex(SHIFTS)
        for offset, method in enumerate(part.columns):
            places = np.arange(len(part)) + (offset - len(part.columns) / 2) * 0.13
            axis.plot(part[method], places, "o", ms=5, color=colours[method], label=method)
        axis.set_yticks(range(len(part)), ["no shift" if name == "none" else name for name in part.index])
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(alpha=0.25)
        axis.set_title(kind)
        axis.set_xlabel("mean Dice")
    axes[0].invert_yaxis()  # of all, which share it
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, ncol=len(names), frameon=False, loc="lower center")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    print(f"-> {path}")


def main() -> None:
    """Parse, then predict or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", type=Path, required=True, help="raw hippocampus dataset with imagesTs and labelsTs"
    )
    parser.add_argument("--work", type=Path, required=True, help="the folder of etta_networks.py")
    parser.add_argument("--networks", nargs="+", default=[network.name for network in NETWORKS])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=[*SETTINGS, "ablations"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--cases", type=int, default=DRAWN)
    parser.add_argument("--seed", type=int, default=0, help="draws the cases")
    parser.add_argument("--others", action="store_true", help="cases that the study does not draw")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if "ablations" in options.methods:
        options.methods = ["none", "default", *ABLATIONS]
    if not options.report:
        cases = draw_cases(options.dataset, options.cases, options.seed, DRAWN if options.others else 0)
        for network in NETWORKS:
            if network.name in options.networks:
                run(network, options, cases)
    report(options.work)


if __name__ == "__main__":
    main()
