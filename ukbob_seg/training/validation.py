"""Dice of a network on preprocessed cases, by full sliding windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.inference.passes import AveragedPasses
from ukbob_seg.inference.sliding_window import WindowSettings, segment
from ukbob_seg.preprocessing.preprocessor import case_files
from ukbob_seg.preprocessing.storage import open_array
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
) -> ValidationScore:
    """Predict every case as a whole and score it at the preprocessed spacing.

    A class absent from both prediction and label of a case counts for nothing there; ignored voxels never count.

    Args:
        network: any network of the toolkit; left in the mode it came in.
        folder: preprocessed configuration.
        cases: to validate on.
        scheme: what the stored label indices mean.
        windows: sliding window.
        device: where the network is.
    """
    was_training = network.training
    network.eval()
    rows = []
    try:
        for case in cases:
            image_path, label_path, _ = case_files(folder, case.name)
            image = torch.from_numpy(np.asarray(open_array(image_path)[:])).to(device)
            labels = np.asarray(open_array(label_path)[:])
            if case.lookup is not None:
                labels = case.lookup[labels]
            if scheme.has_regions:
                predicted = segment(AveragedPasses([network]), image, windows, _region_bits).numpy()
            else:
                predicted = segment(AveragedPasses([network]), image, windows, lambda x: x.argmax(0)).numpy()
            rows.append(_case_dice(predicted, labels, scheme))
    finally:
        network.train(was_training)
    table = np.array(rows, dtype=float)
    known = ~np.isnan(table)
    sums, counts = np.where(known, table, 0).sum(axis=0), known.sum(axis=0)
    per_class = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    mean = float(per_class[counts > 0].mean()) if counts.any() else float("nan")
    return ValidationScore(tuple(float(v) for v in per_class), mean)


def _region_bits(logits: Tensor) -> Tensor:
    """Positive regions of each voxel as bits of one integer, so that overlapping regions survive in one map."""
    powers = 2 ** torch.arange(logits.shape[0], device=logits.device, dtype=torch.int64)
    return ((logits > 0) * powers.view(-1, 1, 1, 1)).sum(0)


def _case_dice(predicted: np.ndarray, labels: np.ndarray, scheme: LabelScheme) -> list[float]:
    """Dice of each named class or region."""
    valid = labels != scheme.ignore_index
    predicted, labels = predicted[valid], labels[valid].astype(np.int64)
    if scheme.has_regions:
        member = scheme.region_table[:, labels]
        pairs = [((predicted >> row & 1).astype(bool), member[row]) for row in range(len(scheme.names))]
        counts = [(int((p & r).sum()), int(p.sum()), int(r.sum())) for p, r in pairs]
    else:
        classes = scheme.num_outputs
        joint = np.bincount(predicted.astype(np.int64) * classes + labels, minlength=classes**2)
        joint = joint.reshape(classes, classes)
        in_prediction, in_labels = joint.sum(axis=1), joint.sum(axis=0)
        order = [int(np.flatnonzero(row)[0]) for row in scheme.region_table]
        counts = [(int(joint[k, k]), int(in_prediction[k]), int(in_labels[k])) for k in order]
    return [2 * both / (p + r) if p + r else float("nan") for both, p, r in counts]
