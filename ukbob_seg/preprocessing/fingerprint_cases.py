"""What each case contributes to a fingerprint, kept on disk so that it is read only once.

Readings are written in groups while the work goes on (``fingerprint_parts/``) and put together when it is done
(``fingerprint_cases.npz``): an interrupted run goes on, and new cases are read alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import Case
from ukbob_seg.dataset.verify import LoadedCase, inspect_case
from ukbob_seg.files import atomic_path, digest
from ukbob_seg.preprocessing.cropping import nonzero_box

FORMAT_VERSION = 2
STORE = "fingerprint_cases.npz"
PARTS = "fingerprint_parts"
GROUP_CASES = 64  # cases between two writes, at most
GROUP_BYTES = 200e6  # compressed image bytes between two writes, about
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class CaseFingerprint:
    """Size of one case before and after cropping to its nonzero box; axes (z, y, x)."""

    name: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    cropped_shape: tuple[int, int, int]
    left_right_axis: int | None

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> CaseFingerprint:
        """From what ``dataclasses.asdict`` gave, after a way through JSON."""
        content: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
        return cls(**content)


@dataclass(frozen=True)
class CaseReading:
    """One case, read and checked.

    Attributes:
        key: hash of the files and of what was asked; another key makes a reading stale.
        problems: why the case cannot be used; then there is nothing else.
        sizes: before and after cropping.
        voxels: foreground voxels of each label index that occurs (the ignore index excepted).
        samples: (C, n) float32 intensities of foreground voxels, n = min(all of them, what was asked).
        sample_labels: (n,) label index of each sample.
    """

    key: str
    problems: tuple[str, ...] = ()
    sizes: CaseFingerprint | None = None
    voxels: dict[int, int] = dataclasses.field(default_factory=dict)
    samples: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 0), np.float32), compare=False)
    sample_labels: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.uint16), compare=False)

    def holds(self, samples: int) -> bool:
        """Whether there are as many samples as asked for, or all that the case has."""
        return len(self.sample_labels) >= min(samples, sum(self.voxels.values()))


def file_stamps(case: Case) -> list[Any]:
    """Name, size and time of every file of a case: what tells whether it has changed."""
    files = [*case.images, *([case.label] if case.label else [])]
    stats = [path.stat() for path in files]
    return [case.name, *([path.name, stat.st_size, stat.st_mtime_ns] for path, stat in zip(files, stats, strict=True))]


def case_key(case: Case, label_content: Any, allow_empty: bool) -> str:
    """What a reading depends on, except for the number of samples.

    Args:
        case: its files.
        label_content: labels of dataset.json.
        allow_empty: whether a case without foreground is accepted.
    """
    return digest([FORMAT_VERSION, file_stamps(case), label_content, allow_empty])


class LoadedCases:
    """Cases that one stage read and the next ones need again, as many as fit."""

    def __init__(self, most_bytes: float = 2**29) -> None:
        self._room = most_bytes
        self._cases: dict[str, tuple[list[Any], LoadedCase]] = {}

    def keep(self, case: Case, stamps: list[Any], loaded: LoadedCase) -> None:
        """Keep a case if there is room; ``stamps`` are those of its files before they were read."""
        size = loaded.image.nbytes + loaded.labels.nbytes
        if size <= self._room:
            self._room -= size
            self._cases[case.name] = (stamps, loaded)

    def get(self, case: Case) -> LoadedCase | None:
        """The case; None when it was not kept or its files have changed."""
        stamps, loaded = self._cases.get(case.name, (None, None))
        return loaded if stamps == file_stamps(case) else None


@dataclass(frozen=True)
class GroupReader:
    """Picklable reading of a group of cases for worker processes; leaves the group in the folder of parts.

    Attributes:
        scheme: what the label values mean.
        samples: foreground voxels wanted of each case.
        allow_empty: accept cases without foreground.
        parts: folder for the readings, None to keep nothing.
        loaded: takes cases that the next stage needs as well, when both run in one process.
    """

    scheme: LabelScheme
    samples: int
    allow_empty: bool
    parts: Path | None = None
    loaded: LoadedCases | None = None

    def __call__(self, group: Sequence[tuple[Case, str]]) -> list[CaseReading]:
        readings = [self._read(case, key) for case, key in group]
        if self.parts is not None:
            save_readings(self.parts / f"{digest([key for _, key in group])}.npz", readings)
        return readings

    def _read(self, case: Case, key: str) -> CaseReading:
        stamps = file_stamps(case)
        loaded, problems = inspect_case(case, self.scheme, self.allow_empty)
        if loaded is None or problems:
            return CaseReading(key, tuple(problems))
        if self.loaded is not None:
            self.loaded.keep(case, stamps, loaded)
        return read_case(case.name, key, loaded, self.scheme.ignore_index, self.samples)


def read_case(name: str, key: str, loaded: LoadedCase, ignore_index: int, samples: int) -> CaseReading:
    """Sizes, label voxels and foreground samples of a case in memory."""
    z, y, x = (part.stop - part.start for part in nonzero_box(loaded.image))
    geometry = loaded.geometry
    sizes = CaseFingerprint(name, geometry.shape, geometry.spacing_mm, (z, y, x), geometry.left_right_axis)
    counts = np.bincount(loaded.labels.ravel(), minlength=1)
    voxels = {int(k): int(counts[k]) for k in np.flatnonzero(counts) if 0 < k != ignore_index}
    flat = loaded.labels.ravel()
    foreground = np.flatnonzero((flat > 0) & (flat != ignore_index))
    chosen = foreground[spread(len(foreground), samples)]
    values = loaded.image.reshape(len(loaded.image), -1)[:, chosen]
    return CaseReading(key, (), sizes, voxels, values, flat[chosen].astype(np.uint16))


def spread(count: int, wanted: int) -> np.ndarray:
    """The first ``wanted`` of all positions below ``count``, in an order that is even at every length.

    Steps of about the golden section of ``count``, without common divisor, so that each position comes once (an
    additive recurrence). Asking for fewer gives the beginning of the same order: a reading serves any smaller demand.
    """
    step = max(1, round(GOLDEN * count))
    while math.gcd(step, count) > 1:
        step += 1
    return np.arange(min(count, wanted), dtype=np.int64) * step % max(count, 1)


def group_cases(cases: Sequence[tuple[Case, str]], workers: int) -> list[list[tuple[Case, str]]]:
    """Cases in groups that are written together: small enough to keep every worker busy and to lose little."""
    most = max(1, min(GROUP_CASES, -(-len(cases) // (4 * workers)))) if workers > 1 else GROUP_CASES
    groups: list[list[tuple[Case, str]]] = []
    room = 0.0
    for case, key in cases:
        size = sum(path.stat().st_size for path in case.images)
        if not groups or len(groups[-1]) >= most or size > room:
            groups.append([])
            room = GROUP_BYTES
        groups[-1].append((case, key))
        room -= size
    return groups


def save_readings(path: Path, readings: Sequence[CaseReading]) -> None:
    """Write the readings of usable cases into one file, atomically."""
    usable = [reading for reading in readings if reading.sizes is not None]
    table = [
        {
            "key": reading.key,
            "sizes": dataclasses.asdict(reading.sizes),  # type: ignore[arg-type]
            "voxels": {str(k): v for k, v in reading.voxels.items()},
            "samples": len(reading.sample_labels),
        }
        for reading in usable
    ]
    samples = np.concatenate([r.samples for r in usable], axis=1) if usable else np.empty((0, 0), np.float32)
    labels = np.concatenate([r.sample_labels for r in usable]) if usable else np.empty(0, np.uint16)
    text = np.frombuffer(json.dumps(table).encode(), dtype=np.uint8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, table=text, samples=samples, labels=labels)


def load_readings(path: Path) -> list[CaseReading]:
    """Readings of a file; none when it is missing, damaged or of another kind (its cases are then read again)."""
    try:
        with np.load(path) as content:
            table = json.loads(content["table"].tobytes())
            samples, labels = content["samples"], content["labels"]
        readings, start = [], 0
        for entry in table:
            stop = start + entry["samples"]
            sizes = CaseFingerprint.from_json(entry["sizes"])
            voxels = {int(k): int(v) for k, v in entry["voxels"].items()}
            readings.append(CaseReading(entry["key"], (), sizes, voxels, samples[:, start:stop], labels[start:stop]))
            start = stop
        return readings
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return []


def load_known(folder: Path) -> dict[str, CaseReading]:
    """All readings in a preprocessed folder, by key."""
    paths = [folder / STORE, *sorted((folder / PARTS).glob("[!.]*.npz"))]
    return {reading.key: reading for path in paths for reading in load_readings(path)}


def save_known(folder: Path, readings: Sequence[CaseReading], samples: int) -> None:
    """Put all readings into one file and remove the parts.

    Readings of smaller cohorts hold more samples than are wanted now. Some are kept, for when cases are removed
    again, but no more than twice as many, so that the file does not grow with the cohort.
    """
    shortened = [
        dataclasses.replace(r, samples=r.samples[:, : 2 * samples], sample_labels=r.sample_labels[: 2 * samples])
        for r in readings
    ]
    save_readings(folder / STORE, shortened)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
