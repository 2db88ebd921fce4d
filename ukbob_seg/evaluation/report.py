"""The evaluation's report: one page that says how good the predictions are and where they fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from ukbob_seg.errors import listing
from ukbob_seg.evaluation.report_figures import Overlay, dice_figures, overlay_figure
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
    page = ReportPage("Evaluation", f"{_number(cases, 'case')}, {_number(classes, 'class', 'classes')}.")
    _headline(page, summary)
    page.heading("Classes")
    _class_table(page, summary)
    page.heading("Worst cases")
    _worst_section(page, summary, images)
    for number, (figure, caption) in enumerate(dice_figures(summary)):
        if number == 0:
            page.heading("Dice of every case")
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


def find_image(folder: Path, case: str) -> Path | None:
    """The first channel of a case (``CASE_0000.nii.gz``), or its only file (``CASE.nii.gz``); None without one."""
    from ukbob_seg.evaluation.evaluate import FILE_ENDINGS

    candidates = (Path(folder) / f"{case}{suffix}{ending}" for suffix in ("_0000", "") for ending in FILE_ENDINGS)
    return next((path for path in candidates if path.is_file()), None)


def _headline(page: ReportPage, summary: EvaluationSummary) -> None:
    missed = summary.overall("hd").n_infinite
    page.tiles(
        [
            ("mean Dice", _fixed(summary.mean("dice"), 3)),
            ("mean HD95", f"{_fixed(summary.mean('hd95'))} mm"),
            ("mean HD", f"{_fixed(summary.mean('hd'))} mm"),
            (f"mean NSD at {summary.tolerance_mm:g} mm", _fixed(summary.mean("nsd"), 3)),
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
    dice = summary.statistics("dice")
    means = {metric: summary.statistics(metric)["mean"] for metric in ("nsd", "hd", "hd95", "assd")}
    infinite = summary.statistics("hd")["n_infinite"]
    header = ["class", "n", "Dice", "sd", "median", "NSD", "HD95 mm", "HD mm", "ASSD mm", "n infinite"]
    rows: list[list[object]] = []
    for name in summary.classes:
        row = dice.loc[name]
        if not row["n"]:
            rows.append([name, "absent", *["-"] * (len(header) - 2)])
            continue
        distances = [_fixed(means[metric][name]) for metric in ("hd95", "hd", "assd")]
        scores = [float(row[key]) for key in ("mean", "sd", "median")]
        rows.append([name, int(row["n"]), *scores, float(means["nsd"][name]), *distances, int(infinite[name])])
    if len(rows) > 1:
        overall = {metric: summary.overall(metric) for metric in ("dice", "nsd", "hd95", "hd", "assd")}
        distances = [_fixed(overall[metric].mean) for metric in ("hd95", "hd", "assd")]
        total = [overall["dice"].values, overall["dice"].mean, "", "", overall["nsd"].mean]
        rows.append(["mean over classes", *total, *distances, overall["hd"].n_infinite])
    page.table(header, rows)


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
    return [
        "Dice: twice the common voxels over the sum of both maps' voxels.",
        "HD, HD95, ASSD: largest, 95th percentile (the larger of both directions) and mean distance between the "
        "boundary voxels of both maps, in mm.",
        f"NSD: share of boundary voxels within {summary.tolerance_mm:g} mm of the other map's boundary.",
        "n: cases in which the class is in at least one of the maps. A class absent from both maps of a case enters "
        "no mean; n infinite counts cases in which only one map has it. sd: sample standard deviation over cases.",
    ]


def _number(count: int, singular: str, plural: str | None = None) -> str:
    return f"{count} {singular if count == 1 else plural or singular + 's'}"


def _fixed(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"
