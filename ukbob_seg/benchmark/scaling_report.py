"""The page of a scaling study: Dice against the number of training cases, and what every class gained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ukbob_seg.benchmark.scaling import DOWNSTREAM, SUBSETS, Stage
from ukbob_seg.benchmark.scaling_results import Fit, ScalingResults, mean_sd
from ukbob_seg.drawing import hide_spines
from ukbob_seg.report_page import ReportPage

_RUN, _MEAN, _FIT, _FRESH, _INK = "#3b6ea5", "#1d2733", "#d1495b", "#7a8691", "#1d2733"
LOG_FROM = 4  # largest over smallest number of cases, from which their axis is logarithmic
LEAST_SPAN = 0.04  # of the Dice axis, so that noise does not fill it
FARTHEST = 3  # spans of the runs that fresh weights may lie away from them, to be on the axis
LEAST_GAP = 0.07  # between labels of the x axis, as a share of its length


def write_report(path: Path, results: ScalingResults) -> None:
    """Write the self-contained HTML page."""
    study = results.study
    seeds = len(set(results.table["seed"]))
    page = ReportPage(
        "Scaling study",
        f"{study.upstream.dataset}, {study.configuration}, {study.network}: {len(results.table)} runs, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}.",
    )
    page.tiles(_tiles(results))
    for stage in results.stages:
        _stage_section(page, results, stage)
    page.heading("Runs")
    rows = results.table
    shown = ["stage", "fraction", "training_cases", "seed", "validation_cases", "dice", "nsd", "hd95", "n_infinite"]
    header = ["stage", "fraction", "training cases", "seed", "scored cases", "Dice", "NSD", "HD95 mm", "n infinite"]
    page.table(header, [_texts(row) for row in rows[shown].to_dict("records")])
    page.heading("Definitions")
    page.bullets(_definitions(results))
    page.write(path)


def scaling_figure(results: ScalingResults, stage: str) -> Figure:
    """Dice of every run and their means against the number of training cases of the first stage."""
    rows = results.table[(results.table["stage"] == stage) & (results.table["fraction"] > 0)]
    means = results.of_stage(stage)
    means = means[means.index > 0]
    figure = Figure(figsize=(8.2, 4.4), layout="constrained")
    axis = figure.subplots()
    fit = results.fit(stage)
    if fit is not None:
        _draw_fit(axis, fit)
    cases = means["training_cases"].to_numpy(float)
    for _, own in rows.groupby("seed"):  # seeds often differ by more than sizes do
        own = own.sort_values("training_cases")
        axis.plot(own["training_cases"], own["dice"], color=_RUN, linewidth=0.8, alpha=0.45, zorder=2)
    axis.plot(cases, means["mean"], color=_MEAN, linewidth=1.6, zorder=3, label="mean over seeds")
    label = "a run (thin lines: one seed)"
    x, y = rows["training_cases"], rows["dice"]
    axis.scatter(x, y, s=34, color=_RUN, alpha=0.75, linewidths=0, zorder=4, label=label)
    fresh = results.table[(results.table["stage"] == stage) & (results.table["fraction"] == 0)]
    _scale_axes(axis, rows, fresh, cases)
    if len(fresh):
        _draw_fresh(axis, fresh)
    percent = {n: f"{n:g}\n{100 * fraction:g}%" for fraction, n in zip(means.index, cases, strict=True)}
    kept = _far_apart(axis, list(percent))
    axis.set_xticks(kept, [percent[n] for n in kept])
    axis.minorticks_off()
    what = "training cases" if stage == SUBSETS else "pre-training cases"
    axis.set_xlabel(f"{what} of {results.study.upstream.dataset} (share)")
    axis.set_ylabel(f"mean Dice, {_of(results, stage).dataset}", fontsize=9)
    axis.grid(color="#e3e8ee", linewidth=0.8)
    axis.set_axisbelow(True)
    hide_spines(axis)
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return figure


def _far_apart(axis: Axes, places: list[float]) -> list[float]:
    """Of ascending places on the x axis the last, and those before it whose labels do not touch."""
    along = axis.transAxes.inverted().transform(axis.transData.transform([(place, 0.5) for place in places]))[:, 0]
    kept = [len(places) - 1]
    for number in reversed(range(len(places) - 1)):
        if along[kept[-1]] - along[number] >= LEAST_GAP:
            kept.append(number)
    return [places[number] for number in reversed(kept)]


def _draw_fit(axis: Axes, fit: Fit) -> None:
    x = np.geomspace(fit.smallest, fit.largest, 60)
    label = f"fit {fit.a:.3f} {'+' if fit.b >= 0 else '-'} {abs(fit.b):.3f} log10(n)"
    axis.plot(x, fit.a + fit.b * np.log10(x), color=_FIT, linewidth=1.3, linestyle=(0, (5, 3)), label=label, zorder=2)


def _draw_fresh(axis: Axes, fresh: pd.DataFrame) -> None:
    """Runs from fresh weights, which no place on a logarithmic axis belongs to: a line, and its range over seeds."""
    mean, (low, high) = float(fresh["dice"].mean()), axis.get_ylim()
    label = f"fresh weights: {mean:.3f}" + ("" if low <= mean <= high else ", off the axis")
    axis.axhline(mean, color=_FRESH, linewidth=1.3, linestyle=(0, (1, 2)), label=label, zorder=1)
    if len(fresh) > 1:
        axis.axhspan(float(fresh["dice"].min()), float(fresh["dice"].max()), color=_FRESH, alpha=0.13, linewidth=0)


def _scale_axes(axis: Axes, rows: pd.DataFrame, fresh: pd.DataFrame, cases: np.ndarray) -> None:
    known = rows["dice"].dropna()
    if len(known):
        span = max(float(known.max() - known.min()), LEAST_SPAN)
        near = fresh["dice"].between(known.min() - FARTHEST * span, known.max() + FARTHEST * span)
        known = pd.concat([known, fresh.loc[near, "dice"]])  # farther ones would press the curve flat
        low, high = float(known.min()), float(known.max())
        middle, half = (low + high) / 2, max(high - low, LEAST_SPAN) * 0.6
        axis.set_ylim(middle - half, min(middle + half, 1.01))
    if len(cases) and cases.max() >= LOG_FROM * cases.min():
        axis.set_xscale("log")
        axis.set_xlim(cases.min() / 1.15, cases.max() * 1.15)


def _tiles(results: ScalingResults) -> list[tuple[str, str]]:
    tiles = []
    for stage in results.stages:
        means, name = results.of_stage(stage), "" if stage == SUBSETS else "downstream, "
        for fraction in dict.fromkeys((means.index.min(), means.index.max())):
            what = f"{100 * fraction:g}% of the cases" if fraction else "fresh weights"
            tiles.append((f"Dice, {name}{what}", mean_sd(means, fraction)))
    return tiles


def _stage_section(page: ReportPage, results: ScalingResults, stage: str) -> None:
    of = _of(results, stage)
    steps = of.config.epochs * of.config.iterations_per_epoch
    if stage == SUBSETS:
        page.heading("Trained on subsets")
        text = f"Every run: {steps} steps on {of.dataset}, fold {of.fold}; scored on the same held-out cases."
    else:
        page.heading("Fine-tuned afterwards")
        cases = _share(of)
        text = (
            f"Every network above, then {steps} steps on {of.dataset}, fold {of.fold}{cases}; and as many from fresh "
            "weights."
        )
    page.paragraph(text)
    fit = results.fit(stage)
    caption = "A dot per run, the line through their means."
    if fit is not None:
        caption += (
            f" Broken line: least squares over all runs, {fit.b:+.3f} Dice per ten times as many cases, residual sd "
            f"{fit.residual_sd:.3f}. It describes these runs, from {fit.smallest:g} to {fit.largest:g} cases, and "
            "says nothing beyond them."
        )
    page.figure(scaling_figure(results, stage), caption)
    _class_table(page, results, stage)


def _share(stage: Stage) -> str:
    """Of a share of the training cases, where there is one."""
    share = stage.config.subset_fraction
    return "" if share == 1 else f", {100 * share:g}% of its training cases"


def _class_table(page: ReportPage, results: ScalingResults, stage: str) -> None:
    """Dice of every class per fraction, and what it gained from the fewest cases to the most."""
    means, overall = results.class_means(stage), results.of_stage(stage)
    fractions = list(means.columns)
    header = ["class", *(f"{100 * f:g}%" if f else "fresh" for f in fractions)]
    gains = len(fractions) > 1
    rows: list[list[object]] = []
    for name, row in means.iterrows():
        values = [float(value) for value in row]
        rows.append([str(name), *values, *([_gain(values)] if gains else [])])
    if len(rows) > 1:
        values = [float(overall.loc[f, "mean"]) for f in fractions]
        rows.append(["mean over classes", *values, *([_gain(values)] if gains else [])])
    page.table([*header, *([f"{header[1]} to {header[-1]}"] if gains else [])], rows)


def _gain(values: list[float]) -> str:
    gain = values[-1] - values[0]
    return f"{gain:+.3f}" if gain == gain else "-"


def _texts(row: dict[str, object]) -> list[object]:
    names = {SUBSETS: "subset", DOWNSTREAM: "downstream"}
    cells: list[object] = [names.get(str(row.pop("stage")), ""), f"{row.pop('fraction'):g}"]
    return [*cells, *row.values()]


def _definitions(results: ScalingResults) -> list[str]:
    study = results.study
    chosen = (
        "Scored: the last checkpoint, which no held-out case has chosen."
        if study.checkpoint == "final"
        else "Scored: the best checkpoint of each run, chosen by the same held-out cases: scores are a little too good."
    )
    return [
        "A fraction is of the subjects among the fold's training cases. With one seed the cases of a smaller fraction "
        "are among those of a larger one; another seed draws others.",
        "Dice: twice the common voxels over the sum of both maps' voxels; mean over classes of each class's mean over "
        "cases. ± sample standard deviation over seeds.",
        "n infinite: class and case pairs that only one of both maps has; they are in no mean distance.",
        chosen,
        "Every run has the same number of steps, whatever the number of cases: a small subset is seen more often.",
    ]


def _of(results: ScalingResults, stage: str) -> Stage:
    found = results.study.upstream if stage == SUBSETS else results.study.downstream
    assert found is not None
    return found
