"""ukbob_find_best: compare all models of a dataset and their ensembles by cross-validation."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ukbob_seg.cli.common import add_roots, add_workers, choose_device, command, make_parser, roots_from

if TYPE_CHECKING:
    from ukbob_seg.evaluation.model_selection import Selection


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, compare, print."""
    arguments = _parser().parse_args(argv)
    roots = roots_from(arguments)

    from ukbob_seg.errors import ConfigError
    from ukbob_seg.evaluation.model_selection import SelectionOptions, find_best

    for option in ("ensemble_size", "models_at_once"):
        if arguments.no_ensembles and getattr(arguments, option) is not None:
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} and --no-ensembles exclude each other; give one of them")
    size = 2 if arguments.ensemble_size is None else arguments.ensemble_size
    options = SelectionOptions(
        metric=arguments.metric,
        tolerance_mm=arguments.tolerance_mm,
        folds=_tuple(arguments.folds),
        configurations=_tuple(arguments.configuration),
        networks=_tuple(arguments.network),
        ensemble_size=1 if arguments.no_ensembles else size,
        models_at_once=4 if arguments.models_at_once is None else arguments.models_at_once,
        postprocessing=not arguments.no_postprocessing,
    )
    _print(find_best(arguments.dataset, roots, options, choose_device(arguments.device), arguments.workers))


def _tuple(given: list[str] | None) -> tuple[str, ...] | None:
    return None if given is None else tuple(given)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "ukbob_find_best",
        "Rank the trained models of a dataset, and the averages of every two of them, by their predictions of the "
        "cases that each fold held out. Each fold's cases are predicted by networks of that fold alone, which have not "
        "seen them: those of single models are there from training; averages predict them now, and go on where they "
        "were interrupted. Then decide for the winner which classes lose their stray pieces, write best_model.json, "
        "and print the ukbob_predict command that uses the winner.",
        "  ukbob_find_best -d 4\n"
        "  ukbob_find_best -d 4 -f 0 1 2 3 4 -c 2d 3d_fullres --network swin_unetr plain_conv_unet\n"
        "  ukbob_find_best -d 4 --metric hd95 --no-ensembles\n"
        "  ukbob_find_best -d 4 --ensemble-size 3 --device cuda",
    )
    parser.add_argument("-d", "--dataset", metavar="ID", required=True, help="dataset id (4) or DatasetXXX_Name")
    parser.add_argument(
        "-f", "--folds", nargs="+", metavar="FOLD", help="folds that count (default: all of the splits)"
    )
    parser.add_argument(
        "-c", "--configuration", nargs="+", metavar="NAME", help="only these configurations (default: all trained)"
    )
    parser.add_argument("--network", nargs="+", metavar="NAME", help="only these networks (default: all trained)")
    parser.add_argument(
        "--metric", default="dice", metavar="NAME",
        help="dice (default), iou, nsd, precision, recall: higher is better; hd, hd95, assd: fewer infinite values are "
        "better, then a lower mean",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance-mm", type=float, default=2.0, metavar="MM", help="of the metric nsd (default: 2.0)"
    )
    parser.add_argument("--no-ensembles", action="store_true", help="compare single models alone: nothing is predicted")
    parser.add_argument(
        "--ensemble-size", type=int, metavar="N", help="averages of up to N models (default: 2; every one is predicted)"
    )
    parser.add_argument(
        "--models-at-once", type=int, metavar="N",
        help="models in memory together while averages are predicted (default: 4); with all of them, each predicts "
        "every case only once",
    )  # fmt: skip
    parser.add_argument(
        "--no-postprocessing", action="store_true", help="decide nothing about stray pieces; files stay as they are"
    )
    parser.add_argument("--device", default="auto", help="for averages: auto (default), cpu, cuda, cuda:1, mps")
    add_workers(parser)
    add_roots(parser, "raw", "preprocessed", "results")
    return parser


def _print(selection: Selection) -> None:
    """The ranking, what became of the others, and how to use the winner."""
    options = selection.options
    direction = "lower is better, fewer infinite values first" if options.lower_is_better else "higher is better"
    print(f"{options.metric} of folds {', '.join(selection.folds)} ({direction})")
    print(f"rank  {options.metric:>9}  infinite  values  model")
    for place, ranked in enumerate(selection.ranking, 1):
        score = ranked.score
        name = " + ".join(model.name for model in ranked.candidate.models)
        mean = "-" if score.mean != score.mean else f"{score.mean:.4f}"
        infinite = score.n_infinite if options.lower_is_better else "-"  # only distances can be infinite
        print(f"{place:>4}  {mean:>9}  {infinite:>8}  {score.values:>6}  {name}")
    for reason in selection.skipped.values():
        print(f"not compared: {reason}")
    if selection.comparison is not None:
        kept = ", ".join(selection.comparison.postprocessing.largest_component) or "no class"
        print(f"largest component alone: {kept} -> {selection.winner.folder / 'postprocessing.json'}")
    elif options.postprocessing:
        print("largest component alone: not for regions, whose values are parts of several of them")
    print(f"ranking -> {selection.file}")
    print("predict with the winner:")
    for line in selection.commands:
        print(f"  {line}")


if __name__ == "__main__":
    raise SystemExit(main(None))
