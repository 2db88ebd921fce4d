"""ukbob_convert msd: Medical Segmentation Decathlon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ukbob_seg.cli.convert_layouts import add_layout_arguments, check_folders, convert_layout

if TYPE_CHECKING:
    import argparse

DESCRIPTION = (
    "Convert TaskXX_Name of the Medical Segmentation Decathlon. Images of one channel are copied as they are, images\n"
    "of four dimensions are split into one file per channel; dataset.json is translated."
)
EXAMPLE = "  ukbob_convert msd -i downloads/Task01_BrainTumour -o ukbob_data/raw/Dataset001_BrainTumour --workers 4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders."""
    add_layout_arguments(parser, "folder with dataset.json, imagesTr, labelsTr")


def run(arguments: argparse.Namespace) -> None:
    """Convert and say what is where."""
    check_folders(arguments)
    from ukbob_seg.conversion.decathlon import find_msd

    convert_layout(arguments, find_msd(arguments.input, arguments.output))
