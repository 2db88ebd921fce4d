"""Small tables that a user wrote: CSV as spreadsheets and editors save it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ukbob_seg.errors import DatasetError, listing

_DELIMITERS = ",;\t"


def read_table(path: Path, what: str, columns: Sequence[str]) -> pd.DataFrame:
    """Read columns of a CSV file in UTF-8, with or without byte order mark.

    The header is the first line that is not blank; the one of comma, semicolon and tab that it holds most often
    separates the cells. Blank lines and lines of empty cells are no rows.

    Args:
        path: of the file.
        what: it is, for messages: ``the table of subjects``.
        columns: to return; others are not read.

    Returns:
        These columns as strings without surrounding blanks, by line number; a cell that its line lacks is empty.

    Raises:
        DatasetError: the file cannot be read or is no such table, or a column is missing or there twice.
    """
    file = f"{what} {path}"
    (_, names), *rows = _cells(_read_text(Path(path), file), file) or [(0, [])]
    if not names:
        raise DatasetError(f"{file} is empty")
    columns = list(dict.fromkeys(columns))
    missing = [column for column in columns if column not in names]
    if missing:
        there = listing([name for name in names if name])
        raise DatasetError(f"{file} has no column {', '.join(missing)}; it has {there}")
    twice = [column for column in columns if names.count(column) > 1]
    if twice:
        raise DatasetError(f"{file} has the column {twice[0]} twice; rename or remove one")
    for line, cells in rows:
        if any(cells[len(names) :]):
            raise DatasetError(
                f"{file}, line {line}: {len(cells)} cells under {len(names)} columns; put text that holds a separator "
                "in double quotes"
            )
    places = [names.index(column) for column in columns]
    content = [[cells[place] if place < len(cells) else "" for place in places] for _, cells in rows]
    return pd.DataFrame(content, index=[line for line, _ in rows], columns=columns, dtype=object)


def one_row_each(table: pd.DataFrame, keys: Sequence[str], file: str) -> pd.DataFrame:
    """The rows of a table without repetitions.

    Args:
        table: from ``read_table``.
        keys: columns that tell what a row is about.
        file: what it is and its path, for messages.

    Raises:
        DatasetError: two rows are about the same but differ; names their lines.
    """
    table = table.drop_duplicates()
    again = table.duplicated(list(keys))
    if again.any():
        second = table[again].iloc[0]
        first = table[(table[list(keys)] == second[list(keys)]).all(axis=1)].iloc[0]
        about = ", ".join(f"{key} {second[key]}" for key in keys)
        column = next(column for column in table if first[column] != second[column])
        raise DatasetError(
            f"{file} says two things about {about}: {column} {first[column]!r} in line {first.name} and "
            f"{second[column]!r} in line {second.name}; remove one"
        )
    return table


def _read_text(path: Path, file: str) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DatasetError(f"{file} does not exist") from error
    except IsADirectoryError as error:
        raise DatasetError(f"{file} is a folder; give a CSV file") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not UTF-8 text; save it as CSV UTF-8") from error
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror or error}") from error
    if "\0" in text:  # UTF-16 of plain letters is valid UTF-8 with zeros, and so are many binary files
        raise DatasetError(f"{file} is not UTF-8 text; save it as CSV UTF-8")
    return text


def _cells(text: str, file: str) -> list[tuple[int, list[str]]]:
    """(line number, cells) of every line that holds anything; the first is the header."""
    header = re.sub(r'"[^"]*"', "", next((line for line in text.split("\n") if line.strip()), ""))
    delimiter = max(_DELIMITERS, key=header.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise DatasetError(f"{file}, line {reader.line_num}: no CSV file ({error})") from error
    return rows
