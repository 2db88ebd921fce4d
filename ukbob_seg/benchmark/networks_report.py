"""The page of a comparison of networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ukbob_seg.benchmark.networks_results import NetworkResults, definitions, mean_sd
from ukbob_seg.drawing import hide_spines
from ukbob_seg.report_page import ReportPage

_RUN, _MEAN = "#3b6ea5", "#1d2733"
LEAST_SPAN = 0.04  # of the Dice axis, so that noise does not fill it


def write_report(path: Path, results: NetworkResults, failed: Mapping[str, str], paper: str | None = None) -> None:
    """Write the self-contained HTML page.

    Args:
        path: of the page.
        results: of the finished runs.
        failed: why others failed, by name.
        paper: table of the paper whose rows stand beside.
    """
    study = results.study
    page = ReportPage(
        "Comparison of networks",
        f"{study.dataset}, {study.configuration}: {len(results.networks)} networks, {len(results.table)} runs.",
    )
    found = [results.of_network(network) for network in results.networks]
    best = max(found, key=lambda entry: -1.0 if np.isnan(entry["dice"]) else entry["dice"])
    page.tiles([("highest mean Dice", best["network"]), ("its Dice", mean_sd(best, "dice", 3))])
    header, *rows = results.cells(paper)
    page.table(header, rows)
    page.figure(dice_figure(results), "A dot per run (fold and seed), a bar at their mean.")
    if failed:
        page.heading("Runs that failed")
        page.bullets([f"{name}: {message}" for name, message in failed.items()])
    page.heading("Dice of every class")
    means = results.class_means()
    page.table(["class", *means.columns], [[str(name), *map(float, row)] for name, row in means.iterrows()])
    page.heading("Runs")
    shown = [
        "network",
        "fold",
        "seed",
        "cases",
        "dice",
        "nsd",
        "hd",
        "hd95",
        "n_infinite",
        "training_seconds",
        "peak_gb",
    ]
    titles = ["network", "fold", "seed", "cases", "Dice", "NSD", "HD mm", "HD95 mm", "n infinite", "training s", "GiB"]
    page.table(titles, [list(row.values()) for row in results.table[shown].to_dict("records")])
    page.heading("Definitions")
    page.bullets(list(definitions(study)))
    page.write(path)


def dice_figure(results: NetworkResults) -> Figure:
    """Dice of every run by network."""
    names = results.networks
    figure = Figure(figsize=(8.2, 1.2 + 0.42 * len(names)), layout="constrained")
    axis = figure.subplots()
    for place, network in enumerate(names):
        dice = results.table.loc[results.table["network"] == network, "dice"].dropna().to_numpy(float)
        axis.scatter(dice, np.full(len(dice), place), s=30, color=_RUN, alpha=0.7, linewidths=0, zorder=3)
        if len(dice):
            axis.plot([dice.mean()] * 2, [place - 0.28, place + 0.28], color=_MEAN, linewidth=1.8, zorder=4)
    known = results.table["dice"].dropna()
    if len(known):
        middle, half = (known.min() + known.max()) / 2, max(known.max() - known.min(), LEAST_SPAN) * 0.6
        axis.set_xlim(middle - half, middle + half)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("mean Dice")
    axis.grid(axis="x", color="#e3e8ee", linewidth=0.8)
    axis.set_axisbelow(True)
    hide_spines(axis)
    return figure
