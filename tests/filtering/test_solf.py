"""Bounds and decision rules against a loop over organs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ukbob_seg.errors import ConfigError
from ukbob_seg.filtering.bounds import CohortBounds, OrganBounds, doubts, excess, learn_bounds, outside
from ukbob_seg.filtering.solf import RULES, flag_organs, unjudged_labels

FEATURES = ["normalized_volume", "sphericity", "eccentricity"]


@pytest.fixture
def cohort(rng: np.random.Generator) -> pd.DataFrame:
    """120 cases with three organs of their own sizes and shapes, in random order; organ 9 is often absent."""
    rows = []
    for case in range(120):
        for label, size in ((2, 0.01), (5, 0.2), (9, 0.003)):
            if label == 9 and case % 3:
                continue
            volume = size * rng.lognormal(0, 0.3)
            rows.append((f"case_{case:03d}", label, volume, rng.normal(0.5, 0.05), rng.beta(9, 2), volume * 1e5))
    table = pd.DataFrame(rows, columns=["case", "label", *FEATURES, "volume_mm3"])
    return table.sample(frac=1, random_state=7)


def brute_force_outside(table: pd.DataFrame, feature: str, epsilon: float) -> np.ndarray:
    result = []
    for label, value in zip(table["label"], table[feature], strict=True):
        values = np.sort([v for k, v in zip(table["label"], table[feature], strict=True) if k == label and v == v])
        position = np.arange(len(values)) / (len(values) - 1) * 100
        low, high = np.interp([epsilon / 2, 100 - epsilon / 2], position, values)
        result.append(bool(value < low - 1e-12 or value > high + 1e-12))
    return np.asarray(result)


@pytest.mark.parametrize("epsilon", [0.0, 2.0, 5.0, 30.0])
def test_votes_and_flags_match_a_loop_over_organs(cohort: pd.DataFrame, epsilon: float) -> None:
    expected = {feature: brute_force_outside(cohort, feature, epsilon) for feature in FEATURES}
    flags = flag_organs(cohort, epsilon)
    for feature in FEATURES:
        assert (flags[f"{feature}_outside"] == expected[feature]).all()
    votes = sum(values.astype(int) for values in expected.values())
    assert (flags["votes"] == votes).all()
    assert (flags["flagged"] == (votes >= 2)).all()
    assert (flag_organs(cohort, epsilon, "volume")["flagged"] == expected["normalized_volume"]).all()
    assert epsilon == 0 or expected["sphericity"].any()
    assert epsilon < 30 or (votes >= 2).any()


def test_iqr_rule_uses_tukeys_fences_on_plain_volumes(cohort: pd.DataFrame) -> None:
    cohort.iloc[[3, 50], cohort.columns.get_loc("volume_mm3")] = [1e9, 1e-9]
    flags = flag_organs(cohort, rule="iqr")
    for label, rows in cohort.groupby("label"):
        first, third = rows["volume_mm3"].quantile([0.25, 0.75])
        reach = 1.5 * (third - first)
        expected = (rows["volume_mm3"] < first - reach) | (rows["volume_mm3"] > third + reach)
        assert (flags.loc[rows.index, "flagged"] == expected).all(), label
    assert flags["flagged"].iloc[3]
    wide = flag_organs(cohort, epsilon=40, rule="iqr")
    assert (wide["flagged"] == flags["flagged"]).all()  # fences do not depend on epsilon


def test_rule_none_flags_nothing_but_counts_votes(cohort: pd.DataFrame) -> None:
    flags = flag_organs(cohort, epsilon=30, rule="none")
    assert not flags["flagged"].any()
    assert (flags["votes"] == flag_organs(cohort, epsilon=30)["votes"]).all()
    assert flags["votes"].max() >= 2


def test_rows_order_index_and_input_are_kept(cohort: pd.DataFrame) -> None:
    before = cohort.copy()
    flags = flag_organs(cohort, 10.0)
    pd.testing.assert_frame_equal(cohort, before)
    pd.testing.assert_frame_equal(flags[cohort.columns], cohort)
    assert flags["flagged"].dtype == bool
    shuffled = flag_organs(cohort.sample(frac=1, random_state=1), 10.0)
    pd.testing.assert_frame_equal(shuffled.loc[cohort.index], flags)
    # What was flagged before does not disturb a second time.
    pd.testing.assert_frame_equal(flag_organs(flags, 10.0), flags)


def test_one_organ_does_not_influence_another(cohort: pd.DataFrame) -> None:
    alone = flag_organs(cohort[cohort["label"] == 2], 10.0)
    together = flag_organs(cohort, 10.0)
    pd.testing.assert_frame_equal(alone, together[together["label"] == 2])


def test_two_features_are_needed(cohort: pd.DataFrame) -> None:
    """One extreme feature is taken as anatomy, two as a wrong label."""
    case = cohort.index[cohort["label"] == 5][:3]
    cohort.loc[case, FEATURES] = [0.2, 0.5, 0.85]
    cohort.loc[case[0], "normalized_volume"] = 50
    cohort.loc[case[1], ["normalized_volume", "sphericity"]] = [40, 0.01]
    flags = flag_organs(cohort)
    assert flags.loc[case, "flagged"].tolist() == [False, True, False]
    assert flags.loc[case, "votes"].tolist() == [1, 2, 0]
    assert flag_organs(cohort, rule="volume").loc[case, "flagged"].tolist() == [True, True, False]


def test_nan_features_are_never_outside_and_do_not_spoil_the_bounds(cohort: pd.DataFrame) -> None:
    clean = learn_bounds(cohort, 10.0)
    extra = cohort.iloc[:2].assign(eccentricity=[np.nan, np.inf], label=5, sphericity=-1.0, normalized_volume=0.2)
    both = pd.concat([cohort, extra], ignore_index=True)
    flags = flag_organs(both, 10.0)
    assert not flags["eccentricity_outside"].iloc[-2:].any()
    assert flags["sphericity_outside"].iloc[-2:].all()
    assert learn_bounds(both, 10.0).limits(5, "eccentricity") == clean.limits(5, "eccentricity")


def test_organs_with_too_few_samples_are_unflagged_and_listed(cohort: pd.DataFrame) -> None:
    bounds = learn_bounds(cohort, 30.0, min_samples=41)  # organ 9 has 40
    flags = flag_organs(cohort, bounds=bounds)
    assert unjudged_labels(cohort, bounds, "solf") == [9]
    assert unjudged_labels(cohort, bounds, "none") == []
    assert (flags.loc[flags["label"] == 9, "votes"] == 0).all()
    assert flags["flagged"].any()
    alone = flag_organs(cohort, 30.0, min_samples=41)
    pd.testing.assert_frame_equal(flags[alone.columns], alone)
    assert unjudged_labels(cohort, learn_bounds(cohort, min_samples=40), "solf") == []


def test_a_feature_with_too_few_values_gets_no_limits(cohort: pd.DataFrame) -> None:
    cohort.loc[cohort["label"] == 9, "eccentricity"] = np.nan
    bounds = learn_bounds(cohort)
    assert np.isnan(bounds.limits(9, "eccentricity")).all()
    assert np.isfinite(bounds.limits(9, "sphericity")).all()
    assert unjudged_labels(cohort, bounds, "solf") == [9]
    assert unjudged_labels(cohort, bounds, "volume") == []


def test_bounds_of_one_cohort_judge_single_new_scans(cohort: pd.DataFrame) -> None:
    bounds = learn_bounds(cohort)
    new = pd.DataFrame(
        {
            "case": "new",
            "label": [2, 5, 77],
            "normalized_volume": [5.0, 0.2, 1e9],
            "sphericity": [0.01, 0.5, 1e9],
            "eccentricity": [0.85, 0.85, 1e9],
        }
    )
    flags = flag_organs(new, epsilon=99, bounds=bounds)
    assert flags["flagged"].tolist() == [True, False, False]
    assert unjudged_labels(new, bounds, "solf") == [77]


def test_excess_is_measured_in_widths_of_the_bounds() -> None:
    bounds = CohortBounds(
        2.0, 1, {1: OrganBounds(9, {"sphericity": (2.0, 4.0)}), 2: OrganBounds(9, {"sphericity": (3.0, 3.0)})}
    )
    table = pd.DataFrame({"label": [1, 1, 1, 1, 2, 2, 3], "sphericity": [1.0, 3.0, 8.0, np.nan, 3.0, 3.1, 5.0]})
    assert excess(table, "sphericity", bounds).tolist() == [0.5, 0, 2, 0, 0, np.inf, 0]
    assert outside(table, "sphericity", bounds).tolist() == [True, False, True, False, False, True, False]


def test_rule_joint_flags_improbable_combinations(cohort: pd.DataFrame) -> None:
    """A label that is ordinary in every feature and yet impossible: a large organ of a small one's shape."""
    rng = np.random.default_rng(5)
    size = rng.normal(0, 0.3, 400)
    table = pd.DataFrame(
        {
            "case": [f"case_{k}" for k in range(400)],
            "label": 1,
            "normalized_volume": 0.01 * np.exp(size),
            "sphericity": 0.5 * np.exp(-0.4 * size + rng.normal(0, 0.02, 400)),
            "eccentricity": np.sqrt(1 - np.exp(-(1 + rng.normal(0, 0.1, 400)))),
        }
    )
    table.loc[7, ["normalized_volume", "sphericity"]] = [0.014, 0.55]
    flags = flag_organs(table, rule="joint", confidence=0.9999)
    assert flags["votes"].iloc[7] == 0
    assert flags["flagged"].iloc[7]
    assert flags["flagged"].sum() <= 3
    assert (flags["flagged"] == (flags["doubt"] > 4)).all()
    bounds = learn_bounds(table)
    assert (flags["doubt"] == doubts(table, bounds, "joint")).all()
    assert "doubt" not in flag_organs(cohort).columns
    few = learn_bounds(cohort, min_samples=41)
    assert unjudged_labels(cohort, few, "joint") == [9]
    assert np.isnan(doubts(cohort, few, "joint")[cohort["label"] == 9]).all()


def test_empty_table() -> None:
    flags = flag_organs(pd.DataFrame({name: [] for name in ("case", "label", *FEATURES)}))
    assert flags.empty
    assert {"votes", "flagged"} <= set(flags.columns)


def test_wrong_options_are_refused(cohort: pd.DataFrame) -> None:
    with pytest.raises(ConfigError, match="solf, volume, iqr, joint, anatomy, none"):
        flag_organs(cohort, rule="magic")
    for epsilon in (-1, 100, float("nan")):
        with pytest.raises(ConfigError, match="epsilon"):
            flag_organs(cohort, epsilon)
    with pytest.raises(ConfigError, match="min_samples"):
        learn_bounds(cohort, min_samples=0)
    with pytest.raises(ConfigError, match="lacks volume_mm3"):
        flag_organs(cohort.drop(columns="volume_mm3"), rule="iqr")
    with pytest.raises(ConfigError, match="needs the columns of organ_evidence"):
        flag_organs(cohort, rule="anatomy")
    with pytest.raises(ConfigError, match="lacks sphericity"):
        flag_organs(cohort.drop(columns="sphericity"), rule="none")
    with pytest.raises(ConfigError, match="confidence"):
        flag_organs(cohort, rule="joint", confidence=1.0)
    assert set(RULES) == {"solf", "volume", "iqr", "joint", "anatomy", "none"}
