"""Pieces that the pictures of several reports share. Nothing here uses pyplot, so nothing global is touched."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ANISOTROPIC = 2.0  # coarsest over finest spacing from which slices are looked at as they were acquired
FEW_CLASSES = 10  # that have outlines and well-known colours of their own
# matplotlib's ten, but for their grey, which a grey picture hides; then ten that differ from them on grey, too.
_TWENTY = (
    *(to_rgb(colormaps["tab10"](k) if k != 7 else "#8ee000") for k in range(10)),
    *map(to_rgb, ("#ffe119", "#4340ff", "#f032e6", "#aaffc3", "#800000", "#e6beff", "#008068", "#ffb39e", "#6a00a8")),
    to_rgb("#b4e8ff"),
)


def outline(labels: np.ndarray) -> np.ndarray:
    """Pixel edges at which a label map changes, as line segments.

    Args:
        labels: (rows, columns) integers or bool; beyond the array counts as 0.

    Returns:
        (segments, 2, 2) float, end points as (x, y) where pixel centres have integer coordinates.
    """
    padded = np.pad(labels, 1)
    row, column = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    x, y = column - 0.5, row.astype(float)
    upright = np.stack([np.stack([x, y - 0.5], -1), np.stack([x, y + 0.5], -1)], 1)
    row, column = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    x, y = column.astype(float), row - 0.5
    level = np.stack([np.stack([x - 0.5, y], -1), np.stack([x + 0.5, y], -1)], 1)
    return np.concatenate([upright, level])


def fullest_slice(mask: np.ndarray, spacing_mm: np.ndarray) -> tuple[int, int]:
    """Axis and index of the slice in which a mask (Z, Y, X) has the largest area; of equal ones the first.

    Thick slices are looked at as they were acquired: across the coarsest axis when the spacing is anisotropic.
    """
    spacing = np.asarray(spacing_mm, dtype=float)
    area_mm2 = [
        mask.sum(axis=tuple(i for i in range(3) if i != axis)) * spacing.prod() / spacing[axis] for axis in range(3)
    ]
    if spacing.max() > ANISOTROPIC * spacing.min():
        normal = int(np.argmax(spacing))
    else:
        normal = int(np.argmax([area.max() for area in area_mm2]))
    return normal, int(np.argmax(area_mm2[normal]))


def slice_name(normal: int, index: int) -> str:
    """Such as ``z = 12``."""
    return f"{'zyx'[normal]} = {index}"


def class_color(number: int, count: int) -> tuple[float, float, float]:
    """RGB of class ``number`` (from 0) of ``count``; beyond the classes, as the ignore label is, grey."""
    if number >= count:
        return to_rgb("#8c8c8c")
    if count <= len(_TWENTY):
        return _TWENTY[number]
    return colorsys.hsv_to_rgb((number * 0.6180339887) % 1, 0.55 + 0.4 * (number % 3) / 2, 1 - 0.25 * (number % 2))


def grey_levels(pixels: np.ndarray) -> tuple[float, float]:
    """What is drawn black and white: the 0.5 and 99.5 percentiles, never equal."""
    low, high = np.percentile(pixels, (0.5, 99.5))
    return float(low), max(float(high), float(low) + 1e-6)


def shorten(text: str, most: int) -> str:
    """At most ``most`` characters; the end is cut off."""
    return text if len(text) <= most else text[: most - 1] + "…"


def shorten_middle(text: str, most: int) -> str:
    """At most ``most`` characters; the middle is cut out, since names of organs differ at either end."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"


def hide_spines(axis: Axes, *sides: str) -> None:
    """Take away sides of the frame; top and right unless told otherwise."""
    for side in sides or ("top", "right"):
        axis.spines[side].set_visible(False)
