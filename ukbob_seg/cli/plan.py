"""ukbob_plan: the second step of ukbob_plan_and_preprocess."""

from __future__ import annotations

from ukbob_seg.cli.common import add_roots, command, make_parser, roots_from
from ukbob_seg.cli.planning import add_dataset, add_plan_options, describe, plan_options


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, run, print."""
    parser = make_parser(
        "ukbob_plan",
        "Decide spacing, normalization, patch, batch and network sizes from fingerprint.json and write plans.json. "
        "You may edit plans.json by hand; ukbob_preprocess and ukbob_train follow it.",
        "  ukbob_plan -d 4 --memory-gb 8 --feature-size 24\n  ukbob_plan -d 4 --preset nnunet\n"
        "  ukbob_plan -d 4 --networks unetr segresnet",
    )
    add_dataset(parser)
    add_plan_options(parser)
    add_roots(parser, "raw", "preprocessed")
    arguments = parser.parse_args(argv)
    roots = roots_from(arguments)

    from ukbob_seg.dataset.paths import find_dataset
    from ukbob_seg.dataset.spec import DatasetSpec
    from ukbob_seg.preprocessing.fingerprint import Fingerprint
    from ukbob_seg.preprocessing.planner import plan

    raw_folder = find_dataset(roots.raw, arguments.dataset)
    folder = roots.preprocessed / raw_folder.name
    fingerprint = Fingerprint.load(folder / "fingerprint.json")
    plans = plan(fingerprint, DatasetSpec.load(raw_folder), plan_options(arguments))
    plans.save(folder / "plans.json")
    print(describe(plans))
    print(f"-> {folder / 'plans.json'}")


if __name__ == "__main__":
    raise SystemExit(main(None))
