"""Means, counts and files of a summary against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ukbob_seg.errors import DatasetError
from ukbob_seg.evaluation.metrics import METRICS, absent_from_both, evaluate_case
from ukbob_seg.evaluation.summary import CaseMetrics, EvaluationSummary, collect

INF, NAN = math.inf, math.nan


def metrics(dice: float, hd: float = 1.0, n: int = 10) -> dict[str, float]:
    return {**absent_from_both(), "dice": dice, "hd": hd, "hd95": hd, "assd": hd, "n_ref": n, "n_pred": n}


@pytest.fixture
def summary() -> EvaluationSummary:
    """Liver in three cases, spleen in two (missed in one), tail in none."""
    absent = absent_from_both()
    cases = [
        CaseMetrics("a", {"liver": metrics(0.9, 2), "spleen": metrics(0.8, 4), "tail": absent}, "p/a", "r/a"),
        CaseMetrics("b", {"liver": metrics(0.6, 8), "spleen": metrics(0.0, INF), "tail": absent}),
        CaseMetrics("c", {"liver": metrics(0.3, 5)}),
    ]
    return collect(cases, {"liver": 1, "spleen": (2, 3), "tail": 4}, 1.5, missing=["d"], unmatched=["e"])


def test_class_statistics_leave_out_nan_and_infinity_and_count_both(summary: EvaluationSummary) -> None:
    dice, hd = summary.statistics("dice"), summary.statistics("hd")
    assert list(dice.index) == ["liver", "spleen", "tail"]
    assert dice.loc["liver"].tolist() == pytest.approx([0.6, 0.3, 0.6, 3, 0])
    assert dice.loc["spleen"].tolist() == pytest.approx([0.4, np.std([0.8, 0], ddof=1), 0.4, 2, 0])
    assert hd.loc["spleen", ["mean", "median", "n", "n_infinite"]].tolist() == [4, 4, 1, 1]
    assert math.isnan(hd.loc["spleen", "sd"])
    assert dice.loc["tail", ["n", "n_infinite"]].tolist() == [0, 0]
    assert dice.loc["tail", ["mean", "sd", "median"]].isna().all()


def test_overall_mean_is_over_classes_not_over_values(summary: EvaluationSummary) -> None:
    overall = summary.overall("dice")
    assert overall.mean == summary.mean() == pytest.approx((0.6 + 0.4) / 2)  # over the five values it would be 0.52
    assert (overall.classes, overall.values, overall.n_infinite) == (2, 5, 0)
    hd = summary.overall("hd")
    assert (hd.mean, hd.classes, hd.values, hd.n_infinite) == (pytest.approx((5 + 4) / 2), 2, 4, 1)


def test_absent_everywhere_and_nothing_finite(summary: EvaluationSummary) -> None:
    assert summary.absent_classes == ("tail",)
    missed = collect([CaseMetrics("a", {"x": metrics(0.0, INF), "y": absent_from_both()})])
    overall = missed.overall("hd95")
    assert math.isnan(overall.mean)
    assert (overall.classes, overall.n_infinite) == (0, 1)
    assert missed.mean("dice") == 0


def test_case_means(summary: EvaluationSummary) -> None:
    assert summary.cases == ("a", "b", "c")
    assert summary.case_means().to_dict() == pytest.approx({"a": 0.85, "b": 0.3, "c": 0.3})
    assert summary.case_means("hd").to_dict() == pytest.approx({"a": 3, "b": 8, "c": 5})


def test_a_single_absent_class_never_spoils_the_mean() -> None:
    labels = np.zeros((4, 5, 6), dtype=np.uint8)
    labels[1:3, 1:3, 1:3] = 1
    found = evaluate_case(labels, labels, (3, 1, 0.7), {"organ": 1, "absent": 2})
    assert collect([CaseMetrics("a", found)]).mean("dice") == 1


def test_json_is_strict_and_complete(summary: EvaluationSummary, tmp_path: Path) -> None:
    summary.write(tmp_path)

    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    content = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert (content["tolerance_mm"], content["tolerances_mm"]) == (1.5, [1.5])
    assert content["cases"] == 3
    assert content["missing_predictions"] == ["d"]
    assert content["predictions_without_reference"] == ["e"]
    assert content["absent_classes"] == ["tail"]
    assert content["overall"]["dice"] == {
        "mean": pytest.approx(0.5), "classes": 2, "values": 5, "n_infinite": 0, "ci95": None,
    }  # fmt: skip
    spleen = content["classes"]["spleen"]
    assert spleen["values"] == [2, 3]
    assert spleen["hd"] == {"mean": 4.0, "sd": None, "median": 4.0, "n": 1, "n_infinite": 1, "ci95": None}
    assert content["classes"]["tail"]["dice"]["mean"] is None
    first, second, third = content["per_case"]
    assert (first["case"], first["prediction"], first["reference"]) == ("a", "p/a", "r/a")
    assert second["classes"]["spleen"]["hd"] == "inf"
    assert third["classes"]["spleen"]["dice"] is None
    assert list(third["classes"]["liver"]) == list(METRICS)
    assert third["classes"]["liver"]["n_ref"] == 10


def test_intervals_are_written(tmp_path: Path) -> None:
    cases = [CaseMetrics(f"c{k}", {"x": metrics(k / 10)}) for k in range(10)]
    collect(cases).write(tmp_path)
    content = json.loads((tmp_path / "summary.json").read_text())
    low, high = content["classes"]["x"]["dice"]["ci95"]
    assert 0.2 < low < 0.45 < high < 0.7
    assert content["overall"]["dice"]["ci95"] == [low, high]  # of one class
    assert "ci95" not in content["classes"]["x"]["volume_pred_mm3"]


def test_a_huge_table_stays_out_of_the_json(summary: EvaluationSummary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ukbob_seg.evaluation.summary.MOST_ROWS_IN_JSON", 9)
    assert summary.to_json()["per_case"] is not None
    monkeypatch.setattr("ukbob_seg.evaluation.summary.MOST_ROWS_IN_JSON", 8)
    assert summary.to_json()["per_case"] is None


def test_csv_reads_back_as_the_table(summary: EvaluationSummary, tmp_path: Path) -> None:
    summary.write(tmp_path)
    read = pd.read_csv(tmp_path / "metrics.csv")
    pd.testing.assert_frame_equal(read, summary.table, check_dtype=False)
    assert len(read) == 9
    assert np.isinf(read.loc[(read["case"] == "b") & (read["class"] == "spleen"), "hd"]).all()


def test_writing_twice_gives_the_same_bytes(summary: EvaluationSummary, tmp_path: Path) -> None:
    summary.write(tmp_path / "one")
    summary.write(tmp_path / "two")
    for name in ("summary.json", "metrics.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_bad_collections() -> None:
    with pytest.raises(DatasetError, match="no case"):
        collect([])
    with pytest.raises(DatasetError, match="no class"):
        collect([CaseMetrics("a", {})])
    with pytest.raises(DatasetError, match="case a is listed twice"):
        collect([CaseMetrics("a", {"x": metrics(1)})] * 2)
    with pytest.raises(DatasetError, match=r"case a has unknown classes \['x'\]"):
        collect([CaseMetrics("a", {"x": metrics(1)})], {"y": 1})
