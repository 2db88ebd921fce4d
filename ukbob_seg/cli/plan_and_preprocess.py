"""ukbob_plan_and_preprocess: fingerprint, plan, preprocess."""

from __future__ import annotations

from ukbob_seg.cli.common import add_roots, add_workers, command, make_parser, roots_from
from ukbob_seg.cli.planning import add_dataset, add_plan_options, describe, plan_options


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
        help="configurations to preprocess: 3d_fullres (default), 2d, 3d_lowres (when the plan has one)",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true", help="read and check every case again, even when nothing has changed"
    )
    parser.add_argument(
        "--verify-only", action="store_true", help="check every case, report all problems, write nothing"
    )
    parser.add_argument("--allow-empty", action="store_true", help="accept cases whose label map has no foreground")
    parser.add_argument("--no-preprocess", action="store_true", help="stop after planning")
    add_plan_options(parser)
    add_workers(parser)
    add_roots(parser, "raw", "preprocessed")
    arguments = parser.parse_args(argv)
    roots = roots_from(arguments)

    if arguments.verify_only:
        from ukbob_seg.cli.verification import verify_and_report

        verify_and_report(roots, arguments.dataset, arguments.workers, arguments.allow_empty)
        return

    from ukbob_seg.preprocessing.pipeline import plan_and_preprocess

    prepared = plan_and_preprocess(
        arguments.dataset,
        roots,
        plan_options(arguments),
        configurations=() if arguments.no_preprocess else arguments.configurations,
        workers=arguments.workers,
        verify=arguments.verify,
        allow_empty=arguments.allow_empty,
    )
    if arguments.verify:
        print(f"verified {len(prepared.fingerprint.cases)} cases: no problems")
    print(describe(prepared.plans))
    if not arguments.no_preprocess:
        total = len(prepared.fingerprint.cases) * len(arguments.configurations)
        print(f"preprocessed {prepared.cases_done} cases ({total - prepared.cases_done} were up to date)")
    print(f"-> {prepared.folder}")
