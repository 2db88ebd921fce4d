"""ukbob_convert nnunetv1: nnU-Net's first version."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ukbob_seg.cli.convert_layouts import add_layout_arguments, check_folders, convert_layout

if TYPE_CHECKING:
    import argparse

DESCRIPTION = (
    "Convert a task of nnU-Net's first version (nnUNet_raw_data_base/nnUNet_raw_data/TaskXXX_Name). Files are copied\n"
    "or linked as they are; dataset.json is translated."
)
EXAMPLE = "  ukbob_convert nnunetv1 -i nnUNet_raw_data/Task501_Name -o ukbob_data/raw/Dataset501_Name --link"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders."""
    add_layout_arguments(parser, "folder TaskXXX_Name with dataset.json, imagesTr, labelsTr")


def run(arguments: argparse.Namespace) -> None:
    """Convert and say what is where."""
    check_folders(arguments)
    from ukbob_seg.conversion.decathlon import find_nnunetv1

    convert_layout(arguments, find_nnunetv1(arguments.input, arguments.output))
