"""The page of class embeddings: the map with every class's name at its place, and the numbers behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ukbob_seg.benchmark.embeddings_map import EmbeddingMap
from ukbob_seg.drawing import FEW_CLASSES, class_color, shorten_middle
from ukbob_seg.files import atomic_path
from ukbob_seg.report_page import ReportPage

PLACES, PAGE, NUMBERS = "tsne.csv", "embeddings.html", "embeddings.json"
_LONGEST = 24  # characters of a label
_STEPS = 400  # at most, until no label covers another
_WIDTH, _HEIGHT = 0.58, 1.25  # of a character and a line, as shares of the font's size


def write_places(path: Path, result: EmbeddingMap) -> None:
    """Write tsne.csv: case, class, x, y, nearest, silhouette."""
    with atomic_path(path) as temporary:
        result.points.to_csv(temporary, index=False, na_rep="")


def write_report(path: Path, result: EmbeddingMap, source: str, notes: Sequence[str] = ()) -> None:
    """Write the self-contained HTML page.

    Args:
        path: of the HTML file.
        result: to show.
        source: model and images, for the line under the title.
        notes: further sentences, such as which labels said what is what.
    """
    classes, cases = result.classes, result.points["case"].nunique()
    page = ReportPage("Class embeddings", source)
    chance = 1 / len(classes)
    page.tiles(
        [
            ("nearest-centroid accuracy", _fixed(result.accuracy)),
            ("silhouette", _fixed(result.silhouette)),
            ("cases", str(cases)),
            ("classes", str(len(classes))),
            ("embeddings", str(len(result.points))),
        ]
    )
    page.paragraph(
        "Both numbers are of the standardised features, not of the map. Accuracy: share of embeddings that lie nearest "
        "to the centroid of their own class, from which they were left out "
        f"({result.judged} judged; guessing: {chance:.3f}). Silhouette, -1 to 1: above 0 an embedding is nearer to "
        "its own class than to the next one, on average."
    )
    page.figure(
        map_figure(result.points, list(classes.index)),
        f"t-SNE, perplexity {result.perplexity:.3g}. A dot per case and class; from a name a line "
        "leads to the median of its dots. Neighbours mean something; sizes of clusters and distances between them do "
        "not.",
    )
    page.heading("Classes")
    header = ["class", "embeddings", "nearest to its own", "silhouette", "else nearest to, most often"]
    if len(classes) > FEW_CLASSES:  # what is not told apart comes first
        classes = classes.sort_values(["correct", "silhouette"], kind="stable")
    rows = [
        [str(name), int(row["points"]), float(row["correct"]), float(row["silhouette"]), row["confused"] or ""]
        for name, row in classes.iterrows()
    ]
    page.table(header, rows)
    page.heading("Definitions")
    page.bullets(
        [
            "Embedding: mean of the last feature map, the input of the segmentation head, over the voxels of the class "
            "in the case, under the same sliding windows as a prediction.",
            "Features are brought to mean 0 and standard deviation 1 over all embeddings before anything else.",
            "A class that is in one case only has no centroid without it: it is drawn and not judged.",
            *notes,
        ]
    )
    page.write(path)


def map_figure(points: pd.DataFrame, names: Sequence[str]) -> Figure:
    """The map; names beside the medians of the classes, moved apart where they would cover each other.

    Args:
        points: of an ``EmbeddingMap``.
        names: of the classes, in reporting order, which decides their colours.
    """
    many = len(names) > FEW_CLASSES
    size = (11.0, 9.5) if many else (8.0, 5.8)
    figure = Figure(figsize=size)
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    dot = float(np.clip(9000 / max(len(points), 1), 5, 45))
    for number, name in enumerate(names):
        own = points[points["class"] == name]
        color = class_color(number, len(names))
        axis.scatter(own["x"], own["y"], s=dot, color=color, alpha=0.7, linewidths=0)
    _frame(axis, points)
    _write_names(axis, points, names, 7.5 if many else 11.0)
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_color("#d9dfe6")
    return figure


def _frame(axis: Axes, points: pd.DataFrame) -> None:
    """Limits with room for names at the border."""
    for column, limits in (("x", axis.set_xlim), ("y", axis.set_ylim)):
        low, high = float(points[column].min()), float(points[column].max())
        margin = max(high - low, 1e-6) * (0.1 if column == "x" else 0.08)
        limits(low - margin, high + margin)


def _write_names(axis: Axes, points: pd.DataFrame, names: Sequence[str], font: float) -> None:
    """Each beside the middle of its dots, in a dark shade of their colour, with a thin line to the median."""
    medians = points.groupby("class")[["x", "y"]].median().loc[list(names)].to_numpy()
    texts = [shorten_middle(name, _LONGEST) for name in names]
    figure = axis.get_figure()
    assert figure is not None
    scale = figure.dpi / 72 * font
    sizes = np.array([(_WIDTH * scale * len(text), _HEIGHT * scale) for text in texts])
    low, high = axis.transAxes.transform([(0, 0), (1, 1)])
    wanted = _beside(axis, points, names, medians, sizes[:, 1])
    placed = axis.transData.inverted().transform(apart(wanted, sizes, low, high))
    for number, (text, (x, y), (to_x, to_y)) in enumerate(zip(texts, placed, medians, strict=True)):
        color = tuple(0.55 * part for part in class_color(number, len(names)))
        axis.plot([x, to_x], [y, to_y], color=color, linewidth=0.7, alpha=0.8, zorder=3)
        axis.text(
            x, y, text, ha="center", va="center", fontsize=font, color=color, zorder=4,
            path_effects=[withStroke(linewidth=2.4, foreground="white")],
        )  # fmt: skip


def _beside(
    axis: Axes, points: pd.DataFrame, names: Sequence[str], medians: np.ndarray, heights: np.ndarray
) -> np.ndarray:
    """Where names are wanted, in pixels: above the dots, or below where the next class is above.

    Of many classes, whose dots leave less room, near the inner half of the dots.
    """
    pixels = axis.transData.transform(medians)
    wanted = pixels.copy()
    for number, name in enumerate(names):
        dots = axis.transData.transform(points.loc[points["class"] == name, ["x", "y"]].to_numpy())
        distances = np.linalg.norm(pixels - pixels[number], axis=1)
        distances[number] = np.inf
        next_one = pixels[int(distances.argmin())]
        below = len(names) > 1 and next_one[1] > pixels[number, 1]
        sign = -1 if below else 1
        offsets = sign * (dots[:, 1] - pixels[number, 1])
        many = len(names) > FEW_CLASSES
        reach = min(float(np.quantile(np.abs(offsets), 0.5)), 3 * heights[number]) if many else float(offsets.max())
        wanted[number, 1] += sign * (reach + 0.9 * heights[number])
    return wanted


def apart(centres: np.ndarray, sizes: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Move boxes until none covers another, each along the shorter way; the same input gives the same result.

    Args:
        centres: (N, 2) wanted.
        sizes: (N, 2) width and height.
        low: (2,) corner that all boxes have to stay within, as far as they fit.
        high: (2,) the opposite corner.

    Returns:
        (N, 2) centres. After ``_STEPS`` rounds some may still overlap, where there is no room.
    """
    places = centres.astype(float) + 1e-3 * np.stack([np.arange(len(centres)), -np.arange(len(centres))], axis=1)
    half = sizes / 2
    most = np.maximum(high - half, low + half)
    places = np.clip(places, low + half, most)
    for _ in range(_STEPS):
        between = places[:, None] - places[None]
        overlap = half[:, None] + half[None] - np.abs(between)
        covered = (overlap > 0).all(axis=2) & ~np.eye(len(places), dtype=bool)
        if not covered.any():
            break
        upright = overlap[..., 1] <= overlap[..., 0]  # the way that is shorter
        step = np.where(np.stack([~upright, upright], axis=2), np.sign(between) * overlap, 0.0)
        places = places + np.where(covered[..., None], 0.5 * step, 0.0).sum(axis=1)
        places = np.clip(places, low + half, most)
    return places


def _fixed(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
