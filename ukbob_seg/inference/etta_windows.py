"""Which windows of a scan a network adapts to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from ukbob_seg.inference.etta_entropy import Seen, foreground
from ukbob_seg.inference.sliding_window import WindowSettings

Corner = tuple[int, int, int]  # first voxel (z, y, x) of a window in the padded image


def choose_windows(seen: Seen, most: int) -> list[int]:
    """Which of some windows to adapt to: those that show foreground, then those with the highest entropy.

    Args:
        seen: of the candidates.
        most: windows to choose.
    """
    scores = [
        (foreground(decision) > 0, entropy, -position)
        for position, (decision, entropy) in enumerate(zip(seen.decisions, seen.entropies, strict=True))
    ]
    return sorted(sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)[:most])


def cut(image: Tensor, corners: Sequence[Corner], windows: WindowSettings) -> list[Tensor]:
    """Windows of an image, (1, C, z, y, x) each; views where no padding is needed."""
    patch = windows.window(image.shape[1:])
    padded, _ = windows.pad(image)
    return [padded[:, z : z + patch[0], y : y + patch[1], x : x + patch[2]].unsqueeze(0) for z, y, x in corners]


def spread_corners(starts: Sequence[Sequence[int]], most: int) -> list[Corner]:
    """First voxels of some of the windows that begin at ``starts`` along z, y and x: of all, if they are few.

    Else they are spread along z, and each lies elsewhere than the one before: in the middle first, where the body is.
    """
    z, y, x = starts
    if len(z) * len(y) * len(x) <= most:
        return list(itertools.product(z, y, x))
    places = list(itertools.product(range(len(y)), range(len(x))))

    def off_centre(place: tuple[int, int]) -> float:
        return max(abs((2 * i + 1) / n - 1) for i, n in zip(place, (len(y), len(x)), strict=True))

    inward = sorted(places, key=lambda place: (off_centre(place), place))
    chosen = []
    for i in range(most):
        row_y, row_x = inward[i % len(inward)]
        chosen.append((z[int((i + 0.5) * len(z) / most)], y[row_y], x[row_x]))
    return chosen
