"""Running statistics of normalization layers: a case's own, how far they are from the stored ones, and mixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Moments = tuple[Tensor, Tensor]  # mean and variance of each channel, (C,)
LEAST_WEIGHT = 1e-3  # of a window, so that there is always something to take the mean of


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
        cls,
        layers: Sequence[nn.Module],
        windows: Sequence[Tensor],
        forward: Callable[[Tensor], Any],
        weights: Sequence[float] | None = None,
    ) -> CaseStatistics:
        """Pass windows through the network, as training did; afterwards the layers hold what they held.

        Each layer normalises by the window's own statistics meanwhile, so that those of later layers are of features
        that were normalised for this case. A layer that sees a single value per channel has no variance to take: it
        keeps what is stored.

        Args:
            layers: with running statistics, in evaluation mode.
            windows: (1, C, z, y, x) each.
            forward: the network.
            weights: of the windows in the mean over them, in [0, 1]; None for the same.
        """
        kept: list[Any] = list(layers)
        stored = tuple((layer.running_mean.clone(), layer.running_var.clone()) for layer in kept)
        momenta = [layer.momentum for layer in kept]
        counts = [layer.num_batches_tracked.clone() for layer in kept]
        hooks = [layer.register_forward_pre_hook(_train_on_many) for layer in kept]
        total = 0.0
        try:
            for window, weight in zip(windows, weights or [1.0] * len(windows), strict=True):
                counted = max(weight, LEAST_WEIGHT)
                total += counted
                for layer in kept:  # the mean over windows, whatever was there before the first
                    layer.momentum = counted / total
                forward(window)
            own = tuple((layer.running_mean.clone(), layer.running_var.clone()) for layer in kept)
        finally:
            for hook in hooks:
                hook.remove()
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


def _train_on_many(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Before a layer's pass: it normalises by its input's own statistics, unless that has one value per channel."""
    layer.train(inputs[0][0, 0].numel() > 1)


def _set(layers: Sequence[Any], moments: Sequence[Moments]) -> None:
    for layer, (mean, variance) in zip(layers, moments, strict=True):
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
