"""Pictures of the filter's report. Figures are made without pyplot, so nothing global is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.dataset.spec import Case
from ukbob_seg.drawing import hide_spines, shorten_middle
from ukbob_seg.filtering.solf import MODELS
from ukbob_seg.filtering.strata import StratifiedBounds

_KEPT, _FLAGGED, _OTHER, _INK, _ORDINARY = "#7aa6d8", "#d62728", "#8fd3ff", "#44505c", "#3ddc84"
_ORGANS_PER_FIGURE = 12
_MOST_BINS = 40
_REACH = 1.5  # widths of the bounds that are shown on either side of them
_MARGIN_MM = 12.0
_COLUMNS = 4


@dataclass(frozen=True)
class Specimen:
    """One label to be shown: case, file value, organ name, and why it was flagged; an ordinary one has no reason."""

    case: Case
    label: int
    organ: str
    reason: str = ""


def distribution_figures(
    flags: pd.DataFrame, bounds: StratifiedBounds, features: Mapping[str, str]
) -> Iterator[tuple[Figure, str]]:
    """Histograms per organ and feature with the bounds, twelve organs to a figure.

    Args:
        flags: table of ``flag_organs`` with the columns organ and stratum; each stratum of an organ has its own row.
        bounds: the limits applied.
        features: column -> heading.

    Yields:
        (figure, caption)
    """
    organs = [(int(key[0]), str(key[1]), rows) for key, rows in flags.groupby(["label", "stratum"], sort=True)]
    for start in range(0, len(organs), _ORGANS_PER_FIGURE):
        page = organs[start : start + _ORGANS_PER_FIGURE]
        width, height = 3.2 * len(features) + 1.7, 0.85 * len(page) + 0.45
        figure = Figure(figsize=(width, height))  # fixed margins: layout engines take seconds at 36 axes
        figure.subplots_adjust(1.7 / width, 0.25 / height, 0.99, 1 - 0.3 / height, wspace=0.08, hspace=0.5)
        axes = figure.subplots(len(page), len(features), squeeze=False)
        for row, (label, stratum, rows) in zip(axes, page, strict=True):
            for axis, feature in zip(row, features, strict=True):
                known = bounds.strata[stratum]
                limits = (0.0, known.most_doubt) if feature in MODELS else known.limits(label, feature)
                _strip(axis, rows[feature].to_numpy(float), rows["flagged"].to_numpy(bool), limits)
            lines = (str(rows["organ"].iloc[0]), stratum) if stratum else (str(rows["organ"].iloc[0]),)
            name = "\n".join(shorten_middle(line, 22) for line in lines)
            row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for axis, heading in zip(axes[0], features.values(), strict=True):
            axis.set_title(heading, fontsize=10)
        yield figure, f"Rows {start + 1} to {start + len(page)} of {len(organs)}."


def organ_share_figure(shares: Mapping[str, float]) -> Figure:
    """Bars of the flagged share of each organ.

    Args:
        shares: organ -> percent, in the order to draw from left to right.
    """
    figure = Figure(figsize=(min(14.0, 2.0 + 0.32 * len(shares)), 3.4), layout="constrained")
    axis = figure.subplots()
    axis.bar(range(len(shares)), list(shares.values()), color=_FLAGGED, width=0.7)
    axis.set_xticks(range(len(shares)), [shorten_middle(name, 24) for name in shares], rotation=90, fontsize=7)
    axis.set_xlim(-0.6, len(shares) - 0.4)
    axis.set_ylabel("flagged, %")
    hide_spines(axis)
    return figure


def scan_count_figure(counts: np.ndarray) -> Figure:
    """Bar chart of how many scans have 0, 1, 2, ... flagged organs (logarithmic, so that single scans are seen).

    Args:
        counts: (scans,) flagged organs per scan.
    """
    scans = np.bincount(np.asarray(counts, dtype=np.int64))
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axis = figure.subplots()
    bars = axis.bar(np.arange(len(scans)), scans, color=[_KEPT] + [_FLAGGED] * (len(scans) - 1), width=0.7)
    if len(scans) <= 25:
        axis.bar_label(bars, labels=[str(n) if n else "" for n in scans], fontsize=8)
    axis.set_yscale("log")
    axis.set_ylim(0.5, max(scans.max() * 3, 10))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlim(-0.6, max(len(scans) - 0.4, 4.6))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("flagged organs in a scan")
    axis.set_ylabel("scans")
    hide_spines(axis)
    return figure


def gallery_figure(specimens: Sequence[Specimen]) -> Figure:
    """Slices through labels with their outline; reads image (first channel) and label of each.

    Args:
        specimens: at least one, in reading order.
    """
    columns = min(_COLUMNS, len(specimens))
    rows = -(-len(specimens) // columns)
    figure = Figure(figsize=(2.6 * columns, 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, specimen in zip(axes, specimens, strict=False):
        _draw_specimen(axis, specimen)
    for axis in axes[len(specimens) :]:
        axis.set_axis_off()
    return figure


def _strip(axis: Axes, values: np.ndarray, flagged: np.ndarray, limits: tuple[float, float]) -> None:
    """One organ, one feature: histogram of the kept labels, ticks for the flagged, lines for the bounds."""
    finite = np.isfinite(values)
    values, flagged = values[finite], flagged[finite]
    low, high = limits
    axis.set_yticks([])
    axis.tick_params(labelsize=7, length=2)
    hide_spines(axis, "top", "right", "left")
    if not len(values):
        axis.set_xticks([])
        axis.text(0.5, 0.4, "no values", ha="center", fontsize=8, color=_INK, transform=axis.transAxes)
        return
    left, right = float(values.min()), float(values.max())
    if np.isfinite(low):
        reach = _REACH * (high - low)
        left, right = min(max(left, low - reach), low), max(min(right, high + reach), high)
    span = (right - left) or max(abs(left), 1e-9) * 0.1
    left, right = left - 0.03 * span, right + 0.03 * span
    bins = int(np.clip(2 * np.sqrt(len(values)), 12, _MOST_BINS))
    heights, edges = np.histogram(values[~flagged], bins=bins, range=(left, right))
    axis.stairs(heights, edges, fill=True, color=_KEPT)
    top = max(float(heights.max()), 1.0)
    for limit in (low, high):
        axis.axvline(limit, color=_INK, linestyle="--", linewidth=0.9)
    bad = values[flagged]
    inside = (bad >= left) & (bad <= right)
    axis.vlines(bad[inside], 0, 0.45 * top, color=_FLAGGED, linewidth=1.1)
    for edge, marker, beyond in ((left, "<", bad < left), (right, ">", bad > right)):
        if beyond.any():
            axis.plot(edge, 0.25 * top, marker=marker, color=_FLAGGED, markersize=5, clip_on=False)
    axis.set_xlim(left, right)
    axis.set_ylim(0, 1.1 * top)
    axis.xaxis.set_major_locator(MaxNLocator(4, prune="both"))


def _draw_specimen(axis: Axes, specimen: Specimen) -> None:
    """The slice that shows most of the organ, cropped around it."""
    assert specimen.case.label is not None
    labels, geometry = read_labels(specimen.case.label)
    image, _ = read_image(specimen.case.images[:1])
    organ = labels == specimen.label
    spacing = np.asarray(geometry.spacing_mm)
    area_mm2 = [organ.sum(axis=tuple(i for i in range(3) if i != k)) * spacing.prod() / spacing[k] for k in range(3)]
    normal = int(np.argmax([area.max() for area in area_mm2]))
    index = int(np.argmax(area_mm2[normal]))
    plane = [image[0].take(index, normal), organ.take(index, normal), labels.take(index, normal) > 0]
    step = np.delete(spacing, normal)
    window = _crop_window(plane[1], step)
    pixels, mask, others = (part[window] for part in plane)
    if normal != 0:  # z runs upwards in a patient
        pixels, mask, others = pixels[::-1], mask[::-1], others[::-1]
    low, high = np.percentile(pixels, (1, 99))
    axis.imshow(pixels, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=float(step[0] / step[1]))
    outline = _FLAGGED if specimen.reason else _ORDINARY
    for part, color, width in ((others & ~mask, _OTHER, 0.8), (mask, outline, 1.6)):
        padded = np.pad(part, 1).astype(float)
        if part.any():
            extent = np.arange(-1, part.shape[1] + 1), np.arange(-1, part.shape[0] + 1)
            axis.contour(*extent, padded, levels=[0.5], colors=[color], linewidths=width)
    axis.set_xlim(-0.5, pixels.shape[1] - 0.5)
    axis.set_ylim(pixels.shape[0] - 0.5, -0.5)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(f"{shorten_middle(specimen.case.name, 26)}\n{shorten_middle(specimen.organ, 26)}", fontsize=9)
    axis.set_xlabel(specimen.reason, fontsize=8, color=_INK)


def _crop_window(mask: np.ndarray, step_mm: np.ndarray) -> tuple[slice, slice]:
    """A window around the mask, square in mm where the slice allows it, with a margin."""
    found = [np.flatnonzero(mask.any(axis=1 - k)) for k in range(2)]
    size_mm = (
        max((where[-1] - where[0] + 1) * step for where, step in zip(found, step_mm, strict=True)) + 2 * _MARGIN_MM
    )
    windows = []
    for where, step, length in zip(found, step_mm, mask.shape, strict=True):
        wanted = min(length, max(2, round(size_mm / step)))
        start = int(np.clip((where[0] + where[-1] + 1 - wanted) // 2, 0, length - wanted))
        windows.append(slice(start, start + wanted))
    return windows[0], windows[1]
