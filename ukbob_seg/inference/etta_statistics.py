"""Running statistics of normalization layers: a case's own, how far they are from the stored ones, and mixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Moments = tuple[Tensor, Tensor]  # mean and variance of each channel, (C,)


@dataclass(frozen=True)
class CaseStatistics:
    """What layers with running statistics see in one case.

    Attributes:
        layers: that keep statistics.
        stored: of training.
        own: of the case's windows.
    """

    layers: tuple[Any, ...]
    stored: tuple[Moments, ...]
    own: tuple[Moments, ...]

    @classmethod
    @torch.no_grad()
    def measure(
        cls, layers: Sequence[nn.Module], windows: Sequence[Tensor], forward: Callable[[Tensor], Any]
    ) -> CaseStatistics:
        """Pass windows through the network, as training did; afterwards the layers hold what they held.

        Each layer normalises by the window's own statistics meanwhile, so that those of later layers are of features
        that were normalised for this case.

        Args:
            layers: with running statistics, in evaluation mode.
            windows: (1, C, z, y, x) each.
            forward: the network.
        """
        kept: list[Any] = list(layers)
        stored = tuple((layer.running_mean.clone(), layer.running_var.clone()) for layer in kept)
        momenta = [layer.momentum for layer in kept]
        counts = [layer.num_batches_tracked.clone() for layer in kept]
        try:
            for layer in kept:
                layer.reset_running_stats()
                layer.train()
            for number, window in enumerate(windows, start=1):
                for layer in kept:
                    layer.momentum = 1 / number  # the mean over windows; None would mean 0 to InstanceNorm
                forward(window)
            own = tuple((layer.running_mean.clone(), layer.running_var.clone()) for layer in kept)
        finally:
            for layer, momentum, count in zip(kept, momenta, counts, strict=True):
                layer.eval()
                layer.momentum = momentum
                layer.num_batches_tracked.copy_(count)
            _set(kept, stored)
        return cls(tuple(kept), stored, own)

    def distance(self) -> float:
        """How far the case is from training: 0 for the same statistics.

        For each channel the divergence between the two Gaussians with these moments, symmetrised (Jeffreys), is
        J = (v/u + u/v)/4 - 1/2 + (m - n)^2 (1/v + 1/u)/4 for means m, n and variances v, u; the mean of log(1 + J) over
        the channels of a layer, so that single dead channels decide nothing, then over layers.
        """
        layers = []
        for (mean, variance), (own_mean, own_variance), layer in zip(self.stored, self.own, self.layers, strict=True):
            v, u = variance.double() + layer.eps, own_variance.double() + layer.eps
            shift = (mean.double() - own_mean.double()).square()
            divergence = (v / u + u / v) / 4 - 0.5 + shift * (1 / v + 1 / u) / 4
            layers.append(float(torch.log1p(divergence).mean()))
        return sum(layers) / len(layers) if layers else 0.0

    @torch.no_grad()
    def mix(self, share: float) -> None:
        """Give the layers ``share`` of the case's statistics and the rest of the stored ones."""
        mixed = [
            (torch.lerp(mean, own_mean, share), torch.lerp(variance, own_variance, share))
            for (mean, variance), (own_mean, own_variance) in zip(self.stored, self.own, strict=True)
        ]
        _set(self.layers, mixed)


def _set(layers: Sequence[Any], moments: Sequence[Moments]) -> None:
    for layer, (mean, variance) in zip(layers, moments, strict=True):
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
