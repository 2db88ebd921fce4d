"""How a metric scatters over cases, class by class. Figures are made without pyplot, so nothing global is touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ukbob_seg.drawing import hide_spines, shorten
from ukbob_seg.evaluation.metrics import DISTANCES
from ukbob_seg.evaluation.summary import EvaluationSummary

_INK, _DOT, _MISSED, _BOX = "#1d2733", "#3b6ea5", "#d62728", "#c9dbee"
_CLASSES_PER_FIGURE = 40
_FEW_CLASSES = 12
_FEWEST_FOR_QUARTILES = 5
_MOST_DOTS = 500  # beyond, a row is a density with its worst cases
_WORST = 10
_BINS = 80
_WIDE_MM = 30.0  # distances beyond need a logarithmic axis for the small ones to be seen
_LINEAR_MM = 2.0


@dataclass(frozen=True)
class _Axis:
    """How a metric is drawn: its name, which end is bad, and its limits."""

    title: str
    distance: bool
    low: float
    high: float

    @property
    def logarithmic(self) -> bool:
        return self.distance and self.high > _WIDE_MM

    @property
    def infinite_at(self) -> float:
        """Where an infinite distance is drawn."""
        return self.high * (1.35 if self.logarithmic else 1.06)


def metric_title(metric: str, tolerances: Sequence[float]) -> str:
    """What people call it: ``Dice``, ``HD95 (mm)``, ``NSD at 2 mm``."""
    if metric.startswith("nsd"):
        return f"NSD at {metric[4:-2] if metric != 'nsd' else f'{tolerances[0]:g}'} mm"
    names = {"dice": "Dice", "iou": "IoU", "precision": "Precision", "recall": "Recall"}
    return names.get(metric, metric.upper()) + (" (mm)" if metric in DISTANCES else "")


def distribution_figures(summary: EvaluationSummary, metric: str = "dice") -> Iterator[tuple[Figure, str]]:
    """Every value of a metric, one row per class: dots, quartiles and median; at most forty classes to a figure.

    Up to twelve classes keep their order; more are sorted by their median, the worst first. With more than 500 cases a
    row shows the density and the worst ten. Infinite distances stand in red at the right end.

    Yields:
        (figure, caption)
    """
    table = summary.wide(metric)
    values = {name: column[~np.isnan(column)] for name, column in zip(table, table.to_numpy().T, strict=True)}
    names = [name for name in values if len(values[name])]
    if not names:
        return
    distance = metric in DISTANCES
    if len(names) > _FEW_CLASSES:
        names.sort(key=lambda name: float(np.median(values[name])), reverse=distance)
    axis = _axis(metric_title(metric, summary.tolerances), distance, np.concatenate([values[name] for name in names]))
    figures = -(-len(names) // _CLASSES_PER_FIGURE)
    size = -(-len(names) // figures)
    for start in range(0, len(names), size):
        shown = names[start : start + size]
        part = f"Classes {start + 1} to {start + len(shown)} of {len(names)}, the worst median first. "
        yield _figure(shown, values, axis), (part if figures > 1 else "") + _caption(axis, len(table))


def _axis(title: str, distance: bool, values: np.ndarray) -> _Axis:
    finite = values[np.isfinite(values)]
    if distance:
        return _Axis(title, True, 0.0, max(1.0, float(finite.max(initial=0.0))))
    return _Axis(title, False, max(0.0, np.floor((float(finite.min(initial=1.0)) - 0.03) * 20) / 20), 1.0)


def _figure(names: Sequence[str], values: dict[str, np.ndarray], metric: _Axis) -> Figure:
    row_height = 0.42 if len(names) <= _FEW_CLASSES else 0.24
    figure = Figure(figsize=(9.2, row_height * len(names) + 0.8), layout="constrained")
    axis = figure.subplots()
    if metric.logarithmic:
        axis.set_xscale("symlog", linthresh=_LINEAR_MM, linscale=0.6)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    infinite = any(np.isinf(values[name]).any() for name in names)
    for row, name in enumerate(names):
        _strip(axis, row, values[name], metric)
    axis.set_yticks(range(len(names)), [shorten(name, 32) for name in names], fontsize=9)
    axis.set_ylim(len(names) - 0.45, -0.55)
    margin = 0.01 * (metric.high - metric.low)
    axis.set_xlim(metric.low - margin, (metric.infinite_at if infinite else metric.high) + margin)
    axis.set_xlabel(metric.title)
    axis.grid(axis="x", color="#e3e8ee", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    hide_spines(axis, "top", "right", "left")
    return figure


def _strip(axis: Axes, row: int, values: np.ndarray, metric: _Axis) -> None:
    """One class: quartile bar, median line, a dot per case or a density."""
    finite = np.sort(values[np.isfinite(values)])
    missed = int(np.isinf(values).sum())
    if missed:
        axis.scatter([metric.infinite_at], [row], s=22, c=_MISSED, marker=">", linewidths=0, clip_on=False, zorder=4)
        axis.annotate(
            str(missed), (metric.infinite_at, row), (7, 0), textcoords="offset points",
            color=_MISSED, fontsize=8, va="center", annotation_clip=False,
        )  # fmt: skip
    if not len(finite):
        return
    lower, median, upper = np.percentile(finite, (25, 50, 75))
    if len(finite) >= _FEWEST_FOR_QUARTILES:
        axis.barh(row, upper - lower, left=lower, height=0.62, color=_BOX)
    if len(finite) > 1:
        axis.vlines(median, row - 0.31, row + 0.31, color=_INK, linewidth=1.6, zorder=3)
    if len(finite) > _MOST_DOTS:
        _density(axis, row, finite)
        finite = finite[-_WORST:] if metric.distance else finite[:_WORST]
    # Spread in a fixed pattern (golden ratio), so that the same scores always give the same picture.
    offset = 0.5 * ((np.arange(len(finite)) * 0.6180339887) % 1 - 0.5) if len(finite) > 1 else np.zeros(1)
    size = 14 if len(finite) <= 100 else 6
    colors = np.where((finite > 0) | metric.distance, _DOT, _MISSED)
    axis.scatter(finite, row + offset, s=size, c=colors, alpha=0.65, linewidths=0, zorder=2, clip_on=False)


def _density(axis: Axes, row: int, values: np.ndarray) -> None:
    counts, edges = np.histogram(values, _BINS)
    height = 0.4 * counts / counts.max()
    centres = (edges[1:] + edges[:-1]) / 2
    axis.fill_between(centres, row - height, row + height, color=_DOT, alpha=0.45, linewidth=0, zorder=2)


def _caption(metric: _Axis, cases: int) -> str:
    dots = f"Shape: density of the cases; dots: the {_WORST} worst" if cases > _MOST_DOTS else "A dot per case"
    red = "red: infinite, in one of the maps only, with their number" if metric.distance else "red: 0"
    scale = f" Logarithmic beyond {_LINEAR_MM:g} mm." if metric.logarithmic else ""
    return f"{dots} ({red}); line: median; bar: quartiles, from {_FEWEST_FOR_QUARTILES} cases.{scale}"
