"""Predict and score a fold's validation cases at their native geometry, as they would be used."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from tqdm import tqdm

from ukbob_seg.dataset.paths import Roots
from ukbob_seg.dataset.spec import DatasetSpec, require_cases
from ukbob_seg.evaluation.evaluate import EvaluationSummary, ReportOptions, evaluate_pairs
from ukbob_seg.files import read_json
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.training.distributed import gather, is_first, my_cases
from ukbob_seg.training.splits import choose_split, load_groups, load_or_make_splits

log = logging.getLogger(__name__)


def validate_fold(
    model_folder: Path,
    fold: str,
    roots: Roots,
    device: str = "cpu",
    settings: PredictionSettings | None = None,
    checkpoint: str = "best",
    max_cases: int = 0,
) -> EvaluationSummary:
    """Write ``fold_K/validation/*.nii.gz`` with summary.json, metrics.csv and report.html.

    Several processes share the cases; the first one scores, and all get the summary.

    Args:
        model_folder: ``results/DatasetXXX_Name/CONFIG__NETWORK``.
        fold: which fold's held-out cases (for ``all``, the training cases themselves).
        roots: folders; images and labels are read from the raw dataset.
        device: where to predict.
        settings: how to predict.
        checkpoint: ``best`` or ``final``.
        max_cases: only the first so many cases, 0 for all.
    """
    name = model_folder.parent.name
    raw = roots.raw / name
    spec = DatasetSpec.load(raw)
    cases = {case.name: case for case in require_cases(raw, spec)}
    preset = read_json(model_folder / "plans.json", "plans")["preset"]
    splits = None
    if fold != "all":
        groups = load_groups(raw / "groups.csv", sorted(cases))
        scheme = "80-10-10" if preset == "ukbob" else "5-fold"
        splits = load_or_make_splits(roots.preprocessed / name, sorted(cases), groups, scheme)
    chosen = choose_split(splits, fold, sorted(cases)).val[: max_cases or None]
    folder = model_folder / f"fold_{fold}" / "validation"
    outputs = {case: folder / f"{case}{spec.file_ending}" for case in chosen}
    # What postprocessing does is decided by these predictions, so that they must be without it.
    settings = dataclasses.replace(settings or PredictionSettings(), postprocessing=False)
    # In a cascade the first stage must not have seen these cases either: its fold of the same number, then.
    first_stage = None if fold == "all" else [fold]
    with Predictor.from_model_folder(model_folder, [fold], checkpoint, device, settings, first_stage) as predictor:
        for case in tqdm(my_cases(chosen), desc=f"validating fold {fold}", unit="case", disable=not is_first()):
            predictor.predict_case(cases[case].images, outputs[case])
    gather(None)  # all processes have written theirs
    images = raw / "imagesTr"  # cases listed in dataset.json may lie elsewhere; the pictures then have no background
    report = ReportOptions(images=images if images.is_dir() else None)
    pairs = [(case, outputs[case], label) for case in chosen if (label := cases[case].label) is not None]
    summaries = gather(evaluate_pairs(pairs, spec.labels, folder, report=report) if is_first() else None)
    return next(summary for summary in summaries if summary is not None)
