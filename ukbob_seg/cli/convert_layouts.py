"""What the subcommands of ukbob_convert share."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.cli.common import add_workers
from ukbob_seg.errors import ConfigError

if TYPE_CHECKING:
    import argparse

    from ukbob_seg.conversion.run import Layout


def add_folders(parser: argparse.ArgumentParser, source: str) -> None:
    """-i and -o."""
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="SOURCE", help=source)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DATASET",
        help="the new raw dataset, such as ukbob_data/raw/Dataset020_Name",
    )  # fmt: skip


def add_layout_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    """-i, -o, --link, --workers."""
    add_folders(parser, source)
    parser.add_argument("--link", action="store_true", help="link files that need no change instead of copying them")
    add_workers(parser)


def check_folders(arguments: argparse.Namespace) -> None:
    """The source is there, and the dataset is not in it.

    Raises:
        ConfigError: otherwise.
    """
    source, output = arguments.input.resolve(), arguments.output.resolve()
    if not source.exists():
        raise ConfigError(f"-i {arguments.input} does not exist")
    if source == output or source in output.parents:
        raise ConfigError(f"-o {arguments.output} lies in the source; nothing is written there, give another folder")


def convert_layout(arguments: argparse.Namespace, layout: Layout) -> None:
    """Carry it out, say what is where."""
    from ukbob_seg.conversion.run import OVERLAPS, run_conversion

    if layout.note:
        print(layout.note)
    done = run_conversion(layout, arguments.input, arguments.output, arguments.link, arguments.workers)
    kept = done.training + done.test - done.converted
    print(
        f"{done.converted} cases converted, {kept} were there already: {done.training} training, {done.test} test, "
        f"{_count(layout.channels, 'channel', 's')}, {_count(layout.labels, 'class', 'es')} -> {done.folder}"
    )
    if done.overlaps:
        print(f"{done.overlaps} voxels were in several masks; the smallest mask has them: {done.folder / OVERLAPS}")
    print(f"next: ukbob_plan_and_preprocess -d {done.folder.name} --raw {done.folder.parent} --verify-only")


def _count(things: Sized, name: str, plural: str) -> str:
    return f"{len(things)} {name}{plural if len(things) != 1 else ''}"
