"""Features of single cases, kept in Parquet files of some cases each, so that a long measurement can be resumed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ukbob_seg.files import atomic_path

MOST_CASES = 64
_META = b"ukbob_cases"


@dataclass(frozen=True)
class Shard:
    """Features of some cases.

    Attributes:
        keys: case -> hash of what its features depend on; a case without organs has a key and no rows.
        rows: one row per case and organ, with the column ``case``.
        evidence: whether the rows hold the columns of ``organ_evidence``.
    """

    keys: Mapping[str, str]
    rows: pd.DataFrame
    evidence: bool

    def select(self, cases: Collection[str]) -> Shard:
        """The part of it that is about some of its cases."""
        if len(cases) == len(self.keys):
            return self
        keys = {case: key for case, key in self.keys.items() if case in cases}
        return Shard(keys, self.rows[self.rows["case"].isin(keys)], self.evidence)

    def save(self, path: Path) -> None:
        """Write as Parquet, atomically; the same content gives the same bytes."""
        table = pa.Table.from_pandas(self.rows, preserve_index=False)
        meta = json.dumps({"evidence": self.evidence, "keys": dict(self.keys)})
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _META: meta})
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary)

    @classmethod
    def load(cls, path: Path) -> Shard | None:
        """Read a shard; None for a file that is damaged or no shard (its cases are then measured again)."""
        try:
            table = pq.read_table(path)
            meta = json.loads((table.schema.metadata or {})[_META])
            return cls(meta["keys"], table.to_pandas(), bool(meta["evidence"]))
        except (OSError, ValueError, KeyError, TypeError):  # pyarrow's errors derive from ValueError or OSError
            return None


def shard_size(cases: int) -> int:
    """Cases per shard: 64 in large cohorts, fewer in small ones so that several workers find something to do."""
    return max(1, min(MOST_CASES, cases // MOST_CASES))


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard is kept."""
    return Path(folder) / f"shard_{index:05d}.parquet"


def find_shards(folder: Path) -> list[Path]:
    """The files of a folder of shards, in the order of their numbers."""
    return sorted(Path(folder).glob("shard_*.parquet"))


def load_shards(paths: Iterable[Path], cases: Collection[str]) -> dict[Path, Shard]:
    """Read files once; those that are damaged, or about none of the cases, are left out."""
    found = {}
    for path in paths:
        shard = Shard.load(path)
        if shard is not None and not shard.keys.keys().isdisjoint(cases):
            found[path] = shard
    return found


def known_cases(shards: Iterable[Shard], current: Mapping[str, str], evidence: bool) -> dict[str, Shard]:
    """What of an earlier run still holds.

    Args:
        shards: where a case is in several, the first counts.
        current: case -> key that its features must have now.
        evidence: whether the columns of ``organ_evidence`` are needed.

    Returns:
        case -> a shard with its features, without any case that is outdated.
    """
    found: dict[str, Shard] = {}
    for shard in shards:
        if evidence and not shard.evidence:
            continue
        valid = [case for case, key in shard.keys.items() if case not in found and current.get(case) == key]
        found.update(dict.fromkeys(valid, shard.select(set(valid))))
    return found


def join_shards(shards: Iterable[Shard], cases: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """One table of all shards in the order of the cases, and ascending by label within a case."""
    frames = [shard.rows for shard in shards if len(shard.rows)]
    if not frames:
        return pd.DataFrame(columns=list(columns))
    table = pd.concat(frames, ignore_index=True)[list(columns)]
    place = table["case"].map({case: position for position, case in enumerate(cases)})
    return table.assign(_place=place).sort_values(["_place", "label"], ignore_index=True).drop(columns="_place")


def remove_other_shards(folder: Path, count: int) -> None:
    """Delete shards of an earlier, larger cohort."""
    expected = {shard_path(folder, index) for index in range(count)}
    for path in find_shards(folder):
        if path not in expected:
            path.unlink(missing_ok=True)
