"""The common score of all folds against means by hand, and what is no cross-validation."""

import json

import numpy as np
import pandas as pd
import pytest
from shifted_models import DATASET, FOLDS, NAME, make_dataset, make_model

from ukbob_seg import accumulate_crossval
from ukbob_seg.dataset.image_io import read_labels
from ukbob_seg.errors import ConfigError, DatasetError


@pytest.fixture
def roots(tmp_path):
    return make_dataset(tmp_path)


@pytest.fixture
def model(roots):
    return make_model(roots, "3d_fullres", "a", {"0": 0.1, "1": -0.2})


def test_the_mean_is_that_over_cases(roots, model):
    """Not that of the folds' means; and label files are read where they are."""
    (model / "fold_all" / "validation").mkdir(parents=True)
    (model / "fold_all" / "validation" / "level_0.nii.gz").write_bytes(b"never read")
    summary = accumulate_crossval(model, roots, workers=1)
    dice = {2: [], 7: []}
    for fold, names in FOLDS.items():
        for name in names:
            found, _ = read_labels(model / f"fold_{fold}" / "validation" / f"{name}.nii.gz")
            truth, _ = read_labels(roots.raw / NAME / "labelsTr" / f"{name}.nii.gz")
            for value, scores in dice.items():
                one, other = found == value, truth == value
                scores.append(2 * (one & other).sum() / (one.sum() + other.sum()))
    assert all(0.2 < score < 1 for scores in dice.values() for score in scores)
    assert summary.mean("dice") == pytest.approx(np.mean([np.mean(scores) for scores in dice.values()]), abs=1e-12)
    output = model / "crossval_results_folds_0_1"
    assert {path.name for path in output.iterdir()} == {
        "summary.json", "metrics.csv", "metrics.parquet", "report.html",
    }  # fmt: skip
    content = json.loads((output / "summary.json").read_text())
    assert content["overall"]["dice"]["mean"] == pytest.approx(summary.mean("dice"))
    assert {row["case"] for row in content["per_case"]} == {name for names in FOLDS.values() for name in names}
    assert content["per_case"][0]["prediction"] == str(model / "fold_0" / "validation" / "level_0.nii.gz")
    assert len(pd.read_csv(output / "metrics.csv")) == 8


def test_some_folds(roots, model):
    summary = accumulate_crossval(model, roots, ["1"], workers=1)
    assert summary.cases == FOLDS["1"]
    assert (model / "crossval_results_folds_1" / "summary.json").is_file()


def test_folds_of_unequal_size_weigh_by_their_cases(roots):
    names = ["level_0", "level_1", "level_2", "level_3"]
    splits = [{"train": names[3:], "val": names[:3]}, {"train": names[:3], "val": names[3:]}]
    (roots.preprocessed / NAME / "splits.json").write_text(json.dumps(splits))
    model = make_model(roots, "2d", "b", {"0": 0.0, "1": 0.4})
    common = accumulate_crossval(model, roots, workers=1)
    second = json.loads((model / "fold_1" / "validation" / "summary.json").read_text())["overall"]["dice"]["mean"]
    assert second < 0.9
    assert common.mean("dice") == pytest.approx((3 * 1.0 + second) / 4)


def test_what_is_refused(roots, model):
    validation = model / "fold_1" / "validation"
    with pytest.raises(DatasetError, match="fold all holds no case out"):
        accumulate_crossval(model, roots, ["0", "all"])
    with pytest.raises(ConfigError, match="fold 0 is given twice"):
        accumulate_crossval(model, roots, ["0", "0"])
    with pytest.raises(ConfigError, match=r"fold must be 0\.\.1"):
        accumulate_crossval(model, roots, ["2"])
    (validation / "level_9.nii.gz").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"level_9\.nii\.gz \(1 such files\), which fold 1 of the splits does not"):
        accumulate_crossval(model, roots)
    (validation / "level_9.nii.gz").unlink()
    (validation / "level_3.nii.gz").rename(validation / ".level_3.nii.gz")
    with pytest.raises(DatasetError, match=r"fold 1: 1 of 2 cases have no label file \(level_3\)"):
        accumulate_crossval(model, roots)
    (validation / "summary.json").unlink()
    with pytest.raises(DatasetError, match=r"fold 1 \(no validation/summary.json\).*ukbob_train 5 1 -c 3d_fullres"):
        accumulate_crossval(model, roots)
    accumulate_crossval(model, roots, ["0"])
    assert not (model / "crossval_results_folds_0_1").exists()


def test_a_case_in_two_folds(roots, model):
    path = roots.preprocessed / NAME / "splits.json"
    splits = json.loads(path.read_text())
    splits[1] = {"train": ["level_1"], "val": ["level_2", "level_3"]}
    path.write_text(json.dumps(splits))
    with pytest.raises(DatasetError, match="case level_2 is held out by fold 0 and by fold 1"):
        accumulate_crossval(model, roots)
    path.unlink()
    with pytest.raises(DatasetError, match=r"has no splits\.json"):
        accumulate_crossval(model, roots)
    assert not path.exists()


def test_labels_that_changed_since(roots, model):
    changed = {**DATASET, "labels": {"background": 0, "low": 2, "top": 7}}
    (roots.raw / NAME / "dataset.json").write_text(json.dumps(changed))
    with pytest.raises(DatasetError, match=r"labels differ: high = 7 in .*; train again"):
        accumulate_crossval(model, roots)
