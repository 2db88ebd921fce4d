"""Which cases train and which validate."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ukbob_seg.dataset.tables import one_row_each, read_table
from ukbob_seg.errors import ConfigError, DatasetError, listing
from ukbob_seg.files import read_json, write_json

log = logging.getLogger(__name__)

FOLDS = 5
SPLIT_SEED = 12345  # nnU-Net's, so that both tools hold out the same cases
HOLDOUT_SHARES = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class Split:
    """Cases of one fold; ``test`` is empty except for the 80-10-10 scheme."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...] = ()


def load_groups(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Subject of each case from groups.csv (columns case, subject); a case that is not listed is its own subject.

    Raises:
        DatasetError: the file cannot be read, no line is about a case of the dataset, or a case has two subjects.
    """
    groups = {name: name for name in names}
    if not path.exists():
        return groups
    what = "the list of subjects"
    table = read_table(path, what, ("case", "subject"))
    given = table[table["case"].isin(list(groups)) & (table["subject"] != "")]
    if given.empty and len(table):
        raise DatasetError(
            f"{what} {path} names none of the {len(groups)} training cases; write them as "
            f"{next(iter(groups), 'CASE')}, without folder, channel number or file ending"
        )
    given = one_row_each(given, ["case"], f"{what} {path}")
    return groups | dict(zip(given["case"], given["subject"], strict=True))


def make_splits(names: Sequence[str], groups: Mapping[str, str], scheme: str = "5-fold") -> list[Split]:
    """Split cases so that all cases of one subject fall on one side.

    Args:
        names: all case names.
        groups: subject of each case.
        scheme: ``5-fold`` (seeded; without groups the same folds as nnU-Net's), or ``80-10-10``.

    Raises:
        ConfigError: fewer than two subjects.
    """
    subjects = sorted(set(groups[name] for name in names))
    if len(subjects) < 2:
        raise ConfigError(
            f"{len(names)} case(s) of {len(subjects)} subject cannot be split; train on everything with fold 'all'"
        )

    def members(chosen: Sequence[int]) -> tuple[str, ...]:
        wanted = {subjects[i] for i in chosen}
        return tuple(name for name in sorted(names) if groups[name] in wanted)

    order = np.arange(len(subjects))
    np.random.RandomState(SPLIT_SEED).shuffle(order)  # as scikit-learn's KFold shuffles
    if scheme == "80-10-10":
        hold = max(1, round(HOLDOUT_SHARES[1] * len(subjects)))
        test = order[hold : 2 * hold] if len(subjects) > 2 else order[:0]
        train = order[hold + len(test) :]
        return [Split(members(train.tolist()), members(order[:hold].tolist()), members(test.tolist()))]
    folds = np.array_split(order, min(FOLDS, len(subjects)))
    return [
        Split(members([i for i in range(len(subjects)) if i not in set(fold.tolist())]), members(fold.tolist()))
        for fold in folds
    ]


def load_or_make_splits(
    folder: Path, names: Sequence[str], groups: Mapping[str, str], scheme: str = "5-fold"
) -> list[Split]:
    """Read ``splits.json`` (or nnU-Net's ``splits_final.json``) of a preprocessed dataset, or make and write it.

    Raises:
        DatasetError: a split names unknown cases, or puts a case or a subject on two sides.
    """
    for path in (folder / "splits.json", folder / "splits_final.json"):
        if path.is_file():
            splits = _read_splits(path, set(names), groups)
            _warn_about(path, splits, names, scheme)
            return splits
    splits = make_splits(names, groups, scheme)
    write_json(
        folder / "splits.json",
        [{"train": s.train, "val": s.val, **({"test": s.test} if s.test else {})} for s in splits],
    )
    return splits


def _warn_about(path: Path, splits: Sequence[Split], names: Sequence[str], scheme: str) -> None:
    """Say what an existing file of splits means that a new one would not."""
    used = {name for split in splits for name in (*split.train, *split.val, *split.test)}
    unused = [name for name in names if name not in used]
    if unused:
        log.warning(
            "%s: %d cases are in no fold and are not used (%s, ...); remove the file to split anew",
            path, len(unused), unused[0],
        )  # fmt: skip
    if scheme == "80-10-10" and len(splits) > 1:
        log.warning("%s: its %d folds are kept; remove it to have the preset's split 80/10/10", path, len(splits))


def choose_split(splits: Sequence[Split] | None, fold: str, names: Sequence[str]) -> Split:
    """The cases of one fold; ``all`` trains on everything and validates on the same cases.

    Raises:
        ConfigError: no such fold.
    """
    if fold == "all":
        return Split(tuple(sorted(names)), tuple(sorted(names)))
    count = len(splits or ())
    if not (fold.isascii() and fold.isdigit()) or int(fold) >= count:
        raise ConfigError(f"fold must be 0..{count - 1} or 'all', got {fold!r}")
    assert splits is not None
    return splits[int(fold)]


def take_subset(
    cases: Sequence[str], fraction: float, seed: int, groups: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """A seeded share of the subjects' cases; smaller fractions are subsets of larger ones."""
    groups = groups or {name: name for name in cases}
    subjects = sorted({groups[name] for name in cases})
    order = np.random.default_rng([seed, 0x5B5E]).permutation(len(subjects))
    keep = {subjects[i] for i in order[: max(1, round(fraction * len(subjects)))]}
    return tuple(name for name in cases if groups[name] in keep)


def _read_splits(path: Path, names: set[str], groups: Mapping[str, str]) -> list[Split]:
    content = read_json(path, "splits")
    try:
        splits = [Split(tuple(s["train"]), tuple(s["val"]), tuple(s.get("test", ()))) for s in content]
        if not splits or not all(isinstance(name, str) for s in splits for name in (*s.train, *s.val, *s.test)):
            raise TypeError("not lists of names")
    except (TypeError, KeyError, AttributeError) as error:
        raise DatasetError(f'{path} must hold a list of {{"train": [...], "val": [...]}}') from error
    for number, split in enumerate(splits):
        sides = {"train": set(split.train), "val": set(split.val), "test": set(split.test)}
        unknown = sorted(set().union(*sides.values()) - names)
        if unknown:
            raise DatasetError(f"{path}: fold {number} names unknown cases: {listing(unknown, 5)}")
        if not split.train or not split.val:
            raise DatasetError(f"{path}: fold {number} needs training and validation cases")
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            shared = {groups[name] for name in sides[one]} & {groups[name] for name in sides[other]}
            if shared:
                raise DatasetError(
                    f"{path}: fold {number} has subject or case {sorted(shared)[0]} in both {one} and {other}"
                )
    return splits
