"""Size and intensity of every predicted class: what ``CASE_statistics.json`` holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.inference.export import WrittenClasses

_VOXELS_AT_ONCE = 2**22


@dataclass(frozen=True)
class _Moments:
    """Voxels, mean, and sum of squared deviations from the mean, of each label value.

    Attributes:
        count: (values,) float64.
        mean: (C, values) float64, 0 without voxels.
        squares: (C, values) float64.
    """

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, channels: np.ndarray, size: int) -> _Moments:
        """Of voxels with label values (N,) and intensities (C, N)."""
        count = np.bincount(values, minlength=size).astype(np.float64)
        mean, squares = np.zeros((len(channels), size)), np.zeros((len(channels), size))
        for row, channel in enumerate(channels.astype(np.float64)):
            mean[row] = np.bincount(values, weights=channel, minlength=size) / np.maximum(count, 1)
            squares[row] = np.bincount(values, weights=(channel - mean[row][values]) ** 2, minlength=size)
        return cls(count, mean, squares)

    def __add__(self, other: _Moments) -> _Moments:
        """Of both together, without cancellation. Reference: Chan, Golub, LeVeque 1983, Eq. 2.1."""
        count = self.count + other.count
        step, share = other.mean - self.mean, other.count / np.maximum(count, 1)
        squares = self.squares + other.squares + step**2 * self.count * share
        return _Moments(count, self.mean + step * share, squares)

    def at(self, value: int) -> _Moments:
        """Those of one label value."""
        return _Moments(self.count[value], self.mean[:, value], self.squares[:, value])


def case_statistics(
    image: np.ndarray, labels: np.ndarray, geometry: Geometry, written: WrittenClasses, channel_names: Sequence[str]
) -> dict[str, Any]:
    """Volume and intensities of every written class, as plain values for JSON.

    Args:
        image: (C, Z, Y, X) as read from file, before normalization; finite.
        labels: (Z, Y, X) file values, as predicted.
        geometry: of both.
        written: the classes. A region counts all voxels of the values that belong to it, as in an evaluation.
        channel_names: of the channels.

    Returns:
        ``spacing_mm`` (z, y, x), ``channel_names``, and for each class ``voxels``, ``volume_ml``, and ``mean`` and
        ``sd`` (of the population) of each channel, which are None where the class is absent.
    """
    size = max(written.values) + 1
    moments = reduce(_Moments.__add__, (_Moments.of(*part, size) for part in _foreground(image, labels)))
    classes = {}
    for name, members in zip(written.names, written.members, strict=True):
        found = reduce(_Moments.__add__, (moments.at(value) for value in members))
        voxels = int(found.count)
        nothing = [None] * len(image)
        classes[name] = {
            "voxels": voxels,
            "volume_ml": voxels * float(np.prod(geometry.spacing_mm)) / 1000,
            "mean": found.mean.tolist() if voxels else nothing,
            "sd": np.sqrt(found.squares / voxels).tolist() if voxels else nothing,
        }
    return {"spacing_mm": list(geometry.spacing_mm), "channel_names": list(channel_names), "classes": classes}


def _foreground(image: np.ndarray, labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Label values (N,) and intensities (C, N) of all voxels that are not background, some planes at a time."""
    planes = max(1, _VOXELS_AT_ONCE // max(labels[0].size, 1))
    for start in range(0, len(labels), planes):
        part = labels[start : start + planes]
        inside = part > 0
        yield part[inside], image[:, start : start + planes][:, inside]
