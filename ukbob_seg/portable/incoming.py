"""What an archive says, read into the package's own types: everything is checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ukbob_seg.errors import CheckpointError, ConfigError, UkbobError
from ukbob_seg.filtering.strata import StratifiedBounds
from ukbob_seg.inference.model_folder import CHECKPOINTS, check_same_model, folder_name
from ukbob_seg.inference.postprocessing import Postprocessing
from ukbob_seg.networks.registry import NETWORKS
from ukbob_seg.portable import layout
from ukbob_seg.portable.archive import Archive, is_safe_name
from ukbob_seg.portable.model_card import check_card
from ukbob_seg.portable.weights import weights_from_bytes
from ukbob_seg.preprocessing.plans import Plans
from ukbob_seg.training.checkpoint import ModelDescription, check_fit

HEADS = ("softmax", "sigmoid")
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)


@dataclass(frozen=True)
class IncomingFold:
    """A fold of a model on its way in.

    Attributes:
        description: for its checkpoint.
        progress: ``epoch`` and ``best_dice``, as far as they are known.
        facts: of the card.
    """

    description: ModelDescription
    progress: Mapping[str, Any]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class IncomingModel:
    """A model on its way in.

    Attributes:
        name: ``CONFIG__NETWORK``.
        folds: by name.
    """

    name: str
    folds: Mapping[str, IncomingFold]

    @property
    def description(self) -> ModelDescription:
        """Of the first fold; the others' are the same."""
        return next(iter(self.folds.values())).description


@dataclass(frozen=True)
class Incoming:
    """All that an archive brings.

    Attributes:
        dataset: ``DatasetXXX_Name``.
        checkpoint: ``best`` or ``final``.
        card: of the model.
        models: the one that is meant, and the first stages that it needs.
    """

    dataset: str
    checkpoint: str
    card: Mapping[str, Any]
    models: tuple[IncomingModel, ...]


def read_incoming(archive: Archive) -> Incoming:
    """Read and check what is in an archive, weights included.

    Raises:
        CheckpointError: says which member is wrong, and how.
    """
    manifest = archive.manifest
    dataset, checkpoint, names = (manifest.get(key) for key in ("dataset", "checkpoint", "models"))
    if not (isinstance(dataset, str) and layout.IS_DATASET.fullmatch(dataset) and is_safe_name(dataset)):
        raise _wrong(archive, f"its dataset {dataset!r} is not named DatasetXXX_Name")
    if checkpoint not in CHECKPOINTS:
        raise _wrong(archive, f"its checkpoint {checkpoint!r} is neither best nor final")
    if not (isinstance(names, list) and names and all(isinstance(n, str) and is_safe_name(n) for n in names)):
        raise _wrong(archive, f"its models {names!r} are no list of names")
    folds = {name: _folds_of(archive, name) for name in dict.fromkeys(names)}
    _refuse_unknown(archive, folds)
    card = archive.read_json(layout.CARD)
    try:
        check_card(card)
    except MALFORMED as error:
        raise _wrong(archive, f"{layout.CARD} is no card of a model ({error})") from error
    try:
        archive.read(layout.README).decode()
    except UnicodeDecodeError as error:
        raise _wrong(archive, f"{layout.README} is no text") from error
    if layout.BOUNDS in archive.names:
        where = f"{layout.BOUNDS} in {archive.path}"
        try:
            StratifiedBounds.from_json(archive.read_json(layout.BOUNDS), where)
        except UkbobError as error:
            raise CheckpointError(str(error)) from error
    models = tuple(_read_model(archive, name, folds[name], dataset, card) for name in folds)
    _check_stages(archive, models)
    return Incoming(dataset, checkpoint, card, models)


def read_weights(archive: Archive, model: IncomingModel, fold: str) -> dict[str, Tensor]:
    """Weights of a fold."""
    member = layout.of_fold(model.name, fold, layout.WEIGHTS)
    return weights_from_bytes(archive.read(member), f"{member} in {archive.path}")


def _wrong(archive: Archive, what: str) -> CheckpointError:
    return CheckpointError(f"{archive.path} is refused: {what}; export the model again")


def _folds_of(archive: Archive, model: str) -> list[str]:
    """Names of the folds of a model that the archive has, in order."""
    start = f"{model}/fold_"
    found = {name.removeprefix(start).split("/")[0] for name in archive.names if name.startswith(start)}
    if not found or not all(layout.IS_FOLD.fullmatch(fold) for fold in found):
        raise _wrong(archive, f"{model} has no valid folds (found: {', '.join(sorted(found)) or 'none'})")
    return sorted(found)


def _refuse_unknown(archive: Archive, folds: Mapping[str, list[str]]) -> None:
    known = {*layout.OF_ARCHIVE}
    for model, names in folds.items():
        known |= {layout.of_model(model, name) for name in layout.OF_MODEL}
        known |= {layout.of_fold(model, fold, name) for fold in names for name in layout.OF_FOLD}
    if unknown := sorted(set(archive.names) - known):
        raise _wrong(archive, f"{unknown[0]} is no part of a model")


def _read_model(archive: Archive, name: str, folds: list[str], dataset: str, card: Mapping[str, Any]) -> IncomingModel:
    plans = archive.read_json(layout.of_model(name, layout.PLANS))
    content = archive.read_json(layout.of_model(name, layout.DATASET))
    try:
        # As training would write it into a checkpoint, so that folds trained here belong to folds that came.
        plans = Plans.from_json(plans, f"{name}/{layout.PLANS}").to_json()
        if plans["dataset"] != dataset:
            raise _wrong(archive, f"{name} is of {plans['dataset']!r}, not of {dataset}")
        described = {fold: _read_fold(archive, name, fold, plans, content, card) for fold in folds}
        model = IncomingModel(name, described)
        _check_model(archive, model)
    except CheckpointError:
        raise
    except UkbobError as error:
        raise CheckpointError(f"{archive.path} is refused: {error}") from error
    except MALFORMED as error:
        raise _wrong(archive, f"{name} is not described as a model has to be ({error})") from error
    for fold, incoming in model.folds.items():
        weights = read_weights(archive, model, fold)
        _check_weights(archive, layout.of_fold(name, fold, layout.WEIGHTS), incoming.description, weights)
    return model


def _read_fold(
    archive: Archive, name: str, fold: str, plans: dict[str, Any], dataset: dict[str, Any], card: Mapping[str, Any]
) -> IncomingFold:
    entry = dict(archive.read_json(layout.of_fold(name, fold, layout.DESCRIPTION)))
    progress = {key: entry.pop(key) for key in ("epoch", "best_dice") if key in entry}
    description = ModelDescription.from_json({**entry, "plans": plans, "dataset": dataset})
    facts = card["models"][name]["folds"][fold]
    if description.fold != fold or not isinstance(facts, dict):
        raise _wrong(archive, f"fold {fold} of {name} calls itself {description.fold!r}")
    return IncomingFold(description, progress, facts)


def _check_model(archive: Archive, model: IncomingModel) -> None:
    """All that prediction will take for granted."""
    description = model.description
    if folder_name(description.configuration, description.network) != model.name:
        raise _wrong(archive, f"{model.name} is a model of {description.configuration!r} and {description.network!r}")
    check_same_model(archive.path, [fold.description for fold in model.folds.values()])
    scheme = description.spec().labels
    description.parsed_plans().configuration(description.configuration).network(description.network)
    if description.head not in HEADS or not set(description.mirror_axes) <= {0, 1, 2}:
        raise _wrong(archive, f"{model.name} has head {description.head!r} and axes {description.mirror_axes} to flip")
    if not isinstance(description.arguments, dict):
        raise _wrong(archive, f"the arguments of {model.name} are no table")
    member = layout.of_model(model.name, layout.POSTPROCESSING)
    if member in archive.names:
        names = archive.read_json(member).get("largest_component")
        Postprocessing.of_names(names if isinstance(names, list) else None, scheme, f"{member} in {archive.path}")


def _check_weights(archive: Archive, member: str, description: ModelDescription, weights: dict[str, Tensor]) -> None:
    """Compare names and shapes with the network's, without making it: nothing of its size is allocated.

    Networks by dotted path are not built here, as that imports what the archive names; prediction does, as it says.
    """
    if description.network not in NETWORKS:
        if ":" not in description.network:
            raise _wrong(archive, f"{member} is of network {description.network!r}, which this version does not know")
        return
    try:
        network = _build_without_memory(description)
    except ConfigError as error:
        raise CheckpointError(f"{archive.path}: {error}") from error
    except Exception as error:  # constructors raise anything at arguments that are not theirs
        raise _wrong(archive, f"{member}: its network cannot be built ({error})") from error
    check_fit(network, weights, f"{member} in {archive.path}")


def _build_without_memory(description: ModelDescription) -> nn.Module:
    try:
        with torch.device("meta"):
            return description.build()
    except RuntimeError:  # a constructor that reads values, which such tensors lack
        return description.build()


def _check_stages(archive: Archive, models: tuple[IncomingModel, ...]) -> None:
    """A cascade's second stage without its first cannot predict."""
    names = [model.name for model in models]
    for model in models:
        description = model.description
        stage = description.parsed_plans().configuration(description.configuration).previous_stage
        needed = None if stage is None else folder_name(stage, description.network)
        if needed is not None and needed not in names:
            raise _wrong(archive, f"{model.name} is the second stage of a cascade, and {needed} is not there")
