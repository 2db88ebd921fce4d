"""Bootstrap intervals against a plain loop over draws, and against scipy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ukbob_seg.evaluation import intervals
from ukbob_seg.evaluation.intervals import bootstrap_intervals, percentile_interval, resampled_means


def test_means_are_those_of_the_cases_drawn(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    values = rng.uniform(0, 1, (7, 3))
    values[2, 1] = np.nan
    values[4, 1] = np.inf
    values[1:, 2] = np.nan
    found = resampled_means(values, replicates=50, seed=3)
    drawn = np.random.default_rng(3).integers(0, 7, (50, 7))
    for replicate, cases in enumerate(drawn):
        for column in range(3):
            kept = values[cases, column]
            kept = kept[np.isfinite(kept)]
            expected = kept.mean() if len(kept) else np.nan
            assert found[replicate, column] == pytest.approx(expected, nan_ok=True)
    assert np.isnan(found[:, 2]).any()
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 20)  # in pieces
    np.testing.assert_array_equal(resampled_means(values, replicates=50, seed=3), found)


def test_percentiles_are_numpys(rng: np.random.Generator) -> None:
    means = rng.normal(size=(101, 4))
    means[:40, 1] = np.nan
    means[:, 2] = np.nan
    means[1:, 3] = np.nan
    found = percentile_interval(means)
    for column in (0, 1, 3):
        kept = means[np.isfinite(means[:, column]), column]
        assert found[column] == pytest.approx(np.percentile(kept, (2.5, 97.5)))
    assert np.isnan(found[2]).all()


def test_agrees_with_scipy_and_covers_the_mean(rng: np.random.Generator) -> None:
    values = rng.beta(8, 2, 60)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    ours = bootstrap_intervals({"dice": pd.DataFrame({"x": values})}, replicates=4000)
    width = theirs.high - theirs.low
    low, high = ours.classes["dice"].loc["x"]
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.05 * width)
    assert ours.overall["dice"] == pytest.approx((low, high))


def test_few_values_have_no_interval(rng: np.random.Generator) -> None:
    table = pd.DataFrame({"often": rng.uniform(size=8), "rare": [0.1, 0.2, 0.3, 0.4, *[np.nan] * 4]})
    found = bootstrap_intervals({"dice": table})
    assert found.classes["dice"].notna().all(axis=1).to_dict() == {"often": True, "rare": False}
    assert np.isfinite(found.overall["dice"]).all()
    nothing = bootstrap_intervals({"dice": table[["rare"]]})
    assert np.isnan(nothing.overall["dice"]).all()
    rare = pd.DataFrame(np.where(np.eye(6) > 0, 0.5, np.nan))  # six cases of one class each
    several = bootstrap_intervals({"dice": rare})
    assert several.classes["dice"].isna().all(axis=None)
    assert several.overall["dice"] == (0.5, 0.5)


def test_organs_of_one_case_are_drawn_together(rng: np.random.Generator) -> None:
    """Equal columns scatter as one; independent ones scatter less in their mean."""
    one = rng.uniform(size=40)
    same = bootstrap_intervals({"dice": pd.DataFrame({"a": one, "b": one, "c": one})}).overall["dice"]
    alone = bootstrap_intervals({"dice": pd.DataFrame({"a": one})}).overall["dice"]
    assert same == pytest.approx(alone)
    other = pd.DataFrame({"a": one, "b": rng.permutation(one), "c": rng.permutation(one)})
    mixed = bootstrap_intervals({"dice": other}).overall["dice"]
    assert mixed[1] - mixed[0] < 0.85 * (same[1] - same[0])
