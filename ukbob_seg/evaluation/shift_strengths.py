"""How strong the shifts of ``shifts.py`` are, and what they do in words. Light: a ``--help`` shows these."""

from __future__ import annotations

import math

BIAS_LOG_AMPLITUDE, BIAS_GRID = 1.3, 16  # factors from 1/3.7 up or to 3.7; voxels along an axis of its coarse grid
BLUR_SIGMA_MM = 1.2
NOISE_SHARE = 0.1  # standard deviation, as a share of the image's range
GAMMAS = (0.5, 2.0)
GHOST_LINES = 0.5  # what is left of every second line
COARSENING = 2  # voxels that become one, along each axis
CONTRAST_SLOPE = 3.0
BRIGHTEST_PERCENTILE = 99.5  # of a channel: where its range ends


def definitions() -> dict[str, str]:
    """What each shift does and how strongly, by name, in the order of ``SHIFTS``."""
    return {
        "none": "the image as it is",
        "bias field": f"multiplied by a smooth random field of at most {math.exp(BIAS_LOG_AMPLITUDE):.1f} or at least "
        f"1/{math.exp(BIAS_LOG_AMPLITUDE):.1f}, as of a coil",
        "blur": f"smoothed by a Gaussian of standard deviation {BLUR_SIGMA_MM:g} mm",
        "noise": "Rician noise: the magnitude of a signal with Gaussian noise in both its parts, of standard deviation "
        f"{NOISE_SHARE:.0%} of the range",
        **{
            gamma_name(gamma): f"intensities to the power of {gamma:g}: dark tissue "
            f"{'brighter' if gamma < 1 else 'darker'}, against the rest"
            for gamma in GAMMAS
        },
        "ghosting": f"every second line of k-space along y keeps {GHOST_LINES:.0%} of its signal: a ghost half the "
        "field of view away",
        "low resolution": f"{COARSENING} voxels averaged into one along every axis but those at least {COARSENING} "
        "times as coarse as the finest, and interpolated back",
        "contrast": f"a steep S-shaped curve through the mean (slope {CONTRAST_SLOPE:g}): more contrast between middle "
        "intensities, less at both ends",
    }


def gamma_name(gamma: float) -> str:
    """Such as ``gamma 0.5``."""
    return f"gamma {gamma:g}"
