"""ukbob_convert bids: Brain Imaging Data Structure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ukbob_seg.cli.convert_layouts import add_layout_arguments, check_folders, convert_layout

if TYPE_CHECKING:
    import argparse

DESCRIPTION = (
    "Convert a BIDS dataset: sub-*[/ses-*]/anat images, one channel per modality; segmentations *_dseg.nii.gz and\n"
    "their names *_dseg.tsv in derivatives. A case is a session; sessions without segmentation become test cases."
)
EXAMPLE = (
    "  ukbob_convert bids -i study -o ukbob_data/raw/Dataset030_Study --suffixes T1w T2w\n"
    "  ukbob_convert bids -i study -o ukbob_data/raw/Dataset030_Study --derivatives manual --entities run-1"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders and choices."""
    add_layout_arguments(parser, "the BIDS dataset")
    group = parser.add_argument_group("what to take")
    group.add_argument(
        "--suffixes", nargs="+", metavar="NAME",
        help="modalities that become channels, in this order: T1w T2w FLAIR (default: pictures that every session has)",
    )  # fmt: skip
    group.add_argument("--derivatives", metavar="NAME", help="folder in derivatives with the segmentations")
    group.add_argument(
        "--entities", nargs="+", default=[], metavar="KEY-VALUE",
        help="of several files the one with these entities: run-1 acq-highres desc-manual",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Convert and say what is where."""
    check_folders(arguments)
    from ukbob_seg.conversion.bids import BidsOptions, find_bids

    suffixes = tuple(arguments.suffixes) if arguments.suffixes else None
    options = BidsOptions(suffixes, arguments.derivatives, tuple(arguments.entities))
    convert_layout(arguments, find_bids(arguments.input, arguments.output, options, arguments.workers))
