"""From a challenge's own layout to a raw dataset: checked, in parallel, resumable, without touching anything else."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ukbob_seg.benchmark.protocol import ENDING, TRAINING, ConvertOptions, Found, Protocol, SourceCase
from ukbob_seg.benchmark.protocols import find_protocol
from ukbob_seg.dataset.image_io import largest_voxels, read_geometry, read_image, read_labels, write_image, write_labels
from ukbob_seg.dataset.paths import Roots, list_datasets
from ukbob_seg.dataset.spec import summarise_problems
from ukbob_seg.errors import ConfigError, DatasetError, listing
from ukbob_seg.files import ensure_writable, place_file, read_json, write_json, write_text
from ukbob_seg.parallel import choose_workers, map_cases
from ukbob_seg.training.splits import load_or_make_splits

MARKER = "benchmark.json"
_BYTES_PER_VOXEL = 24


@dataclass(frozen=True)
class Conversion:
    """What a conversion left behind.

    Attributes:
        folder: the raw dataset.
        edition: of the challenge's layout; empty where there is one.
        cases: by part: ``Tr``, ``Va``, ``Ts``.
        converted: cases of which something was written now.
        kept: cases that were there already.
        clip: intensities are limited to this interval in the written images, or None.
    """

    folder: Path
    edition: str
    cases: Mapping[str, int]
    converted: int
    kept: int
    clip: tuple[float, float] | None


def convert(
    name: str,
    source: Path,
    dataset_id: int,
    roots: Roots,
    options: ConvertOptions | None = None,
    link: bool = False,
    workers: int | None = None,
) -> Conversion:
    """Convert a challenge's folder into ``raw/DatasetXXX_Name``, and divide its training cases into five folds.

    Files that need no change are copied (or linked) byte by byte. A case whose files are there, and not older than
    their sources, is skipped. dataset.json is written last: without it no command takes the folder for a dataset.

    Args:
        name: of the protocol.
        source: the challenge's folder.
        dataset_id: number of the raw dataset.
        roots: ``raw`` gets the dataset, ``preprocessed`` the folds.
        options: of the protocol.
        link: symbolic links instead of copies.
        workers: processes; None chooses.

    Raises:
        ConfigError: unknown protocol, an option that it lacks, or a folder of another dataset.
        DatasetError: another layout, missing files, other label values, images and labels on different grids.
    """
    protocol, options, source = find_protocol(name), options or ConvertOptions(), Path(source)
    foreign = sorted(set(options.given()) - protocol.options)
    if foreign:
        flags = ", ".join("--" + option.replace("_", "-") for option in foreign)
        raise ConfigError(f"{flags} does not apply to {name}; remove it")
    found = protocol.find(source, options)
    folder = _claim(roots.raw, dataset_id, protocol, source, options, found)
    jobs = [_Job(case, folder, dict(found.values), found.clip, link) for case in found.cases]
    voxels = largest_voxels([image for case in found.cases for image in case.images])
    count = choose_workers(workers, len(jobs), voxels * _BYTES_PER_VOXEL / 2**30)
    outcomes = map_cases(_convert_case, jobs, count, f"converting {name}")
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    if problems:
        raise DatasetError(summarise_problems(problems))
    _describe(folder, protocol, options, found)
    _divide(roots.preprocessed / folder.name, found)
    written = sum(outcome.written for outcome in outcomes)
    parts = {part: sum(case.part == part for case in found.cases) for part in ("Tr", "Va", "Ts")}
    return Conversion(folder, found.edition, parts, written, len(jobs) - written, found.clip)


def _claim(raw: Path, dataset_id: int, protocol: Protocol, source: Path, options: ConvertOptions, found: Found) -> Path:
    """The dataset's folder: new, or begun earlier by the same conversion.

    Raises:
        ConfigError: the number or the folder belongs to something else.
        DatasetError: the folder holds cases that the conversion does not know.
    """
    if dataset_id < 1:
        raise ConfigError(f"-d must be a positive number, got {dataset_id}")
    folder = raw / f"Dataset{dataset_id:03d}_{protocol.dataset}"
    other = list_datasets(raw).get(dataset_id) if raw.is_dir() else None
    if other is not None and other != folder:
        raise ConfigError(f"number {dataset_id} belongs to {other}; choose another with -d")
    mark = {
        "protocol": protocol.name,
        "edition": found.edition,
        "source": str(source.resolve()),
        "options": options.given(),
    }
    if folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
        earlier = read_json(folder / MARKER, "mark") if (folder / MARKER).is_file() else None
        if earlier != mark:
            what = "of another source or with other options" if earlier else "not made by this command"
            raise ConfigError(f"{folder} is there and {what}; choose another number with -d, or delete the folder")
        _refuse_strangers(folder, found)
    ensure_writable(folder)
    write_json(folder / MARKER, mark)
    return folder


def _refuse_strangers(folder: Path, found: Found) -> None:
    known = {case.name for case in found.cases}
    strangers = [
        str(path.relative_to(folder))
        for path in sorted(folder.glob(f"images??/*{ENDING}"))
        if path.name[0] != "." and path.name.removesuffix(ENDING).rpartition("_")[0] not in known
    ]
    if strangers:
        raise DatasetError(f"{folder} holds cases that the source does not have; delete them: {listing(strangers)}")


@dataclass(frozen=True)
class _Job:
    """One case to convert."""

    case: SourceCase
    folder: Path
    values: dict[int, int]
    clip: tuple[float, float] | None
    link: bool

    def targets(self) -> list[tuple[Path, Path]]:
        """(source, target) of every image, and last of the label."""
        case, part = self.case, self.case.part
        pairs = [
            (path, self.folder / f"images{part}" / f"{case.name}_{channel:04d}{ENDING}")
            for channel, path in enumerate(case.images)
        ]
        if case.label is not None:
            pairs.append((case.label, self.folder / f"labels{part}" / f"{case.name}{ENDING}"))
        return pairs


@dataclass(frozen=True)
class _Outcome:
    """Whether anything was written, and what is wrong with the case."""

    written: bool = False
    problem: str = ""


def _convert_case(job: _Job) -> _Outcome:
    pairs = job.targets()
    if all(_is_current(source, target, job) for source, target in pairs):
        return _Outcome()
    try:
        geometry = read_geometry(job.case.images[0])
        for path in (*job.case.images[1:], *([job.case.label] if job.case.label else [])):
            difference = geometry.difference(read_geometry(path), (job.case.images[0].name, path.name))
            if difference is not None:
                raise DatasetError(f"{path}: {difference}; resample it to the first image's grid")
        images = pairs[: len(job.case.images)]
        for source, target in images:
            if not _is_current(source, target, job):
                _write_image(source, target, job)
        for source, target in pairs[len(images) :]:
            if not _is_current(source, target, job):
                _write_label(source, target, job)
    except DatasetError as error:
        return _Outcome(problem=f"case {job.case.name}: {error}")
    return _Outcome(written=True)


def _is_current(source: Path, target: Path, job: _Job) -> bool:
    """Whether the target is complete (it is written atomically) and not older than its source; and no broken link."""
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        return False
    return job.link or not target.is_symlink()  # copies replace links of an earlier run


def _write_image(source: Path, target: Path, job: _Job) -> None:
    if job.clip is None:
        place_file(source, target, job.link)
        return
    image, geometry = read_image([source])
    clipped = np.clip(image[0], *job.clip)
    whole = np.rint(clipped)
    write_image(whole.astype(np.int16) if np.array_equal(whole, clipped) else clipped, geometry, target)


def _write_label(source: Path, target: Path, job: _Job) -> None:
    labels, geometry = read_labels(source)
    present = [int(value) for value in np.unique(labels)]
    unknown = [str(value) for value in present if value and value not in job.values]
    if unknown:
        allowed = ", ".join(map(str, (0, *sorted(job.values))))
        raise DatasetError(f"{source}: unexpected label values {listing(unknown)}; expected {allowed}")
    if all(value == 0 or job.values[value] == value for value in present):
        place_file(source, target, job.link)
        return
    table = np.zeros(max(job.values) + 1, dtype=np.uint8 if max(job.values.values()) < 256 else np.uint16)
    for value, becomes in job.values.items():
        table[value] = becomes
    write_labels(table[labels], geometry, target)


def _describe(folder: Path, protocol: Protocol, options: ConvertOptions, found: Found) -> None:
    """groups.csv where subjects are known, and dataset.json."""
    training = [case for case in found.cases if case.part == TRAINING]
    if any(case.subject is not None for case in training):
        buffer = io.StringIO()
        rows = [(case.name, case.subject or case.name) for case in training]
        csv.writer(buffer, lineterminator="\n").writerows([("case", "subject"), *rows])
        write_text(folder / "groups.csv", buffer.getvalue())
    content: dict[str, Any] = {
        "name": protocol.title,
        "channel_names": {str(i): name for i, name in enumerate(found.channel_names)},
        "labels": {"background": 0, **found.labels},
        "numTraining": len(training),
        "file_ending": ENDING,
        "benchmark": {"protocol": protocol.name, "edition": found.edition, "options": options.given()},
    }
    if found.order is not None:
        content["regions_class_order"] = list(found.order)
    if found.clip is not None:
        content["benchmark"]["intensities_clipped_to"] = list(found.clip)
    write_json(folder / "dataset.json", content)


def _divide(folder: Path, found: Found) -> None:
    """Five folds: the challenge has test cases of its own, so that none of the training cases are held back as such."""
    training = sorted(case.name for case in found.cases if case.part == TRAINING)
    subjects = {case.name: case.subject or case.name for case in found.cases}
    groups = {name: subjects[name] for name in training}
    if len(set(groups.values())) > 1:
        load_or_make_splits(folder, training, groups)
