"""ukbob_train: train one fold, then predict and score its validation cases."""

from __future__ import annotations

import argparse
from pathlib import Path

from ukbob_seg.cli.common import add_roots, choose_device, command, make_parser, roots_from


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, run, print."""
    arguments = _parser().parse_args(argv)
    roots = roots_from(arguments)

    from ukbob_seg.dataset.paths import find_dataset
    from ukbob_seg.training.setup import choose_config, default_network
    from ukbob_seg.training.trainer import RunOptions, train

    device = choose_device(arguments.device)
    _limit_threads(arguments.threads)
    network = arguments.network or default_network(arguments.dataset, roots, arguments.configuration)
    config = choose_config(
        arguments.dataset,
        roots,
        network,
        pretrained=arguments.pretrained is not None,
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
        seed=arguments.seed,
    )
    if not arguments.no_validation:  # its images are read after training; say now when they are not there
        find_dataset(roots.raw, arguments.dataset)
    folder = train(
        arguments.dataset,
        arguments.fold,
        roots,
        config,
        RunOptions(
            device=device,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            loader_workers=arguments.loader_workers,
            pretrained=arguments.pretrained,
        ),
        configuration=arguments.configuration,
        network=network,
        use_filter=not arguments.no_filter,
    )
    print(f"trained -> {folder}")
    if arguments.no_validation:
        return

    from ukbob_seg.cli.evaluate import print_summary
    from ukbob_seg.evaluation.validate_fold import validate_fold

    summary = validate_fold(folder.parent, arguments.fold, roots, device, max_cases=config.validation_cases)
    print_summary(summary)
    print(f"validation -> {folder / 'validation' / 'report.html'}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "ukbob_train",
        "Train one fold of a preprocessed dataset and score its validation cases. Flags of ukbob_filter are honoured. "
        "Defaults follow the paper (--preset ukbob of the plans: to the letter); plain_conv_unet follows nnU-Net.",
        "  ukbob_train 4 0\n"
        "  ukbob_train 4 0 --resume\n"
        "  ukbob_train 4 all --network plain_conv_unet --epochs 20 --iterations-per-epoch 50 --lr 1e-3",
    )
    parser.add_argument("dataset", help="dataset id (4) or DatasetXXX_Name")
    parser.add_argument("fold", help="0, 1, 2, ... or all (train on every case)")
    parser.add_argument(
        "-c", "--configuration", default="3d_fullres",
        help="3d_fullres (default), 3d_lowres, 3d_cascade_fullres or 2d, as the plans have them",
    )  # fmt: skip
    parser.add_argument(
        "--network", help="swin_unetr (default, except in 2d), plain_conv_unet, or another of the plans"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    run = parser.add_argument_group("run")
    run.add_argument("--resume", action="store_true", help="continue after the last finished epoch, exactly")
    run.add_argument("--overwrite", action="store_true", help="start afresh although this fold was trained before")
    run.add_argument("--pretrained", type=Path, metavar="FILE", help="start from the matching weights of a checkpoint")
    run.add_argument("--no-filter", action="store_true", help="ignore the flags of ukbob_filter")
    run.add_argument("--no-validation", action="store_true", help="do not predict the validation cases at the end")
    run.add_argument("--loader-workers", type=int, metavar="N", help="processes that read patches (CPU: 0, GPU: 4)")
    run.add_argument("--threads", type=int, metavar="N", help="CPU threads for the network (default: all)")
    recipe = parser.add_argument_group("recipe (default: of the plans' preset and the network)")
    recipe.add_argument("--epochs", type=int, metavar="N")
    recipe.add_argument("--iterations-per-epoch", type=int, metavar="N")
    recipe.add_argument("--lr", type=float, metavar="RATE", help="peak learning rate")
    recipe.add_argument("--weight-decay", type=float, metavar="W")
    recipe.add_argument("--optimizer", choices=("adamw", "sgd"))
    recipe.add_argument("--schedule", choices=("cosine_restarts", "cosine", "poly", "one_cycle", "constant"))
    recipe.add_argument("--warmup-epochs", type=int, metavar="N")
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
    recipe.add_argument("--foreground-fraction", type=float, metavar="F", help="share of patches centred on a label")
    recipe.add_argument("--validation-every", type=int, metavar="N", help="epochs between validations")
    recipe.add_argument("--validation-cases", type=int, metavar="N", help="validate on so many cases (0: all)")
    recipe.add_argument("--subset-fraction", type=float, metavar="F", help="train on a seeded share of the cases")
    recipe.add_argument("--seed", type=int, metavar="N")
    add_roots(parser, "raw", "preprocessed", "results")
    return parser


def _limit_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        from ukbob_seg.errors import ConfigError

        if threads < 1:
            raise ConfigError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
