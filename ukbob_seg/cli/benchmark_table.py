"""ukbob_benchmark table: the user's scores beside the paper's figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.benchmark.paper_tables import PAPER_TABLES

if TYPE_CHECKING:
    import argparse

DESCRIPTION = (
    "Print your Dice and Hausdorff distance beside the paper's figures. Those are copied from the paper, nothing was\n"
    "measured again; a dash is a figure that we do not have. Dice is the mean over classes, HD the mean of the finite\n"
    "distances; 'n infinite' counts those left out because one of the two maps lacks the class.\n"
    "Tables:\n" + "\n".join(f"  {name:<16}  {table.title}" for name, table in PAPER_TABLES.items())
)
EXAMPLE = (
    "  ukbob_benchmark table btcv\n"
    "  ukbob_benchmark table btcv ours=scores/summary.json ours+ETTA=scores_etta/summary.json -o table.md"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Table, summaries, output."""
    parser.add_argument("table", choices=PAPER_TABLES, metavar="TABLE", help=f"one of {', '.join(PAPER_TABLES)}")
    parser.add_argument(
        "summaries",
        nargs="*",
        metavar="[NAME=]SUMMARY.json",
        help="written by ukbob_evaluate or ukbob_benchmark score (default name: its folder)",
    )
    parser.add_argument("--classes", action="store_true", help="also the Dice of every class (yours only)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write the table: .md or .csv")


def run(arguments: argparse.Namespace) -> None:
    """Read, compare, print, write."""
    from ukbob_seg.benchmark.table import (
        cells,
        check_ending,
        compare,
        doubts,
        paper_table,
        parse_entry,
        plain,
        write_table,
    )

    if arguments.output is not None:
        check_ending(arguments.output)
    rows = compare(arguments.table, [parse_entry(text) for text in arguments.summaries])
    content = cells(rows, arguments.classes)
    title = paper_table(arguments.table).title
    print(f"{title}\n{plain(content)}")
    notes = doubts(arguments.table, rows)
    for note in notes:
        print(note)
    if arguments.output is not None:
        write_table(arguments.output, title, content, notes)
        print(f"written to {arguments.output}")
