"""ukbob_convert: other layouts into raw datasets; every layout is a module of its own beside this one."""

from __future__ import annotations

from ukbob_seg.cli.common import command
from ukbob_seg.cli.subcommands import run_subcommand

EXAMPLE = "  ukbob_convert msd -i Task02_Heart -o ukbob_data/raw/Dataset002_Heart"
SUBCOMMANDS = {
    "ukbb": ("ukbob_seg.cli.convert_ukbb", "UK Biobank Dixon archives (field 20201): stations stitched to one scan"),
    "msd": ("ukbob_seg.cli.convert_msd", "Medical Segmentation Decathlon: TaskXX_Name"),
    "nnunetv1": ("ukbob_seg.cli.convert_nnunetv1", "nnU-Net's first version: nnUNet_raw_data/TaskXXX_Name"),
    "bids": ("ukbob_seg.cli.convert_bids", "Brain Imaging Data Structure, segmentations in derivatives"),
    "totalsegmentator": ("ukbob_seg.cli.convert_totalsegmentator", "a folder of subjects with a mask for each organ"),
}


@command
def main(argv: list[str] | None = None) -> None:
    """Find the subcommand, parse its arguments, run it."""
    run_subcommand("ukbob_convert", argv, SUBCOMMANDS, "Convert other layouts into raw datasets.", EXAMPLE)


if __name__ == "__main__":
    raise SystemExit(main(None))
