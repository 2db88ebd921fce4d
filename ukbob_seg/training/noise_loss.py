"""The loss of diffusion networks: how far the predicted noise (or velocity) is off, and the condition model's loss."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ukbob_seg.networks.diffusion import DiffusionNetwork, NoisePrediction
from ukbob_seg.training.distributed import sum_over_ranks
from ukbob_seg.training.flags import FlagCodes


class SegmentationLoss(Protocol):
    """A loss of labels that also says what each output should be; see ``losses.SoftmaxDiceLoss``."""

    ignore_index: int

    def truth(self, labels: Tensor, outputs: int, merged: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What each output should say, and where that is known."""

    def __call__(self, logits: Tensor, labels: Tensor, merged: Tensor | None = None) -> Tensor:
        """Loss of logits."""


class NoiseLoss:
    """Mean squared error of the noise (or velocity), plus the condition model's Dice and cross-entropy at some steps.

    L = |e - e_theta|^2 + [t = 0 mod alpha] (L_Dice + beta L_CE) (Wu et al., AAAI 2024), or |v - v_theta|^2 in place of
    the first term; that term alone for networks without a condition model. Voxels that are ignored, and outputs that
    flags leave open, count in neither. All processes share one batch, as in every other loss.

    [open] The papers draw one step for a batch or an element; here each element has its own, and those whose step alpha
    does not divide are ignored in the second term.

    Args:
        loss: Dice and beta times cross-entropy, of the head.
        network: what is trained.
        codes: of flagged organs in the labels, with a marginal loss.
    """

    def __init__(self, loss: SegmentationLoss, network: DiffusionNetwork, codes: FlagCodes | None = None) -> None:
        self.loss, self.codes = loss, codes
        self.outputs, self.interval = network.outputs, network.condition_interval

    def clean(self, labels: Tensor) -> Tensor:
        """The map that noise is added to.

        Args:
            labels: (B, z, y, x) indices, the index of ignored voxels, and codes of flags.

        Returns:
            (B, K, z, y, x) float32, 1 where an output should say yes, else -1. An ignored voxel is background.
        """
        plain, merged = self._decoded(labels)
        truth, _ = self.loss.truth(plain, self.outputs, merged)
        return truth.float() * 2 - 1

    def __call__(self, outputs: NoisePrediction, labels: Tensor) -> Tensor:
        """Scalar, float32; 0 without gradient where nothing is known."""
        plain, merged = self._decoded(labels)
        _, known = self.loss.truth(plain, self.outputs, merged)
        known = known.expand_as(outputs.target)
        squares = ((outputs.predicted.float() - outputs.target.float()).square() * known).sum()
        total, count = sum_over_ranks(squares, known.sum())
        value = total / count.clamp(min=1)
        if outputs.condition is None:
            return value
        elsewhere = (outputs.step % self.interval != 0).view(-1, 1, 1, 1)
        return value + self.loss(outputs.condition, plain.masked_fill(elsewhere, self.loss.ignore_index), merged)

    def _decoded(self, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        return (labels, None) if self.codes is None else self.codes.decode(labels)
