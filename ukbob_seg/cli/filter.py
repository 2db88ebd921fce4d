"""ukbob_filter: find the organ labels that cannot be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.cli.common import add_roots, add_workers, command, make_parser, roots_from

if TYPE_CHECKING:
    import argparse

    from ukbob_seg.filtering.cohort import FilterSummary

_ROWS = 15


@command
def main(argv: list[str] | None = None) -> None:
    """Parse arguments, filter, print a short table."""
    arguments = _parser().parse_args(argv)

    from ukbob_seg.dataset.paths import find_dataset
    from ukbob_seg.filtering.cohort import FilterConfig, solf_filter
    from ukbob_seg.filtering.policies import FilterPolicy

    config = FilterConfig(
        rule=arguments.rule,
        epsilon=arguments.epsilon,
        min_samples=arguments.min_samples,
        bounds_file=arguments.bounds,
        body=arguments.body,
        policy=FilterPolicy(arguments.policy, arguments.drop_scan_above),
        workers=arguments.workers,
        report=not arguments.no_report,
    )
    roots = roots_from(arguments)
    raw = find_dataset(roots.raw, arguments.dataset)
    print_summary(solf_filter(raw, roots.preprocessed / raw.name / "solf", config), config.report)


def print_summary(summary: FilterSummary, report: bool) -> None:
    """Print what was found, the organs with the most flags first."""
    kept = summary.cases - summary.computed
    again = f" ({kept} measured earlier)" if kept else ""
    print(f"{summary.dataset}: {summary.cases} scans{again}, {len(summary.organs)} organs, {summary.labels} labels")
    organs = sorted(summary.organs, key=lambda organ: -organ.share)
    width = max(5, *(len(organ.name) for organ in organs[:_ROWS]))
    print(f"{'organ':<{width}}  labels  flagged   share")
    for organ in organs[:_ROWS]:
        print(f"{organ.name:<{width}}  {organ.cases:6d}  {organ.flagged:7d}  {100 * organ.share:5.1f} %")
    if len(organs) > _ROWS:
        print(f"... and {len(organs) - _ROWS} more organs with no larger share")
    print(summary.trust.summary())
    if summary.unjudged:
        shown = ", ".join(summary.unjudged[:_ROWS])
        more = f" and {len(summary.unjudged) - _ROWS} more" if len(summary.unjudged) > _ROWS else ""
        print(f"too few samples to judge (fewer than {summary.bounds.min_samples}): {shown}{more}")
    print(f"written to {summary.folder}" + (f"; look at {summary.folder / 'report.html'}" if report else ""))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "ukbob_filter",
        "Find the organ labels of a dataset that are probably wrong (Specialized Organ Label Filter). Training then\n"
        "leaves them out; nothing has to be preprocessed again, and the raw files are not changed.",
        "  ukbob_filter -d 4\n"
        "  ukbob_filter -d 4 --epsilon 3 --drop-scan-above 5\n"
        "  ukbob_filter -d 7 --bounds ukbob_data/preprocessed/Dataset004_Hippocampus/solf/bounds.json",
    )
    parser.add_argument("-d", "--dataset", required=True, metavar="ID", help="dataset id (4) or DatasetXXX_Name")
    parser.add_argument(
        "--rule",
        default="solf",
        metavar="NAME",
        help="solf: two of three features outside; volume: normalized volume outside; iqr: plain volume outside "
        "1.5 interquartile ranges; none (default: solf)",
    )
    parser.add_argument(
        "--epsilon",
        type=float,
        metavar="PERCENT",
        help="cut off by the percentile bounds, half at each end (default: 2)",
    )
    parser.add_argument(
        "--min-samples", type=int, metavar="N", help="fewest labels of an organ to learn its bounds from (default: 20)"
    )
    parser.add_argument("--bounds", type=Path, metavar="FILE", help="apply the bounds.json of another run")
    parser.add_argument(
        "--body",
        default="image",
        metavar="SOURCE",
        help="body volume: image (foreground of the first channel), union (of all labels), or a folder of masks "
        "named like the labels (default: image)",
    )
    parser.add_argument(
        "--policy",
        default="ignore",
        metavar="NAME",
        help="what training does with a flagged organ: ignore its voxels, take them as background, or only report "
        "(default: ignore)",
    )
    parser.add_argument(
        "--drop-scan-above",
        type=int,
        metavar="K",
        help="leave out scans with more than K flagged organs (default: none)",
    )
    parser.add_argument("--no-report", action="store_true", help="do not write report.html")
    add_workers(parser)
    add_roots(parser, "raw", "preprocessed")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(None))
