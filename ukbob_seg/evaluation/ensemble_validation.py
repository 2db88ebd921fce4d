"""Predict what each fold holds out with an ensemble of that fold's networks alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ukbob_seg.errors import CheckpointError
from ukbob_seg.evaluation.crossval import HeldOut
from ukbob_seg.files import ensure_writable, file_sha256, read_json, write_json
from ukbob_seg.inference.earlier import ARGUMENTS, PredictionJob, mark_stale, what_matters
from ukbob_seg.inference.ensemble_predictor import EnsemblePredictor
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.preprocessing.plans import Plans
from ukbob_seg.training.checkpoint import NAMES

# What postprocessing does is decided by these predictions, so that they must be without it.
SETTINGS = PredictionSettings(postprocessing=False)


def validate_ensemble(models: Sequence[Path], folder: Path, held_out: HeldOut, device: str = "cpu") -> None:
    """Write ``FOLDER/fold_K/validation/CASE.ext`` of all held-out cases.

    Fold K's cases are predicted by the models' checkpoints of fold K, and with cascades by their first stages' of fold
    K: no network has seen them. Cases that are there are left alone, unless one of the checkpoints is another than that
    they were made with (``predict_args.json`` has their SHA-256); then all of the fold are predicted again.

    Args:
        models: model folders, at least two, in one folder.
        folder: for the results.
        held_out: folds and cases.
        device: where to predict.

    Raises:
        CheckpointError: a checkpoint is lacking, or models of other labels or channels.
        DatasetError: an image cannot be read; finished cases are kept.
    """
    for fold in held_out.folds:
        _validate_fold(models, folder / f"fold_{fold}" / "validation", fold, held_out, device)


def _validate_fold(models: Sequence[Path], output: Path, fold: str, held_out: HeldOut, device: str) -> None:
    ending = held_out.spec.file_ending
    jobs = [
        PredictionJob(name, held_out.cases[name].images, output / f"{name}{ending}", ending)
        for name in held_out.folds[fold]
    ]
    checkpoints = [path for model in models for path in checkpoints_of(model, fold)]
    record = {
        "models": [model.name for model in models],
        "fold": fold,
        "checkpoints": {
            f"{path.parents[1].name}/{path.parent.name}/{path.name}": file_sha256(path) for path in checkpoints
        },
        "settings": what_matters(SETTINGS),
    }
    ensure_writable(output)
    if _record_of(output) != record:
        mark_stale(jobs)  # before the record changes: an interrupted run must not take them for its own
        write_json(output / ARGUMENTS, record)
    todo = [job for job in jobs if not job.is_finished()]
    if not todo:
        return
    with ExitStack() as loaded:
        members = {}
        for model in models:
            # In a cascade the first stage must not have seen these cases either: its fold of the same number, then.
            member = Predictor.from_model_folder(model, [fold], "best", device, SETTINGS, [fold])
            members[model.name] = loaded.enter_context(member)
        predictor = EnsemblePredictor(members)
        if [Path(path) for path in predictor.origin()] != [path.resolve() for path in checkpoints]:
            raise RuntimeError(f"loaded {predictor.origin()}, expected {checkpoints}")
        for job in tqdm(todo, desc=f"{' + '.join(members)}, fold {fold}", unit="case"):
            predictor.predict_case(job.images, job.output)
            job.stale.unlink(missing_ok=True)


def stages_of(model: Path) -> list[Path]:
    """A model folder and, for a cascade, those of the stages before it.

    Raises:
        DatasetError, ConfigError: its plans.json cannot be read, or lacks its configuration.
    """
    configuration, _, network = model.name.partition("__")
    plans = Plans.load(model / "plans.json")
    stages = [model]
    while (previous := plans.configuration(configuration).previous_stage) is not None:
        configuration = previous
        stages.append(model.with_name(f"{previous}__{network}"))
    return stages


def checkpoints_of(model: Path, fold: str) -> list[Path]:
    """Checkpoint of one fold of a model, and of that fold of the stages before it.

    Raises:
        CheckpointError: one does not exist.
    """
    paths = [stage / f"fold_{fold}" / NAMES["best"] for stage in stages_of(model)]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(
                f"{path} does not exist: an ensemble predicts what fold {fold} holds out with the checkpoints of that "
                "fold; train it, or go without ensembles (--no-ensembles)"
            )
    return paths


def _record_of(output: Path) -> Any:
    path = output / ARGUMENTS
    return read_json(path, "record of the last run") if path.is_file() else None
