"""Intensity normalization, one scheme per channel, chosen by the channel's name as in nnU-Net."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ukbob_seg.errors import ConfigError

LEAST_SPREAD = 1e-9  # standard deviation, relative to the mean, below which a channel counts as constant
LEAST_STD = 1e-8  # divisor of ``ct`` when a dataset's foreground is constant, as in nnU-Net


@dataclass(frozen=True)
class ChannelNormalization:
    """How one channel is normalised.

    Attributes:
        scheme: key of ``NORMALIZERS``.
        clip_low: lower clip (``ct``, ``ct_window``).
        clip_high: upper clip (``ct``, ``ct_window``).
        mean: subtracted (``ct``).
        std: divided by (``ct``).
        mask_nonzero: take statistics inside the nonzero mask and leave 0 outside (``zscore``).
    """

    scheme: str
    clip_low: float | None = None
    clip_high: float | None = None
    mean: float | None = None
    std: float | None = None
    mask_nonzero: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in NORMALIZERS:
            raise ConfigError(f"normalization must be one of {', '.join(NORMALIZERS)}, got {self.scheme!r}")
        needed = {"ct": ("clip_low", "clip_high", "mean", "std"), "ct_window": ("clip_low", "clip_high")}
        for name in needed.get(self.scheme, ()):
            if getattr(self, name) is None:
                raise ConfigError(f"normalization {self.scheme!r} needs {name}")
        for name in ("clip_low", "clip_high", "mean", "std"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"normalization {self.scheme!r}: {name} must be a finite number, got {value}")
        if self.std is not None and self.std < 0:
            raise ConfigError(f"normalization {self.scheme!r}: std must not be negative, got {self.std}")
        if self.clip_low is not None and self.clip_high is not None and not self.clip_low <= self.clip_high:
            raise ConfigError(f"clip_low must not exceed clip_high, got {self.clip_low} and {self.clip_high}")

    @property
    def clip_range(self) -> tuple[float, float] | None:
        """Lower and upper clip, where there are both."""
        return None if self.clip_low is None or self.clip_high is None else (self.clip_low, self.clip_high)


def normalize(image: np.ndarray, schemes: Sequence[ChannelNormalization], mask: np.ndarray | None = None) -> np.ndarray:
    """Normalise every channel.

    Args:
        image: (C, Z, Y, X), any real type; not changed.
        schemes: one per channel.
        mask: (Z, Y, X) bool for schemes with ``mask_nonzero``.

    Returns:
        (C, Z, Y, X) float32, new. A channel that is constant (inside the mask) gives zeros where its own statistics
        are used (``zscore``, ``rescale_to_0_1``), never NaN.

    Raises:
        ConfigError: a number of schemes that is not the number of channels, or a mask that is needed and missing or
            of another shape.
    """
    if len(schemes) != len(image):
        raise ConfigError(f"{len(schemes)} normalization schemes for {len(image)} channels")
    result = np.empty(image.shape, dtype=np.float32)
    for channel, scheme in enumerate(schemes):
        if scheme.mask_nonzero and mask is None:
            raise ConfigError(f"channel {channel}: normalization inside the nonzero mask needs a mask")
        if scheme.mask_nonzero and mask is not None and mask.shape != image.shape[1:]:
            raise ConfigError(f"the mask has {mask.shape} voxels, the image {image.shape[1:]}")
        inside = mask if scheme.mask_nonzero and scheme.scheme == "zscore" else None
        NORMALIZERS[scheme.scheme](image[channel], scheme, inside).write(image[channel], inside, result[channel])
    return result


def scheme_for_channel(name: str) -> str:
    """Scheme for a channel name of dataset.json (nnU-Net's spellings, in any case; anything else is z-scored)."""
    return _BY_CHANNEL_NAME.get(name.casefold(), "zscore")


@dataclass(frozen=True)
class _Affine:
    """What a scheme does to one channel of one case: clip to [low, high], then (x - shift) / scale."""

    shift: float = 0.0
    scale: float = 1.0  # 0: the channel is constant and becomes 0
    low: float | None = None
    high: float | None = None

    def write(self, values: np.ndarray, mask: np.ndarray | None, result: np.ndarray) -> None:
        """Fill ``result`` (Z, Y, X) float32; 0 outside the mask. Plane by plane, so that float64 stays small."""
        if self.scale == 0:
            result[...] = 0
            return
        for z, plane in enumerate(values):
            scaled = plane.astype(np.float64)
            if self.low is not None:
                np.clip(scaled, self.low, self.high, out=scaled)
            scaled -= self.shift
            scaled /= self.scale
            if mask is not None:
                np.copyto(scaled, 0.0, where=~mask[z])
            result[z] = scaled


def _zscore(values: np.ndarray, scheme: ChannelNormalization, mask: np.ndarray | None) -> _Affine:
    """Mean 0 and standard deviation 1 of this case; in float64, because scanners deliver maxima from 100 to 2e6."""
    count = values.size if mask is None else int(np.count_nonzero(mask))
    if not count:
        return _Affine(scale=0.0)
    mean = _sum_of_powers(values, mask, 0.0, 1) / count
    std = math.sqrt(_sum_of_powers(values, mask, mean, 2) / count)
    return _Affine(mean, std if std > LEAST_SPREAD * abs(mean) else 0.0)


def _sum_of_powers(values: np.ndarray, mask: np.ndarray | None, centre: float, power: int) -> float:
    """Sum of (x - centre) ** power over the voxels that count, plane by plane in float64; power is 1 or 2."""
    total = 0.0
    for z, plane in enumerate(values):
        part = plane.astype(np.float64)
        part -= centre
        if mask is not None:
            part *= mask[z]
        if power == 2:
            part *= part
        total += float(part.sum())
    return total


def _ct(values: np.ndarray, scheme: ChannelNormalization, mask: np.ndarray | None) -> _Affine:
    """Clip to the dataset's foreground percentiles, then the dataset's z-score."""
    assert scheme.mean is not None
    assert scheme.std is not None
    return _Affine(scheme.mean, max(scheme.std, LEAST_STD), scheme.clip_low, scheme.clip_high)


def _ct_window(values: np.ndarray, scheme: ChannelNormalization, mask: np.ndarray | None) -> _Affine:
    """Clip to a fixed window, then to [0, 1]."""
    assert scheme.clip_low is not None
    assert scheme.clip_high is not None
    return _Affine(scheme.clip_low, scheme.clip_high - scheme.clip_low, scheme.clip_low, scheme.clip_high)


def _rescale(values: np.ndarray, scheme: ChannelNormalization, mask: np.ndarray | None) -> _Affine:
    """Minimum to 0, maximum to 1, of this case."""
    low = float(values.min())
    return _Affine(low, float(values.max()) - low)


def _rgb(values: np.ndarray, scheme: ChannelNormalization, mask: np.ndarray | None) -> _Affine:
    return _Affine(scale=255.0)


def _nothing(values: np.ndarray, scheme: ChannelNormalization, mask: np.ndarray | None) -> _Affine:
    return _Affine()


Normalizer = Callable[[np.ndarray, ChannelNormalization, np.ndarray | None], _Affine]

NORMALIZERS: dict[str, Normalizer] = {
    "zscore": _zscore,
    "ct": _ct,
    "ct_window": _ct_window,
    "rescale_to_0_1": _rescale,
    "rgb_to_0_1": _rgb,
    "no_norm": _nothing,
}

_BY_CHANNEL_NAME = {
    "ct": "ct",
    "nonorm": "no_norm",
    "zscore": "zscore",
    "rescale_to_0_1": "rescale_to_0_1",
    "rgb_to_0_1": "rgb_to_0_1",
}
