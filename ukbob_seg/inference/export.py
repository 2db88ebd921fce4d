"""From network outputs to a label map, or probabilities, on the grid of the input file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.sliding_window import Slab
from ukbob_seg.preprocessing import resampling, resampling_torch
from ukbob_seg.preprocessing.preprocessor import CaseProperties
from ukbob_seg.preprocessing.resampling_taps import PlaneRange, linear_taps
from ukbob_seg.preprocessing.storage import PlaneWriter, plane_writer

PLANES_AT_ONCE = 8
PROBABILITY = np.dtype(np.float16)
Logits = np.ndarray | Tensor


@dataclass(frozen=True)
class WrittenClasses:
    """Which classes or regions of dataset.json label maps show; the others become background.

    Exclusive classes compete as always, and a voxel that a left-out class wins is background: dropping the class before
    would give its voxels to the next best one. Regions do not compete, so left-out ones take no part in the decision:
    each voxel has the value of the last positive one among the kept.

    Attributes:
        names: in the order of dataset.json.
        values: the file value of each name.
        members: the file values in a written map that belong to each name; several for a region that others overwrite.
        regions: outputs that decide, for region models; None for exclusive classes, where all do.
        decision_values: (decisions,) file value of each decision, 0 first.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    regions: tuple[int, ...] | None
    decision_values: np.ndarray

    @classmethod
    def of(cls, scheme: LabelScheme, names: Sequence[str] | None = None) -> WrittenClasses:
        """Those named, or all.

        Raises:
            ConfigError: a name that dataset.json does not have, or none at all.
        """
        wanted = scheme.names if names is None else tuple(names)
        unknown = [name for name in wanted if name not in scheme.names]
        if unknown or not wanted:
            raise ConfigError(
                f"--classes: {f'no class {unknown[0]!r}' if unknown else 'no class is given'}; choose from "
                + ", ".join(scheme.names)
            )
        kept = [k for k, name in enumerate(scheme.names) if name in wanted]
        written = scheme.region_values or tuple(group[0] for group in scheme.members)
        values = tuple(written[k] for k in kept)
        members = tuple(
            tuple(sorted({value for value in (written[k], *scheme.members[k]) if value in values})) for k in kept
        )
        shown, every = tuple(scheme.names[k] for k in kept), scheme.output_values
        if scheme.has_regions:
            return cls(shown, values, members, tuple(kept), every[[0, *(k + 1 for k in kept)]])
        return cls(shown, values, members, None, every * np.isin(every, values))

    def deciding(self, outputs: Tensor) -> Tensor:
        """Those of all outputs (K, ...), logits or probabilities, that take part in the decision."""
        return outputs if self.regions is None or len(self.regions) == len(outputs) else outputs[list(self.regions)]


class RowStream:
    """Tells which planes at the file's resolution can be made of the rows that have come; holds what later ones need.

    Args:
        properties: of the case.
    """

    def __init__(self, properties: CaseProperties) -> None:
        self._rows = properties.shape[0]
        taps = linear_taps(self._rows, box_shape(properties)[0], nearest=properties.coarse_axis == 0)
        self._low, self._high = taps.low, taps.high
        self._held: Tensor | None = None
        self._first = self._done = 0

    def push(self, slab: Slab) -> tuple[Tensor, PlaneRange]:
        """Take the next rows.

        Args:
            slab: that begins where the last one ended.

        Returns:
            Rows (K, n, y, x), and the planes that they suffice for and that were not made before; perhaps none.
        """
        rows = slab.logits if self._held is None else torch.cat([self._held, slab.logits], dim=1)
        stop = int(np.searchsorted(self._high, slab.z_stop))  # planes both of whose neighbours have come
        planes = PlaneRange(self._done, stop, self._first, self._rows)
        needed = min(int(self._low[stop]), slab.z_stop) if stop < len(self._low) else slab.z_stop
        self._held, self._first, self._done = rows[:, needed - self._first :].clone(), needed, stop
        return rows, planes


def decide_resampled(
    logits: Logits, properties: CaseProperties, has_regions: bool, planes: PlaneRange | None = None
) -> np.ndarray:
    """Decision at the file's resolution from logits at the network's, interpolated linearly on the device they are on.

    Args:
        logits: (K, z, y, x) float32.
        properties: of the case.
        has_regions: whether outputs overlap.
        planes: which to decide, where ``logits`` are some rows; None for all from all.

    Returns:
        (planes, Y, X) of the kept box, uint8 or uint16: the most probable class, or 1 + the last region with a positive
        logit (0: none); the same on every device for the same logits.
    """
    shape, axis = box_shape(properties), properties.coarse_axis
    if _on_device(logits):
        on_device = resampling_torch.logits_to_regions if has_regions else resampling_torch.logits_to_indices
        return on_device(logits, shape, axis, planes).cpu().numpy()
    on_host = resampling.logits_to_regions if has_regions else resampling.logits_to_indices
    return on_host(np.asarray(logits), shape, axis, planes)


def to_file_values(decision: np.ndarray, properties: CaseProperties, decision_values: np.ndarray) -> np.ndarray:
    """Put a decision for the kept box back into the whole file's grid, as the user's label values.

    Args:
        decision: (Z, Y, X) of the box, at the file's resolution.
        properties: where the box lies.
        decision_values: (decisions,) the file value that each decision stands for.

    Returns:
        (Z, Y, X) uint8 or uint16 of the file's shape, 0 outside the box.
    """
    values = np.zeros(properties.geometry.shape, dtype=decision_values.dtype)
    values[properties.box] = decision_values[decision]
    return values


def probability_planes(
    logits: Logits, properties: CaseProperties, head: str, planes: PlaneRange | None = None
) -> Iterator[Tensor]:
    """Probabilities of the kept box at the file's resolution; logits are interpolated, then turned into them.

    Args:
        logits: (K, z, y, x) float32 at the network's resolution, on any device: some rows, or all.
        properties: of the case.
        head: ``softmax`` or ``sigmoid``.
        planes: which planes to make of them; None for all.

    Yields:
        (K, n, Y, X) float32 where ``logits`` are, with at most ``PLANES_AT_ONCE`` planes.
    """
    planes = planes or PlaneRange(0, box_shape(properties)[0])
    for start in range(planes.start, planes.stop, PLANES_AT_ONCE):
        part = planes._replace(start=start, stop=min(start + PLANES_AT_ONCE, planes.stop))
        values = _interpolated(logits, properties, part)
        yield values.softmax(dim=0) if head == "softmax" else values.sigmoid()


def _interpolated(logits: Logits, properties: CaseProperties, planes: PlaneRange) -> Tensor:
    """Interpolated logits (K, planes, Y, X) float32, where ``logits`` are."""
    shape, axis = box_shape(properties), properties.coarse_axis
    if _on_device(logits):
        return resampling_torch.resample_logits_planes(logits, shape, planes, axis)
    return torch.from_numpy(resampling.resample_logits_planes(np.asarray(logits), shape, planes, axis))


class ProbabilityStream:
    """Writes class probabilities at the file's geometry, (K, Z, Y, X), as their planes come.

    Outside the kept box background has probability 1 (``exclusive`` classes), or every region 0.

    Args:
        writer: of an array (K, Z, Y, X).
        properties: of the case.
        exclusive: whether output 0 is background.
    """

    def __init__(self, writer: PlaneWriter, properties: CaseProperties, exclusive: bool) -> None:
        self._writer, self._properties, self._exclusive = writer, properties, exclusive
        self._made = 0

    def append(self, probabilities: Tensor) -> None:
        """Add the next planes of the kept box.

        Args:
            probabilities: (K, n, Y, X), n at least 1, any float type, on any device.
        """
        outputs, count = probabilities.shape[:2]
        if self._made == 0:
            self._empty(outputs, self._properties.box_start[0])
        _, y, x = self._properties.box
        whole = self._background(outputs, count)
        whole[:, :, y, x] = probabilities.half().cpu().numpy()
        self._writer.append(whole)
        self._made += count
        if self._made == box_shape(self._properties)[0]:
            self._empty(outputs, self._properties.geometry.shape[0] - self._properties.box_stop[0])

    def _background(self, outputs: int, planes: int) -> np.ndarray:
        values = np.zeros((outputs, planes, *self._properties.geometry.shape[1:]), dtype=PROBABILITY)
        if self._exclusive:
            values[0] = 1
        return values

    def _empty(self, outputs: int, planes: int) -> None:
        """Planes outside of the box."""
        for start in range(0, planes, PLANES_AT_ONCE):
            self._writer.append(self._background(outputs, min(PLANES_AT_ONCE, planes - start)))


@contextmanager
def probability_stream(
    path: Path | None, properties: CaseProperties, scheme: LabelScheme
) -> Iterator[ProbabilityStream | None]:
    """The stream into a case's file of probabilities, which appears when all planes have come; None without a path."""
    if path is None:
        yield None
        return
    shape = (scheme.num_outputs, *properties.geometry.shape)
    with plane_writer(path, shape, PROBABILITY) as writer:
        yield ProbabilityStream(writer, properties, exclusive=not scheme.has_regions)


def decide_probabilities(outputs: Iterable[Tensor], threshold: float | None) -> Tensor:
    """Decide voxels from probabilities, or multiples of them; only one output has to be held at a time.

    Args:
        outputs: (n, Y, X) float32 of each class or region, in their order; at least one.
        threshold: what a region must exceed; None for exclusive classes.

    Returns:
        (n, Y, X) int32: the most probable class (equal ones: the lower), or 1 + the last region above the threshold
        (0: none).
    """
    decision = best = torch.empty(0)
    for index, values in enumerate(outputs):
        if index == 0:
            decision = torch.zeros(values.shape, dtype=torch.int32, device=values.device)
            best = values.clone() if threshold is None else torch.full_like(values, threshold)
        decision.masked_fill_(values > best, index if threshold is None else index + 1)
        if threshold is None:
            torch.maximum(best, values, out=best)
    return decision


def box_shape(properties: CaseProperties) -> tuple[int, int, int]:
    """Voxels (z, y, x) of the kept box at the file's resolution."""
    z, y, x = (b - a for a, b in zip(properties.box_start, properties.box_stop, strict=True))
    return z, y, x


def _on_device(logits: Logits) -> TypeGuard[Tensor]:
    """Whether the compiled loops, which are faster than torch on a CPU, cannot reach the logits."""
    return isinstance(logits, Tensor) and logits.device.type != "cpu"
