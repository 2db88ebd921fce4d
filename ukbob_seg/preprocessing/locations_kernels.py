"""Compiled loops of ``locations.py``: one pass to count, one to pick."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit


def pick_ranks(flat: np.ndarray, size: int, present: np.ndarray, ranks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Positions of the chosen voxels of each class.

    Args:
        flat: label indices.
        size: one more than the highest of them.
        present: classes, ascending.
        ranks: for each, which of its voxels in the order of ``flat`` are chosen; ascending.
    """
    lengths = np.array([len(chosen) for chosen in ranks], dtype=np.int64)
    ends = np.cumsum(lengths)
    start, stop = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    start[present], stop[present] = ends - lengths, ends
    joined = np.concatenate(ranks) if ranks else np.empty(0, dtype=np.int64)
    found = np.empty(len(joined), dtype=np.int64)
    _pick(flat, start, stop, joined, found)
    return np.split(found, ends[:-1]) if ranks else []


@njit(cache=True, nogil=True)
def count_values(flat, size):  # type: ignore[no-untyped-def]
    """How often each value below ``size`` occurs; two tables, so that equal neighbours do not wait for one another."""
    even, odd = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    for k in range(0, flat.size - 1, 2):
        even[flat[k]] += 1
        odd[flat[k + 1]] += 1
    if flat.size % 2:
        even[flat[flat.size - 1]] += 1
    return even + odd


@njit(cache=True, nogil=True)
def _pick(flat, start, stop, ranks, found):  # type: ignore[no-untyped-def]
    seen = np.zeros(start.size, dtype=np.int64)
    following = start.copy()
    for position in range(flat.size):
        value = flat[position]
        if value:
            at = following[value]
            if at < stop[value] and ranks[at] == seen[value]:
                found[at] = position
                following[value] = at + 1
            seen[value] += 1
