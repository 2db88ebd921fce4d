"""Losses: cross-entropy + soft Dice for exclusive labels, binary cross-entropy + soft Dice for a sigmoid per output.

Both leave ignored voxels out, accumulate in float32, and take Dice over the whole batch (a class that is missing
from one small patch is usually present in another), also where several processes share the batch. Both can leave open,
for each element of a batch, whether a voxel is background or one of the organs that are flagged there (marginal loss,
Shi et al., MedIA 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ukbob_seg.training.distributed import sum_over_ranks

SMOOTH = 1e-5
FAR_BELOW = -16.0  # logits whose sigmoid is their exponential, to float32's precision


class SoftmaxDiceLoss:
    """Cross-entropy + soft Dice of the softmax, for mutually exclusive labels.

    No one-hot target is made: the intersection of class c is the sum of p_c over voxels whose label is c, which one
    gather and one scatter-add give, so the memory beyond the probabilities does not grow with the classes.

    Args:
        ignore_index: label of voxels that count for nothing.
        entropy_weight: of the cross-entropy, against Dice.
    """

    def __init__(self, ignore_index: int, entropy_weight: float = 1.0) -> None:
        self.ignore_index, self.entropy_weight = ignore_index, entropy_weight

    def truth(self, labels: Tensor, outputs: int, merged: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What each output should say, and where that is known.

        Args:
            labels: as for the loss.
            outputs: K.
            merged: as for the loss: where a voxel is background or one of these, neither is known.

        Returns:
            (B, K, z, y, x) bool, background where a voxel is ignored; and (B, 1 or K, z, y, x) bool.
        """
        valid = labels != self.ignore_index
        target = torch.where(valid, labels, torch.zeros_like(labels)).long()
        known = valid.unsqueeze(1)
        if merged is not None:
            target = torch.where(_is_merged(target, merged), torch.zeros_like(target), target)
            open_outputs = merged | _first_of_any(merged)  # (B, K)
            known = known & ~((target == 0).unsqueeze(1) & open_outputs.view(*open_outputs.shape, 1, 1, 1))
        classes = torch.arange(outputs, device=labels.device).view(1, -1, 1, 1, 1)
        return target.unsqueeze(1) == classes, known

    def __call__(self, logits: Tensor, labels: Tensor, merged: Tensor | None = None) -> Tensor:
        """Loss of one resolution.

        Args:
            logits: (B, K, z, y, x), any float dtype; computed in float32. Channel 0 is background.
            labels: (B, z, y, x) integer indices in 0..K-1, or ``ignore_index``.
            merged: (B, K) bool, classes whose probability counts as background's in that element, where they have
                neither voxels nor a Dice of their own; never background itself. None for none.

        Returns:
            Scalar; 0 (with zero gradient) when every voxel is ignored.
        """
        valid = labels != self.ignore_index
        target = torch.where(valid, labels, torch.zeros_like(labels)).long()
        logits = logits.float()
        if merged is not None:
            target = torch.where(_is_merged(target, merged), torch.zeros_like(target), target)
            logits = merge_with_background(logits, merged)
        log_p = F.log_softmax(logits, dim=1)
        log_p_target = log_p.gather(1, target.unsqueeze(1)).squeeze(1)
        entropy, count = -(log_p_target * valid).sum(), valid.sum()

        classes = logits.shape[1]
        zeros = logits.new_zeros(classes, dtype=torch.float32)
        flat_target = target[valid]
        intersection = zeros.index_add(0, flat_target, log_p_target[valid].exp())
        present = torch.bincount(flat_target, minlength=classes).float()
        predicted = (log_p.exp() * valid.unsqueeze(1)).sum(dim=(0, 2, 3, 4))
        entropy, count, intersection, predicted, present, elements = sum_over_ranks(
            entropy, count, intersection, predicted, present, _elements(logits, merged)
        )
        dice = (2 * intersection + SMOOTH) / (predicted + present + SMOOTH)
        return self.entropy_weight * entropy / count.clamp(min=1) + 1 - _mean_dice(dice, elements, skip=1)


class SigmoidDiceLoss:
    """Binary cross-entropy + soft Dice of a sigmoid per output: regions, and the paper's own recipe.

    Args:
        table: (R, K + 1) bool; whether label index k belongs to output r.
        ignore_index: label of voxels that count for nothing.
        skip_background: leave output 0 out of the Dice mean (when it stands for background).
        entropy_weight: of the cross-entropy, against Dice.
    """

    def __init__(
        self, table: Tensor, ignore_index: int, skip_background: bool = False, entropy_weight: float = 1.0
    ) -> None:
        self.table, self.ignore_index, self.skip_background = table, ignore_index, skip_background
        self.entropy_weight = entropy_weight

    def truth(self, labels: Tensor, outputs: int, merged: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As of ``SoftmaxDiceLoss``; with ``merged``, outputs that those labels belong to are unknown in the element,
        and with an output of background that one is, where a voxel is background or one of them.
        """
        valid = labels != self.ignore_index
        indices = torch.where(valid, labels, torch.zeros_like(labels)).long()
        known = valid.unsqueeze(1)
        if merged is not None:
            left_out = (merged.float() @ self.table.to(labels.device).float().T) > 0  # (B, R)
            known = known & ~left_out.view(*left_out.shape, 1, 1, 1)
            if self.skip_background:
                indices = torch.where(_is_merged(indices, merged), torch.zeros_like(indices), indices)
                first = torch.arange(outputs, device=labels.device).view(1, -1, 1, 1, 1) == 0
                any_merged = merged.any(dim=1).view(-1, 1, 1, 1, 1)
                known = known & ~(first & any_merged & (indices == 0).unsqueeze(1))
        return self.table.to(labels.device)[:, indices].transpose(0, 1), known

    def __call__(self, logits: Tensor, labels: Tensor, merged: Tensor | None = None) -> Tensor:
        """Loss of one resolution.

        Args:
            logits: (B, R, z, y, x), any float dtype; computed in float32.
            labels: (B, z, y, x) integer indices, or ``ignore_index``.
            merged: (B, K + 1) bool, label indices that say nothing in that element, never 0: outputs that they belong
                to are left out there. With an output of background, that output is replaced by the probability of
                "background or one of them", which voxels labelled either should have. None for none.

        Returns:
            Scalar; 0 (with zero gradient) when every voxel is ignored.
        """
        valid = (labels != self.ignore_index).unsqueeze(1)
        indices = torch.where(valid[:, 0], labels, torch.zeros_like(labels)).long()
        left_out = None
        logits = logits.float()
        if merged is not None:
            left_out = (merged.float() @ self.table.to(labels.device).float().T) > 0  # (B, R)
            valid = valid & ~left_out.view(*left_out.shape, 1, 1, 1)  # (B, R, z, y, x)
            if self.skip_background:
                indices = torch.where(_is_merged(indices, merged), torch.zeros_like(indices), indices)
                logits = unite_with_background(logits, left_out)
        target = self.table.to(labels.device)[:, indices].transpose(0, 1)  # (B, R, z, y, x)
        binary = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
        p = logits.sigmoid() * valid
        axes = (0, 2, 3, 4)
        entropy, count, intersection, predicted, present, elements = sum_over_ranks(
            (binary * valid).sum(),
            valid.sum() * (logits.shape[1] // valid.shape[1]),
            (p * target).sum(axes),
            p.sum(axes),
            (target & valid).sum(axes),
            _elements(logits, left_out),
        )
        dice = (2 * intersection + SMOOTH) / (predicted + present + SMOOTH)
        dice_loss = 1 - _mean_dice(dice, elements, skip=int(self.skip_background))
        return self.entropy_weight * entropy / count.clamp(min=1) + dice_loss


def merge_with_background(logits: Tensor, merged: Tensor) -> Tensor:
    """Logits whose softmax has the merged channels' probability in channel 0, and none left in them.

    The new logit of background is the logsumexp of the old ones, so that the sum of all exponentials stays.

    Args:
        logits: (B, K, z, y, x).
        merged: (B, K) bool, without channel 0.

    Returns:
        (B, K, z, y, x); merged channels are -inf.
    """
    result = logits.clone()
    for element, row in enumerate(merged):
        channels = row.nonzero().squeeze(1)
        if len(channels):
            together = torch.cat([logits[element, :1], logits[element, channels]])
            result[element, 0] = together.logsumexp(dim=0)
            result[element, channels] = -torch.inf
    return result


def unite_with_background(logits: Tensor, merged: Tensor) -> Tensor:
    """Logits of independent outputs, of which number 0 now says "background or one of the merged outputs".

    Its probability is p = 1 - (1 - p_0) prod (1 - p_c), so that with S the sum of softplus(logits), log(1 - p) = -S and
    the new logit is log(exp(S) - 1); where all outputs are far below 0 that is their logsumexp.

    Args:
        logits: (B, R, z, y, x); output 0 stands for background.
        merged: (B, R) bool, without output 0.

    Returns:
        (B, R, z, y, x); merged outputs are as they were.
    """
    result = logits.clone()
    for element, row in enumerate(merged):
        channels = row.nonzero().squeeze(1)
        if len(channels):
            outputs = torch.cat([logits[element, :1], logits[element, channels]])
            total = F.softplus(outputs).sum(dim=0)
            tiny = outputs.amax(dim=0) < FAR_BELOW
            total = torch.where(tiny, 1.0, total)  # underflows there, and its logarithm has no gradient
            result[element, 0] = torch.where(tiny, outputs.logsumexp(dim=0), total + torch.log(-torch.expm1(-total)))
    return result


def _first_of_any(merged: Tensor) -> Tensor:
    """(B, K) bool: channel 0 of the elements where anything is merged."""
    first = torch.arange(merged.shape[1], device=merged.device) == 0
    return merged.any(dim=1, keepdim=True) & first


def _is_merged(labels: Tensor, merged: Tensor) -> Tensor:
    """(B, z, y, x) bool: whether a voxel's label is merged in its element."""
    return merged.gather(1, labels.flatten(1)).view(labels.shape)


def _elements(logits: Tensor, left_out: Tensor | None) -> Tensor:
    """(K,) number of elements in which each output counts."""
    if left_out is None:
        return logits.new_full((logits.shape[1],), len(logits), dtype=torch.int64)
    return (~left_out).sum(dim=0)


def _mean_dice(dice: Tensor, elements: Tensor, skip: int) -> Tensor:
    """Mean over outputs, without the first ``skip`` and without those that count in no element of the whole batch."""
    used = elements[skip:] > 0
    mean = torch.where(used, dice[skip:], 0).sum() / used.sum().clamp(min=1)
    return torch.where(used.any(), mean, 1.0)


def with_deep_supervision(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Extend a loss to networks that return several resolutions, finest first.

    Weights are 1, 1/2, 1/4, ... with the coarsest left out, normalised to sum 1 (nnU-Net's); labels of coarser
    outputs are the nearest voxels of the full labels. A table of merged classes, where one is given, goes to every
    resolution.
    """

    def total(outputs: Tensor | Sequence[Tensor], labels: Tensor, *merged: Tensor | None) -> Tensor:
        if isinstance(outputs, Tensor):
            return loss(outputs, labels, *merged)
        used = list(outputs[:-1]) if len(outputs) > 1 else list(outputs)
        weights = [0.5**level for level in range(len(used))]
        result = outputs[0].new_zeros((), dtype=torch.float32)
        for output, weight in zip(used, weights, strict=True):
            result = result + weight / sum(weights) * loss(output, shrink_labels(labels, output.shape[2:]), *merged)
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
