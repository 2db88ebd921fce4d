"""Label faults planted on purpose, so that a filter's recall and precision can be counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion, label

from ukbob_seg.errors import ConfigError

MAX_DICE = 0.85  # a planted fault is worse than this


@dataclass(frozen=True)
class PlantedFault:
    """One wrong organ in one case; ``dice_to_truth`` says how wrong."""

    case: str
    label: int
    kind: str
    dice_to_truth: float


def missing_half(labels: np.ndarray, value: int, generator: np.random.Generator) -> np.ndarray:
    """Lose the part of an organ on one side of a plane through its middle, across its longest axis."""
    voxels = np.argwhere(labels == value)
    axis = int(np.argmax(np.ptp(voxels, axis=0)))
    cut = np.median(voxels[:, axis])
    lost = voxels[voxels[:, axis] <= cut] if generator.random() < 0.5 else voxels[voxels[:, axis] >= cut]
    result = labels.copy()
    result[tuple(lost.T)] = 0
    return result


def leakage(labels: np.ndarray, value: int, generator: np.random.Generator) -> np.ndarray:
    """Grow an organ in one direction over whatever lies there, until it is over one and a half times its size."""
    organ = labels == value
    wanted = organ.sum() * generator.uniform(1.5, 2.2)
    direction = generator.normal(size=3)
    direction[int(np.argmax(np.abs(direction)))] *= 2
    structure = np.zeros((3, 3, 3), dtype=bool)
    structure[1, 1, 1] = True
    for axis in range(3):
        step = [1, 1, 1]
        step[axis] += int(np.sign(direction[axis]))
        structure[tuple(step)] = True
    grown = organ
    while grown.sum() < wanted:
        larger = binary_dilation(grown, structure)
        if larger.sum() == grown.sum():
            break
        grown = larger
    result = labels.copy()
    result[grown] = value
    return result


def fragments(labels: np.ndarray, value: int, generator: np.random.Generator) -> np.ndarray:
    """Cut slabs out of an organ, so that pieces remain, and scatter some blobs around it."""
    result = labels.copy()
    voxels = np.argwhere(labels == value)
    low, high = voxels.min(axis=0), voxels.max(axis=0) + 1
    axis = int(np.argmax(high - low))
    phase = int(generator.integers(3))
    position = voxels[:, axis] - low[axis]
    lost = voxels[(position + phase) % 3 != 0] if high[axis] - low[axis] > 5 else voxels[position % 2 == 0]
    result[tuple(lost.T)] = 0
    for _ in range(6):
        centre = voxels[int(generator.integers(len(voxels)))] + generator.integers(-6, 7, 3)
        corner = np.clip(centre, 0, np.asarray(labels.shape) - 2)
        blob = tuple(slice(int(c), int(c) + 2) for c in corner)
        result[blob] = np.where(result[blob] == 0, value, result[blob])
    return result


def eroded(labels: np.ndarray, value: int, generator: np.random.Generator) -> np.ndarray:
    """Lose the outer layers of an organ, as a timid model does, until a third to a half of it is left."""
    organ = labels == value
    wanted = organ.sum() * generator.uniform(0.33, 0.5)
    core = organ
    while core.sum() > wanted:
        inner = binary_erosion(core)
        if not inner.any():
            break
        core = inner
    result = labels.copy()
    result[organ & ~core] = 0
    return result


def swapped_left_right(labels: np.ndarray, one: int, other: int) -> np.ndarray:
    """Exchange the labels of a pair of organs."""
    result = labels.copy()
    result[labels == one], result[labels == other] = other, one
    return result


KINDS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "missing_half": missing_half,
    "leakage": leakage,
    "fragments": fragments,
    "eroded": eroded,
}
USUAL_KINDS = ("missing_half", "leakage", "fragments")
SWAPPED = "swapped_left_right"
OVERRUN = "overrun"  # not planted itself: another organ's leakage took its voxels


def plant_faults(
    labels: np.ndarray,
    case: str,
    values: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    generator: np.random.Generator,
    fraction: float,
    kinds: Sequence[str] = USUAL_KINDS,
) -> tuple[np.ndarray, list[PlantedFault]]:
    """Spoil each organ with probability ``fraction``, each possible kind of fault being equally likely.

    Args:
        labels: (Z, Y, X) true labels.
        case: name for the record.
        values: organs that may be spoilt; absent ones are passed over.
        pairs: left/right organs that may be swapped; a swap spoils (and records) both.
        generator: decides.
        fraction: share of organs to spoil.
        kinds: names in ``KINDS`` to choose from, beside swaps.

    Returns:
        (spoilt labels, what is wrong in them). An organ is spoilt at most once. The record holds exactly the labels
        whose Dice to the truth ended at 0.85 or less, so also those that another organ leaked over (``overrun``).

    Raises:
        ConfigError: fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"the fraction of faults must lie in [0, 1], got {fraction}")
    partner = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    spoilt, done = labels, set[int]()
    spoilt_by: dict[int, str] = {}
    for value in values:
        if generator.random() >= fraction or value in done or not (spoilt == value).sum() > 8:
            continue
        other = partner.get(value)
        # Exchanging labels with an organ that is not there would only rename this one.
        swappable = other is not None and other not in done and (spoilt == other).sum() > 8
        choices = [*kinds, *([SWAPPED] if swappable else [])]
        kind = choices[int(generator.integers(len(choices)))]
        touched = {value, partner[value]} if kind == SWAPPED else {value}
        changed = (
            swapped_left_right(spoilt, value, partner[value])
            if kind == SWAPPED
            else KINDS[kind](spoilt, value, generator)
        )
        if dice(changed == value, labels == value) > MAX_DICE:
            continue
        spoilt = changed
        done |= touched
        spoilt_by.update(dict.fromkeys(touched, kind))
    return spoilt, _record(labels, spoilt, case, spoilt_by)


def _record(labels: np.ndarray, spoilt: np.ndarray, case: str, kinds: Mapping[int, str]) -> list[PlantedFault]:
    """Every label that is now wrong, by the final label map and not by what was meant to be done to it."""
    if not kinds:
        return []
    values = [int(value) for value in np.unique(labels) if value]
    agreement = {value: dice(spoilt == value, labels == value) for value in values}
    return [
        PlantedFault(case, value, kinds.get(value, OVERRUN), found)
        for value, found in agreement.items()
        if found <= MAX_DICE
    ]


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Dice of two masks; 1 when both are empty."""
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0


def count_components(mask: np.ndarray) -> int:
    """Number of face-connected parts."""
    return int(label(mask)[1])


def pairs_of(names: Mapping[str, int], pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """Label values of named pairs."""
    return [(names[a], names[b]) for a, b in pairs]
