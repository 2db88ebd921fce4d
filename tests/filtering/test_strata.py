"""Bounds by kind of subject, and their file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.filtering.bounds import learn_bounds
from ukbob_seg.filtering.cohort import flag_cohort
from ukbob_seg.filtering.solf import flag_organs
from ukbob_seg.filtering.strata import StratifiedBounds, learn_strata, read_strata


@pytest.fixture
def table(rng: np.random.Generator) -> pd.DataFrame:
    """Men's organs are twice as large; one woman has a man's organ of a man's shape."""
    rows = []
    for k in range(200):
        man = k % 2
        size, round_ = (0.02, 0.45) if man or k == 40 else (0.01, 0.55)
        rows.append(
            (
                f"case_{k}",
                3,
                size * rng.lognormal(0, 0.08),
                round_ + rng.normal(0, 0.01),
                rng.uniform(0.6, 0.7),
                "FM"[man],
            )
        )
    columns = ["case", "label", "normalized_volume", "sphericity", "eccentricity", "stratum"]
    return pd.DataFrame(rows, columns=columns).sample(frac=1, random_state=1)


def test_each_stratum_has_its_own_bounds(table: pd.DataFrame) -> None:
    bounds = learn_strata(table, ("sex",), learn_bounds)
    assert list(bounds.strata) == ["F", "M"]
    flags = flag_cohort(table, bounds, "solf")
    assert flags.index.tolist() == table.index.tolist()
    for stratum, rows in table.groupby("stratum"):
        alone = flag_organs(rows, bounds=bounds.strata[str(stratum)])
        pd.testing.assert_frame_equal(flags.loc[rows.index], alone)
    assert flags.loc[40, "flagged"]
    assert not flag_organs(table.drop(columns="stratum")).loc[40, "flagged"]
    with pytest.raises(ConfigError, match="no stratum 'X'"):
        flag_cohort(table.assign(stratum="X"), bounds, "solf")


@pytest.mark.parametrize("columns", [("sex",), ()])
def test_bounds_survive_their_file_exactly(table: pd.DataFrame, columns: tuple[str, ...], tmp_path: Path) -> None:
    divided = table if columns else table.assign(stratum="")
    bounds = learn_strata(divided, columns, lambda rows: learn_bounds(rows, 3.0, 25, {3: "liver"}, 0.9999))
    bounds.save(tmp_path / "bounds.json")
    again = StratifiedBounds.load(tmp_path / "bounds.json")
    assert again == bounds
    assert again.any.organs[3].name == "liver"
    assert again.any.organs[3].joint is not None
    assert again.any.confidence == 0.9999


def test_other_files_are_no_bounds(tmp_path: Path) -> None:
    for text in ('{"epsilon": 2}', '{"strata": {}}', "[]", '{"columns": ["sex"], "strata": {"F": {}}}'):
        (tmp_path / "bounds.json").write_text(text)
        with pytest.raises(DatasetError, match="not a bounds file"):
            StratifiedBounds.load(tmp_path / "bounds.json")
    with pytest.raises(DatasetError, match="does not exist"):
        StratifiedBounds.load(tmp_path / "other.json")


def test_strata_are_read_from_a_table_of_subjects(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text(
        "\ufeffcase,sex,band,weight\na,F,45-54,\nb, M,55-64,80\nc,F,55-64,70\nunknown,,,\n", encoding="utf-8"
    )
    assert read_strata(path, ["sex"], ["a", "b", "c"]) == {"a": "F", "b": "M", "c": "F"}
    assert read_strata(path, ["sex", "band"], ["b", "c"]) == {"b": "M, 55-64", "c": "F, 55-64"}
    path.write_text(path.read_text(encoding="utf-8").replace(",", ";"), encoding="utf-8")
    assert read_strata(path, ["sex", "band"], ["b", "c"]) == {"b": "M, 55-64", "c": "F, 55-64"}
    for columns, cases, message in (
        (["height"], ["a"], "no column height; it has case, sex, band, weight"),
        (["sex"], ["a", "z"], "no sex for 1 of 2 cases: z"),
        (["sex", "weight"], ["a", "b"], "no sex and weight for 1 of 2 cases: a"),
    ):
        with pytest.raises(DatasetError, match=message):
            read_strata(path, columns, cases)
    path.write_text("case,sex\na,F\na,M\n")
    with pytest.raises(DatasetError, match=r"two things about case a: sex 'F' in line 2 and 'M' in line 3"):
        read_strata(path, ["sex"], ["a"])
    path.write_text("case,age\n" + "".join(f"c{k},{k}\n" for k in range(60)))
    with pytest.raises(ConfigError, match=r"60 strata.*give bands"):
        read_strata(path, ["age"], [f"c{k}" for k in range(60)])
    with pytest.raises(DatasetError, match="does not exist"):
        read_strata(tmp_path / "other.csv", ["sex"], ["a"])
