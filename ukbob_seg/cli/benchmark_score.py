"""ukbob_benchmark score: zero-shot scoring by class names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.benchmark.classes import SCORED
from ukbob_seg.cli.common import add_workers

if TYPE_CHECKING:
    import argparse

DESCRIPTION = (
    "Score predictions of a model with other classes than the references (zero-shot): both are mapped to common class\n"
    "names (postcava = inferior vena cava, left and right adrenal glands = adrenal glands, ...), then scored on:\n"
    + "\n".join(f"  {name:<5}  {len(classes)}: {', '.join(classes)}" for name, classes in SCORED.items())
)
EXAMPLE = (
    "  ukbob_benchmark score predictions ukbob_data/raw/Dataset611_AMOS/labelsVa --protocol amos -o scores\n"
    "  ukbob_benchmark score predictions labels --protocol ten -o scores --reference-labels btcv/dataset.json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files, protocol, descriptions of the classes."""
    parser.add_argument("prediction", type=Path, metavar="PRED", help="folder of predicted label maps, or one file")
    parser.add_argument("reference", type=Path, metavar="REF", help="folder of reference label maps, or one file")
    parser.add_argument("--protocol", choices=SCORED, required=True, help="which classes are scored")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", required=True, help="for summary.json and report")
    for side in ("prediction", "reference"):
        parser.add_argument(
            f"--{side}-labels",
            type=Path,
            metavar="FILE",
            help=f"dataset.json that names the classes of the {side}s (default: beside them, or one folder up)",
        )
    parser.add_argument("--images", type=Path, metavar="DIR", help="images to draw the worst cases on")
    parser.add_argument(
        "--tolerance-mm",
        type=float,
        nargs="+",
        default=[2.0],
        metavar="MM",
        help="of the normalized surface Dice, one or several (default: 2)",
    )
    parser.add_argument("--allow-missing", action="store_true", help="score what is there when predictions are missing")
    parser.add_argument("--no-report", action="store_true", help="do not write report.html")
    add_workers(parser)


def run(arguments: argparse.Namespace) -> None:
    """Score, print the table of ukbob_evaluate."""
    from ukbob_seg.benchmark.score import ScoreOptions, score
    from ukbob_seg.cli.evaluate import print_summary
    from ukbob_seg.evaluation.evaluate import ReportOptions

    options = ScoreOptions(
        arguments.prediction_labels,
        arguments.reference_labels,
        arguments.tolerance_mm,
        arguments.workers,
        arguments.allow_missing,
        ReportOptions(not arguments.no_report, arguments.images),
    )
    print_summary(score(arguments.prediction, arguments.reference, arguments.protocol, arguments.output, options))
    print(f"written to {arguments.output}")
