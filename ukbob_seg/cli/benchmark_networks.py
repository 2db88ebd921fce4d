"""ukbob_benchmark networks: several networks under one budget, in the layout of the paper's tables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.cli.common import add_roots, choose_device, roots_from
from ukbob_seg.cli.training_options import add_machine, add_recipe, given_recipe, limit_threads

if TYPE_CHECKING:
    import argparse

    from ukbob_seg.benchmark.networks import NetworkStudy

DESCRIPTION = (
    "Train several networks with one budget on the same folds and seeds, score them on the cases that each fold held\n"
    "out (or on test cases), and print them in the layout of the paper's tables: Dice and HD with their spread over\n"
    "runs, parameters, training time, peak memory. Every run has a process of its own. The same command again goes\n"
    "on, and may have further networks, folds and seeds."
)
EXAMPLE = (
    "  ukbob_benchmark networks -d 4 --networks swin_unetr plain_conv_unet unetr -o comparison\n"
    "  ukbob_benchmark networks -d 610 --networks swin_unetr unetr --folds 0 1 2 3 4 --epochs 100 -o all --paper btcv\n"
    "  ukbob_benchmark networks -d 4 --networks unet vnet --seeds 0 1 2 -o comparison --part $SLURM_ARRAY_TASK_ID/6"
)
WITHOUT = ("seed", "early-stopping")  # decided by the study, or not the same budget for all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained on what, and how."""
    parser.add_argument("-d", "--dataset", metavar="ID", required=True, help="dataset id (4) or DatasetXXX_Name")
    parser.add_argument(
        "--networks", nargs="+", required=True, metavar="NAME",
        help="of the plans, or planned now: swin_unetr, plain_conv_unet, unet, unetr, resenc_unet_m, ...",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", required=True,
        help="folder of the study, for its models, networks.csv, networks.json, networks.md and networks.html",
    )  # fmt: skip
    parser.add_argument("--folds", nargs="+", default=["0"], metavar="FOLD", help="0 (default), 1, 2, ...")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="of weights and patches; a run for each (0)"
    )
    parser.add_argument(
        "-c",
        "--configuration",
        default="3d_fullres",
        help="3d_fullres (default), 3d_lowres or 2d, as in the plans",
    )
    parser.add_argument(
        "-i", "--images", type=Path, metavar="DIR", help="score on these CASE_0000.ext files, not on held-out cases"
    )
    parser.add_argument("-r", "--references", type=Path, metavar="DIR", help="their label files, with -i")
    parser.add_argument(
        "--checkpoint", choices=("final", "best"), default="final",
        help="which is scored: final (default), or best, which held-out cases have chosen",
    )  # fmt: skip
    parser.add_argument(
        "--paper", metavar="TABLE", help="the paper's rows of a table beside: ukbob, btcv, brats, ... (see table)"
    )
    parser.add_argument(
        "--part", metavar="I/N",
        help="only part I of N of the runs (I from 1), for job arrays; then once without, which collects",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    run = parser.add_argument_group("run")
    run.add_argument("--no-filter", action="store_true", help="ignore the flags of ukbob_filter")
    add_machine(run)
    add_recipe(
        parser,
        "budget and recipe (default: 500 epochs of 250 steps for all, 3000 with preset ukbob; the rest as for "
        "ukbob_train --network NAME)",
        without=WITHOUT,
    )
    add_roots(parser, "raw", "preprocessed")


def run(arguments: argparse.Namespace) -> None:
    """Train what is missing; without --part, collect and draw."""
    from ukbob_seg.benchmark.networks import run_networks
    from ukbob_seg.benchmark.networks_run import Launcher
    from ukbob_seg.benchmark.table import paper_table, plain
    from ukbob_seg.errors import ConfigError, UkbobError, listing
    from ukbob_seg.parallel import Part
    from ukbob_seg.training.config import RunOptions

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("ukbob_benchmark networks is not for torchrun; use more machines or GPUs with --part")
    if arguments.paper is not None:
        paper_table(arguments.paper)
    part = None if arguments.part is None else Part.parse(arguments.part)
    limit_threads(arguments.threads)
    options = RunOptions(
        device=choose_device(arguments.device),
        loader_workers=arguments.loader_workers,
        compile=arguments.compile,
        stop_on_signals=True,
    )
    study = _study(arguments)
    finished, failed = run_networks(study, options, part, Launcher(arguments.threads))
    if part is not None:
        print(f"part {part.number} of {part.total}: {len(finished)} runs -> {arguments.output}")
    else:
        from ukbob_seg.benchmark.networks_report import write_report
        from ukbob_seg.benchmark.networks_results import PAGE, collect_results

        if finished:
            results = collect_results(study, finished)
            results.write(arguments.output, failed, arguments.paper)
            write_report(arguments.output / PAGE, results, failed, arguments.paper)
            print(plain(results.cells(arguments.paper)))
            print(f"-> {arguments.output / PAGE}")
    if failed:
        message = next(iter(failed.values()))
        raise UkbobError(f"{len(failed)} of the runs failed: {listing(list(failed), 3)}; the first: {message}")


def _study(arguments: argparse.Namespace) -> NetworkStudy:
    """What the command line asks for, checked as far as it can be."""
    from ukbob_seg.benchmark.networks import NetworkStudy
    from ukbob_seg.dataset.paths import find_dataset
    from ukbob_seg.errors import ConfigError
    from ukbob_seg.preprocessing.plans import Plans
    from ukbob_seg.training.config import recipe
    from ukbob_seg.training.setup import choose_config

    roots, given = roots_from(arguments), given_recipe(arguments)
    folder = find_dataset(roots.preprocessed, arguments.dataset)
    usual = recipe("swin_unetr", Plans.load(folder / "plans.json").preset)
    if len(set(arguments.networks)) < len(arguments.networks):
        raise ConfigError(f"--networks has a name twice: {', '.join(arguments.networks)}")
    for name in ("epochs", "iterations_per_epoch"):  # one budget, though recipes differ in it
        given[name] = getattr(usual, name) if given.get(name) is None else given[name]
    recipes = {name: choose_config(arguments.dataset, roots, name, **given) for name in arguments.networks}
    return NetworkStudy(
        output=arguments.output,
        roots=roots,
        dataset=folder.name,
        recipes=recipes,
        folds=tuple(arguments.folds),
        seeds=tuple(arguments.seeds),
        configuration=arguments.configuration,
        checkpoint=arguments.checkpoint,
        use_filter=not arguments.no_filter,
        images=arguments.images,
        references=arguments.references,
    )
