"""Left and right: which labels, outputs and flips belong together."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ukbob_seg.dataset.labels import LabelScheme, left_right_pairs

log = logging.getLogger(__name__)


def label_swap(scheme: LabelScheme) -> Tensor | None:
    """Table that exchanges left and right label indices; it is its own inverse. None without left and right names.

    A label goes to one that lies in the mirrored regions: where ``left kidney`` and ``left side`` hold it, to one that
    ``right kidney`` and ``right side`` hold. For exclusive labels that is the label of the mirrored name. Where some
    label has no such partner, or two, the table changes nothing, and ``safe_mirror_axes`` allows no flip that needs it.
    """
    if not left_right_pairs(scheme.names):
        return None
    partners = _partners(scheme)
    table = np.arange(int(np.iinfo(scheme.dtype).max) + 1)
    if partners is not None:
        table[: len(partners)] = partners
    return torch.from_numpy(table)


def output_swap(scheme: LabelScheme) -> tuple[int, ...] | None:
    """Order of network outputs that exchanges left and right, or None without such labels.

    The order as it is where two names have the same partner; ``safe_mirror_axes`` allows no flip then.
    """
    pairs = left_right_pairs(scheme.output_names)
    if not pairs:
        return None
    return _exchanged(scheme.num_outputs, pairs) or tuple(range(scheme.num_outputs))


def safe_mirror_axes(axes: Sequence[int], scheme: LabelScheme, left_right_axis: int | None) -> tuple[int, ...]:
    """Those of the axes along which a flip leaves every label right; a warning says when some are left out.

    Args:
        axes: that would be flipped.
        scheme: of the labels.
        left_right_axis: array axis that runs left-right, or None where that is not known.
    """
    pairs = left_right_pairs(scheme.names)
    if not pairs or not axes:
        return tuple(axes)
    if left_right_axis is None:
        log.warning("labels name left and right, but the cases' orientations differ: no flips in training")
        return ()
    if _partners(scheme) is not None or left_right_axis not in axes:
        return tuple(axes)
    left, right = (scheme.names[position] for position in pairs[0])
    log.warning(
        "labels name left and right, such as %r and %r, but some label has no partner on the other side: no flips "
        "along the left-right axis in training",
        left, right,
    )  # fmt: skip
    return tuple(axis for axis in axes if axis != left_right_axis)


def _partners(scheme: LabelScheme) -> list[int] | None:
    """For label indices 0..K the index on the other side; None where some label has none, or might have two."""
    if not scheme.has_regions:
        order = _exchanged(scheme.num_outputs, left_right_pairs(scheme.output_names))
        return None if order is None else list(order)
    order = _exchanged(len(scheme.names), left_right_pairs(scheme.names))
    if order is None:
        return None
    columns = scheme.region_table.T  # (K + 1, names)
    alike: dict[bytes, list[int]] = defaultdict(list)  # labels that lie in the same regions
    for index, column in enumerate(columns):
        alike[column.tobytes()].append(index)
    partners = []
    for index, column in enumerate(columns):
        own, other = alike[column.tobytes()], alike.get(column[list(order)].tobytes(), [])
        if len(own) != len(other):
            return None
        partners.append(other[own.index(index)])
    return partners


def _exchanged(count: int, pairs: Sequence[tuple[int, int]]) -> tuple[int, ...] | None:
    """0 .. count - 1 with the members of each pair in each other's place; None when one is in two pairs."""
    order = list(range(count))
    for left, right in pairs:
        if (order[left], order[right]) != (left, right):
            return None
        order[left], order[right] = right, left
    return tuple(order)
