"""The demo at its smallest, and what it refuses."""

import pytest

from ukbob_seg.cli.demo import main
from ukbob_seg.demo.faults import PlantedFault
from ukbob_seg.demo.run import DemoConfig, FilterScore, run_demo, score_filter
from ukbob_seg.errors import ConfigError


@pytest.mark.slow
def test_the_demo_runs_from_end_to_end(tmp_path, capsys):
    code = main(["-o", str(tmp_path / "demo"), "--train-cases", "6", "--test-cases", "1", "--steps", "2",
                 "--fault-fraction", "0.1", "--device", "cpu"])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    for line in ("Dice without ETTA", "Dice with ETTA", "planted", "report"):
        assert line in out
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png;base64") == 2
    assert "http" not in page.replace("https://", "http").split("<body>")[1].split("data:image")[0]
    for other in ("predictions/report.html", "predictions_etta/report.html"):
        assert (tmp_path / "demo" / other).is_file()
        assert other in page
    assert main(["-o", str(tmp_path / "demo"), "--train-cases", "1"]) == 2


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and was not made by ukbob_demo"):
        run_demo(tmp_path, DemoConfig())
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        run_demo(tmp_path / "file", DemoConfig())


def test_scoring_the_filter(tmp_path):
    import pandas as pd

    pd.DataFrame(
        {"case": ["a", "a", "b", "b"], "label": [1, 2, 1, 2], "flagged": [True, False, True, False]}
    ).to_parquet(tmp_path / "flags.parquet")
    faults = (PlantedFault("a", 1, "leakage", 0.5), PlantedFault("b", 2, "leakage", 0.5))
    assert score_filter(tmp_path, faults) == FilterScore(planted=2, found=1, false_alarms=1)
