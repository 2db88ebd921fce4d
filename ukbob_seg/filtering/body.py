"""How large the body is: the yardstick of the normalized volume."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu

from ukbob_seg.errors import DatasetError


def body_mask(image: np.ndarray) -> np.ndarray:
    """Foreground of an image: Otsu threshold, largest component (6 neighbours), holes filled in 3D.

    Args:
        image: (Z, Y, X) one channel, any numeric dtype, finite.

    Returns:
        (Z, Y, X) bool. A cavity that is open to the border of the volume is no hole.

    Raises:
        DatasetError: the image is constant or not 3D.

    Reference: Otsu, IEEE Trans. SMC 9(1), 1979.
    """
    if image.ndim != 3:
        raise DatasetError(f"a body mask needs a (Z, Y, X) image, got shape {image.shape}")
    if image.size == 0 or image.min() == image.max():
        raise DatasetError("the image is constant: it has no foreground to measure the body by")
    components, count = ndimage.label(image > threshold_otsu(image))
    body = components == _largest(components, count)
    outside, count = ndimage.label(~body)
    open_to_border = np.zeros(count + 1, dtype=bool)
    for axis in range(3):
        for end in (0, -1):
            open_to_border[np.unique(outside.take(end, axis=axis))] = True
    open_to_border[0] = False
    return ~open_to_border[outside]


def body_voxels(image: np.ndarray) -> int:
    """Number of voxels of ``body_mask(image)``."""
    return int(np.count_nonzero(body_mask(image)))


def _largest(components: np.ndarray, count: int) -> int:
    """The number of the component with the most voxels; of equals the first."""
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    return int(sizes[1:].argmax()) + 1
