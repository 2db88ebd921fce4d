"""How commands name trained models and say how these predict."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from ukbob_seg.dataset.paths import Roots
    from ukbob_seg.inference.etta_config import EttaConfig

log = logging.getLogger(__name__)
ONE_MODEL = "give the model either as -d ID or as -m MODEL_FOLDER"
USUAL_CONFIGURATION = "3d_fullres"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add -d or -m, which folds and checkpoint, and the device."""
    parser.add_argument("-d", "--dataset", metavar="ID", help="dataset id (4) or DatasetXXX_Name that was trained")
    parser.add_argument(
        "-m",
        "--model",
        type=Path,
        metavar="DIR",
        action="append",
        help="model folder (CONFIG__NETWORK) instead of -d, or a model of nnU-Net v2 (folder or exported zip); several "
        "of them are averaged (probabilities)",
    )
    add_trained(parser)
    parser.add_argument("-f", "--folds", nargs="+", metavar="FOLD", help="folds to average (default: all trained)")
    parser.add_argument(
        "--checkpoint",
        choices=("best", "final"),
        default="best",
        help="default: best (ukbob_predict of a model of nnU-Net: final)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")


def add_trained(parser: argparse.ArgumentParser, when: str = "with -d; ") -> None:
    """Add which of a dataset's trained models is meant."""
    parser.add_argument("-c", "--configuration", metavar="NAME", help=f"{when}default: {USUAL_CONFIGURATION}")
    parser.add_argument("--network", metavar="NAME", help=f"{when}default: swin_unetr, or the only one trained")


def model_folders(arguments: argparse.Namespace, roots: Roots) -> list[Path]:
    """The model folders that are meant, of a command that takes -d or -m.

    Raises:
        ConfigError: both or neither of -d and -m, no such dataset, or several networks to choose from.
    """
    from ukbob_seg.errors import ConfigError

    if (arguments.model is None) == (arguments.dataset is None):
        raise ConfigError(ONE_MODEL)
    return given_models(arguments) or [trained_model(arguments, roots, arguments.dataset)]


def given_models(arguments: argparse.Namespace) -> list[Path]:
    """What -m names, none without it.

    Raises:
        ConfigError: options beside it that would choose another.
    """
    from ukbob_seg.errors import ConfigError

    if arguments.model is None:
        return []
    for option in ("configuration", "network"):
        if (value := getattr(arguments, option)) is not None:
            raise ConfigError(f"--{option} {value} chooses a model, and -m names one already; leave out one of them")
    return arguments.model if isinstance(arguments.model, list) else [arguments.model]


def trained_model(arguments: argparse.Namespace, roots: Roots, dataset: str) -> Path:
    """The model folder that -c and --network choose.

    Raises:
        ConfigError: no such dataset, or several networks to choose from.
    """
    from ukbob_seg.inference.predict import model_folder

    return model_folder(roots.results, dataset, arguments.configuration or USUAL_CONFIGURATION, arguments.network)


def add_adaptation(parser: argparse.ArgumentParser) -> None:
    """Add the limits of ETTA."""
    parser.add_argument(
        "--etta-mode", metavar="MODE",
        help="guarded (default: how far is decided per case, and undone where it fails) or paper (the plain recipe)",
    )  # fmt: skip
    parser.add_argument("--etta-steps", type=int, metavar="N", help="entropy steps at most (default: 5; mode paper: 8)")
    parser.add_argument(
        "--etta-lr",
        type=float,
        metavar="RATE",
        help="rate of the entropy steps (default: 4e-3, with BatchNorm 1e-3; mode paper: 5e-3)",
    )


def adaptation(arguments: argparse.Namespace, is_used: bool, switch: str) -> EttaConfig:
    """The limits of ETTA.

    Args:
        arguments: of ``add_adaptation``.
        is_used: whether anything adapts.
        switch: what makes it adapt, for the message.

    Raises:
        ConfigError: limits without adaptation, or out of range.
    """
    from ukbob_seg.errors import ConfigError
    from ukbob_seg.inference.etta_config import EttaConfig

    given = (arguments.etta_mode, arguments.etta_steps, arguments.etta_lr)
    if not is_used and any(value is not None for value in given):
        raise ConfigError(f"--etta-mode, --etta-steps and --etta-lr need {switch}")
    return EttaConfig.of_mode(
        arguments.etta_mode or "guarded", steps=arguments.etta_steps, learning_rate=arguments.etta_lr
    )


def add_windows(parser: argparse.ArgumentParser) -> None:
    """Add how windows slide, and flips."""
    parser.add_argument(
        "--no-mirror", action="store_true",
        help="no flips in TTA, changes of intensity alone (without TTA nothing is flipped in any case)",
    )  # fmt: skip
    parser.add_argument(
        "--step-size", type=float, default=0.5, metavar="S", help="window distance / patch (default: 0.5)"
    )
    parser.add_argument(
        "--window-batch", type=int, default=1, metavar="N", help="windows per forward pass (default: 1)"
    )
    parser.add_argument(
        "--skip-empty", action="store_true",
        help="leave out windows that lie outside of the body: faster where there is much air around it",
    )  # fmt: skip
    parser.add_argument(
        "--precision", default="auto", metavar="P",
        help="of the networks: auto (default: half precision on CUDA, float32 on CPUs), float32, or bfloat16, in which "
        "CPUs with AMX are faster, and some voxels at borders change",
    )  # fmt: skip


def hint_at_precision(arguments: argparse.Namespace, device: str) -> None:
    """Say so where this processor would be much faster than it is asked to be."""
    from ukbob_seg.networks.precision import multiplies_bfloat16_quickly
    from ukbob_seg.networks.precision_names import AUTO

    goes_on = getattr(arguments, "resume", False) or getattr(arguments, "compile", False)  # neither goes with another
    if device == "cpu" and arguments.precision == AUTO and not goes_on and multiplies_bfloat16_quickly():
        log.info("this processor multiplies bfloat16 quickly: --precision bfloat16 is faster and changes few voxels")


def add_postprocessing(parser: argparse.ArgumentParser) -> None:
    """Add what is done to label maps."""
    parser.add_argument(
        "--postprocessing", type=Path, metavar="FILE",
        help="remove stray pieces as this postprocessing.json says, of one model (instead of its own) or of several: "
        "ukbob_find_best makes one for its winner",
    )  # fmt: skip
    parser.add_argument(
        "--no-postprocessing", action="store_true",
        help="keep stray pieces also where ukbob_find_postprocessing found that removing them helps",
    )  # fmt: skip


def largest_components(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """Classes that --postprocessing names; None for what the model folder says.

    Raises:
        ConfigError: --no-postprocessing was given, too, or the file is another.
    """
    from ukbob_seg.errors import ConfigError
    from ukbob_seg.inference.postprocessing import names_in

    if arguments.postprocessing is None:
        return None
    if arguments.no_postprocessing:
        raise ConfigError("--postprocessing and --no-postprocessing exclude each other; give one of them")
    largest = names_in(arguments.postprocessing)
    if largest is None:
        raise ConfigError(f"--postprocessing {arguments.postprocessing}: it has no list 'largest_component'")
    return largest
