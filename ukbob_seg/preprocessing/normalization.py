"""Intensity normalization, one scheme per channel, chosen by the channel's name as in nnU-Net."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ukbob_seg.errors import ConfigError

LEAST_SPREAD = 1e-8


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
        if self.clip_low is not None and self.clip_high is not None and not self.clip_low <= self.clip_high:
            raise ConfigError(f"clip_low must not exceed clip_high, got {self.clip_low} and {self.clip_high}")


def normalize(image: np.ndarray, schemes: Sequence[ChannelNormalization], mask: np.ndarray | None = None) -> np.ndarray:
    """Normalise every channel.

    Args:
        image: (C, Z, Y, X), any real type; not changed.
        schemes: one per channel.
        mask: (Z, Y, X) bool for schemes with ``mask_nonzero``.

    Returns:
        (C, Z, Y, X) float32; a constant channel gives zeros.

    Raises:
        ConfigError: a number of schemes that is not the number of channels, or a mask that is needed and missing.
    """
    if len(schemes) != len(image):
        raise ConfigError(f"{len(schemes)} normalization schemes for {len(image)} channels")
    result = np.empty(image.shape, dtype=np.float32)
    for channel, scheme in enumerate(schemes):
        if scheme.mask_nonzero and mask is None:
            raise ConfigError(f"channel {channel}: normalization inside the nonzero mask needs a mask")
        result[channel] = NORMALIZERS[scheme.scheme](image[channel], scheme, mask if scheme.mask_nonzero else None)
    return result


def scheme_for_channel(name: str) -> str:
    """Scheme for a channel name of dataset.json (nnU-Net's spellings, in any case; anything else is z-scored)."""
    return _BY_CHANNEL_NAME.get(name.casefold(), "zscore")


def _zscore(values: np.ndarray, scheme: ChannelNormalization, mask: np.ndarray | None) -> np.ndarray:
    """(x - mean) / std of this case, in float64 because scanners deliver maxima from 100 to 2e6."""
    inside = values if mask is None else values[mask]
    if not inside.size:
        return np.zeros(values.shape, dtype=np.float32)
    mean, std = float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))
    scaled = (values.astype(np.float32) - np.float32(mean)) / np.float32(max(std, LEAST_SPREAD))
    if std < LEAST_SPREAD:
        scaled[...] = 0
    return scaled if mask is None else np.where(mask, scaled, np.float32(0))


def _ct(values: np.ndarray, scheme: ChannelNormalization, mask: np.ndarray | None) -> np.ndarray:
    """Clip to the dataset's foreground percentiles, then the dataset's z-score."""
    assert scheme.mean is not None
    assert scheme.std is not None
    clipped = np.clip(values.astype(np.float32), scheme.clip_low, scheme.clip_high)
    return (clipped - np.float32(scheme.mean)) / np.float32(max(scheme.std, LEAST_SPREAD))


def _ct_window(values: np.ndarray, scheme: ChannelNormalization, mask: np.ndarray | None) -> np.ndarray:
    """Clip to a fixed window, then to [0, 1]."""
    assert scheme.clip_low is not None
    assert scheme.clip_high is not None
    clipped = np.clip(values.astype(np.float32), scheme.clip_low, scheme.clip_high)
    return (clipped - np.float32(scheme.clip_low)) / np.float32(max(scheme.clip_high - scheme.clip_low, LEAST_SPREAD))


def _rescale(values: np.ndarray, scheme: ChannelNormalization, mask: np.ndarray | None) -> np.ndarray:
    """Minimum to 0, maximum to 1, of this case."""
    low, high = float(values.min()), float(values.max())
    if high - low < LEAST_SPREAD:
        return np.zeros(values.shape, dtype=np.float32)
    return (values.astype(np.float32) - np.float32(low)) / np.float32(high - low)


def _rgb(values: np.ndarray, scheme: ChannelNormalization, mask: np.ndarray | None) -> np.ndarray:
    return values.astype(np.float32) / np.float32(255)


def _nothing(values: np.ndarray, scheme: ChannelNormalization, mask: np.ndarray | None) -> np.ndarray:
    return values.astype(np.float32)


Normalizer = Callable[[np.ndarray, ChannelNormalization, np.ndarray | None], np.ndarray]

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
