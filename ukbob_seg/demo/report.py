"""The demo's report page: what was done, what it shows, pictures, and where the other reports are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.demo.anatomy import organ_names
from ukbob_seg.demo.write import WrittenCohort
from ukbob_seg.files import read_json
from ukbob_seg.report_page import ReportPage

if TYPE_CHECKING:
    from ukbob_seg.demo.run import DemoResult

_COLOURS = "tab20"
_PICTURES = 3


def write_demo_report(result: DemoResult, cohort: WrittenCohort, roots: Roots, model: Path) -> None:
    """Write ``report.html`` of a demo run."""
    page = ReportPage(
        "ukbob_seg demo",
        "Synthetic neck-to-thigh Dixon MRI with known truth: plan, filter, train, predict with and without ETTA, "
        "evaluate. A few minutes of training show the machinery, not the accuracy of the method.",
    )
    plain, adapted = result.plain.overall("dice").mean, result.adapted.overall("dice").mean
    page.tiles(
        [
            ("mean Dice", f"{plain:.3f}"),
            ("mean Dice with ETTA", f"{adapted:.3f}"),
            ("faults planted", str(result.filtered.planted)),
            ("found by SOLF", str(result.filtered.found)),
            ("false alarms", str(result.filtered.false_alarms)),
            ("minutes in all", f"{sum(result.seconds.values()) / 60:.1f}"),
        ]
    )
    page.heading("Predictions on an unknown scanner")
    page.paragraph("Water image with outlines; left to right: true organs, prediction, prediction with ETTA.")
    page.figure(_prediction_figure(result, cohort), "middle coronal slices of the first test cases")
    page.table(["organ", "Dice", "Dice with ETTA", "HD95 (mm)", "HD95 with ETTA (mm)"], _organ_rows(result))
    page.heading("What adaptation did")
    page.table(["case", "decision", "steps", "entropy before", "entropy after", "voxels changed"], _etta_rows(result))
    page.heading("Planted label faults")
    page.paragraph(
        "Each row is a wrong organ label in one training case. A swap of left and right leaves the shape of both "
        "organs nearly as it was, so no shape filter can be expected to see it."
    )
    page.table(["kind", "planted", "found"], _fault_rows(roots, cohort))
    page.heading("Training")
    page.figure(_training_figure(model), "loss and validation Dice")
    page.heading("Plan")
    page.bullets(read_json(model / "plans.json")["reasons"])
    page.heading("Time and other reports")
    page.table(["stage", "seconds"], [[name, f"{seconds:.0f}"] for name, seconds in result.seconds.items()])
    for text, path in (
        ("SOLF filter", roots.preprocessed / cohort.folder.name / "solf" / "report.html"),
        ("Evaluation without ETTA", result.report.parent / "predictions" / "report.html"),
        ("Evaluation with ETTA", result.report.parent / "predictions_etta" / "report.html"),
    ):
        page.link(text, os.path.relpath(path, result.report.parent))
    page.write(result.report)


def _organ_rows(result: DemoResult) -> list[list[object]]:
    tables = [
        [summary.statistics(metric)["mean"] for summary in (result.plain, result.adapted)]
        for metric in ("dice", "hd95")
    ]
    return [
        [organ, *(float(column.get(organ, float("nan"))) for pair in tables for column in pair)]
        for organ in organ_names
    ]


def _etta_rows(result: DemoResult) -> list[list[object]]:
    rows: list[list[object]] = []
    for path in sorted((result.report.parent / "predictions_etta").glob("*_etta.json")):
        for record in read_json(path)["folds"]:
            rows.append(
                [
                    path.name.removesuffix("_etta.json"), record["decision"], record["steps"],
                    float(record["entropy_before"]), float(record["entropy_after"]), record["voxels_changed"],
                ]
            )  # fmt: skip
    return rows


def _fault_rows(roots: Roots, cohort: WrittenCohort) -> list[list[object]]:
    import pandas as pd

    flags = pd.read_parquet(roots.preprocessed / cohort.folder.name / "solf" / "flags.parquet")
    flagged = {(str(row.case), int(row.label)) for row in flags[flags.flagged].itertuples()}
    kinds = sorted({fault.kind for fault in cohort.faults})
    return [
        [
            kind,
            sum(fault.kind == kind for fault in cohort.faults),
            sum(fault.kind == kind and (fault.case, fault.label) in flagged for fault in cohort.faults),
        ]
        for kind in kinds
    ]


def _prediction_figure(result: DemoResult, cohort: WrittenCohort) -> Figure:
    labels = sorted((cohort.folder / "labelsTs").glob("*.nii.gz"))[:_PICTURES]
    figure = Figure(figsize=(11, 5.2 * len(labels)))
    axes = figure.subplots(len(labels), 3, squeeze=False)
    for row, path in zip(axes, labels, strict=True):
        name = path.name.removesuffix(".nii.gz")
        image, geometry = read_image([cohort.folder / "imagesTs" / f"{name}_0001.nii.gz"])
        plane = image.shape[2] // 2 + 1
        aspect = geometry.spacing_mm[0] / geometry.spacing_mm[2]
        folder = result.report.parent
        maps = {
            "truth": path,
            "prediction": folder / "predictions" / path.name,
            "prediction with ETTA": folder / "predictions_etta" / path.name,
        }
        for axis, (title, file) in zip(row, maps.items(), strict=True):
            # The patient's left is drawn on the right side of the picture as x grows, the head on top.
            slice_ = image[0, ::-1, plane, :]
            axis.imshow(slice_, cmap="gray", vmax=float(np.percentile(slice_, 99.5)), aspect=aspect)
            drawn = read_labels(file)[0][::-1, plane, :]
            for value in organ_names.values():
                if (drawn == value).any():
                    colour = [_colour(value)]
                    axis.contour(drawn == value, [0.5], colors=colour, linewidths=1.4)
            axis.set_title(f"{name}: {title}", fontsize=10)
            axis.set_axis_off()
    return figure


def _colour(value: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps[_COLOURS]((value - 1) % 20)


def _training_figure(model: Path) -> Figure:
    import csv

    with open(model / "fold_0" / "progress.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(9, 3))
    axis = figure.subplots()
    axis.plot([int(r["epoch"]) for r in rows], [float(r["train_loss"]) for r in rows], color="#1f6feb")
    axis.set_xlabel("epoch")
    axis.set_ylabel("training loss")
    axis.grid(alpha=0.25)
    scored = [r for r in rows if r["val_mean_dice"]]
    other = axis.twinx()
    other.plot([int(r["epoch"]) for r in scored], [float(r["val_mean_dice"]) for r in scored], "o-", color="#d1495b")
    other.set_ylabel("validation Dice", color="#d1495b")
    other.set_ylim(0, 1)
    return figure
