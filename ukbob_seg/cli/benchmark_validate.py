"""ukbob_benchmark validate: an archive against its challenge's rules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.benchmark.protocol import MODALITIES
from ukbob_seg.benchmark.protocols import SUBMITTED
from ukbob_seg.errors import DatasetError

if TYPE_CHECKING:
    import argparse

DESCRIPTION = (
    "Check an archive, whoever made it, against the rules of its challenge: all test cases and nothing else, file\n"
    "names, integers, allowed label values, shape and matrix of the test images. Exit code 2 when anything is wrong."
)
EXAMPLE = "  ukbob_benchmark validate btcv submission.zip RawData/Testing/img"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Challenge, archive, images."""
    parser.add_argument("protocol", choices=SUBMITTED, metavar="PROTOCOL", help=f"one of {', '.join(SUBMITTED)}")
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="the .zip file")
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of the test images")
    parser.add_argument("--modality", choices=MODALITIES, help="amos: which test cases (default: mri)")


def run(arguments: argparse.Namespace) -> None:
    """Check; the first problems in one message."""
    from ukbob_seg.benchmark.validate import validate
    from ukbob_seg.dataset.spec import summarise_problems

    cases, problems = validate(arguments.protocol, arguments.archive, arguments.images, arguments.modality)
    if problems:
        raise DatasetError(summarise_problems(problems, heading=f"{arguments.archive} is not valid"))
    print(f"{arguments.archive}: {cases} cases, valid")
