"""Which model of a dataset, or which ensemble of them, predicts held-out cases best."""

from __future__ import annotations

import itertools
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ukbob_seg.dataset.paths import Roots, find_dataset
from ukbob_seg.errors import ConfigError, DatasetError, UkbobError, listing
from ukbob_seg.evaluation.crossval import HeldOut, accumulate, check_validated, crossval_folder
from ukbob_seg.evaluation.ensemble_validation import checkpoints_of, stages_of, validate_ensembles
from ukbob_seg.evaluation.metrics import DISTANCES, check_tolerances
from ukbob_seg.evaluation.postprocessing import Comparison, find_postprocessing
from ukbob_seg.evaluation.summary import OVERALL, OverallMean
from ukbob_seg.files import ensure_writable, write_json
from ukbob_seg.inference.postprocessing import POSTPROCESSING

log = logging.getLogger(__name__)

BEST_MODEL = "best_model.json"
ENSEMBLES = "ensembles"
DIGITS = 6  # differences below are none


@dataclass(frozen=True)
class SelectionOptions:
    """What is compared, and by what.

    Attributes:
        metric: one of ``OVERALL``; distances are better when lower, all others when higher.
        tolerance_mm: of the normalized surface Dice.
        folds: None for all of the splits.
        configurations: only models of these; None for all.
        networks: only models of these; None for all.
        ensemble_size: ensembles of up to so many models; 1 for none.
        models_at_once: in memory together while ensembles are predicted; more save repeated runs.
        postprocessing: decide for the winner which classes keep their largest component alone.
    """

    metric: str = "dice"
    tolerance_mm: float = 2.0
    folds: tuple[str, ...] | None = None
    configurations: tuple[str, ...] | None = None
    networks: tuple[str, ...] | None = None
    ensemble_size: int = 2
    models_at_once: int = 4
    postprocessing: bool = True

    def __post_init__(self) -> None:
        if self.metric not in OVERALL:
            raise ConfigError(f"--metric must be one of {', '.join(OVERALL)}, got {self.metric!r}")
        check_tolerances(self.tolerance_mm, "--tolerance-mm")
        if self.ensemble_size < 1:
            raise ConfigError(f"--ensemble-size must be at least 1 (no ensembles), got {self.ensemble_size}")
        if self.models_at_once < 2:
            raise ConfigError(f"--models-at-once must be at least 2, got {self.models_at_once}")

    @property
    def lower_is_better(self) -> bool:
        """Of the metric."""
        return self.metric in DISTANCES


@dataclass(frozen=True)
class Candidate:
    """A model, or an ensemble of several.

    Attributes:
        models: model folders.
        folder: that with ``fold_K/validation``: the model folder, or ``ensembles/A---B``.
        stages: networks per fold that have to run, those of first stages of cascades included.
    """

    models: tuple[Path, ...]
    folder: Path
    stages: int

    @property
    def name(self) -> str:
        """``CONFIG__NETWORK``, of an ensemble several, joined by three hyphens."""
        return self.folder.name


@dataclass(frozen=True)
class Ranked:
    """A candidate and its score: the metric's mean over classes of the means over all held-out cases."""

    candidate: Candidate
    score: OverallMean


@dataclass(frozen=True)
class Selection:
    """What was compared and decided.

    Attributes:
        options: of the comparison.
        folds: whose held-out cases counted.
        ranking: best first.
        skipped: models that took no part -> why.
        comparison: of the winner's classes with and without stray pieces; None where that was not looked at.
        commands: to predict with the winner.
        file: ``best_model.json``.
    """

    options: SelectionOptions
    folds: tuple[str, ...]
    ranking: tuple[Ranked, ...]
    skipped: Mapping[str, str]
    comparison: Comparison | None
    commands: tuple[str, ...]
    file: Path

    @property
    def winner(self) -> Candidate:
        """First of the ranking."""
        return self.ranking[0].candidate


def find_best(
    dataset: str | int,
    roots: Roots,
    options: SelectionOptions | None = None,
    device: str = "cpu",
    workers: int | None = None,
) -> Selection:
    """Rank all models of a dataset and their ensembles by their cross-validation, and write ``best_model.json``.

    Models are scored by the validation predictions that training left; ensembles predict the held-out cases of each
    fold with that fold's checkpoints first. For the winner ``postprocessing.json`` is written into its folder.

    Args:
        dataset: id or folder name.
        roots: folders; ``results/DatasetXXX_Name`` has the models.
        options: what is compared, and by what.
        device: where ensembles predict.
        workers: processes for scoring, None to choose.

    Raises:
        DatasetError: no model has all folds, a case is in two folds, or files cannot be read.
        ConfigError: no such dataset, fold, configuration or network.
        CheckpointError: a member's checkpoint of a fold is lacking, or models of other channels.
    """
    options = options or SelectionOptions()
    held_out = HeldOut.load(dataset, roots, options.folds)
    folder = find_dataset(roots.results, held_out.raw.name)
    ensure_writable(folder)
    models, skipped = find_models(folder, held_out, options)
    candidates = list_candidates(folder, models, options.ensemble_size)
    if options.ensemble_size > 1 and len(models) > 1:
        for model, fold in itertools.product(models, held_out.folds):
            checkpoints_of(model, fold)  # say what is lacking before the work
    ensembles = {candidate.folder: candidate.models for candidate in candidates if len(candidate.models) > 1}
    validate_ensembles(ensembles, held_out, device, options.models_at_once)
    scored = []
    for number, candidate in enumerate(candidates, 1):
        log.info("%d of %d: %s", number, len(candidates), candidate.name)
        summary = accumulate(candidate.folder, held_out, options.tolerance_mm, workers)
        scored.append(Ranked(candidate, summary.overall(options.metric)))
    ranking = rank(scored, options.lower_is_better)
    winner, comparison = ranking[0].candidate, None
    if options.postprocessing and not held_out.spec.labels.has_regions:
        comparison = find_postprocessing(winner.folder, held_out.raw, workers, folds=list(held_out.folds))
    commands = (predict_command(winner, held_out, comparison),)
    selection = Selection(options, tuple(held_out.folds), ranking, skipped, comparison, commands, folder / BEST_MODEL)
    write_json(selection.file, to_json(selection, len(held_out.references())))
    return selection


def find_models(folder: Path, held_out: HeldOut, options: SelectionOptions) -> tuple[list[Path], dict[str, str]]:
    """Model folders that can be compared; and those that cannot, with the reason.

    Args:
        folder: ``results/DatasetXXX_Name``.
        held_out: folds that a model must have validated.
        options: which configurations and networks.

    Raises:
        ConfigError: a configuration or network of which there is no model.
        DatasetError: no model can be compared; says why not.
    """
    trained = sorted(path for path in folder.glob("*__*") if path.is_dir() and any(path.glob("fold_*")))
    parts = {path: path.name.partition("__")[::2] for path in trained}
    wanted = []
    for position, what in enumerate(("configurations", "networks")):
        given = getattr(options, what)
        names = None if given is None else {name.replace(":", ".") for name in given}
        there = sorted({part[position] for part in parts.values()})
        if unknown := sorted((names or set()) - set(there)):
            raise ConfigError(f"no model of {what[:-1]} {unknown[0]} in {folder} (found: {listing(there) or 'none'})")
        wanted.append(names)
    models, skipped = [], {}
    for path, both in parts.items():
        if any(names is not None and part not in names for part, names in zip(both, wanted, strict=True)):
            continue
        try:
            check_validated(path, held_out)
        except UkbobError as error:
            skipped[path.name] = str(error)
        else:
            models.append(path)
    if not models:
        reasons = "; ".join(skipped.values()) or "none was trained"
        raise DatasetError(f"no model in {folder} can be compared on folds {', '.join(held_out.folds)}: {reasons}")
    return models, skipped


def list_candidates(folder: Path, models: Sequence[Path], ensemble_size: int = 2) -> list[Candidate]:
    """Every model, and every ensemble of 2 to ``ensemble_size`` of them."""
    stages = {model: len(stages_of(model)) for model in models}
    found = []
    for size in range(1, min(ensemble_size, len(models)) + 1):
        for members in itertools.combinations(models, size):
            place = members[0] if size == 1 else folder / ENSEMBLES / "---".join(model.name for model in members)
            found.append(Candidate(members, place, sum(stages[model] for model in members)))
    return found


def rank(scored: Sequence[Ranked], lower_is_better: bool) -> tuple[Ranked, ...]:
    """Best first; of equals, to six decimals, that of fewer models, then of fewer networks.

    Infinite distances are in no mean, so that a model that misses an organ would profit: fewer of them come first,
    whatever the mean. A mean that is NaN, of no finite value at all, comes last of those.
    """

    def key(entry: Ranked) -> tuple[Any, ...]:
        score, candidate = entry.score, entry.candidate
        unknown = math.isnan(score.mean)
        value = 0.0 if unknown else round(score.mean if lower_is_better else -score.mean, DIGITS)
        return score.n_infinite, unknown, value, len(candidate.models), candidate.stages, candidate.name

    return tuple(sorted(scored, key=key))


def predict_command(winner: Candidate, held_out: HeldOut, comparison: Comparison | None) -> str:
    """An ``ukbob_predict`` line for a shell, with absolute paths; images are those of imagesTs where there are some.

    A model's own ``postprocessing.json`` is done without saying; that of an ensemble has to be named.
    """
    images = held_out.raw / "imagesTs"
    source = str(images.resolve()) if images.is_dir() else "INPUT_FOLDER"
    results = winner.models[0].resolve().parent
    parts = ["ukbob_predict", "-i", source, "-o", str(results / "predictions_best")]
    for model in winner.models:
        parts += ["-m", str(model.resolve())]
    parts += ["-f", *held_out.folds]
    if len(winner.models) > 1 and comparison is not None and comparison.postprocessing.largest_component:
        parts += ["--postprocessing", str((winner.folder / POSTPROCESSING).resolve())]
    return shlex.join(parts)


def to_json(selection: Selection, cases: int) -> dict[str, Any]:
    """Content of ``best_model.json``; a mean of no finite value is null."""
    options, comparison = selection.options, selection.comparison

    def entry(ranked: Ranked) -> dict[str, Any]:
        candidate, score = ranked.candidate, ranked.score
        return {
            "name": candidate.name,
            "models": [str(model.resolve()) for model in candidate.models],
            "mean": None if math.isnan(score.mean) else score.mean,
            "classes": score.classes,
            "values": score.values,
            "n_infinite": score.n_infinite,
            "results": str(crossval_folder(candidate.folder, selection.folds).resolve()),
        }

    decided = None
    if comparison is not None:
        file = str((selection.winner.folder / POSTPROCESSING).resolve())
        decided = {"largest_component": list(comparison.postprocessing.largest_component), "file": file}
    return {
        "version": 1,
        "metric": options.metric,
        "lower_is_better": options.lower_is_better,
        "tolerance_mm": options.tolerance_mm,
        "folds": list(selection.folds),
        "cases": cases,
        "winner": selection.winner.name,
        "ranking": [entry(ranked) for ranked in selection.ranking],
        "skipped": dict(selection.skipped),
        "postprocessing": decided,
        "commands": list(selection.commands),
    }
