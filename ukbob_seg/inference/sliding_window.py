"""Sliding-window prediction in slabs: only the classes x rows that windows still touch are held.

Windows run in z order. Once the windows of one z position are done, the rows above the next position are final;
they are normalised and handed on, and the accumulator moves down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

SLICES_AT_ONCE = 8  # how many slices a window of a 2D network holds
ROWS_AT_ONCE = 16  # finished rows that are handed on together
SIGMA_SHARE = 1 / 8  # sigma of the Gaussian weights, as a share of the patch edge
LEAST_WEIGHT = 1e-3  # keeps corners from vanishing (MONAI uses the same)


@dataclass(frozen=True)
class Weighting:
    """How the voxels of a window count where windows overlap: by a Gaussian with sigma of an eighth of each edge.

    Attributes:
        upper_middle: it is highest at the upper of the two middle voxels of an even edge; else between both.
        least: no voxel counts less; the highest counts 1.
        scale: of all weights, which matters to sums in half precision alone.
    """

    upper_middle: bool = False
    least: float = LEAST_WEIGHT
    scale: float = 1.0


OWN_WEIGHTING = Weighting()
# nnU-Net holds weights in half precision, ten times as large, and replaces zeros by the smallest that is left.
NNUNET_WEIGHTING = Weighting(upper_middle=True, least=2**-24 / 10, scale=10.0)


@dataclass(frozen=True)
class WindowSettings:
    """How windows cover an image.

    Attributes:
        patch_size: voxels (z, y, x).
        step: distance of neighbouring windows, as a share of the patch; 0.5 is half overlap.
        batch_size: windows per forward pass.
        slice_axis: axis that slices are cut across for a 2D network, whose patch is one voxel thick there; a window
            then takes some slices at once, without overlap. None in 3D.
        weighting: of windows where they overlap.
    """

    patch_size: tuple[int, int, int]
    step: float = 0.5
    batch_size: int = 1
    slice_axis: int | None = None
    weighting: Weighting = OWN_WEIGHTING

    def window(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Voxels (z, y, x) of a window on an image of this shape."""
        z, y, x = (
            min(SLICES_AT_ONCE, n) if axis == self.slice_axis else p
            for axis, (p, n) in enumerate(zip(self.patch_size, shape, strict=True))
        )
        return z, y, x

    def pad(self, image: Tensor) -> tuple[Tensor, list[slice]]:
        """Zeros on both sides of (..., Z, Y, X), as many as a window needs; and where the image lies within them."""
        shape = image.shape[-3:]
        padding = [max(0, p - n) for p, n in zip(self.window(shape), shape, strict=True)]
        inner = [slice(p // 2, p // 2 + n) for p, n in zip(padding, shape, strict=True)]
        if not any(padding):
            return image, inner
        return F.pad(image, [side for p in reversed(padding) for side in (p // 2, p - p // 2)]), inner

    def starts(self, shape: Sequence[int]) -> list[list[int]]:
        """First voxels of the windows along each axis of an image at least as large as the window."""
        steps = [1.0 if axis == self.slice_axis else self.step for axis in range(3)]
        window = self.window(shape)
        return [window_starts((n,), (p,), step)[0] for n, p, step in zip(shape, window, steps, strict=True)]


@dataclass(frozen=True)
class Accumulation:
    """Where the sums of all classes are held, and in which precision.

    Attributes:
        device: None for the image's own.
        dtype: of the sums; the windows' weights are float32.
        reason: for the log.
    """

    device: torch.device | None = None
    dtype: torch.dtype = torch.float32
    reason: str = field(default="", compare=False)


@dataclass(frozen=True)
class EmptySpace:
    """What need not be predicted.

    Attributes:
        occupied: (Z, Y, X) bool, on any device; windows without a single such voxel are left out.
        logits: (K,) of voxels that no window reaches.
    """

    occupied: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Slab:
    """Final logits of some rows: (K, z_stop - z_start, Y, X) float32."""

    z_start: int
    z_stop: int
    logits: Tensor


def window_starts(shape: tuple[int, ...], patch_size: tuple[int, ...], step: float) -> list[list[int]]:
    """First voxels of the windows along each axis: evenly spread, at most ``step`` patches apart, covering all.

    Args:
        shape: image, at least as large as the patch.
        patch_size: window.
        step: share of the patch, in (0, 1].
    """
    starts = []
    for n, p in zip(shape, patch_size, strict=True):
        count = math.ceil((n - p) / (p * step)) + 1
        starts.append([round((n - p) * i / (count - 1)) if count > 1 else 0 for i in range(count)])
    return starts


def gaussian_weights(
    patch_size: tuple[int, ...], device: torch.device | str = "cpu", weighting: Weighting = OWN_WEIGHTING
) -> Tensor:
    """(z, y, x) float32 weights in (0, 1], or in (0, ``scale``]: a Gaussian, highest in the middle of the patch."""
    weights = torch.ones((), device=device)
    for n in patch_size:
        middle = n // 2 if weighting.upper_middle else (n - 1) / 2
        offset = torch.arange(n, device=device, dtype=torch.float32) - middle
        weights = weights.unsqueeze(-1) * torch.exp(-0.5 * (offset / (n * SIGMA_SHARE)) ** 2)
    return weights.clamp(min=weighting.least) * weighting.scale


def choose_accumulation(
    outputs: int, image: Tensor, settings: WindowSettings, free_bytes: Callable[[], int] | None = None
) -> Accumulation:
    """Half precision on the device of the image if the sums fit there, else float32 on the host.

    Args:
        outputs: K, classes or regions.
        image: (C, Z, Y, X), where the network is.
        settings: of the windows.
        free_bytes: memory that is left on the device; None asks CUDA. Not called on a CPU, where sums are float32.
    """
    window = settings.window(image.shape[1:])
    _, y, x = (max(p, n) for p, n in zip(window, image.shape[1:], strict=True))
    # The sums, the finished rows that are handed on in float32, and as much again for the network's windows.
    needed = 2 * outputs * y * x * (2 * window[0] + 4 * ROWS_AT_ONCE)
    if image.device.type != "cuda" and free_bytes is None:
        taken = 4 * outputs * y * x * (window[0] + ROWS_AT_ONCE)
        return Accumulation(reason=f"the sums of {outputs} classes take {_size(taken)} of memory")
    free = free_bytes() if free_bytes is not None else _free_on(image.device)
    sums = f"the sums of {outputs} classes need {_size(needed)} on {image.device}, {_size(free)} are free"
    if needed <= free:
        return Accumulation(None, torch.float16, f"{sums}: they are held there")
    reason = f"{sums}: they are held in main memory, which is slower"
    return Accumulation(torch.device("cpu"), torch.float32, reason)


@torch.no_grad()
def iterate_slabs(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    settings: WindowSettings,
    progress: Callable[[int, int], None] | None = None,
    accumulation: Accumulation | None = None,
    empty: EmptySpace | None = None,
) -> Iterator[Slab]:
    """Predict an image by windows and yield its logits slab by slab, from the first row to the last.

    Args:
        predict: (B, C, pz, py, px) -> (B, K, pz, py, px); a network in evaluation mode, or several averaged.
        image: (C, Z, Y, X), on any device; windows are moved to nothing else, so give it where the network is.
        settings: window size, step and batch.
        progress: called with (windows done, windows in all).
        accumulation: where sums are held; None for float32 on the image's device.
        empty: windows to leave out; None for none.

    Yields:
        ``Slab`` after ``Slab``; together they cover every row once. An image smaller than the patch is padded with
        zeros on both sides and cropped again.
    """
    patch = settings.window(image.shape[1:])
    padded, inner = settings.pad(image)
    occupied = None if empty is None else settings.pad(empty.occupied)[0]
    starts_z, starts_y, starts_x = settings.starts(padded.shape[1:])
    corners = [(y, x) for y in starts_y for x in starts_x]
    chosen = [corners if occupied is None else _occupied(corners, occupied, z, patch) for z in starts_z]
    accumulation = accumulation or Accumulation()
    gauss = gaussian_weights(patch, accumulation.device or image.device, settings.weighting)
    gauss = gauss.clamp(min=torch.finfo(accumulation.dtype).tiny)  # what half precision would take for zero
    sums = _Sums(gauss, tuple(padded.shape[2:]), image.device, accumulation, empty)
    total, done = sum(map(len, chosen)), 0
    for z, following, here in zip(starts_z, [*starts_z[1:], padded.shape[1]], chosen, strict=True):
        for first in range(0, len(here), settings.batch_size):
            part = here[first : first + settings.batch_size]
            windows = torch.stack([padded[:, z : z + patch[0], y : y + patch[1], x : x + patch[2]] for y, x in part])
            for corner, logits in zip(part, predict(windows), strict=True):
                sums.add(logits, corner)
            done += len(part)
            if progress is not None:
                progress(done, total)
        sums.add_weights(here)
        ready = min(following, z + patch[0]) - z
        for first_row in range(max(z, inner[0].start), min(z + ready, inner[0].stop), ROWS_AT_ONCE):
            last_row = min(first_row + ROWS_AT_ONCE, z + ready, inner[0].stop)
            logits = sums.mean(slice(first_row - z, last_row - z), inner[1], inner[2])
            yield Slab(first_row - inner[0].start, last_row - inner[0].start, logits)
        sums.move_down(ready)


def _size(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:.1f} GB" if count >= 2**29 else f"{max(1, round(count / 2**20))} MB"


def _free_on(device: torch.device) -> int:
    """Bytes on a GPU, with those that PyTorch keeps of earlier cases and would use again."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


class _Sums:
    """Weighted sums of the logits of the rows that windows still touch, and the sums of their weights.

    Args:
        gauss: (z, y, x) weights of a window, where the sums are held.
        plane: voxels (y, x) of the padded image.
        device: of the network.
        accumulation: where and how the sums are held.
        empty: what stands where no window was; None where windows are everywhere.
    """

    def __init__(
        self,
        gauss: Tensor,
        plane: tuple[int, ...],
        device: torch.device,
        accumulation: Accumulation,
        empty: EmptySpace | None,
    ) -> None:
        self._device = accumulation.device or device
        self._dtype, self._empty = accumulation.dtype, empty
        self._gauss = gauss
        self._weights = torch.zeros((gauss.shape[0], *plane), device=self._device)
        self._sums: Tensor | None = None
        self._of_corners: tuple[list[tuple[int, int]], Tensor] | None = None  # weights of the last z position
        if empty is not None:  # else the number of outputs is known with the first window
            self._sums = self._zeros(len(empty.logits))

    def _zeros(self, outputs: int) -> Tensor:
        return torch.zeros((outputs, *self._weights.shape), device=self._device, dtype=self._dtype)

    def add(self, logits: Tensor, corner: tuple[int, int]) -> None:
        """Add a window's logits (K, pz, py, px)."""
        if self._sums is None:
            self._sums = self._zeros(len(logits))
        (y, x), (_, height, width) = corner, self._gauss.shape
        target = self._sums[:, :, y : y + height, x : x + width]
        target.addcmul_(logits.to(self._device, self._dtype), self._gauss.to(self._dtype))

    def add_weights(self, corners: list[tuple[int, int]]) -> None:
        """Count the weights of all windows of a z position; they are the same at most positions."""
        if self._of_corners is None or self._of_corners[0] != corners:
            self._of_corners = corners, _plane_weights(self._gauss, tuple(self._weights.shape[1:]), corners)
        self._weights += self._of_corners[1]

    def mean(self, rows: slice, y: slice, x: slice) -> Tensor:
        """(K, rows, Y, X) float32 logits."""
        assert self._sums is not None
        weights = self._weights[rows, y, x]
        if self._empty is None:
            return self._sums[:, rows, y, x].float() / weights
        logits = self._sums[:, rows, y, x].float() / weights.clamp(min=torch.finfo(torch.float32).tiny)
        return torch.where(weights > 0, logits, self._empty.logits.to(self._device).view(-1, 1, 1, 1))

    def move_down(self, rows: int) -> None:
        """Forget the first rows, which are done."""
        assert self._sums is not None
        for held in (self._sums, self._weights):
            _move_down(held, rows)


def _occupied(
    corners: list[tuple[int, int]], occupied: Tensor, z: int, patch: tuple[int, int, int]
) -> list[tuple[int, int]]:
    """Those corners (y, x) whose window holds an occupied voxel."""
    slab = occupied[z : z + patch[0]].any(dim=0)
    return [(y, x) for y, x in corners if bool(slab[y : y + patch[1], x : x + patch[2]].any())]


def predict_logits(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    settings: WindowSettings,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """All logits of an image, (K, Z, Y, X) float32 on the image's device; arguments as ``iterate_slabs``."""
    result: Tensor | None = None
    for slab in iterate_slabs(predict, image, settings, progress):
        if result is None:
            result = torch.empty((slab.logits.shape[0], *image.shape[1:]), device=image.device)
        result[:, slab.z_start : slab.z_stop] = slab.logits
    assert result is not None
    return result


def segment(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    settings: WindowSettings,
    decide: Callable[[Tensor], Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Decide every voxel slab by slab, never holding all logits.

    Args:
        predict: as for ``iterate_slabs``.
        image: (C, Z, Y, X).
        settings: windows.
        decide: (K, dz, Y, X) logits -> (dz, Y, X) integer decision, such as the argmax.
        progress: called with (windows done, windows in all).

    Returns:
        (Z, Y, X) int32 on the host.
    """
    result = torch.empty(tuple(image.shape[1:]), dtype=torch.int32)
    for slab in iterate_slabs(predict, image, settings, progress):
        result[slab.z_start : slab.z_stop] = decide(slab.logits).to("cpu", torch.int32)
    return result


def _move_down(held: Tensor, rows: int) -> None:
    """Forget the first rows of (..., rows, Y, X), move the others to the front and put zeros behind them.

    In blocks that do not overlap, so that nothing is held twice.
    """
    axis = held.dim() - 3
    kept = held.shape[axis] - rows
    if rows == 0:
        return
    for start in range(0, kept, rows):
        count = min(rows, kept - start)
        held.narrow(axis, start, count).copy_(held.narrow(axis, start + rows, count))
    held.narrow(axis, kept, rows).zero_()


def _plane_weights(gauss: Tensor, shape: tuple[int, ...], corners: list[tuple[int, int]]) -> Tensor:
    """Summed weights (pz, Y, X) of all windows of one z position."""
    weights = torch.zeros((gauss.shape[0], *shape), device=gauss.device)
    for y, x in corners:
        weights[:, y : y + gauss.shape[1], x : x + gauss.shape[2]] += gauss
    return weights
