"""The report of planning and preprocessing: what the data look like, what was decided, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ukbob_seg.dataset.spec import Case, DatasetSpec, find_cases
from ukbob_seg.drawing import FEW_CLASSES
from ukbob_seg.errors import listing
from ukbob_seg.preprocessing.fingerprint import MAX_SAMPLES, Fingerprint
from ukbob_seg.preprocessing.fingerprint_cases import STORE, CaseReading, load_readings
from ukbob_seg.preprocessing.plans import Plans
from ukbob_seg.preprocessing.preprocessor import arrays_folder
from ukbob_seg.preprocessing.records import record_path
from ukbob_seg.preprocessing.report_figures import (
    class_rows_figures,
    histogram_figure,
    patch_figure,
    size_figure,
    slices_figure,
)
from ukbob_seg.preprocessing.report_numbers import (
    FAR,
    FEWEST_TO_COMPARE,
    channel_histograms,
    choose_cases,
    class_sizes,
    find_outliers,
    matching_readings,
)
from ukbob_seg.preprocessing.report_slices import MAX_CHANNELS, case_slices, index_names
from ukbob_seg.report_page import ReportPage

REPORT = "report.html"
OUTLIERS_LISTED = 20


def write_report(raw_folder: Path, folder: Path) -> Path:
    """Write ``report.html`` of a dataset that was planned, and preprocessed perhaps.

    Reads fingerprint.json, plans.json and the readings beside them, and of three cases the files themselves.

    Args:
        raw_folder: raw dataset (``DatasetXXX_Name``).
        folder: its preprocessed folder.

    Returns:
        Path of the page.

    Raises:
        DatasetError: dataset.json or the fingerprint cannot be read.
        ConfigError: plans.json cannot be read.
    """
    spec = DatasetSpec.load(raw_folder)
    fingerprint = Fingerprint.load(folder / "fingerprint.json")
    plans = Plans.load(folder / "plans.json")
    cases = {case.name: case for case in find_cases(raw_folder, spec)[0]}
    readings = matching_readings(fingerprint.cases, load_readings(folder / STORE))
    page = ReportPage(
        f"Plan and preprocessing: {spec.name}",
        f"Preset {plans.preset}, {plans.memory_gb:g} GB per training step. Axes are (z, y, x).",
    )
    _headline(page, fingerprint, plans, spec, cases, folder)
    page.heading("Plan")
    _plan_section(page, plans, spec, folder, cases)
    page.heading("Cases before and after")
    _slices_section(page, fingerprint, plans, spec, cases, folder)
    page.heading("Sizes and spacings")
    _size_section(page, fingerprint, plans)
    page.heading("Cases unlike the others")
    _outlier_section(page, fingerprint, readings, spec)
    page.heading("Regions" if spec.labels.has_regions else "Classes")
    _class_sections(page, fingerprint, plans, spec, readings)
    page.write(folder / REPORT)
    return folder / REPORT


def _headline(
    page: ReportPage, fingerprint: Fingerprint, plans: Plans, spec: DatasetSpec, cases: dict[str, Case], folder: Path
) -> None:
    shapes = np.array([case.shape for case in fingerprint.cases])
    finest = next(iter(plans.configurations.values()))
    raw = [path for case in cases.values() for path in (*case.images, *([case.label] if case.label else []))]
    arrays = {arrays_folder(folder, plans, name) for name in plans.configurations}
    made = [path for place in arrays if place.is_dir() for path in place.iterdir() if path.is_file()]
    page.tiles(
        [
            ("cases", f"{len(fingerprint.cases):,}"),
            ("channels", ", ".join(spec.channel_names)),
            ("regions" if spec.labels.has_regions else "labels", str(len(spec.labels.names))),
            ("median size", _by(np.median(shapes, axis=0), 0)),
            ("target spacing", f"{_by(finest.spacing_mm)} mm"),
            ("raw", _bytes(sum(path.stat().st_size for path in raw))),
            ("preprocessed", _bytes(sum(path.stat().st_size for path in made)) if made else "-"),
        ]
    )


def _plan_section(page: ReportPage, plans: Plans, spec: DatasetSpec, folder: Path, cases: dict[str, Case]) -> None:
    rows: list[list[object]] = []
    for name, plan in plans.configurations.items():
        extent = np.asarray(plan.median_shape, dtype=float) * plan.spacing_mm
        place = arrays_folder(folder, plans, name)
        found = {path.name for path in place.glob("*.json")}
        done = sum(record_path(place, case).name in found for case in cases)
        for network, entry in plan.networks.items():
            size = np.asarray(entry.patch_size, dtype=float) * plan.spacing_mm
            share = float(np.prod(np.minimum(size, extent)) / np.prod(extent))
            rows.append(
                [
                    name, network, _by(plan.spacing_mm), _by(plan.median_shape), _by(entry.patch_size),
                    f"{share:.0%}", entry.batch_size, f"{entry.estimated_memory_gb:.1f}",
                    f"{done} of {len(cases)}",
                ]
            )  # fmt: skip
    page.table(
        ["configuration", "network", "spacing mm", "median case", "patch", "of case", "batch", "GB", "preprocessed"],
        rows,
    )  # fmt: skip
    notes = []
    for name, plan in plans.configurations.items():
        if plan.slice_axis is not None:
            notes.append(f"{name}: slices across {'zyx'[plan.slice_axis]}, whose spacing the cases keep.")
        if plan.previous_stage is not None:
            notes.append(f"{name}: the segmentation of {plan.previous_stage} is a further input.")
        if plan.arrays_of is not None:
            notes.append(f"{name}: uses the arrays of {plan.arrays_of}.")
    page.bullets([*plans.reasons, *notes])
    page.figure(patch_figure(plans.configurations), "Patches and the median case after cropping and resampling.")
    page.table(
        ["channel", "normalization", "clip", "mean", "sd", "statistics"],
        [
            [
                name, entry.scheme, "-" if entry.clip_low is None else f"{entry.clip_low:.4g} to {entry.clip_high:.4g}",
                _number(entry.mean), _number(entry.std), _statistics_of(entry.scheme, entry.mask_nonzero),
            ]
            for name, entry in zip(spec.channel_names, plans.normalization, strict=True)
        ],
    )  # fmt: skip


def _slices_section(
    page: ReportPage, fingerprint: Fingerprint, plans: Plans, spec: DatasetSpec, cases: dict[str, Case], folder: Path
) -> None:
    page.paragraph(
        "The slice with the most foreground; left the file, right the normalised array, at the same place and scale. "
        "What cropping removed stays blank. Axial slices are drawn as stored, others with z upwards."
    )
    if len(spec.channel_names) > MAX_CHANNELS:
        page.paragraph(f"The first {MAX_CHANNELS} of {len(spec.channel_names)} channels are shown.")
    for sizes, word in choose_cases(fingerprint.cases):
        shown = case_slices(sizes, cases.get(sizes.name), plans, spec, folder)
        for problem in shown.problems:
            page.paragraph(f"{sizes.name} ({word}): {problem}")
        if shown.views:
            channels = spec.channel_names[:MAX_CHANNELS]
            figure = slices_figure(shown.views, shown.normal, channels, index_names(spec.labels))
            parts = "; ".join(f"{view.title} {view.note}" for view in shown.views)
            page.figure(figure, f"{sizes.name} ({word}), {shown.place}: {parts}.")


def _size_section(page: ReportPage, fingerprint: Fingerprint, plans: Plans) -> None:
    cases = fingerprint.cases
    page.figure(
        size_figure(cases, next(iter(plans.configurations.values())).spacing_mm),
        "Cases by size (grey: as read; blue: cropped to the box of nonzero voxels) and by spacing (red: target).",
    )
    shapes, cropped, spacings = (
        np.array([getattr(case, what) for case in cases], dtype=float)
        for what in ("shape", "cropped_shape", "spacing_mm")
    )
    kept = 100 * cropped.prod(axis=1, keepdims=True) / shapes.prod(axis=1, keepdims=True)
    page.table(
        ["each axis by itself", "median", "minimum", "maximum"],
        [
            [what, *(_by(function(values, axis=0)) for function in (np.median, np.min, np.max))]
            for what, values in (
                ("size, voxels", shapes), ("cropped to nonzero, voxels", cropped), ("kept by cropping, %", kept),
                ("spacing, mm", spacings), ("extent, mm", shapes * spacings),
            )
        ],
    )  # fmt: skip
    found = Counter(case.left_right_axis for case in cases)
    parts = [f"{'too oblique to say' if k is None else 'zyx'[k]} in {n:,}" for k, n in found.most_common()]
    text = f"Axis that runs left-right: {', '.join(parts)} of {len(cases):,} cases."
    if len(found) > 1:
        usual = found.most_common(1)[0][0]
        others = [case.name for case in cases if case.left_right_axis != usual]
        text += f" Orientations differ, so that training does not flip left and right. Others: {listing(others)}."
    page.paragraph(text)


def _outlier_section(
    page: ReportPage, fingerprint: Fingerprint, readings: Sequence[CaseReading], spec: DatasetSpec
) -> None:
    if len(fingerprint.cases) < FEWEST_TO_COMPARE:
        page.paragraph(f"Fewer than {FEWEST_TO_COMPARE} cases: nothing to compare.")
        return
    outliers = find_outliers(fingerprint.cases, readings, spec.channel_names)
    listed = f", the first {OUTLIERS_LISTED}" if len(outliers) > OUTLIERS_LISTED else ""
    page.paragraph(
        f"More than {FAR:g} robust standard deviations from the median in size, spacing, extent (on a logarithmic "
        f"scale) or mean foreground intensity: {len(outliers):,} of {len(fingerprint.cases):,} cases."
        + (f" Each is listed with the property in which it is farthest{listed}." if outliers else "")
    )
    if not outliers:
        return
    page.table(
        ["case", "property", "value", "median", "robust SDs"],
        [
            [o.case, o.what, _number(o.value), _number(o.median), f"{o.deviations:+,.1f}"]
            for o in outliers[:OUTLIERS_LISTED]
        ],
    )


def _class_sections(
    page: ReportPage, fingerprint: Fingerprint, plans: Plans, spec: DatasetSpec, readings: Sequence[CaseReading]
) -> None:
    """Table of the classes, and histograms of the channels."""
    names, channels = spec.labels.names, spec.channel_names
    if len(readings) < len(fingerprint.cases):
        page.paragraph(
            f"{STORE} lacks {len(fingerprint.cases) - len(readings):,} of {len(fingerprint.cases):,} cases; run with "
            "--verify to read them again. " + ("Classes and intensities are of the others." if readings else "")
        )
    if not readings:
        return
    samples = max(1, MAX_SAMPLES // len(fingerprint.cases))
    histograms = channel_histograms(readings, spec.labels, fingerprint.intensities, plans.normalization, samples)
    sizes = class_sizes(readings, spec.labels)
    rows: list[list[object]] = []
    for k, name in enumerate(names):
        values = ", ".join(map(str, spec.labels.members[k]))
        if not sizes.cases[k]:
            rows.append([name, values, "absent", *["-"] * (2 + len(channels))])
            continue
        means = [_number(float(histogram.typical[k])) for histogram in histograms]
        rows.append(
            [
                name,
                values,
                int(sizes.cases[k]),
                f"{sizes.voxels[k]:,.0f}",
                _number(float(sizes.volume_ml[k]), 3),
                *means,
            ]
        )
    kind = "region" if spec.labels.has_regions else "class"
    page.paragraph(f"Median over the cases in which the {kind} occurs, of its voxels, volume and mean intensity.")
    page.table(
        [kind, "value", "cases", "median voxels", "median mL", *(f"intensity, {channel}" for channel in channels)],
        rows,
    )
    for channel, histogram, statistics, entry in zip(
        channels, histograms, fingerprint.intensities, plans.normalization, strict=True
    ):
        page.heading(f"Intensities: {channel}")
        page.paragraph(
            f"All foreground: mean {_number(statistics.mean)}, sd {_number(statistics.std)}, median "
            f"{_number(statistics.median)}, minimum {_number(statistics.minimum)}, maximum "
            f"{_number(statistics.maximum)}, 0.5 and 99.5 percentiles {_number(statistics.percentile_00_5)} and "
            f"{_number(statistics.percentile_99_5)}; up to {samples:,} voxels of each case."
        )
        beyond = f"{histogram.beyond:.1%}" if histogram.beyond >= 0.001 else "Less than 0.1%"
        page.figure(
            histogram_figure(histogram, names, entry),
            f"Every curve has the area 1. {beyond if histogram.beyond else 'None'} of the voxels lie beyond the axis.",
        )
        if len(names) > FEW_CLASSES:
            for figure, caption in class_rows_figures(histogram, names):
                page.figure(figure, caption)


def _statistics_of(scheme: str, masked: bool) -> str:
    own = "of the case" + (", nonzero voxels" if masked else "")
    return {"zscore": own, "rescale_to_0_1": own, "ct": "of the dataset"}.get(scheme, "none")


def _by(values: Sequence[float] | np.ndarray, digits: int | None = None) -> str:
    return " x ".join(f"{v:.4g}" if digits is None else f"{v:.{digits}f}" for v in values)


def _number(value: float | None, digits: int = 4) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
