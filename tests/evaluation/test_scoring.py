"""Kept scores: what is scored again, what is not, and that no interruption or damage shows in the results."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from distributed import LocalCluster

from ukbob_seg.dataset.image_io import read_labels, write_labels
from ukbob_seg.errors import DatasetError
from ukbob_seg.evaluation import scoring
from ukbob_seg.evaluation.evaluate import ReportOptions, evaluate, evaluate_pairs, evaluate_part
from ukbob_seg.evaluation.scoring import CaseScoring
from ukbob_seg.parallel import Cluster, Part

QUIET = ReportOptions(write=False)
CASES = [f"blob_{k:03d}" for k in range(4)]


@pytest.fixture
def folders(make_dataset: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """(predictions, references) of four cases; predictions are moved by one voxel along x."""
    references = make_dataset(cases=4) / "labelsTr"
    for path in sorted(references.iterdir()):
        labels, geometry = read_labels(path)
        write_labels(np.roll(labels, 1, 2), geometry, tmp_path / "predictions" / path.name)
    return tmp_path / "predictions", references


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cases in the order in which they are read and scored."""
    calls: list[str] = []
    score = CaseScoring._score

    def record(self: CaseScoring, pair: scoring.Pair) -> dict[str, dict[str, float]]:
        calls.append(pair.case)
        return score(self, pair)

    monkeypatch.setattr(CaseScoring, "_score", record)
    return calls


def run(folders: tuple[Path, Path], output: Path, **options: object) -> dict[str, bytes]:
    """Evaluate in this process; bytes of the files written."""
    evaluate(*folders, output=output, workers=1, report=QUIET, **options)  # type: ignore[arg-type]
    return {path.name: path.read_bytes() for path in output.iterdir()}


def test_only_what_changed_is_scored_again(folders: tuple[Path, Path], tmp_path: Path, scored: list[str]) -> None:
    first = run(folders, tmp_path / "scores")
    assert scored == CASES
    scored.clear()
    assert run(folders, tmp_path / "scores") == first
    assert scored == []
    path = folders[0] / "blob_002.nii.gz"
    labels, geometry = read_labels(path)
    write_labels(np.roll(labels, 1, 2), geometry, path)
    changed = run(folders, tmp_path / "scores")
    assert scored == ["blob_002"]
    assert changed == run(folders, tmp_path / "elsewhere")
    scored.clear()
    stat = (folders[1] / "blob_003.nii.gz").stat()
    os.utime(folders[1] / "blob_003.nii.gz", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    run(folders, tmp_path / "scores")
    assert scored == ["blob_003"]
    scored.clear()
    run(folders, tmp_path / "scores", overwrite=True)
    assert scored == CASES


@pytest.mark.parametrize("option", ["tolerance", "classes"])
def test_other_options_score_all_again(
    folders: tuple[Path, Path], tmp_path: Path, scored: list[str], option: str
) -> None:
    run(folders, tmp_path / "scores")
    scored.clear()
    if option == "classes":
        (folders[1].parent / "dataset.json").unlink()
        again = run(folders, tmp_path / "scores")
        assert again == run(folders, tmp_path / "elsewhere")
    else:
        again = run(folders, tmp_path / "scores", tolerance_mm=(1.0, 2.0))
    assert scored[:4] == CASES


def test_an_interrupted_run_goes_on(
    folders: tuple[Path, Path], tmp_path: Path, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(folders, tmp_path / "whole")
    scored.clear()
    inner = CaseScoring._score

    def interrupt(self: CaseScoring, pair: scoring.Pair) -> dict[str, dict[str, float]]:
        if pair.case == "blob_002":
            raise KeyboardInterrupt
        return inner(self, pair)

    with monkeypatch.context() as patch:
        patch.setattr(CaseScoring, "_score", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folders, tmp_path / "scores")
    assert not (tmp_path / "scores" / "summary.json").exists()
    scored.clear()
    assert run(folders, tmp_path / "scores") == whole
    assert scored == ["blob_002", "blob_003"]


def test_cases_within_a_shard_survive_an_interrupt(
    folders: tuple[Path, Path], tmp_path: Path, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(folders, tmp_path / "whole")
    monkeypatch.setattr(scoring, "shard_size", lambda cases: 3)
    inner = CaseScoring._score

    def interrupt(self: CaseScoring, pair: scoring.Pair) -> dict[str, dict[str, float]]:
        if pair.case == "blob_001":
            raise KeyboardInterrupt
        return inner(self, pair)

    with monkeypatch.context() as patch:
        patch.setattr(CaseScoring, "_score", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folders, tmp_path / "scores")
    scored.clear()
    assert run(folders, tmp_path / "scores") == whole
    assert scored == CASES[1:]


def test_files_of_another_folder_are_other_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Of one size and time, as files that were unpacked from an archive may be."""
    for path in [*folders[0].iterdir(), *folders[1].iterdir()]:
        if path.suffix == ".gz":
            labels, geometry = read_labels(path)
            other = folders[1] if path.parent == folders[0] else folders[0]
            for folder, values in ((path.parent, labels), (tmp_path / "other" / other.name, np.roll(labels, 3, 1))):
                write_labels(values, geometry, folder / path.name.replace(".nii.gz", ".nii"))
                os.utime(folder / path.name.replace(".nii.gz", ".nii"), ns=(1, 1))
            path.unlink()
    other = tmp_path / "other" / "labelsTr"  # of the predictions' names, and far from the references
    assert {p.stat().st_size for p in other.iterdir()} == {p.stat().st_size for p in folders[0].iterdir()}
    good = evaluate(*folders, output=tmp_path / "scores", report=QUIET).mean()
    bad = evaluate(other, folders[1], output=tmp_path / "scores", report=QUIET).mean()
    assert bad == evaluate(other, folders[1], output=tmp_path / "elsewhere", report=QUIET).mean() < good - 0.05


def test_cases_at_fault_do_not_cost_the_others(folders: tuple[Path, Path], tmp_path: Path, scored: list[str]) -> None:
    good = (folders[0] / "blob_001.nii.gz").read_bytes()
    (folders[0] / "blob_001.nii.gz").write_bytes(good[:100])
    with pytest.raises(DatasetError, match="case blob_001"):
        run(folders, tmp_path / "scores")
    assert scored == CASES
    scored.clear()
    (folders[0] / "blob_001.nii.gz").write_bytes(good)
    run(folders, tmp_path / "scores")
    assert scored == ["blob_001"]
    assert not (tmp_path / "scores" / "metrics_parts").exists()


@pytest.mark.parametrize("damage", [b"", b"PAR1 nothing", None])
def test_a_damaged_table_is_made_anew(
    folders: tuple[Path, Path], tmp_path: Path, scored: list[str], damage: bytes | None
) -> None:
    first = run(folders, tmp_path / "scores")
    table = tmp_path / "scores" / "metrics.parquet"
    table.write_bytes(table.read_bytes()[:-200] if damage is None else damage)
    scored.clear()
    assert run(folders, tmp_path / "scores") == first
    assert scored == CASES


def test_parts_are_the_whole(folders: tuple[Path, Path], tmp_path: Path, scored: list[str]) -> None:
    whole = run(folders, tmp_path / "whole")
    scored.clear()
    counts = [
        evaluate_part(*folders, Cluster(part=Part(number, 3)), output=tmp_path / "parts", workers=1)
        for number in (3, 1, 2)
    ]
    assert counts == [1, 2, 1]
    assert scored == ["blob_002", "blob_000", "blob_003", "blob_001"]
    scored.clear()
    assert run(folders, tmp_path / "parts") == whole
    assert scored == []


def test_processes_and_dask_give_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    alone = run(folders, tmp_path / "alone")
    evaluate(*folders, output=tmp_path / "two", workers=2, report=QUIET)
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()} == alone
    with LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster:
        assert run(folders, tmp_path / "dask", scheduler=cluster.scheduler_address) == alone


def test_the_parquet_table_is_the_summary_s(folders: tuple[Path, Path], tmp_path: Path) -> None:
    summary = evaluate(*folders, output=tmp_path / "scores", report=QUIET, tolerance_mm=(1, 2))
    read = pd.read_parquet(tmp_path / "scores" / "metrics.parquet")
    pd.testing.assert_frame_equal(read, summary.table)
    assert {"nsd_1mm", "nsd_2mm"} <= set(read.columns)


def test_without_an_output_nothing_is_kept(folders: tuple[Path, Path], tmp_path: Path, scored: list[str]) -> None:
    pairs = [(case, folders[0] / f"{case}.nii.gz", folders[1] / f"{case}.nii.gz") for case in CASES]
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        evaluate_pairs(pairs, None)
    assert scored == CASES * 2
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(DatasetError, match="case blob_000 is listed twice"):
        evaluate_pairs([*pairs, pairs[0]], None)
    with pytest.raises(DatasetError, match=r"case gone: .*none\.nii\.gz"):
        evaluate_pairs([("gone", tmp_path / "none.nii.gz", folders[1] / "blob_000.nii.gz")], None)
