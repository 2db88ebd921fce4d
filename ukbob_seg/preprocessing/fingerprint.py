"""The dataset fingerprint: what the training cases look like, from one read of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ukbob_seg.dataset.image_io import largest_voxels
from ukbob_seg.dataset.spec import Case, DatasetSpec, find_cases, summarise_problems
from ukbob_seg.errors import DatasetError
from ukbob_seg.files import digest, read_json, write_json
from ukbob_seg.parallel import Cluster, Part, choose_workers, map_cases
from ukbob_seg.preprocessing.fingerprint_cases import (
    PARTS,
    CaseFingerprint,
    CaseReading,
    GroupReader,
    LoadedCases,
    case_key,
    group_cases,
    load_known,
    save_known,
)

FORMAT_VERSION = 2
MAX_SAMPLES = 10_000_000  # foreground voxels per channel over the whole dataset
MANY_WORKERS = 64  # on a cluster, whose size is not known
SMALL_BYTES = 50e6  # starting worker processes takes longer than reading a few hundred small files


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
        inputs: hash of the labels in dataset.json and of the size and time of every file; tells whether this is up to
            date.
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
            content["cases"] = tuple(CaseFingerprint.from_json(case) for case in content["cases"])
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
    loaded: LoadedCases | None = None,
    scheduler: str | None = None,
) -> Fingerprint:
    """Read every training case once, check it, and collect the fingerprint into ``output_folder``.

    Cases that were read before and have not changed are not read again unless ``force``; an interrupted run goes on.
    The result depends neither on ``workers`` nor on what was read when.

    Args:
        raw_folder: raw dataset (``DatasetXXX_Name``).
        output_folder: preprocessed dataset folder; gets fingerprint.json and the readings of the cases.
        workers: processes, None to choose.
        allow_empty: accept cases without foreground.
        force: read and check all cases even when nothing has changed.
        quiet: no progress bar.
        loaded: takes cases that are needed again, as many as fit, when all happens in this process.
        scheduler: address of a Dask scheduler whose workers read.

    Raises:
        DatasetError: all problems of all cases, in one message.
    """
    spec = DatasetSpec.load(raw_folder)
    cases, problems = find_cases(raw_folder, spec)
    if not cases:
        raise DatasetError(summarise_problems(problems))
    folder = Path(output_folder)
    keys = [case_key(case, label_content(spec), allow_empty) for case in cases]
    inputs = _inputs(spec, keys)
    if not force and not problems:
        known = _load_if_valid(folder / "fingerprint.json")
        if known is not None and known.inputs == inputs:
            return known
    wanted = max(1, MAX_SAMPLES // len(cases))
    readings = {} if force else load_known(folder)
    todo = [
        (case, key)
        for case, key in zip(cases, keys, strict=True)
        if key not in readings or not readings[key].holds(wanted)
    ]
    reader = GroupReader(spec.labels, wanted, allow_empty, folder / PARTS, loaded)
    readings.update(_read_groups(reader, todo, spec.name, workers, quiet, scheduler))
    used = [readings[key] for key in keys]
    for case, reading in zip(cases, used, strict=True):
        problems.extend(f"case {case.name}: {problem}" for problem in reading.problems)
    save_known(folder, used, wanted)
    if problems:
        raise DatasetError(summarise_problems(problems))
    fingerprint = Fingerprint(
        dataset=spec.name,
        cases=tuple(reading.sizes for reading in used if reading.sizes is not None),
        intensities=_statistics([reading.samples[:, :wanted] for reading in used]),
        cases_with_label={
            str(value): sum(k in reading.voxels for reading in used)
            for k, value in enumerate(spec.labels.values, start=1)
        },
        inputs=inputs,
    )
    fingerprint.save(folder / "fingerprint.json")
    return fingerprint


def read_part(
    raw_folder: Path,
    output_folder: Path,
    part: Part,
    workers: int | None = None,
    allow_empty: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> int:
    """Read the cases of one part and keep the readings for ``extract_fingerprint``; for job arrays.

    Arguments as there. Problems are reported there as well, for all cases together.

    Returns:
        How many cases were read now.
    """
    spec = DatasetSpec.load(raw_folder)
    cases, _ = find_cases(raw_folder, spec)
    folder = Path(output_folder)
    keyed = [(case, case_key(case, label_content(spec), allow_empty)) for case in cases]
    wanted = max(1, MAX_SAMPLES // max(1, len(cases)))
    known = {} if force else load_known(folder)
    todo = [
        (case, key) for case, key in Cluster(part=part).share(keyed) if key not in known or not known[key].holds(wanted)
    ]
    reader = GroupReader(spec.labels, wanted, allow_empty, folder / PARTS)
    return len(_read_groups(reader, todo, spec.name, workers, quiet, keep=True))


def describe_changes(plans_inputs: str, raw_folder: Path) -> str | None:
    """Whether plans were made from the dataset as it is now.

    Args:
        plans_inputs: ``Fingerprint.inputs`` that the plans were made from; empty when they do not say.
        raw_folder: raw dataset.

    Returns:
        None, or what to say about it.
    """
    spec = DatasetSpec.load(raw_folder)
    cases, _ = find_cases(raw_folder, spec)
    known = [
        _inputs(spec, [case_key(case, label_content(spec), allow_empty) for case in cases])
        for allow_empty in (False, True)
    ]
    if not plans_inputs or plans_inputs in known:
        return None
    return (
        f"{spec.name} has changed since its plans were made (cases were added, removed or written again); going on "
        "with these plans. ukbob_plan_and_preprocess makes new ones."
    )


def _inputs(spec: DatasetSpec, keys: Sequence[str]) -> str:
    """Hash of all that a fingerprint depends on."""
    return digest([FORMAT_VERSION, spec.name, spec.channel_names, label_content(spec), list(keys)])


def label_content(spec: DatasetSpec) -> Any:
    """What dataset.json says of the labels: all of it that decides how label files are read."""
    return [spec.content["labels"], spec.content.get("regions_class_order")]


def _read_groups(
    reader: GroupReader,
    todo: Sequence[tuple[Case, str]],
    name: str,
    workers: int | None,
    quiet: bool,
    scheduler: str | None = None,
    keep: bool = False,
) -> dict[str, CaseReading]:
    """Read cases, by key. More than one group, or ``keep``: each leaves what it read on disk."""
    cases = [case for case, _ in todo]
    total_bytes = sum(file.stat().st_size for case in cases for file in case.images)
    small = workers is None and total_bytes < SMALL_BYTES
    count = 1 if small else choose_workers(workers, len(cases), _memory_per_case_gb(cases))
    groups = group_cases(todo, MANY_WORKERS if scheduler else count)
    reader = dataclasses.replace(
        reader,
        parts=reader.parts if keep or len(groups) > 1 else None,
        loaded=reader.loaded if count == 1 and scheduler is None else None,
    )
    done = map_cases(
        reader,
        groups,
        workers=count,
        description=f"fingerprint of {name}",
        quiet=quiet,
        scheduler=scheduler,
        amounts=[len(group) for group in groups],
    )
    return {reading.key: reading for group in done for reading in group}


def _memory_per_case_gb(cases: Sequence[Case]) -> float:
    """All channels in float32, twice, and the label map."""
    channels = len(cases[0].images) if cases else 0
    return 0.2 + largest_voxels([case.images[0] for case in cases]) * (8 * channels + 8) / 2**30


def _load_if_valid(path: Path) -> Fingerprint | None:
    try:
        return Fingerprint.load(path)
    except DatasetError:
        return None  # a damaged fingerprint is simply made again


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
