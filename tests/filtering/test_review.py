"""The table for a reviewer, and verdicts."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ukbob_seg.errors import DatasetError
from ukbob_seg.filtering.review import apply_verdicts, label_scores, read_verdicts, scan_scores, write_review


@pytest.fixture
def flags() -> pd.DataFrame:
    """Four scans of two organs: b has two doubtful labels, c one absurd one, d one without a model but with votes."""
    rows = [
        ("a", 1, 0.4, 0, False),
        ("a", 2, 1.9, 1, False),
        ("b", 1, 6.0, 2, True),
        ("b", 2, 7.0, 1, False),
        ("c", 1, 250.0, 3, True),
        ("c", 2, 0.1, 0, False),
        ("d", 1, np.nan, 2, True),
        ("d", 2, np.nan, 1, False),
    ]
    table = pd.DataFrame(rows, columns=["case", "label", "doubt", "votes", "flagged"])
    table["organ"] = table["label"].map({1: "liver", 2: "spleen"})
    return table.assign(
        sphericity_outside=table["votes"] >= 1,
        normalized_volume_outside=table["votes"] >= 2,
        eccentricity_outside=table["votes"] >= 3,
        doubt_outside=table["doubt"] > 3,
    )


def test_scores(flags: pd.DataFrame) -> None:
    assert label_scores(flags).tolist() == [0.4, 1.9, 6, 7, 10, 0.1, 2, 1]
    assert scan_scores(flags).to_dict() == {"a": 0, "b": 13, "c": 10, "d": 2}
    assert label_scores(flags.drop(columns="doubt")).tolist() == flags["votes"].tolist()


def test_most_doubtful_scans_come_first(flags: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "review.csv"
    assert write_review(path, apply_verdicts(flags, {}), {}) == 4
    table = pd.read_csv(path, keep_default_na=False)
    assert list(zip(table["case"], table["label"], strict=True)) == [("b", 2), ("b", 1), ("c", 1), ("d", 1)]
    assert table["scan_score"].tolist() == [13, 13, 10, 2]
    assert table["flagged"].tolist() == ["no", "yes", "yes", "yes"]
    assert table["organ"].tolist() == ["spleen", "liver", "liver", "liver"]
    assert table["why"].tolist()[0] == "sphericity"
    assert table["why"].tolist()[2] == "normalized volume; sphericity; eccentricity"
    assert table["verdict"].eq("").all()


def test_verdicts_overrule_the_filter_and_are_kept(flags: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "review.csv"
    verdicts = {("b", 1): "accept", ("a", 1): "reject"}
    judged = apply_verdicts(flags, verdicts)
    assert judged["flagged"].tolist() == [True, False, False, False, True, False, True, False]
    assert (judged["flagged_by_rule"] == flags["flagged"]).all()
    assert judged["flagged"].dtype == bool
    write_review(path, judged, verdicts)
    assert read_verdicts(path) == verdicts  # so a second run obeys them too
    strange = verdicts | {("gone", 4): "accept"}
    write_review(path, judged, strange)
    assert read_verdicts(path) == strange
    assert flags["flagged"].tolist() == [False, False, True, False, True, False, True, False]


@pytest.mark.parametrize("verdicts", [{}, {("b", 1): "accept", ("d", 2): "reject", ("gone", 4): "accept"}])
def test_rows_keep_their_order_and_index(flags: pd.DataFrame, verdicts: dict[tuple[str, int], str]) -> None:
    mixed = flags.sample(frac=1, random_state=1).set_axis(range(100, 108))
    judged = apply_verdicts(mixed, verdicts)
    pd.testing.assert_frame_equal(judged[["case", "label", "organ"]], mixed[["case", "label", "organ"]])
    expected = [verdicts.get(key, "") for key in zip(mixed["case"], mixed["label"], strict=True)]
    assert judged["verdict"].tolist() == expected


def test_spreadsheets_write_other_csv(tmp_path: Path) -> None:
    path = tmp_path / "review.csv"
    path.write_text(
        "\ufeffcase;label;organ;verdict\nx;3;liver; Accept \ny;4;spleen;\nz;5;liver;REJECT\n", encoding="utf-8"
    )
    assert read_verdicts(path) == {("x", 3): "accept", ("z", 5): "reject"}


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is a folder"):
        read_verdicts(tmp_path)


def test_verdicts_about_nothing_are_reported(flags: pd.DataFrame, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        apply_verdicts(flags, {("q", 1): "reject"})
    assert "q label 1" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,label\nx,1\n", "no column verdict"),
        ("case,label,verdict\nx,1,accept\ny,2,maybe\n", "line 3: the verdict is 'maybe'"),
        ("case,label,verdict\nx,liver,accept\n", "line 2: the label is 'liver'"),
        (
            "case,label,verdict\nx,1,accept\nx,1,reject\n",
            "two things about case x, label 1: verdict 'accept' in line 2 and 'reject' in line 3",
        ),
        ("", "is empty"),
        ("case,label,verdict\nx,\u00b2,accept\n", "line 2: the label is"),
    ],
)
def test_unusable_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "review.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError, match=message):
        read_verdicts(path)
