"""The page that sets several sets of predictions side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ukbob_seg.drawing import class_color, hide_spines, shorten
from ukbob_seg.errors import listing
from ukbob_seg.evaluation.comparison import LEVEL, OVERALL_ROW, Comparison, p_text
from ukbob_seg.evaluation.distribution_figures import metric_title
from ukbob_seg.evaluation.intervals import LEAST_VALUES, REPLICATES
from ukbob_seg.evaluation.metrics import DISTANCES
from ukbob_seg.evaluation.overlays import Overlay, in_one_view, overlay_figure
from ukbob_seg.evaluation.pairing import find_image
from ukbob_seg.report_page import ReportPage

CASES_SHOWN = 10
PICTURED = 4
_CLASSES_PER_FIGURE = 40
_FEW_CLASSES = 12


def write_comparison_report(
    path: Path, comparison: Comparison, images: Path | None = None, reports: Mapping[str, Path] | None = None
) -> None:
    """Write the self-contained HTML page.

    Args:
        path: of the HTML file.
        comparison: what to report; label files of the cases that differ most are read again for their pictures.
        images: folder with images to draw the outlines on.
        reports: name -> the set's own report, to link to.
    """
    others = listing(comparison.others)
    page = ReportPage("Comparison", f"{others} against {comparison.baseline}, {len(comparison.cases)} cases.")
    page.heading("Means over classes")
    _overall_table(page, comparison)
    if comparison.least_p > LEVEL / 2:
        page.paragraph(f"With {len(comparison.cases)} cases no p value can be below {comparison.least_p:.3g}.")
    if comparison.left_out:
        left_out = listing(comparison.left_out)
        page.bullets([f"Not scored in all sets, in no number here: {len(comparison.left_out)} cases ({left_out})."])
    for name, report in (reports or {}).items():
        page.link(f"Report of {name}", os.path.relpath(report, Path(path).parent))
    page.heading("Classes")
    for figure, caption in difference_figures(comparison):
        page.figure(figure, caption)
    for number, metric in enumerate(comparison.metrics):
        _class_table(page, comparison, metric, folded=number > 0)
    page.heading("Cases that differ most")
    _case_section(page, comparison, images)
    page.heading("Definitions")
    page.bullets(_definitions(comparison))
    page.write(path)


def difference_figures(comparison: Comparison, metric: str = "dice") -> Iterator[tuple[Figure, str]]:
    """Mean paired difference of every class with its interval, a colour per set; at most forty classes to a figure.

    Up to twelve classes keep their order; more are sorted by the first set's difference, lowest first.

    Yields:
        (figure, caption)
    """
    rows = {other: comparison.rows(metric, other).drop(OVERALL_ROW) for other in comparison.others}
    first = rows[comparison.others[0]]["difference"]
    names = [name for name in first.index if any(np.isfinite(table["difference"][name]) for table in rows.values())]
    if not names:
        return
    if len(names) > _FEW_CLASSES:
        names.sort(key=lambda name: first[name] if np.isfinite(first[name]) else np.inf)
    ends = np.concatenate([table.loc[names, ["difference", "ci95_low", "ci95_high"]] for table in rows.values()])
    margin = 0.03 * max(np.nanmax(ends, initial=0.0) - np.nanmin(ends, initial=0.0), 0.01)
    limits = (float(np.nanmin(ends, initial=0.0) - margin), float(np.nanmax(ends, initial=0.0) + margin))
    figures = -(-len(names) // _CLASSES_PER_FIGURE)
    size = -(-len(names) // figures)
    for start in range(0, len(names), size):
        shown = names[start : start + size]
        part = f"Classes {start + 1} to {start + len(shown)} of {len(names)}. " if figures > 1 else ""
        title = metric_title(metric, comparison.summaries[comparison.baseline].tolerances)
        yield (
            _difference_figure(shown, rows, title, comparison.baseline, limits),
            f"{part}Mean difference in {title} to {comparison.baseline} with its 95 % interval; filled: p < {LEVEL:g} "
            "after Holm's correction.",
        )


def most_different_cases(comparison: Comparison, most: int = CASES_SHOWN) -> pd.DataFrame:
    """Cases with the largest difference in mean Dice to the baseline, in any of the sets; columns as the sets."""
    differences = comparison.case_differences("dice").dropna(how="all")
    order = differences.abs().max(axis=1).sort_values(ascending=False, kind="stable").index
    return differences.loc[order[:most]]


def _difference_figure(
    names: Sequence[str], rows: Mapping[str, pd.DataFrame], title: str, baseline: str, limits: tuple[float, float]
) -> Figure:
    row_height = (0.42 if len(names) <= _FEW_CLASSES else 0.24) * max(1.0, 0.7 * len(rows))
    figure = Figure(figsize=(9.2, row_height * len(names) + 1.1), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="#5d6b7a", linewidth=1)
    for number, (other, table) in enumerate(rows.items()):
        color = class_color(number, len(rows))
        places = np.arange(len(names)) + 0.6 * ((number + 0.5) / len(rows) - 0.5)
        found = table.loc[list(names)]
        low, high = found["ci95_low"], found["ci95_high"]
        axis.hlines(places, low, high, color=color, linewidth=1.4)
        significant = (found["p_holm"] < LEVEL).to_numpy()
        for filled in (True, False):
            chosen = significant == filled
            axis.scatter(
                found["difference"][chosen], places[chosen], s=26, zorder=3, edgecolors=[color],
                facecolors=[color] if filled else "white", label=shorten(other, 40) if not filled else None,
            )  # fmt: skip
    axis.set_yticks(range(len(names)), [shorten(name, 32) for name in names], fontsize=9)
    axis.set_ylim(len(names) - 0.45, -0.55)
    axis.set_xlim(*limits)
    axis.set_xlabel(f"difference in {title} to {shorten(baseline, 40)}")
    axis.grid(axis="x", color="#e3e8ee", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    hide_spines(axis, "top", "right", "left")
    if len(rows) > 1:
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


def _overall_table(page: ReportPage, comparison: Comparison) -> None:
    header = ["metric", "set", "mean", "difference", "95 % interval", "better", "worse", "p (Holm)", "n infinite"]
    rows: list[list[object]] = []
    tolerances = comparison.summaries[comparison.baseline].tolerances
    for metric in comparison.metrics:
        title, shown = metric_title(metric, tolerances), ""
        for other in comparison.others:
            row = comparison.rows(metric, other).loc[OVERALL_ROW]
            baseline = _digits(metric, row["baseline_mean"])
            if baseline != shown:  # again where pairs with another set are other cases and classes
                title = "" if shown else title
                rows.append([title, comparison.baseline, baseline, *[""] * 5, int(row["n_infinite_baseline"])])
                shown = baseline
            rows.append(
                [
                    "", other, _digits(metric, row["other_mean"]), _signed(metric, row["difference"]),
                    _interval(metric, row), int(row["better"]), int(row["worse"]), p_text(row["p_holm"]),
                    int(row["n_infinite_other"]),
                ]
            )  # fmt: skip
    page.table(header, rows)


def _class_table(page: ReportPage, comparison: Comparison, metric: str, folded: bool) -> None:
    """Side by side: the baseline, then each other set with its difference."""
    title = metric_title(metric, comparison.summaries[comparison.baseline].tolerances)
    tables = {other: comparison.rows(metric, other) for other in comparison.others}
    header = ["class", "n", comparison.baseline]
    interval = ["95 % interval"] if len(tables) == 1 else []  # of several, the figure shows them
    for other in comparison.others:
        header += [other, "difference", *interval, "better : worse", "p (Holm)"]
    baseline = comparison.baseline_means(metric)
    rows: list[list[object]] = []
    for name in comparison.summaries[comparison.baseline].classes:
        row: list[object] = [name, max(int(table.loc[name, "n"]) for table in tables.values())]
        row.append(_digits(metric, float(baseline[name])))
        for table in tables.values():
            found = table.loc[name]
            row += [
                _digits(metric, found["other_mean"]), _signed(metric, found["difference"]),
                *([_interval(metric, found)] if interval else []),
                f"{int(found['better'])} : {int(found['worse'])}", p_text(found["p_holm"]),
            ]  # fmt: skip
        rows.append(row)
    page.table(header, rows, folded=f"{title} of every class" if folded else "")


def _case_section(page: ReportPage, comparison: Comparison, images: Path | None) -> None:
    found = most_different_cases(comparison)
    if found.empty:
        page.paragraph("No case has a class that two sets scored.")
        return
    overlays: list[Overlay] = []
    for case in found.index[:PICTURED]:
        overlays += _overlays(comparison, str(case), images)
    if overlays:
        page.figure(
            overlay_figure(overlays, columns=len(comparison.summaries)),
            "A row per case: the class whose Dice differs most, in the slice in which the sets differ most from the "
            "reference.",
        )
    baseline = comparison.summaries[comparison.baseline].case_means("dice")
    page.table(
        ["case", f"mean Dice, {comparison.baseline}", *(f"difference, {other}" for other in comparison.others)],
        [[case, float(baseline[case]), *(_signed("dice", value) for value in row)] for case, row in found.iterrows()],
    )


def _overlays(comparison: Comparison, case: str, images: Path | None) -> list[Overlay]:
    """One picture per set; none where a file is not known."""
    scores = {name: summary.wide("dice").loc[case] for name, summary in comparison.summaries.items()}
    table = pd.DataFrame(scores)
    spread = (table.max(axis=1) - table.min(axis=1)).where(table.notna().all(axis=1))
    if spread.isna().all():
        return []
    chosen = str(spread.idxmax())
    found: list[Overlay] = []
    for name, summary in comparison.summaries.items():
        prediction, reference = summary.files.get(case, ("", ""))
        if not prediction or not reference:
            return []
        image = find_image(images, case) if images is not None else None
        found.append(
            Overlay(
                case, chosen, summary.classes[chosen], float(scores[name][chosen]),
                Path(prediction), Path(reference), image, summary.ignore_value,
                title=name, row="" if found else case,
            )
        )  # fmt: skip
    return in_one_view(found)


def _definitions(comparison: Comparison) -> list[str]:
    return [
        f"Differences are those of single cases, minus {comparison.baseline}; their mean is over the cases in which "
        "both have a finite value. better, worse: cases.",
        f"Column {comparison.baseline} of the tables of classes: mean over the cases compared; with several other sets "
        "over all of its finite values there, where a difference is over pairs.",
        f"95 % interval: of the mean difference, percentiles 2.5 and 97.5 of {REPLICATES} bootstrap samples of whole "
        f"cases; from {LEAST_VALUES} differences.",
        "p (Holm): two-sided Wilcoxon signed-rank test, corrected by Holm's method over all classes and sets of this "
        "metric (for the means over classes, over the sets). A distance that is infinite in one set only ranks as the "
        "largest difference.",
        "Means over classes: of each case over the classes with a finite value in both; n infinite counts those of "
        "each set that are in no mean, since only one of its two maps has the class (missed or invented).",
    ]


def _digits(metric: str, value: float) -> str:
    return f"{value:.{2 if metric in DISTANCES else 3}f}" if np.isfinite(value) else "-"


def _signed(metric: str, value: float) -> str:
    return f"{value:+.{2 if metric in DISTANCES else 3}f}" if np.isfinite(value) else "-"


def _interval(metric: str, row: pd.Series) -> str:
    low, high = row["ci95_low"], row["ci95_high"]
    return f"{_signed(metric, low)} to {_signed(metric, high)}" if np.isfinite(low) else "-"
