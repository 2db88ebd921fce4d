"""Faults of MR images: uneven coils, truncated and repeated echoes, a missing contrast.

Intensities are normalised, so that air is not 0 but the lowest value of a channel; where a fault multiplies or wraps
signal, the signal is taken from there. A patch stands for the whole field of view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ukbob_seg.training.augmentation.batch import Batch, chance, change_channels, uniform
from ukbob_seg.training.augmentation.separable import along_axes, ghost_matrix, spline_matrix, truncation_matrix

FIELD_NODES = 5  # control points of a bias field along an axis
SHORTEST_AXIS = 8  # voxels; Fourier faults need a few frequencies


@dataclass(frozen=True)
class BiasFieldRecord:
    """Which elements (B,) bool, and the logarithm of the field at its control points, (B, n_z, n_y, n_x)."""

    chosen: Tensor
    log_field: Tensor


class RandomBiasField:
    """Multiply signal by a smooth field, the same in all channels: exp of a cubic B-spline.

    Args:
        patch_size: voxels (z, y, x).
        log_amplitude: bound on the logarithm of the field; 0.4 is a factor between 0.67 and 1.5.
        probability: per element.
    """

    def __init__(self, patch_size: Sequence[int], log_amplitude: float = 0.4, probability: float = 0.15) -> None:
        self.log_amplitude, self.probability = log_amplitude, probability
        self._nodes = tuple(FIELD_NODES if n > 1 else 1 for n in patch_size)

    def sample(self, batch_size: int, generator: torch.Generator) -> BiasFieldRecord:
        """Draw elements and fields."""
        shape = (batch_size, *self._nodes)
        field = uniform(-self.log_amplitude, self.log_amplitude, shape, generator)
        return BiasFieldRecord(chance(self.probability, (batch_size,), generator), field)

    def apply(self, batch: Batch, record: BiasFieldRecord) -> Batch:
        """Multiply what lies above each channel's lowest value."""
        chosen = record.chosen.nonzero().flatten().tolist()
        if not chosen:
            return batch
        image = batch.writable_image()
        for element in chosen:
            nodes = record.log_field[element].to(image)
            splines = [spline_matrix(n, m) for n, m in zip(image.shape[2:], nodes.shape, strict=True)]
            lowest = image[element].amin(dim=(1, 2, 3), keepdim=True)
            image[element].sub_(lowest).mul_(along_axes(nodes, splines).exp_()).add_(lowest)
        return batch.with_image(image)


@dataclass(frozen=True)
class FourierRecord:
    """A fault along one axis of each element.

    Attributes:
        chosen: (B,) bool.
        axis: (B,) index into the axes that may have it.
        strength: (B,) share of frequencies that is kept, or of a line's signal that is lost.
        ghosts: (B,) number of repetitions; not used for ringing.
    """

    chosen: Tensor
    axis: Tensor
    strength: Tensor
    ghosts: Tensor


class RandomGibbs:
    """Cut high frequencies off along one axis, in all channels, so that edges ring.

    Args:
        axes: along which patches may ring (0 = z, 1 = y, 2 = x); none, and nothing happens.
        kept: lowest and highest share of frequencies that stays.
        probability: per element.
    """

    def __init__(
        self, axes: Sequence[int] = (0, 1, 2), kept: tuple[float, float] = (0.4, 0.8), probability: float = 0.1
    ) -> None:
        self.axes, self.kept, self.probability = tuple(axes), kept, probability

    def sample(self, batch_size: int, generator: torch.Generator) -> FourierRecord:
        """Draw elements, axes and shares."""
        return _fourier(self.axes, self.kept, (0, 1), self.probability, batch_size, generator)

    def apply(self, batch: Batch, record: FourierRecord) -> Batch:
        """Filter the elements that were drawn."""

        def ring(element: int, axis: int, channel: Tensor) -> Tensor:
            matrix = truncation_matrix(channel.shape[axis], float(record.strength[element]))
            return along_axes(channel, [matrix if a == axis else None for a in range(3)])

        return _each(batch, record, self.axes, ring)


class RandomGhosting:
    """Faint copies of the image along one axis, in all channels, as periodic motion leaves them.

    Every n-th line of the Fourier transform loses a share of its signal; the magnitude is taken, as scanners do.

    Args:
        axes: along which ghosts may appear (0 = z, 1 = y, 2 = x); none, and nothing happens.
        intensity: lowest and highest share lost.
        ghosts: fewest and most copies.
        probability: per element.
    """

    def __init__(
        self,
        axes: Sequence[int] = (0, 1, 2),
        intensity: tuple[float, float] = (0.1, 0.4),
        ghosts: tuple[int, int] = (2, 6),
        probability: float = 0.1,
    ) -> None:
        self.axes, self.intensity, self.ghosts, self.probability = tuple(axes), intensity, ghosts, probability

    def sample(self, batch_size: int, generator: torch.Generator) -> FourierRecord:
        """Draw elements, axes, numbers and intensities."""
        return _fourier(self.axes, self.intensity, self.ghosts, self.probability, batch_size, generator)

    def apply(self, batch: Batch, record: FourierRecord) -> Batch:
        """Add the copies to the elements that were drawn."""

        def repeat(element: int, axis: int, channel: Tensor) -> Tensor:
            matrix = ghost_matrix(channel.shape[axis], int(record.ghosts[element]), float(record.strength[element]))
            lowest = channel.min()
            signal = along_axes(channel - lowest, [matrix if a == axis else None for a in range(3)])
            return signal.abs_().add_(lowest)

        return _each(batch, record, self.axes, repeat)


@dataclass(frozen=True)
class ChannelDropoutRecord:
    """Which channels (B, C) bool are blanked."""

    dropped: Tensor


class RandomChannelDropout:
    """Set one channel of a chosen element to 0, the mean of a normalised image; never the only one.

    Args:
        channels: of the image.
        probability: per element.
    """

    def __init__(self, channels: int, probability: float = 0.1) -> None:
        self.channels, self.probability = channels, probability

    def sample(self, batch_size: int, generator: torch.Generator) -> ChannelDropoutRecord:
        """Draw elements and the channel that they lose."""
        drawn = chance(self.probability if self.channels > 1 else 0.0, (batch_size, 1), generator)
        lost = torch.randint(0, self.channels, (batch_size, 1), generator=generator)
        return ChannelDropoutRecord((lost == torch.arange(self.channels)) & drawn)

    def apply(self, batch: Batch, record: ChannelDropoutRecord) -> Batch:
        """Blank."""
        return change_channels(batch, record.dropped, lambda channel, *_: torch.zeros_like(channel))


def long_axes(patch_size: Sequence[int]) -> tuple[int, ...]:
    """Axes of a patch along which Fourier faults make sense."""
    return tuple(axis for axis, n in enumerate(patch_size) if n >= SHORTEST_AXIS)


def _fourier(
    axes: Sequence[int],
    strength: tuple[float, float],
    ghosts: tuple[int, int],
    probability: float,
    batch_size: int,
    generator: torch.Generator,
) -> FourierRecord:
    return FourierRecord(
        chosen=chance(probability if axes else 0.0, (batch_size,), generator),
        axis=torch.randint(0, max(1, len(axes)), (batch_size,), generator=generator),
        strength=uniform(*strength, (batch_size,), generator),
        ghosts=torch.randint(ghosts[0], ghosts[1] + 1, (batch_size,), generator=generator),
    )


def _each(
    batch: Batch, record: FourierRecord, axes: Sequence[int], change: Callable[[int, int, Tensor], Tensor]
) -> Batch:
    """Change all channels of the chosen elements along their axes."""
    chosen = record.chosen[:, None].expand(batch.image.shape[:2])
    chosen_axes = record.axis.tolist()
    return change_channels(
        batch, chosen, lambda channel, element, _: change(element, axes[chosen_axes[element]], channel)
    )
