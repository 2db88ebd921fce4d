"""Flagged organs in a marginal loss: what a case leaves unknown travels in its label map.

Where an organ is flagged in a case, a voxel that is labelled background, or labelled with that organ, is "background
or that organ" (Shi et al., Marginal loss and exclusion loss for partially supervised multi-organ segmentation, MedIA
2021). Such voxels get codes beyond all labels, which say what set of organs is flagged. Because the codes are in the
label map, augmentation moves them with the labels, and a flip that exchanges left and right exchanges the flagged
organs too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ukbob_seg.dataset.labels import LabelScheme


@dataclass(frozen=True)
class FlagCodes:
    """Codes of the sets of organs that are flagged together.

    Set i has two codes: ``first + 2 i`` for background and ``first + 2 i + 1`` for the voxels of its organs.

    Attributes:
        sets: label indices that are flagged together, each ascending; no set twice.
        labels: K + 1, background and the label indices of the dataset.
        first: smallest code, beyond every label index and the index of ignored voxels.
    """

    sets: tuple[tuple[int, ...], ...]
    labels: int
    first: int

    @classmethod
    def of(cls, flagged: Iterable[Sequence[int]], scheme: LabelScheme, swap: Tensor | None) -> FlagCodes:
        """Codes for the sets of some cases, and for what a flip makes of them.

        Args:
            flagged: per case, the label indices that are flagged; empty ones are left out.
            scheme: of the dataset.
            swap: table that exchanges left and right label indices, or None.
        """
        own = {tuple(sorted(indices)) for indices in flagged if len(indices)}
        flipped = set() if swap is None else {_exchanged(indices, swap) for indices in own}
        return cls(tuple(sorted(own | flipped)), len(scheme.values) + 1, int(np.iinfo(scheme.dtype).max) + 1)

    def lookup(self, flagged: Sequence[int]) -> np.ndarray:
        """(first,) int32 table from the stored label indices of a case to labels and codes."""
        table = np.arange(self.first, dtype=np.int32)
        code = self.first + 2 * self.sets.index(tuple(sorted(flagged)))
        table[0] = code
        table[list(flagged)] = code + 1
        return table

    def extended(self, swap: Tensor) -> Tensor:
        """The table that exchanges left and right, continued for the codes."""
        codes = [self.first + 2 * self.sets.index(_exchanged(indices, swap)) for indices in self.sets]
        more = [code + organ for code in codes for organ in (0, 1)]
        return torch.cat([swap, torch.tensor(more, dtype=swap.dtype)])

    def decode(self, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take the codes out of a batch.

        Args:
            labels: (B, z, y, x) labels and codes; those of one element are all of one set.

        Returns:
            (B, z, y, x) labels, 0 and one of the flagged organs in place of the two codes; and (B, K + 1) bool, whose
            channels are merged with background, or None when nothing is flagged in this batch. An element without a
            code, whose voxels all have trusted labels, has none merged.
        """
        highest = labels.flatten(1).amax(dim=1).long() - self.first
        coded = highest >= 0
        if not bool(coded.any()):
            return labels, None
        chosen = torch.div(highest.clamp(min=0), 2, rounding_mode="floor")
        merged = self._table().to(labels.device)[chosen] & coded.unsqueeze(1)
        anyone = torch.tensor([indices[0] for indices in self.sets], dtype=labels.dtype, device=labels.device)[chosen]
        offset = labels - self.first
        organ = torch.where(offset % 2 == 1, anyone.view(-1, 1, 1, 1), torch.zeros_like(labels))
        return torch.where(offset >= 0, organ, labels), merged

    def _table(self) -> Tensor:
        table = torch.zeros(len(self.sets), self.labels, dtype=torch.bool)
        for row, indices in enumerate(self.sets):
            table[row, list(indices)] = True
        return table


def with_flag_codes(
    loss: Callable[[Tensor | Sequence[Tensor], Tensor, Tensor | None], Tensor], codes: FlagCodes
) -> Callable[[Tensor | Sequence[Tensor], Tensor], Tensor]:
    """A loss of labels that hold codes, from one that takes labels and the (B, K + 1) table of merged channels."""

    def decoded(outputs: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        return loss(outputs, *codes.decode(labels))

    return decoded


def _exchanged(indices: Sequence[int], swap: Tensor) -> tuple[int, ...]:
    return tuple(sorted(int(swap[k]) for k in indices))
