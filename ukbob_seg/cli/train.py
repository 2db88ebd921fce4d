"""ukbob_train: train folds, then predict and score their validation cases."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.cli.common import add_roots, choose_device, command, is_first_process, make_parser, roots_from

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
    _limit_threads(arguments.threads)
    network = arguments.network or default_network(arguments.dataset, roots, arguments.configuration)
    run = (arguments.dataset, arguments.fold, roots, arguments.configuration, network)
    config = choose_config(
        arguments.dataset,
        roots,
        network,
        pretrained=arguments.pretrained is not None,
        begun=recorded_config(*run) if arguments.resume else None,
        epochs=arguments.epochs,
        iterations_per_epoch=arguments.iterations_per_epoch,
        learning_rate=arguments.lr,
        weight_decay=arguments.weight_decay,
        optimizer=arguments.optimizer,
        schedule=arguments.schedule,
        warmup_epochs=arguments.warmup_epochs,
        loss=arguments.loss,
        augmentation=arguments.augmentation,
        mirror_axes=None if arguments.mirror_axes is None else tuple(sorted(set(arguments.mirror_axes))),
        foreground_fraction=arguments.foreground_fraction,
        validation_every=arguments.validation_every,
        validation_cases=arguments.validation_cases,
        subset_fraction=arguments.subset_fraction,
        flagged_labels=arguments.flagged_labels,
        accumulate=arguments.accumulate,
        ema=arguments.ema,
        early_stopping=arguments.early_stopping,
        seed=arguments.seed,
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
    parser.add_argument(
        "-c", "--configuration", default="3d_fullres",
        help="3d_fullres (default), 3d_lowres, 3d_cascade_fullres or 2d, as the plans have them",
    )  # fmt: skip
    parser.add_argument(
        "--network", help="swin_unetr (default, except in 2d), plain_conv_unet, or another of the plans"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    run = parser.add_argument_group("run")
    run.add_argument("--resume", action="store_true", help="continue where the run was stopped, exactly")
    run.add_argument("--overwrite", action="store_true", help="start afresh although this fold was trained before")
    run.add_argument("--pretrained", type=Path, metavar="FILE", help="start from the matching weights of a checkpoint")
    run.add_argument(
        "--pretrained-dataset", type=Path, metavar="FILE",
        help="dataset.json of that checkpoint, where it is not one of ours: classes and channels are matched by name",
    )  # fmt: skip
    run.add_argument(
        "--pretrained-merging", choices=("legacy", "distinct"),
        help="how a Swin-UNETR that is not one of ours merged patches: legacy before MONAI's fix #8285, distinct after "
        "(default: as in the plans, with a warning)",
    )  # fmt: skip
    run.add_argument("--no-filter", action="store_true", help="ignore the flags of ukbob_filter")
    run.add_argument("--no-validation", action="store_true", help="do not predict the validation cases at the end")
    run.add_argument("--tensorboard", action="store_true", help="write curves for TensorBoard as well")
    run.add_argument(
        "--compile", action="store_true",
        help="torch.compile the network: a slow first step for faster ones; as it is where that fails",
    )  # fmt: skip
    run.add_argument(
        "--loader-workers", type=int, metavar="N", help="processes that read patches (CPU: 0, GPU: 4 or all processors)"
    )
    run.add_argument("--threads", type=int, metavar="N", help="CPU threads for the network (default: all)")
    _add_recipe(parser)
    add_roots(parser, "raw", "preprocessed", "results")
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """What decides the weights; options that are not given are the recipe's."""
    recipe = parser.add_argument_group("recipe (default: of the plans' preset and the network)")
    recipe.add_argument("--epochs", type=int, metavar="N", help="500; nnU-Net's networks 1000, preset ukbob 3000")
    recipe.add_argument("--iterations-per-epoch", type=int, metavar="N", help="training steps per epoch: 250")
    recipe.add_argument("--lr", type=float, metavar="RATE", help="peak learning rate: 1e-4; nnU-Net's networks 1e-2")
    recipe.add_argument("--weight-decay", type=float, metavar="W", help="1e-5; nnU-Net's networks 3e-5")
    recipe.add_argument("--optimizer", choices=("adamw", "sgd"), help="adamw; nnU-Net's networks sgd")
    recipe.add_argument(
        "--schedule", choices=("cosine_restarts", "cosine", "poly", "one_cycle", "constant"),
        help="shape of the learning rate over the run: cosine_restarts; nnU-Net's networks poly",
    )  # fmt: skip
    recipe.add_argument(
        "--warmup-epochs", type=int, metavar="N", help="linear rise of the rate: 0, with --pretrained 50"
    )
    recipe.add_argument("--loss", choices=("ce_dice", "bce_dice"), help="bce_dice is always used for regions")
    recipe.add_argument(
        "--augmentation", choices=("ukbob", "strong", "mri", "none"),
        help="transforms of patches: ukbob (the paper's), strong (nnU-Net's), mri (that and faults of MR images), none",
    )  # fmt: skip
    recipe.add_argument(
        "--mirror-axes",
        type=int,
        nargs="*",
        choices=(0, 1, 2),
        metavar="AXIS",
        help="axes to flip: 0 = z, 1 = y, 2 = x",
    )
    recipe.add_argument(
        "--foreground-fraction", type=float, metavar="F", help="share of patches centred on a label, at least: 0.33"
    )
    recipe.add_argument("--validation-every", type=int, metavar="N", help="epochs between validations")
    recipe.add_argument("--validation-cases", type=int, metavar="N", help="validate on so many cases (0: all)")
    recipe.add_argument("--subset-fraction", type=float, metavar="F", help="train on a seeded share of the subjects")
    recipe.add_argument(
        "--flagged-labels",
        choices=("ignore", "marginal"),
        help="organs that ukbob_filter flagged: as its policy says (default), or one class with background there",
    )
    recipe.add_argument("--accumulate", type=int, metavar="N", help="batches per optimizer step (default: 1)")
    recipe.add_argument(
        "--ema", type=float, metavar="DECAY", help="average the weights, such as 0.999 (default: 0, off)"
    )
    recipe.add_argument(
        "--early-stopping", type=int, metavar="N",
        help="end after N validations without a higher mean Dice (default: 0, never)",
    )  # fmt: skip
    recipe.add_argument("--seed", type=int, metavar="N", help="of weights, cases, patches, augmentation: 0")


def _limit_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        from ukbob_seg.errors import ConfigError

        if threads < 1:
            raise ConfigError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)


if __name__ == "__main__":
    raise SystemExit(main(None))
