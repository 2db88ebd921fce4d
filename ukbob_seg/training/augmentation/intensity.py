"""Transforms of intensities; they leave shapes and labels alone.

Parameters with "nnU-Net" are what version 2 of it does (nnunetv2 2.8.1, batchgeneratorsv2), where they are fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ukbob_seg.training.augmentation.batch import Batch, chance, change_channels, uniform, uniform_around_one

SMALLEST_RANGE = 1e-7  # of intensities; a flatter channel counts as constant


@dataclass(frozen=True)
class IntensityRecord:
    """One number per element, (B,) float32."""

    value: Tensor


class RandomIntensityShift:
    """Add one offset, uniform in +-offset of normalised intensity, to all channels of an element."""

    def __init__(self, offset: float = 0.1, probability: float = 0.5) -> None:
        self.offset, self.probability = offset, probability

    def sample(self, batch_size: int, generator: torch.Generator) -> IntensityRecord:
        """Draw an offset per element, 0 where it stays as it is."""
        return IntensityRecord(_uniform(batch_size, self.offset, self.probability, generator))

    def apply(self, batch: Batch, record: IntensityRecord) -> Batch:
        """Add the offsets."""
        if not bool(record.value.any()):
            return batch
        offset = record.value.to(batch.image).view(-1, 1, 1, 1, 1)
        return batch.with_image(batch.writable_image().add_(offset))


class RandomIntensityScale:
    """Multiply all channels of an element by 1 + v, v uniform in +-factor."""

    def __init__(self, factor: float = 0.1, probability: float = 0.5) -> None:
        self.factor, self.probability = factor, probability

    def sample(self, batch_size: int, generator: torch.Generator) -> IntensityRecord:
        """Draw v per element, 0 where it stays as it is."""
        return IntensityRecord(_uniform(batch_size, self.factor, self.probability, generator))

    def apply(self, batch: Batch, record: IntensityRecord) -> Batch:
        """Multiply."""
        if not bool(record.value.any()):
            return batch
        factor = 1 + record.value.to(batch.image).view(-1, 1, 1, 1, 1)
        return batch.with_image(batch.writable_image().mul_(factor))


@dataclass(frozen=True)
class LinearRecord:
    """What both transforms drew."""

    scale: IntensityRecord
    shift: IntensityRecord


class RandomLinearIntensity:
    """``RandomIntensityScale``, then ``RandomIntensityShift``, in one pass over the image.

    Args:
        scale: of intensities.
        shift: of scaled intensities.
    """

    def __init__(self, scale: RandomIntensityScale, shift: RandomIntensityShift) -> None:
        self.scale, self.shift = scale, shift

    def sample(self, batch_size: int, generator: torch.Generator) -> LinearRecord:
        """Draw for both, independently."""
        return LinearRecord(self.scale.sample(batch_size, generator), self.shift.sample(batch_size, generator))

    def apply(self, batch: Batch, record: LinearRecord) -> Batch:
        """Multiply and add."""
        if not bool(record.scale.value.any() | record.shift.value.any()):
            return batch
        image = batch.writable_image()
        # Element by element: addcmul, which could take all at once, is much slower where it broadcasts.
        pairs = zip(record.scale.value.tolist(), record.shift.value.to(image), strict=True)
        for element, (scale, offset) in zip(image, pairs, strict=True):
            torch.add(offset, element, alpha=1 + scale, out=element)
        return batch.with_image(image)


@dataclass(frozen=True)
class ChannelRecord:
    """One number (B, C) per channel of each element, and which (B, C) bool are changed."""

    chosen: Tensor
    value: Tensor


class RandomBrightness:
    """Multiply every channel of a chosen element by its own factor; nnU-Net's brightness.

    Args:
        channels: of the image.
        factor: lowest and highest, around 1.
        probability: per element.
    """

    def __init__(self, channels: int, factor: tuple[float, float] = (0.75, 1.25), probability: float = 0.15) -> None:
        self.channels, self.factor, self.probability = channels, factor, probability

    def sample(self, batch_size: int, generator: torch.Generator) -> ChannelRecord:
        """Draw elements and factors."""
        return _per_channel(self.channels, self.factor, self.probability, batch_size, generator)

    def apply(self, batch: Batch, record: ChannelRecord) -> Batch:
        """Multiply."""
        if not bool(record.chosen.any()):
            return batch
        factor = torch.where(record.chosen, record.value, 1.0)
        return batch.with_image(batch.writable_image().mul_(factor.to(batch.image)[:, :, None, None, None]))


class RandomContrast:
    """Stretch every channel of a chosen element about its mean, within its range; nnU-Net's contrast.

    Args:
        channels: of the image.
        factor: lowest and highest, around 1.
        probability: per element.
    """

    def __init__(self, channels: int, factor: tuple[float, float] = (0.75, 1.25), probability: float = 0.15) -> None:
        self.channels, self.factor, self.probability = channels, factor, probability

    def sample(self, batch_size: int, generator: torch.Generator) -> ChannelRecord:
        """Draw elements and factors."""
        return _per_channel(self.channels, self.factor, self.probability, batch_size, generator)

    def apply(self, batch: Batch, record: ChannelRecord) -> Batch:
        """Stretch."""

        def stretch(channel: Tensor, element: int, index: int) -> Tensor:
            low, high = torch.aminmax(channel)
            mean = channel.mean()
            factor = float(record.value[element, index])
            return (channel * factor).add_(mean * (1 - factor)).clamp_(low, high)

        return change_channels(batch, record.chosen, stretch)


class RandomGamma:
    """Raise intensities, scaled to 0..1, to a power; each channel keeps its mean and standard deviation. nnU-Net's.

    Args:
        channels: of the image.
        power: lowest and highest, around 1.
        probability: per element.
        inverted: work on the negative image, so that bright instead of dark tissue is spread.
    """

    def __init__(
        self,
        channels: int,
        power: tuple[float, float] = (0.7, 1.5),
        probability: float = 0.3,
        inverted: bool = False,
    ) -> None:
        self.channels, self.power, self.probability, self.inverted = channels, power, probability, inverted

    def sample(self, batch_size: int, generator: torch.Generator) -> ChannelRecord:
        """Draw elements and powers."""
        return _per_channel(self.channels, self.power, self.probability, batch_size, generator)

    def apply(self, batch: Batch, record: ChannelRecord) -> Batch:
        """Bend the intensities; a constant channel stays as it is."""

        def bend(channel: Tensor, element: int, index: int) -> Tensor:
            low, high = torch.aminmax(channel)
            extent = (high - low).clamp_min(SMALLEST_RANGE)
            share = (high - channel if self.inverted else channel - low).div_(extent)
            share.pow_(float(record.value[element, index]))
            deviation, mean = torch.std_mean(share)
            wanted, wanted_mean = torch.std_mean(channel)
            gain = wanted / deviation.clamp_min(SMALLEST_RANGE) * (-1 if self.inverted else 1)
            return share.mul_(gain).add_(wanted_mean - mean * gain)

        return change_channels(batch, record.chosen, bend)


@dataclass(frozen=True)
class NoiseRecord:
    """Standard deviation (B,), 0 for none, and a seed (B,) int64 for the noise itself.

    The noise is made on the device from the seed: a run repeats itself on one kind of device.
    """

    deviation: Tensor
    seed: Tensor


class RandomNoise:
    """Add Gaussian noise to all channels of a chosen element, with one standard deviation.

    nnU-Net's noise: it calls the range 0..0.1 a variance, and uses it as a standard deviation.

    Args:
        deviation: lowest and highest, in units of normalised intensity.
        probability: per element.
    """

    def __init__(self, deviation: tuple[float, float] = (0.0, 0.1), probability: float = 0.1) -> None:
        self.deviation, self.probability = deviation, probability

    def sample(self, batch_size: int, generator: torch.Generator) -> NoiseRecord:
        """Draw elements, deviations and seeds."""
        drawn = chance(self.probability, (batch_size,), generator)
        deviation = uniform(*self.deviation, (batch_size,), generator) * drawn
        return NoiseRecord(deviation, torch.randint(0, 2**62, (batch_size,), generator=generator))

    def apply(self, batch: Batch, record: NoiseRecord) -> Batch:
        """Add the noise."""
        noisy = record.deviation.nonzero().flatten().tolist()
        if not noisy:
            return batch
        image = batch.writable_image()
        for element in noisy:
            source = torch.Generator(image.device).manual_seed(int(record.seed[element]))
            noise = torch.empty_like(image[element]).normal_(0, float(record.deviation[element]), generator=source)
            image[element] += noise
        return batch.with_image(image)


def _uniform(batch_size: int, width: float, probability: float, generator: torch.Generator) -> Tensor:
    changed = torch.rand(batch_size, generator=generator) < probability
    return (torch.rand(batch_size, generator=generator) * 2 - 1) * width * changed


def _per_channel(
    channels: int, around_one: tuple[float, float], probability: float, batch_size: int, generator: torch.Generator
) -> ChannelRecord:
    """A factor for each channel of the elements that are drawn."""
    drawn = chance(probability, (batch_size, 1), generator)
    value = uniform_around_one(*around_one, (batch_size, channels), generator)
    return ChannelRecord(drawn.expand(batch_size, channels), value)
