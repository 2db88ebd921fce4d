"""ukbob_evaluate, run in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ukbob_seg.cli.evaluate import main, print_summary
from ukbob_seg.dataset.image_io import read_labels, write_labels
from ukbob_seg.evaluation.metrics import absent_from_both
from ukbob_seg.evaluation.summary import CaseMetrics, collect


@pytest.fixture
def folders(make_dataset: Callable[..., Path], tmp_path: Path) -> tuple[str, str]:
    """Predictions shifted by one slice of 3 mm, with the second organ of blob_001 missed."""
    references = make_dataset(cases=3, spacing_mm=(3.0, 1.0, 0.7)) / "labelsTr"
    for path in sorted(references.iterdir()):
        labels, geometry = read_labels(path)
        if path.name.startswith("blob_001"):
            labels[labels == 2] = 0
        write_labels(np.roll(labels, 1, 0), geometry, tmp_path / "predictions" / path.name)
    return str(tmp_path / "predictions"), str(references)


def test_prints_classes_and_mean_and_writes_everything(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*folders, "-o", str(tmp_path / "scores"), "--workers", "1", "--tolerance-mm", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["class", "n", "Dice", "NSD", "HD95", "mm", "HD", "mm", "ASSD", "mm", "n", "infinite"]
    first, second, mean = (line.split() for line in lines[1:4])
    assert (first[0], first[1], first[-1]) == ("first", "3", "0")
    assert (second[0], second[1], second[-1]) == ("second", "3", "1")
    assert float(first[5]) == 3.0
    content = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert float(mean[2]) == pytest.approx(content["overall"]["dice"]["mean"], abs=5e-4)
    assert content["tolerance_mm"] == 1
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[-1].endswith("report.html")
    written = {p.name for p in (tmp_path / "scores").iterdir()}
    assert written == {"summary.json", "metrics.csv", "metrics.parquet", "report.html"}


def test_several_tolerances_are_columns(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*folders, "--tolerance-mm", "1", "3.0", "--no-report"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:9] == ["class", "n", "Dice", "NSD", "1", "mm", "NSD", "3", "mm"]
    first = lines[1].split()
    assert (float(first[3]) < 0.999, float(first[4])) == (True, 1.0)  # moved by 3 mm
    assert len({len(line) for line in lines[:4]}) == 1
    content = json.loads((Path(folders[0]) / "summary.json").read_text())
    assert content["tolerances_mm"] == [1, 3]
    assert content["classes"]["first"]["nsd_3mm"]["mean"] == 1


def test_parts_then_the_whole(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    there = ["-o", str(tmp_path / "scores"), "--workers", "1"]
    for part, scored in (("1/2", 2), ("2/2", 1), ("1/2", 0)):
        assert main([*folders, *there, "--part", part]) == 0
        assert f"{scored} cases scored" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "scores").iterdir()] == ["metrics_parts"]
    assert main([*folders, *there]) == 0
    assert "3 of 3 cases were scored earlier" in caplog.text
    in_parts = (tmp_path / "scores" / "summary.json").read_bytes()
    assert main([*folders, *there, "--overwrite"]) == 0
    assert (tmp_path / "scores" / "summary.json").read_bytes() == in_parts
    assert main([*folders, *there, "--part", "1/2", "--overwrite"]) == 0
    assert "2 cases scored" in capsys.readouterr().out
    assert main([*folders, "--images", ".", "--no-report"]) == 2
    assert "--no-report" in capsys.readouterr().err
    for more in (["--images", "."], ["--compare", "x"], ["--no-report"]):
        assert main([*folders, *there, "--part", "1/2", *more]) == 2
        assert more[0] in capsys.readouterr().err
    pair = [f"{folder}/blob_000.nii.gz" for folder in folders]
    assert main([*pair, "--part", "1/2"]) == 2
    assert "--part" in capsys.readouterr().err


def test_comparison_is_printed_and_written(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions, references = folders
    assert main([predictions, references, "--compare", references, "-o", str(tmp_path / "cmp")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "baseline: predictions, 3 cases"
    assert out[2].split()[:2] == ["Dice", "labelsTr"]
    assert out[2].split()[3] == "1.000"
    assert out[-1].endswith("comparison.html")
    assert {p.name for p in (tmp_path / "cmp").iterdir()} == {
        "comparison.json", "comparison.csv", "comparison.html", "predictions", "labelsTr",
    }  # fmt: skip
    assert main([predictions, references, "--compare", predictions]) == 2
    assert "must be another one" in capsys.readouterr().err
    assert main([predictions, references, "--compare", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_options(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    predictions, references = folders
    images = str(Path(references).parent / "imagesTr")
    assert main([predictions, references, "--no-report"]) == 0
    assert "report.html" not in capsys.readouterr().out
    assert not (Path(predictions) / "report.html").exists()
    description = str(Path(references).parent / "dataset.json")
    assert main([predictions, references, "--images", images, "--dataset-json", description]) == 0
    assert (Path(predictions) / "report.html").is_file()
    (Path(predictions) / "blob_000.nii.gz").unlink()
    assert main([predictions, references, "--allow-missing"]) == 0
    assert "no prediction for 1 references, in no mean: blob_000" in capsys.readouterr().out


def test_a_pair_of_files_is_only_printed(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    predictions, references = folders
    assert main([f"{predictions}/blob_000.nii.gz", f"{references}/blob_000.nii.gz"]) == 0
    out = capsys.readouterr().out
    assert "written" not in out
    assert "first" in out


def test_bad_input_is_one_line_and_exit_code_2(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions, references = folders
    (Path(predictions) / "blob_002.nii.gz").unlink()
    for arguments, expected in (
        ([predictions, references], "1 of 3 references have no prediction"),
        ([str(tmp_path / "no"), references], "does not exist"),
        ([predictions, references, "--allow-missing", "--tolerance-mm", "-1"], "--tolerance-mm"),
        ([predictions, references, "--allow-missing", "--workers", "0"], "--workers"),
        ([predictions, references, "--allow-missing", "--images", str(tmp_path / "no")], "image folder"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert expected in error
    with pytest.raises(SystemExit) as usage:
        main([])
    assert usage.value.code == 2


def test_many_classes_print_the_lowest(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {f"organ {k:03d}": {**absent_from_both(), "dice": k / 100, "n_ref": 1} for k in range(72)}
    print_summary(collect([CaseMetrics("a", {**scores, "never": absent_from_both()})]))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in lines[1:26]] == [f"organ {k:03d}" for k in range(25)]
    assert lines[26].startswith("... and 47 more classes")
    assert lines[27].startswith("mean")
    assert lines[28] == "absent everywhere, in no mean: never"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom ukbob_seg.cli.evaluate import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'numpy', 'pandas', 'scipy', 'matplotlib', 'SimpleITK', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "example:" in done.stdout


def test_evaluating_never_imports_torch(folders: tuple[str, str]) -> None:
    code = (
        "import sys\nfrom ukbob_seg.cli.evaluate import main\n"
        f"assert main({list(folders)!r}) == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
