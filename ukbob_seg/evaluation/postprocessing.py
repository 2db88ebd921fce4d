"""Which classes gain from keeping their largest component, as the validation predictions of the trained folds show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from ukbob_seg.dataset.image_io import read_labels
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import DatasetSpec, require_cases
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.files import write_json
from ukbob_seg.inference.postprocessing import POSTPROCESSING, Postprocessing, keep_largest
from ukbob_seg.parallel import choose_workers, map_cases

LEAST_GAIN = 1e-4  # of the mean Dice


@dataclass(frozen=True)
class Comparison:
    """What was compared and decided.

    Attributes:
        table: one row per class: ``cases`` in which it occurs, mean Dice ``before`` and ``after``, cases that got
            ``better`` and ``worse``, and whether its largest component is ``kept`` alone from now on.
        postprocessing: the decision.
        folds: whose predictions were looked at.
    """

    table: pd.DataFrame
    postprocessing: Postprocessing
    folds: tuple[str, ...]


def find_postprocessing(
    model_folder: Path,
    raw_folder: Path,
    workers: int | None = None,
    quiet: bool = False,
    folds: Sequence[str] | None = None,
) -> Comparison:
    """Compare every class's Dice with and without its stray pieces, and write ``postprocessing.json``.

    A class's largest component is kept alone when the mean Dice over its cases grows and more of them get better than
    worse. Fold ``all`` has no held-out cases and does not count.

    Args:
        model_folder: with ``fold_K/validation/`` of at least one fold; a model's, or an ensemble's.
        raw_folder: of the dataset, for the true labels.
        workers: processes, None to choose.
        quiet: no progress bar.
        folds: whose predictions to look at, None for all that have some.

    Raises:
        ConfigError: a model of regions, whose label values are no separate objects.
        DatasetError: no validation predictions, or a case without labels.
    """
    spec = DatasetSpec.load(raw_folder)
    if spec.labels.has_regions:
        raise ConfigError("a model of regions: its label values are parts of several regions, and stay as they are")
    truth = {case.name: case.label for case in require_cases(raw_folder, spec)}
    predicted: dict[str, Path] = {}
    used: list[str] = []
    for folder in sorted(model_folder.glob("fold_*/validation")):
        fold = folder.parent.name.removeprefix("fold_")
        files = {path.name.removesuffix(spec.file_ending): path for path in folder.glob(f"[!.]*{spec.file_ending}")}
        if fold != "all" and files and (folds is None or fold in folds):
            used.append(fold)
            predicted |= files
    if not predicted:
        raise DatasetError(
            f"{model_folder} holds no validation predictions of a fold; train one with its final validation"
        )
    if unknown := sorted(set(predicted) - set(truth)):
        raise DatasetError(
            f"case {unknown[0]}, which {model_folder} validated, has no labels in {raw_folder}; put them back, or "
            "train and validate that fold again"
        )
    pairs = [(predicted[name], truth[name]) for name in sorted(predicted)]
    scores = map_cases(
        partial(_scores, scheme=spec.labels), pairs, choose_workers(workers, len(pairs)), "comparing", quiet
    )
    table = _decide(np.stack(scores), spec.labels.output_names[1:])
    comparison = Comparison(table, Postprocessing(tuple(table.index[table["kept"]])), tuple(used))
    evidence = {
        name: {k: v if isinstance(v, bool | int) else round(float(v), 6) for k, v in row.items()}
        for name, row in table.astype(object).to_dict("index").items()
    }
    content = {"largest_component": list(comparison.postprocessing.largest_component), "folds": used,
               "evidence": evidence}  # fmt: skip
    write_json(model_folder / POSTPROCESSING, content)
    return comparison


def _scores(pair: tuple[Path, Path], scheme: LabelScheme) -> np.ndarray:
    """(classes, 2) Dice before and after; NaN where a class is in neither map."""
    (labels, _), (truth, _) = read_labels(pair[0]), read_labels(pair[1])
    maps = [labels, keep_largest(labels, scheme.values)]  # as in prediction, which knows no ignored voxels
    if scheme.ignore_value is not None:
        *maps, truth = (np.where(truth == scheme.ignore_value, 0, x) for x in (*maps, truth))
    before, after = (_dice(x, truth, scheme.values) for x in maps)
    return np.stack([before, after], axis=1)


def _dice(labels: np.ndarray, truth: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """(classes,) by counting every value once."""
    most = max(values) + 1
    found, true, both = (
        np.bincount(x[x < most].ravel(), minlength=most)[list(values)]
        for x in (labels, truth, np.where(labels == truth, labels, 0))
    )
    with np.errstate(invalid="ignore"):
        return 2 * both / (found + true)


def _decide(scores: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Rows of ``Comparison.table`` from (cases, classes, 2) Dice."""
    rows = []
    for name, (before, after) in zip(names, np.moveaxis(scores, 0, 2), strict=True):
        there = ~np.isnan(before)
        change = (after - before)[there]
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        gain = float(change.mean()) if len(change) else 0.0
        rows.append({
            "class": name, "cases": int(there.sum()),
            "before": float(before[there].mean()) if len(change) else float("nan"),
            "after": float(after[there].mean()) if len(change) else float("nan"),
            "better": better, "worse": worse, "kept": bool(gain >= LEAST_GAIN and better > worse),
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("class")
