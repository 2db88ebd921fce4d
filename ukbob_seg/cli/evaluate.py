"""ukbob_evaluate: score predictions against references."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ukbob_seg.cli.common import add_cluster, add_workers, command, make_parser
from ukbob_seg.errors import ConfigError, listing

if TYPE_CHECKING:
    import argparse

    from ukbob_seg.evaluation.comparison import Comparison
    from ukbob_seg.evaluation.summary import EvaluationSummary

_ROWS = 25
_DISTANCES = (("HD95 mm", "hd95", 2), ("HD mm", "hd", 2), ("ASSD mm", "assd", 2))


@command
def main(argv: list[str] | None = None) -> None:
    """Parse arguments, score, print a short table."""
    arguments = _parser().parse_args(argv)

    from ukbob_seg.evaluation.evaluate import ReportOptions, evaluate, evaluate_part, output_folder
    from ukbob_seg.evaluation.evaluate_folders import evaluate_folders
    from ukbob_seg.parallel import Cluster, Part

    if arguments.images is not None and arguments.no_report:
        raise ConfigError("--images are for the pictures of the page, which --no-report leaves out; give one of them")
    options: dict[str, Any] = {
        "dataset_json": arguments.dataset_json,
        "output": arguments.output,
        "tolerance_mm": arguments.tolerance_mm,
        "workers": arguments.workers,
        "allow_missing": arguments.allow_missing,
    }
    if arguments.part is not None:
        _refuse_with_part(arguments)
        part = Part.parse(arguments.part)
        cluster = Cluster(arguments.scheduler, part)
        count = evaluate_part(
            arguments.prediction, arguments.reference, cluster, **options, overwrite=arguments.overwrite
        )
        print(
            f"part {part.number} of {part.total}: {count} cases scored; when all parts are done, run the same command "
            "once without --part (with --images, for pictures)"
        )
        return
    options |= {
        "report": ReportOptions(not arguments.no_report, arguments.images),
        "scheduler": arguments.scheduler,
        "overwrite": arguments.overwrite,
    }
    if arguments.compare:
        folders = [arguments.prediction, *arguments.compare]
        print_comparison(evaluate_folders(folders, arguments.reference, **options))
        _say_where(arguments.output or arguments.prediction, arguments, "comparison.html")
        return
    print_summary(evaluate(arguments.prediction, arguments.reference, **options))
    _say_where(output_folder(arguments.prediction, arguments.output), arguments, "report.html")


def _refuse_with_part(arguments: argparse.Namespace) -> None:
    """Options that belong to the run after all parts."""
    given = {"--compare": arguments.compare, "--images": arguments.images, "--no-report": arguments.no_report}
    useless = [name for name, value in given.items() if value]
    if useless:
        raise ConfigError(f"--part only scores; give {useless[0]} to the run without --part that follows")


def _say_where(folder: Path | None, arguments: argparse.Namespace, page: str) -> None:
    if folder is not None:
        print(f"written to {folder}" + ("" if arguments.no_report else f"; look at {folder / page}"))


def print_summary(summary: EvaluationSummary) -> None:
    """Print one row per class (those with the lowest Dice when there are many), and the mean over classes."""
    columns = _columns(summary)
    tables = {metric: summary.statistics(metric) for _, metric, _ in columns}
    dice = tables["dice"]
    names = [name for name in summary.classes if dice.loc[name, "n"]]
    many = len(names) > _ROWS
    shown = sorted(names, key=lambda name: dice.loc[name, "mean"])[:_ROWS] if many else names
    width = max(len("mean"), *(len(name) for name in shown)) if shown else len("mean")
    header = "".join(f"{title:>{_width(title)}}" for title, _, _ in columns)
    print(f"{'class':<{width}}  {'n':>5}{header}  n infinite")
    for name in shown:
        cells = "".join(_cell(tables[metric].loc[name, "mean"], digits, title) for title, metric, digits in columns)
        print(f"{name:<{width}}  {dice.loc[name, 'n']:>5}{cells}  {tables['hd'].loc[name, 'n_infinite']:>10}")
    if many:
        print(f"... and {len(names) - _ROWS} more classes with a higher Dice (all are in metrics.csv)")
    overall = {metric: summary.overall(metric) for _, metric, _ in columns}
    cells = "".join(_cell(overall[metric].mean, digits, title) for title, metric, digits in columns)
    print(f"{'mean':<{width}}  {overall['dice'].values:>5}{cells}  {overall['hd'].n_infinite:>10}")
    low, high = summary.intervals.overall["dice"]
    if low == low:
        print(f"95 % interval of the mean Dice, over cases: {low:.3f} to {high:.3f}")
    if summary.absent_classes:
        print(f"absent everywhere, in no mean: {listing(summary.absent_classes)}")
    if summary.missing:
        print(f"no prediction for {len(summary.missing)} references, in no mean: {listing(summary.missing)}")
    if summary.unmatched:
        print(f"no reference for {len(summary.unmatched)} predictions, not scored: {listing(summary.unmatched)}")


def print_comparison(comparison: Comparison) -> None:
    """Print the means over classes of every metric, and how many classes differ significantly."""
    from ukbob_seg.evaluation.comparison import LEVEL, OVERALL_ROW, p_text
    from ukbob_seg.evaluation.distribution_figures import metric_title

    print(f"baseline: {comparison.baseline}, {len(comparison.cases)} cases")
    width = max(len("set"), *(len(name) for name in comparison.others))
    titles = f"{'baseline':>10}{'mean':>9}{'difference':>12}  better  worse   infinite  p (Holm)  classes"
    print(f"{'metric':<16}{'set':<{width}}{titles}")
    tolerances = comparison.summaries[comparison.baseline].tolerances
    for metric in comparison.metrics:
        for other in comparison.others:
            table = comparison.rows(metric, other)
            row, classes = table.loc[OVERALL_ROW], table.drop(OVERALL_ROW)
            infinite = f"{int(row['n_infinite_baseline'])} : {int(row['n_infinite_other'])}"
            differing = f"{int((classes['p_holm'] < LEVEL).sum())} of {len(classes)}"
            print(
                f"{metric_title(metric, tolerances):<16}{other:<{width}}{row['baseline_mean']:>10.3f}"
                f"{row['other_mean']:>9.3f}{row['difference']:>+12.3f}{int(row['better']):>8}{int(row['worse']):>7}"
                f"{infinite:>11}{p_text(row['p_holm']):>10}  {differing}"
            )
    print(f"classes: those with p < {LEVEL:g} after Holm's correction; infinite: values in no mean, baseline : set")
    if comparison.least_p > LEVEL / 2:
        print(f"with {len(comparison.cases)} cases no p value can be below {comparison.least_p:.3g}")
    if comparison.left_out:
        print(f"not in all sets, in no number: {listing(comparison.left_out)}")


def _columns(summary: EvaluationSummary) -> tuple[tuple[str, str, int], ...]:
    """Title, metric and digits; the surface Dice at each tolerance."""
    from ukbob_seg.evaluation.metrics import nsd_names

    names = nsd_names(summary.tolerances)
    shares = [(f"NSD {name[4:-2]} mm", name, 3) for name in names] if names else [("NSD", "nsd", 3)]
    return (("Dice", "dice", 3), *shares, *_DISTANCES)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "ukbob_evaluate",
        "Score predicted label maps against reference label maps: Dice, surface distances in mm, surface Dice;\n"
        "per case and class, with means that say how many values they were taken over.",
        "  ukbob_evaluate predictions ukbob_data/raw/Dataset004_Hippocampus/labelsTs\n"
        "  ukbob_evaluate predictions labelsTs -o scores --images imagesTs --tolerance-mm 1 2\n"
        "  ukbob_evaluate plain labelsTs --compare etta ensemble -o comparison      # paired tests against 'plain'\n"
        "  ukbob_evaluate predictions labelsTs --part $SLURM_ARRAY_TASK_ID/16   # in a job array; then once without",
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
        help="where summary.json, metrics.csv, metrics.parquet and report.html go (default: PRED; nowhere for a single "
        "pair of files)",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="further folders of predictions: score each, then compare it with PRED case by case (differences, "
        "Wilcoxon test, Holm's correction); -o then gets a folder for each, and comparison.html",
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="images to draw the worst cases on (default: grey labels)"
    )
    parser.add_argument(
        "--tolerance-mm",
        type=float,
        nargs="+",
        default=[2.0],
        metavar="MM",
        help="of the normalized surface Dice, one or several (default: 2)",
    )
    parser.add_argument("--allow-missing", action="store_true", help="score what is there when predictions are missing")
    parser.add_argument("--no-report", action="store_true", help="do not write the HTML page")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="score all cases again (default: not those whose files and options are those of the last run into -o)",
    )
    add_workers(parser)
    add_cluster(parser, "then run once without --part")
    return parser


def _width(title: str) -> int:
    return max(9, len(title) + 2)


def _cell(value: float, digits: int, title: str) -> str:
    return f"{'-' if value != value else f'{value:.{digits}f}':>{_width(title)}}"


if __name__ == "__main__":
    raise SystemExit(main(None))
