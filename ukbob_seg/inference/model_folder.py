"""Model folders (``CONFIG__NETWORK``): the folds they hold, first stages, and what is done to their label maps."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ukbob_seg.errors import CheckpointError, ConfigError, listing
from ukbob_seg.inference.postprocessing import POSTPROCESSING, Postprocessing
from ukbob_seg.inference.settings import PredictionSettings
from ukbob_seg.nnunet.folders import is_nnunet_model, models_below
from ukbob_seg.preprocessing.intensity_field import UsualField
from ukbob_seg.training.checkpoint import NAMES, ModelDescription, load_network

log = logging.getLogger(__name__)

CHECKPOINTS = ("best", "final")  # that predict


@dataclass(frozen=True)
class LoadedFolds:
    """Networks of one model.

    Attributes:
        networks: one per fold.
        description: that they share; of the fields, what all training images have.
        origin: their checkpoints.
    """

    networks: list[nn.Module]
    description: ModelDescription
    origin: list[str]


def load_folds(folder: Path, folds: Sequence[str] | None, checkpoint: str, device: str) -> LoadedFolds:
    """Load folds of a model folder.

    Args:
        folder: holds ``fold_K`` folders.
        folds: which; None for every trained one.
        checkpoint: ``best`` or ``final``.
        device: for the networks.

    Raises:
        ConfigError: another checkpoint, or a fold twice.
        CheckpointError: nothing trained there, a fold is missing, or folds of different models.
    """
    found = choose_folds(folder, folds, checkpoint)
    loaded = [load_network(path, device) for path in found.values()]
    descriptions = [description for _, description in loaded]
    check_same_model(folder, descriptions)
    log.info("model %s, fold %s (%s)", folder, ", ".join(found), NAMES[checkpoint])
    first = dataclasses.replace(descriptions[0], fields=_common_fields(descriptions))
    networks = [network for network, _ in loaded]
    return LoadedFolds(networks, first, [str(path.resolve()) for path in found.values()])


def find_folds(folder: Path, checkpoint: str) -> dict[str, Path]:
    """Checkpoint of each trained fold of a model folder.

    Raises:
        CheckpointError: the folder does not exist.
    """
    if not folder.is_dir():
        if folder.is_file():
            raise CheckpointError(f"model {folder} is a file; give the folder that holds plans.json and the folds")
        raise CheckpointError(
            f"model folder {folder} does not exist; train it first, or check the dataset, configuration and network, "
            f"or the path ({_models_beside(folder)})"
        )
    return {path.parent.name.removeprefix("fold_"): path for path in sorted(folder.glob(f"fold_*/{NAMES[checkpoint]}"))}


def _models_beside(folder: Path) -> str:
    """What else may be meant."""
    names = sorted(path.name for path in folder.parent.glob("*__*") if path.is_dir())
    return f"{folder.parent} has {listing(names, 5)}" if names else f"there is no model in {folder.parent}"


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
        _refuse_other_folder(folder)
        raise CheckpointError(
            f"{folder} has no {NAMES[checkpoint]} for fold {', '.join(lacking) or 'any'} "
            f"(trained: {', '.join(sorted(found)) or 'none'}){_other_checkpoint(folder, lacking, checkpoint)}"
        )
    return {fold: found[fold] for fold in chosen}


def _refuse_other_folder(folder: Path) -> None:
    """Say what a folder is that is none of our models.

    Raises:
        CheckpointError: a model of nnU-Net, a fold, or a folder of models.
    """
    if is_nnunet_model(folder):
        raise CheckpointError(
            f"{folder} is a model of nnU-Net v2, which ukbob_predict and ukbob_label take, but not this command"
        )
    if folder.name.startswith("fold_") and any(folder.glob("checkpoint_*.pt*")):
        fold = folder.name.removeprefix("fold_")
        raise CheckpointError(f"{folder} is a fold of a model: give -m {folder.parent} with -f {fold}")
    if not any(folder.glob("fold_*")) and (below := models_below(folder)):
        names = [str(path) for path in below]
        raise CheckpointError(f"{folder} is no model folder, but the folder of models: give {listing(names, 5)}")


def _other_checkpoint(folder: Path, lacking: Sequence[str], checkpoint: str) -> str:
    """What to do where the folds have the other checkpoint: a run without validation, or an import of it."""
    (other,) = set(CHECKPOINTS) - {checkpoint}
    present = find_folds(folder, other)
    there = bool(present) and set(lacking) <= set(present)
    return f"; {NAMES[other]} is there: give --checkpoint {other}" if there else ""


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


def postprocessing_of(
    folder: Path, description: ModelDescription, settings: PredictionSettings | None
) -> Postprocessing | None:
    """What is done to the label maps of a model folder with these settings; None for nothing."""
    if settings is not None and not settings.postprocessing:
        return None
    labels, names = description.spec().labels, None if settings is None else settings.largest_component
    given = None if names is None else Postprocessing.of_names(names, labels, POSTPROCESSING)
    after = given if given is not None else Postprocessing.of_model(folder, labels)
    if after.largest_component:
        log.info("stray pieces are removed of %s (%s)", listing(after.largest_component), POSTPROCESSING)
    return after


def of_first_stage(settings: PredictionSettings) -> PredictionSettings:
    """Settings of a cascade's first stage."""
    return dataclasses.replace(settings, postprocessing=False, classes=None, save_entropy=False)


def _common_fields(folds: Sequence[ModelDescription]) -> tuple[UsualField | None, ...] | None:
    """What the training images of all folds have, whatever their order; None where one does not say."""
    known = [fold.fields for fold in folds if fold.fields is not None]
    if len(known) < len(folds):
        return None
    return tuple(
        None if any(usual is None for usual in channel) else UsualField.joined(channel)
        for channel in zip(*known, strict=True)
    )
