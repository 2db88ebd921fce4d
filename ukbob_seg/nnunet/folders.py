"""Where a trained model of nnU-Net lies: a folder, an archive, or a folder in an archive."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ukbob_seg.errors import CheckpointError, ConfigError, listing
from ukbob_seg.nnunet.archive import check_archive, split_archive_path, unpack
from ukbob_seg.zips import MANIFEST, MODEL_FORMAT

NAMES = {"best": "checkpoint_best.pth", "final": "checkpoint_final.pth"}
INFERENCE_CONFIG = "inference_config.json"  # beside plans.json, in TotalVibeSegmentator's later models
_NEEDED = ("plans.json", "dataset.json")
_LEVELS = 3  # below a folder that was given, models are looked for: nnUNet_results/DatasetXXX/TRAINER__PLANS__CONFIG


@dataclass(frozen=True)
class ArchivedModel:
    """Where in an archive a model lies.

    Attributes:
        archive: a checked one.
        inner: the model's folder in it, ``.`` for the top.
        checkpoints: those of all models in the archive.
    """

    archive: Path
    inner: str
    checkpoints: tuple[zipfile.ZipInfo, ...] = field(compare=False)

    def entry(self, fold: str, name: str) -> zipfile.ZipInfo | None:
        """A checkpoint of a fold."""
        wanted = _join(self.inner, f"fold_{fold}/{name}")
        return next((entry for entry in self.checkpoints if entry.filename == wanted), None)

    def folds(self, name: str) -> list[str]:
        """Folds with a checkpoint of that name."""
        paths = [PurePosixPath(entry.filename) for entry in self.checkpoints]
        mine = [path.parent for path in paths if path.name == name and str(path.parent.parent) == self.inner]
        return sorted(folder.name.removeprefix("fold_") for folder in mine)


@dataclass(frozen=True)
class ModelFiles:
    """A model folder on disk.

    Attributes:
        folder: with plans.json, dataset.json and ``fold_K``; of an archive what was unpacked of it.
        shown: what the user gave, for messages and records.
        archived: where it comes from; None for a folder.
    """

    folder: Path
    shown: str
    archived: ArchivedModel | None = None

    def folds(self, kind: str) -> list[str]:
        """Trained folds with this kind of checkpoint."""
        if self.archived is not None:
            return self.archived.folds(NAMES[kind])
        return [path.parent.name.removeprefix("fold_") for path in sorted(self.folder.glob(f"fold_*/{NAMES[kind]}"))]

    def checkpoint(self, fold: str, kind: str) -> Path:
        """Its file; out of an archive it is unpacked when it is first asked for."""
        if self.archived is not None and (entry := self.archived.entry(fold, NAMES[kind])) is not None:
            unpack(self.archived.archive, [entry])
        return self.folder / f"fold_{fold}" / NAMES[kind]

    def beside(self, folder: Path) -> ModelFiles:
        """The model in a folder beside this one."""
        archived = self.archived
        if archived is not None:
            inner = str(PurePosixPath(archived.inner).with_name(folder.name))
            archived = ArchivedModel(archived.archive, inner, archived.checkpoints)
        return ModelFiles(folder, str(PurePosixPath(self.shown).with_name(folder.name)), archived)

    def shown_checkpoint(self, fold: str, kind: str) -> str:
        """Its name for records, the same in every process."""
        return f"{self.shown}/fold_{fold}/{NAMES[kind]}"

    def choose(self, folds: Sequence[str] | None, kind: str | None) -> tuple[tuple[str, ...], str]:
        """Which folds and which checkpoint are meant.

        Raises:
            ConfigError: an unknown kind, or a fold twice.
            CheckpointError: a fold is missing.
        """
        if kind not in (None, *NAMES):
            raise ConfigError(f"--checkpoint must be best or final, got {kind!r}")
        kinds = [kind] if kind is not None else ["final", "best"]  # nnU-Net predicts with final
        for candidate in kinds:
            found = self.folds(candidate)
            wanted = list(folds) if folds else [fold for fold in found if fold != "all"] or found
            if twice := sorted({fold for fold in wanted if wanted.count(fold) > 1}):
                raise ConfigError(f"fold {twice[0]} is given twice")
            if wanted and all(fold in found for fold in wanted):
                return tuple(wanted), candidate
        trained = {name: ", ".join(self.folds(name)) or "none" for name in NAMES}
        raise CheckpointError(
            f"{self.shown} has no {' or '.join(NAMES[k] for k in kinds)} for fold {', '.join(folds or ()) or 'any'} "
            f"(trained: {trained['final']} final, {trained['best']} best)"
        )


def is_nnunet_model(folder: Path) -> bool:
    """Whether a path is a model folder of nnU-Net or an archive; nothing is unpacked."""
    return split_archive_path(folder) is not None or any(folder.glob("fold_*/checkpoint_*.pth"))


def models_below(folder: Path) -> list[Path]:
    """Model folders, of nnU-Net or ours, some levels below a folder that is none; at most one level's."""
    for level in range(1, _LEVELS):
        found = {path.parents[1] for path in folder.glob("*/" * level + "fold_*/checkpoint_*.pt*")}
        if found:
            return sorted(found)
    return []


def refuse_our_archive(path: Path) -> None:
    """Say what is to be done with an archive that this package exported.

    Raises:
        CheckpointError: it is one.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(MANIFEST) as file:
            content = json.loads(file.read(2**24))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return
    if isinstance(content, dict) and content.get("format") == MODEL_FORMAT:
        raise CheckpointError(
            f"{path} is a model that ukbob_export_model wrote: make a model folder of it with ukbob_import_model {path}"
        )


def find_model(folder: Path) -> ModelFiles:
    """The model that a path means; an archive is checked, and plans and descriptions of its models unpacked.

    Raises:
        CheckpointError: none there, several to choose from, or an archive that is refused.
    """
    archived = split_archive_path(folder)
    if archived is None:
        lacking = [name for name in _NEEDED if not (folder / name).is_file()]
        if lacking:
            raise CheckpointError(f"{folder} is not a whole model folder of nnU-Net: it lacks {' and '.join(lacking)}")
        return ModelFiles(folder, str(folder.resolve()))
    path, inner = archived
    entries = check_archive(path)
    inner = _choose_inner(path, inner, [entry.filename for entry in entries])
    checkpoints = tuple(entry for entry in entries if _is_checkpoint(entry.filename))
    unpacked = unpack(path, [e for e in entries if PurePosixPath(e.filename).name in (*_NEEDED, INFERENCE_CONFIG)])
    shown = str(path.resolve()) if inner == "." else f"{path.resolve()}/{inner}"
    return ModelFiles(unpacked / inner, shown, ArchivedModel(path, inner, checkpoints))


def _choose_inner(path: Path, inner: str, names: Sequence[str]) -> str:
    """The folder of the model in an archive that is meant."""
    models = sorted({str(PurePosixPath(name).parent.parent) for name in names if _is_checkpoint(name)})
    whole = [model for model in models if all(_join(model, name) in names for name in _NEEDED)]
    if inner and inner in whole:
        return inner
    if not whole:
        refuse_our_archive(path)
    if inner:
        raise CheckpointError(f"{path} holds no model {inner!r} of nnU-Net (found: {listing(whole) or 'none'})")
    # A cascade's first stage is there for the second, which is what is meant.
    last = [model for model in whole if not _is_first_stage(model, whole)]
    if len(last) != 1:
        what = "no whole model of nnU-Net v2 (plans.json, dataset.json, fold_K/checkpoint_final.pth)"
        if last:
            what = f"{len(last)} models; give one of them, such as -m {path}/{last[0]} ({listing(last)})"
        raise CheckpointError(f"{path} holds {what}")
    return last[0]


def find_first_stage(files: ModelFiles, configuration: str) -> ModelFiles:
    """The model folder of a cascade's first stage, beside the second's: same trainer and plans if there are several.

    Raises:
        CheckpointError: it is not there.
    """
    head, _, _ = files.folder.name.rpartition("__")
    own = files.folder.with_name(f"{head}__{configuration}")
    plans = head.rpartition("__")[2]
    others = sorted(files.folder.resolve().parent.glob(f"*__{plans}__{configuration}"))
    found = [own] if own.is_dir() else others
    if len(found) != 1:
        what = "several" if found else "no"
        raise CheckpointError(
            f"{files.shown} is the second stage of a cascade and there are {what} models of its first stage "
            f"({configuration}) beside it; put {own.name} there"
        )
    return files.beside(found[0])


def _is_checkpoint(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name in NAMES.values() and path.parent.name.startswith("fold_")


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _is_first_stage(model: str, models: Sequence[str]) -> bool:
    """By nnU-Net's names: ..__3d_lowres beside ..__3d_cascade_fullres."""
    head, _, name = model.rpartition("__")
    return name == "3d_lowres" and f"{head}__3d_cascade_fullres" in models
