"""What a network's outputs mean, how uncertain they are, and what it says of some windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ukbob_seg.inference.passes import forward


def voxel_entropy(logits: Tensor, head: str) -> Tensor:
    """Shannon entropy of each voxel's prediction, in nats.

    Args:
        logits: (B, K, z, y, x), any float dtype; computed in float32.
        head: ``softmax`` (one distribution over K classes) or ``sigmoid`` (K binary ones, summed).

    Returns:
        (B, z, y, x) float32, in [0, log K] or [0, K log 2].

    Reference: UKBOB, section 3.4; Wang et al., Tent, ICLR 2021.
    """
    logits = logits.float()
    if head == "softmax":
        log_p = F.log_softmax(logits, dim=1)
        return -(log_p.exp() * log_p).sum(dim=1)
    return (F.softplus(logits) - logits * logits.sigmoid()).sum(dim=1)


@dataclass(frozen=True)
class OutputMeaning:
    """What the logits of a network mean.

    Attributes:
        head: ``softmax`` (one distribution over all outputs) or ``sigmoid`` (a binary one each).
        has_regions: outputs may overlap and none stands for background.
    """

    head: str = "softmax"
    has_regions: bool = False

    def decide(self, logits: Tensor) -> Tensor:
        """(B, K, z, y, x) -> (B, z, y, x): 0 is background."""
        if not self.has_regions:
            return logits.argmax(dim=1)
        order = torch.arange(1, logits.shape[1] + 1, device=logits.device).view(1, -1, 1, 1, 1)
        return ((logits > 0) * order).amax(dim=1)

    def most_entropy(self, outputs: int) -> float:
        """Of a voxel whose every answer is as probable, in nats."""
        return math.log(outputs) if self.head == "softmax" else outputs * math.log(2)


@dataclass(frozen=True)
class Seen:
    """What a network says of some windows.

    Attributes:
        windows: (1, C, z, y, x) each.
        decisions: (1, z, y, x) each; 0 is background.
        entropies: mean per voxel of each, in nats.
        confidences: 1 where a window's every voxel is certain, 0 where every answer is as probable.
    """

    windows: Sequence[Tensor]
    decisions: Sequence[Tensor]
    entropies: Sequence[float]
    confidences: Sequence[float]

    @property
    def entropy(self) -> float:
        """Mean per voxel of all windows, in nats."""
        return sum(self.entropies) / len(self.entropies)

    @property
    def foreground(self) -> int:
        """Voxels that are decided to be something else than background."""
        return sum(foreground(decision) for decision in self.decisions)

    def only(self, chosen: Sequence[int]) -> Seen:
        """Some of the windows."""
        return Seen(
            [self.windows[i] for i in chosen], [self.decisions[i] for i in chosen],
            [self.entropies[i] for i in chosen], [self.confidences[i] for i in chosen],
        )  # fmt: skip

    def changes(self, other: Seen) -> int:
        """Voxels that are decided otherwise."""
        return sum(int((a != b).sum()) for a, b in zip(self.decisions, other.decisions, strict=True))


@torch.no_grad()
def look(network: nn.Module, windows: Sequence[Tensor], meaning: OutputMeaning) -> Seen:
    """Predict windows as they are."""
    decisions, entropies, confidences = [], [], []
    for window in windows:
        logits = forward(network, window)
        decisions.append(meaning.decide(logits).to(torch.int16))  # held for all windows
        entropies.append(float(voxel_entropy(logits, meaning.head).mean()))
        most = meaning.most_entropy(logits.shape[1])
        confidences.append(1 - entropies[-1] / most if most else 1.0)
    return Seen(windows, decisions, entropies, confidences)


def foreground(decision: Tensor) -> int:
    """Voxels that are decided to be something else than background."""
    return int((decision > 0).sum())


def possible_foreground(logits: Tensor, meaning: OutputMeaning, certain_background: float) -> Tensor:
    """Where background is less probable than a limit: (B, K, z, y, x) -> (B, z, y, x) bool.

    With regions: where any region is more probable than what the limit leaves.
    """
    logits = logits.float()
    if meaning.has_regions:
        return (logits.sigmoid() > 1 - certain_background).any(dim=1)
    background = logits.softmax(dim=1)[:, 0] if meaning.head == "softmax" else logits[:, 0].sigmoid()
    return background < certain_background


def voxel_weights(logits: Tensor, meaning: OutputMeaning, certain_background: float) -> Tensor:
    """What each voxel of a window counts for in the entropy that the steps lower: (B, z, y, x), with a sum of 1, or 0
    where no voxel counts.

    Most voxels are background that nobody doubts. In a mean over all voxels they would outvote the others, and whole
    organs are cheaply made certain by calling them background.
    """
    if certain_background >= 1:
        return torch.full_like(logits[:, 0], 1 / logits[:, 0].numel(), dtype=torch.float32)
    counted = possible_foreground(logits, meaning, certain_background).float()
    return counted / counted.sum().clamp_min(1)
