"""Losses: cross-entropy + soft Dice for exclusive labels, binary cross-entropy + soft Dice for a sigmoid per output.

Both leave ignored voxels out, accumulate in float32, and take Dice over the whole batch (a class that is missing
from one small patch is usually present in another), also where several processes share the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ukbob_seg.training.distributed import sum_over_ranks

SMOOTH = 1e-5


class SoftmaxDiceLoss:
    """Cross-entropy + soft Dice of the softmax, for mutually exclusive labels.

    No one-hot target is made: the intersection of class c is the sum of p_c over voxels whose label is c, which one
    gather and one scatter-add give, so the memory beyond the probabilities does not grow with the classes.

    Args:
        ignore_index: label of voxels that count for nothing.
    """

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of one resolution.

        Args:
            logits: (B, K, z, y, x), any float dtype; computed in float32. Channel 0 is background.
            labels: (B, z, y, x) integer indices in 0..K-1, or ``ignore_index``.

        Returns:
            Scalar; 0 (with zero gradient) when every voxel is ignored.
        """
        valid = labels != self.ignore_index
        target = torch.where(valid, labels, torch.zeros_like(labels)).long()
        log_p = F.log_softmax(logits.float(), dim=1)
        log_p_target = log_p.gather(1, target.unsqueeze(1)).squeeze(1)
        entropy, count = -(log_p_target * valid).sum(), valid.sum()

        classes = logits.shape[1]
        zeros = logits.new_zeros(classes, dtype=torch.float32)
        flat_target = target[valid]
        intersection = zeros.index_add(0, flat_target, log_p_target[valid].exp())
        present = torch.bincount(flat_target, minlength=classes).float()
        predicted = (log_p.exp() * valid.unsqueeze(1)).sum(dim=(0, 2, 3, 4))
        entropy, count, intersection, predicted, present = sum_over_ranks(
            entropy, count, intersection, predicted, present
        )
        dice = (2 * intersection + SMOOTH) / (predicted + present + SMOOTH)
        return entropy / count.clamp(min=1) + 1 - dice[1:].mean()


class SigmoidDiceLoss:
    """Binary cross-entropy + soft Dice of a sigmoid per output: regions, and the paper's own recipe.

    Args:
        table: (R, K + 1) bool; whether label index k belongs to output r.
        ignore_index: label of voxels that count for nothing.
        skip_background: leave output 0 out of the Dice mean (when it stands for background).
    """

    def __init__(self, table: Tensor, ignore_index: int, skip_background: bool = False) -> None:
        self.table, self.ignore_index, self.skip_background = table, ignore_index, skip_background

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of one resolution.

        Args:
            logits: (B, R, z, y, x), any float dtype; computed in float32.
            labels: (B, z, y, x) integer indices, or ``ignore_index``.

        Returns:
            Scalar; 0 (with zero gradient) when every voxel is ignored.
        """
        valid = (labels != self.ignore_index).unsqueeze(1)
        indices = torch.where(valid[:, 0], labels, torch.zeros_like(labels)).long()
        target = self.table.to(labels.device)[:, indices].transpose(0, 1)  # (B, R, z, y, x)
        logits = logits.float()
        binary = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
        p = logits.sigmoid() * valid
        axes = (0, 2, 3, 4)
        entropy, count, intersection, predicted, present = sum_over_ranks(
            (binary * valid).sum(), valid.sum(), (p * target).sum(axes), p.sum(axes), (target & valid).sum(axes)
        )
        dice = (2 * intersection + SMOOTH) / (predicted + present + SMOOTH)
        return entropy / (count * logits.shape[1]).clamp(min=1) + 1 - dice[1 if self.skip_background else 0 :].mean()


def with_deep_supervision(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor | Sequence[Tensor], Tensor], Tensor]:
    """Extend a loss to networks that return several resolutions, finest first.

    Weights are 1, 1/2, 1/4, ... with the coarsest left out, normalised to sum 1 (nnU-Net's); labels of coarser
    outputs are the nearest voxels of the full labels.
    """

    def total(outputs: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return loss(outputs, labels)
        used = list(outputs[:-1]) if len(outputs) > 1 else list(outputs)
        weights = [0.5**level for level in range(len(used))]
        result = outputs[0].new_zeros((), dtype=torch.float32)
        for output, weight in zip(used, weights, strict=True):
            result = result + weight / sum(weights) * loss(output, shrink_labels(labels, output.shape[2:]))
        return result

    return total


def shrink_labels(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Nearest-voxel labels (B, z, y, x) at a coarser shape."""
    if tuple(labels.shape[1:]) == tuple(shape):
        return labels
    picks = [
        ((torch.arange(n, device=labels.device) + 0.5) * (full / n)).long().clamp(max=full - 1)
        for n, full in zip(shape, labels.shape[1:], strict=True)
    ]
    return labels[:, picks[0]][:, :, picks[1]][:, :, :, picks[2]]
