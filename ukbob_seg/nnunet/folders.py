"""Where a trained model of nnU-Net lies: a folder, an archive, or a folder in an archive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ukbob_seg.errors import CheckpointError, ConfigError, listing
from ukbob_seg.nnunet.archive import check_archive, split_archive_path, unpack

NAMES = {"best": "checkpoint_best.pth", "final": "checkpoint_final.pth"}
_NEEDED = ("plans.json", "dataset.json")


@dataclass(frozen=True)
class ModelFiles:
    """A model folder on disk.

    Attributes:
        folder: with plans.json, dataset.json and ``fold_K``.
        shown: what the user gave, for messages and records.
    """

    folder: Path
    shown: str

    def folds(self, kind: str) -> list[str]:
        """Trained folds with this kind of checkpoint."""
        return [path.parent.name.removeprefix("fold_") for path in sorted(self.folder.glob(f"fold_*/{NAMES[kind]}"))]

    def checkpoint(self, fold: str, kind: str) -> Path:
        """Its file."""
        return self.folder / f"fold_{fold}" / NAMES[kind]

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


def find_model(folder: Path) -> ModelFiles:
    """The model that a path means; an archive is checked, and what prediction needs of it unpacked.

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
    names = {entry.filename for entry in entries}
    models = sorted({str(PurePosixPath(name).parent.parent) for name in names if _is_checkpoint(name)})
    whole = [model for model in models if all(_join(model, name) in names for name in _NEEDED)]
    if inner and inner not in whole:
        raise CheckpointError(f"{path} holds no model {inner!r} of nnU-Net (found: {listing(whole) or 'none'})")
    if not inner:
        # A cascade's first stage is there for the second, which is what is meant.
        last = [model for model in whole if not _is_first_stage(model, whole)]
        if len(last) != 1:
            what = "no whole model of nnU-Net v2 (plans.json, dataset.json, fold_K/checkpoint_final.pth)"
            if last:
                what = f"{len(last)} models; give one of them, such as -m {path}/{last[0]} ({listing(last)})"
            raise CheckpointError(f"{path} holds {what}")
        inner = last[0]
    needed = [entry for entry in entries if _is_checkpoint(entry.filename) or entry.filename.endswith(_NEEDED)]
    unpacked = unpack(path, needed)
    shown = str(path.resolve()) if inner == "." else f"{path.resolve()}/{inner}"
    return ModelFiles(unpacked / inner, shown)


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
    return ModelFiles(found[0], str(PurePosixPath(files.shown).with_name(found[0].name)))


def _is_checkpoint(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name in NAMES.values() and path.parent.name.startswith("fold_")


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _is_first_stage(model: str, models: Sequence[str]) -> bool:
    """By nnU-Net's names: ..__3d_lowres beside ..__3d_cascade_fullres."""
    head, _, name = model.rpartition("__")
    return name == "3d_lowres" and f"{head}__3d_cascade_fullres" in models
