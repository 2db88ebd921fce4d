"""What a flag does: how training treats the labels that the filter does not trust."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.files import read_json, write_json, write_text

POLICY_FILE = "policy.json"
FLAGS_FILE = "flags.parquet"
STARTED_FILE = "started"

ACTIONS: dict[str, str] = {
    "ignore": "the voxels of a flagged organ are ignored in that scan",
    "background": "the voxels of a flagged organ become background in that scan",
    "report": "flags are reported and change nothing",
}


@dataclass(frozen=True)
class FilterPolicy:
    """What training does with flagged labels.

    Attributes:
        action: ``ignore`` (neither loss nor metrics count the organ's voxels), ``background``, or ``report``.
        max_flags: a scan with MORE flagged organs than this is dropped from training; None drops none.
    """

    action: str = "ignore"
    max_flags: int | None = None

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ConfigError(f"unknown policy {self.action!r}; choose one of {', '.join(ACTIONS)}")
        if self.max_flags is not None and self.max_flags < 0:
            raise ConfigError(f"scans cannot be dropped above a negative number of flags, got {self.max_flags}")
        if self.max_flags is not None and self.action == "report":
            raise ConfigError("the policy 'report' changes nothing, so it cannot drop scans; leave one of the two out")

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> FilterPolicy:
        """Read a policy file.

        Raises:
            DatasetError: missing, or unknown entries.
            ConfigError: entries out of range.
        """
        content = read_json(path, "policy file")
        try:
            return cls(**content)
        except TypeError as error:
            raise DatasetError(
                f"{path} is not a policy file (expected the entries action and max_flags); run ukbob_filter again"
            ) from error


def is_complete(folder: Path) -> bool:
    """Whether a filter has left its decisions there."""
    return (Path(folder) / POLICY_FILE).is_file() and (Path(folder) / FLAGS_FILE).is_file()


def mark_started(folder: Path) -> None:
    """Leave a sign that a filter is under way, so that training does not take a dataset for unfiltered."""
    write_text(Path(folder) / STARTED_FILE, "ukbob_filter was started here; it removes this file when it is done\n")


@dataclass(frozen=True)
class LabelTrust:
    """Which labels of which scans training must not learn from.

    Attributes:
        policy: what a flag does.
        flags: case -> flagged file values, ascending; every case that has been judged has an entry.
        labels: organ labels that were judged in all cases together.
    """

    policy: FilterPolicy
    flags: Mapping[str, tuple[int, ...]]
    labels: int

    @classmethod
    def from_flags(cls, table: pd.DataFrame, policy: FilterPolicy) -> LabelTrust:
        """From a table with the columns case, label and flagged."""
        flags: dict[str, list[int]] = {str(case): [] for case in pd.unique(table["case"])}
        flagged = table[table["flagged"].to_numpy(bool)]
        for case, label in zip(flagged["case"], flagged["label"], strict=True):
            flags[str(case)].append(int(label))
        return cls(policy, {case: tuple(sorted(values)) for case, values in flags.items()}, len(table))

    @classmethod
    def load(cls, solf_folder: Path) -> LabelTrust | None:
        """Read what ``ukbob_filter`` decided; None when the dataset has not been filtered.

        Raises:
            DatasetError: the filter has been started and has not finished, or its files are damaged.
        """
        folder = Path(solf_folder)
        if not any((folder / name).is_file() for name in (STARTED_FILE, POLICY_FILE, FLAGS_FILE)):
            return None
        if (folder / STARTED_FILE).is_file() or not is_complete(folder):
            raise DatasetError(
                f"the label filter has not finished in {folder}; run ukbob_filter again, or train on all "
                "labels with --no-filter"
            )
        try:
            table = pd.read_parquet(folder / FLAGS_FILE, columns=["case", "label", "flagged"])
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors derive from these
            raise DatasetError(f"{folder / FLAGS_FILE} cannot be read ({error}); run ukbob_filter again") from error
        return cls.from_flags(table, FilterPolicy.load(folder / POLICY_FILE))

    @property
    def action(self) -> str:
        """``ignore``, ``background`` or ``report``."""
        return self.policy.action

    @cached_property
    def dropped_cases(self) -> frozenset[str]:
        """Cases with more flagged organs than the policy allows."""
        most = self.policy.max_flags
        return frozenset(case for case, values in self.flags.items() if most is not None and len(values) > most)

    def flagged_values(self, case: str) -> tuple[int, ...]:
        """File values of the organs of a case that are not trusted; none for a case that was not judged."""
        return self.flags.get(case, ())

    def summary(self) -> str:
        """One sentence for a log."""
        total = sum(len(values) for values in self.flags.values())
        scans = sum(1 for values in self.flags.values() if values)
        text = f"label filter: {total} of {self.labels} organ labels flagged in {scans} of {len(self.flags)} scans"
        text += f"; {ACTIONS[self.action]}"
        if self.policy.max_flags is not None:
            text += f"; {len(self.dropped_cases)} scans dropped (more than {self.policy.max_flags} flagged organs)"
        return text


def case_lookup(trust: LabelTrust | None, case: str, scheme: LabelScheme) -> np.ndarray | None:
    """Table that turns a case's stored label indices into those that training may learn from.

    Args:
        trust: the filter's decisions, or None.
        case: case name.
        scheme: what the label values of the dataset mean.

    Returns:
        (256,) uint8 or (65536,) uint16 table to index with a stored label map: identity, except that flagged organs
        give ``scheme.ignore_index`` (or 0 under the policy ``background``). None when nothing changes.

    Raises:
        DatasetError: a flagged value is not a label of the dataset.
    """
    flagged = flagged_indices(trust, case, scheme)
    if trust is None or not flagged:
        return None
    table = np.arange(np.iinfo(scheme.dtype).max + 1, dtype=scheme.dtype)
    table[list(flagged)] = scheme.ignore_index if trust.action == "ignore" else 0
    return table


def flagged_indices(trust: LabelTrust | None, case: str, scheme: LabelScheme) -> tuple[int, ...]:
    """Label indices of a case that training must not learn from, ascending; none under the policy ``report``.

    Raises:
        DatasetError: a flagged value is not a label of the dataset.
    """
    values = () if trust is None or trust.action == "report" else trust.flagged_values(case)
    unknown = sorted(set(values) - set(scheme.values))
    if unknown:
        raise DatasetError(
            f"case {case}: the label filter flagged the values {unknown}, which dataset.json does not name; "
            "run ukbob_filter again"
        )
    return tuple(int(k) + 1 for k in np.searchsorted(scheme.values, values))
