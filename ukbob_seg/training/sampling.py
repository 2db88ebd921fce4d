"""Choosing and reading training patches. Step n always gives the same batch, whichever worker makes it."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ukbob_seg.preprocessing.records import case_files, load_record
from ukbob_seg.preprocessing.storage import open_array
from ukbob_seg.training.cascade import augment_map, read_map
from ukbob_seg.training.stopping import outlive_one_signal

MOST_OPEN = 64  # cases held open by one process: two file descriptors and a table of locations each


@dataclass(frozen=True)
class TrainingCase:
    """A preprocessed case and what may be trusted in its labels.

    Attributes:
        name: of the case.
        lookup: table from stored label index to the index to learn from, or to a code of ``training/flags.py`` (SOLF
            flags), or None for all as stored.
    """

    name: str
    lookup: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class PatchSettings:
    """How patches are drawn.

    Attributes:
        patch_size: voxels (z, y, x) that the network sees; decides where patches lie.
        batch_size: patches per step, of all processes together.
        foreground_fraction: share of the patches that are centred on a labelled voxel (``centred_patches``).
        ignore_index: label that is no foreground.
        seed: decides everything.
        rank: of the process, which reads its part of each batch only.
        ranks: number of processes.
        augment_previous: make the first stage's maps of a cascade worse.
        read_size: voxels (z, y, x) that are read around the same centre, at least ``patch_size``; None for the same.
    """

    patch_size: tuple[int, int, int]
    batch_size: int
    foreground_fraction: float
    ignore_index: int
    seed: int
    rank: int = 0
    ranks: int = 1
    augment_previous: bool = True
    read_size: tuple[int, int, int] | None = None


class PatchDataset(Dataset):
    """Batches by step number: image (B, C, z, y, x) float32 and labels (B, z, y, x) int32.

    In a cascade also previous (B, z, y, x) int32, the first stage's label indices.

    Args:
        folder: preprocessed configuration.
        cases: to draw from.
        settings: how.
        previous: folder of the first stage's maps, or None.
    """

    def __init__(
        self, folder: Path, cases: Sequence[TrainingCase], settings: PatchSettings, previous: Path | None = None
    ) -> None:
        self._folder = Path(folder)
        self._previous = previous
        self._cases = tuple(cases)
        self._settings = settings
        self._open: OrderedDict[str, tuple[Any, Any, Any, dict[int, np.ndarray]]] = OrderedDict()
        for case in self._cases:
            load_record(self._folder, case.name)  # fail before training starts, naming the case

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """Make the batch of one step."""
        settings = self._settings
        chosen = np.random.default_rng([settings.seed, 0, step]).integers(0, len(self._cases), settings.batch_size)
        each = settings.batch_size // settings.ranks
        mine = range(settings.rank * each, (settings.rank + 1) * each)
        free = settings.batch_size - centred_patches(step, settings.batch_size, settings.foreground_fraction)
        # Each patch has a generator of its own, so that it is the same whichever process reads which others.
        patches = [
            self._patch(
                self._cases[chosen[position]],
                np.random.default_rng([settings.seed, 0, step, position + 1]),
                centred=position >= free,
            )
            for position in mine
        ]
        names = ("image", "labels", "previous")
        columns = zip(*patches, strict=True)
        return {name: torch.from_numpy(np.stack(column)) for name, column in zip(names, columns, strict=False)}

    def _patch(self, case: TrainingCase, generator: np.random.Generator, centred: bool) -> tuple[np.ndarray, ...]:
        images, labels, previous, locations = self._load(case)
        settings = self._settings
        start = choose_start(images.shape[1:], settings.patch_size, generator, locations if centred else {})
        start, size = widen(start, settings.patch_size, settings.read_size or settings.patch_size)
        image = read_patch(images, start, size)
        patch = read_patch(labels, start, size)
        if case.lookup is not None:
            patch = case.lookup[patch]
        if previous is None:
            return image, patch.astype(np.int32)
        first_stage = read_patch(previous, start, size)
        if settings.augment_previous:
            first_stage = augment_map(first_stage, generator, math.prod(settings.patch_size))
        return image, patch.astype(np.int32), first_stage.astype(np.int32)

    def _load(self, case: TrainingCase) -> tuple[Any, Any, Any, dict[int, np.ndarray]]:
        if case.name not in self._open:
            image_path, label_path, table_path = case_files(self._folder, case.name)
            with np.load(table_path) as table:
                locations = {int(key): table[key] for key in table.files}
            usable = {
                index: voxels
                for index, voxels in locations.items()
                if index != self._settings.ignore_index and (case.lookup is None or case.lookup[index] == index)
            }
            previous = None if self._previous is None else read_map(self._previous, case.name)
            self._open[case.name] = open_array(image_path), open_array(label_path), previous, usable
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(case.name)
        return self._open[case.name]


def centred_patches(step: int, batch_size: int, share: float) -> int:
    """How many patches of a batch, its last ones, are centred on a labelled voxel.

    At least nnU-Net's number, which rounds for each batch: one of two at its share of 0.33, so that every batch has
    foreground; but none of one. And at least the share over many batches, so that small batches get it, too.

    Args:
        step: number of the batch.
        batch_size: patches in it.
        share: in [0, 1].
    """
    rounded = batch_size - round(batch_size * (1 - share))
    due = math.floor((step + 1) * batch_size * share) - math.floor(step * batch_size * share)
    return max(rounded, due)


def choose_start(
    shape: Sequence[int],
    patch_size: tuple[int, int, int],
    generator: np.random.Generator,
    locations: dict[int, np.ndarray],
) -> tuple[int, int, int]:
    """First voxel of a patch; negative where the case is smaller than the patch and must be padded.

    Args:
        shape: of the case, voxels (z, y, x).
        patch_size: voxels (z, y, x).
        generator: decides.
        locations: voxels per class; when given, a class is drawn first and the patch is centred on one of its voxels.
    """
    missing = [max(0, p - n) for p, n in zip(patch_size, shape, strict=True)]
    low = [-(m // 2) for m in missing]
    high = [n + m // 2 + m % 2 - p for n, m, p in zip(shape, missing, patch_size, strict=True)]
    start = [int(generator.integers(a, b + 1)) for a, b in zip(low, high, strict=True)]
    if locations:
        voxels = locations[sorted(locations)[int(generator.integers(len(locations)))]]
        centre = voxels[int(generator.integers(len(voxels)))].astype(int)
        start = [int(np.clip(c - p // 2, a, b)) for c, p, a, b in zip(centre, patch_size, low, high, strict=True)]
    return start[0], start[1], start[2]


def widen(
    start: tuple[int, int, int], patch_size: tuple[int, int, int], read_size: tuple[int, int, int]
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """First voxel and size of a larger box in whose middle the patch lies.

    The patch begins ``(read_size - patch_size) // 2`` voxels inside it, which is where ``RandomSpatial`` looks for it.
    """
    z, y, x = (s - (r - p) // 2 for s, p, r in zip(start, patch_size, read_size, strict=True))
    return (z, y, x), read_size


def read_patch(array: Any, start: tuple[int, int, int], patch_size: tuple[int, int, int]) -> np.ndarray:
    """Read (..., z, y, x) voxels from a stored array, with zeros where the patch leaves the case."""
    shape = array.shape[-3:]
    leading = array.shape[:-3]
    inside = tuple(slice(max(0, s), min(n, s + p)) for s, p, n in zip(start, patch_size, shape, strict=True))
    part = np.asarray(array[(*(slice(None) for _ in leading), *inside)])
    if part.shape[-3:] == tuple(patch_size):
        return part
    patch = np.zeros((*leading, *patch_size), dtype=part.dtype)
    z, y, x = (slice(i.start - s, i.stop - s) for i, s in zip(inside, start, strict=True))
    patch[..., z, y, x] = part
    return patch


class _Steps(Sampler[int]):
    """Step numbers from ``first`` to ``last``, in order."""

    def __init__(self, first: int, last: int) -> None:
        self._range = range(first, last)

    def __iter__(self) -> Any:
        return iter(self._range)

    def __len__(self) -> int:
        return len(self._range)


def make_loader(dataset: PatchDataset, first_step: int, last_step: int, workers: int, pin: bool) -> DataLoader:
    """A loader over steps; workers only read patches, everything else happens on the device."""
    with warnings.catch_warnings():  # how many processes is the user's to say
        warnings.filterwarnings("ignore", "This DataLoader will create")
        return _loader(dataset, first_step, last_step, workers, pin)


def _loader(dataset: PatchDataset, first_step: int, last_step: int, workers: int, pin: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=_Steps(first_step, last_step),
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=2 if workers else None,
        worker_init_fn=outlive_one_signal,
    )
