"""Scoring files: matching, class names, ignore and regions, and every way in which the input can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ukbob_seg.dataset.image_io import Geometry, read_labels, write_labels
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import ConfigError, DatasetError, UkbobError
from ukbob_seg.evaluation.evaluate import ReportOptions, evaluate, evaluate_pairs
from ukbob_seg.evaluation.metrics import evaluate_case
from ukbob_seg.evaluation.pairing import case_name, match_files

SPACING = (3.0, 1.0, 0.7)
QUIET = ReportOptions(write=False)


@pytest.fixture
def folders(make_dataset: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """(predictions, references) of three cases; predictions are shifted by one voxel along x."""
    references = make_dataset(cases=3, spacing_mm=SPACING) / "labelsTr"
    predictions = tmp_path / "predictions"
    for path in sorted(references.iterdir()):
        labels, geometry = read_labels(path)
        write_labels(np.roll(labels, 1, 2), geometry, predictions / path.name)
    return predictions, references


def test_scores_every_case_and_class_in_mm(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    summary = evaluate(predictions, references)
    assert list(summary.classes) == ["first", "second"]
    assert summary.cases == ("blob_000", "blob_001", "blob_002")
    for case in summary.cases:
        expected = evaluate_case(
            read_labels(predictions / f"{case}.nii.gz")[0],
            read_labels(references / f"{case}.nii.gz")[0],
            tuple(float(np.float32(s)) for s in SPACING),
            {"first": 1, "second": 2},
        )
        rows = summary.table[summary.table["case"] == case].set_index("class")
        for name, metrics in expected.items():
            assert rows.loc[name, list(metrics)].to_dict() == pytest.approx(metrics)
    assert summary.statistics("hd")["mean"].tolist() == pytest.approx([0.7, 0.7], rel=1e-6)
    assert {p.name for p in predictions.iterdir()} >= {"summary.json", "metrics.csv", "metrics.parquet", "report.html"}
    assert not [p for p in predictions.iterdir() if p.name.startswith(".")]


def test_output_folder_and_no_report(folders: tuple[Path, Path], tmp_path: Path) -> None:
    evaluate(*folders, output=tmp_path / "deep" / "scores", report=QUIET)
    written = tmp_path / "deep" / "scores"
    assert {p.name for p in written.iterdir()} == {"summary.json", "metrics.csv", "metrics.parquet"}
    assert len(list(folders[0].iterdir())) == 3
    (written / "report.html").write_text("of an earlier run")
    evaluate(*folders, output=written, report=QUIET)
    assert not (written / "report.html").exists()


def test_workers_change_nothing(folders: tuple[Path, Path]) -> None:
    alone = evaluate(*folders, workers=1, report=QUIET)
    together = evaluate(*folders, workers=2, report=QUIET)
    pd.testing.assert_frame_equal(alone.table, together.table)


def test_single_pair_writes_only_on_demand(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    pair = predictions / "blob_001.nii.gz", references / "blob_001.nii.gz"
    summary = evaluate(*pair)
    assert summary.cases == ("blob_001",)
    assert list(summary.classes) == ["first", "second"]
    assert len(list(predictions.iterdir())) == 3
    evaluate(*pair, output=tmp_path / "pair")
    assert (tmp_path / "pair" / "report.html").is_file()


def test_evaluate_pairs_takes_matched_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    scheme = LabelScheme.from_json({"background": 0, "first": 1, "second": 2}, None)
    pairs = [(f"case {path.name}", path, references / path.name) for path in sorted(predictions.iterdir())]
    summary = evaluate_pairs(pairs, scheme, tmp_path / "scores")
    assert summary.cases[0] == "case blob_000.nii.gz"
    assert summary.mean() == evaluate(predictions, references, report=QUIET).mean()
    assert (tmp_path / "scores" / "summary.json").is_file()
    with pytest.raises(DatasetError, match="no case"):
        evaluate_pairs([], scheme)


def test_dataset_json_is_found_in_order(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders

    def names(folder: Path, first: str) -> None:
        labels = {"background": 0, first: 1, "b": 2}
        content = {"channel_names": {"0": "MRI"}, "labels": labels, "file_ending": ".nii.gz"}
        (folder / "dataset.json").write_text(json.dumps(content))

    names(predictions.parent, "parent")
    assert next(iter(evaluate(predictions, references, report=QUIET).classes)) == "parent"
    names(predictions, "beside")
    assert next(iter(evaluate(predictions, references, report=QUIET).classes)) == "beside"
    (tmp_path / "given").mkdir()
    names(tmp_path / "given", "given")
    summary = evaluate(predictions, references, tmp_path / "given" / "dataset.json", report=QUIET)
    assert next(iter(summary.classes)) == "given"
    with pytest.raises(DatasetError, match="does not exist"):
        evaluate(predictions, references, tmp_path / "none.json")


def test_without_dataset_json_all_values_found_are_classes(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    (references.parent / "dataset.json").unlink()
    labels, geometry = read_labels(predictions / "blob_001.nii.gz")
    labels[0, 0, 0] = 11
    write_labels(labels, geometry, predictions / "blob_001.nii.gz")
    summary = evaluate(predictions, references)
    assert dict(summary.classes) == {"1": (1,), "2": (2,), "11": (11,)}
    rows = summary.table[summary.table["class"] == "11"]
    assert rows["n_pred"].tolist() == [0, 1, 0]
    assert rows["dice"].isna().tolist() == [True, False, True]
    assert summary.statistics("hd").loc["11", "n_infinite"] == 1


def test_regions_and_ignore_label(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    folder = make_dataset(cases=1, labels=labels, regions_class_order=[1, 2])
    path = folder / "labelsTr" / "blob_000.nii.gz"
    reference, geometry = read_labels(path)
    prediction = np.roll(reference, 2, 0)
    write_labels(prediction, geometry, tmp_path / "predictions" / path.name)
    reference[:10] = 3
    write_labels(reference, geometry, path)
    summary = evaluate(tmp_path / "predictions", folder / "labelsTr")
    expected = evaluate_case(prediction[10:], reference[10:], (1, 1, 1), {"whole": (1, 2), "core": 2})
    for row in summary.table.to_dict("records"):
        assert {key: row[key] for key in expected["whole"]} == pytest.approx(expected[row["class"]])
    assert summary.ignore_value == 3


def test_missing_predictions_are_all_listed_and_can_be_allowed(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    (predictions / "blob_000.nii.gz").unlink()
    (predictions / "blob_002.nii.gz").rename(predictions / "other.nii.gz")
    with pytest.raises(DatasetError, match=r"2 of 3 references .*--allow-missing.*blob_000, blob_002"):
        evaluate(predictions, references)
    summary = evaluate(predictions, references, allow_missing=True)
    assert summary.cases == ("blob_001",)
    assert summary.missing == ("blob_000", "blob_002")
    assert summary.unmatched == ("other",)
    content = json.loads((predictions / "summary.json").read_text())
    assert content["missing_predictions"] == ["blob_000", "blob_002"]
    assert "blob_002" in (predictions / "report.html").read_text()
    (predictions / "blob_001.nii.gz").unlink()
    with pytest.raises(DatasetError, match="is this the right folder"):
        evaluate(predictions, references, allow_missing=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (24, 28, 19)}, r"shape differs: \(24, 28, 20\) in the reference, \(24, 28, 19\) in the prediction"),
        ({"spacing_mm": (3, 1, 0.8)}, r"spacing_mm differs: \(3, 1, 0\.7\) in the reference, \(3, 1, 0\.8\)"),
        ({"origin_mm": (3, -5, 8)}, r"origin_mm differs: \(3, -5, 7\) in the reference, \(3, -5, 8\)"),
        ({"direction": (-1.0, 0, 0, 0, -1, 0, 0, 0, 1)}, "direction differs"),
    ],
)
def test_geometry_mismatch_names_case_and_numbers(folders: tuple[Path, Path], change: dict, message: str) -> None:
    predictions, references = folders
    geometry = replace(Geometry((24, 28, 20), SPACING, (3.0, -5.0, 7.0)), **change)
    write_labels(np.ones(geometry.shape, dtype=np.uint8), geometry, predictions / "blob_001.nii.gz")
    with pytest.raises(DatasetError, match=rf"case blob_001: {message}"):
        evaluate(predictions, references)
    assert not (predictions / "summary.json").exists()


def test_all_problems_come_in_one_message(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    (predictions / "blob_000.nii.gz").write_bytes(b"no image")
    labels, geometry = read_labels(predictions / "blob_001.nii.gz")
    labels[0, 0, :3] = 9
    write_labels(labels, geometry, predictions / "blob_001.nii.gz")
    write_labels(labels, geometry, references / "blob_002.nii.gz")
    with pytest.raises(DatasetError) as error:
        evaluate(predictions, references, workers=1)
    text = str(error.value)
    assert "3 problems" in text
    assert "case blob_000: " in text
    assert "corrupt" in text
    assert "case blob_001: prediction blob_001.nii.gz: unknown label values 9 (3 voxels)" in text
    assert "case blob_002: reference blob_002.nii.gz: unknown label values 9 (3 voxels)" in text


def test_paths_that_cannot_be_used(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    with pytest.raises(DatasetError, match=r"prediction .*nowhere does not exist"):
        evaluate(tmp_path / "nowhere", references)
    with pytest.raises(DatasetError, match=r"reference .*nowhere does not exist"):
        evaluate(predictions, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="two folders or two files"):
        evaluate(predictions, references / "blob_000.nii.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"no label files in .*empty"):
        evaluate(predictions, tmp_path / "empty")
    with pytest.raises(DatasetError, match=r"image folder .* does not exist"):
        evaluate(predictions, references, report=ReportOptions(images=tmp_path / "nowhere"))
    for tolerance in (-1, float("nan")):
        with pytest.raises(ConfigError, match="--tolerance-mm"):
            evaluate(predictions, references, tolerance_mm=tolerance)
    with pytest.raises(ConfigError, match="--workers"):
        evaluate(predictions, references, workers=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UkbobError, match="cannot write"):
        evaluate(predictions, references, output=tmp_path / "file" / "scores")
    assert len(list(predictions.iterdir())) == 3


def test_entropy_maps_beside_label_maps_are_no_predictions(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    first = sorted(predictions.iterdir())[0]
    shutil.copy(first, first.with_name(first.name.replace(".nii.gz", "_entropy.nii.gz")))
    assert evaluate(predictions, references).unmatched == ()
    shutil.copy(first, predictions / "alone_entropy.nii.gz")  # a case of that name
    assert evaluate(predictions, references).unmatched == ("alone_entropy",)


def test_maps_without_any_foreground(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    for path in (*predictions.iterdir(), *references.iterdir()):
        labels, geometry = read_labels(path)
        write_labels(np.zeros_like(labels), geometry, path)
    summary = evaluate(predictions, references)
    assert summary.absent_classes == ("first", "second")
    assert np.isnan(summary.mean())
    (references.parent / "dataset.json").unlink()
    with pytest.raises(DatasetError, match="no class to summarise"):
        evaluate(predictions, references)


def test_endings_may_differ_but_not_within_a_folder(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    labels, geometry = read_labels(predictions / "blob_000.nii.gz")
    write_labels(labels, geometry, predictions / "blob_000.nrrd")
    with pytest.raises(DatasetError, match=r"case blob_000: both blob_000\.nii\.gz and blob_000\.nrrd"):
        evaluate(predictions, references)
    (predictions / "blob_000.nii.gz").unlink()
    assert len(match_files(predictions, references).pairs) == 3
    assert evaluate(predictions, references, report=QUIET).statistics("hd")["mean"].max() < 0.71


def test_case_name() -> None:
    assert [case_name(Path(n)) for n in ("a.b.nii.gz", "x.NII", "y.mha", "z")] == ["a.b", "x", "y", "z"]
