"""A person's say: a table of the most doubtful labels to look through, whose verdicts overrule the filter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ukbob_seg.dataset.tables import one_row_each, read_table
from ukbob_seg.errors import DatasetError, listing
from ukbob_seg.files import atomic_path
from ukbob_seg.filtering.bounds import PLAIN_VOLUME, SOLF_FEATURES
from ukbob_seg.filtering.solf import MODELS

logger = logging.getLogger(__name__)

REVIEW_FILE = "review.csv"
VERDICTS = {"accept": False, "reject": True}  # verdict -> flagged
SHOWN_DOUBT = 2.0  # a label that one ordinary label in 100 equals, or less, is worth a look
MOST_PER_LABEL = 10.0  # one absurd label must not outweigh a scan in which everything is wrong
_KEY = ["case", "label"]

Verdicts = Mapping[tuple[str, int], str]


def label_scores(flags: pd.DataFrame) -> np.ndarray:
    """How doubtful each label is: its largest doubt, up to 10; where there is no model, its ``votes``."""
    doubt = flags.reindex(columns=list(MODELS)).astype(np.float64).max(axis=1).to_numpy()
    return np.where(np.isnan(doubt), flags["votes"], np.minimum(doubt, MOST_PER_LABEL))


def scan_scores(flags: pd.DataFrame) -> pd.Series:
    """How doubtful each scan is: the sum of its labels' scores from 2 on, so that ordinary labels add nothing."""
    scores = label_scores(flags)
    return pd.Series(np.where(scores >= SHOWN_DOUBT, scores, 0.0)).groupby(flags["case"].to_numpy()).sum()


def read_verdicts(path: Path) -> dict[tuple[str, int], str]:
    """The verdicts of a reviewed table.

    Args:
        path: a CSV file with the columns case, label, verdict; other columns are not read.

    Returns:
        (case, label) -> ``accept`` or ``reject``; lines without a verdict are left out.

    Raises:
        DatasetError: the file cannot be read, a verdict is another word, or a label has both; names the line.
    """
    what = "the reviewed table"
    table = read_table(path, what, ("case", "label", "verdict"))
    table = table[table["verdict"] != ""]
    for line, _, label, word in table.itertuples(name=None):
        if word.lower() not in VERDICTS:
            raise DatasetError(f"{what} {path}, line {line}: the verdict is {word!r}; write accept, reject or nothing")
        if not (label.isascii() and label.isdigit() and len(label) < 10):
            raise DatasetError(f"{what} {path}, line {line}: the label is {label!r}, not a label value")
    table = table.assign(label=table["label"].astype(np.int64), verdict=table["verdict"].str.lower())
    table = one_row_each(table, ["case", "label"], f"{what} {path}")
    return {(case, label): verdict for case, label, verdict in table.itertuples(index=False, name=None)}


def apply_verdicts(flags: pd.DataFrame, verdicts: Verdicts) -> pd.DataFrame:
    """Overrule the filter.

    Args:
        flags: the table of ``flag_organs``.
        verdicts: from ``read_verdicts``.

    Returns:
        A copy with the columns ``flagged_by_rule`` and ``verdict`` (empty without one), and ``flagged`` decided by the
        verdict where there is one.
    """
    given = pd.DataFrame([(*key, verdict) for key, verdict in verdicts.items()], columns=[*_KEY, "verdict"])
    given = given.astype({"case": str, "label": np.int64, "verdict": str})  # also where there are none
    said = flags[_KEY].merge(given, how="left", on=_KEY, validate="many_to_one")["verdict"].fillna("")
    table = flags.assign(flagged_by_rule=flags["flagged"], verdict=said.set_axis(flags.index))
    unknown = [f"{case} label {label}" for case, label in _strangers(table, verdicts)]
    if unknown:
        logger.warning("warning: %d verdicts are about labels that do not exist: %s", len(unknown), listing(unknown, 5))
    decided = table["verdict"].map(VERDICTS)
    table["flagged"] = decided.where(decided.notna(), table["flagged"]).astype(bool)
    return table


def write_review(path: Path, flags: pd.DataFrame, verdicts: Verdicts) -> int:
    """Write the table to look through: the most doubtful scans first, in each the most doubtful labels first.

    It holds every label that is flagged, whose score is 2 or more, or that has a verdict. Verdicts about labels that do
    not exist stand at the end: nothing that a person wrote is lost.

    Args:
        path: of the CSV file.
        flags: the table of ``apply_verdicts`` with the column organ.
        verdicts: all that were given.

    Returns:
        Number of lines.
    """
    scores = label_scores(flags)
    chosen = flags["flagged"] | flags["flagged_by_rule"] | (scores >= SHOWN_DOUBT) | (flags["verdict"] != "")
    table = flags.assign(label_score=scores, scan_score=flags["case"].map(scan_scores(flags)))[chosen.to_numpy(bool)]
    table = table.sort_values(
        ["scan_score", "case", "label_score", "label"], ascending=[False, True, False, True], kind="stable"
    )
    content = pd.DataFrame(
        {
            "case": table["case"],
            "label": table["label"],
            "organ": table["organ"],
            "verdict": table["verdict"],
            "flagged": np.where(table["flagged"], "yes", "no"),
            "scan_score": table["scan_score"].round(2),
            "label_score": table["label_score"].round(2),
            "why": [_why(row) for row in table.to_dict(orient="records")],
        }
    )
    strangers = [(*key, verdicts[key]) for key in _strangers(flags, verdicts)]
    if strangers:
        rest = pd.DataFrame(strangers, columns=[*_KEY, "verdict"])
        content = pd.concat([content, rest.assign(why="no such label")], ignore_index=True)
    with atomic_path(path) as temporary:
        content.to_csv(temporary, index=False, lineterminator="\n")
    return len(content)


def _strangers(flags: pd.DataFrame, verdicts: Verdicts) -> list[tuple[str, int]]:
    """What verdicts are about that the table of ``apply_verdicts`` has no row for, sorted."""
    judged = flags.loc[flags["verdict"] != "", _KEY]
    return sorted(set(verdicts) - set(judged.itertuples(index=False, name=None)))


def _why(row: dict[str, object]) -> str:
    reasons = [
        name.replace("_", " ").replace(" mm3", "")
        for name in (*SOLF_FEATURES, PLAIN_VOLUME)
        if row.get(f"{name}_outside")
    ]
    reasons += [name for name in ("stray", "swapped") if row.get(name)]
    unusual = any(float(row.get(name) or 0) >= SHOWN_DOUBT for name in MODELS)  # type: ignore[arg-type]
    return "; ".join(reasons + (["unusual combination"] if unusual and not reasons else []))
