"""Where each class lies in a case, so that training patches can be centred on it."""

from __future__ import annotations

import zlib

import numpy as np

MAX_LOCATIONS = 10_000  # per class and case, or 1% of the class where that is more
SMALL = 1 << 20  # voxels up to which numpy does, and numba need not be imported


def class_locations(labels: np.ndarray, seed_text: str) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Draw voxels of each class, each as likely as any other, for foreground oversampling.

    Args:
        labels: (Z, Y, X) label indices, uint8 or uint16.
        seed_text: seeds the choice among many voxels.

    Returns:
        ({index: (n, 3) voxel positions}, {index: voxel count}) for each index above 0 that occurs, the ignore index
        included; n = min(count, max(10 000, 1% of count)).
    """
    flat = np.ascontiguousarray(labels).ravel()
    small = flat.size <= SMALL
    if small:
        totals = np.bincount(flat, minlength=1)
    else:
        from ukbob_seg.preprocessing.locations_kernels import count_values, pick_ranks

        totals = count_values(flat, int(flat.max()) + 1)
    present = np.flatnonzero(totals)
    present = present[present > 0]
    generator = np.random.default_rng([zlib.crc32(seed_text.encode())])
    ranks = [_choose(int(totals[value]), generator) for value in present]
    positions = _pick_sorted(flat, present, ranks) if small else pick_ranks(flat, totals.size, present, ranks)
    locations = {
        str(int(value)): np.stack(np.unravel_index(found, labels.shape), axis=1).astype(np.uint16)
        for value, found in zip(present, positions, strict=True)
    }
    return locations, {str(int(value)): int(totals[value]) for value in present}


def _choose(count: int, generator: np.random.Generator) -> np.ndarray:
    """Which of a class's voxels, in the order of the array, are kept; ascending."""
    keep = min(count, max(MAX_LOCATIONS, count // 100))
    return np.sort(generator.choice(count, keep, replace=False)) if keep < count else np.arange(count)


def _pick_sorted(flat: np.ndarray, present: np.ndarray, ranks: list[np.ndarray]) -> list[np.ndarray]:
    """Positions of the chosen voxels of each class, by sorting all foreground."""
    foreground = np.flatnonzero(flat)
    values = flat[foreground]
    order = np.argsort(values, kind="stable")
    starts = np.searchsorted(values[order], present)
    return [foreground[order[start + chosen]] for start, chosen in zip(starts, ranks, strict=True)]
