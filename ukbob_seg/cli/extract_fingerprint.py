"""ukbob_extract_fingerprint: the first step of ukbob_plan_and_preprocess."""

from __future__ import annotations

from ukbob_seg.cli.common import add_roots, add_workers, command, make_parser, roots_from
from ukbob_seg.cli.planning import add_dataset


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, run, print."""
    parser = make_parser(
        "ukbob_extract_fingerprint",
        "Read and check every training case once and write fingerprint.json (sizes, spacings, intensities).",
        "  ukbob_extract_fingerprint -d 4 --verify",
    )
    add_dataset(parser)
    parser.add_argument("--verify", action="store_true", help="read every case again even when nothing has changed")
    parser.add_argument("--allow-empty", action="store_true", help="accept cases whose label map has no foreground")
    add_workers(parser)
    add_roots(parser, "raw", "preprocessed")
    arguments = parser.parse_args(argv)
    roots = roots_from(arguments)

    from ukbob_seg.dataset.paths import find_dataset
    from ukbob_seg.preprocessing.fingerprint import extract_fingerprint

    raw_folder = find_dataset(roots.raw, arguments.dataset)
    folder = roots.preprocessed / raw_folder.name
    fingerprint = extract_fingerprint(
        raw_folder, folder, arguments.workers, arguments.allow_empty, force=arguments.verify
    )
    print(f"{len(fingerprint.cases)} cases -> {folder / 'fingerprint.json'}")
