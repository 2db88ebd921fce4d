"""Turning volumes so that their axes run in given directions of the patient, and back.

Directions are written as nibabel and TotalVibeSegmentator write them: one letter for the x, y and z axis of the file,
each the side of the patient that the index grows towards. A file in LPS, which is how most scanners write, has L, P, S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.errors import ConfigError

# Letter: which of ``Geometry.patient_axes`` (superior, posterior, left), and whether the index grows away from it.
_SIDES = {"S": (0, False), "I": (0, True), "P": (1, False), "A": (1, True), "L": (2, False), "R": (2, True)}
OBLIQUE_COSINE = 0.8  # below it, no axis of the file runs clearly along one of the patient


@dataclass(frozen=True)
class Turn:
    """How the axes of an array are exchanged and reversed: by 90 and 180 degrees, so that no value changes.

    Attributes:
        axes: for each new axis (z, y, x) the old one.
        reversed: whether that old axis is reversed.
    """

    axes: tuple[int, int, int] = (0, 1, 2)
    reversed: tuple[bool, bool, bool] = (False, False, False)

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return self == Turn()

    def apply(self, array: np.ndarray) -> np.ndarray:
        """A view of (..., Z, Y, X), turned."""
        lead = array.ndim - 3
        turned = array.transpose(*range(lead), *(lead + axis for axis in self.axes))
        return np.flip(turned, tuple(lead + axis for axis in range(3) if self.reversed[axis]))

    def undo(self, array: np.ndarray) -> np.ndarray:
        """A view of a turned array, as it was."""
        lead = array.ndim - 3
        flipped = np.flip(array, tuple(lead + axis for axis in range(3) if self.reversed[axis]))
        return flipped.transpose(*range(lead), *(lead + self.axes.index(axis) for axis in range(3)))

    def geometry(self, geometry: Geometry) -> Geometry:
        """The grid of the turned array: the same voxels in the same places."""
        columns = np.asarray(geometry.direction, dtype=float).reshape(3, 3)[:, ::-1]  # of z, y, x
        spacing, shape = np.asarray(geometry.spacing_mm), np.asarray(geometry.shape)
        origin = np.asarray(geometry.origin_mm, dtype=float)
        signs = np.ones(3)
        for new, old in enumerate(self.axes):
            if self.reversed[new]:
                origin = origin + columns[:, old] * spacing[old] * (shape[old] - 1)
                signs[new] = -1
        turned = (columns[:, list(self.axes)] * signs)[:, ::-1]
        z, y, x = self.axes
        return Geometry(
            shape=(geometry.shape[z], geometry.shape[y], geometry.shape[x]),
            spacing_mm=(geometry.spacing_mm[z], geometry.spacing_mm[y], geometry.spacing_mm[x]),
            origin_mm=(float(origin[0]), float(origin[1]), float(origin[2])),
            direction=tuple(float(value) for value in turned.ravel()),
        )


def checked_orientation(code: Sequence[str] | str) -> str:
    """Three letters such as ``RAS``, from a string or a list of them.

    Raises:
        ConfigError: other letters, or an axis of the patient twice.
    """
    letters = "".join(code).upper() if isinstance(code, str) or all(isinstance(c, str) for c in code) else ""
    if len(letters) != 3 or {_SIDES[c][0] for c in letters if c in _SIDES} != {0, 1, 2}:
        raise ConfigError(f"an orientation is one letter of each of L/R, P/A and S/I, such as RAS; got {code!r}")
    return letters


def turn_to(geometry: Geometry, code: str) -> Turn:
    """What brings a volume into an orientation; oblique axes count as those that they run most nearly along.

    Args:
        geometry: of the volume.
        code: three letters, of the x, y and z axis.
    """
    axes, flips = [], []
    for letter in reversed(checked_orientation(code)):  # z first
        which, away = _SIDES[letter]
        axis, backwards = geometry.patient_axes[which]
        axes.append(axis)
        flips.append(backwards != away)
    return Turn((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]))


def orientation_of(geometry: Geometry) -> str:
    """Three letters for the x, y and z axis of a volume."""
    letters = [""] * 3
    for (axis, backwards), pair in zip(geometry.patient_axes, (("S", "I"), ("P", "A"), ("L", "R")), strict=True):
        letters[axis] = pair[backwards]
    return "".join(reversed(letters))


def is_oblique(geometry: Geometry) -> bool:
    """Whether some axis runs clearly along none of the patient's, so that an orientation says little."""
    return bool(np.abs(np.asarray(geometry.direction).reshape(3, 3)).max(axis=0).min() < OBLIQUE_COSINE)
