"""Images of tissues, and the shading of a coil."""

import numpy as np
from scipy import ndimage


def tissues(shape=(40, 44, 36), seed=0):
    """Blobs of a few intensities with a little noise, in no relation to the axes."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), [3 if n > 1 else 0 for n in shape], mode="wrap")
    kinds = np.digitize(smooth, np.quantile(smooth, [0.3, 0.55, 0.8]))
    return np.array([0.2, 1.0, 1.6, 2.3])[kinds] + rng.normal(scale=0.03, size=shape)


def coil(shape, strength=1.0):
    """Sensitivity that falls with the distance from a point beside the image: no polynomial."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape), indexing="ij")
    return (2.0 / (1 + (z - 1.2) ** 2 + (y + 0.8) ** 2 + (x - 0.3) ** 2)) ** strength
