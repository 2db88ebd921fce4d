"""The page of the robustness protocol: the table, Dice under each shift, and what the shifts look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ukbob_seg.benchmark.robustness_cases import JudgedCases, label_of, shift_seed
from ukbob_seg.benchmark.robustness_figures import Cut, Example, dice_figure, example_figure, shift_title
from ukbob_seg.benchmark.robustness_options import PLAIN, UNSHIFTED, ModelChoice, RobustnessOptions
from ukbob_seg.benchmark.robustness_records import RecordStore
from ukbob_seg.benchmark.robustness_table import MEAN, RobustnessTable, count_cases, gain_text
from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import listing
from ukbob_seg.evaluation.shift_strengths import BRIGHTEST_PERCENTILE, definitions
from ukbob_seg.evaluation.shifts import apply_shift
from ukbob_seg.report_page import ReportPage

_MOST_OPEN = 15  # classes of a table that is not folded
_METHODS = {
    PLAIN: "none: the network as trained",
    "tta": "tta: average over flips along the axes that training mirrored, if any, and over small changes of intensity",
    "etta": "etta: normalization layers adapt to each image, which is rid of an unusual smooth field before",
    "etta+tta": "etta+tta: both",
}


def write_report(
    path: Path,
    table: RobustnessTable,
    judged: JudgedCases,
    options: RobustnessOptions,
    model: ModelChoice,
    store: RecordStore,
    spec: DatasetSpec,
) -> None:
    """Write the self-contained HTML page.

    Args:
        path: of the HTML file.
        table: what to report.
        judged: its cases; files of the first are read again for its pictures.
        options: how they were predicted.
        model: what was judged.
        store: where the label maps of the first case are.
        spec: channels and labels.
    """
    folds = f", fold {', '.join(model.folds)}" if model.folds else ""
    names = " and ".join(f"{folder.resolve().parent.name}/{folder.name}" for folder in model.folders)
    lead = f"{names}{folds}, checkpoint {model.checkpoint}; {count_cases(table)}: {judged.source}."
    page = ReportPage("Robustness", lead)
    _headline(page, table)
    page.heading("Dice")
    _dice_table(page, table)
    if table.gains:
        page.heading(f"Gain over {PLAIN}")
        _gain_table(page, table)
    page.heading("Dice of every case")
    page.figure(
        dice_figure(table), "A dot per case, a diamond for the mean; a bar from the lower to the upper quartile."
    )
    page.heading("What the shifts look like")
    example = read_example(table, judged, store, spec.labels)
    page.figure(
        example_figure(example, table),
        f"Case {example.case}, {example.where}: the image, then each method's prediction (coloured) on the reference "
        "(white), with the Dice of the case, mean over classes. Each panel has a grey scale of its own.",
    )
    page.heading("Surface distances")
    _distance_table(page, table)
    page.heading("Classes")
    _class_table(page, table)
    page.heading("Definitions")
    page.bullets(_definitions(table, options))
    page.write(path)


def read_example(table: RobustnessTable, judged: JudgedCases, store: RecordStore, scheme: LabelScheme) -> Example:
    """The slice of the first case with most foreground, under each shift."""
    case = judged.example
    image, geometry = read_image(case.images)
    reference = scheme.to_indices(read_labels(label_of(case))[0], label_of(case).name)
    ignored = scheme.ignore_value is not None
    foreground = (reference > 0) & (reference != scheme.ignore_index) if ignored else reference > 0
    cut = Cut.through(foreground, geometry.spacing_mm)

    def masks(indices: np.ndarray) -> np.ndarray:
        plane = cut.of(indices)
        known = np.where(plane < scheme.region_table.shape[1], plane, 0)  # the ignore label belongs to no class
        return scheme.region_table[:, known]

    pixels, predictions = {}, {}
    for shift in table.shifts:
        pixels[shift] = cut.of(apply_shift(image, shift, geometry.spacing_mm, shift_seed(case.name))[0])
        for method in table.methods:
            labels, _ = read_labels(store.example_path(case.name, shift, method))
            predictions[shift, method] = masks(scheme.to_indices(labels, "the prediction"))
    step = np.delete(np.asarray(geometry.spacing_mm), cut.normal)
    return Example(
        case.name, cut.name, pixels, masks(reference), predictions, (float(step[0]), float(step[1])), cut.normal != 0
    )


def _headline(page: ReportPage, table: RobustnessTable) -> None:
    means = table.means()
    tiles = [("cases", str(len(table.cases))), ("no shift", _fixed(float(means.loc[UNSHIFTED, table.methods[0]]), 3))]
    if MEAN in means.index:
        tiles += [(f"{MEAN}, {method}", _fixed(float(means.loc[MEAN, method]), 3)) for method in table.methods]
    page.tiles(tiles)
    page.paragraph("Dice, mean over classes and cases.")


def _dice_table(page: ReportPage, table: RobustnessTable) -> None:
    means, changes = table.means(), table.changes()
    rows: list[list[object]] = []
    for row in means.index:
        cells: list[object] = []
        for method in table.methods:
            change = f"{changes.loc[row, method]:+.3f}" if row in changes.index else ""
            cells += [_fixed(float(means.loc[row, method]), 4), change]
        rows.append([shift_title(row), *cells])
    page.paragraph("Mean over cases of each case's mean over classes; beside it the change from the unshifted images.")
    page.table(["shift", *(cell for method in table.methods for cell in (method, "change"))], rows)


def _gain_table(page: ReportPage, table: RobustnessTable) -> None:
    others = [method for method in table.methods if method != PLAIN]
    rows: list[list[object]] = []
    for row in table.means().index:
        cells: list[object] = []
        for method in others:
            gain = table.gains[row, method]
            cells += [gain_text(gain), f"{gain.worst:+.3f}"]
        rows.append([shift_title(row), *cells])
    page.paragraph(
        "Mean of the differences of the same cases (cases better / worse), and of the case that fares worst."
    )
    page.table(["shift", *(cell for method in others for cell in (method, "worst"))], rows)


def _distance_table(page: ReportPage, table: RobustnessTable) -> None:
    nsd, hd95, infinite = table.means("nsd"), table.means("hd95"), table.infinite()
    header = ["shift"]
    for method in table.methods:
        header += [f"{method}: NSD", "HD95 mm (n infinite)"]
    rows: list[list[object]] = []
    for row in nsd.index:
        cells: list[object] = []
        for method in table.methods:
            distance, count = _fixed(float(hd95.loc[row, method]), 2), float(infinite.loc[row, method])
            cells += [float(nsd.loc[row, method]), f"{distance} ({count:g})"]
        rows.append([shift_title(row), *cells])
    page.table(header, rows)


def _class_table(page: ReportPage, table: RobustnessTable) -> None:
    """Mean Dice of each class by shift, a table per method, of which long ones and later ones are folded."""
    by_class = table.by_class()
    page.paragraph("Mean Dice of each class over the cases in which at least one of the two maps has it.")
    for method in table.methods:
        part = by_class[by_class["method"] == method].pivot(index="class", columns="shift", values="mean_dice")
        rows = [[name, *(float(part.loc[name, shift]) for shift in table.shifts)] for name in table.classes]
        is_folded = method != table.methods[0] or len(rows) > _MOST_OPEN
        page.table([method, *map(shift_title, table.shifts)], rows, folded=method if is_folded else "")


def _definitions(table: RobustnessTable, options: RobustnessOptions) -> list[str]:
    shifts = [f"{shift}: {text}." for shift, text in definitions().items() if shift in table.shifts and text]
    return [
        *(f"{_METHODS[method]}." for method in table.methods),
        *(text for text in shifts if not text.startswith(f"{UNSHIFTED}:")),
        f"The range of a channel goes from its lowest value to its {BRIGHTEST_PERCENTILE:g} percentile. Linear changes "
        "of intensity are no shift, since normalization undoes them. A case always has the same field and noise.",
        "Dice: twice the common voxels over the sum of both maps' voxels. NSD: share of boundary voxels within "
        f"{options.tolerance_mm:g} mm of the other map's boundary. HD95: 95th percentile of boundary distances, the "
        "larger of both directions.",
        "A class that neither map of a case has is left out; one that only one of them has (missed or invented) has "
        "Dice and NSD 0 and an infinite distance, which is left out of the mean and counted (n infinite).",
        f"{MEAN}: the mean of the rows, without that of the unshifted images.",
        f"Cases: {listing(table.cases, 40)}.",
    ]


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"
