"""A moving average of the weights, which often predicts better than the weights of the last step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of everything in a network's state dict; integers are copied.

    The decay rises to its value over the first steps, as min(decay, (1 + n) / (10 + n)) in step n, so that the initial
    weights are soon forgotten. As a function of the step alone it has no state.

    Args:
        network: whose weights the average starts from.
        decay: in (0, 1); 0.999 averages over about 1000 steps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {name: value.clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move towards the network's weights after step n = 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - decay)
            else:
                self.weights[name].copy_(value)


@contextmanager
def averaged(network: nn.Module, average: WeightAverage | None) -> Iterator[None]:
    """While the block runs the network has the averaged weights, then its own again."""
    if average is None:
        yield
        return
    own = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(average.weights)
    try:
        yield
    finally:
        network.load_state_dict(own)
