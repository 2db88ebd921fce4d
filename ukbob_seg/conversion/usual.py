"""What is usual in a cohort: stations with another number of slices than most archives have there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_FEWEST = 3  # archives, to call a number usual


def add_usual_slices(stations: pd.DataFrame) -> pd.DataFrame:
    """The table of stations with a column ``usual_slices``: the number that more than half of the archives have.

    Archives are compared that have as many stations, at stations of one number and one slice spacing; those with
    problems take no part, and are compared with nothing. The column is empty where fewer than three are alike.

    Args:
        stations: a row for each station, with case, station, slices, slice_spacing_mm.
    """
    import pandas as pd

    usual = pd.Series(pd.NA, index=stations.index, dtype="Int64")
    if len(stations):
        fine = stations.groupby("case")["slice_spacing_mm"].transform(lambda spacing: spacing.notna().all())
        own = stations[fine.astype(bool)]
        total = own.groupby("case")["station"].transform("size")
        for _, rows in own.groupby([total, own["station"], own["slice_spacing_mm"].astype(float).round(2)]):
            counts = rows["slices"].value_counts()
            if len(rows) >= _FEWEST and counts.iloc[0] > len(rows) / 2:
                usual[rows.index] = int(counts.index[0])
    return stations.assign(usual_slices=usual)


def unusual_stations(stations: pd.DataFrame) -> dict[str, list[int]]:
    """Stations by case whose number of slices is not the usual one."""
    if not len(stations):
        return {}
    odd = stations[(stations["usual_slices"].notna()) & (stations["slices"] != stations["usual_slices"])]
    return {str(case): [int(each) for each in rows["station"]] for case, rows in odd.groupby("case")}
