"""Largest components: stray pieces of a predicted organ are removed where validation showed that this helps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import CheckpointError
from ukbob_seg.files import read_json
from ukbob_seg.filtering.components import connect, runs_of_labels

POSTPROCESSING = "postprocessing.json"


@dataclass(frozen=True)
class Postprocessing:
    """What is done to predicted label maps.

    Attributes:
        largest_component: names of the classes of which only the largest connected part (26 neighbours) is kept.
    """

    largest_component: tuple[str, ...] = ()

    @classmethod
    def of_model(cls, folder: Path, scheme: LabelScheme) -> Postprocessing:
        """What ``postprocessing.json`` of a model folder says; nothing where there is none.

        Raises:
            CheckpointError: the file is not what ukbob_find_postprocessing writes, or names unknown classes.
        """
        path = folder / POSTPROCESSING
        return cls.of_names(names_in(path), scheme, str(path)) if path.is_file() else cls()

    @classmethod
    def of_names(cls, names: Sequence[str] | None, scheme: LabelScheme, where: str) -> Postprocessing:
        """Of these classes, if they are those of a model.

        Args:
            names: of the classes; None is refused like a wrong name.
            scheme: of the model.
            where: where the names are from, for the message.

        Raises:
            CheckpointError: unknown classes, or regions.
        """
        classes = () if scheme.has_regions else scheme.output_names[1:]
        if names is None or not all(name in classes for name in names):
            raise CheckpointError(
                f"{where} must have a list 'largest_component' of class names "
                f"({', '.join(classes) or 'none: regions'}); make it with ukbob_find_postprocessing, or remove it"
            )
        return cls(tuple(names))

    def apply(self, labels: np.ndarray, scheme: LabelScheme) -> np.ndarray:
        """(Z, Y, X) label values without the stray pieces, which become background; the array itself is unchanged."""
        if not self.largest_component:
            return labels
        values = dict(zip(scheme.output_names[1:], scheme.values, strict=True))
        return keep_largest(labels, [values[name] for name in self.largest_component])


def names_in(path: Path) -> tuple[str, ...] | None:
    """Class names that a ``postprocessing.json`` lists; None where it has no such list.

    Raises:
        DatasetError: the file does not exist or is no JSON.
    """
    content = read_json(path, "postprocessing")
    names = content.get("largest_component") if isinstance(content, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else None


def keep_largest(labels: np.ndarray, values: Collection[int]) -> np.ndarray:
    """A copy in which of each of these values only its largest connected part is left; of equals the first one.

    Args:
        labels: (Z, Y, X) integers.
        values: of the labels concerned; each is treated by itself. Absent ones are no error.
    """
    runs = runs_of_labels(labels)
    root = connect(runs, diagonal=True)
    size = np.bincount(root, weights=runs.voxels, minlength=len(root))
    stray = np.zeros(len(root), dtype=bool)
    for value in values:
        own = runs.value == value
        if own.any():
            roots = np.unique(root[own])
            stray |= own & (root != roots[np.argmax(size[roots])])
    cleaned = labels.copy()
    if stray.any():
        cleaned[runs.paint(stray)] = 0
    return cleaned
