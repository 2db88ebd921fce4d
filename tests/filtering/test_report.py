"""The filter's report."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ukbob_seg.dataset.spec import Case
from ukbob_seg.filtering.agreement import agreement, rule_flags
from ukbob_seg.filtering.bounds import CohortBounds, learn_bounds
from ukbob_seg.filtering.cohort import solf_filter
from ukbob_seg.filtering.config import FilterConfig
from ukbob_seg.filtering.policies import FilterPolicy
from ukbob_seg.filtering.report import ordinary_labels, worst_labels
from ukbob_seg.filtering.report_figures import (
    Specimen,
    distribution_figures,
    gallery_figure,
    organ_share_figure,
    scan_count_figure,
)
from ukbob_seg.filtering.solf import flag_organs
from ukbob_seg.filtering.strata import StratifiedBounds


def many_organs(rng: np.random.Generator, organs: int, cases: int = 30) -> pd.DataFrame:
    rows = [
        (f"case_{case}", label, f"organ {label}", *rng.uniform(0.2, 0.8, 3), rng.uniform(1e3, 1e5))
        for case in range(cases)
        for label in range(1, organs + 1)
    ]
    columns = ["case", "label", "organ", "normalized_volume", "sphericity", "eccentricity", "volume_mm3"]
    return pd.DataFrame(rows, columns=columns).assign(stratum="")


def whole(bounds: CohortBounds) -> StratifiedBounds:
    return StratifiedBounds((), {"": bounds})


def text_of(page: str) -> str:
    return re.sub(r"<[^>]+>", " ", re.sub(r"<img[^>]*>|<style>.*?</style>", " ", page, flags=re.DOTALL))


def test_page_is_self_contained_and_tells_what_was_found(cohort: Path, tmp_path: Path) -> None:
    config = FilterConfig(workers=1, quiet=True, policy=FilterPolicy("ignore", 0))
    summary = solf_filter(cohort, tmp_path, config)
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 5  # flagged, ordinary, flags per scan, per organ, distributions
    text = text_of(page)
    assert "Dataset007_Blobs" in text
    assert "percentiles 1 and 99" in text
    assert f"{summary.flagged} ({100 * summary.flagged / 48:.2f} %)" in text
    assert "more than 0 flagged organs are dropped" in text
    for word in ("blob_005", "second", "first", "volume, %"):
        assert word in text
    faulty = re.search(r"<tr><td>blob_005</td><td>second</td><td>[23]</td>(.*?)</tr>", page)
    assert faulty is not None
    assert "&lt;" in faulty[1]  # below a lower bound


def test_page_without_flags_and_with_unjudged_organs(cohort: Path, tmp_path: Path) -> None:
    solf_filter(cohort, tmp_path, FilterConfig(workers=1, quiet=True, min_samples=30))
    page = (tmp_path / "report.html").read_text()
    assert "No label was flagged." in page
    assert "fewer than 30 values were there to learn bounds from: first, second." in text_of(page)
    assert page.count("data:image/png;base64,") == 4


@pytest.mark.parametrize(
    ("rule", "sentence", "column"),
    [
        ("volume", "its normalized volume lies outside", "sphericity"),
        ("iqr", "1.5 interquartile ranges", "volume (mm³)"),
        ("joint", "together are as unusual", "doubt"),
        ("none", "No label is flagged", "sphericity"),
    ],
)
def test_page_of_other_rules(cohort: Path, tmp_path: Path, rule: str, sentence: str, column: str) -> None:
    solf_filter(cohort, tmp_path, FilterConfig(workers=1, quiet=True, rule=rule, body="union"))
    text = text_of((tmp_path / "report.html").read_text())
    assert sentence in text
    assert column in text
    assert "union of all labels" in text


def test_worst_labels_come_in_order_of_their_excess(rng: np.random.Generator) -> None:
    table = many_organs(rng, 2)
    table.loc[[8, 20, 30], ["normalized_volume", "sphericity"]] = [[5, 5], [50, 50], [-7, -7]]
    table.loc[40, "normalized_volume"] = 1e6  # one feature alone is no flag
    bounds = learn_bounds(table, 20.0)
    worst = worst_labels(flag_organs(table, bounds=bounds), whole(bounds), "solf")
    assert worst.index[:3].tolist() == [20, 30, 8]
    assert worst["flagged"].all()
    assert (np.diff(worst["severity"]) <= 0).all()
    assert worst_labels(flag_organs(table, rule="none", bounds=bounds), whole(bounds), "none").empty
    by_doubt = worst_labels(flag_organs(table, rule="joint", bounds=bounds), whole(bounds), "joint")
    assert by_doubt.index[0] == 40
    assert (by_doubt["severity"] == by_doubt["doubt"]).all()


def test_ordinary_labels_are_the_least_doubtful_kept_ones(rng: np.random.Generator) -> None:
    table = many_organs(rng, 3)
    flags = flag_organs(table, 20.0, bounds=learn_bounds(table, 20.0))
    flags.loc[flags["label"] == 2, "flagged"] = True
    rows = ordinary_labels(flags, [3, 2, 1])
    assert rows["label"].tolist() == [3, 1]
    for row in rows.itertuples():
        kept = flags[(flags["label"] == row.label) & ~flags["flagged"]]
        assert row.doubt == kept["doubt"].min()


def test_agreement_counts_labels_flagged_by_both(rng: np.random.Generator) -> None:
    table = many_organs(rng, 3, 60)
    flags = flag_organs(table, 30.0, bounds=learn_bounds(table, 30.0, confidence=0.7))
    decisions = rule_flags(flags)
    assert set(decisions) == {"solf", "volume", "iqr", "joint"}
    assert (decisions["solf"] == flags["flagged"]).all()
    counts = agreement(decisions)
    for one in decisions:
        for other in decisions:
            both = [a and b for a, b in zip(decisions[one], decisions[other], strict=True)]
            assert counts.loc[one, other] == sum(both)
    assert counts.loc["solf", "joint"] > 0


def test_organ_shares_are_drawn_for_every_organ() -> None:
    shares = {f"organ {k}": float(k) for k in range(72)}
    figure = organ_share_figure(shares)
    assert [bar.get_height() for bar in figure.axes[0].patches] == list(shares.values())
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == list(shares)


def test_page_of_strata_review_and_evidence(cohort: Path, tmp_path: Path) -> None:
    names = [f"blob_{k:03d}" for k in range(24)]
    pd.DataFrame({"case": names, "sex": ["F", "M"] * 12}).to_csv(tmp_path / "people.csv", index=False)
    verdicts = tmp_path / "verdicts.csv"
    verdicts.write_text("case,label,verdict\nblob_001,1,reject\n")
    config = FilterConfig(
        workers=1,
        quiet=True,
        rule="joint",
        min_samples=8,
        evidence=True,
        review=True,
        review_file=verdicts,
        strata_file=tmp_path / "people.csv",
        strata_columns=("sex",),
    )
    solf_filter(cohort, tmp_path / "solf", config)
    text = text_of((tmp_path / "solf" / "report.html").read_text())
    assert "separately for each sex" in text
    assert "as unusual as one ordinary label in 1,000" in text
    assert "1 labels were decided by a reviewer" in text
    assert "blob_001" in text


@pytest.mark.parametrize(("organs", "pages"), [(2, 1), (13, 2), (72, 6)])
def test_every_organ_has_its_row_of_distributions(rng: np.random.Generator, organs: int, pages: int) -> None:
    table = many_organs(rng, organs, 5 if organs > 20 else 30)
    bounds = learn_bounds(table, min_samples=2)
    figures = [
        f for f, _ in distribution_figures(flag_organs(table, bounds=bounds), whole(bounds), {"sphericity": "S"})
    ]
    assert len(figures) == pages
    names = [axis.get_ylabel() for figure in figures for axis in figure.axes]
    assert names == [f"organ {k}" for k in range(1, organs + 1)]


def test_distribution_shows_bounds_kept_and_flagged(rng: np.random.Generator) -> None:
    table = many_organs(rng, 1, 100)
    table.loc[3, ["normalized_volume", "sphericity"]] = 1.0
    table.loc[4, ["normalized_volume", "sphericity"]] = -90.0
    table.loc[5, "sphericity"] = np.nan
    bounds = learn_bounds(table, 10.0)
    flags = flag_organs(table, bounds=bounds)
    ((figure, _),) = distribution_figures(flags, whole(bounds), {"sphericity": "S"})
    axis = figure.axes[0]
    lines = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert sorted(line.get_xdata()[0] for line in lines) == list(bounds.limits(1, "sphericity"))
    kept = flags.loc[~flags["flagged"], "sphericity"].dropna()
    assert axis.patches[0].get_data().values.sum() == kept.between(*axis.get_xlim()).sum()
    low, high = axis.get_xlim()
    assert low > -90  # a far value must not squeeze the others together
    assert high > 1.0  # a flagged value near the bounds keeps its place
    assert [line.get_marker() for line in axis.lines if line.get_marker() != "None"] == ["<"]


def test_distribution_of_constant_and_missing_values() -> None:
    table = pd.DataFrame({"case": list("abc"), "label": 1, "organ": "x", "volume_mm3": 3.0, "stratum": ""})
    table = table.assign(normalized_volume=0.1, sphericity=np.nan, eccentricity=[0.1, 0.2, np.nan])
    bounds = learn_bounds(table, min_samples=1)
    headings = {"normalized_volume": "v", "sphericity": "s", "eccentricity": "e", "volume_mm3": "V"}
    ((figure, _),) = distribution_figures(flag_organs(table, bounds=bounds), whole(bounds), headings)
    figure.canvas.draw()
    assert [text.get_text() for text in figure.axes[1].texts] == ["no values"]


@pytest.mark.parametrize("counts", [[0, 0], [0, 1, 1, 5], [30] * 3])
def test_scan_counts(counts: list[int]) -> None:
    axis = scan_count_figure(np.array(counts)).axes[0]
    heights = [int(bar.get_height()) for bar in axis.patches]
    assert heights == np.bincount(counts).tolist()


def test_gallery_shows_the_slice_with_most_of_the_organ(cohort: Path) -> None:
    case = Case("blob_000", (cohort / "imagesTr" / "blob_000_0000.nii.gz",), cohort / "labelsTr" / "blob_000.nii.gz")
    figure = gallery_figure([Specimen(case, 1, "first", "volume low")] * 5)
    assert len(figure.axes) == 8
    assert sum(axis.axison for axis in figure.axes) == 5
    axis = figure.axes[0]
    assert axis.get_title() == "blob_000\nfirst"
    assert axis.get_xlabel() == "volume low"
    assert len(axis.collections) == 2  # the organ and the other organs
    figure.canvas.draw()
