"""Model folders (``CONFIG__NETWORK``): the folds they hold, whether these are of one model, where first stages lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ukbob_seg.errors import CheckpointError, ConfigError
from ukbob_seg.training.checkpoint import NAMES, ModelDescription

CHECKPOINTS = ("best", "final")  # that predict


def find_folds(folder: Path, checkpoint: str) -> dict[str, Path]:
    """Checkpoint of each trained fold of a model folder.

    Raises:
        CheckpointError: the folder does not exist.
    """
    if not folder.is_dir():
        raise CheckpointError(f"model folder {folder} does not exist; train first, or give it with -m")
    return {path.parent.name.removeprefix("fold_"): path for path in sorted(folder.glob(f"fold_*/{NAMES[checkpoint]}"))}


def choose_folds(folder: Path, folds: Sequence[str] | None, checkpoint: str) -> dict[str, Path]:
    """Checkpoint of each fold that is wanted, in the order in which they are averaged.

    Args:
        folder: holds ``fold_K`` folders.
        folds: which, None for every trained one.
        checkpoint: ``best`` or ``final``.

    Raises:
        ConfigError: another checkpoint, or a fold twice.
        CheckpointError: nothing trained there, or a fold is missing.
    """
    if checkpoint not in CHECKPOINTS:
        raise ConfigError(f"--checkpoint must be best or final, got {checkpoint!r}")
    found = find_folds(folder, checkpoint)
    chosen = list(folds) if folds else sorted(found)
    if twice := sorted({fold for fold in chosen if chosen.count(fold) > 1}):
        raise ConfigError(f"fold {twice[0]} is given twice")
    lacking = [fold for fold in chosen if fold not in found]
    if lacking or not chosen:
        raise CheckpointError(
            f"{folder} has no {NAMES[checkpoint]} for fold {', '.join(lacking) or 'any'} "
            f"(trained: {', '.join(sorted(found)) or 'none'})"
        )
    return {fold: found[fold] for fold in chosen}


def check_same_model(folder: Path, descriptions: Sequence[ModelDescription]) -> None:
    """Refuse folds that cannot be averaged as those of one model.

    Raises:
        CheckpointError: they were trained with different plans or recipes.
    """
    first = descriptions[0]
    for other in descriptions[1:]:
        if dataclasses.replace(other, fold=first.fold) != first:
            raise CheckpointError(
                f"{folder}: folds {[each.fold for each in descriptions]} were trained with different plans or recipes; "
                "predict them apart"
            )


def folder_name(configuration: str, network: str) -> str:
    """``CONFIG__NETWORK``; the colon of a dotted path is no character for a folder."""
    return f"{configuration}__{network.replace(':', '.')}"


def first_stage_folder(folder: Path, description: ModelDescription) -> Path | None:
    """Model folder of a cascade's first stage, which lies beside the second's; None where there is no first stage."""
    stage = description.parsed_plans().configuration(description.configuration).previous_stage
    return None if stage is None else folder.resolve().with_name(folder_name(stage, description.network))
