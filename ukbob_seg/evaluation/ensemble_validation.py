"""Predict what each fold holds out with ensembles of that fold's networks alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ukbob_seg.dataset.image_io import read_image, write_labels
from ukbob_seg.errors import CheckpointError, DatasetError, listing
from ukbob_seg.evaluation.crossval import HeldOut
from ukbob_seg.files import ensure_writable, file_sha256, read_json, write_json
from ukbob_seg.inference.earlier import ARGUMENTS, PredictionJob, mark_stale, what_matters
from ukbob_seg.inference.ensemble_predictor import EnsemblePredictor
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.preprocessing.plans import Plans
from ukbob_seg.training.checkpoint import NAMES

# What postprocessing does is decided by these predictions, so that they must be without it.
SETTINGS = PredictionSettings(postprocessing=False)


def validate_ensembles(
    ensembles: Mapping[Path, Sequence[Path]], held_out: HeldOut, device: str = "cpu", models_at_once: int = 4
) -> None:
    """Write ``FOLDER/fold_K/validation/CASE.ext`` of all held-out cases, for every ensemble.

    Fold K's cases are predicted by the models' checkpoints of fold K, and with cascades by their first stages' of fold
    K: no network has seen them. A model runs once per case for all ensembles that are predicted together. Cases that
    are there are left alone, unless one of the checkpoints is another than that they were made with
    (``predict_args.json`` has their SHA-256); then all of the fold are predicted again.

    Args:
        ensembles: folder for the results -> model folders, at least two.
        held_out: folds and cases.
        device: where to predict.
        models_at_once: so many models are in memory together; more save repeated runs.

    Raises:
        CheckpointError: a checkpoint is lacking, or models of other labels or channels.
        DatasetError: an image cannot be read; finished cases are kept.
    """
    for fold in held_out.folds:
        todo = {}
        for folder, models in ensembles.items():
            jobs = _prepare(models, folder / f"fold_{fold}" / "validation", fold, held_out)
            if pending := [job for job in jobs if not job.is_finished()]:
                todo[tuple(models)] = pending
        for group in in_groups(list(todo), models_at_once):
            _predict({models: todo[models] for models in group}, fold, device)


def in_groups(ensembles: Sequence[tuple[Path, ...]], most: int) -> list[list[tuple[Path, ...]]]:
    """All ensembles, in groups of which each has at most ``most`` different models (or is one larger ensemble)."""
    rest, groups = list(ensembles), []
    while rest:
        models, group = set(rest[0]), [rest[0]]
        for ensemble in rest[1:]:
            if len(models | set(ensemble)) <= most:
                models |= set(ensemble)
                group.append(ensemble)
        groups.append(group)
        rest = [ensemble for ensemble in rest if ensemble not in group]
    return groups


def _prepare(models: Sequence[Path], output: Path, fold: str, held_out: HeldOut) -> list[PredictionJob]:
    """An ensemble's cases of a fold; those made with other checkpoints are marked, and the record is ours."""
    ending = held_out.spec.file_ending
    jobs = [
        PredictionJob(name, held_out.cases[name].images, output / f"{name}{ending}", ending)
        for name in held_out.folds[fold]
    ]
    record = {
        "models": [model.name for model in models],
        "fold": fold,
        "cases": list(held_out.folds[fold]),
        "checkpoints": {
            f"{path.parents[1].name}/{path.parent.name}/{path.name}": file_sha256(path)
            for model in models
            for path in checkpoints_of(model, fold)
        },
        "settings": what_matters(SETTINGS),
    }
    ensure_writable(output)
    if _record_of(output) != record:
        own = {job.output for job in jobs}
        for path in output.glob(f"[!.]*{ending}"):  # of cases that the fold held out before the splits changed
            if path not in own:
                path.unlink()
        mark_stale(jobs)  # before the record changes: an interrupted run must not take them for its own
        write_json(output / ARGUMENTS, record)
    return jobs


def _predict(todo: Mapping[tuple[Path, ...], Sequence[PredictionJob]], fold: str, device: str) -> None:
    """Predict the pending cases of some ensembles, each case with all models that it needs at once."""
    folders = list(dict.fromkeys(model for models in todo for model in models))
    jobs: dict[str, dict[tuple[str, ...], PredictionJob]] = {}
    for models, pending in todo.items():
        for job in pending:
            jobs.setdefault(job.name, {})[tuple(model.name for model in models)] = job
    with ExitStack() as loaded:
        members = {}
        for model in folders:
            # In a cascade the first stage must not have seen these cases either: its fold of the same number, then.
            member = Predictor.from_model_folder(model, [fold], "best", device, SETTINGS, [fold])
            members[model.name] = loaded.enter_context(member)
        predictor = EnsemblePredictor(members)
        expected = [path.resolve() for model in folders for path in checkpoints_of(model, fold)]
        if [Path(path) for path in predictor.origin()] != expected:
            raise RuntimeError(f"loaded {predictor.origin()}, expected {expected}")
        for wanted in tqdm(jobs.values(), desc=f"{listing([*members], 3)}, fold {fold}", unit="case"):
            needed = {name for names in wanted for name in names}
            predict_jobs(EnsemblePredictor({n: m for n, m in members.items() if n in needed}), wanted)


def predict_jobs(predictor: EnsemblePredictor, jobs: Mapping[tuple[str, ...], PredictionJob]) -> None:
    """Write the label maps of one case, for every average of some of the models.

    Raises:
        DatasetError: the image cannot be read, or does not fit.
    """
    images = next(iter(jobs.values())).images
    try:
        image, geometry = read_image(images)
        labels = predictor.predict_subsets(image, geometry, list(jobs))
    except DatasetError as error:
        raise DatasetError(f"{images[0]}: {error}") from error
    for job, found in zip(jobs.values(), labels, strict=True):
        write_labels(found, geometry, job.output)
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
