"""Bounds by group of subjects (sex, age band): each scan is compared with its own kind only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ukbob_seg.dataset.tables import one_row_each, read_table
from ukbob_seg.errors import ConfigError, DatasetError, listing
from ukbob_seg.files import read_json, write_json
from ukbob_seg.filtering.bounds import CohortBounds

WHOLE = ""  # the only stratum of a cohort that is not divided
MOST_STRATA = 50


@dataclass(frozen=True)
class StratifiedBounds:
    """The bounds of every stratum of a cohort.

    Attributes:
        columns: of the table of subjects that divide the cohort; none when it is not divided.
        strata: by the values of these columns, joined by ``, ``; ``""`` when the cohort is not divided.
        body: what the volumes were normalized by (``image``, ``union`` or ``mask``); empty when it is not known.
    """

    columns: tuple[str, ...]
    strata: Mapping[str, CohortBounds]
    body: str = ""

    @property
    def any(self) -> CohortBounds:
        """Some stratum's bounds: epsilon and the like are the same in all."""
        return next(iter(self.strata.values()))

    def split(self, table: pd.DataFrame) -> Iterator[tuple[str, CohortBounds, pd.DataFrame]]:
        """(stratum, its bounds, its rows) for every stratum that occurs in a table with the column ``stratum``.

        Raises:
            ConfigError: a stratum without bounds.
        """
        for name, rows in table.groupby("stratum", sort=True):
            if name not in self.strata:
                raise ConfigError(
                    f"the bounds have no stratum {name!r} (columns {', '.join(self.columns) or 'none'}; known: "
                    f"{', '.join(map(repr, self.strata))}); learn them again on a cohort that has it"
                )
            yield str(name), self.strata[str(name)], rows

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        if self.columns:
            strata = {name: bounds.as_json() for name, bounds in sorted(self.strata.items())}
            write_json(path, {"body": self.body, "columns": list(self.columns), "strata": strata})
        else:
            write_json(path, {"body": self.body, **self.strata[WHOLE].as_json()})

    @classmethod
    def load(cls, path: Path) -> StratifiedBounds:
        """Read a file that ``save`` wrote.

        Raises:
            DatasetError: missing, or not a bounds file.
        """
        return cls.from_json(read_json(path, "bounds file"), str(path))

    @classmethod
    def from_json(cls, content: Any, where: str) -> StratifiedBounds:
        """The content of such a file.

        Raises:
            DatasetError: it is none; says where.
        """
        try:
            if "strata" in content:
                strata = {str(name): CohortBounds.from_json(entry) for name, entry in content["strata"].items()}
                if not strata:
                    raise ValueError("no stratum")
                columns = tuple(str(column) for column in content["columns"])
                return cls(columns, strata, str(content.get("body", "")))
            return cls((), {WHOLE: CohortBounds.from_json(content)}, str(content.get("body", "")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DatasetError(
                f"{where} is not a bounds file, or a damaged one; use the bounds.json that ukbob_filter wrote"
            ) from error


def learn_strata(
    features: pd.DataFrame, columns: Sequence[str], learn: Callable[[pd.DataFrame], CohortBounds]
) -> StratifiedBounds:
    """Learn bounds in every stratum of a table with the column ``stratum``."""
    return StratifiedBounds(
        tuple(columns), {str(name): learn(rows) for name, rows in features.groupby("stratum", sort=True)}
    )


def read_strata(path: Path, columns: Sequence[str], cases: Sequence[str]) -> dict[str, str]:
    """The stratum of every case from a CSV file with a column ``case``.

    Args:
        path: of the CSV file.
        columns: whose values divide the cohort.
        cases: that need a stratum.

    Raises:
        DatasetError: the file cannot be read, lacks a column, or says nothing or two things about a case.
        ConfigError: so many different values that no cohort can be divided by them (bands are wanted).
    """
    what = "the table of subjects"
    table = read_table(path, what, ("case", *columns))
    table = one_row_each(table[table["case"].isin(list(cases))], ["case"], f"{what} {path}")
    values = table[list(columns)]
    absent = sorted(set(cases) - set(table["case"][(values != "").all(axis=1)]))
    if absent:
        raise DatasetError(
            f"{what} {path} has no {' and '.join(columns)} for {len(absent)} of {len(cases)} cases: "
            f"{listing(absent, 5)}"
        )
    strata = [", ".join(row) for row in values.itertuples(index=False, name=None)]
    count = len(set(strata))
    if count > MOST_STRATA:
        raise ConfigError(
            f"{' and '.join(columns)} divide the cohort into {count} strata, more than {MOST_STRATA}; give bands "
            "(a column with values such as 45-54, 55-64) instead of single values"
        )
    return dict(zip(table["case"], strata, strict=True))
