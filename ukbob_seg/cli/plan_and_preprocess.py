"""ukbob_plan_and_preprocess: fingerprint, plan, preprocess."""

from __future__ import annotations

from ukbob_seg.cli.common import add_cluster, add_roots, add_workers, command, make_parser, roots_from
from ukbob_seg.cli.planning import add_dataset, add_plan_options, describe, given_plan_options, plan_options
from ukbob_seg.errors import ConfigError


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, run, print."""
    parser = make_parser(
        "ukbob_plan_and_preprocess",
        "Read a raw dataset, decide how to train on it, and preprocess its training cases. Interrupted runs go on "
        "where they stopped; unchanged cases are not done again.",
        "  ukbob_plan_and_preprocess -d 4\n"
        "  ukbob_plan_and_preprocess -d 4 --verify --memory-gb 8 -c 3d_fullres 3d_lowres",
    )
    add_dataset(parser)
    parser.add_argument(
        "-c", "--configurations", nargs="+", default=["3d_fullres"], metavar="NAME",
        help="configurations to preprocess: 3d_fullres (default), 2d; for large cases 3d_lowres, 3d_cascade_fullres",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true", help="read and check every case again, even when nothing has changed"
    )
    parser.add_argument(
        "--verify-only", action="store_true", help="check every case, report all problems, write nothing"
    )
    parser.add_argument("--allow-empty", action="store_true", help="accept cases whose label map has no foreground")
    parser.add_argument(
        "--keep-plans", action="store_true",
        help="follow the plans.json that is there: after adding cases, only these are preprocessed",
    )  # fmt: skip
    parser.add_argument("--no-preprocess", action="store_true", help="stop after planning")
    parser.add_argument(
        "--report", action="store_true",
        help="write report.html: sizes, intensities of every class, the plan, pictures before and after; also when "
        "all cases are up to date",
    )  # fmt: skip
    add_plan_options(parser)
    add_workers(parser)
    add_cluster(parser, part=None)
    add_roots(parser, "raw", "preprocessed")
    arguments = parser.parse_args(argv)
    roots = roots_from(arguments)

    if arguments.verify_only:
        from ukbob_seg.cli.verification import verify_and_report

        verify_and_report(roots, arguments.dataset, arguments.workers, arguments.allow_empty)
        return

    if arguments.keep_plans and (given := given_plan_options(arguments)):
        raise ConfigError(f"--keep-plans follows plans.json and takes no {', '.join(given)}; edit plans.json instead")

    from ukbob_seg.preprocessing.pipeline import plan_and_preprocess

    prepared = plan_and_preprocess(
        arguments.dataset,
        roots,
        None if arguments.keep_plans else plan_options(arguments),
        configurations=() if arguments.no_preprocess else arguments.configurations,
        workers=arguments.workers,
        verify=arguments.verify,
        allow_empty=arguments.allow_empty,
        keep_plans=arguments.keep_plans,
        scheduler=arguments.scheduler,
        report=arguments.report,
    )
    if arguments.verify:
        print(f"verified {len(prepared.fingerprint.cases)} cases: no problems")
    print(describe(prepared.plans))
    if not arguments.no_preprocess:
        current = prepared.cases_total - prepared.cases_done
        print(f"preprocessed {prepared.cases_done} cases ({current} were up to date)")
    print(f"-> {prepared.folder / 'report.html' if arguments.report else prepared.folder}")


if __name__ == "__main__":
    raise SystemExit(main(None))
