"""ukbob_filter: find the organ labels that cannot be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.cli.common import add_roots, add_workers, command, make_parser, roots_from
from ukbob_seg.errors import ConfigError, listing

if TYPE_CHECKING:
    import argparse

    from ukbob_seg.filtering.cohort import FilterSummary
    from ukbob_seg.filtering.config import FilterConfig

_ROWS = 15


@command
def main(argv: list[str] | None = None) -> None:
    """Parse arguments, filter, print a short table."""
    arguments = _parser().parse_args(argv)

    from ukbob_seg.dataset.paths import find_dataset
    from ukbob_seg.filtering.cohort import measure_part, solf_filter
    from ukbob_seg.parallel import Part

    config = _config(arguments)
    part = None if arguments.part is None else Part.parse(arguments.part)
    if arguments.reference is not None and not arguments.ablate:
        raise ConfigError("--reference belongs to --ablate")
    if part is not None and arguments.ablate:
        raise ConfigError("--part only measures; run --ablate after all parts, without --part")
    if arguments.ablate:
        _refuse_with_ablate(arguments)
    roots = roots_from(arguments)
    raw = find_dataset(roots.raw, arguments.dataset)
    output = roots.preprocessed / raw.name / "solf"
    if part is not None:
        computed = measure_part(raw, output, part, config)
        print(
            f"part {part.number} of {part.total}: {computed} scans measured; when all parts are done, run the same "
            "command once without --part"
        )
    elif arguments.ablate:
        from ukbob_seg.filtering.ablation import ablate

        print(ablate(raw, output, config, arguments.reference))
    else:
        print_summary(solf_filter(raw, output, config), config.report)


def _refuse_with_ablate(arguments: argparse.Namespace) -> None:
    """Options that an ablation, which goes through all rules and settings and decides nothing, has no use for."""
    given = {
        "--rule": arguments.rule is not None,
        "--epsilon": arguments.epsilon is not None,
        "--confidence": arguments.confidence is not None,
        "--review": arguments.review is not None,
        "--policy": arguments.policy is not None,
        "--drop-scan-above": arguments.drop_scan_above is not None,
        "--no-report": arguments.no_report,
    }
    useless = [name for name, is_given in given.items() if is_given]
    if useless:
        raise ConfigError(f"--ablate goes through all rules and settings and decides nothing; leave out {useless[0]}")


def _config(arguments: argparse.Namespace) -> FilterConfig:
    from ukbob_seg.filtering.config import FilterConfig
    from ukbob_seg.filtering.policies import FilterPolicy

    columns = tuple(name.strip() for name in (arguments.stratify_by or "").split(",") if name.strip())
    return FilterConfig(
        rule=arguments.rule or "solf",
        epsilon=arguments.epsilon,
        min_samples=arguments.min_samples,
        confidence=arguments.confidence,
        bounds_file=arguments.bounds,
        strata_file=arguments.strata,
        strata_columns=columns,
        body=arguments.body,
        evidence=arguments.evidence,
        policy=FilterPolicy(arguments.policy or "ignore", arguments.drop_scan_above),
        review=arguments.review is not None,
        review_file=Path(arguments.review) if arguments.review else None,
        skip_unreadable=arguments.skip_unreadable,
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        report=not arguments.no_report,
    )


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
        reason = f"too few samples to judge (fewer than {summary.bounds.any.min_samples})"
        if summary.bounds_file is not None:
            reason = f"not judged (no bounds in {summary.bounds_file})"
        print(f"{reason}: {listing(summary.unjudged, _ROWS)}")
    if summary.verdicts:
        print(f"{summary.verdicts} labels were decided by the verdicts of a reviewer")
    if summary.skipped:
        print(f"{len(summary.skipped)} scans could not be measured and were left out")
    print(f"written to {summary.folder}" + (f"; look at {summary.folder / 'report.html'}" if report else ""))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "ukbob_filter",
        "Find the organ labels of a dataset that are probably wrong (Specialized Organ Label Filter). Training then\n"
        "leaves them out; nothing has to be preprocessed again, and the raw files are not changed.",
        "  ukbob_filter -d 4\n"
        "  ukbob_filter -d 4 --epsilon 3 --drop-scan-above 5\n"
        "  ukbob_filter -d 4 --rule anatomy --evidence --review     # then edit review.csv and run it again\n"
        "  ukbob_filter -d 4 --strata raw/Dataset004_X/demographics.csv --stratify-by sex\n"
        "  ukbob_filter -d 7 --bounds ukbob_data/preprocessed/Dataset004_Hippocampus/solf/bounds.json\n"
        "  ukbob_filter -d 4 --part $SLURM_ARRAY_TASK_ID/16       # in a job array; then once without --part\n"
        "  ukbob_filter -d 4 --ablate --reference manual_labels",
    )
    parser.add_argument("-d", "--dataset", required=True, metavar="ID", help="dataset id (4) or DatasetXXX_Name")
    parser.add_argument(
        "--rule",
        metavar="NAME",
        help="solf: two of three features outside; volume: normalized volume outside; iqr: plain volume outside "
        "1.5 interquartile ranges; joint: the three features together improbable; anatomy (with --evidence): size, "
        "axes and place beside the other organs improbable; none (default: solf)",
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
    parser.add_argument(
        "--confidence",
        type=float,
        metavar="P",
        help="share of ordinary labels that the rules joint and anatomy keep (default: 0.999)",
    )
    parser.add_argument("--bounds", type=Path, metavar="FILE", help="apply the bounds.json of another run")
    parser.add_argument(
        "--strata", type=Path, metavar="FILE", help="CSV with a column 'case' that tells the kind of each subject"
    )
    parser.add_argument(
        "--stratify-by",
        metavar="COLUMNS",
        help="columns of --strata, separated by commas (sex,age_band): bounds are learnt for each kind by itself",
    )
    parser.add_argument(
        "--body",
        default="image",
        metavar="SOURCE",
        help="body volume: image (foreground of the first channel), union (of all labels), or a folder of masks "
        "named like the labels (default: image)",
    )
    parser.add_argument(
        "--policy",
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
    parser.add_argument(
        "--evidence",
        action="store_true",
        help="also measure pieces, axes and places; marks stray pieces and exchanged left and right organs",
    )
    parser.add_argument(
        "--review",
        nargs="?",
        const="",
        metavar="FILE",
        help="write review.csv, the most doubtful labels first; write accept or reject into its column 'verdict' and "
        "run again: verdicts overrule the filter. Verdicts in FILE are added to them",
    )
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out cases that cannot be measured instead of stopping"
    )
    parser.add_argument("--no-report", action="store_true", help="do not write report.html")
    parser.add_argument(
        "--ablate",
        action="store_true",
        help="instead of filtering, write ablation.csv and ablation.html: flagged shares for epsilon 0 to 5 and for "
        "each subset of features; no flags are changed",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FOLDER",
        help="with --ablate: manual labels of some cases; adds the Dice of kept and of flagged labels for each rule",
    )
    parser.add_argument(
        "--part", metavar="I/N", help="only measure part I of N (I from 1), for job arrays; then run without --part"
    )
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="measure on the workers of a Dask scheduler (tcp://host:8786)"
    )
    add_workers(parser)
    add_roots(parser, "raw", "preprocessed")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(None))
