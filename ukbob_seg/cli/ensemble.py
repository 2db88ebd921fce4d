"""ukbob_ensemble: average the saved probabilities of several models."""

from __future__ import annotations

import argparse
from pathlib import Path

from ukbob_seg.cli.common import command, make_parser


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, average, print."""
    arguments = _parser().parse_args(argv)

    from ukbob_seg.parallel import Part

    part = None if arguments.part is None else Part.parse(arguments.part)

    from ukbob_seg.inference.ensemble import ensemble

    written = ensemble(
        arguments.folders,
        arguments.output,
        weights=arguments.weights,
        save_probabilities=arguments.save_probabilities,
        resume=arguments.resume,
        part=part,
    )
    share = "" if part is None else f"part {part.number} of {part.total}: "
    print(f"{share}{len(written)} cases -> {arguments.output}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "ukbob_ensemble",
        "Average the predictions of several models and write label maps. First predict all cases with each model and\n"
        "--save-probabilities, into a folder per model; networks, configurations and spacings may differ. To average\n"
        "while predicting, without files of probabilities, give ukbob_predict several -m instead.",
        "  ukbob_predict -d 4 -i imagesTs -o swin --save-probabilities\n"
        "  ukbob_predict -d 4 -i imagesTs -o unet --save-probabilities --network plain_conv_unet\n"
        "  ukbob_ensemble swin unet -o both\n"
        "  ukbob_ensemble swin unet -o both --weights 2 1          # counts the first twice",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="outputs of ukbob_predict --save-probabilities"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder for label maps and ensemble.json"
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="one positive number per folder, in their order (default: all equal)",
    )
    parser.add_argument(
        "--save-probabilities", action="store_true", help="also write the averages, CASE_probabilities.b2nd (float16)"
    )
    parser.add_argument("--resume", action="store_true", help="leave cases alone whose label file exists")
    parser.add_argument("--part", metavar="I/N", help="only part I of N of the cases (I from 1), for job arrays")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(None))
