"""ukbob_benchmark package: predictions into a challenge's archive."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.benchmark.protocol import MODALITIES
from ukbob_seg.benchmark.protocols import SUBMITTED
from ukbob_seg.cli.common import add_workers
from ukbob_seg.errors import DatasetError, listing

if TYPE_CHECKING:
    import argparse

    from ukbob_seg.benchmark.submission import Packaged

DESCRIPTION = (
    "Make the archive that a challenge's organisers expect from predictions of its test cases, and check it with\n"
    "ukbob_benchmark validate. Classes are matched by name. Adrenal glands that a model predicts as one class are\n"
    "told apart by the side of the body that each connected part lies on."
)
EXAMPLE = (
    "  ukbob_benchmark package btcv predictions RawData/Testing/img -o submission.zip\n"
    "  ukbob_benchmark package amos predictions amos22/imagesTs --modality all -o submission.zip"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Challenge, folders, output."""
    parser.add_argument("protocol", choices=SUBMITTED, metavar="PROTOCOL", help=f"one of {', '.join(SUBMITTED)}")
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="folder that ukbob_predict wrote")
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of the test images")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", required=True, help="the archive, .zip")
    parser.add_argument(
        "--dataset-json",
        type=Path,
        metavar="FILE",
        help="names the classes of the predictions (default: beside them, or one folder up)",
    )
    parser.add_argument("--modality", choices=MODALITIES, help="amos: which test cases (default: mri)")
    add_workers(parser)


def run(arguments: argparse.Namespace) -> None:
    """Package, say what a participant must know, validate."""
    from ukbob_seg.benchmark.submission import package
    from ukbob_seg.benchmark.validate import validate
    from ukbob_seg.dataset.spec import summarise_problems

    done = package(
        arguments.protocol,
        arguments.predictions,
        arguments.images,
        arguments.output,
        arguments.dataset_json,
        arguments.modality,
        arguments.workers,
    )
    _print(done)
    _, problems = validate(arguments.protocol, done.path, arguments.images, arguments.modality)
    if problems:
        raise DatasetError(summarise_problems(problems, heading=f"{done.path} is not valid"))
    print(f"{done.cases} cases{_edition(done)} -> {done.path} (valid)")


def _print(done: Packaged) -> None:
    if done.empty:
        print(f"empty in every case, as the prediction has no such class: {', '.join(done.empty)}")
    if done.dropped:
        print(f"not classes of the challenge, now background: {listing(done.dropped)}")
    if done.extra:
        print(f"predictions without a test image, not packaged: {listing(done.extra)}")
    for landmark, cases in done.sides.items():
        print(f"adrenal glands: right and left told apart by {landmark} in {cases} cases")


def _edition(done: Packaged) -> str:
    known = [edition for edition in done.editions if edition]
    return f" (edition {' and '.join(known)})" if known else ""
