"""ukbob_filter, run in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ukbob_seg.cli.filter import main
from ukbob_seg.dataset.image_io import read_labels, write_labels


@pytest.fixture
def filter_command(
    make_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Run the command on 22 blob cases; in blob_003 most of the second organ is missing."""
    folder = make_dataset(cases=22)
    path = folder / "labelsTr" / "blob_003.nii.gz"
    labels, geometry = read_labels(path)
    top = np.argwhere(labels == 2)[:, 0].min() + 2
    labels[top:][labels[top:] == 2] = 0
    write_labels(labels, geometry, path)
    monkeypatch.setenv("UKBOB_RAW", str(tmp_path / "raw"))
    monkeypatch.setenv("UKBOB_PREPROCESSED", str(tmp_path / "pre"))
    return lambda *options: main(["-d", "7", "--workers", "1", *options])


def solf_folder(tmp_path: Path) -> Path:
    return tmp_path / "pre" / "Dataset007_Blobs" / "solf"


def test_prints_a_table_and_writes_everything(
    filter_command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert filter_command() == 0
    printed = capsys.readouterr().out
    folder = solf_folder(tmp_path)
    flags = pd.read_parquet(folder / "flags.parquet")
    total = int(flags["flagged"].sum())
    assert flags.loc[flags["case"] == "blob_003", "flagged"].tolist()[1]
    assert "22 scans, 2 organs, 44 labels" in printed
    second = next(line.split() for line in printed.splitlines() if line.startswith("second"))
    assert second[1:3] == ["22", str(int(flags.loc[flags["label"] == 2, "flagged"].sum()))]
    assert f"{total} of 44 organ labels flagged" in printed
    assert f"written to {folder}; look at {folder / 'report.html'}" in printed
    assert "too few" not in printed
    names = {path.name for path in folder.iterdir()}
    assert names == {"features.parquet", "flags.parquet", "bounds.json", "policy.json", "report.html", "shards"}
    assert filter_command("--no-report") == 0
    printed = capsys.readouterr().out
    assert "(22 measured earlier)" in printed
    assert "report.html" not in printed
    assert not (folder / "report.html").exists()


def test_every_option_takes_effect(
    filter_command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = solf_folder(tmp_path)

    def run(*options: str) -> tuple[pd.DataFrame, dict[str, object], dict[str, object]]:
        assert filter_command("--no-report", *options) == 0
        contents = [json.loads((folder / name).read_text()) for name in ("bounds.json", "policy.json")]
        return pd.read_parquet(folder / "flags.parquet"), contents[0], contents[1]

    flags, bounds, policy = run()
    assert bounds["epsilon"] == 2
    assert policy == {"action": "ignore", "max_flags": None}
    assert (flags["flagged"] == (flags["votes"] >= 2)).all()
    kept = tmp_path / "kept.json"
    kept.write_bytes((folder / "bounds.json").read_bytes())

    wide, bounds, _ = run("--epsilon", "40")
    assert bounds["epsilon"] == 40
    assert wide["votes"].sum() > flags["votes"].sum()
    again, bounds, _ = run("--bounds", str(kept))
    assert bounds["epsilon"] == 2
    pd.testing.assert_frame_equal(again, flags)

    by_volume, _, _ = run("--rule", "volume")
    assert (by_volume["flagged"] == by_volume["normalized_volume_outside"]).all()
    assert by_volume["flagged"].sum() > flags["flagged"].sum()
    by_range, _, _ = run("--rule", "iqr")
    assert (by_range["flagged"] == by_range["volume_mm3_outside"]).all()
    assert by_range["flagged"].any()
    assert not run("--rule", "none")[0]["flagged"].any()

    union, _, _ = run("--body", "union")
    assert not np.allclose(union["normalized_volume"], flags["normalized_volume"])
    masked, _, _ = run("--body", str(tmp_path / "raw" / "Dataset007_Blobs" / "labelsTr"))
    assert np.allclose(masked["normalized_volume"], union["normalized_volume"])

    assert run("--policy", "background", "--drop-scan-above", "0")[2] == {"action": "background", "max_flags": 0}
    assert run("--policy", "report")[2]["action"] == "report"

    joint, bounds, _ = run("--rule", "joint", "--confidence", "0.9")
    assert bounds["confidence"] == 0.9
    assert (joint["flagged"] == (joint["doubt"] > 1)).all()
    assert joint["flagged"].any()
    assert "stray" not in joint
    assert {"stray", "swapped", "components"} <= set(run("--evidence")[0].columns)
    anatomy, _, _ = run("--evidence", "--rule", "anatomy", "--confidence", "0.9")
    assert (anatomy["flagged"] == (anatomy["anatomy_doubt"] > 1)).all()
    assert anatomy["flagged"].any()

    people = tmp_path / "people.csv"
    people.write_text("case,sex,band\n" + "".join(f"blob_{k:03d},{'FM'[k % 2]},old\n" for k in range(22)))
    divided, bounds, _ = run("--strata", str(people), "--stratify-by", "sex,band", "--min-samples", "5")
    assert set(bounds["strata"]) == {"F, old", "M, old"}
    assert set(divided["stratum"]) == {"F, old", "M, old"}

    assert run("--review")[0]["verdict"].eq("").all()
    review = pd.read_csv(folder / "review.csv", dtype=str)
    chosen = (review["case"] == "blob_003") & (review["label"] == "2")
    assert review.loc[chosen, "flagged"].tolist() == ["yes"]
    review.assign(verdict=np.where(chosen, "accept", "")).to_csv(folder / "review.csv", index=False)
    flags = run("--review")[0].set_index(["case", "label"])
    assert flags.loc[("blob_003", 2), "flagged_by_rule"]
    assert not flags.loc[("blob_003", 2), "flagged"]
    other = tmp_path / "said.csv"
    other.write_text("case,label,verdict\nblob_004,1,reject\n")
    flags = run("--review", str(other))[0].set_index(["case", "label"])
    assert flags.loc[("blob_004", 1), "flagged"]
    assert not flags.loc[("blob_003", 2), "flagged"]  # what review.csv says still holds
    other.write_text("case,label,verdict\nblob_003,2,reject\n")
    flags = run("--review", str(other))[0].set_index(["case", "label"])
    assert flags.loc[[("blob_003", 2), ("blob_004", 1)], "flagged"].all()

    capsys.readouterr()
    unjudged, bounds, _ = run("--min-samples", "23")
    assert bounds["min_samples"] == 23
    assert unjudged["votes"].sum() == 0
    assert "too few samples to judge (fewer than 23): first, second" in capsys.readouterr().out


def test_folders_can_be_given(filter_command: Callable[..., int], tmp_path: Path) -> None:
    assert filter_command("--no-report", "--preprocessed", str(tmp_path / "elsewhere")) == 0
    assert (tmp_path / "elsewhere" / "Dataset007_Blobs" / "solf" / "flags.parquet").is_file()
    assert not solf_folder(tmp_path).exists()
    assert filter_command("--raw", str(tmp_path / "nowhere")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-d", "99"), "no dataset '99'"),
        (("--epsilon", "100"), "epsilon must be a percentage"),
        (("--epsilon", "-1"), "epsilon must be a percentage"),
        (("--rule", "magic"), "unknown rule 'magic'; choose one of solf, volume, iqr, joint, anatomy, none"),
        (("--policy", "delete"), "unknown policy 'delete'; choose one of ignore, background, report"),
        (("--policy", "report", "--drop-scan-above", "2"), "cannot drop scans"),
        (("--drop-scan-above", "-1"), "negative"),
        (("--min-samples", "0"), "min_samples must be at least 1"),
        (("--body", "no/such/folder"), "existing folder of masks"),
        (("--bounds", "no/such/bounds.json"), "bounds file no/such/bounds.json does not exist"),
        (("--bounds", "b.json", "--epsilon", "2"), "fixed in a bounds file"),
        (("--workers", "0"), "--workers must be at least 1"),
        (("--rule", "anatomy"), "add --evidence"),
        (("--confidence", "1"), "confidence must lie between 0 and 1"),
        (("--bounds", "b.json", "--confidence", "0.9"), "fixed in a bounds file"),
        (("--stratify-by", "sex"), "--strata FILE"),
        (("--strata", "nowhere.csv", "--stratify-by", "sex"), "nowhere.csv does not exist"),
        (("--review", "nowhere.csv"), "nowhere.csv does not exist"),
        (("--workers", "-1"), "--workers must be at least 1"),
        (("--body", ""), "existing folder of masks"),
        (("--ablate", "--epsilon", "3"), "leave out --epsilon"),
        (("--ablate", "--policy", "ignore"), "leave out --policy"),
        (("--part", "3/2"), "--part 3/2"),
        (("--part", "two"), "--part must look like 2/8"),
        (("--part", "1/2", "--ablate"), "--part only measures"),
        (("--part", "1/2", "--bounds", "none.json"), "none.json does not exist"),
        (("--part", "1/2", "--review", "none.csv"), "none.csv does not exist"),
        (("--reference", "x"), "--reference belongs to --ablate"),
        (("--ablate", "--reference", "no/such/folder"), "no/such/folder does not exist"),
        (("--scheduler", "tcp://127.0.0.1:1"), "--workers is about processes on this machine"),
    ],
)
def test_bad_options_end_with_one_line_and_code_2(
    filter_command: Callable[..., int], options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert filter_command(*options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_mistyped_option_gets_one_line(
    filter_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in ((("--epsilon", "two"), "argument --epsilon"), (("--epslon", "2"), "--epslon")):
        with pytest.raises(SystemExit) as end:
            filter_command(*options)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert line.endswith("see ukbob_filter --help")


def test_unreadable_case_ends_with_code_2(
    filter_command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw" / "Dataset007_Blobs" / "imagesTr" / "blob_009_0000.nii.gz").write_bytes(b"")
    assert filter_command() == 2
    assert "case blob_009" in capsys.readouterr().err


def test_unreadable_cases_can_be_left_out(
    filter_command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "raw" / "Dataset007_Blobs" / "labelsTr" / "blob_009.nii.gz").write_bytes(b"no image")
    assert filter_command("--skip-unreadable") == 0
    assert "1 scans could not be measured" in capsys.readouterr().out
    assert "blob_009" in caplog.text
    flags = pd.read_parquet(solf_folder(tmp_path) / "flags.parquet")
    assert flags["case"].nunique() == 21


def test_parts_measure_and_the_last_run_decides(
    filter_command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (2, 1):
        assert filter_command("--part", f"{number}/2") == 0
        assert f"part {number} of 2: 11 scans measured" in capsys.readouterr().out
        assert not (solf_folder(tmp_path) / "flags.parquet").exists()
    assert filter_command("--no-report") == 0
    assert "(22 measured earlier)" in capsys.readouterr().out


def test_ablation_is_printed_and_changes_no_flags(
    filter_command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert filter_command("--no-report") == 0
    before = {path.name: path.read_bytes() for path in solf_folder(tmp_path).glob("*.*")}
    capsys.readouterr()
    assert filter_command("--ablate", "--reference", str(tmp_path / "raw" / "Dataset007_Blobs" / "labelsTr")) == 0
    printed = capsys.readouterr().out
    assert "labels with a reference: 44 of 44" in printed
    assert (solf_folder(tmp_path) / "ablation.html").is_file()
    assert {name: (solf_folder(tmp_path) / name).read_bytes() for name in before} == before


def test_more_organs_than_rows_are_cut_short(
    make_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"background": 0, **{f"organ {k}": k for k in range(1, 21)}}
    folder = make_dataset(cases=1, labels=names)
    path = folder / "labelsTr" / "blob_000.nii.gz"
    labels, geometry = read_labels(path)
    labels[0, 0] = np.arange(1, 21)
    write_labels(labels, geometry, path)
    roots = ["--raw", str(tmp_path / "raw"), "--preprocessed", str(tmp_path / "pre")]
    assert main(["-d", "Dataset007_Blobs", "--no-report", *roots]) == 0
    printed = capsys.readouterr().out
    assert "... and 5 more organs with no larger share" in printed
    assert "organ 15 and 5 more" in printed


def test_help_shows_an_example_without_heavy_imports() -> None:
    code = (
        "import sys; from ukbob_seg.cli.filter import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numba', 'SimpleITK', 'pandas', 'matplotlib', 'scipy', 'skimage'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "ukbob_filter -d 4" in result.stdout
