"""Features of every organ of every case, computed once and kept beside the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ukbob_seg.dataset.image_io import largest_voxels, read_labels, read_stored
from ukbob_seg.dataset.spec import Case, DatasetSpec, summarise_problems
from ukbob_seg.errors import DatasetError, listing
from ukbob_seg.files import digest
from ukbob_seg.filtering.body import BODY_IMAGE, BODY_UNION, body_kind, body_voxels
from ukbob_seg.filtering.evidence import EVIDENCE_COLUMNS, organ_evidence
from ukbob_seg.filtering.shape_features import FEATURE_COLUMNS, organ_features
from ukbob_seg.parallel import Part, choose_workers, map_cases
from ukbob_seg.shards import Shard, find_shards, known_cases, load_shards, shard_size

_VERSION = 2  # raise it when the meaning of a feature changes: kept results are then computed again
_BYTES_PER_VOXEL = {BODY_IMAGE: 12, BODY_UNION: 6}
_LISTED = 10


@dataclass(frozen=True)
class CaseMeasurement:
    """Measures cases; picklable, for worker processes.

    Attributes:
        file_ending: of label and mask files.
        ignore_value: file value of the ignore label, which is no organ, or None.
        body: ``image``, ``union``, or a folder of masks CASE.ext whose nonzero voxels are the body.
        evidence: also count pieces and find places (``organ_evidence``).
    """

    file_ending: str
    ignore_value: int | None
    body: str
    evidence: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the table of a case."""
        return ("case", "body_voxels", *FEATURE_COLUMNS, *(EVIDENCE_COLUMNS if self.evidence else ()))

    def key(self, case: Case) -> str:
        """Hash of what the features depend on: version, options, and size and modification time of the input files.

        Raises:
            DatasetError: the body mask is missing.
        """
        stats = [(path.name, path.stat()) for path in self._inputs(case)]
        files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        return digest([_VERSION, self.ignore_value, body_kind(self.body), files])

    def __call__(self, case: Case) -> pd.DataFrame:
        """The features of a case.

        Raises:
            DatasetError: a file of the case cannot be read or does not fit; names the case.
        """
        try:
            table, body = self._measure(case)
        except DatasetError as error:
            raise DatasetError(f"case {case.name}: {error}") from error
        table.insert(0, "case", case.name)
        table.insert(1, "body_voxels", body)
        return table

    def _inputs(self, case: Case) -> list[Path]:
        """Files that the result depends on: the label, then whatever the body is taken from."""
        assert case.label is not None
        if self.body == BODY_UNION:
            return [case.label]
        if self.body == BODY_IMAGE:
            return [case.label, case.images[0]]
        mask = Path(self.body) / f"{case.name}{self.file_ending}"
        if not mask.is_file():
            raise DatasetError(f"case {case.name}: no body mask {mask}; add it, or use --body image or --body union")
        return [case.label, mask]

    def _measure(self, case: Case) -> tuple[pd.DataFrame, int]:
        label_path, *body_path = self._inputs(case)
        labels, geometry = read_labels(label_path)
        table = organ_features(labels, geometry.spacing_mm)
        if self.evidence:
            table = table.merge(organ_evidence(labels, geometry), on="label", validate="one_to_one")
        del labels  # the image is larger: do not hold both
        table = table[table["label"] != (-1 if self.ignore_value is None else self.ignore_value)]
        if self.body == BODY_UNION:
            body = int(table["voxels"].sum())
        else:
            volume, other = read_stored(body_path[0])
            difference = geometry.difference(other, ("the label", body_path[0].name))
            if difference is not None:
                raise DatasetError(f"{difference}; resample one of them or correct its header")
            body = self._body_of(body_path[0], volume)
        return table.assign(normalized_volume=table["voxels"] / max(body, 1)), body

    def _body_of(self, path: Path, volume: np.ndarray) -> int:
        if self.body != BODY_IMAGE:
            body = int(np.count_nonzero(volume))
            if body == 0:
                raise DatasetError(f"{path} is empty: a body mask must have nonzero voxels")
            return body
        try:
            return body_voxels(volume)
        except DatasetError as error:
            raise DatasetError(f"{path}: {error}; use --body union or a folder of masks") from error


@dataclass(frozen=True)
class _Job:
    """One shard to complete: what is known of it, and the cases to measure."""

    path: Path
    known: Shard
    pending: tuple[tuple[Case, str], ...]


@dataclass(frozen=True)
class _MeasureShard:
    """Measures the pending cases of a shard and writes it; a case that fails does not stop the others."""

    measurement: CaseMeasurement

    def __call__(self, job: _Job) -> list[tuple[str, str]]:
        """(case, message) of the cases that cannot be measured."""
        failures = []
        keys, frames = dict(job.known.keys), [job.known.rows]
        try:
            for case, key in job.pending:
                try:
                    frames.append(self.measurement(case))
                    keys[case.name] = key
                except DatasetError as error:
                    failures.append((case.name, str(error)))
        finally:  # also when interrupted: what was measured is kept
            if keys:
                rows = pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)
                Shard(keys, rows, self.measurement.evidence).save(job.path)
        return failures


@dataclass(frozen=True)
class CohortMeasurement:
    """What was measured.

    Attributes:
        table: one row per case and organ in the order of the cases and ascending by label.
        computed: cases measured in this run; the others were known.
        failures: case -> why it could not be measured.
    """

    table: pd.DataFrame
    computed: int
    failures: dict[str, str]


def measure_cohort(
    folder: Path,
    cases: Sequence[Case],
    measurement: CaseMeasurement,
    workers: int | None = None,
    scheduler: str | None = None,
    quiet: bool = False,
    part: Part | None = None,
) -> CohortMeasurement:
    """Measure all cases, except those whose kept features still fit.

    Args:
        folder: where features are kept, in shards.
        cases: with label files, in a fixed order.
        measurement: how.
        workers: processes; None chooses by processors, memory and shards.
        scheduler: address of a Dask scheduler whose workers do the work instead; they must see the same files.
        quiet: no progress bar.
        part: look at this part of the shards only; the table is about its cases.

    Raises:
        UkbobError: a worker died, or the shards cannot be written.
    """
    size = shard_size(len(cases))
    groups = {index: cases[start : start + size] for index, start in enumerate(range(0, len(cases), size))}
    mine = {index: group for index, group in groups.items() if part is None or part.has(index)}
    current, failures = _keys([case for group in mine.values() for case in group], measurement)
    shards = load_shards(find_shards(folder), current)
    known = known_cases(shards.values(), current, measurement.evidence)
    jobs = [_job(shard_path(folder, index), group, current, known, measurement) for index, group in mine.items()]
    jobs = [job for job in jobs if job.pending or not _is_in_place(job, shards.get(job.path))]
    pending = sum(len(job.pending) for job in jobs)
    failed: list[tuple[str, str]] = []
    if pending:
        _compile_kernels(measurement)
        first = [case for job in jobs for case, _ in job.pending]
        done = map_cases(
            _MeasureShard(measurement),
            jobs,
            choose_workers(workers, len(jobs), _memory_per_case_gb(first, measurement)),
            "measuring organs",
            quiet,
            scheduler=scheduler,
            amounts=[len(job.pending) for job in jobs],
        )
        failed = [failure for failures_of_shard in done for failure in failures_of_shard]
    else:
        for job in jobs:
            _MeasureShard(measurement)(job)
    if part is None:
        remove_other_shards(folder, len(groups))
    shards |= load_shards((job.path for job in jobs), current)  # the others are as they were
    known = known_cases(shards.values(), current, measurement.evidence)  # cases that failed may have old rows
    unique = {id(shard): shard for shard in known.values()}.values()
    names = [case.name for case in cases]
    return CohortMeasurement(
        join_shards(unique, names, measurement.columns), pending - len(failed), failures | dict(failed)
    )


def check_label_values(table: pd.DataFrame, spec: DatasetSpec) -> None:
    """Refuse labels that dataset.json does not name.

    Raises:
        DatasetError: lists cases, values and voxel counts.
    """
    wrong = table[~table["label"].isin(spec.labels.values)]
    if wrong.empty:
        return
    shown = [f"{row.case}: {row.label} ({row.voxels} voxels)" for row in wrong.head(_LISTED).itertuples()]
    raise DatasetError(
        f"label values that dataset.json does not name, by case: {listing(shown, _LISTED, len(wrong))}; add them to "
        "'labels' or correct the files"
    )


def refuse_failures(failures: dict[str, str], cases: int) -> None:
    """Stop when cases could not be measured.

    Raises:
        DatasetError: one message with the first ten.
    """
    if not failures:
        return
    heading = f"{len(failures)} of {cases} cases cannot be measured; the others are kept"
    remedy = "mend the files and run again"
    if len(failures) == cases:
        heading = f"none of the {cases} cases can be measured"
    elif len(failures) == 1:
        remedy = "mend it, or leave the case out with --skip-unreadable (the others are kept)"
    else:
        remedy += ", or leave these cases out with --skip-unreadable"
    problems = summarise_problems(list(failures.values()), _LISTED, heading)
    raise DatasetError(problems + ("; " if len(failures) == 1 else "\n") + remedy)


def shard_path(folder: Path, index: int) -> Path:
    """Where the shard of a cohort's cases from ``index * shard_size`` is kept."""
    return Path(folder) / f"shard_{index:05d}.parquet"


def join_shards(shards: Iterable[Shard], cases: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """One table of all shards in the order of the cases, and ascending by label within a case."""
    frames = [shard.rows for shard in shards if len(shard.rows)]
    if not frames:
        return pd.DataFrame(columns=list(columns))
    table = pd.concat(frames, ignore_index=True)[list(columns)]
    place = table["case"].map({case: position for position, case in enumerate(cases)})
    return table.assign(_place=place).sort_values(["_place", "label"], ignore_index=True).drop(columns="_place")


def remove_other_shards(folder: Path, count: int) -> None:
    """Delete shards of an earlier, larger cohort."""
    expected = {shard_path(folder, index) for index in range(count)}
    for path in find_shards(folder):
        if path not in expected:
            path.unlink(missing_ok=True)


def _keys(cases: Sequence[Case], measurement: CaseMeasurement) -> tuple[dict[str, str], dict[str, str]]:
    keys, failures = {}, {}
    for case in cases:
        try:
            keys[case.name] = measurement.key(case)
        except DatasetError as error:
            failures[case.name] = str(error)
    return keys, failures


def _job(
    path: Path, group: Sequence[Case], current: dict[str, str], known: dict[str, Shard], measurement: CaseMeasurement
) -> _Job:
    """What is known of the readable ones of a group of cases, and what is not."""
    group = [case for case in group if case.name in current]
    have = [case.name for case in group if case.name in known]
    parts = {id(known[name]): known[name] for name in have}.values()
    chosen = [shard.select(set(have) & set(shard.keys)) for shard in parts]
    rows = join_shards(chosen, have, measurement.columns)
    shard = Shard({name: current[name] for name in have}, rows, measurement.evidence)
    return _Job(path, shard, tuple((case, current[case.name]) for case in group if case.name not in known))


def _is_in_place(job: _Job, kept: Shard | None) -> bool:
    """Whether the file of a job that has nothing to measure, as it was read, already holds just its cases."""
    return kept is not None and dict(kept.keys) == dict(job.known.keys) and kept.complete >= job.known.complete


def _compile_kernels(measurement: CaseMeasurement) -> None:
    """Compile (or load) the kernels for the commonest types here, so that workers find them in the cache."""
    labels = np.zeros((2, 2, 2), np.uint8)
    labels[0] = 1
    organ_features(labels, (1.0, 1.0, 1.0))
    if measurement.body == BODY_IMAGE:
        body_voxels(labels.astype(np.int16))


def _memory_per_case_gb(cases: Sequence[Case], measurement: CaseMeasurement) -> float:
    """Estimated peak of the case with the largest label file."""
    voxels = largest_voxels([case.label for case in cases if case.label is not None])
    per_voxel = _BYTES_PER_VOXEL.get(measurement.body, 8) + (24 if measurement.evidence else 0)
    return 0.2 + voxels * per_voxel / 2**30
