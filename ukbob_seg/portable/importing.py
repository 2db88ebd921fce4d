"""Bring an exported model into the results folder, as if it had been trained there."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ukbob_seg.dataset.paths import list_datasets
from ukbob_seg.errors import ConfigError, DatasetError, UkbobError, listing
from ukbob_seg.files import file_sha256, write_json
from ukbob_seg.portable import layout
from ukbob_seg.portable.archive import Archive, open_archive
from ukbob_seg.portable.incoming import Incoming, IncomingModel, read_incoming, read_weights
from ukbob_seg.portable.model_card import predict_command
from ukbob_seg.training.checkpoint import IMPORTED, NAMES, save_checkpoint


@dataclass(frozen=True)
class Imported:
    """What was written.

    Attributes:
        folders: model folders; first the one that is meant, then its first stages.
        card: of the model.
        sha256: of the archive.
        command: that predicts with it.
    """

    folders: tuple[Path, ...]
    card: dict[str, Any]
    sha256: str
    command: str


def import_model(archive: Path, results: Path, overwrite: bool = False, quiet: bool = False) -> Imported:
    """Check an archive and make ``results/DatasetXXX_Name/CONFIG__NETWORK`` of it, whole or not at all.

    Args:
        archive: what ``export_model`` wrote.
        results: root of the results.
        overwrite: replace model folders that are there, with all that is in them.
        quiet: no progress bar.

    Raises:
        CheckpointError: the archive is damaged, dangerous, of a later version, or no model; nothing was written.
        ConfigError: a model folder exists, or another dataset has the id; nothing was written.
        UkbobError: the folder cannot be written; nothing is left of it.
    """
    archive, results = Path(archive), Path(results)
    with open_archive(archive) as opened:
        incoming = read_incoming(opened)
        targets = tuple(results / incoming.dataset / model.name for model in incoming.models)
        _check_targets(results, incoming.dataset, targets, overwrite)
        origin = {"archive": archive.name, "sha256": file_sha256(archive), "ukbob_seg": opened.maker}
        with _staging(results) as staging:
            total = sum(len(model.folds) for model in incoming.models)
            with tqdm(total=total, desc="importing", unit="fold", disable=quiet) as bar:
                for model in incoming.models:
                    _write_model(opened, incoming, model, staging / model.name, origin, bar)
            _write_texts(opened, staging / incoming.models[0].name)
            _put_in_place(staging, targets)
    main = incoming.models[0].description
    command = predict_command(incoming.dataset, main.configuration, main.network, incoming.checkpoint)
    return Imported(targets, dict(incoming.card), origin["sha256"], f"{command} --results {shlex.quote(str(results))}")


def _check_targets(results: Path, dataset: str, targets: tuple[Path, ...], overwrite: bool) -> None:
    """Refuse to replace what is there, and to make a second dataset of one id, which no command could tell apart."""
    number = int(dataset[len("Dataset") :].split("_")[0])
    try:
        known = list_datasets(results) if results.is_dir() else {}
    except DatasetError as error:
        raise ConfigError(f"{error}; import into another folder with --results") from error
    if number in known and known[number].name != dataset:
        raise ConfigError(
            f"{results} has results of {known[number].name}, and the model is of {dataset}, with the same id; import "
            "it into another folder with --results"
        )
    present = [str(target) for target in targets if target.exists() or target.is_symlink()]
    if present and not overwrite:
        raise ConfigError(
            f"{listing(present)} already exists; replace it with --overwrite (all of it is deleted), or import into "
            "another folder with --results"
        )


def _write_model(
    archive: Archive, incoming: Incoming, model: IncomingModel, folder: Path, origin: dict[str, Any], bar: tqdm
) -> None:
    """A model folder, as training leaves it."""
    for fold, content in model.folds.items():
        place = folder / f"fold_{fold}"
        weights = read_weights(archive, model, fold)
        save_checkpoint(place / NAMES[incoming.checkpoint], content.description, weights, **content.progress)
        write_json(place / IMPORTED, {**origin, "facts": dict(content.facts)})
        for name in layout.COPIED:
            _copy(archive, layout.of_fold(model.name, fold, name), place / name)
        bar.update()
    write_json(folder / layout.PLANS, model.description.plans)
    write_json(folder / layout.DATASET, model.description.dataset)
    member = layout.of_model(model.name, layout.POSTPROCESSING)
    _copy(archive, member, folder / layout.POSTPROCESSING)


def _write_texts(archive: Archive, folder: Path) -> None:
    for name in layout.OF_ARCHIVE:
        _copy(archive, name, folder / name)


def _copy(archive: Archive, member: str, path: Path) -> None:
    if member in archive.names:
        path.write_bytes(archive.read(member))


@contextmanager
def _staging(results: Path) -> Iterator[Path]:
    """A hidden folder beside the datasets, on the same disk, which is gone afterwards.

    Raises:
        UkbobError: it cannot be written.
    """
    folder = results / f".importing-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise UkbobError(
            f"cannot write into {results}: {error.strerror or error}; check permissions and free disk space"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(staging: Path, targets: tuple[Path, ...]) -> None:
    """Rename the finished folders, first stages first; if one fails, all is as it was."""
    replaced: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    made = not targets[0].parent.exists()
    targets[0].parent.mkdir(exist_ok=True)
    try:
        for target in reversed(targets):
            if target.exists() or target.is_symlink():
                old = staging / f"replaced-{target.name}"
                target.rename(old)
                replaced.append((old, target))
            (staging / target.name).rename(target)
            placed.append(target)
    except BaseException:  # also an interrupt
        for target in placed:
            target.rename(staging / f"undone-{target.name}")
        for old, target in replaced:
            old.rename(target)
        if made:
            targets[0].parent.rmdir()
        raise
