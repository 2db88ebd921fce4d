"""Your scores beside the paper's figures, in one table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ukbob_seg.benchmark.paper_tables import PAPER_TABLES, PaperTable
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.files import read_json, write_text

SUFFIXES = (".md", ".csv")


@dataclass(frozen=True)
class TableRow:
    """One system.

    Attributes:
        system: name.
        source: ``paper`` or ``you``.
        dice: mean over classes, or None where there is none.
        hd_mm: mean Hausdorff distance over classes, finite distances only, or None.
        n_infinite: distances left out because one of the two maps lacks the class; None in the paper's rows.
        classes: Dice of each class; empty in the paper's rows.
        cases: number of cases; None in the paper's rows.
    """

    system: str
    source: str
    dice: float | None
    hd_mm: float | None
    n_infinite: int | None = None
    classes: dict[str, float | None] = field(default_factory=dict)
    cases: int | None = None


def paper_table(name: str) -> PaperTable:
    """One of the paper's tables.

    Raises:
        ConfigError: no such table; lists them.
    """
    if name not in PAPER_TABLES:
        raise ConfigError(f"no table {name!r} of the paper; choose from {', '.join(PAPER_TABLES)}")
    return PAPER_TABLES[name]


def parse_entry(text: str) -> tuple[str, Path]:
    """Read ``NAME=SUMMARY.json``, or a path alone, which is then named by its folder."""
    name, separator, path = text.partition("=")
    if separator and not Path(text).is_file():
        return name.strip(), Path(path)
    return Path(text).resolve().parent.name, Path(text)


def user_row(name: str, path: Path) -> TableRow:
    """The row of one summary.json, as ``ukbob_evaluate`` and ``ukbob_benchmark score`` write it.

    Raises:
        DatasetError: the file is missing or is no such summary.
    """
    content = read_json(path / "summary.json" if path.is_dir() else path, "summary")
    try:
        overall, classes = content["overall"], content["classes"]
        dice, distance = _number(overall["dice"]["mean"]), _number(overall["hd"]["mean"])
        infinite = int(overall["hd"]["n_infinite"])
        by_class = {str(key): _number(value["dice"]["mean"]) for key, value in classes.items()}
        cases = int(content["cases"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(f"{path} is no summary.json of ukbob_evaluate or ukbob_benchmark score") from error
    return TableRow(name, "you", dice, distance, infinite, by_class, cases)


def compare(table: str, entries: Sequence[tuple[str, Path]]) -> tuple[TableRow, ...]:
    """The paper's rows, then the user's in the order given.

    Raises:
        ConfigError: no such table, or two entries of one name.
        DatasetError: a summary that cannot be read.
    """
    rows = [TableRow(row.system, "paper", row.dice, row.hd_mm) for row in paper_table(table).rows]
    names = [name for name, _ in entries]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"two summaries are named {twice[0]!r}; name them apart with NAME=SUMMARY.json")
    return (*rows, *(user_row(name, path) for name, path in entries))


def cells(rows: Sequence[TableRow], per_class: bool = False) -> list[list[str]]:
    """Header and rows as text; a dash where there is no number.

    Args:
        rows: of ``compare``.
        per_class: a column with the Dice of every class as well.
    """
    classes = list(dict.fromkeys(name for row in rows for name in row.classes)) if per_class else []
    content = [["system", "source", "Dice", "HD mm", "n infinite", "classes", "cases", *classes]]
    for row in rows:
        infinite = "-" if row.n_infinite is None else str(row.n_infinite)
        counts = ["-", "-"] if row.cases is None else [str(len(row.classes)), str(row.cases)]
        line = [row.system, row.source, _text(row.dice, 3), _text(row.hd_mm, 2), infinite, *counts]
        content.append(line + [_text(row.classes.get(name), 3) for name in classes])
    return content


def doubts(table: str, rows: Sequence[TableRow]) -> list[str]:
    """Sentences on the user's rows whose number of classes is not that of the paper's table."""
    expected = paper_table(table).classes
    return [
        f"{row.system} is the mean of {len(row.classes)} classes, the paper's of {' or '.join(map(str, expected))}: "
        "they do not compare"
        for row in rows
        if row.source == "you" and len(row.classes) not in expected
    ]


def plain(content: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal."""
    widths = [max(len(line[column]) for line in content) for column in range(len(content[0]))]
    lines = []
    for line in content:
        names = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        lines.append("  ".join([*names, *numbers]).rstrip())
    return "\n".join(lines)


def markdown(title: str, content: Sequence[Sequence[str]]) -> str:
    """A Markdown table under its title."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in content]
    rule = ["---", "---", *["---:"] * (len(content[0]) - 2)]
    lines = ["| " + " | ".join(line) + " |" for line in (escaped[0], rule, *escaped[1:])]
    return f"## {title}\n\n" + "\n".join(lines) + "\n"


def write_table(path: Path, title: str, content: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Write Markdown, with notes below the table, or CSV, by the file ending.

    Raises:
        ConfigError: another ending.
    """
    check_ending(path)
    if path.suffix.lower() == ".md":
        write_text(path, markdown(title, content) + "".join(f"\n{note}.\n" for note in notes))
        return
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(content)
    write_text(path, buffer.getvalue())


def check_ending(path: Path) -> None:
    """Refuse a file that ``write_table`` cannot write, before any work.

    Raises:
        ConfigError: neither Markdown nor CSV.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"-o must end in {' or '.join(SUFFIXES)}, got {path}")


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
