"""Dice of a network on preprocessed cases, by full sliding windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.inference.passes import AveragedPasses
from ukbob_seg.inference.sliding_window import WindowSettings, iterate_slabs, segment
from ukbob_seg.preprocessing.records import case_files
from ukbob_seg.preprocessing.storage import open_array
from ukbob_seg.training.cascade import read_map
from ukbob_seg.training.distributed import gather, my_cases
from ukbob_seg.training.sampling import TrainingCase


@dataclass(frozen=True)
class ValidationScore:
    """Mean Dice per class or region (NaN where it never occurs), and over those that do."""

    per_class: tuple[float, ...]
    mean: float


def validate(
    network: nn.Module,
    folder: Path,
    cases: Sequence[TrainingCase],
    scheme: LabelScheme,
    windows: WindowSettings,
    device: str,
    previous: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> ValidationScore | None:
    """Predict every case as a whole and score it at the preprocessed spacing.

    A class absent from both prediction and label of a case counts for nothing there; ignored voxels never count.
    Several processes share the cases, and all get the same score.

    Args:
        network: any network of the toolkit; left in the mode it came in.
        folder: preprocessed configuration.
        cases: to validate on.
        scheme: what the stored label indices mean.
        windows: sliding window.
        device: where the network is.
        previous: in a cascade, the first stage's maps, which are the last input channel.
        stop: asked before each case; once it is true, the rest is left undone.

    Returns:
        None when some process left cases undone.
    """
    was_training = network.training
    network.eval()
    rows: dict[str, list[float]] = {}
    try:
        for case in my_cases(cases):
            if stop():
                break
            image_path, label_path, _ = case_files(folder, case.name)
            channels = np.asarray(open_array(image_path)[:])
            if previous is not None:
                first_stage = np.asarray(read_map(previous, case.name)[:], dtype=np.float32)
                channels = np.concatenate([channels, first_stage[None]])
            image = torch.from_numpy(channels).to(device)
            labels = np.asarray(open_array(label_path)[:])
            if case.lookup is not None:
                labels = case.lookup[labels]
            count = _region_counts if scheme.has_regions else _class_counts
            counts = count(AveragedPasses([network]), image, labels, scheme, windows)
            rows[case.name] = [_dice(*three) for three in counts]
    finally:
        network.train(was_training)
    for others in gather(rows):
        rows.update(others)
    return _mean_score([rows[case.name] for case in cases]) if len(rows) == len(cases) else None


def _mean_score(rows: Sequence[Sequence[float]]) -> ValidationScore:
    table = np.array(rows, dtype=float)
    known = ~np.isnan(table)
    sums, counts = np.where(known, table, 0).sum(axis=0), known.sum(axis=0)
    per_class = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    mean = float(per_class[counts > 0].mean()) if counts.any() else float("nan")
    return ValidationScore(tuple(float(v) for v in per_class), mean)


def _region_counts(
    predict: AveragedPasses, image: Tensor, labels: np.ndarray, scheme: LabelScheme, windows: WindowSettings
) -> list[tuple[int, int, int]]:
    """(voxels in both, predicted, true) of each region. Regions overlap, so each slab is counted as it comes."""
    counts = np.zeros((len(scheme.names), 3), dtype=np.int64)
    for slab in iterate_slabs(predict, image, windows):
        part = labels[slab.z_start : slab.z_stop]
        valid = part != scheme.ignore_index
        predicted = (slab.logits > 0).cpu().numpy()[:, valid]
        true = scheme.region_table[:, part[valid].astype(np.int64)]
        counts += np.stack([(predicted & true).sum(axis=1), predicted.sum(axis=1), true.sum(axis=1)], axis=1)
    return [(int(both), int(one), int(other)) for both, one, other in counts]


def _class_counts(
    predict: AveragedPasses, image: Tensor, labels: np.ndarray, scheme: LabelScheme, windows: WindowSettings
) -> list[tuple[int, int, int]]:
    """(voxels in both, predicted, true) of each class."""
    predicted = segment(predict, image, windows, lambda logits: logits.argmax(0)).numpy()
    valid = labels != scheme.ignore_index
    classes = scheme.num_outputs
    joint = predicted[valid].astype(np.int64) * classes + labels[valid].astype(np.int64)
    table = np.bincount(joint, minlength=classes**2).reshape(classes, classes)
    order = [int(np.flatnonzero(row)[0]) for row in scheme.region_table]
    return [(int(table[k, k]), int(table[k].sum()), int(table[:, k].sum())) for k in order]


def _dice(both: int, one: int, other: int) -> float:
    return 2 * both / (one + other) if one + other else float("nan")
