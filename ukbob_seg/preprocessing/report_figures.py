"""Pictures of the report of preprocessing. Figures are made without pyplot, so nothing global is touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from ukbob_seg.drawing import FEW_CLASSES, class_color, hide_spines, outline, shorten_middle
from ukbob_seg.preprocessing.fingerprint_cases import CaseFingerprint
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import ConfigurationPlan
from ukbob_seg.preprocessing.report_numbers import ChannelHistogram

_BEFORE, _AFTER, _MARK, _INK, _GREY = "#c3ccd6", "#3b6ea5", "#d62728", "#1d2733", "#dfe5eb"
_PATCHES = ("#d62728", "#1f6feb", "#2ca02c", "#9467bd")
_CLASSES_PER_FIGURE = 40
_MOST_BINS = 40
_MOST_HEIGHT, _MOST_HEIGHT_OF_SEVERAL = 4.2, 3.0  # of a picture of one channel, and of several, inches
_ROWS_CAPTION = (
    "A row per class, sorted by the median (red, at the edge where it lies beyond the axis); the darkest blue is the "
    "most frequent value of the class."
)
_FILL = 0.3  # opacity of labels where classes are too many for outlines of their own


@dataclass(frozen=True)
class SliceView:
    """One slice of one array, with its place in the frame that the panels of a case share.

    Attributes:
        title: above the panel.
        pixels: (C, rows, columns); empty when there is nothing to show.
        labels: (rows, columns) label indices.
        step_mm: pixel size (rows, columns).
        start_mm: outer corner of the first pixel in the shared frame (rows, columns).
        windows: black and white level of each channel.
        note: below the panel; in place of the picture when there is none.
    """

    title: str
    pixels: np.ndarray
    labels: np.ndarray
    step_mm: tuple[float, float] = (1.0, 1.0)
    start_mm: tuple[float, float] = (0.0, 0.0)
    windows: tuple[tuple[float, float], ...] = ()
    note: str = ""


def size_figure(cases: Sequence[CaseFingerprint], target_mm: tuple[float, float, float]) -> Figure:
    """Sizes before and after cropping, and spacings with the target, of each axis.

    Args:
        cases: of the fingerprint.
        target_mm: spacing (z, y, x) of the finest configuration.
    """
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, letter in enumerate("zyx"):
        sizes = [np.array([c.shape[axis] for c in cases]), np.array([c.cropped_shape[axis] for c in cases])]
        edges = _bin_edges(np.concatenate(sizes).astype(float), whole=True)
        for values, color, word in zip(sizes, (_BEFORE, _AFTER), ("as read", "cropped to nonzero"), strict=True):
            heights, _ = np.histogram(values, edges)
            filled = color == _BEFORE
            axes[0, axis].stairs(heights, edges, fill=filled, color=color, label=word, linewidth=1.6)
        axes[0, axis].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes[0, axis].set_xlabel(f"size {letter}, voxels")
        spacings = np.array([c.spacing_mm[axis] for c in cases])
        edges = _bin_edges(spacings)
        heights, _ = np.histogram(spacings, edges)
        axes[1, axis].stairs(heights, edges, fill=True, color=_BEFORE)
        axes[1, axis].axvline(target_mm[axis], color=_MARK, linewidth=1.4, label="target")
        same = np.ptp(spacings) <= 1e-6 * spacings.max()
        axes[1, axis].xaxis.set_major_locator(FixedLocator([spacings[0]]) if same else MaxNLocator(5))
        axes[1, axis].set_xlabel(f"spacing {letter}, mm")
    for axis in axes.ravel():
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.tick_params(labelsize=8)
        axis.set_ylim(0, axis.get_ylim()[1] * 1.05)
        hide_spines(axis)
    for row in axes:
        row[0].set_ylabel("cases")
    handles = [*axes[0, 0].get_legend_handles_labels()[0], *axes[1, 0].get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    return figure


def histogram_figure(histogram: ChannelHistogram, names: Sequence[str], plan: ChannelNormalization) -> Figure:
    """One channel's foreground intensities, the classes on top when they are few, marks where the plan clips.

    Args:
        histogram: of the channel.
        names: of the classes.
        plan: how the channel is normalised.
    """
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    axis = figure.subplots()
    edges = histogram.edges
    back = _GREY if len(names) <= FEW_CLASSES else _BEFORE
    axis.stairs(_density(histogram.foreground[1:-1], edges), edges, fill=True, color=back, label="all foreground")
    drawn = [k for k in range(len(names)) if histogram.counts[k].any()]
    if len(names) <= FEW_CLASSES:
        for k in drawn:
            heights, name = _density(histogram.counts[k, 1:-1], edges), shorten_middle(names[k], 30)
            axis.stairs(heights, edges, linewidth=1.5, color=class_color(k, len(names)), label=name)
    for value, word, side in ((plan.clip_low, "clip", 1), (plan.clip_high, "clip", -1), (plan.mean, "mean", 1)):
        if value is not None:
            axis.axvline(value, color=_INK, linestyle="--" if word == "clip" else "-", linewidth=1.1)
            axis.annotate(
                f"{word} {value:.4g}", (value, 1), (3 * side, -2), ("data", "axes fraction"), "offset points",
                va="top", ha="left" if side > 0 else "right", fontsize=8, color=_INK,
            )  # fmt: skip
    axis.set_xlim(edges[0], edges[-1])
    axis.set_ylim(0, axis.get_ylim()[1] * 1.1)
    axis.set_yticks([])
    axis.set_ylabel("density")
    axis.set_xlabel("intensity before normalization")
    hide_spines(axis, "top", "right", "left")
    if len(names) <= FEW_CLASSES:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def class_rows_figures(histogram: ChannelHistogram, names: Sequence[str]) -> Iterator[tuple[Figure, str]]:
    """One channel's intensities, a row of grey values per class, the darkest class first; forty to a figure.

    Yields:
        (figure, caption); nothing when no class has a sample.
    """
    medians = histogram.medians()
    order = [int(k) for k in np.argsort(medians, kind="stable") if np.isfinite(medians[k])]
    figures = -(-len(order) // _CLASSES_PER_FIGURE)
    size = -(-len(order) // max(figures, 1))
    for start in range(0, len(order), max(size, 1)):
        shown = order[start : start + size]
        figure = Figure(figsize=(9.6, 0.21 * len(shown) + 0.8), layout="constrained")
        axis = figure.subplots()
        rows = histogram.counts[shown, 1:-1]
        rows = rows / np.maximum(rows.max(axis=1, keepdims=True), 1)
        extent = (histogram.edges[0], histogram.edges[-1], len(shown) - 0.5, -0.5)
        axis.imshow(rows, cmap="Blues", aspect="auto", extent=extent, interpolation="nearest", vmin=0, vmax=1.1)
        axis.hlines(np.arange(1, len(shown)) - 0.5, *extent[:2], color="white", linewidth=1.5)
        axis.vlines(medians[shown], np.arange(len(shown)) - 0.45, np.arange(len(shown)) + 0.45, color=_MARK)
        axis.set_yticks(range(len(shown)), [shorten_middle(names[k], 36) for k in shown], fontsize=8)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("intensity before normalization")
        hide_spines(axis, "top", "right", "left")
        part = f"Classes {start + 1} to {start + len(shown)} of {len(order)}. " if figures > 1 else ""
        yield figure, part + _ROWS_CAPTION


def patch_figure(configurations: dict[str, ConfigurationPlan]) -> Figure:
    """Patches of every network inside the median case, in mm, looked at along each axis.

    Args:
        configurations: of the plans; at least one.
    """
    figure = Figure(figsize=(9.6, 2.7 * len(configurations)), layout="constrained")
    axes = figure.subplots(len(configurations), 3, squeeze=False)
    for row, (name, plan) in zip(axes, configurations.items(), strict=True):
        spacing = np.asarray(plan.spacing_mm)
        boxes = [("median case", np.asarray(plan.median_shape) * spacing, _BEFORE)]
        for (network, entry), color in zip(plan.networks.items(), _PATCHES * len(plan.networks), strict=False):
            boxes.append((f"patch of {shorten_middle(network, 24)}", np.asarray(entry.patch_size) * spacing, color))
        half = max(float(size.max()) for _, size, _ in boxes) * 0.54
        for normal, axis in enumerate(row):
            for number, (label, size, color) in enumerate(boxes):
                height, width = np.delete(size, normal)
                face, edge, line = (color, "none", 0.0) if number == 0 else ("none", color, 2.4 - 0.7 * (number % 3))
                corner = (-width / 2, -height / 2)
                axis.add_patch(
                    Rectangle(corner, width, height, facecolor=face, edgecolor=edge, linewidth=line, label=label)
                )
            axis.set_xlim(-half, half)
            axis.set_ylim(-half, half)
            axis.set_aspect("equal")
            axis.tick_params(labelsize=7)
            left = "zyx".replace("zyx"[normal], "")
            axis.set_xlabel(f"{left[1]}, mm", fontsize=8)
            axis.set_ylabel(f"{left[0]}, mm", fontsize=8)
            hide_spines(axis)
        row[0].set_title(shorten_middle(name, 30), fontsize=9, loc="left")
        row[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return figure


def slices_figure(views: Sequence[SliceView], normal: int, channels: Sequence[str], names: Sequence[str]) -> Figure:
    """One case before and after preprocessing: a column per array, a row per channel, labels on top.

    Args:
        views: at least one; all share a frame in mm, whose size is that of the first with pixels.
        normal: axis across the slice.
        channels: names of the channels shown.
        names: of the label indices from 1.
    """
    frame = _frame(views)
    most = _MOST_HEIGHT if len(channels) == 1 else _MOST_HEIGHT_OF_SEVERAL
    width = float(np.clip(most * frame[1] / frame[0], 2.9, 9.6 / max(len(views), 2)))
    height = float(np.clip(width * frame[0] / frame[1], 1.2, most))
    figure = Figure(figsize=(width * len(views), (height + 0.45) * len(channels) + 0.5), layout="constrained")
    axes = figure.subplots(len(channels), len(views), squeeze=False)
    for channel, row in enumerate(axes):
        for view, axis in zip(views, row, strict=True):
            _draw_view(axis, view, channel, frame, normal, len(names))
        if len(channels) > 1:
            row[0].set_ylabel(shorten_middle(channels[channel], 24), fontsize=9)
    found = [np.unique(view.labels) for view in views]
    present = [int(k) for k in np.unique(np.concatenate(found)) if k > 0]
    if 0 < len(present) <= FEW_CLASSES:
        handles = [
            Patch(color=class_color(k - 1, len(names)), label=shorten_middle(_index_name(k, names), 30))
            for k in present
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _index_name(index: int, names: Sequence[str]) -> str:
    return names[index - 1] if index <= len(names) else "ignore"


def _frame(views: Sequence[SliceView]) -> tuple[float, float]:
    """Size in mm (rows, columns) of the first picture."""
    for view in views:
        if view.pixels.size:
            return view.pixels.shape[1] * view.step_mm[0], view.pixels.shape[2] * view.step_mm[1]
    return 1.0, 1.0


def _draw_view(
    axis: Axes, view: SliceView, channel: int, frame: tuple[float, float], normal: int, classes: int
) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    if channel == 0:
        axis.set_title(view.title, fontsize=9)
    if not view.pixels.size:
        axis.text(0.5, 0.5, view.note, ha="center", va="center", fontsize=8, wrap=True, transform=axis.transAxes)
        hide_spines(axis, "top", "right", "left", "bottom")
        return
    (top, left), (high, wide) = view.start_mm, view.step_mm
    rows, columns = view.labels.shape
    extent = (left, left + columns * wide, top + rows * high, top)
    low, most = view.windows[channel]
    axis.imshow(view.pixels[channel], cmap="gray", vmin=low, vmax=most, extent=extent)
    own_outlines = classes <= FEW_CLASSES
    colors = {int(k): class_color(int(k) - 1, classes) for k in np.unique(view.labels) if k}
    fill = np.zeros((rows, columns, 4))
    for index, color in colors.items():
        mask = view.labels == index
        fill[mask] = (*color, 0.12 if own_outlines else _FILL)
        segments = (outline(mask) + 0.5) * (wide, high) + (left, top)
        axis.add_collection(LineCollection(list(segments), colors=[color], linewidths=1.3 if own_outlines else 0.6))
    axis.imshow(fill, extent=extent, interpolation="nearest")
    axis.set_xlim(0, frame[1])
    axis.set_ylim(*((frame[0], 0) if normal == 0 else (0, frame[0])))  # z runs upwards in a patient
    axis.set_xlabel(f"{view.note}\ngrey {low:.4g} to {most:.4g}" if channel == 0 else f"grey {low:.4g} to {most:.4g}",
                    fontsize=8)  # fmt: skip


def _density(counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return counts / (max(int(counts.sum()), 1) * np.diff(edges))


def _bin_edges(values: np.ndarray, whole: bool = False) -> np.ndarray:
    """Bins over all values; of whole width for whole numbers, and one in the middle when all are equal."""
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-6 * abs(high):
        width = 1.0 if whole else max(abs(low), 1e-9) * 0.05
        return low + width * np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    if whole:
        width = max(1.0, np.ceil((high - low) / _MOST_BINS))
        return low - 0.5 + width * np.arange(np.ceil((high - low + 1) / width) + 1)
    return np.linspace(low, high, int(np.clip(2 * np.sqrt(len(values)), 10, _MOST_BINS)) + 1)
