"""Shifts of images away from what a network was trained on: what scanners and protocols do, of fixed strength.

For studies of robustness: the same case, shift and seed always give the same image. Intensities are taken relative to
the image's own range, so that the strength does not depend on its units. Linear changes of intensity are not here,
since normalization undoes them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from ukbob_seg.errors import ConfigError
from ukbob_seg.evaluation.shift_strengths import (
    BIAS_GRID,
    BIAS_LOG_AMPLITUDE,
    BLUR_SIGMA_MM,
    BRIGHTEST_PERCENTILE,
    COARSENING,
    CONTRAST_SLOPE,
    GAMMAS,
    GHOST_LINES,
    NOISE_SHARE,
    gamma_name,
)

Spacing = tuple[float, float, float]
Channel = np.ndarray  # (Z, Y, X) float, with values in [0, 1] but for rare bright voxels


def apply_shift(image: np.ndarray, name: str, spacing_mm: Spacing, seed: int = 0) -> np.ndarray:
    """A shifted copy of an image.

    Args:
        image: (C, Z, Y, X), any real dtype.
        name: one of ``SHIFTS``; ``none`` returns the image as float32.
        spacing_mm: (z, y, x).
        seed: decides the bias field and the noise, together with the name.

    Returns:
        (C, Z, Y, X) float32, in the units of the image.

    Raises:
        ConfigError: no such shift.
    """
    if name not in SHIFTS:
        raise ConfigError(f"unknown shift {name!r}; choose from {', '.join(SHIFTS)}")
    image = image.astype(np.float32)
    if name == "none":
        return image
    shifted = np.empty_like(image)
    for channel, values in enumerate(image):
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])  # the same in all channels
        low, high = float(values.min()), float(np.percentile(values, BRIGHTEST_PERCENTILE))
        span = high - low or 1.0
        shifted[channel] = low + span * SHIFTS[name]((values - low) / span, spacing_mm, generator)
    return shifted


def bias_field(x: Channel, spacing_mm: Spacing, generator: np.random.Generator) -> Channel:
    """Multiplied by a smooth field: exp of smoothed noise, a quarter of the field of view wide.

    No family of functions that a correction may assume; the noise is smoothed on a coarse grid and interpolated.
    """
    coarse = [min(n, BIAS_GRID) for n in x.shape]
    field = ndimage.gaussian_filter(generator.normal(size=coarse), [n / 4 if n > 1 else 0 for n in coarse])
    factors = [n / m for n, m in zip(x.shape, coarse, strict=True)]
    field = ndimage.zoom(field, factors, order=3, grid_mode=True, mode="nearest")
    field = field - field.mean()
    return x * np.exp(BIAS_LOG_AMPLITUDE * field / max(float(np.abs(field).max()), 1e-6))


def blur(x: Channel, spacing_mm: Spacing, generator: np.random.Generator) -> Channel:
    """A Gaussian of fixed width in mm."""
    return ndimage.gaussian_filter(x, [BLUR_SIGMA_MM / mm for mm in spacing_mm])


def noise(x: Channel, spacing_mm: Spacing, generator: np.random.Generator) -> Channel:
    """Rician noise: the magnitude of a signal with Gaussian noise in both its parts."""
    real, imaginary = (generator.normal(0, NOISE_SHARE, x.shape) for _ in range(2))
    return np.hypot(x + real, imaginary)


def ghosting(x: Channel, spacing_mm: Spacing, generator: np.random.Generator) -> Channel:
    """Every second line of k-space along y is weaker: a ghost half the field of view away."""
    lines = np.fft.fft(x, axis=1)
    lines[:, 1::2] *= GHOST_LINES
    return np.abs(np.fft.ifft(lines, axis=1))


def low_resolution(x: Channel, spacing_mm: Spacing, generator: np.random.Generator) -> Channel:
    """Averaged over larger voxels and interpolated back; axes that are much coarser already stay."""
    finest = min(spacing_mm)
    factors = [
        COARSENING if mm < COARSENING * finest and n > 1 else 1 for mm, n in zip(spacing_mm, x.shape, strict=True)
    ]
    # Whole blocks: the last one holds the edge twice where voxels are left over.
    whole = np.pad(x, [(0, -n % factor) for n, factor in zip(x.shape, factors, strict=True)], mode="edge")
    blocks = whole.reshape([m for n, f in zip(whole.shape, factors, strict=True) for m in (n // f, f)])
    fine = ndimage.zoom(blocks.mean(axis=(1, 3, 5)), factors, order=1, grid_mode=True, mode="nearest")
    return fine[tuple(slice(n) for n in x.shape)]


def _gamma(exponent: float) -> Callable[[Channel, Spacing, np.random.Generator], Channel]:
    def shift(x: Channel, spacing_mm: Spacing, generator: np.random.Generator) -> Channel:
        return np.clip(x, 0, None) ** exponent

    return shift


def contrast(x: Channel, spacing_mm: Spacing, generator: np.random.Generator) -> Channel:
    """A steep S-shaped curve through the mean: more contrast between middle intensities, none at the ends."""
    x = np.clip(x, 0, 1)
    middle = min(max(float(x.mean()), 0.05), 0.95)
    odds = (x / np.clip(1 - x, 1e-6, None)) * ((1 - middle) / middle)
    powered = odds**CONTRAST_SLOPE
    return powered / (1 + powered)


SHIFTS: dict[str, Callable[[Channel, Spacing, np.random.Generator], Channel]] = {
    "none": lambda x, spacing_mm, generator: x,
    "bias field": bias_field,
    "blur": blur,
    "noise": noise,
    **{gamma_name(gamma): _gamma(gamma) for gamma in GAMMAS},
    "ghosting": ghosting,
    "low resolution": low_resolution,
    "contrast": contrast,
}
