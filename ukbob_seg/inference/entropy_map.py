"""How uncertain each voxel's prediction is, on the grid of the file."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ukbob_seg.preprocessing.preprocessor import CaseProperties


class EntropyMap:
    """Entropies in nats, filled as planes of probabilities come.

    Attributes:
        values: (Z, Y, X) float32 of the file's shape; 0 outside of the kept box, where background is sure.

    Args:
        properties: of the case.
        head: ``softmax`` or ``sigmoid``, as for ``probability_entropy``.
    """

    def __init__(self, properties: CaseProperties, head: str) -> None:
        self.values = np.zeros(properties.geometry.shape, dtype=np.float32)
        self._box, self._head, self._made = self.values[properties.box], head, 0

    def append(self, probabilities: Tensor) -> None:
        """Take the next planes (K, n, Y, X) of the kept box."""
        stop = self._made + probabilities.shape[1]
        self._box[self._made : stop] = probability_entropy(probabilities, self._head).cpu().numpy()
        self._made = stop


def probability_entropy(probabilities: Tensor, head: str) -> Tensor:
    """Shannon entropy of predictions, in nats.

    Args:
        probabilities: (K, ...), any float dtype; computed in float32.
        head: ``softmax`` (one distribution over K classes) or ``sigmoid`` (K binary ones, summed).

    Returns:
        (...) float32, in [0, log K] or [0, K log 2]; what ``etta.voxel_entropy`` gives for the logits.
    """
    p = probabilities.float()
    entropy = -torch.xlogy(p, p)
    if head == "sigmoid":
        entropy -= torch.xlogy(1 - p, 1 - p)
    return entropy.sum(dim=0)
