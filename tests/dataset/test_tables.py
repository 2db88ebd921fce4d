"""Tables that users wrote, as spreadsheets save them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ukbob_seg.dataset.tables import one_row_each, read_table
from ukbob_seg.errors import DatasetError

ROWS = [["a", "F"], ["b", "M"]]


@pytest.mark.parametrize(
    "text",
    [
        "case,sex\na,F\nb,M\n",
        "\ufeffcase;sex\r\na;F\r\nb;M\r\n",
        "case\tsex\ra\tF\rb\tM",
        "\n case , sex , age, height \n\n a,F ,1,\n,,,\nb, M\n",
        'id;"age, in years, rounded";case;sex;\n1;50;"a";F;\n2;"5\n1"; "b";M;;;\n',
    ],
)
def test_spreadsheets_write_csv_in_many_ways(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode())
    table = read_table(path, "the table", ["case", "sex", "case"])
    assert table.columns.tolist() == ["case", "sex"]
    assert table.to_numpy().tolist() == ROWS


def test_rows_know_their_lines(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("\ncase,note\n\na,x\n,\nb,y\n")
    assert read_table(tmp_path / "table.csv", "the table", ["case"]).index.tolist() == [4, 6]
    (tmp_path / "table.csv").write_text("case,note\n")
    assert read_table(tmp_path / "table.csv", "the table", ["case"]).empty


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n ,\n", "is empty"),
        (b"id,person\n1,2\n", "has no column case; it has id, person"),
        (b"case,sex,case\na,F,b\n", "has the column case twice"),
        (b"case,name\na,M\xfcller\n", "is not UTF-8 text"),
        ("case,sex\na,F\n".encode("utf-16"), "is not UTF-8 text"),
        ("case,sex\na,F\n".encode("utf-16-le"), "is not UTF-8 text"),
        (b"case,sex\na,F\nb,M,50\n", "line 3: 3 cells under 2 columns"),
        (b'case,sex\na,"F\nb,M\n', "line 3: no CSV file"),
    ],
)
def test_what_is_no_table_gets_a_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"^the table .*table\.csv,? " + message):
        read_table(path, "the table", ["case"])


def test_what_is_no_file_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        read_table(tmp_path / "none.csv", "the table", ["case"])
    with pytest.raises(DatasetError, match="is a folder"):
        read_table(tmp_path, "the table", ["case"])


def test_repetitions_are_kept_once_and_contradictions_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("case,label,verdict\na,1,x\na,2,y\na,1,x\n")
    table = read_table(path, "the table", ["case", "label", "verdict"])
    assert one_row_each(table, ["case", "label"], "it").index.tolist() == [2, 3]
    with pytest.raises(DatasetError, match="it says two things about case a: label '1' in line 2 and '2' in line 3"):
        one_row_each(table, ["case"], "it")
