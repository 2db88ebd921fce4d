"""The evaluation's report: one page that says how good the predictions are and where they fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ukbob_seg.errors import listing
from ukbob_seg.evaluation.distribution_figures import distribution_figures, metric_title
from ukbob_seg.evaluation.intervals import LEAST_VALUES, REPLICATES
from ukbob_seg.evaluation.metrics import DISTANCES, nsd_names
from ukbob_seg.evaluation.overlays import Overlay, overlay_figure
from ukbob_seg.evaluation.pairing import find_image
from ukbob_seg.evaluation.summary import EvaluationSummary
from ukbob_seg.report_page import ReportPage

WORST_CASES = 10


def write_report(path: Path, summary: EvaluationSummary, images: Path | None = None) -> None:
    """Write the self-contained HTML page.

    Args:
        path: of the HTML file.
        summary: what to report; prediction and reference files of the worst cases are read again for their pictures
            (cases whose files are not named in the summary get no picture).
        images: folder with ``CASE_0000`` or ``CASE`` images to draw the outlines on; None or a case without an image
            gives a grey drawing of the reference labels.
    """
    cases, classes = len(summary.cases), len(summary.classes)
    lead = f"{_number(cases, 'case')}, {_number(classes, 'class', 'classes')}."
    if summary.files:
        one, two = (Path(path).parent for path in next(iter(summary.files.values())))
        lead += f" Predictions of {one}, references of {two}." if str(one) != "." else ""
    page = ReportPage("Evaluation", lead)
    _headline(page, summary)
    page.heading("Classes")
    _class_table(page, summary)
    page.heading("Worst cases")
    _worst_section(page, summary, images)
    for metric in ("dice", "hd95", *(nsd_names(summary.tolerances) or ("nsd",))):
        for number, (figure, caption) in enumerate(distribution_figures(summary, metric)):
            if number == 0:
                page.heading(f"{metric_title(metric, summary.tolerances)} of every case")
            page.figure(figure, caption)
    page.heading("Definitions")
    page.bullets(_definitions(summary))
    page.write(path)


def worst_cases(summary: EvaluationSummary, most: int = WORST_CASES) -> pd.DataFrame:
    """The cases with the lowest Dice, averaged over the classes present, the worst first.

    Returns:
        Columns case, dice, hd95 (mean of the finite ones, mm), missed (classes that only one map has), worst_class,
        worst_dice. Cases in which no class is present are left out.
    """
    means = summary.case_means("dice").dropna().sort_values(kind="stable").head(most)
    distances = summary.case_means("hd95")
    rows = []
    for case, dice in means.items():
        here = summary.table[(summary.table["case"] == case) & summary.table["dice"].notna()]
        # Among equally bad classes (several missed ones, say) the largest is the one to look at.
        size = here["n_pred"] + here["n_ref"]
        worst = here.assign(size=size).sort_values(["dice", "size"], ascending=[True, False], kind="stable").iloc[0]
        missed = int(np.isinf(here["hd"]).sum())
        rows.append((case, float(dice), float(distances[case]), missed, worst["class"], float(worst["dice"])))
    return pd.DataFrame(rows, columns=["case", "dice", "hd95", "missed", "worst_class", "worst_dice"])


def _headline(page: ReportPage, summary: EvaluationSummary) -> None:
    missed = summary.overall("hd").n_infinite
    nsd = nsd_names(summary.tolerances) or ("nsd",)
    low, high = summary.intervals.overall["dice"]
    page.tiles(
        [
            ("mean Dice", _fixed(summary.mean("dice"), 3)),
            *([("95 % interval", f"{low:.3f} to {high:.3f}")] if np.isfinite(low) else []),
            ("mean HD95", f"{_fixed(summary.mean('hd95'))} mm"),
            ("mean HD", f"{_fixed(summary.mean('hd'))} mm"),
            *((f"mean {metric_title(metric, summary.tolerances)}", _fixed(summary.mean(metric), 3)) for metric in nsd),
            ("missed or invented", str(missed)),
            ("cases", str(len(summary.cases))),
        ]
    )
    page.paragraph("Means over classes of each class's mean over cases.")
    notes = []
    if missed:
        notes.append(
            f"{_number(missed, 'label')} found in only one of the two maps (missed or invented): Dice and NSD 0, "
            "distances infinite and left out of the mean distances, which therefore flatter these classes."
        )
    if summary.absent_classes:
        notes.append(f"Absent from all maps, in no mean: {listing(summary.absent_classes)}.")
    if summary.missing:
        without = _number(len(summary.missing), "reference")
        notes.append(f"{without} without a prediction, in no mean: {listing(summary.missing)}.")
    if summary.unmatched:
        without = _number(len(summary.unmatched), "prediction")
        notes.append(f"{without} without a reference, not scored: {listing(summary.unmatched)}.")
    if notes:
        page.bullets(notes)


def _class_table(page: ReportPage, summary: EvaluationSummary) -> None:
    """Dice in full with the means of the other metrics; then each of those in full, folded."""
    others = (*(nsd_names(summary.tolerances) or ("nsd",)), "hd95", "hd", "assd")
    titles = [metric_title(metric, summary.tolerances).replace(" (mm)", " mm").replace(" at", "") for metric in others]
    full = {metric: _statistics(summary, metric) for metric in ("dice", *others)}
    infinite = summary.statistics("hd")["n_infinite"]
    header = ["class", "n", "Dice", "95 % interval", "sd", "median", *titles, "n infinite"]
    rows: list[list[object]] = []
    for name, dice in full["dice"].items():
        if dice is None:
            rows.append([name, "absent", *["-"] * (len(header) - 2)])
        else:
            rows.append([name, *dice, *(_mean(full[metric][name]) for metric in others), int(infinite[name])])
    if len(rows) > 1:
        overall = summary.overall("dice")
        means = [_digits(metric, summary.mean(metric)) for metric in others]
        interval = _interval("dice", summary.intervals.overall["dice"])
        missed = summary.overall("hd").n_infinite
        rows.append(["mean over classes", overall.values, _fixed(overall.mean, 3), interval, "", "", *means, missed])
    page.table(header, rows)
    if len(summary.cases) < LEAST_VALUES:
        page.paragraph(f"Intervals are given from {LEAST_VALUES} values.")
    for metric, title in zip(others, titles, strict=True):
        page.table(
            ["class", "n", "mean", "95 % interval", "sd", "median"],
            [[name, *(found or ["-"] * 5)] for name, found in full[metric].items()],
            folded=f"{title}: interval, sd and median of every class",
        )


def _statistics(summary: EvaluationSummary, metric: str) -> dict[str, list[object] | None]:
    """Class -> n, mean, interval, sd and median, written out; None without a finite value."""
    table, intervals = summary.statistics(metric), summary.intervals.classes[metric]
    found: dict[str, list[object] | None] = {}
    for name, row in table.iterrows():
        mean, sd, median = (_digits(metric, row[key]) for key in ("mean", "sd", "median"))
        interval = _interval(metric, intervals.loc[name])
        found[str(name)] = [int(row["n"]), mean, interval, sd, median] if row["n"] else None
    return found


def _mean(statistics: list[object] | None) -> object:
    return "-" if statistics is None else statistics[1]


def _interval(metric: str, limits: Sequence[float]) -> str:
    low, high = limits
    return f"{_digits(metric, low)} to {_digits(metric, high)}" if np.isfinite(low) else "-"


def _digits(metric: str, value: float) -> str:
    return _fixed(value, 2 if metric in DISTANCES else 3)


def _worst_section(page: ReportPage, summary: EvaluationSummary, images: Path | None) -> None:
    worst = worst_cases(summary)
    if worst.empty:
        page.paragraph("No case has any foreground.")
        return
    overlays = []
    for row in worst.itertuples():
        prediction, reference = summary.files.get(row.case, ("", ""))
        if prediction and reference:
            image = find_image(images, row.case) if images is not None else None
            values = summary.classes[row.worst_class]
            overlays.append(
                Overlay(
                    row.case, row.worst_class, values, row.worst_dice, Path(prediction), Path(reference), image,
                    summary.ignore_value,
                )
            )  # fmt: skip
    page.paragraph("By Dice, averaged over the classes present in the case.")
    if overlays:
        page.figure(
            overlay_figure(overlays),
            "The class with the lowest Dice of each case (bold), in the slice where prediction and reference differ "
            "most; other classes thin.",
        )
    page.table(
        ["case", "mean Dice", "mean HD95 mm", "missed or invented", "lowest class", "its Dice"],
        [
            [row.case, row.dice, _fixed(row.hd95), row.missed, row.worst_class, row.worst_dice]
            for row in worst.itertuples()
        ],
    )


def _definitions(summary: EvaluationSummary) -> list[str]:
    tolerances = " or ".join(f"{tolerance:g}" for tolerance in summary.tolerances)
    return [
        "Dice: twice the common voxels over the sum of both maps' voxels.",
        "HD, HD95, ASSD: largest, 95th percentile (the larger of both directions) and mean distance between the "
        "boundary voxels of both maps, in mm.",
        f"NSD: share of boundary voxels within {tolerances} mm of the other map's boundary.",
        "n: cases in which the class is in at least one of the maps. A class absent from both maps of a case enters "
        "no mean; in the row of the mean over classes n counts the values behind it; n infinite counts cases in which "
        "only one map has it. sd: sample standard deviation over cases.",
        f"95 % interval: of the mean, percentiles 2.5 and 97.5 of {REPLICATES} bootstrap samples of whole cases; from "
        f"{LEAST_VALUES} values.",
    ]


def _number(count: int, singular: str, plural: str | None = None) -> str:
    return f"{count} {singular if count == 1 else plural or singular + 's'}"


def _fixed(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"
