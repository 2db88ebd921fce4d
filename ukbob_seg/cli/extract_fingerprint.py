"""ukbob_extract_fingerprint: the first step of ukbob_plan_and_preprocess."""

from __future__ import annotations

from ukbob_seg.cli.common import add_cluster, add_roots, add_workers, command, make_parser, roots_from
from ukbob_seg.cli.planning import add_dataset
from ukbob_seg.errors import ConfigError


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
    add_cluster(parser, "then run once without it")
    add_roots(parser, "raw", "preprocessed")
    arguments = parser.parse_args(argv)
    roots = roots_from(arguments)

    from ukbob_seg.dataset.paths import find_dataset
    from ukbob_seg.parallel import Part
    from ukbob_seg.preprocessing.fingerprint import extract_fingerprint, read_part

    raw_folder = find_dataset(roots.raw, arguments.dataset)
    folder = roots.preprocessed / raw_folder.name
    if arguments.part is not None:
        if arguments.scheduler is not None:
            raise ConfigError("give either --part or --scheduler: a part is read on this machine")
        part = Part.parse(arguments.part)
        done = read_part(raw_folder, folder, part, arguments.workers, arguments.allow_empty, arguments.verify)
        print(
            f"part {part.number} of {part.total}: {done} cases read; when all parts are done, run the same command "
            "once without --part"
        )
        return
    fingerprint = extract_fingerprint(
        raw_folder,
        folder,
        arguments.workers,
        arguments.allow_empty,
        force=arguments.verify,
        scheduler=arguments.scheduler,
    )
    print(f"{len(fingerprint.cases)} cases -> {folder / 'fingerprint.json'}")


if __name__ == "__main__":
    raise SystemExit(main(None))
