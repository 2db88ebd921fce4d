"""Options that the commands that train networks share."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

# Option -> field of TrainingConfig, where they are not called alike.
_FIELDS = {"lr": "learning_rate"}

# What decides the weights: (option without the hyphens, how argparse takes it).
_RECIPE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("epochs", {"type": int, "metavar": "N", "help": "500; nnU-Net's networks 1000, preset ukbob 3000"}),
    ("iterations-per-epoch", {"type": int, "metavar": "N", "help": "training steps per epoch: 250"}),
    ("lr", {"type": float, "metavar": "RATE", "help": "peak learning rate: 1e-4; nnU-Net's networks 1e-2"}),
    ("weight-decay", {"type": float, "metavar": "W", "help": "1e-5; nnU-Net's networks 3e-5"}),
    ("optimizer", {"choices": ("adamw", "sgd"), "help": "adamw; nnU-Net's networks sgd"}),
    (
        "schedule",
        {
            "choices": ("cosine_restarts", "cosine", "poly", "one_cycle", "constant"),
            "help": "shape of the learning rate over the run: cosine_restarts; nnU-Net's networks poly",
        },
    ),
    (
        "warmup-epochs",
        {"type": int, "metavar": "N", "help": "linear rise of the rate: 0, with --pretrained 50"},
    ),
    ("loss", {"choices": ("ce_dice", "bce_dice"), "help": "bce_dice is always used for regions"}),
    (
        "augmentation",
        {
            "choices": ("ukbob", "strong", "mri", "none"),
            "help": "transforms of patches: ukbob (the paper's), strong (nnU-Net's), mri (that and faults of MR "
            "images), none",
        },
    ),
    (
        "mirror-axes",
        {
            "type": int,
            "nargs": "*",
            "choices": (0, 1, 2),
            "metavar": "AXIS",
            "help": "axes to flip: 0 = z, 1 = y, 2 = x",
        },
    ),
    (
        "foreground-fraction",
        {"type": float, "metavar": "F", "help": "share of patches centred on a label, at least: 0.33"},
    ),
    ("validation-every", {"type": int, "metavar": "N", "help": "epochs between validations"}),
    ("validation-cases", {"type": int, "metavar": "N", "help": "validate on so many cases (0: all)"}),
    ("subset-fraction", {"type": float, "metavar": "F", "help": "train on a seeded share of the subjects"}),
    (
        "flagged-labels",
        {
            "choices": ("ignore", "marginal"),
            "help": "organs that ukbob_filter flagged: as its policy says (default), or one class with background "
            "there",
        },
    ),
    ("accumulate", {"type": int, "metavar": "N", "help": "batches per optimizer step (default: 1)"}),
    (
        "ema",
        {"type": float, "metavar": "DECAY", "help": "average the weights, such as 0.999 (default: 0, off)"},
    ),
    (
        "early-stopping",
        {
            "type": int,
            "metavar": "N",
            "help": "end after N validations without a higher mean Dice (default: 0, never)",
        },
    ),
    ("seed", {"type": int, "metavar": "N", "help": "of weights, cases, patches, augmentation: 0"}),
)


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add -c, --network and --device."""
    parser.add_argument(
        "-c", "--configuration", default="3d_fullres",
        help="3d_fullres (default), 3d_lowres, 3d_cascade_fullres or 2d, as the plans have them",
    )  # fmt: skip
    parser.add_argument(
        "--network",
        help="swin_unetr (default, except in 2d), plain_conv_unet, another of the plans, or one that is planned now: "
        "unet, unetr, resenc_unet_m, ...",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")


def add_pretrained(group: argparse._ArgumentGroup) -> None:
    """Add --pretrained and what describes that file."""
    group.add_argument(
        "--pretrained", type=Path, metavar="FILE", help="start from the matching weights of a checkpoint"
    )
    group.add_argument(
        "--pretrained-dataset", type=Path, metavar="FILE",
        help="dataset.json of that checkpoint, where it is not one of ours: classes and channels are matched by name",
    )  # fmt: skip
    group.add_argument(
        "--pretrained-merging", choices=("legacy", "distinct"),
        help="how a Swin-UNETR that is not one of ours merged patches: legacy before MONAI's fix #8285, distinct after "
        "(default: as in the plans, with a warning)",
    )  # fmt: skip


def add_machine(group: argparse._ArgumentGroup) -> None:
    """Add --compile, --loader-workers and --threads."""
    group.add_argument(
        "--compile", action="store_true",
        help="torch.compile the network: a slow first step for faster ones; as it is where that fails",
    )  # fmt: skip
    group.add_argument(
        "--loader-workers", type=int, metavar="N", help="processes that read patches (CPU: 0, GPU: 4 or all processors)"
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads for the network (default: all)")


def add_recipe(
    parser: argparse.ArgumentParser,
    title: str = "recipe (default: of the plans' preset and the network)",
    prefix: str = "",
    without: Collection[str] = (),
) -> None:
    """Add what decides the weights; options that are not given are the recipe's.

    Args:
        parser: to add them to.
        title: of their group.
        prefix: of their names: ``downstream-`` makes ``--downstream-epochs``.
        without: options that the command does not have.
    """
    group = parser.add_argument_group(title)
    for name, how in _RECIPE:
        if name not in without:
            group.add_argument(f"--{prefix}{name}", **how)


def given_recipe(arguments: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """The fields of ``TrainingConfig`` that a command line names; None or absent where it does not.

    Args:
        arguments: parsed.
        prefix: as in ``add_recipe``.
    """
    found = {}
    for name, _ in _RECIPE:
        value = getattr(arguments, f"{prefix}{name}".replace("-", "_"), None)
        if name == "mirror-axes" and value is not None:
            value = tuple(sorted(set(value)))
        found[_FIELDS.get(name, name.replace("-", "_"))] = value
    return found


def limit_threads(threads: int | None) -> None:
    """Do what --threads says; None leaves all.

    Raises:
        ConfigError: fewer than one.
    """
    if threads is not None:
        import torch

        from ukbob_seg.errors import ConfigError

        if threads < 1:
            raise ConfigError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
