"""A picture of a predicted case: slices along three directions of the patient with the outlines of the classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from scipy.ndimage import find_objects

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.drawing import class_color, grey_levels, outline, shorten, shorten_middle, slice_name
from ukbob_seg.files import atomic_path
from ukbob_seg.inference.export import WrittenClasses

MOST_IN_LEGEND = 20
_SLICES = 6
_MARGIN_MM = 50.0
_WIDTH, _HEIGHT = 12.0, 12.5  # inches that all panels together have at most
_NARROWEST = 6.0  # inches of the figure, for its title
_GAP, _CAPTION, _SIDE, _TITLE = 0.06, 0.2, 0.3, 0.5  # inches
_LEGEND_ROW, _LEGEND_COLUMN = 0.2, 2.3
_DPI = 110
_BACK, _INK, _LETTER = "#ffffff", "#1d2733", "#ffffff"
_EDGE = [withStroke(linewidth=1.8, foreground="#000000")]  # letters are read on bright and dark tissue
_FILL_OF_FEW, _FILL_OF_MANY = 0.12, 0.22
Colors = dict[int, tuple[float, float, float]]  # RGB of each file value
# Looked at as in radiology: the patient's left is on the right, the face to the left, the head up.
_VIEWS = (("axial", "RL"), ("coronal", "RL"), ("sagittal", "AP"))


@dataclass(frozen=True)
class _Panel:
    """One slice.

    Attributes:
        name: such as ``z = 12``, in the file's voxels.
        pixels: (rows, columns), the first row on top.
        labels: (rows, columns) file values.
        step_mm: pixel size (rows, columns).
    """

    name: str
    pixels: np.ndarray
    labels: np.ndarray
    step_mm: tuple[float, float]

    @property
    def size_mm(self) -> tuple[float, float]:
        """Height and width."""
        return self.labels.shape[0] * self.step_mm[0], self.labels.shape[1] * self.step_mm[1]


def write_preview(
    path: Path,
    case: str,
    image: np.ndarray,
    labels: np.ndarray,
    geometry: Geometry,
    written: WrittenClasses,
    levels: tuple[float, float] | None = None,
) -> None:
    """Write a montage as PNG, atomically.

    Args:
        path: ``.png`` file.
        case: name for the title.
        image: (Z, Y, X), one channel as read from file.
        labels: (Z, Y, X) file values, as predicted; all background is drawn as well, and said.
        geometry: of both.
        written: the classes.
        levels: what is drawn black and white; None for percentiles of the slices shown.
    """
    figure = preview_figure(case, image, labels, geometry, written, levels)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DPI)


def preview_figure(
    case: str,
    image: np.ndarray,
    labels: np.ndarray,
    geometry: Geometry,
    written: WrittenClasses,
    levels: tuple[float, float] | None = None,
) -> Figure:
    """The montage: a row per direction, slices spread evenly over those with foreground; see ``write_preview``."""
    rows = _panels(image, labels, geometry)
    low, high = levels or grey_levels(np.concatenate([panel.pixels.ravel() for row in rows for panel in row]))
    occurring = np.zeros(max(written.values) + 1, dtype=bool)
    for plane in labels:  # one at a time: an index takes 8 bytes per voxel
        occurring[plane] = True
    shown = [k for k, value in enumerate(written.values) if occurring[value]]
    colors = _colors(written, shown)
    legend = shown if len(shown) <= MOST_IN_LEGEND else []

    widest = max(panel.size_mm[1] for row in rows for panel in row)
    heights_mm = [row[0].size_mm[0] for row in rows]
    columns = max(len(row) for row in rows)
    inch = min(_WIDTH / (columns * widest), _HEIGHT / sum(heights_mm))  # per mm
    width = max(columns * (widest * inch + _GAP) + _SIDE, _NARROWEST)
    in_a_row = max(1, int(width / _LEGEND_COLUMN))
    below = _LEGEND_ROW * -(-len(legend) // in_a_row) + _GAP
    height = _TITLE + sum(mm * inch + _CAPTION for mm in heights_mm) + below
    figure = Figure(figsize=(width, height), facecolor=_BACK)
    _title(figure, case, geometry, len(shown), len(written.names))
    top = height - _TITLE
    for row, (view, letters) in zip(rows, _VIEWS, strict=True):
        tall = row[0].size_mm[0] * inch
        figure.text(
            0.5 * _SIDE / width, (top - tall / 2) / height, view, rotation=90, ha="center", va="center", fontsize=9
        )
        for column, panel in enumerate(row):
            wide = panel.size_mm[1] * inch
            left = _SIDE + column * (widest * inch + _GAP)
            axis = figure.add_axes((left / width, (top - tall) / height, wide / width, tall / height))
            _draw(axis, panel, (low, max(high, low + 1e-6)), colors, letters if column == 0 else "")
        top -= tall + _CAPTION
    if legend:
        handles = [Line2D([], [], color=colors[written.values[k]], linewidth=3) for k in legend]
        names = [shorten_middle(written.names[k], 28) for k in legend]
        texts = figure.legend(handles, names, loc="lower center", ncols=in_a_row, frameon=False, fontsize=8).get_texts()
        for text in texts:
            text.set_parse_math(False)
    return figure


def _panels(image: np.ndarray, labels: np.ndarray, geometry: Geometry) -> list[list[_Panel]]:
    """Slices of the axial, coronal and sagittal row."""
    axes = [axis for axis, _ in geometry.patient_axes]
    backwards = [k for k, (_, is_backwards) in enumerate(geometry.patient_axes) if is_backwards]
    spacing = np.asarray(geometry.spacing_mm)[axes]
    # Now superior, posterior, left.
    pixels, values = (np.flip(array.transpose(axes), tuple(backwards)) for array in (image, labels))
    present = [np.asarray(values.any(axis=tuple(i for i in range(3) if i != axis))) for axis in range(3)]
    box = tuple(_cut(found, step) for found, step in zip(present, spacing, strict=True))
    rows = []
    for normal in range(3):
        high, wide = np.delete(spacing, normal)
        row = []
        for index in _spread(present[normal]):
            cut: list[slice | int] = list(box)
            cut[normal] = index
            plane = [array[tuple(cut)] for array in (pixels, values)]
            if normal != 0:
                plane = [array[::-1] for array in plane]  # rows go from superior to inferior
            in_file = len(present[normal]) - 1 - index if normal in backwards else index
            row.append(_Panel(slice_name(axes[normal], in_file), plane[0], plane[1], (float(high), float(wide))))
        rows.append(row)
    return rows


def _spread(present: np.ndarray) -> list[int]:
    """Evenly spread slices among those with foreground (N,) bool; among all when there is none."""
    candidates = np.flatnonzero(present) if present.any() else np.arange(len(present))
    count = min(_SLICES, len(candidates))
    return [int(candidates[int((k + 0.5) * len(candidates) / count)]) for k in range(count)]


def _cut(present: np.ndarray, step_mm: float) -> slice:
    """What to show along an axis: the foreground, and on either side half of its extent or a few centimetres."""
    found = np.flatnonzero(present)
    if not len(found):
        return slice(0, len(present))
    extent = found[-1] + 1 - found[0]
    margin = int(np.ceil(max(_MARGIN_MM / step_mm, extent / 2)))
    return slice(max(0, int(found[0]) - margin), int(found[-1]) + 1 + margin)


def _colors(written: WrittenClasses, shown: list[int]) -> Colors:
    """Colour of each file value: the same in all previews of a model, unless it has more classes than are told apart.

    Args:
        written: the classes.
        shown: positions of those that occur.
    """
    numbered = shown if len(written.names) > MOST_IN_LEGEND >= len(shown) else range(len(written.names))
    return {written.values[k]: class_color(number, len(numbered)) for number, k in enumerate(numbered)}


def _title(figure: Figure, case: str, geometry: Geometry, found: int, classes: int) -> None:
    spacing = " x ".join(f"{step:.3g}" for step in geometry.spacing_mm)
    shape = " x ".join(map(str, geometry.shape))
    what = f"{found} of {classes} classes found" if found else "no foreground was predicted"
    lines = (
        (0.3, 10, shorten(case, 60)),
        (0.75, 8, f"{shape} voxels of {spacing} mm (z, y, x), {what}"),
    )
    for place, size, text in lines:
        y = 1 - place * _TITLE / figure.get_figheight()
        figure.text(0.5, y, text, ha="center", va="center", fontsize=size, color=_INK, parse_math=False)


def _draw(axis: Axes, panel: _Panel, levels: tuple[float, float], colors: Colors, letters: str) -> None:
    """Grey values, a thin fill and an outline of each class, the slice's name below."""
    few = len(colors) <= MOST_IN_LEGEND
    axis.imshow(panel.pixels, cmap="gray", vmin=levels[0], vmax=levels[1], aspect="auto")
    table = np.zeros((max(colors, default=0) + 1, 4))
    for value, color in colors.items():
        table[value] = (*color, _FILL_OF_FEW if few else _FILL_OF_MANY)
    axis.imshow(table[panel.labels], aspect="auto", interpolation="nearest")
    outlines = {}
    for value, place in enumerate(find_objects(panel.labels), start=1):
        if place is None:
            continue
        segments = outline(panel.labels[place] == value)
        line = np.full((len(segments), 3, 2), np.nan)  # a gap after each segment
        line[:, :2] = segments + np.array([place[1].start, place[0].start])
        outlines[value] = line.reshape(-1, 2)
    edges = [colors[value] for value in outlines]
    axis.add_collection(LineCollection(list(outlines.values()), colors=edges, linewidths=1.1 if few else 0.6))
    rows, columns = panel.labels.shape
    axis.set_xlim(-0.5, columns - 0.5)
    axis.set_ylim(rows - 0.5, -0.5)
    axis.set_axis_off()
    axis.annotate(panel.name, (0.5, 0), (0, -2), "axes fraction", "offset points", ha="center", va="top", fontsize=7)
    for letter, place, side in zip(letters, (0.02, 0.98), ("left", "right"), strict=False):
        text = axis.text(place, 0.5, letter, ha=side, va="center", fontsize=8, transform=axis.transAxes)
        text.set(color=_LETTER, path_effects=_EDGE)
