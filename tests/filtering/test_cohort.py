"""The filter over a dataset: outputs, options, and going on after an interruption."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ukbob_seg.dataset.image_io import Geometry, read_image, read_labels, write_image, write_labels
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import ConfigError, DatasetError, UkbobError
from ukbob_seg.filtering import measure
from ukbob_seg.filtering.body import body_voxels
from ukbob_seg.filtering.cohort import FilterSummary, measure_part, solf_filter
from ukbob_seg.filtering.config import FilterConfig
from ukbob_seg.filtering.features import organ_names
from ukbob_seg.filtering.policies import FilterPolicy, LabelTrust
from ukbob_seg.filtering.shape_features import organ_features
from ukbob_seg.filtering.solf import flag_organs
from ukbob_seg.filtering.strata import StratifiedBounds
from ukbob_seg.parallel import Part

TABLES = ("features.parquet", "flags.parquet", "bounds.json", "policy.json")


def run(cohort: Path, output: Path, **options: Any) -> FilterSummary:
    return solf_filter(cohort, output, FilterConfig(**{"workers": 1, "report": False, "quiet": True, **options}))


def tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TABLES}


def test_tables_hold_the_features_of_every_case(cohort: Path, tmp_path: Path) -> None:
    summary = run(cohort, tmp_path / "solf")
    features = pd.read_parquet(tmp_path / "solf" / "features.parquet")
    assert len(features) == summary.labels == 48
    assert features["case"].tolist() == [f"blob_{k:03d}" for k in range(24) for _ in range(2)]
    assert features["organ"].tolist() == ["first", "second"] * 24
    for case, rows in list(features.groupby("case"))[3:8]:
        labels, geometry = read_labels(cohort / "labelsTr" / f"{case}.nii.gz")
        image, _ = read_image([cohort / "imagesTr" / f"{case}_0000.nii.gz"])
        body = body_voxels(image[0])
        expected = organ_features(labels, geometry.spacing_mm, body)
        assert (rows["body_voxels"] == body).all()
        pd.testing.assert_frame_equal(rows[expected.columns].reset_index(drop=True), expected)
    flags = pd.read_parquet(tmp_path / "solf" / "flags.parquet")
    bounds = StratifiedBounds.load(tmp_path / "solf" / "bounds.json")
    assert bounds == summary.bounds
    pd.testing.assert_frame_equal(flags, flag_organs(features, bounds=bounds.any))
    alone = flag_organs(features)
    pd.testing.assert_frame_equal(flags[alone.columns], alone)


def test_planted_fault_is_flagged_and_reaches_training(cohort: Path, tmp_path: Path) -> None:
    summary = run(cohort, tmp_path / "solf")
    trust = LabelTrust.load(tmp_path / "solf")
    assert trust is not None
    assert trust == summary.trust
    assert trust.flagged_values("blob_005") == (2,)
    second = next(organ for organ in summary.organs if organ.name == "second")
    assert second.flagged >= 1
    assert second.share == second.flagged / 24


def test_second_run_reads_nothing_and_writes_the_same(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(cohort, tmp_path / "solf").computed == 24
    before = tables(tmp_path / "solf")

    def refuse(*_: object) -> None:
        raise AssertionError("a finished case was read again")

    monkeypatch.setattr(measure, "read_labels", refuse)
    monkeypatch.setattr(measure, "read_stored", refuse)
    assert run(cohort, tmp_path / "solf").computed == 0
    assert run(cohort, tmp_path / "solf", epsilon=5, rule="volume").computed == 0
    run(cohort, tmp_path / "solf")
    assert tables(tmp_path / "solf") == before


def test_interrupted_run_goes_on_and_ends_the_same(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cohort, tmp_path / "whole")
    reads = 0
    read = measure.read_labels

    def fail_at_the_tenth(path: Path) -> Any:
        nonlocal reads
        reads += 1
        if reads == 10:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(measure, "read_labels", fail_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        run(cohort, tmp_path / "solf")
    with pytest.raises(DatasetError, match="not finished"):
        LabelTrust.load(tmp_path / "solf")
    monkeypatch.undo()
    kept = sorted((tmp_path / "solf" / "shards").glob("shard_*.parquet"))
    assert len(kept) == 9
    kept[2].write_bytes(kept[2].read_bytes()[:500])  # as if the disk had lost the rest of the file
    assert run(cohort, tmp_path / "solf").computed == 16
    assert tables(tmp_path / "solf") == tables(tmp_path / "whole")


def test_a_later_run_that_fails_holds_up_training(cohort: Path, tmp_path: Path) -> None:
    run(cohort, tmp_path / "solf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="none of the 24 cases can be measured"):
        run(cohort, tmp_path / "solf", body=str(tmp_path / "empty"), skip_unreadable=True)
    with pytest.raises(DatasetError, match="not finished"):
        LabelTrust.load(tmp_path / "solf")
    run(cohort, tmp_path / "solf")
    assert LabelTrust.load(tmp_path / "solf") is not None
    measure_part(cohort, tmp_path / "solf", Part(1, 2), FilterConfig(quiet=True))  # a job that was queued again
    assert LabelTrust.load(tmp_path / "solf") is not None


def test_relative_folders_reach_workers_as_absolute_ones(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []
    real = measure.map_cases

    def spy(function: Any, jobs: Any, *arguments: Any, **options: Any) -> Any:
        for job in jobs:
            seen.extend([job.path, *(path for case, _ in job.pending for path in (case.label, *case.images))])
        return real(function, jobs, *arguments, **options)

    monkeypatch.setattr(measure, "map_cases", spy)
    run(Path(os.path.relpath(cohort)), Path("solf"))
    assert len(seen) > 24
    assert all(path.is_absolute() for path in seen)


def test_number_of_workers_does_not_change_a_byte(cohort: Path, tmp_path: Path) -> None:
    run(cohort, tmp_path / "one")
    run(cohort, tmp_path / "two", workers=2)
    assert tables(tmp_path / "one") == tables(tmp_path / "two")


def test_changed_files_and_options_are_measured_again(cohort: Path, tmp_path: Path) -> None:
    run(cohort, tmp_path / "solf")
    label = cohort / "labelsTr" / "blob_003.nii.gz"
    labels, geometry = read_labels(label)
    labels[labels == 1] = 0
    write_labels(labels, geometry, label)
    os.utime(cohort / "imagesTr" / "blob_007_0000.nii.gz", ns=(1, 1))
    assert run(cohort, tmp_path / "solf").computed == 2
    features = pd.read_parquet(tmp_path / "solf" / "features.parquet")
    assert features.loc[features["case"] == "blob_003", "label"].tolist() == [2]
    assert run(cohort, tmp_path / "solf", body="union").computed == 24


def test_body_sources(cohort: Path, tmp_path: Path) -> None:
    run(cohort, tmp_path / "union", body="union")
    union = pd.read_parquet(tmp_path / "union" / "features.parquet")
    assert (union["body_voxels"] == union.groupby("case")["voxels"].transform("sum")).all()
    assert np.allclose(union.groupby("case")["normalized_volume"].sum(), 1)

    masks = tmp_path / "masks"
    for path in (cohort / "labelsTr").glob("*.nii.gz"):
        labels, geometry = read_labels(path)
        mask = np.zeros_like(labels)
        mask[:, :, :10] = 3
        write_labels(mask, geometry, masks / path.name)
    run(cohort, tmp_path / "masks_solf", body=str(masks))
    masked = pd.read_parquet(tmp_path / "masks_solf" / "features.parquet")
    assert (masked["body_voxels"] == 24 * 28 * 10).all()
    assert np.allclose(masked["normalized_volume"], masked["voxels"] / 6720)


def test_body_smaller_than_its_organs_is_reported(
    cohort: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masks = tmp_path / "masks"
    for path in (cohort / "labelsTr").glob("*.nii.gz"):
        labels, geometry = read_labels(path)
        write_labels((labels == 1).astype(np.uint8), geometry, masks / path.name)
    with caplog.at_level(logging.WARNING):
        summary = run(cohort, tmp_path / "solf", body=str(masks))
    assert summary.small_bodies == 24
    assert "24 of 24 scans" in caplog.text
    assert run(cohort, tmp_path / "solf", body="union").small_bodies == 0


def test_ignore_label_is_no_organ(cohort: Path, tmp_path: Path) -> None:
    content = json.loads((cohort / "dataset.json").read_text())
    content["labels"] = {"background": 0, "first": 1, "ignore": 2}
    (cohort / "dataset.json").write_text(json.dumps(content))
    summary = run(cohort, tmp_path / "solf", body="union")
    features = pd.read_parquet(tmp_path / "solf" / "features.parquet")
    assert features["label"].unique().tolist() == [1]
    assert (features["body_voxels"] == features["voxels"]).all()
    assert [organ.name for organ in summary.organs] == ["first"]


def test_labels_stored_as_float_are_read(cohort: Path, tmp_path: Path) -> None:
    run(cohort, tmp_path / "integers")
    path = cohort / "labelsTr" / "blob_000.nii.gz"
    labels, geometry = read_labels(path)
    write_image(labels.astype(np.float32), geometry, path)
    run(cohort, tmp_path / "floats")
    assert tables(tmp_path / "integers") == tables(tmp_path / "floats")


def test_bounds_of_another_run_are_applied(cohort: Path, tmp_path: Path) -> None:
    learnt = run(cohort, tmp_path / "solf", epsilon=10)
    bounds = tmp_path / "kept.json"
    shutil.copy(tmp_path / "solf" / "bounds.json", bounds)
    for path in (cohort / "imagesTr").glob("*.nii.gz"):  # a few new scans, too few to learn from
        if path.name[5:8] not in ("005", "006"):
            path.unlink()
            (cohort / "labelsTr" / f"{path.name[:8]}.nii.gz").unlink()
    summary = run(cohort, tmp_path / "new", bounds_file=bounds)
    assert summary.bounds == learnt.bounds
    assert summary.unjudged == ()
    assert summary.trust.flagged_values("blob_005") == learnt.trust.flagged_values("blob_005") == (2,)
    alone = run(cohort, tmp_path / "alone")
    assert alone.unjudged == ("first", "second")
    assert alone.flagged == 0

    content = json.loads((cohort / "dataset.json").read_text())
    content["labels"] = {"background": 0, "first": 2, "second": 1}
    (cohort / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="label 1 is 'first' there and 'second'"):
        run(cohort, tmp_path / "swapped", bounds_file=bounds)


def test_bounds_without_the_rules_models_are_refused(cohort: Path, tmp_path: Path) -> None:
    run(cohort, tmp_path / "solf")
    bounds = tmp_path / "solf" / "bounds.json"
    assert run(cohort, tmp_path / "new", bounds_file=bounds, rule="joint").unjudged == ()
    with pytest.raises(ConfigError, match="no models for the rule anatomy; make it again with ukbob_filter --evidence"):
        run(cohort, tmp_path / "new", bounds_file=bounds, rule="anatomy", evidence=True)


def test_bounds_of_another_body_are_refused(cohort: Path, tmp_path: Path) -> None:
    run(cohort, tmp_path / "solf")
    assert json.loads((tmp_path / "solf" / "bounds.json").read_text())["body"] == "image"
    with pytest.raises(ConfigError, match="learnt with the body from image, now it is union"):
        run(cohort, tmp_path / "new", bounds_file=tmp_path / "solf" / "bounds.json", body="union")


def test_unusable_bounds_fail_before_the_work(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bounds.json").write_text("{}")
    monkeypatch.setattr(measure, "read_labels", lambda _: pytest.fail("work was started"))
    with pytest.raises(DatasetError, match="not a bounds file"):
        run(cohort, tmp_path / "solf", bounds_file=tmp_path / "bounds.json")


def test_policy_is_kept_for_training(cohort: Path, tmp_path: Path) -> None:
    run(cohort, tmp_path / "solf", policy=FilterPolicy("background", 0))
    trust = LabelTrust.load(tmp_path / "solf")
    assert trust is not None
    assert trust.policy == FilterPolicy("background", 0)
    assert "blob_005" in trust.dropped_cases


def test_report_is_written_on_request_and_an_old_one_removed(cohort: Path, tmp_path: Path) -> None:
    run(cohort, tmp_path / "solf", report=True)
    assert (tmp_path / "solf" / "report.html").is_file()
    run(cohort, tmp_path / "solf")
    assert not (tmp_path / "solf" / "report.html").exists()


def test_region_members_get_names() -> None:
    scheme = LabelScheme.from_json({"background": 0, "whole": [1, 2], "core": [2]}, [1, 2])
    assert organ_names(scheme) == {1: "label 1", 2: "label 2"}


def test_unusable_files_name_their_case(cohort: Path, tmp_path: Path) -> None:
    label = cohort / "labelsTr" / "blob_004.nii.gz"
    good = label.read_bytes()
    label.write_bytes(good[: len(good) // 2])
    with pytest.raises(DatasetError, match=r"case blob_004: .*cannot be read"):
        run(cohort, tmp_path / "solf")

    labels, geometry = read_labels(cohort / "labelsTr" / "blob_003.nii.gz")
    write_labels(labels, Geometry(geometry.shape, (2.0, 1.0, 0.9)), label)
    with pytest.raises(DatasetError, match=r"case blob_004: spacing_mm differs"):
        run(cohort, tmp_path / "solf")

    labels[0, 0, :3] = 9
    write_labels(labels, geometry, label)
    with pytest.raises(DatasetError, match=r"blob_004: 9 \(3 voxels\)"):
        run(cohort, tmp_path / "solf")

    label.write_bytes(good)
    write_image(np.full(geometry.shape, 3, np.float32), geometry, cohort / "imagesTr" / "blob_004_0000.nii.gz")
    with pytest.raises(DatasetError, match=r"case blob_004: .*constant.*--body union"):
        run(cohort, tmp_path / "solf")
    assert run(cohort, tmp_path / "solf", body="union").cases == 24


def test_unusable_masks_name_their_case(cohort: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    with pytest.raises(DatasetError, match="case blob_000: no body mask"):
        run(cohort, tmp_path / "solf", body=str(masks))
    for path in (cohort / "labelsTr").glob("*.nii.gz"):
        labels, geometry = read_labels(path)
        write_labels(np.zeros_like(labels), geometry, masks / path.name)
    with pytest.raises(DatasetError, match=r"case blob_000: .*is empty"):
        run(cohort, tmp_path / "solf", body=str(masks))


def test_dataset_without_any_organ_is_refused(cohort: Path, tmp_path: Path) -> None:
    for path in (cohort / "labelsTr").glob("*.nii.gz"):
        labels, geometry = read_labels(path)
        write_labels(np.zeros_like(labels), geometry, path)
    with pytest.raises(DatasetError, match="none of the 24 label maps"):
        run(cohort, tmp_path / "solf")


def test_unwritable_output_fails_before_the_work(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(measure, "read_labels", lambda _: pytest.fail("work was started"))
    with pytest.raises(UkbobError, match="cannot write"):
        run(cohort, tmp_path / "file" / "solf")


def test_configuration_is_checked(tmp_path: Path) -> None:
    for options, message in (
        ({"rule": "magic"}, "unknown rule"),
        ({"epsilon": 100}, "epsilon"),
        ({"min_samples": 0}, "min_samples"),
        ({"body": "nowhere"}, "existing folder"),
        ({"bounds_file": tmp_path / "b.json", "epsilon": 2}, "fixed in a bounds file"),
        ({"bounds_file": tmp_path / "b.json", "min_samples": 9}, "fixed in a bounds file"),
    ):
        with pytest.raises(ConfigError, match=message):
            FilterConfig(**options)  # type: ignore[arg-type]
