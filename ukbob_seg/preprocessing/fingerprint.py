"""The dataset fingerprint: what the training cases look like, from one read of each."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ukbob_seg.dataset.image_io import read_geometry
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import Case, DatasetSpec, find_cases, summarise_problems
from ukbob_seg.dataset.verify import inspect_case
from ukbob_seg.errors import DatasetError
from ukbob_seg.files import digest, read_json, write_json
from ukbob_seg.parallel import choose_workers, map_cases
from ukbob_seg.preprocessing.cropping import nonzero_box

FORMAT_VERSION = 1
MAX_SAMPLES = 10_000_000  # foreground voxels per channel over the whole dataset
SAMPLING_SEED = 1234


@dataclass(frozen=True)
class CaseFingerprint:
    """Size of one case before and after cropping to its nonzero box; axes (z, y, x)."""

    name: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    cropped_shape: tuple[int, int, int]
    left_right_axis: int | None


@dataclass(frozen=True)
class IntensityStatistics:
    """Statistics of one channel over the foreground voxels of all cases."""

    mean: float
    median: float
    std: float
    minimum: float
    maximum: float
    percentile_00_5: float
    percentile_99_5: float


@dataclass(frozen=True)
class Fingerprint:
    """What the planner needs to know of a dataset.

    Attributes:
        dataset: ``DatasetXXX_Name``.
        cases: one entry per training case, sorted by name.
        intensities: one entry per channel.
        cases_with_label: in how many cases each label value occurs (0: the class is absent).
        inputs: hash of dataset.json and of the size and time of every file; tells whether this is up to date.
    """

    dataset: str
    cases: tuple[CaseFingerprint, ...]
    intensities: tuple[IntensityStatistics, ...]
    cases_with_label: dict[str, int]
    inputs: str
    format_version: int = FORMAT_VERSION

    def save(self, path: Path) -> None:
        """Write fingerprint.json."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Fingerprint:
        """Read fingerprint.json.

        Raises:
            DatasetError: missing, damaged, or of another version.
        """
        content = read_json(path, "fingerprint")
        try:
            content["cases"] = tuple(CaseFingerprint(**_with_tuples(case)) for case in content["cases"])
            content["intensities"] = tuple(IntensityStatistics(**entry) for entry in content["intensities"])
            fingerprint = cls(**content)
        except (KeyError, TypeError) as error:
            raise DatasetError(
                f"fingerprint {path} is damaged ({error}); run ukbob_extract_fingerprint again"
            ) from error
        if fingerprint.format_version != FORMAT_VERSION:
            raise DatasetError(f"fingerprint {path} is of another version; run ukbob_extract_fingerprint again")
        return fingerprint


def extract_fingerprint(
    raw_folder: Path,
    output_folder: Path,
    workers: int | None = None,
    allow_empty: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> Fingerprint:
    """Read every training case once, check it, and collect the fingerprint into ``output_folder``.

    An up-to-date fingerprint.json is reused unless ``force``. The result does not depend on ``workers``.

    Args:
        raw_folder: raw dataset (``DatasetXXX_Name``).
        output_folder: preprocessed dataset folder; gets fingerprint.json.
        workers: processes, None to choose.
        allow_empty: accept cases without foreground.
        force: read and check all cases even when nothing has changed.
        quiet: no progress bar.

    Raises:
        DatasetError: all problems of all cases, in one message.
    """
    spec = DatasetSpec.load(raw_folder)
    cases, problems = find_cases(raw_folder, spec)
    if not cases:
        raise DatasetError(summarise_problems(problems))
    path = Path(output_folder) / "fingerprint.json"
    inputs = digest([FORMAT_VERSION, spec.content, allow_empty, [file_stamps(case) for case in cases]])
    if path.is_file() and not force and not problems:
        known = _load_if_valid(path)
        if known is not None and known.inputs == inputs:
            return known
    reader = _CaseReader(spec.labels, max(1, MAX_SAMPLES // len(cases)), allow_empty)
    # Starting worker processes takes longer than reading a few hundred small files.
    total_bytes = sum(file.stat().st_size for case in cases for file in case.images)
    count = (
        1 if workers is None and total_bytes < 50e6 else choose_workers(workers, len(cases), _memory_per_case_gb(cases))
    )
    readings = map_cases(reader, cases, workers=count, description=f"fingerprint of {spec.name}", quiet=quiet)
    for case, reading in zip(cases, readings, strict=True):
        problems.extend(f"case {case.name}: {problem}" for problem in reading.problems)
    if problems:
        raise DatasetError(summarise_problems(problems))
    fingerprint = Fingerprint(
        dataset=spec.name,
        cases=tuple(reading.sizes for reading in readings if reading.sizes is not None),
        intensities=_statistics([reading.samples for reading in readings if reading.samples is not None]),
        cases_with_label={
            str(value): sum(k in reading.label_indices for reading in readings)
            for k, value in enumerate(spec.labels.values, start=1)
        },
        inputs=inputs,
    )
    fingerprint.save(path)
    return fingerprint


def file_stamps(case: Case) -> list[Any]:
    """Name, size and time of every file of a case: what tells whether it has changed."""
    files = [*case.images, *([case.label] if case.label else [])]
    return [case.name, *([str(path.name), path.stat().st_size, path.stat().st_mtime_ns] for path in files)]


def _with_tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def largest_voxels(cases: Sequence[Case]) -> float:
    """Voxels of the case with the largest image file, judged by its header; 0 without cases."""
    if not cases:
        return 0.0
    largest = max((case.images[0] for case in cases), key=lambda path: path.stat().st_size)
    try:
        return float(np.prod(read_geometry(largest).shape, dtype=float))
    except DatasetError:  # reported when its turn comes
        return 0.0


def _memory_per_case_gb(cases: Sequence[Case]) -> float:
    """All channels in float32, twice, and the label map."""
    return 0.2 + largest_voxels(cases) * (8 * len(cases[0].images) + 8) / 2**30


def _load_if_valid(path: Path) -> Fingerprint | None:
    try:
        return Fingerprint.load(path)
    except DatasetError:
        return None  # a damaged fingerprint is simply made again


@dataclass(frozen=True)
class _Reading:
    """What one case contributes."""

    problems: list[str]
    sizes: CaseFingerprint | None = None
    samples: np.ndarray | None = None
    label_indices: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _CaseReader:
    """Picklable reading of one case for worker processes."""

    scheme: LabelScheme
    samples_per_case: int
    allow_empty: bool

    def __call__(self, case: Case) -> _Reading:
        loaded, problems = inspect_case(case, self.scheme, self.allow_empty)
        if loaded is None or problems:
            return _Reading(problems)
        box = nonzero_box(loaded.image)
        sizes = CaseFingerprint(
            case.name,
            loaded.geometry.shape,
            loaded.geometry.spacing_mm,
            (box[0].stop - box[0].start, box[1].stop - box[1].start, box[2].stop - box[2].start),
            loaded.geometry.left_right_axis,
        )
        present = np.bincount(loaded.labels.ravel(), minlength=1)
        foreground = np.flatnonzero((loaded.labels > 0) & (loaded.labels != self.scheme.ignore_index))
        if len(foreground) > self.samples_per_case:
            # Seeded by the case's name, so that neither order nor number of workers matters.
            generator = np.random.default_rng([SAMPLING_SEED, zlib.crc32(case.name.encode())])
            foreground = generator.choice(foreground, self.samples_per_case, replace=False)
        samples = loaded.image.reshape(len(loaded.image), -1)[:, foreground]
        indices = frozenset(int(k) for k in np.flatnonzero(present) if 0 < k != self.scheme.ignore_index)
        return _Reading([], sizes, samples, indices)


def _statistics(samples: Sequence[np.ndarray]) -> tuple[IntensityStatistics, ...]:
    """Statistics per channel of (C, n) samples from all cases."""
    result = []
    for channel in range(len(samples[0])):
        values = np.concatenate([sample[channel] for sample in samples])
        if not len(values):
            values = np.zeros(1, dtype=np.float32)  # only when every case is empty and that was allowed
        low, median, high = np.percentile(values, (0.5, 50, 99.5))
        result.append(
            IntensityStatistics(
                mean=float(values.mean(dtype=np.float64)),
                median=float(median),
                std=float(values.std(dtype=np.float64)),
                minimum=float(values.min()),
                maximum=float(values.max()),
                percentile_00_5=float(low),
                percentile_99_5=float(high),
            )
        )
    return tuple(result)
