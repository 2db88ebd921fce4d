"""What predicts one window: one or several networks, under flips and changes of intensity, averaged as logits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ukbob_seg.networks.channels_last import with_channels_first
from ukbob_seg.networks.compiled import CompiledNetwork
from ukbob_seg.networks.convolution import quick_convolutions


@dataclass(frozen=True)
class Mirroring:
    """Test-time flips, only along axes that training flipped too.

    Attributes:
        axes: which of (0 = z, 1 = y, 2 = x) to flip, in all combinations.
        left_right_axis: array axis that runs left-right, or None.
        output_swap: (K,) order of output channels that exchanges left and right classes, or None.
        input_swap: table that exchanges left and right label indices in the last input channel (the first stage's
            labels, in a cascade), or None.
    """

    axes: tuple[int, ...] = ()
    left_right_axis: int | None = None
    output_swap: tuple[int, ...] | None = None
    input_swap: tuple[int, ...] | None = None

    def combinations(self) -> list[tuple[int, ...]]:
        """All sets of axes to flip, the empty one first."""
        return [c for n in range(len(self.axes) + 1) for c in itertools.combinations(self.axes, n)]

    def apply(self, windows: Tensor, flipped: tuple[int, ...]) -> Tensor:
        """Flip windows (B, C, z, y, x)."""
        if not flipped:
            return windows
        windows = windows.flip([axis + 2 for axis in flipped])
        if self.input_swap is not None and self.left_right_axis in flipped:
            table = torch.tensor(self.input_swap, device=windows.device)
            windows[:, -1] = table[windows[:, -1].long()].to(windows.dtype)
        return windows

    def undo(self, logits: Tensor, flipped: tuple[int, ...]) -> Tensor:
        """Bring logits (B, K, z, y, x) of a flipped window back."""
        logits = logits.flip([axis + 2 for axis in flipped])
        if self.output_swap is not None and self.left_right_axis in flipped:
            logits = logits[:, list(self.output_swap)]
        return logits


# Factor and offset of normalized intensities: the ends of what the paper's augmentation draws in training.
INTENSITY_CHANGES = ((1.1, 0.0), (0.9, 0.0), (1.0, 0.1), (1.0, -0.1))


@dataclass(frozen=True)
class AveragedPasses:
    """Callable (B, C, z, y, x) -> (B, K, z, y, x): mean logits over networks and views of the windows.

    Attributes:
        networks: in evaluation mode, on the windows' device.
        mirroring: flips to average over.
        intensities: (factor, offset) of further views, which are not flipped.
        image_channels: how many of the first channels are intensities; None for all.
        half: precision on CUDA.
    """

    networks: Sequence[nn.Module]
    mirroring: Mirroring = field(default_factory=Mirroring)
    intensities: Sequence[tuple[float, float]] = ()
    image_channels: int | None = None
    half: torch.dtype = torch.bfloat16

    @torch.no_grad()
    def __call__(self, windows: Tensor) -> Tensor:
        """Predict windows; half precision on CUDA."""
        total: Tensor | None = None
        views: list[tuple[tuple[int, ...], tuple[float, float] | None]] = [
            *((flipped, None) for flipped in self.mirroring.combinations()),
            *(((), change) for change in self.intensities),
        ]
        for flipped, change in views:
            turned = self.mirroring.apply(windows, flipped)
            if change is not None:
                turned = turned.clone()
                turned[:, : self.image_channels].mul_(change[0]).add_(change[1])
            for network in self.networks:
                logits = forward(network, turned, self.half).float()
                logits = self.mirroring.undo(logits, flipped) if flipped else logits
                total = logits if total is None else total.add_(logits)
        assert total is not None
        count = len(views) * len(self.networks)
        return total if count == 1 else total / count


def forward(network: nn.Module, windows: Tensor, half: torch.dtype = torch.bfloat16) -> Tensor:
    """(B, C, z, y, x) -> (B, K, z, y, x) logits at full resolution: half precision on CUDA, quick on CPUs."""
    kind = windows.device.type
    is_compiled = isinstance(network, CompiledNetwork) and not network.fell_back
    quick = nullcontext() if is_compiled else quick_convolutions(windows.device, network)
    with torch.autocast(kind, half, enabled=kind == "cuda"), quick:
        outputs = network(windows)
    logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    return logits if torch.is_grad_enabled() or kind != "cpu" or logits.dim() != 5 else with_channels_first(logits)
