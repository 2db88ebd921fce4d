"""ukbob_evaluate: score predictions against references."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.cli.common import add_workers, command, make_parser
from ukbob_seg.errors import listing

if TYPE_CHECKING:
    import argparse

    from ukbob_seg.evaluation.summary import EvaluationSummary

_ROWS = 25
_COLUMNS = (("Dice", "dice", 3), ("NSD", "nsd", 3), ("HD95 mm", "hd95", 2), ("HD mm", "hd", 2), ("ASSD mm", "assd", 2))


@command
def main(argv: list[str] | None = None) -> None:
    """Parse arguments, score, print a short table."""
    arguments = _parser().parse_args(argv)

    from ukbob_seg.evaluation.evaluate import ReportOptions, evaluate

    summary = evaluate(
        arguments.prediction,
        arguments.reference,
        arguments.dataset_json,
        arguments.output,
        arguments.tolerance_mm,
        arguments.workers,
        arguments.allow_missing,
        ReportOptions(not arguments.no_report, arguments.images),
    )
    print_summary(summary)
    folder = arguments.output or (arguments.prediction if arguments.prediction.is_dir() else None)
    if folder is not None:
        report = "" if arguments.no_report else f"; look at {folder / 'report.html'}"
        print(f"written to {folder}{report}")


def print_summary(summary: EvaluationSummary) -> None:
    """Print one row per class (those with the lowest Dice when there are many), and the mean over classes."""
    tables = {metric: summary.statistics(metric) for _, metric, _ in _COLUMNS}
    dice = tables["dice"]
    names = [name for name in summary.classes if dice.loc[name, "n"]]
    many = len(names) > _ROWS
    shown = sorted(names, key=lambda name: dice.loc[name, "mean"])[:_ROWS] if many else names
    width = max(len("mean"), *(len(name) for name in shown)) if shown else len("mean")
    header = "".join(f"{title:>9}" for title, _, _ in _COLUMNS)
    print(f"{'class':<{width}}  {'n':>5}{header}  n infinite")
    for name in shown:
        cells = "".join(_cell(tables[metric].loc[name, "mean"], digits) for _, metric, digits in _COLUMNS)
        print(f"{name:<{width}}  {dice.loc[name, 'n']:>5}{cells}  {tables['hd'].loc[name, 'n_infinite']:>10}")
    if many:
        print(f"... and {len(names) - _ROWS} more classes with a higher Dice (all are in metrics.csv)")
    overall = {metric: summary.overall(metric) for _, metric, _ in _COLUMNS}
    cells = "".join(_cell(overall[metric].mean, digits) for _, metric, digits in _COLUMNS)
    print(f"{'mean':<{width}}  {overall['dice'].values:>5}{cells}  {overall['hd'].n_infinite:>10}")
    if summary.absent_classes:
        print(f"absent everywhere, in no mean: {listing(summary.absent_classes)}")
    if summary.missing:
        print(f"no prediction for {len(summary.missing)} references, in no mean: {listing(summary.missing)}")
    if summary.unmatched:
        print(f"no reference for {len(summary.unmatched)} predictions, not scored: {listing(summary.unmatched)}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "ukbob_evaluate",
        "Score predicted label maps against reference label maps: Dice, surface distances in mm, surface Dice;\n"
        "per case and class, with means that say how many values they were taken over.",
        "  ukbob_evaluate predictions ukbob_data/raw/Dataset004_Hippocampus/labelsTs\n"
        "  ukbob_evaluate predictions labelsTs -o scores --images imagesTs --tolerance-mm 1",
    )
    parser.add_argument("prediction", type=Path, metavar="PRED", help="folder of predicted label maps, or one file")
    parser.add_argument("reference", type=Path, metavar="REF", help="folder of reference label maps, or one file")
    parser.add_argument(
        "--dataset-json",
        type=Path,
        metavar="FILE",
        help="names the classes (default: dataset.json in PRED, its parent, or REF's parent; else every value found)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="where summary.json, metrics.csv and report.html go (default: PRED; nowhere for a single pair of files)",
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="images to draw the worst cases on (default: grey labels)"
    )
    parser.add_argument(
        "--tolerance-mm", type=float, default=2.0, metavar="MM", help="of the normalized surface Dice (default: 2)"
    )
    parser.add_argument("--allow-missing", action="store_true", help="score what is there when predictions are missing")
    parser.add_argument("--no-report", action="store_true", help="do not write report.html")
    add_workers(parser)
    return parser


def _cell(value: float, digits: int) -> str:
    return f"{'-':>9}" if value != value else f"{value:>9.{digits}f}"


if __name__ == "__main__":
    raise SystemExit(main(None))
