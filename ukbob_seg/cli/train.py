"""ukbob_train: train folds, then predict and score their validation cases."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.cli.common import add_roots, choose_device, command, is_first_process, make_parser, roots_from
from ukbob_seg.cli.training_options import (
    add_machine,
    add_network,
    add_pretrained,
    add_recipe,
    given_recipe,
    limit_threads,
)

if TYPE_CHECKING:
    from ukbob_seg.dataset.paths import Roots
    from ukbob_seg.training.config import RunOptions, TrainingConfig


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, then train and validate one fold after the other; under torchrun in all its processes alike."""
    arguments = _parser().parse_args(argv)
    if not is_first_process():
        logging.getLogger("ukbob_seg").setLevel(logging.ERROR)

    from ukbob_seg.training.distributed import gather, process_group, together
    from ukbob_seg.training.folds import is_validated
    from ukbob_seg.training.trainer import train

    with process_group(_processes()):
        run = together(lambda: _prepare(arguments))
        for fold, options in run.folds.items():
            folder = train(
                arguments.dataset,
                fold,
                run.roots,
                run.config,
                options,
                configuration=arguments.configuration,
                network=run.network,
                use_filter=not arguments.no_filter,
            )
            _tell(f"trained -> {folder}")
            # Asked in the first process for all, before it writes.
            done = len(run.folds) > 1 and options.resume and gather(is_validated(folder))[0]
            if not arguments.no_validation and not done:
                _validate(folder, fold, run, options.device)


@dataclass(frozen=True)
class _Run:
    """What the command line asks for, checked."""

    roots: Roots
    network: str
    config: TrainingConfig
    folds: dict[str, RunOptions]


def _prepare(arguments: argparse.Namespace) -> _Run:
    """Everything that can be refused before the first fold starts."""
    from ukbob_seg.dataset.paths import find_dataset
    from ukbob_seg.dataset.spec import DatasetSpec, require_cases
    from ukbob_seg.training.config import RunOptions
    from ukbob_seg.training.folds import options_per_fold
    from ukbob_seg.training.setup import choose_config, default_network, recorded_config

    roots = roots_from(arguments)
    device = _device(arguments.device)
    limit_threads(arguments.threads)
    network = arguments.network or default_network(arguments.dataset, roots, arguments.configuration)
    run = (arguments.dataset, arguments.fold, roots, arguments.configuration, network)
    config = choose_config(
        arguments.dataset,
        roots,
        network,
        pretrained=arguments.pretrained is not None,
        begun=recorded_config(*run) if arguments.resume else None,
        **given_recipe(arguments),
    )
    if not arguments.no_validation:  # its images are read after training; say now when they are not there
        raw = find_dataset(roots.raw, arguments.dataset)
        require_cases(raw, DatasetSpec.load(raw))
    options = RunOptions(
        device=device,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        loader_workers=arguments.loader_workers,
        pretrained=arguments.pretrained,
        pretrained_dataset=arguments.pretrained_dataset,
        pretrained_merging=arguments.pretrained_merging,
        tensorboard=arguments.tensorboard,
        compile=arguments.compile,
        stop_on_signals=True,
    )
    folds = options_per_fold(arguments.dataset, arguments.fold, roots, options, arguments.configuration, network)
    return _Run(roots, network, config, folds)


def _validate(folder: Path, fold: str, run: _Run, device: str) -> None:
    from ukbob_seg.cli.evaluate import print_summary
    from ukbob_seg.evaluation.validate_fold import validate_fold
    from ukbob_seg.training.stopping import stop_noted, stopped_at_once

    with stop_noted(folder), stopped_at_once(f"in the final validation of fold {fold}, when training was done"):
        summary = validate_fold(folder.parent, fold, run.roots, device, max_cases=run.config.validation_cases)
    if is_first_process():
        print_summary(summary)
    _tell(f"validation -> {folder / 'validation' / 'report.html'}")


def _tell(line: str) -> None:
    if is_first_process():
        print(line)


def _processes() -> int:
    """Number of processes that torchrun started for this run, on all machines."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= set(os.environ) else 1


def _device(name: str) -> str:
    """The device of this process; under torchrun one GPU for each on a machine."""
    device = choose_device(name)
    if _processes() == 1 or device == "cpu":
        return device

    import torch

    from ukbob_seg.errors import ConfigError

    if device != "cuda":
        raise ConfigError(f"--device {name}: under torchrun it must be auto, cpu or cuda; each process has its own GPU")
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise ConfigError(f"torchrun starts more processes here than there are GPUs ({count}); lower --nproc-per-node")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "ukbob_train",
        "Train folds of a preprocessed dataset and score their validation cases. Flags of ukbob_filter are honoured. "
        "Defaults follow the paper (--preset ukbob of the plans: to the letter); plain_conv_unet follows nnU-Net.",
        "  ukbob_train 4 0\n"
        "  ukbob_train 4 0 --resume\n"
        "  ukbob_train 4 0 1 2 3 4\n"
        "  torchrun --nproc-per-node 2 -m ukbob_seg.cli.train 4 0\n"
        "  ukbob_train 4 all --network plain_conv_unet --epochs 20 --iterations-per-epoch 50 --lr 1e-3",
    )
    parser.add_argument("dataset", help="dataset id (4) or DatasetXXX_Name")
    parser.add_argument(
        "fold", nargs="+", help="0, 1, 2, ... (several: one after the other), or all (train once, on every case)"
    )
    add_network(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--resume", action="store_true", help="continue where the run was stopped, exactly")
    run.add_argument("--overwrite", action="store_true", help="start afresh although this fold was trained before")
    add_pretrained(run)
    run.add_argument("--no-filter", action="store_true", help="ignore the flags of ukbob_filter")
    run.add_argument("--no-validation", action="store_true", help="do not predict the validation cases at the end")
    run.add_argument("--tensorboard", action="store_true", help="write curves for TensorBoard as well")
    add_machine(run)
    add_recipe(parser)
    add_roots(parser, "raw", "preprocessed", "results")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(None))
