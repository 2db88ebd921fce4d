"""ukbob_benchmark scaling: Dice against the number of training cases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.cli.common import add_roots, choose_device, roots_from
from ukbob_seg.cli.training_options import (
    add_machine,
    add_network,
    add_pretrained,
    add_recipe,
    given_recipe,
    limit_threads,
)

if TYPE_CHECKING:
    import argparse

    from ukbob_seg.benchmark.scaling import ScalingStudy
    from ukbob_seg.training.config import RunOptions

DESCRIPTION = (
    "Train with one budget on shares of a fold's training cases, score all on the same held-out cases, and draw Dice\n"
    "against the number of cases. With --downstream every network is then fine-tuned on another dataset, beside a\n"
    "training from fresh weights (Figure 10 of the paper). The same command again goes on, and collects what is done."
)
EXAMPLE = (
    "  ukbob_benchmark scaling -d 4 -f 0 -o scaling --epochs 40 --iterations-per-epoch 250\n"
    "  ukbob_benchmark scaling -d 611 -f 0 -o scaling --fractions 0.1 0.25 0.5 0.75 1 --seeds 0 1 2 --downstream 610\n"
    "  ukbob_benchmark scaling -d 4 -f 0 -o scaling --seeds 0 1 2 --part $SLURM_ARRAY_TASK_ID/12    # in a job array"
)
# Decided by the study itself, or not the same budget for all.
WITHOUT = ("subset-fraction", "seed", "early-stopping")
DOWNSTREAM_WITHOUT = ("seed", "early-stopping")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained on what, and how."""
    parser.add_argument("-d", "--dataset", metavar="ID", required=True, help="dataset id (4) or DatasetXXX_Name")
    parser.add_argument("-f", "--fold", metavar="FOLD", default="0", help="0 (default), 1, 2, ...; not all")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", required=True,
        help="folder of the study, for its models, scaling.csv, scaling.json and scaling.html",
    )  # fmt: skip
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=(0.1, 0.25, 0.5, 1.0), metavar="F",
        help="shares of the training subjects (default: 0.1 0.25 0.5 1)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=(0,), metavar="N",
        help="a run of every fraction for each: other cases, weights and patches (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", choices=("final", "best"), default="final",
        help="which is scored and fine-tuned: final (default), or best, which the scored cases have chosen",
    )  # fmt: skip
    parser.add_argument(
        "--part", metavar="I/N",
        help="only part I of N of the runs (I from 1), for job arrays; then once without, which collects",
    )  # fmt: skip
    add_network(parser)
    run = parser.add_argument_group("run")
    add_pretrained(run)
    run.add_argument("--no-filter", action="store_true", help="ignore the flags of ukbob_filter")
    add_machine(run)
    add_recipe(parser, "budget and recipe of the subsets (default: as for ukbob_train)", without=WITHOUT)
    downstream = parser.add_argument_group("downstream")
    downstream.add_argument("--downstream", metavar="ID", help="fine-tune every network on this dataset")
    downstream.add_argument("--downstream-fold", default="0", metavar="FOLD", help="its fold (default: 0)")
    add_recipe(
        parser,
        "budget and recipe of the fine-tuning (default: as for ukbob_train --pretrained)",
        "downstream-",
        DOWNSTREAM_WITHOUT,
    )
    add_roots(parser, "raw", "preprocessed")


def run(arguments: argparse.Namespace) -> None:
    """Train what is missing; without --part, collect and draw."""
    from ukbob_seg.benchmark.scaling import run_scaling
    from ukbob_seg.errors import ConfigError
    from ukbob_seg.parallel import Part
    from ukbob_seg.training.config import RunOptions

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("ukbob_benchmark scaling is not for torchrun; use more machines or GPUs with --part")
    part = None if arguments.part is None else Part.parse(arguments.part)
    limit_threads(arguments.threads)
    options = RunOptions(
        device=choose_device(arguments.device),
        loader_workers=arguments.loader_workers,
        pretrained=arguments.pretrained,
        pretrained_dataset=arguments.pretrained_dataset,
        pretrained_merging=arguments.pretrained_merging,
        compile=arguments.compile,
        stop_on_signals=True,
    )
    study = _study(arguments, options)
    runs = run_scaling(study, options, part)
    if part is not None:
        print(f"part {part.number} of {part.total}: {len(runs)} runs -> {arguments.output}")
        return

    from ukbob_seg.benchmark.scaling_report import write_report
    from ukbob_seg.benchmark.scaling_results import PAGE, collect_results, table_lines

    results = collect_results(study, runs)
    results.write(arguments.output)
    write_report(arguments.output / PAGE, results)
    print("\n".join(table_lines(results)))
    print(f"-> {arguments.output / PAGE}")


def _study(arguments: argparse.Namespace, options: RunOptions) -> ScalingStudy:
    """What the command line asks for, checked as far as it can be."""
    from ukbob_seg.benchmark.scaling import ScalingStudy, Stage
    from ukbob_seg.dataset.paths import find_dataset
    from ukbob_seg.errors import ConfigError
    from ukbob_seg.training.setup import choose_config, default_network

    roots = roots_from(arguments)
    network = arguments.network or default_network(arguments.dataset, roots, arguments.configuration)

    def stage(dataset: str, fold: str, prefix: str, pretrained: bool) -> Stage:
        config = choose_config(dataset, roots, network, pretrained, **given_recipe(arguments, prefix))
        return Stage(find_dataset(roots.preprocessed, dataset).name, fold, config)

    if arguments.downstream is None and any(v is not None for v in given_recipe(arguments, "downstream-").values()):
        raise ConfigError("options that begin with --downstream- need --downstream")
    downstream = None
    if arguments.downstream is not None:
        # The recipe of fine-tuning for the fresh weights too: both get the same.
        downstream = stage(arguments.downstream, arguments.downstream_fold, "downstream-", True)
    return ScalingStudy(
        output=arguments.output,
        roots=roots,
        upstream=stage(arguments.dataset, arguments.fold, "", options.pretrained is not None),
        downstream=downstream,
        fractions=tuple(arguments.fractions),
        seeds=tuple(arguments.seeds),
        configuration=arguments.configuration,
        network=network,
        checkpoint=arguments.checkpoint,
        use_filter=not arguments.no_filter,
    )
