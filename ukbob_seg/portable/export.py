"""Write a trained model into one file that predicts the same to the last bit elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ukbob_seg.errors import CheckpointError, ConfigError
from ukbob_seg.files import atomic_path, read_json
from ukbob_seg.filtering.strata import StratifiedBounds
from ukbob_seg.inference.model_folder import check_same_model, choose_folds, first_stage_folder, folder_name
from ukbob_seg.inference.postprocessing import Postprocessing
from ukbob_seg.networks.wrappers import unwrapped
from ukbob_seg.nnunet.folders import is_nnunet_model
from ukbob_seg.portable import layout
from ukbob_seg.portable.archive import ArchiveWriter, is_safe_name
from ukbob_seg.portable.model_card import fold_facts, make_card, model_facts, public_dataset, readme
from ukbob_seg.portable.monai_state import compare_with_monai, monai_network
from ukbob_seg.portable.onnx_file import INPUT, OUTPUT, onnx_bytes, require_onnx
from ukbob_seg.portable.weights import weights_to_bytes
from ukbob_seg.training.checkpoint import ModelDescription, network_of, read_checkpoint

SEED = 0  # of the window that networks are compared on


@dataclass(frozen=True)
class ExportOptions:
    """What goes into the file.

    Attributes:
        checkpoint: ``best`` or ``final``.
        licence: of the weights, for the card; None for what an imported model's card says, or not stated.
        citation: for the card, beside the method's; None likewise.
        onnx: also the network of each fold as ONNX, compared in onnxruntime.
        monai: also the weights of each fold by MONAI's names, compared where MONAI is installed.
        overwrite: replace a file that is there.
    """

    checkpoint: str = "best"
    licence: str | None = None
    citation: str | None = None
    onnx: bool = False
    monai: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        file: the archive.
        card: its model card.
    """

    file: Path
    card: dict[str, Any]


def export_model(
    folder: Path,
    output: Path | None = None,
    folds: Sequence[str] | None = None,
    options: ExportOptions | None = None,
    bounds: Path | None = None,
    quiet: bool = False,
) -> Exported:
    """Write a model folder, with the first stage where it is the second of a cascade, into one zip file.

    Training states and names of cases stay behind. The same model and options give the same bytes, but for ONNX.

    Args:
        folder: ``results/DatasetXXX_Name/CONFIG__NETWORK``.
        output: zip file; None for ``DatasetXXX_Name__CONFIG__NETWORK.zip`` in the current folder.
        folds: which, None for every trained one; of a first stage always these.
        options: what goes into it.
        bounds: bounds.json of the label filter; that of an imported model comes before it, and it need not exist.
        quiet: no progress bar.

    Raises:
        ConfigError: the file exists, or a network has no such form.
        CheckpointError: nothing trained there, a model of nnU-Net, a fold or first stage is missing, or folds of
            different models.
        UkbobError: the file cannot be written.
    """
    folder, options = Path(folder), options or ExportOptions()
    if is_nnunet_model(folder):
        raise CheckpointError(
            f"{folder} is not a model of this package (a model of nnU-Net v2, or an archive), and only those are "
            "exported; nnUNetv2_export_model_to_zip writes the archive of one, which ukbob_predict -m takes as it is"
        )
    if options.onnx:
        require_onnx()
    first = next(iter(choose_folds(folder, folds, options.checkpoint).values()))
    spec = read_checkpoint(first)[0].spec()
    output = Path(output or f"{spec.name}__{folder.resolve().name}.zip")
    if output.suffix != ".zip":
        raise ConfigError(f"the archive {output} must end in .zip; give such a name with -o")
    if output.exists() and not options.overwrite:
        raise ConfigError(f"{output} already exists; replace it with --overwrite, or give another name with -o")
    models: dict[str, dict[str, Any]] = {}
    with atomic_path(output) as temporary, ArchiveWriter(temporary) as writer:
        place: Path | None = folder
        while place is not None:
            description, name, facts = _write_model(writer, place, None if models else folds, options, quiet)
            models[name] = facts
            place = first_stage_folder(place, description)
        _write_bounds(writer, folder, bounds)
        earlier = _earlier_card(folder)
        licence = options.licence or earlier.get("licence")
        card = make_card(spec, models, licence, options.citation or _own_citation(earlier))
        writer.add_json(layout.CARD, card)
        writer.add(layout.README, readme(card).encode())
        writer.finish({"dataset": spec.name, "models": list(models), "checkpoint": options.checkpoint})
    return Exported(output, card)


def _write_model(
    writer: ArchiveWriter, folder: Path, folds: Sequence[str] | None, options: ExportOptions, quiet: bool
) -> tuple[ModelDescription, str, dict[str, Any]]:
    """Members of one model; returns the description of its folds, its name, and its part of the card."""
    chosen = choose_folds(folder, folds, options.checkpoint)
    first: ModelDescription | None = None
    name, parameters, facts = "", 0, {}
    for fold, path in tqdm(chosen.items(), desc=f"exporting {folder.name}", unit="fold", disable=quiet):
        description, content = read_checkpoint(path)
        if first is None:
            first, name = description, folder_name(description.configuration, description.network)
            _check_names(name, description, list(chosen))
        check_same_model(folder, [first, description])
        network = network_of(description, content, path)
        parameters = sum(parameter.numel() for parameter in unwrapped(network).parameters())
        facts[fold] = fold_facts(path.parent, content)
        entry = {key: value for key, value in description.to_json().items() if key not in ("plans", "dataset")}
        progress = {key: content[key] for key in ("epoch", "best_dice") if key in content}
        try:
            writer.add_json(layout.of_fold(name, fold, layout.DESCRIPTION), {**entry, "fold": fold, **progress})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its description cannot be exported ({error})") from error
        weights = weights_to_bytes(content["network_weights"], str(path))
        writer.add(layout.of_fold(name, fold, layout.WEIGHTS), weights)
        if options.onnx:
            facts[fold]["onnx"] = _write_onnx(writer, name, fold, description, network)
        if options.monai:
            facts[fold]["monai"] = _write_monai(writer, name, fold, description, network)
    assert first is not None  # choose_folds gives at least one
    writer.add_json(layout.of_model(name, layout.PLANS), first.plans)
    writer.add_json(layout.of_model(name, layout.DATASET), public_dataset(first.dataset))
    after = folder / layout.POSTPROCESSING
    if after.is_file():
        Postprocessing.of_model(folder, first.spec().labels)  # or refuse it
        writer.add_json(layout.of_model(name, layout.POSTPROCESSING), read_json(after))
    return first, name, model_facts(first, options.checkpoint, parameters, facts)


def _check_names(name: str, description: ModelDescription, folds: Sequence[str]) -> None:
    """Refuse now what an import would refuse."""
    dataset = description.spec().name
    if not (layout.IS_DATASET.fullmatch(dataset) and is_safe_name(dataset)):
        raise ConfigError(f"the model is of {dataset!r}, which is not named DatasetXXX_Name (dataset in its plans)")
    if others := [fold for fold in folds if not layout.IS_FOLD.fullmatch(fold)]:
        raise ConfigError(f"fold {others[0]!r} is neither a number nor all")
    if not is_safe_name(name):
        raise ConfigError(f"configuration and network make the name {name!r}, which is no folder's on every system")
    description.parsed_plans().configuration(description.configuration).network(description.network)


def example_window(description: ModelDescription) -> Tensor:
    """A window (1, C, z, y, x) as the network sees it: noise, and in a cascade random labels of the first stage."""
    generator = torch.Generator().manual_seed(SEED)
    plan = description.parsed_plans().configuration(description.configuration).network(description.network)
    channels = len(description.spec().channel_names)
    image = torch.randn(1, channels, *plan.patch_size, generator=generator)
    labels = int(description.arguments.get("previous_labels", 0))
    if not labels:
        return image
    first = torch.randint(0, labels + 1, (1, 1, *plan.patch_size), generator=generator)
    return torch.cat([image, first.float()], dim=1)


def _write_onnx(
    writer: ArchiveWriter, name: str, fold: str, description: ModelDescription, network: nn.Module
) -> dict[str, Any]:
    window = example_window(description)
    content, compared = onnx_bytes(network, window, description.network)
    writer.add(layout.of_fold(name, fold, layout.ONNX), content)
    return {"input": INPUT, "output": OUTPUT, "shape": list(window.shape), **compared}


def _write_monai(
    writer: ArchiveWriter, name: str, fold: str, description: ModelDescription, network: nn.Module
) -> dict[str, Any]:
    weights, named = monai_network(description, network)
    window = example_window(description)
    compared = compare_with_monai(network, weights, named, window)
    writer.add(layout.of_fold(name, fold, layout.MONAI_WEIGHTS), weights_to_bytes(weights, name))
    writer.add_json(layout.of_fold(name, fold, layout.MONAI_ARGUMENTS), named)
    return {**named, "max_abs_difference": None, **(compared or {})}


def _write_bounds(writer: ArchiveWriter, folder: Path, given: Path | None) -> None:
    """The bounds of the label filter: those that an imported model brought, else those of the data."""
    own = folder / layout.BOUNDS
    path = own if own.is_file() else given
    if path is not None and path.is_file():
        content = read_json(path, "bounds file")
        StratifiedBounds.from_json(content, str(path))  # or refuse it
        writer.add_json(layout.BOUNDS, content)


def _earlier_card(folder: Path) -> dict[str, Any]:
    """Of a model that was imported: its licence goes with it."""
    path = folder / layout.CARD
    content = read_json(path, "model card") if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _own_citation(card: dict[str, Any]) -> str | None:
    """What an earlier card asked to cite beside the method."""
    listed = card.get("citation")
    return str(listed[1]) if isinstance(listed, list) and len(listed) > 1 else None
