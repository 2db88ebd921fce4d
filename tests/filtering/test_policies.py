"""What flags do to the labels that training sees."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.filtering.policies import FilterPolicy, LabelTrust, case_lookup, mark_started

SCHEME = LabelScheme.from_json({"background": 0, "liver": 5, "spleen": 2, "aorta": 130}, None)
FLAGS = pd.DataFrame(
    {
        "case": ["a", "a", "a", "b", "b", "c"],
        "label": [130, 5, 2, 2, 5, 5],
        "flagged": [True, False, True, False, True, False],
    }
)


def save(folder: Path, policy: FilterPolicy) -> None:
    folder.mkdir()
    FLAGS.to_parquet(folder / "flags.parquet", index=False)
    policy.save(folder / "policy.json")


def test_load_reads_what_was_decided(tmp_path: Path) -> None:
    save(tmp_path / "solf", FilterPolicy("background", 1))
    trust = LabelTrust.load(tmp_path / "solf")
    assert trust is not None
    assert trust.flagged_values("a") == (2, 130)
    assert trust.flagged_values("b") == (5,)
    assert trust.flagged_values("c") == ()
    assert trust.flagged_values("never seen") == ()
    assert trust.dropped_cases == {"a"}
    assert trust.action == "background"
    summary = trust.summary()
    assert "3 of 6 organ labels flagged in 2 of 3 scans" in summary
    assert "1 scans dropped" in summary
    assert pickle.loads(pickle.dumps(trust)) == trust


@pytest.mark.parametrize(("limit", "dropped"), [(None, set()), (0, {"a", "b"}), (1, {"a"}), (2, set())])
def test_scans_are_dropped_above_the_limit(limit: int | None, dropped: set[str]) -> None:
    assert LabelTrust.from_flags(FLAGS, FilterPolicy("ignore", limit)).dropped_cases == dropped


def test_no_filter_means_none_and_half_a_filter_is_an_error(tmp_path: Path) -> None:
    assert LabelTrust.load(tmp_path / "absent") is None
    folder = tmp_path / "solf"
    folder.mkdir()
    assert LabelTrust.load(folder) is None
    (folder / "shards").mkdir()
    (folder / "ablation.csv").touch()  # ukbob_filter --ablate decides nothing
    assert LabelTrust.load(folder) is None
    mark_started(folder)
    with pytest.raises(DatasetError, match="not finished"):
        LabelTrust.load(folder)
    (folder / "started").unlink()
    FilterPolicy().save(folder / "policy.json")
    with pytest.raises(DatasetError, match="not finished"):
        LabelTrust.load(folder)
    (folder / "flags.parquet").write_bytes(b"not parquet")
    with pytest.raises(DatasetError, match=r"flags\.parquet cannot be read"):
        LabelTrust.load(folder)


@pytest.mark.parametrize(("action", "target"), [("ignore", 255), ("background", 0)])
def test_lookup_changes_the_flagged_organs_only(action: str, target: int) -> None:
    trust = LabelTrust.from_flags(FLAGS, FilterPolicy(action))
    table = case_lookup(trust, "a", SCHEME)
    assert table is not None
    assert table.dtype == SCHEME.dtype
    assert len(table) == 256
    stored = SCHEME.to_indices(np.array([0, 2, 5, 130]))
    assert table[stored].tolist() == [0, target, 2, target]
    assert table[SCHEME.ignore_index] == SCHEME.ignore_index
    unchanged = np.setdiff1d(np.arange(256), stored[[1, 3]])
    assert (table[unchanged] == unchanged).all()


def test_lookup_of_many_classes_is_16_bit() -> None:
    scheme = LabelScheme.from_json({"background": 0, **{f"organ {k}": 2 * k for k in range(1, 400)}}, None)
    flags = pd.DataFrame({"case": ["x"], "label": [600], "flagged": [True]})
    table = case_lookup(LabelTrust.from_flags(flags, FilterPolicy()), "x", scheme)
    assert table is not None
    assert table.dtype == np.uint16
    assert len(table) == 65536
    assert np.flatnonzero(table != np.arange(65536)).tolist() == [300]
    assert table[300] == scheme.ignore_index == 65535


def test_lookup_is_none_when_nothing_changes() -> None:
    trust = LabelTrust.from_flags(FLAGS, FilterPolicy())
    assert case_lookup(None, "a", SCHEME) is None
    assert case_lookup(trust, "c", SCHEME) is None
    assert case_lookup(LabelTrust.from_flags(FLAGS, FilterPolicy("report")), "a", SCHEME) is None


def test_lookup_refuses_values_that_the_dataset_does_not_have() -> None:
    scheme = LabelScheme.from_json({"background": 0, "liver": 5, "spleen": 2}, None)
    with pytest.raises(DatasetError, match=r"case a: .*\[130\]"):
        case_lookup(LabelTrust.from_flags(FLAGS, FilterPolicy()), "a", scheme)


def test_policies_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ignore, background, report"):
        FilterPolicy("delete")
    with pytest.raises(ConfigError, match="negative"):
        FilterPolicy("ignore", -1)
    with pytest.raises(ConfigError, match="cannot drop scans"):
        FilterPolicy("report", 3)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"action": "ignore", "colour": "red"}))
    with pytest.raises(DatasetError, match="not a policy file"):
        FilterPolicy.load(path)
    FilterPolicy("background", 4).save(path)
    assert FilterPolicy.load(path) == FilterPolicy("background", 4)
