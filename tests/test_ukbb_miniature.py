"""From UK Biobank's archives to scores, with an imported model for the labels: the documented script, run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from ukbob_seg.dataset.image_io import read_labels

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "ukbb_miniature.py"


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pydicom", reason="pip install 'ukbob_seg[dicom]'")
    found = importlib.util.spec_from_file_location("ukbb_miniature", SCRIPT)
    assert found is not None
    assert found.loader is not None
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    script.main(["--work", str(tmp_path), "--subjects", "3", "--test-subjects", "1", "--epochs", "1", "--steps", "4"])
    raw = tmp_path / "raw"
    # Three whole archives; the fourth lacks a series, and is left out by name.
    assert len(list((raw / script.LABELLED / "labelsTr").glob("*.nii.gz"))) == 3
    assert len(list((raw / script.LABELLED / "imagesTr").glob("*_0003.nii.gz"))) == 3
    assert "1000003_20201_2_0" in (raw / script.SCANS / "incomplete.csv").read_text()
    assert list((tmp_path / "imported").rglob("imported.json"))
    assert (tmp_path / "preprocessed" / script.LABELLED / "solf" / "report.html").is_file()
    (truth,) = (tmp_path / "test" / "truth").glob("*.nii.gz")
    for name in ("plain", "etta"):
        summary = json.loads((tmp_path / f"scores_{name}" / "summary.json").read_text())
        assert summary["cases"] == 1
        (prediction,) = (tmp_path / f"predictions_{name}").glob("*.nii.gz")
        assert read_labels(prediction)[0].shape == read_labels(truth)[0].shape
    assert (
        capsys.readouterr().out.count("$ ukbob_") == 14
    )  # 2 convert, 4 of the labeller, label, 3 to train, 4 to score
