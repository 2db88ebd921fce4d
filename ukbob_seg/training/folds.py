"""Training several folds one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ukbob_seg.dataset.paths import Roots, find_dataset
from ukbob_seg.errors import ConfigError
from ukbob_seg.preprocessing.plans import Plans
from ukbob_seg.training.checkpoint import NAMES
from ukbob_seg.training.config import RunOptions
from ukbob_seg.training.setup import find_split, model_folder
from ukbob_seg.training.state import check_start, has_run


def options_per_fold(
    dataset: int | str, folds: Sequence[str], roots: Roots, options: RunOptions, configuration: str, network: str
) -> dict[str, RunOptions]:
    """How each fold is to be trained, checked for all of them before the first one starts.

    With several folds, ``options.resume`` means: go on with those that were begun, start the others.

    Raises:
        ConfigError, CheckpointError: a fold does not exist, is given twice, or cannot be started so.
    """
    folder = find_dataset(roots.preprocessed, dataset)
    preset = Plans.load(folder / "plans.json").preset
    model = model_folder(roots, folder.name, configuration, network)
    chosen: dict[str, RunOptions] = {}
    for fold in folds:
        if fold in chosen:
            raise ConfigError(f"fold {fold} is given twice")
        find_split(folder, preset, roots, fold)
        begun = has_run(model / f"fold_{fold}")
        chosen[fold] = options if len(folds) == 1 else dataclasses.replace(options, resume=options.resume and begun)
        check_start(model / f"fold_{fold}", chosen[fold])
    return chosen


def is_validated(folder: Path) -> bool:
    """Whether a fold's final validation was made after its training ended."""
    summary, final = folder / "validation" / "summary.json", folder / NAMES["final"]
    return summary.is_file() and final.is_file() and summary.stat().st_mtime_ns >= final.stat().st_mtime_ns
