"""ukbob_convert totalsegmentator: a folder of subjects with a mask for each organ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ukbob_seg.cli.convert_layouts import add_layout_arguments, check_folders, convert_layout

if TYPE_CHECKING:
    import argparse

DESCRIPTION = (
    "Convert s0001/ct.nii.gz (or mri.nii.gz) and s0001/segmentations/ORGAN.nii.gz: the masks of a subject become one\n"
    "label map. Classes are the masks' names in alphabetical order. A voxel in several masks belongs to the smallest."
)
EXAMPLE = (
    "  ukbob_convert totalsegmentator -i Totalsegmentator_dataset -o ukbob_data/raw/Dataset040_Total --link\n"
    "  ukbob_convert totalsegmentator -i Totalsegmentator_dataset -o ukbob_data/raw/Dataset041_Kidneys "
    "--classes kidney_left kidney_right"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders and classes."""
    add_layout_arguments(parser, "folder of subjects; meta.csv in it says which are test subjects")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="only these masks, with values from 1 in this order (default: all)"
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="a mask that a subject lacks is an organ that it lacks"
    )


def run(arguments: argparse.Namespace) -> None:
    """Convert and say what is where."""
    check_folders(arguments)
    from ukbob_seg.conversion.totalsegmentator import find_totalsegmentator

    layout = find_totalsegmentator(arguments.input, arguments.output, arguments.classes, arguments.allow_missing)
    convert_layout(arguments, layout)
