"""What the numbers in a label file mean, and what a network's outputs mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ukbob_seg.errors import DatasetError, listing

IGNORE_NAME = "ignore"

MAX_VALUE = 65535  # label files are uint8 or uint16


def _region_values(order: Any) -> tuple[int, ...]:
    """The file value of every region, checked."""
    fine = isinstance(order, (list, tuple)) and all(
        isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= MAX_VALUE for v in order
    )
    if not fine:
        raise DatasetError(
            f"dataset.json: regions_class_order must list whole numbers from 1 to {MAX_VALUE}, got {order!r}"
        )
    return tuple(order)


@dataclass(frozen=True)
class LabelScheme:
    """The classes (mutually exclusive) or regions (overlapping) of a dataset.

    Label *values* are the numbers in the user's files; they need not be consecutive. Label *indices* are ours:
    0 is background, 1..K are the distinct foreground values in ascending order, and ``ignore_index`` marks voxels
    that neither loss nor metrics may count.

    Attributes:
        names: foreground class or region names, in the order of dataset.json.
        members: file values that make up each name; one value for a class, one or more for a region.
        region_values: the file value written for each region, in writing order (later ones overwrite), or None
            when the labels are mutually exclusive.
        ignore_value: file value of the ignore label, or None.
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    region_values: tuple[int, ...] | None = None
    ignore_value: int | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise DatasetError("dataset.json: 'labels' has no foreground class; add at least one besides background")
        if len(set(self.names)) != len(self.names):
            raise DatasetError(f"dataset.json: label names are not unique: {list(self.names)}")
        values = [value for group in self.members for value in group]
        if min(values) < 1 or max(values) > 65534:
            raise DatasetError(f"dataset.json: label values must lie in 1..65534, got {min(values)}..{max(values)}")
        if self.region_values is None and len(set(values)) != len(values):
            raise DatasetError(
                "dataset.json: two labels share one value; use lists of values with regions_class_order for regions"
            )
        if self.region_values is not None and len(self.region_values) != len(self.names):
            raise DatasetError(
                f"dataset.json: regions_class_order has {len(self.region_values)} entries for "
                f"{len(self.names)} regions; give one output value per region"
            )
        if self.ignore_value is not None and self.ignore_value <= max(values):
            raise DatasetError(
                f"dataset.json: the ignore label must have the highest value, got {self.ignore_value} "
                f"with other labels up to {max(values)}"
            )

    @classmethod
    def from_json(cls, labels: Mapping[str, int | Sequence[int]], order: Sequence[int] | None) -> LabelScheme:
        """Read the ``labels`` and ``regions_class_order`` entries of a dataset.json.

        Raises:
            DatasetError: no background 0, a value that is no integer, regions without an order.
        """
        names: list[str] = []
        members: list[tuple[int, ...]] = []
        ignore: int | None = None
        has_regions = False
        for name, value in labels.items():
            group = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            if not group or any(isinstance(v, bool) or not isinstance(v, int) for v in group):
                raise DatasetError(f"dataset.json: label {name!r} must be an integer or a list of them, got {value!r}")
            if name.lower() == "background" or group == (0,):
                if group != (0,):
                    raise DatasetError(f"dataset.json: background must be 0, got {value!r}")
            elif name.lower() == IGNORE_NAME:
                if len(group) != 1:
                    raise DatasetError(f"dataset.json: the ignore label must be one value, got {value!r}")
                ignore = group[0]
            else:
                has_regions = has_regions or isinstance(value, (list, tuple))
                names.append(name)
                members.append(group)
        if has_regions and order is None:
            raise DatasetError("dataset.json: region labels (lists of values) need 'regions_class_order'")
        region_values = _region_values(order) if has_regions else None
        return cls(tuple(names), tuple(members), region_values, ignore)

    @property
    def has_regions(self) -> bool:
        """Whether outputs overlap (one sigmoid per region) instead of excluding each other."""
        return self.region_values is not None

    @cached_property
    def values(self) -> tuple[int, ...]:
        """Distinct foreground file values, ascending; index k (from 1) stands for ``values[k - 1]``."""
        return tuple(sorted({value for group in self.members for value in group}))

    @property
    def ignore_index(self) -> int:
        """Index of ignored voxels in stored label maps: the highest value of their dtype."""
        return 255 if len(self.values) < 255 else 65535

    @property
    def dtype(self) -> np.dtype:
        """dtype of stored label maps: uint8, or uint16 past 254 foreground values."""
        return np.dtype(np.uint8 if len(self.values) < 255 else np.uint16)

    @property
    def num_outputs(self) -> int:
        """Network output channels: background + classes, or one per region."""
        return len(self.names) if self.has_regions else len(self.values) + 1

    @cached_property
    def output_names(self) -> tuple[str, ...]:
        """Name of each network output channel."""
        if self.has_regions:
            return self.names
        by_value = {group[0]: name for name, group in zip(self.names, self.members, strict=True)}
        return ("background", *(by_value[value] for value in self.values))

    def difference(self, other: LabelScheme, names: tuple[str, str]) -> str | None:
        """One phrase naming the outputs that differ, or None when networks of both schemes predict the same.

        The ignore label, which is never predicted, does not count.
        """
        mine, theirs = self._meanings(), other._meanings()
        if mine == theirs:
            return None
        mine_only, theirs_only = [m for m in mine if m not in theirs], [t for t in theirs if t not in mine]
        if not mine_only and not theirs_only:  # another order
            mine_only, theirs_only = mine, theirs
        here, there = (listing(only) or "nothing more" for only in (mine_only, theirs_only))
        return f"labels differ: {here} in {names[0]}, {there} in {names[1]}"

    def _meanings(self) -> list[str]:
        """What each network output stands for, in its order."""
        if self.region_values is None:
            return [f"{name} = {value}" for name, value in zip(self.output_names[1:], self.values, strict=True)]
        return [
            f"{name} = {'+'.join(map(str, sorted(group)))} (written as {value})"
            for name, group, value in zip(self.names, self.members, self.region_values, strict=True)
        ]

    @cached_property
    def region_table(self) -> np.ndarray:
        """(names, K + 1) bool: whether label index k belongs to each named class or region."""
        index_of = {value: k for k, value in enumerate(self.values, start=1)}
        table = np.zeros((len(self.names), len(self.values) + 1), dtype=bool)
        for row, group in enumerate(self.members):
            table[row, [index_of[value] for value in group]] = True
        return table

    @cached_property
    def output_values(self) -> np.ndarray:
        """File value written for each decision: (K + 1,) by label index, or (1 + regions,) with 0 first."""
        written = self.region_values if self.region_values is not None else self.values
        return np.asarray((0, *written), dtype=np.uint16 if max(written) > 255 else np.uint8)

    def to_indices(self, labels: np.ndarray, where: str = "label map") -> np.ndarray:
        """Map file values to label indices.

        Args:
            labels: any integer array of file values.
            where: file or case named in the error.

        Returns:
            Array of the same shape, ``self.dtype``.

        Raises:
            DatasetError: values that dataset.json does not name; lists each with its voxel count.
        """
        top = max(self.values[-1], self.ignore_value or 0)
        table = np.full(top + 1, -1, dtype=np.int32)
        table[0] = 0
        table[list(self.values)] = np.arange(1, len(self.values) + 1)
        if self.ignore_value is not None:
            table[self.ignore_value] = self.ignore_index
        low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
        inside = low >= 0 and high <= top
        indices = table[labels] if inside else table[np.clip(labels, 0, top)]
        if not inside or (indices < 0).any():
            raise DatasetError(f"{where}: {self.describe_unexpected(labels)}")
        return indices.astype(self.dtype)

    def unexpected(self, labels: np.ndarray) -> dict[int, int]:
        """File values in ``labels`` that dataset.json does not name, with their voxel counts."""
        values, counts = np.unique(labels, return_counts=True)
        known = {0, *self.values, *(() if self.ignore_value is None else (self.ignore_value,))}
        return {int(v): int(n) for v, n in zip(values, counts, strict=True) if int(v) not in known}

    def describe_unexpected(self, labels: np.ndarray) -> str:
        """One sentence about the values that dataset.json does not name."""
        found = [f"{value} ({count} voxels)" for value, count in self.unexpected(labels).items()]
        return f"unknown label values {listing(found)}; add them to 'labels' in dataset.json or correct the file"


def left_right_pairs(names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Find names that differ only in left/right, as pairs of positions in ``names`` (each pair once)."""

    def mirrored(name: str) -> str:
        swapped = name.lower()
        for left, right in (("left", "right"), ("lt", "rt"), ("l", "r")):
            parts = swapped.replace("-", "_").replace(" ", "_").split("_")
            if left in parts or right in parts:
                flip = {left: right, right: left}
                return "_".join(flip.get(part, part) for part in parts)
        return swapped

    position = {name.lower().replace("-", "_").replace(" ", "_"): i for i, name in enumerate(names)}
    pairs = set()
    for i, name in enumerate(names):
        j = position.get(mirrored(name), i)
        if i != j:
            pairs.add((min(i, j), max(i, j)))
    return tuple(sorted(pairs))
