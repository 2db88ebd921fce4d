"""What stands between a network and its caller: slices for 2D networks, a label map as further channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Outputs = Tensor | list[Tensor]


class Wrapper(nn.Module):
    """Calls ``network``."""

    network: nn.Module


class SliceNetwork(Wrapper):
    """Lets a 2D network take 3D windows: the slices across one axis become elements of the batch.

    Args:
        network: (B, C, a, b) -> (B, K, a, b), or a list of such outputs, coarser and coarser.
        axis: array axis (0 = z, 1 = y, 2 = x) that the slices are cut across.
    """

    def __init__(self, network: nn.Module, axis: int) -> None:
        super().__init__()
        self.network = network
        self.axis = axis

    def forward(self, image: Tensor) -> Outputs:
        """(B, C, z, y, x) -> (B, K, z, y, x); coarser outputs keep every slice."""
        across = self.axis + 2
        batch, slices = image.shape[0], image.shape[across]
        outputs = self.network(image.movedim(across, 1).flatten(0, 1))  # (B * slices, C, a, b)
        if isinstance(outputs, Tensor):
            return self._as_volume(outputs, batch, slices)
        return [self._as_volume(output, batch, slices) for output in outputs]

    def _as_volume(self, output: Tensor, batch: int, slices: int) -> Tensor:
        return output.unflatten(0, (batch, slices)).movedim(1, self.axis + 2)


class CascadeNetwork(Wrapper):
    """Second stage of a cascade: its last input channel is a label map, which becomes one channel per label.

    Passing one channel of indices on, instead of dozens of zeros and ones, keeps windows of many labels small.

    Args:
        network: takes ``channels + labels`` channels.
        channels: image channels.
        labels: foreground label indices, 1 to ``labels``; anything else is background.
    """

    def __init__(self, network: nn.Module, channels: int, labels: int) -> None:
        super().__init__()
        self.network = network
        self.channels = channels
        self.register_buffer("indices", torch.arange(1, labels + 1).view(1, -1, 1, 1, 1), persistent=False)

    def forward(self, image: Tensor, *more: Tensor) -> Outputs:
        """(B, channels + 1, z, y, x), the last channel label indices, -> outputs of the network.

        What else a network takes while it learns (``DiffusionNetwork``) is passed on.
        """
        indices: Tensor = self.indices  # type: ignore[assignment]
        labels = torch.eq(image[:, self.channels :], indices).to(image.dtype)
        outputs: Outputs = self.network(torch.cat([image[:, : self.channels], labels], dim=1), *more)
        return outputs


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside all wrappers."""
    while isinstance(network, Wrapper):
        network = network.network
    return network
