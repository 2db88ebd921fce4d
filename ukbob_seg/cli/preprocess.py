"""ukbob_preprocess: the third step of ukbob_plan_and_preprocess."""

from __future__ import annotations

import logging

from ukbob_seg.cli.common import add_cluster, add_roots, add_workers, command, make_parser, roots_from
from ukbob_seg.cli.planning import add_dataset

log = logging.getLogger(__name__)


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, run, print."""
    parser = make_parser(
        "ukbob_preprocess",
        "Crop, normalise, resample and store the training cases as plans.json says. Cases that are present and up "
        "to date are left alone.",
        "  ukbob_preprocess -d 4 -c 3d_fullres --workers 4\n  ukbob_preprocess -d 4 --part $SLURM_ARRAY_TASK_ID/16",
    )
    add_dataset(parser)
    parser.add_argument(
        "-c", "--configurations", nargs="+", default=["3d_fullres"], metavar="NAME", help="default: 3d_fullres"
    )
    parser.add_argument("--allow-empty", action="store_true", help="accept cases whose label map has no foreground")
    parser.add_argument(
        "--verify", action="store_true", help="look into every file that is there, instead of trusting size and time"
    )
    add_workers(parser)
    add_cluster(parser, "nothing is left to do when all are done")
    add_roots(parser, "raw", "preprocessed")
    arguments = parser.parse_args(argv)
    roots = roots_from(arguments)

    from ukbob_seg.dataset.paths import find_dataset
    from ukbob_seg.parallel import Cluster, Part
    from ukbob_seg.preprocessing.fingerprint import describe_changes
    from ukbob_seg.preprocessing.plans import Plans
    from ukbob_seg.preprocessing.preprocessor import arrays_folder, preprocess

    raw_folder = find_dataset(roots.raw, arguments.dataset)
    folder = roots.preprocessed / raw_folder.name
    plans = Plans.load(folder / "plans.json")
    cluster = Cluster(arguments.scheduler, None if arguments.part is None else Part.parse(arguments.part))
    if (changes := describe_changes(plans.fingerprint, raw_folder)) is not None:
        log.warning(changes)
    for arrays, name in {arrays_folder(folder, plans, name): name for name in arguments.configurations}.items():
        done = preprocess(
            raw_folder,
            folder,
            plans,
            name,
            arguments.workers,
            arguments.allow_empty,
            verify=arguments.verify,
            cluster=cluster,
        )
        print(f"{name}: {done} cases preprocessed -> {arrays}")


if __name__ == "__main__":
    raise SystemExit(main(None))
