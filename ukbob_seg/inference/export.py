"""From network outputs to a label map, or probabilities, on the grid of the input file."""

from __future__ import annotations

from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.preprocessing import resampling, resampling_torch
from ukbob_seg.preprocessing.preprocessor import CaseProperties
from ukbob_seg.preprocessing.storage import save_array

PLANES_AT_ONCE = 8
Logits = np.ndarray | Tensor


def decide(logits: Tensor, has_regions: bool) -> Tensor:
    """Decision of each voxel: the most probable class, or 1 + the last region with a positive logit (0: none).

    Args:
        logits: (K, z, y, x).
        has_regions: whether outputs overlap.

    Returns:
        (z, y, x) integer.
    """
    if not has_regions:
        return logits.argmax(dim=0)
    order = torch.arange(1, logits.shape[0] + 1, device=logits.device).view(-1, 1, 1, 1)
    return ((logits > 0) * order).amax(dim=0)


def decide_resampled(logits: Logits, properties: CaseProperties, has_regions: bool) -> np.ndarray:
    """Decision at the file's resolution from logits at the network's, interpolated linearly on the device they are on.

    Args:
        logits: (K, z, y, x) float32.
        properties: of the case.
        has_regions: whether outputs overlap.

    Returns:
        (Z, Y, X) of the kept box, uint8 or uint16, as ``decide``; the same on every device for the same logits.
    """
    shape, axis = _box_shape(properties), properties.coarse_axis
    if _on_device(logits):
        on_device = resampling_torch.logits_to_regions if has_regions else resampling_torch.logits_to_indices
        return on_device(logits, shape, coarse_axis=axis).cpu().numpy()
    on_host = resampling.logits_to_regions if has_regions else resampling.logits_to_indices
    return on_host(np.asarray(logits), shape, coarse_axis=axis)


def to_file_values(decision: np.ndarray, properties: CaseProperties, scheme: LabelScheme) -> np.ndarray:
    """Put a decision for the kept box back into the whole file's grid, as the user's label values.

    Args:
        decision: (Z, Y, X) of the box, at the file's resolution.
        properties: where the box lies.
        scheme: which value stands for which decision.

    Returns:
        (Z, Y, X) uint8 or uint16 of the file's shape, 0 outside the box.
    """
    values = np.zeros(properties.geometry.shape, dtype=scheme.output_values.dtype)
    values[properties.box] = scheme.output_values[decision]
    return values


def save_probabilities(path: Path, logits: Logits, properties: CaseProperties, head: str, exclusive: bool) -> None:
    """Write class probabilities at the file's geometry as Blosc2 float16, (K, Z, Y, X).

    Logits are interpolated some planes at a time, then turned into probabilities. Outside the kept box background
    has probability 1 (``exclusive`` classes), or every region 0.

    Args:
        path: ``.b2nd`` file.
        logits: (K, z, y, x) float32 at the network's resolution, on any device.
        properties: of the case.
        head: ``softmax`` or ``sigmoid``.
        exclusive: whether output 0 is background.
    """
    shape = _box_shape(properties)
    result = np.zeros((len(logits), *properties.geometry.shape), dtype=np.float16)
    if exclusive:
        result[0] = 1
    inside = result[(slice(None), *properties.box)]
    for start in range(0, shape[0], PLANES_AT_ONCE):
        stop = min(start + PLANES_AT_ONCE, shape[0])
        planes = _planes(logits, shape, start, stop, properties.coarse_axis)
        probabilities = planes.softmax(dim=0) if head == "softmax" else planes.sigmoid()
        inside[:, start:stop] = probabilities.half().cpu().numpy()
    save_array(path, result, (64, 64, 64))


def _planes(logits: Logits, shape: tuple[int, int, int], start: int, stop: int, coarse_axis: int | None) -> Tensor:
    """Interpolated logits of some output planes, (K, stop - start, Y, X) float32, where ``logits`` are."""
    if _on_device(logits):
        return resampling_torch.resample_logits_planes(logits, shape, start, stop, coarse_axis=coarse_axis)
    planes = resampling.resample_logits_planes(np.asarray(logits), shape, start, stop, coarse_axis=coarse_axis)
    return torch.from_numpy(planes)


def _on_device(logits: Logits) -> TypeGuard[Tensor]:
    """Whether the compiled loops, which are faster than torch on a CPU, cannot reach the logits."""
    return isinstance(logits, Tensor) and logits.device.type != "cpu"


def _box_shape(properties: CaseProperties) -> tuple[int, int, int]:
    z, y, x = (b - a for a, b in zip(properties.box_start, properties.box_stop, strict=True))
    return z, y, x
