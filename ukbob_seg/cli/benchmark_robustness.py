"""ukbob_benchmark robustness: a trained model on shifted images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.benchmark.robustness_options import METHODS
from ukbob_seg.cli.common import add_roots, choose_device, roots_from
from ukbob_seg.cli.models import (
    adaptation,
    add_adaptation,
    add_model,
    add_postprocessing,
    add_windows,
    largest_components,
    model_folders,
)
from ukbob_seg.evaluation.shift_strengths import definitions

if TYPE_CHECKING:
    import argparse

DESCRIPTION = (
    "Score a trained model on images that are shifted away from what it was trained on, as scanners and protocols do,\n"
    "with and without test-time adaptation; one table of shifts and methods. An interrupted run goes on where it was\n"
    "when the same command is given again. Shifts:\n"
    + "\n".join(f"  {name:<15} {text}" for name, text in definitions().items())
)
EXAMPLE = (
    "  ukbob_benchmark robustness -d 4 -f 0 -o robustness          # imagesTs, labelsTs; else what fold 0 held out\n"
    "  ukbob_benchmark robustness -d 4 -i imagesTs -r labelsTs -o robustness --methods none tta etta etta+tta\n"
    "  ukbob_benchmark robustness -m results/Dataset004_X/3d_fullres__swin_unetr -o quick --cases 4 "
    "--shifts blur 'bias field'\n"
    "  ukbob_benchmark robustness -d 4 -o robustness --part $SLURM_ARRAY_TASK_ID/8    # in a job array"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, cases, shifts, methods, and how it predicts."""
    add_model(parser)
    cases = parser.add_argument_group("what it is judged on")
    cases.add_argument(
        "-i", "--images", type=Path, metavar="DIR",
        help="folder of CASE_0000.ext files (default: imagesTs of the raw dataset if it has labelsTs; else the cases "
        "that each fold held out, predicted by the network of that fold alone)",
    )  # fmt: skip
    cases.add_argument("-r", "--references", type=Path, metavar="DIR", help="folder of their label files, with -i")
    cases.add_argument("--cases", type=int, metavar="N", help="so many cases, drawn by seed (default: all)")
    cases.add_argument("--seed", type=int, metavar="S", help="of the draw of --cases (default: 0)")
    cases.add_argument("--part", metavar="I/N", help="only part I of N of the cases (I from 1), with the same -o")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="for tables, page and records")
    parser.add_argument(
        "--shifts", nargs="+", default=list(definitions()), metavar="NAME",
        help="of those above (default: all); none, the unshifted images, is always among them",
    )  # fmt: skip
    parser.add_argument(
        "--methods", nargs="+", default=["none", "etta"], metavar="NAME",
        help=f"of {', '.join(METHODS)} (default: none etta)",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance-mm", type=float, default=2.0, metavar="MM", help="of the normalized surface Dice (default: 2)"
    )
    add_adaptation(parser)
    add_windows(parser)
    add_postprocessing(parser)
    add_roots(parser, "raw", "preprocessed", "results")


def run(arguments: argparse.Namespace) -> None:
    """Predict, score, print the table."""
    from ukbob_seg.benchmark.robustness import robustness
    from ukbob_seg.benchmark.robustness_options import ModelChoice, RobustnessOptions
    from ukbob_seg.benchmark.robustness_table import plain
    from ukbob_seg.errors import ConfigError
    from ukbob_seg.inference.settings import PredictionSettings
    from ukbob_seg.parallel import Part

    if arguments.seed is not None and arguments.cases is None:
        raise ConfigError("--seed draws cases; give their number with --cases")
    roots = roots_from(arguments)
    adapts = any(METHODS[method].etta for method in arguments.methods if method in METHODS)
    base = PredictionSettings(
        step=arguments.step_size,
        mirror=not arguments.no_mirror,
        window_batch=arguments.window_batch,
        skip_empty=arguments.skip_empty,
        precision=arguments.precision,
        postprocessing=not arguments.no_postprocessing,
        largest_component=largest_components(arguments),
    )
    options = RobustnessOptions(
        shifts=tuple(arguments.shifts),
        methods=tuple(arguments.methods),
        cases=arguments.cases,
        seed=arguments.seed or 0,
        tolerance_mm=arguments.tolerance_mm,
        base=base,
        etta=adaptation(arguments, adapts, "--methods etta"),
    )
    part = None if arguments.part is None else Part.parse(arguments.part)
    folders = model_folders(arguments, roots)
    folds = None if arguments.folds is None else tuple(arguments.folds)
    model = ModelChoice(tuple(folders), folds, arguments.checkpoint, choose_device(arguments.device))
    result = robustness(model, arguments.output, arguments.images, arguments.references, roots, options, part)
    if result.table is None:
        print(
            f"part {arguments.part}: {result.predicted} predictions made; {result.missing} of other parts are lacking"
        )
        return
    print(plain(result.table))
    seconds = ", ".join(f"{method} {value:.2g}" for method, value in result.seconds.items())
    print(f"median seconds per prediction: {seconds}")
    print(f"written to {arguments.output}; look at {arguments.output / 'robustness.html'}")
