"""Size, axes and place beside the other organs of a scan."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ukbob_seg.filtering.anatomy import ANATOMY_COLUMNS, Typical, anatomy_vectors, learn_typical
from ukbob_seg.filtering.bounds import learn_bounds
from ukbob_seg.filtering.solf import flag_organs
from ukbob_seg.filtering.strata import StratifiedBounds, learn_strata

ORGANS = 6


@pytest.fixture
def cohort(rng: np.random.Generator) -> pd.DataFrame:
    """300 patients of different sizes, lying at different places in the scanner."""
    places = rng.normal(0, 100, (ORGANS, 3))
    rows = []
    for case in range(300):
        length, shift = float(np.exp(rng.normal(0, 0.1))), rng.normal(0, 30, 3)
        for label in range(1, ORGANS + 1):
            volume = 1e4 * label * length**3 * rng.lognormal(0, 0.05)
            axes = np.array([30, 20, 10]) * np.cbrt(volume / 1e4) * rng.lognormal(0, 0.02, 3)
            place = places[label - 1] * length + shift + rng.normal(0, 2, 3)
            rows.append((f"case_{case:03d}", label, volume, rng.normal(0.5, 0.01), 0.9, volume / 1e7, *axes, *place))
    columns = ["case", "label", "volume_mm3", "sphericity", "eccentricity", "normalized_volume", *ANATOMY_COLUMNS[2:]]
    return pd.DataFrame(rows, columns=columns)


def test_vectors_do_not_depend_on_the_patients_size_and_place(cohort: pd.DataFrame) -> None:
    typical = learn_typical(cohort)
    vectors = anatomy_vectors(cohort, typical)
    centre = np.mean([entry.position for entry in typical.values()], axis=0)
    changed = cohort.copy()
    for name, middle in zip(ANATOMY_COLUMNS[5:], centre, strict=True):
        changed[name] = (changed[name] - middle) * 1.2 + middle + 55
    for name in ANATOMY_COLUMNS[2:5]:
        changed[name] *= 1.2
    changed["volume_mm3"] *= 1.2**3
    assert anatomy_vectors(changed, typical)[:, :5] == pytest.approx(vectors[:, :5])
    assert anatomy_vectors(changed, typical)[:, 5:] == pytest.approx(vectors[:, 5:] * 1.2, abs=1e-6)
    spread = vectors[cohort["label"] == 3].std(axis=0)
    assert spread[0] < 0.08  # 0.3 without the correction
    assert (spread[5:] < 5).all()  # 30 without


def test_vectors_of_a_scan_match_a_loop(cohort: pd.DataFrame) -> None:
    typical = learn_typical(cohort)
    assert typical[2].log_volume == pytest.approx(np.median(np.log(cohort.loc[cohort["label"] == 2, "volume_mm3"])))
    scan = cohort[cohort["case"] == "case_007"]
    size = np.median([np.log(row.volume_mm3) - typical[row.label].log_volume for row in scan.itertuples()])
    centre = np.mean([typical[label].position for label in range(1, ORGANS + 1)], axis=0)
    places = scan[list(ANATOMY_COLUMNS[5:])].to_numpy()
    offsets = np.array(
        [
            place - ((np.array(typical[label].position) - centre) * np.exp(size / 3) + centre)
            for place, label in zip(places, scan["label"], strict=True)
        ]
    )
    expected = np.column_stack(
        [
            np.log(scan["volume_mm3"]) - size,
            np.log(scan["sphericity"]),
            np.log(scan[list(ANATOMY_COLUMNS[2:5])]) - size / 3,
            offsets - np.median(offsets, axis=0),
        ]
    )
    assert anatomy_vectors(scan, typical) == pytest.approx(expected)
    rows = (cohort["case"] == "case_007").to_numpy()
    assert anatomy_vectors(cohort, typical)[rows] == pytest.approx(expected)


def test_few_organs_are_not_compared_with_each_other(cohort: pd.DataFrame) -> None:
    typical = learn_typical(cohort)
    scan = cohort[(cohort["case"] == "case_007") & (cohort["label"] <= 3)]
    vectors = anatomy_vectors(scan, typical)
    assert vectors[:, 0] == pytest.approx(np.log(scan["volume_mm3"]))
    assert np.isnan(vectors[:, 5:]).all()
    unknown = anatomy_vectors(cohort.assign(label=99), typical)
    assert np.isnan(unknown).all()
    assert np.isnan(anatomy_vectors(cohort, {})).all()
    assert Typical.from_json(typical[1].as_json()) == typical[1]


def test_wrong_place_size_and_shape_are_flagged(cohort: pd.DataFrame, tmp_path: object) -> None:
    cohort.loc[13, "left_mm"] += 40
    cohort.loc[100, "volume_mm3"] *= 1.5
    cohort.loc[200, "axis1_mm"] *= 1.3
    flags = flag_organs(cohort, rule="anatomy", confidence=0.9999)
    assert flags.loc[[13, 100, 200], "flagged"].all()
    assert flags["flagged"].sum() <= 6
    joint = flag_organs(cohort, rule="joint", confidence=0.9999)
    assert not joint.loc[[13, 200], "flagged"].any()

    bounds = learn_strata(cohort.assign(stratum=""), (), learn_bounds)
    path = tmp_path / "bounds.json"  # type: ignore[operator]
    bounds.save(path)
    again = StratifiedBounds.load(path)
    assert again == bounds
    scan = cohort[cohort["case"] == cohort.loc[13, "case"]]  # one new scan at a time
    alone = flag_organs(scan, rule="anatomy", bounds=again.any)
    assert alone["anatomy_doubt"].tolist() == pytest.approx(flags.loc[scan.index, "anatomy_doubt"].tolist())
