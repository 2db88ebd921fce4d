"""ukbob_find_postprocessing: decide from validation predictions which classes keep their largest component alone."""

from __future__ import annotations

from pathlib import Path

from ukbob_seg.cli.common import add_roots, add_workers, command, make_parser, roots_from
from ukbob_seg.cli.models import add_trained, given_models, trained_model


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, compare, print."""
    parser = make_parser(
        "ukbob_find_postprocessing",
        "Compare, class by class, the Dice of all folds' validation predictions with and without stray pieces (all but "
        "the largest connected part), and write postprocessing.json into the model folder. ukbob_predict then removes "
        "stray pieces of those classes for which that helped. Train several folds first, with their final validation.",
        "  ukbob_find_postprocessing -d 4\n  ukbob_find_postprocessing -d 4 --network plain_conv_unet",
    )
    parser.add_argument("-d", "--dataset", metavar="ID", required=True, help="dataset id (4) or DatasetXXX_Name")
    parser.add_argument(
        "-m", "--model", type=Path, metavar="DIR", help="model folder (default: by the next two options)"
    )
    add_trained(parser, when="")
    add_workers(parser)
    add_roots(parser, "raw", "results")
    arguments = parser.parse_args(argv)
    roots = roots_from(arguments)

    from ukbob_seg.dataset.paths import find_dataset
    from ukbob_seg.evaluation.postprocessing import find_postprocessing

    raw = find_dataset(roots.raw, arguments.dataset)
    (folder,) = given_models(arguments) or [trained_model(arguments, roots, raw.name)]
    found = find_postprocessing(folder, raw, arguments.workers)
    width = max(5, *(len(name) for name in found.table.index))
    print(f"{'class':<{width}}  cases   before    after  better  worse")
    for name, row in found.table.iterrows():
        mark = "  -> largest component alone" if row["kept"] else ""
        print(
            f"{name:<{width}}  {row['cases']:>5}  {row['before']:>7.4f}  {row['after']:>7.4f}  {row['better']:>6}  "
            f"{row['worse']:>5}{mark}"
        )
    print(f"folds {', '.join(found.folds)} -> {folder / 'postprocessing.json'}")


if __name__ == "__main__":
    raise SystemExit(main(None))
