"""The table of the paper's figures and the user's."""

import csv
import json

import pytest

from ukbob_seg.benchmark.paper_tables import PAPER_TABLES
from ukbob_seg.cli import benchmark


@pytest.fixture
def summary(tmp_path):
    """A summary.json with one class that is missed once."""
    path = tmp_path / "scores" / "summary.json"
    path.parent.mkdir()
    path.write_text(
        json.dumps(
            {
                "cases": 4,
                "overall": {"dice": {"mean": 0.8125}, "hd": {"mean": 7.5, "n_infinite": 1}},
                "classes": {"liver": {"dice": {"mean": 0.8125}}, "spleen": {"dice": {"mean": None}}},
            }
        )
    )
    return path


def test_the_users_row_stands_beside_the_papers(summary, capsys, tmp_path):
    written = tmp_path / "table.csv"
    code = benchmark.main(["table", "btcv", f"mine={summary}", str(summary), "--classes", "-o", str(written)])
    assert code == 0
    out = capsys.readouterr().out
    assert "Swin-BOB, 10 models averaged  paper   0.897" in out
    rows = list(csv.reader(written.open()))
    assert rows[0] == ["system", "source", "Dice", "HD mm", "n infinite", "classes", "cases", "liver", "spleen"]
    assert rows[4] == ["Swin-BOB", "paper", "0.892", "-", "-", "-", "-", "-", "-"]
    assert rows[-2] == ["mine", "you", "0.812", "7.50", "1", "2", "4", "0.812", "-"]
    assert "mine is the mean of 2 classes, the paper's of 12: they do not compare" in out
    assert rows[-1][0] == "scores"


def test_markdown(summary, tmp_path, capsys):
    assert benchmark.main(["table", "ukbob", f"a|b={summary}", "-o", str(tmp_path / "t.md")]) == 0
    text = (tmp_path / "t.md").read_text()
    assert "| Swin-UNETR | paper | 0.918 | 5.98 | - | - | - |" in text
    assert "| a\\|b | you | 0.812 | 7.50 | 1 | 2 | 4 |" in text
    assert "they do not compare." in text


@pytest.mark.parametrize("name", PAPER_TABLES)
def test_every_table_prints_without_a_summary(name, capsys):
    assert benchmark.main(["table", name]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(PAPER_TABLES[name].rows)


def test_what_is_refused(summary, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text("[]")
    for arguments, message in (
        (["table", "btcv", str(tmp_path / "none.json")], "does not exist"),
        (["table", "btcv", str(other)], "is no summary.json"),
        (["table", "btcv", f"a={summary}", f"a={summary}"], "two summaries are named 'a'"),
        (["table", "btcv", "-o", str(tmp_path / "t.txt")], "-o must end in .md or .csv"),
        (["table", "nothing"], "invalid choice"),
        (["nothing"], "invalid choice"),
        ([], "required"),
    ):
        try:
            code = benchmark.main(arguments)
        except SystemExit as stop:
            code = stop.code
        assert code == 2, arguments
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", benchmark.SUBCOMMANDS)
def test_every_subcommand_teaches(name, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main([name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "example:" in out
    assert f"ukbob_benchmark {name}" in out
