"""Pictures of the robustness report. Nothing here uses pyplot, so nothing global is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ukbob_seg.benchmark.robustness_options import METHODS, UNSHIFTED
from ukbob_seg.benchmark.robustness_table import RobustnessTable
from ukbob_seg.drawing import class_color, fullest_slice, grey_levels, hide_spines, outline, shorten_middle, slice_name

COLORS = dict(zip(METHODS, ("#7d8791", "#d9952f", "#1f6feb", "#8b3fc1"), strict=True))
_MOST_IN_LEGEND = 12
_FEWEST_FOR_QUARTILES = 5
_COLUMNS = 6  # of panels in a row of the page
_PANEL, _TALLEST, _CAPTION = 1.75, 2.4, 0.42  # inches
_MARGIN_MM = 50.0


def dice_figure(table: RobustnessTable) -> Figure:
    """Mean Dice of every case under each shift, the methods below each other."""
    dice = table.by_case()
    count, methods = len(table.shifts), table.methods
    step = 0.8 / len(methods)
    figure = Figure(figsize=(9.2, (0.22 * len(methods) + 0.2) * count + 1.1), layout="constrained")
    axis = figure.subplots()
    for row, shift in enumerate(table.shifts):
        if row % 2:
            axis.axhspan(row - 0.5, row + 0.5, color="#f4f7fa", zorder=0)
        for number, method in enumerate(methods):
            values = dice[shift, method].dropna().to_numpy()
            if len(values):
                _strip(axis, row + (number - (len(methods) - 1) / 2) * step, step, values, COLORS[method])
    axis.set_yticks(range(count), [shift_title(name) for name in table.shifts], fontsize=9)
    axis.set_ylim(count - 0.5, -0.5)
    known = dice.to_numpy()[np.isfinite(dice.to_numpy())]
    left = max(0.0, np.floor((float(known.min()) - 0.02) * 20) / 20) if len(known) else 0.0
    axis.set_xlim(left, 1.0)
    axis.set_xlabel("Dice, mean over classes")
    axis.grid(axis="x", color="#e3e8ee", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    hide_spines(axis, "top", "right", "left")
    handles = [Line2D([], [], color=COLORS[m], marker="D", markersize=6, linewidth=4, alpha=0.8) for m in methods]
    figure.legend(handles, methods, loc="outside upper left", ncols=len(methods), frameon=False, fontsize=9)
    return figure


def _strip(axis: Axes, place: float, step: float, values: np.ndarray, color: str) -> None:
    """A dot per case, a bar of the quartiles, a diamond for the mean."""
    offset = 0.7 * step * ((np.arange(len(values)) * 0.6180339887) % 1 - 0.5) if len(values) > 1 else np.zeros(1)
    if len(values) >= _FEWEST_FOR_QUARTILES:
        low, high = np.percentile(values, (25, 75))
        axis.barh(place, high - low, left=low, height=0.62 * step, color=color, alpha=0.25, linewidth=0, zorder=2)
    axis.plot(values, place + offset, "o", markersize=3.4, color=color, alpha=0.6, markeredgewidth=0, zorder=3)
    axis.plot(values.mean(), place, "D", markersize=5.5, color=color, markeredgecolor="#ffffff", zorder=4)


@dataclass(frozen=True)
class Example:
    """One slice of a case under each shift.

    Attributes:
        case: name.
        where: the slice, such as ``z = 12``.
        pixels: shift -> (rows, columns) grey values of the first channel.
        reference: (classes, rows, columns) bool.
        predictions: (shift, method) -> (classes, rows, columns) bool.
        step_mm: pixel size (rows, columns).
        is_upward: whether rows go upwards in the picture, as z does in a patient.
    """

    case: str
    where: str
    pixels: Mapping[str, np.ndarray]
    reference: np.ndarray
    predictions: Mapping[tuple[str, str], np.ndarray]
    step_mm: tuple[float, float]
    is_upward: bool


@dataclass(frozen=True)
class Cut:
    """The slice of a volume that shows most foreground, and what is shown of it.

    Attributes:
        normal: axis across the slice.
        index: of the slice.
        box: rows and columns.
    """

    normal: int
    index: int
    box: tuple[slice, slice]

    @classmethod
    def through(cls, mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> Cut:
        """Of a mask (Z, Y, X): with half its extent around it, at least some centimetres; all of an empty one."""
        spacing = np.asarray(spacing_mm)
        if not mask.any():
            normal = int(np.argmax(spacing))
            return cls(normal, mask.shape[normal] // 2, (slice(None), slice(None)))
        normal, index = fullest_slice(mask, spacing)
        plane, step = mask.take(index, normal), np.delete(spacing, normal)
        rows, columns = (_around(plane.any(axis=1 - axis), float(step[axis])) for axis in range(2))
        return cls(normal, index, (rows, columns))

    def of(self, volume: np.ndarray) -> np.ndarray:
        """(Z, Y, X) -> (rows, columns)."""
        return volume.take(self.index, self.normal)[self.box]

    @property
    def name(self) -> str:
        """Such as ``z = 12``."""
        return slice_name(self.normal, self.index)


def example_figure(example: Example, table: RobustnessTable) -> Figure:
    """A row or half a row of panels per shift: the image alone, then the outlines of each method's prediction."""
    methods, shifts = table.methods, list(example.pixels)
    wide = 1 + len(methods)
    beside = max(1, min(_COLUMNS // wide, len(shifts)))
    rows = -(-len(shifts) // beside)
    height, width = next(iter(example.pixels.values())).shape
    tall = min(_TALLEST, _PANEL * height * example.step_mm[0] / (width * example.step_mm[1]))
    size = (_PANEL * wide * beside + 0.2, (tall + _CAPTION) * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, beside * wide, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    dice = table.by_case()
    count = len(table.classes)
    for number, shift in enumerate(shifts):
        row, first = number % rows, wide * (number // rows)
        for column, method in enumerate((None, *methods)):
            axis = axes[row, first + column]
            _panel(axis, example, shift)
            if method is None:
                axis.set_title(shift_title(shift), fontsize=9, fontweight="bold")
                continue
            _outlines(axis, example.reference, example.predictions[shift, method])
            axis.set_title(f"{method}\n{dice.loc[example.case, (shift, method)]:.3f}", fontsize=8)
    handles = [Line2D([], [], color="#ffffff", linewidth=3, label="reference")]
    if count <= _MOST_IN_LEGEND:
        handles += [
            Line2D([], [], color=class_color(k, count), linewidth=2, label=shorten_middle(name, 28))
            for k, name in enumerate(table.classes)
        ]
    legend = figure.legend(
        handles=handles, loc="outside lower left", ncols=min(6, len(handles)), fontsize=8, facecolor="#9aa3ac",
        edgecolor="none",
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _panel(axis: Axes, example: Example, shift: str) -> None:
    pixels = example.pixels[shift]
    low, high = grey_levels(pixels)
    axis.imshow(pixels, cmap="gray", vmin=low, vmax=high, aspect=example.step_mm[0] / example.step_mm[1])
    if example.is_upward:
        axis.invert_yaxis()


def _outlines(axis: Axes, reference: np.ndarray, prediction: np.ndarray) -> None:
    """The prediction is thinner and on top: where both agree it shows as a line with a casing."""
    lines = [list(outline(mask)) for mask in reference]
    for color, width, alpha in (("#000000", 3.0, 0.5), ("#ffffff", 1.9, 1.0)):
        for segments in lines:
            axis.add_collection(LineCollection(segments, colors=color, linewidths=width, alpha=alpha, capstyle="round"))
    for number, mask in enumerate(prediction):
        own = class_color(number, len(reference))
        axis.add_collection(LineCollection(list(outline(mask)), colors=[own], linewidths=1.1, capstyle="round"))


def _around(present: np.ndarray, step_mm: float) -> slice:
    """Along an axis: the foreground, and on either side half its extent or some centimetres."""
    found = np.flatnonzero(present)
    extent = int(found[-1] + 1 - found[0])
    margin = int(np.ceil(max(_MARGIN_MM / step_mm, extent / 2)))
    return slice(max(0, int(found[0]) - margin), int(found[-1]) + 1 + margin)


def shift_title(shift: str) -> str:
    """For people."""
    return "no shift" if shift == UNSHIFTED else shift
