"""ukbob_convert: other layouts into raw datasets; every layout is a module of its own beside this one."""

from __future__ import annotations

import sys
from importlib import import_module

from ukbob_seg.cli.common import command, make_parser

# A subcommand's module has DESCRIPTION, EXAMPLE, add_arguments(parser) and run(arguments). Only the one that is called
# is imported.
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
    given = sys.argv[1:] if argv is None else argv
    if not given or given[0] not in SUBCOMMANDS:
        example = "  ukbob_convert msd -i Task02_Heart -o ukbob_data/raw/Dataset002_Heart"
        parser = make_parser("ukbob_convert", _description(), example)
        parser.add_argument("subcommand", choices=SUBCOMMANDS, metavar="SUBCOMMAND", help="one of the above")
        parser.parse_args(given)  # help, version, or an error: no subcommand comes first
        parser.error("the subcommand must come first")
    module = import_module(SUBCOMMANDS[given[0]][0])
    parser = make_parser(f"ukbob_convert {given[0]}", module.DESCRIPTION, module.EXAMPLE)
    module.add_arguments(parser)
    module.run(parser.parse_args(given[1:]))


def _description() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:<{width}}  {help_text}" for name, (_, help_text) in SUBCOMMANDS.items()]
    return "Convert other layouts into raw datasets. Subcommands, each with its own --help:\n" + "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main(None))
