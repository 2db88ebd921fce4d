"""Comparison of prediction sets: differences and tests worked out by other means, and its page."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ukbob_seg.dataset.image_io import Geometry, read_labels, write_labels
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.evaluation.comparison import OVERALL_ROW, compare, holm, p_text, wilcoxon_p
from ukbob_seg.evaluation.comparison_report import difference_figures, most_different_cases, write_comparison_report
from ukbob_seg.evaluation.evaluate import ReportOptions
from ukbob_seg.evaluation.evaluate_folders import distinct_names, evaluate_folders
from ukbob_seg.evaluation.metrics import absent_from_both
from ukbob_seg.evaluation.summary import CaseMetrics, EvaluationSummary, collect

NAN, INF = float("nan"), float("inf")
NAMES = ("liver", "spleen")


def summary_of(dice: np.ndarray, hd95: np.ndarray | None = None, first: int = 0) -> EvaluationSummary:
    """(cases, classes) as a summary; NSD as Dice."""
    hd95 = np.ones_like(dice) if hd95 is None else hd95
    names = [*NAMES, *(f"organ {k}" for k in range(2, dice.shape[1]))][: dice.shape[1]]
    cases = []
    for number, (row, far) in enumerate(zip(dice, hd95, strict=True)):
        found = {
            name: {**absent_from_both(), "dice": d, "nsd": d, "hd95": h, "n_ref": 9}
            for name, d, h in zip(names, row, far, strict=True)
        }
        cases.append(CaseMetrics(f"c{number + first:02d}", found))
    return collect(cases, {name: k + 1 for k, name in enumerate(names)})


def exact_wilcoxon(differences: np.ndarray) -> float:
    """All signs of the ranks, each as likely as the other (no zeros, no ties)."""
    ranks = stats.rankdata(np.abs(differences))
    seen = ranks[differences > 0].sum()
    sums = np.array(
        [sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in product((0, 1), repeat=len(ranks))]
    )
    return float(min(1.0, 2 * min((sums <= seen).mean(), (sums >= seen).mean())))


def test_wilcoxon_is_exact_for_few_and_ranks_infinite_ones_highest(rng: np.random.Generator) -> None:
    differences = rng.normal(0.3, 1, 9)
    assert wilcoxon_p(differences) == pytest.approx(exact_wilcoxon(differences))
    with_infinite = np.array([0.5, -0.1, INF, 0.3])
    assert wilcoxon_p(with_infinite) == pytest.approx(exact_wilcoxon(np.array([0.5, -0.1, 9.0, 0.3])))
    assert wilcoxon_p(np.array([-INF, NAN, 0.2])) == pytest.approx(exact_wilcoxon(np.array([-9.0, 0.2])))
    ties = np.array([1.0, 1, -1, 2, 2, 3, -3, 0, 0.5, INF, INF])
    assert wilcoxon_p(ties) == pytest.approx(exact_wilcoxon(np.array([1.0, 1, -1, 2, 2, 3, -3, 0.5, 9, 9])))
    assert wilcoxon_p(np.zeros(5)) == 1
    assert np.isnan(wilcoxon_p(np.array([NAN])))


@pytest.mark.parametrize("count", [30, 50, 51, 400])
def test_wilcoxon_is_scipys(rng: np.random.Generator, count: int) -> None:
    differences = rng.normal(0.2, 1, count)
    method = "exact" if count <= 50 else "approx"
    expected = stats.wilcoxon(differences, method=method).pvalue
    assert wilcoxon_p(differences) == pytest.approx(expected, rel=1e-9)
    if count > 100:
        tied = np.round(differences, 1)
        tied = tied[tied != 0]
        assert wilcoxon_p(tied) == pytest.approx(stats.wilcoxon(tied, method="approx").pvalue, rel=1e-9)


def test_holm_by_its_definition(rng: np.random.Generator) -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    p = rng.uniform(0, 0.2, 7)
    corrected = holm([*p, NAN])
    assert np.isnan(corrected[7])
    for level in rng.uniform(0, 1, 40):  # step down: the smallest first, until one is not rejected
        rejected = set()
        for step, index in enumerate(np.argsort(p)):
            if p[index] > level / (len(p) - step):
                break
            rejected.add(int(index))
        assert rejected == set(np.flatnonzero(corrected[:7] <= level))


def test_numbers_of_a_class(rng: np.random.Generator) -> None:
    one, two = rng.uniform(0.5, 0.9, (2, 12, 2))
    one[3, 1] = two[3, 1] = NAN
    one[4, 1] = NAN  # only the other invented it
    comparison = compare({"a": summary_of(one), "b": summary_of(two)})
    row = comparison.rows("dice", "b").loc["spleen"]
    kept = np.isfinite(one[:, 1]) & np.isfinite(two[:, 1])
    difference = (two - one)[kept, 1]
    assert (row["n"], row["n_unpaired"], row["n_infinite_baseline"], row["n_infinite_other"]) == (10, 1, 0, 0)
    assert row["difference"] == pytest.approx(difference.mean())
    assert row["baseline_mean"] == pytest.approx(one[kept, 1].mean())
    assert row["other_mean"] - row["baseline_mean"] == pytest.approx(row["difference"])
    assert (row["better"], row["worse"]) == ((difference > 0).sum(), (difference < 0).sum())
    assert row["p"] == pytest.approx(stats.wilcoxon(difference).pvalue)
    theirs = stats.bootstrap((difference,), np.mean, method="percentile", rng=np.random.default_rng(0))
    width = row["ci95_high"] - row["ci95_low"]
    assert row["ci95_low"] == pytest.approx(theirs.confidence_interval.low, abs=0.08 * width)
    both = comparison.table[(comparison.table["metric"] == "dice") & (comparison.table["class"] != OVERALL_ROW)]
    assert both["p_holm"].tolist() == pytest.approx(holm(both["p"].tolist()))
    overall = comparison.rows("dice", "b").loc[OVERALL_ROW]
    means = np.nanmean(np.where(np.isfinite(two - one), two - one, np.nan), axis=1)
    assert overall["difference"] == pytest.approx(means.mean())
    assert overall["p"] == overall["p_holm"] == pytest.approx(stats.wilcoxon(means).pvalue)


def test_a_missed_organ_is_worse_however_small_the_other_distances() -> None:
    near, far = np.full((8, 1), 2.0), np.full((8, 1), 3.0) + np.arange(8)[:, None] / 10
    far[:2] = INF
    dice = np.full((8, 1), 0.5)
    row = compare({"a": summary_of(dice, near), "b": summary_of(dice, far)}).rows("hd95", "b").loc["liver"]
    assert (row["n"], row["better"], row["worse"]) == (8, 0, 8)
    assert (row["n_infinite_baseline"], row["n_infinite_other"]) == (0, 2)
    assert row["difference"] == pytest.approx(far[2:].mean() - 2)
    assert row["p"] == pytest.approx(2 / 2**8)
    both = compare({"a": summary_of(dice, far), "b": summary_of(dice, far)}).rows("hd95", "b").loc["liver"]
    assert (both["better"], both["worse"], both["p"]) == (0, 0, 1)


def test_equal_sets_do_not_differ_and_cases_are_matched_by_name(rng: np.random.Generator) -> None:
    dice = rng.uniform(0.4, 0.9, (9, 2))
    comparison = compare({"a": summary_of(dice), "b": summary_of(dice[3:], first=3), "c": summary_of(dice)})
    assert comparison.cases == tuple(f"c{k:02d}" for k in range(3, 9))
    assert comparison.left_out == ("c00", "c01", "c02")
    assert comparison.table["difference"].abs().max() == 0
    assert (comparison.table["p_holm"] == 1).all()
    assert comparison.others == ("b", "c")


def test_the_baseline_s_column_is_over_the_compared_cases(rng: np.random.Generator, tmp_path: Path) -> None:
    dice = np.array([[0.5, 0.6], [0.5, 0.6], [0.9, NAN]])
    two = {"b": summary_of(dice[:2] + 0.1), "c": summary_of(dice[:2] + 0.2)}
    comparison = compare({"a": summary_of(dice), **two})
    assert comparison.baseline_means("dice").to_dict() == pytest.approx({"liver": 0.5, "spleen": 0.6})
    write_comparison_report(tmp_path / "page.html", comparison)
    cells = re.findall(r"<td>([^<]*)</td>", (tmp_path / "page.html").read_text())
    row = cells[cells.index("liver") :]
    assert row[:5] == ["liver", "2", "0.500", "0.600", "+0.100"]


def test_references_that_no_set_has_are_listed() -> None:
    one, two = (collect([CaseMetrics("c", {"x": absent_from_both()})], missing=["d"]) for _ in range(2))
    assert compare({"a": one, "b": two}).left_out == ("d",)


def test_more_tests_are_corrected_for_more(rng: np.random.Generator) -> None:
    dice = rng.uniform(0.4, 0.6, (20, 2))
    better = dice + rng.uniform(0.05, 0.1, dice.shape)
    two = compare({"a": summary_of(dice), "b": summary_of(better)}, ["dice"])
    three = compare({"a": summary_of(dice), "b": summary_of(better), "c": summary_of(better)}, ["dice"])
    assert three.rows("dice", "b")["p_holm"]["liver"] == pytest.approx(2 * two.rows("dice", "b")["p_holm"]["liver"])


def test_what_cannot_be_compared() -> None:
    dice = np.full((3, 2), 0.5)
    with pytest.raises(ConfigError, match="two sets"):
        compare({"a": summary_of(dice)})
    with pytest.raises(DatasetError, match=r"different classes \(organ 2\)"):
        compare({"a": summary_of(dice), "b": summary_of(np.full((3, 3), 0.5))})
    with pytest.raises(DatasetError, match="no case was scored in all of a, b"):
        compare({"a": summary_of(dice), "b": summary_of(dice, first=50)})
    other = collect([CaseMetrics("c00", {n: absent_from_both() for n in NAMES})], dict.fromkeys(NAMES, 1), 1.0)
    with pytest.raises(DatasetError, match="tolerances"):
        compare({"a": summary_of(dice), "b": other})


def test_files_are_strict_and_complete(rng: np.random.Generator, tmp_path: Path) -> None:
    one, two = rng.uniform(0.5, 0.9, (2, 3, 2))  # too few for intervals
    comparison = compare({"a": summary_of(one), "b": summary_of(two)})
    comparison.write(tmp_path)

    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    content = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=refuse)
    assert (content["baseline"], content["others"], content["cases"]) == ("a", ["b"], 3)
    assert content["comparisons"][0]["ci95_low"] is None
    assert content["comparisons"][0]["n"] == 3
    read = pd.read_csv(tmp_path / "comparison.csv")
    pd.testing.assert_frame_equal(read, comparison.table, check_dtype=False)


@pytest.mark.parametrize(("classes", "figures"), [(2, 1), (40, 1), (72, 2)])
def test_figures_hold_every_class_once(rng: np.random.Generator, classes: int, figures: int) -> None:
    one, two, three = (rng.uniform(0.4, 0.9, (6, classes)) for _ in range(3))
    comparison = compare({"a": summary_of(one), "b": summary_of(two), "c": summary_of(three)})
    drawn = list(difference_figures(comparison))
    assert len(drawn) == figures
    names = [label.get_text() for figure, _ in drawn for label in figure.axes[0].get_yticklabels()]
    assert sorted(names) == sorted(comparison.summaries["a"].classes)
    assert len({figure.axes[0].get_xlim() for figure, _ in drawn}) == 1


def test_filled_where_significant(rng: np.random.Generator) -> None:
    one = rng.uniform(0.4, 0.6, (30, 2))
    two = one.copy()
    two[:, 0] += 0.1 + rng.uniform(0, 0.01, 30)
    two[::2, 1] += 0.01
    two[1::2, 1] -= 0.01
    ((figure, _),) = difference_figures(compare({"a": summary_of(one), "b": summary_of(two)}))
    filled, hollow = (c for c in figure.axes[0].collections if len(c.get_offsets()) == 1 and len(c.get_facecolors()))
    assert filled.get_offsets()[0, 0] == pytest.approx((two - one)[:, 0].mean())
    assert hollow.get_facecolors()[0][:3] == pytest.approx([1, 1, 1])


def test_cases_that_differ_most(rng: np.random.Generator) -> None:
    one = np.full((5, 2), 0.5)
    two, three = one.copy(), one.copy()
    two[3] -= 0.3
    three[1] += 0.2
    found = most_different_cases(compare({"a": summary_of(one), "b": summary_of(two), "c": summary_of(three)}), 2)
    assert found.index.tolist() == ["c03", "c01"]
    assert found.loc["c03"].tolist() == pytest.approx([-0.3, 0])


@pytest.fixture
def label_folders(tmp_path: Path) -> tuple[list[Path], Path]:
    """Three sets of six cases: moved by one voxel, exact, and one organ missed in each; and the references."""
    geometry = Geometry((8, 16, 18), (3.0, 1.0, 0.7))
    for case in range(6):
        labels = np.zeros(geometry.shape, np.uint8)
        labels[2:6, 3:10, 2 : 8 + case] = 1
        labels[2:6, 10:13, 2:8] = 2
        missed = np.where(labels == 2, 0, labels).astype(np.uint8)
        for name, values in (("moved", np.roll(labels, 1, 2)), ("exact", labels), ("missed", missed), ("ref", labels)):
            write_labels(values, geometry, tmp_path / name / f"case_{case}.nii.gz")
    return [tmp_path / name for name in ("moved", "exact", "missed")], tmp_path / "ref"


def test_folders_are_scored_and_compared(label_folders: tuple[list[Path], Path], tmp_path: Path) -> None:
    folders, reference = label_folders
    comparison = evaluate_folders(folders, reference, output=tmp_path / "out")
    assert comparison.baseline == "moved"
    assert (comparison.rows("dice", "exact")["difference"] > 0).all()
    missed = comparison.rows("hd95", "missed").loc["2"]
    assert (missed["worse"], missed["n_infinite_baseline"], missed["n_infinite_other"]) == (6, 0, 6)
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    assert page.count("<img") == 2
    assert re.findall(r'href="([^"]+)"', page) == [f"{f.name}/report.html" for f in folders]
    for folder in folders:
        assert (tmp_path / "out" / folder.name / "report.html").is_file()
    assert not list(folders[0].glob("*.json"))
    evaluate_folders(folders, reference, report=ReportOptions(write=False))
    assert (folders[0] / "comparison.json").is_file()
    assert (folders[2] / "summary.json").is_file()
    assert not (folders[0] / "comparison.html").exists()
    for wrong, error in (([folders[0]], ConfigError), ([folders[0], folders[0]], ConfigError),
                         ([folders[0], tmp_path / "none"], DatasetError),
                         ([folders[0], reference / "case_0.nii.gz"], DatasetError)):  # fmt: skip
        with pytest.raises(error):
            evaluate_folders(wrong, reference)


def test_every_folder_is_looked_at_before_the_first_is_scored(label_folders: tuple[list[Path], Path]) -> None:
    folders, reference = label_folders
    (folders[2] / "case_3.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"missed.*case_3"):
        evaluate_folders(folders, reference)
    assert not list(folders[0].glob("metrics*"))


def test_values_that_one_folder_alone_has_are_classes_of_all(label_folders: tuple[list[Path], Path]) -> None:
    folders, reference = label_folders
    labels, geometry = read_labels(folders[1] / "case_0.nii.gz")
    labels[0, 0, 0] = 9
    write_labels(labels, geometry, folders[1] / "case_0.nii.gz")
    row = evaluate_folders(folders, reference).rows("dice", "exact").loc["9"]
    assert (row["n"], row["n_unpaired"]) == (0, 1)


def test_a_page_without_label_files(rng: np.random.Generator, tmp_path: Path) -> None:
    one, two = rng.uniform(0.5, 0.9, (2, 6, 2))
    write_comparison_report(tmp_path / "page.html", compare({"<a>": summary_of(one), "b": summary_of(two)}))
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 1
    assert "&lt;a&gt;" in page


def test_names_of_folders() -> None:
    assert distinct_names([Path("x/one"), Path("y/two")]) == ["one", "two"]
    folders = [Path(f"results/{model}/fold_0/validation") for model in ("a", "b")]
    assert distinct_names(folders) == ["a/fold_0/validation", "b/fold_0/validation"]


def test_results_of_folders_whose_names_run_together(label_folders: tuple[list[Path], Path], tmp_path: Path) -> None:
    folders, reference = label_folders
    one, two = tmp_path / "a" / "b_c" / "d", tmp_path / "a_b" / "c" / "d"
    for source, target in zip(folders, (one, two), strict=False):
        target.parent.mkdir(parents=True)
        source.rename(target)
    evaluate_folders([one, two], reference, output=tmp_path / "out", report=ReportOptions(write=False))
    assert len(list((tmp_path / "out").glob("*/summary.json"))) == 2


def test_p_text() -> None:
    assert [p_text(value) for value in (NAN, 0.0004, 0.0423, 1.0)] == ["-", "< 0.001", "0.042", "1.000"]
