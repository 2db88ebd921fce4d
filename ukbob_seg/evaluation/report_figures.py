"""Pictures of the evaluation report. Figures are made without pyplot, so nothing global is touched."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.drawing import fullest_slice, hide_spines, outline, shorten, slice_name
from ukbob_seg.errors import DatasetError
from ukbob_seg.evaluation.summary import EvaluationSummary

logger = logging.getLogger(__name__)

_REFERENCE, _PREDICTION, _INK = "#1f8fff", "#ff6a00", "#1d2733"
_DOT, _MISSED, _BOX = "#3b6ea5", "#d62728", "#c9dbee"
_CLASSES_PER_FIGURE = 40
_FEW_CLASSES = 12
_FEWEST_FOR_QUARTILES = 5
_CAPTION = f"A dot per case (red: Dice 0); line: median; bar: quartiles, from {_FEWEST_FOR_QUARTILES} cases."
_COLUMNS = 5
_MARGIN_MM = 8.0


@dataclass(frozen=True)
class Overlay:
    """One picture: a case, the class it is about, and the files."""

    case: str
    class_name: str
    values: tuple[int, ...]
    dice: float
    prediction: Path
    reference: Path
    image: Path | None = None
    ignore_value: int | None = None


def dice_figures(summary: EvaluationSummary) -> Iterator[tuple[Figure, str]]:
    """Every Dice score, one row per class: dots, quartiles and median; at most forty classes to a figure.

    Up to twelve classes keep their order; more are sorted by their median, lowest first.

    Yields:
        (figure, caption)
    """
    groups = {name: rows.to_numpy(np.float64) for name, rows in summary.table.groupby("class", sort=False)["dice"]}
    scores = {name: groups[name][np.isfinite(groups[name])] for name in summary.classes}
    names = [name for name in summary.classes if len(scores[name])]
    if not names:
        return
    if len(names) > _FEW_CLASSES:
        names.sort(key=lambda name: float(np.median(scores[name])))
    low = min(float(scores[name].min()) for name in names)
    left = max(0.0, np.floor((low - 0.03) * 20) / 20)
    figures = -(-len(names) // _CLASSES_PER_FIGURE)
    size = -(-len(names) // figures)
    for start in range(0, len(names), size):
        shown = names[start : start + size]
        row_height = 0.42 if len(shown) <= _FEW_CLASSES else 0.24
        figure = Figure(figsize=(9.2, row_height * len(shown) + 0.8), layout="constrained")
        axis = figure.subplots()
        for row, name in enumerate(shown):
            _strip(axis, row, scores[name])
        axis.set_yticks(range(len(shown)), [shorten(name, 32) for name in shown], fontsize=9)
        axis.set_ylim(len(shown) - 0.45, -0.55)
        axis.set_xlim(left - 0.01 * (1 - left), 1 + 0.01 * (1 - left))
        axis.set_xlabel("Dice")
        axis.grid(axis="x", color="#e3e8ee", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
        hide_spines(axis, "top", "right", "left")
        part = f"Classes {start + 1} to {start + len(shown)} of {len(names)}, lowest median first. "
        yield figure, (part if figures > 1 else "") + _CAPTION


def overlay_figure(overlays: Sequence[Overlay]) -> Figure:
    """One slice per case through the class that it did worst on; reads the files.

    Args:
        overlays: at least one, in reading order.
    """
    columns = min(_COLUMNS, len(overlays))
    rows = -(-len(overlays) // columns)
    figure = Figure(figsize=(max(2.1 * columns, 4.2), 2.75 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, overlay in zip(axes, overlays, strict=False):
        _draw_overlay(axis, overlay)
    for axis in axes[len(overlays) :]:
        axis.set_axis_off()
    figure.legend(
        handles=[
            Line2D([], [], color=_REFERENCE, linewidth=3, label="reference"),
            Line2D([], [], color=_PREDICTION, linewidth=1.5, label="prediction"),
        ],
        loc="outside upper left", ncols=2, frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def _strip(axis: Axes, row: int, scores: np.ndarray) -> None:
    """One class: quartile bar, median line, a dot per case."""
    lower, median, upper = np.percentile(scores, (25, 50, 75))
    if len(scores) >= _FEWEST_FOR_QUARTILES:
        axis.barh(row, upper - lower, left=lower, height=0.62, color=_BOX)
    if len(scores) > 1:
        axis.vlines(median, row - 0.31, row + 0.31, color=_INK, linewidth=1.6, zorder=3)
    # Spread in a fixed pattern (golden ratio), so that the same scores always give the same picture.
    offset = 0.5 * ((np.arange(len(scores)) * 0.6180339887) % 1 - 0.5) if len(scores) > 1 else np.zeros(1)
    size = 14 if len(scores) <= 100 else 6
    colors = np.where(scores > 0, _DOT, _MISSED)
    axis.scatter(scores, row + offset, s=size, c=colors, alpha=0.65, linewidths=0, zorder=2, clip_on=False)


def _draw_overlay(axis: Axes, overlay: Overlay) -> None:
    """The slice in which the class's maps differ most, cropped around the class."""
    reference, geometry = read_labels(overlay.reference)
    prediction, _ = read_labels(overlay.prediction)
    spacing = np.asarray(geometry.spacing_mm)
    if overlay.ignore_value is not None:
        ignored = reference == overlay.ignore_value
        reference, prediction = np.where(ignored, 0, reference), np.where(ignored, 0, prediction)
    masks = [np.isin(labels, overlay.values) for labels in (reference, prediction)]
    normal, index = _choose_slice(masks[0], masks[1], spacing)
    step = np.delete(spacing, normal)
    planes = [labels.take(index, normal) for labels in (reference, prediction, *masks)]
    background, levels = _background(overlay, reference)
    pixels, *planes = [background.take(index, normal), *planes]
    centre, half_mm = _window(planes[2] | planes[3], step)
    axis.imshow(pixels, cmap="gray", vmin=levels[0], vmax=levels[1], aspect=float(step[0] / step[1]))
    alpha = 0.55 if len(np.unique(planes[0])) <= _FEW_CLASSES else 0.3
    for labels, color in ((planes[0], _REFERENCE), (planes[1], _PREDICTION)):
        axis.add_collection(LineCollection(list(outline(labels)), colors=color, linewidths=0.7, alpha=alpha))
    # The prediction is drawn thinner and on top: where both agree it shows as a line with a casing.
    for mask, color, width in ((planes[2], _REFERENCE, 2.6), (planes[3], _PREDICTION, 1.2)):
        axis.add_collection(LineCollection(list(outline(mask)), colors=color, linewidths=width, capstyle="round"))
    rows, columns = ((at - half_mm / mm, at + half_mm / mm) for at, mm in zip(centre, step, strict=True))
    axis.set_xlim(*columns)
    axis.set_ylim(*(rows if normal != 0 else rows[::-1]))  # z runs upwards in a patient
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(shorten(overlay.case, 26), fontsize=9)
    scored = f"{shorten(overlay.class_name, 22)}, Dice {overlay.dice:.3f}"
    axis.set_xlabel(f"{scored}\n{slice_name(normal, index)}", fontsize=8)


def _choose_slice(reference: np.ndarray, prediction: np.ndarray, spacing: np.ndarray) -> tuple[int, int]:
    """Axis and index of the slice with the largest disagreement (of the class itself, when both maps agree)."""
    differing = reference ^ prediction
    if not differing.any():
        differing = reference
    return fullest_slice(differing, spacing)


def _window(mask: np.ndarray, step_mm: np.ndarray) -> tuple[tuple[float, ...], float]:
    """Centre (pixels) and half the edge (mm) of a square around the mask, with a margin."""
    found = [np.flatnonzero(mask.any(axis=1 - axis)) for axis in range(2)]
    extent_mm = max((where[-1] - where[0] + 1) * step for where, step in zip(found, step_mm, strict=True))
    centre = tuple((where[0] + where[-1]) / 2 for where in found)
    return centre, float(extent_mm / 2 + max(_MARGIN_MM, 0.25 * extent_mm))


def _background(overlay: Overlay, reference: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """What lies under the outlines, (Z, Y, X), and its black and white levels: the image, or labels in pale greys."""
    if overlay.image is not None:
        try:
            image, geometry = read_image([overlay.image])
            if geometry.shape == reference.shape:
                low, high = np.percentile(image[0], (1, 99.5))
                return image[0], (float(low), max(float(high), float(low) + 1e-6))
            problem = f"shape {geometry.shape}, the reference has {reference.shape}"
        except DatasetError as error:
            problem = str(error)
        logger.warning("case %s: no image under its picture (%s)", overlay.case, problem)
    shades = np.where(reference == 0, 1.0, 0.72 + 0.16 * ((reference * 0.6180339887) % 1))
    return shades, (0.0, 1.0)
