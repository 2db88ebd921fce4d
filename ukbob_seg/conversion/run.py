"""Carry out a conversion that a format has described: claimed, in parallel, resumable, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ukbob_seg.conversion.steps import MergeMasks, Step
from ukbob_seg.conversion.target import check_names, claim, describe, write_groups
from ukbob_seg.dataset.image_io import largest_voxels, read_geometry
from ukbob_seg.dataset.spec import summarise_problems
from ukbob_seg.errors import DatasetError
from ukbob_seg.files import read_json, write_text
from ukbob_seg.parallel import choose_workers, map_cases

TRAINING, TEST = "Tr", "Ts"
OVERLAPS = "overlaps.csv"
_BYTES_PER_VOXEL = 24


@dataclass(frozen=True)
class ConvertedCase:
    """One case and how its files come about.

    Attributes:
        name: of the case.
        part: ``Tr`` or ``Ts``.
        images: steps whose targets are the channels, in order.
        label: step that writes the label map, or None.
        subject: for groups.csv, or None.
    """

    name: str
    part: str
    images: tuple[Step, ...]
    label: Step | None
    subject: str | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them, images first."""
        return self.images if self.label is None else (*self.images, self.label)


@dataclass(frozen=True)
class Layout:
    """A dataset in somebody else's layout, understood.

    Attributes:
        format: name of the subcommand.
        title: of the dataset.
        channels: names of the channels.
        labels: name -> value of each foreground class.
        ending: of the files that are written.
        cases: all of them.
        options: that led to this; another conversion into the same folder must have the same.
        extra: further entries of dataset.json.
        note: what was chosen, for the user.
    """

    format: str
    title: str
    channels: tuple[str, ...]
    labels: Mapping[str, int]
    ending: str
    cases: tuple[ConvertedCase, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Conversion:
    """What a conversion left behind.

    Attributes:
        folder: the raw dataset.
        training, test: numbers of cases.
        converted: cases of which something was written now.
        overlaps: voxels that several masks claimed, in all cases.
    """

    folder: Path
    training: int
    test: int
    converted: int
    overlaps: int = 0


def image_target(folder: Path, part: str, name: str, channel: int, ending: str) -> Path:
    """Where a channel goes."""
    return folder / f"images{part}" / f"{name}_{channel:04d}{ending}"


def label_target(folder: Path, part: str, name: str, ending: str) -> Path:
    """Where a label map goes."""
    return folder / f"labels{part}" / f"{name}{ending}"


def run_conversion(
    layout: Layout, source: Path, folder: Path, link: bool = False, workers: int | None = None
) -> Conversion:
    """Write ``folder`` as the layout says. Cases that are there, and not older than their sources, are skipped.

    Args:
        layout: of the source.
        source: its folder, for the mark.
        folder: ``raw/DatasetXXX_Name``.
        link: symbolic links for files that need no change.
        workers: processes; None chooses.

    Raises:
        ConfigError: the folder belongs to something else.
        DatasetError: files that cannot be read, images and labels on different grids; all cases in one message.
    """
    check_names([case.name for case in layout.cases], source)
    mark = {"format": layout.format, "source": str(Path(source).resolve()), "options": dict(layout.options)}
    claim(folder, mark, [case.name for case in layout.cases], layout.ending)
    jobs = [_Job(case, link) for case in layout.cases]
    largest = largest_voxels([case.images[0].sources[0] for case in layout.cases])
    count = choose_workers(workers, len(jobs), largest * _BYTES_PER_VOXEL / 2**30)
    outcomes = map_cases(_convert, jobs, count, f"converting {layout.format}")
    problems = [problem for _, problem in outcomes if problem]
    if problems:
        raise DatasetError(summarise_problems(problems))
    overlaps = _write_overlaps(folder, layout)
    subjects = {case.name: case.subject for case in layout.cases if case.part == TRAINING and case.subject}
    if subjects:
        write_groups(folder, subjects)
    training = sum(case.part == TRAINING for case in layout.cases)
    describe(folder, layout.title, layout.channels, layout.labels, training, layout.ending, **layout.extra)
    written = sum(written for written, _ in outcomes)
    return Conversion(folder, training, len(layout.cases) - training, written, overlaps)


@dataclass(frozen=True)
class _Job:
    """One case to convert."""

    case: ConvertedCase
    link: bool


def _convert(job: _Job) -> tuple[bool, str]:
    """(whether anything was written, what is wrong with the case)."""
    written = False
    try:
        for step in job.case.steps:
            if not _is_current(step, job.link):
                step.run(job.link)
                written = True
        files = [path for step in job.case.images for path in step.targets]
        if job.case.label is not None:
            files.append(job.case.label.targets[0])
        geometry = read_geometry(files[0])
        for path in files[1:]:
            difference = geometry.difference(read_geometry(path), (files[0].name, path.name))
            if difference is not None:
                raise DatasetError(f"{difference}; resample it to the first image's grid, in the source")
    except DatasetError as error:
        return written, f"case {job.case.name}: {error}"
    return written, ""


def _is_current(step: Step, link: bool) -> bool:
    newest = max(path.stat().st_mtime for path in step.sources)
    return all(
        target.exists() and target.stat().st_mtime >= newest and (link or not target.is_symlink())
        for target in step.targets
    )


def _write_overlaps(folder: Path, layout: Layout) -> int:
    """overlaps.csv of the masks' records, where there are any; returns the voxels in all."""
    merged = [(case.name, case.label) for case in layout.cases if isinstance(case.label, MergeMasks)]
    if not merged:
        return 0
    rows, total = ["case,kept_by,lost_by,voxels"], 0
    for name, step in merged:
        for pair, voxels in read_json(step.record, "record of overlaps").items():
            rows.append(f"{name},{','.join(pair.split(' > '))},{voxels}")
            total += voxels
    write_text(folder / OVERLAPS, "\n".join(rows) + "\n")
    return total
