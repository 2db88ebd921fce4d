"""Stray pieces are removed where that helps, and only there."""

import json

import numpy as np
import pytest

from ukbob_seg.cli import find_postprocessing as command
from ukbob_seg.dataset.image_io import Geometry, read_labels, write_image, write_labels
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.evaluation.postprocessing import find_postprocessing

GEOMETRY = Geometry((12, 14, 16), (3.0, 1.0, 0.7))
DATASET = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "one": 1, "twins": 2, "calm": 5},
           "numTraining": 4, "file_ending": ".nii.gz"}  # fmt: skip


@pytest.fixture
def folders(tmp_path):
    """Four cases in two folds: 'one' is predicted with stray pieces, 'twins' truly has two parts, 'calm' is exact."""
    raw = tmp_path / "raw" / "Dataset003_Parts"
    model = tmp_path / "results" / "Dataset003_Parts" / "3d_fullres__swin_unetr"
    (raw / "imagesTr").mkdir(parents=True)
    (raw / "dataset.json").write_text(json.dumps(DATASET))
    for number in range(4):
        truth = np.zeros(GEOMETRY.shape, np.uint8)
        truth[2:6, 2:6, 2:6] = 1
        truth[8:10, 2:5, 2:5] = truth[8:10, 9:11, 2:5] = 2
        truth[2:5, 10:13, 10:14] = 5
        predicted = truth.copy()
        predicted[10, 12, 12 + number % 2] = 1
        name = f"case_{number}"
        write_image(np.ones(GEOMETRY.shape, np.float32), GEOMETRY, raw / "imagesTr" / f"{name}_0000.nii.gz")
        write_labels(truth, GEOMETRY, raw / "labelsTr" / f"{name}.nii.gz")
        write_labels(predicted, GEOMETRY, model / f"fold_{number // 2}" / "validation" / f"{name}.nii.gz")
    return raw, model


def test_only_what_helps_is_done(folders):
    raw, model = folders
    found = find_postprocessing(model, raw, workers=1, quiet=True)
    assert found.postprocessing.largest_component == ("one",)
    assert found.folds == ("0", "1")
    one, twins = found.table.loc["one"], found.table.loc["twins"]
    assert one["before"] == pytest.approx(2 * 64 / (64 + 65))
    assert (one["after"], one["better"], one["worse"], one["cases"]) == (1.0, 4, 0, 4)
    assert twins["after"] == pytest.approx(2 * 18 / (18 + 30))
    assert (twins["better"], twins["worse"], twins["kept"]) == (0, 4, False)
    content = json.loads((model / "postprocessing.json").read_text())
    assert content["largest_component"] == ["one"]
    assert content["evidence"]["twins"]["worse"] == 4


def test_the_command_and_its_refusals(folders, tmp_path, capsys):
    raw, _ = folders
    flags = ["--raw", str(tmp_path / "raw"), "--results", str(tmp_path / "results"), "--workers", "1"]
    assert command.main(["-d", "3", *flags]) == 0
    out = capsys.readouterr().out
    assert "one        4   0.9922   1.0000       4      0  -> largest component alone" in out
    assert "folds 0, 1 -> " in out
    with pytest.raises(DatasetError, match="holds no validation predictions of a fold"):
        find_postprocessing(tmp_path / "none", raw, quiet=True)
    (raw / "labelsTr" / "case_3.nii.gz").unlink()
    assert command.main(["-d", "3", *flags]) == 2
    assert "case_3" in capsys.readouterr().err


def test_ignored_voxels_do_not_cut_organs_into_pieces(folders):
    """Prediction knows no ignored voxels: there the organ is one part, and only the stray piece goes."""
    raw, model = folders
    (raw / "dataset.json").write_text(json.dumps({**DATASET, "labels": {**DATASET["labels"], "ignore": 9}}))
    for path in (raw / "labelsTr").iterdir():
        truth, _ = read_labels(path)
        truth[4] = 9  # through the middle of 'one'
        write_labels(truth, GEOMETRY, path)
    found = find_postprocessing(model, raw, workers=1, quiet=True)
    assert found.table.loc["one", "after"] == 1.0
    assert found.table.loc["one", "kept"]


def test_regions_stay_as_they_are(folders):
    raw, model = folders
    regions = {**DATASET, "labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    (raw / "dataset.json").write_text(json.dumps(regions))
    with pytest.raises(ConfigError, match="a model of regions"):
        find_postprocessing(model, raw, quiet=True)
