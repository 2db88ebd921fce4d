"""Pictures of cases for the evaluation reports. Figures are made without pyplot, so nothing global is touched."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.drawing import fullest_slice, outline, shorten, slice_name
from ukbob_seg.errors import DatasetError

logger = logging.getLogger(__name__)

_REFERENCE, _PREDICTION = "#1f8fff", "#ff6a00"
_FEW_CLASSES = 12
_COLUMNS = 5
_MARGIN_MM = 8.0


@dataclass(frozen=True)
class View:
    """A square part of a slice: its axis and index, its centre (row, column in pixels) and half its edge."""

    normal: int
    index: int
    centre: tuple[float, ...]
    half_mm: float


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
    title: str = ""  # instead of the case
    row: str = ""  # beside the picture
    view: View | None = None  # None: the slice in which the class's maps differ most, around the class


def overlay_figure(overlays: Sequence[Overlay], columns: int = _COLUMNS) -> Figure:
    """One slice per case through the class that it did worst on; reads the files.

    Args:
        overlays: at least one, in reading order.
        columns: most pictures in a row.
    """
    columns = min(columns, len(overlays))
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


def in_one_view(overlays: Sequence[Overlay]) -> list[Overlay]:
    """Several predictions of one case, all to be drawn in the slice in which they differ most from the reference."""
    reference, geometry = read_labels(overlays[0].reference)
    true = np.isin(reference, overlays[0].values)
    differing, either = np.zeros_like(true), true.copy()
    for overlay in overlays:
        predicted = np.isin(read_labels(overlay.prediction)[0], overlay.values)
        if overlay.ignore_value is not None:
            predicted &= reference != overlay.ignore_value
        differing |= true ^ predicted
        either |= predicted
    view = _view(differing if differing.any() else true, either, np.asarray(geometry.spacing_mm))
    return [replace(overlay, view=view) for overlay in overlays]


def _draw_overlay(axis: Axes, overlay: Overlay) -> None:
    """The slice in which the class's maps differ most, cropped around the class."""
    reference, geometry = read_labels(overlay.reference)
    prediction, _ = read_labels(overlay.prediction)
    spacing = np.asarray(geometry.spacing_mm)
    if overlay.ignore_value is not None:
        ignored = reference == overlay.ignore_value
        reference, prediction = np.where(ignored, 0, reference), np.where(ignored, 0, prediction)
    masks = [np.isin(labels, overlay.values) for labels in (reference, prediction)]
    differing = masks[0] ^ masks[1]
    view = overlay.view or _view(differing if differing.any() else masks[0], masks[0] | masks[1], spacing)
    normal, index = view.normal, view.index
    step = np.delete(spacing, normal)
    planes = [labels.take(index, normal) for labels in (reference, prediction, *masks)]
    background, levels = _background(overlay, reference)
    pixels, *planes = [background.take(index, normal), *planes]
    axis.imshow(pixels, cmap="gray", vmin=levels[0], vmax=levels[1], aspect=float(step[0] / step[1]))
    alpha = 0.55 if len(np.unique(planes[0])) <= _FEW_CLASSES else 0.3
    for labels, color in ((planes[0], _REFERENCE), (planes[1], _PREDICTION)):
        axis.add_collection(LineCollection(list(outline(labels)), colors=color, linewidths=0.7, alpha=alpha))
    # The prediction is drawn thinner and on top: where both agree it shows as a line with a casing.
    for mask, color, width in ((planes[2], _REFERENCE, 2.6), (planes[3], _PREDICTION, 1.2)):
        axis.add_collection(LineCollection(list(outline(mask)), colors=color, linewidths=width, capstyle="round"))
    edges = zip(view.centre, step, strict=True)
    rows, columns = ((at - view.half_mm / mm, at + view.half_mm / mm) for at, mm in edges)
    axis.set_xlim(*columns)
    axis.set_ylim(*(rows if normal != 0 else rows[::-1]))  # z runs upwards in a patient
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(shorten(overlay.title or overlay.case, 26), fontsize=9)
    axis.set_ylabel(shorten(overlay.row, 26), fontsize=9)
    scored = f"{shorten(overlay.class_name, 22)}, Dice {overlay.dice:.3f}"
    if not masks[0].any() or not masks[1].any():
        scored += ", not in the reference" if masks[1].any() else ", not predicted"
    axis.set_xlabel(f"{scored}\n{slice_name(normal, index)}", fontsize=8)


def _view(differing: np.ndarray, either: np.ndarray, spacing: np.ndarray) -> View:
    """The slice with the most of one mask, and in it a square around the other, with a margin."""
    normal, index = fullest_slice(differing, spacing)
    mask, step_mm = either.take(index, normal), np.delete(spacing, normal)
    found = [np.flatnonzero(mask.any(axis=1 - axis)) for axis in range(2)]
    extent_mm = max((where[-1] - where[0] + 1) * step for where, step in zip(found, step_mm, strict=True))
    centre = tuple((where[0] + where[-1]) / 2 for where in found)
    return View(normal, index, centre, float(extent_mm / 2 + max(_MARGIN_MM, 0.25 * extent_mm)))


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
