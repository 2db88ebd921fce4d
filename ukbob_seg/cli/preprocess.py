"""ukbob_preprocess: the third step of ukbob_plan_and_preprocess."""

from __future__ import annotations

from ukbob_seg.cli.common import add_roots, add_workers, command, make_parser, roots_from
from ukbob_seg.cli.planning import add_dataset


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, run, print."""
    parser = make_parser(
        "ukbob_preprocess",
        "Crop, normalise, resample and store the training cases as plans.json says. Cases that are present and up "
        "to date are left alone.",
        "  ukbob_preprocess -d 4 -c 3d_fullres --workers 4",
    )
    add_dataset(parser)
    parser.add_argument(
        "-c", "--configurations", nargs="+", default=["3d_fullres"], metavar="NAME", help="default: 3d_fullres"
    )
    parser.add_argument("--allow-empty", action="store_true", help="accept cases whose label map has no foreground")
    add_workers(parser)
    add_roots(parser, "raw", "preprocessed")
    arguments = parser.parse_args(argv)
    roots = roots_from(arguments)

    from ukbob_seg.dataset.paths import find_dataset
    from ukbob_seg.preprocessing.plans import Plans
    from ukbob_seg.preprocessing.preprocessor import preprocess

    raw_folder = find_dataset(roots.raw, arguments.dataset)
    folder = roots.preprocessed / raw_folder.name
    plans = Plans.load(folder / "plans.json")
    for name in arguments.configurations:
        done = preprocess(raw_folder, folder, plans, name, arguments.workers, arguments.allow_empty)
        print(f"{name}: {done} cases preprocessed -> {folder / name}")
