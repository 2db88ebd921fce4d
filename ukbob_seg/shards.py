"""Tables over cases, kept in Parquet files of some cases each, so that long work over a cohort can be resumed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
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
    """What was computed of some cases.

    Attributes:
        keys: case -> hash of what its rows depend on; a case may have a key and no rows.
        rows: any number of rows per case, with the column ``case``.
        complete: whether the rows have the optional columns too, where there are any.
    """

    keys: Mapping[str, str]
    rows: pd.DataFrame
    complete: bool = True

    def select(self, cases: Collection[str]) -> Shard:
        """The part of it that is about some of its cases."""
        if len(cases) == len(self.keys):
            return self
        keys = {case: key for case, key in self.keys.items() if case in cases}
        return Shard(keys, self.rows[self.rows["case"].isin(keys)], self.complete)

    def save(self, path: Path) -> None:
        """Write as Parquet, atomically; the same content gives the same bytes."""
        table = pa.Table.from_pandas(self.rows, preserve_index=False)
        meta = json.dumps({"complete": self.complete, "keys": dict(self.keys)})
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _META: meta})
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary)

    @classmethod
    def load(cls, path: Path) -> Shard | None:
        """Read a shard; None for a file that is damaged or no shard (its cases are then computed again)."""
        try:
            table = pq.read_table(path)
            meta = json.loads((table.schema.metadata or {})[_META])
            return cls(meta["keys"], table.to_pandas(), bool(meta["complete"]))
        except (OSError, ValueError, KeyError, TypeError):  # pyarrow's errors derive from ValueError or OSError
            return None


def shard_size(cases: int) -> int:
    """Cases per shard: 64 in large cohorts, fewer in small ones so that several workers find something to do."""
    return max(1, min(MOST_CASES, cases // MOST_CASES))


def find_shards(folder: Path) -> list[Path]:
    """The files of a folder of shards, in the order of their names."""
    return sorted(Path(folder).glob("shard_*.parquet"))


def load_shards(paths: Iterable[Path], cases: Collection[str]) -> dict[Path, Shard]:
    """Read files once; those that are damaged, or about none of the cases, are left out."""
    found = {}
    for path in paths:
        shard = Shard.load(path)
        if shard is not None and not shard.keys.keys().isdisjoint(cases):
            found[path] = shard
    return found


def known_cases(shards: Iterable[Shard], current: Mapping[str, str], complete: bool = True) -> dict[str, Shard]:
    """What of an earlier run still holds.

    Args:
        shards: where a case is in several, the first counts.
        current: case -> key that its rows must have now.
        complete: whether the optional columns are needed.

    Returns:
        case -> a shard with its rows, without any case that is outdated.
    """
    found: dict[str, Shard] = {}
    for shard in shards:
        if complete and not shard.complete:
            continue
        valid = [case for case, key in shard.keys.items() if case not in found and current.get(case) == key]
        found.update(dict.fromkeys(valid, shard.select(set(valid))))
    return found
