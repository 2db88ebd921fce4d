"""UK Biobank's Dixon archives (field 20201) to a raw dataset: in parallel, resumable, with a table of every station."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ukbob_seg.conversion.archives import find_archives, subject_of
from ukbob_seg.conversion.dicom_files import load_pydicom
from ukbob_seg.conversion.dixon import CONTRASTS
from ukbob_seg.conversion.swaps import DOUBTFUL
from ukbob_seg.conversion.target import claim, describe, write_groups
from ukbob_seg.conversion.ukbb_case import StitchedCase, StitchOptions, stitch_archive
from ukbob_seg.conversion.usual import add_usual_slices, unusual_stations
from ukbob_seg.dataset.image_io import write_image
from ukbob_seg.dataset.spec import summarise_problems
from ukbob_seg.errors import DatasetError
from ukbob_seg.files import atomic_path, read_json, write_json
from ukbob_seg.parallel import HERE, Cluster, choose_workers, map_cases

if TYPE_CHECKING:
    import pandas as pd

ENDING = ".nii.gz"
_MANY = 1000  # cases whose records take long enough to read for a bar
METHOD = 2  # of records; a record of another way to stitch is done again
_MEMORY_GB = 2.0  # one archive of the real matrix, 224 x 174 x 370 x 4 voxels when stitched, takes 1.5 at its peak


@dataclass(frozen=True)
class CohortOptions:
    """What to do with a folder of archives.

    Attributes:
        stitch: how each is stitched.
        test: write to imagesTs, for prediction, instead of imagesTr.
        skip_incomplete: leave out incomplete archives instead of stopping at the end.
        workers: processes; None chooses.
        cluster: scheduler and part.
    """

    stitch: StitchOptions = field(default_factory=StitchOptions)
    test: bool = False
    skip_incomplete: bool = False
    workers: int | None = None
    cluster: Cluster = HERE


@dataclass(frozen=True)
class CohortConversion:
    """What a conversion left behind.

    Attributes:
        folder: the dataset.
        converted: archives that were read now.
        kept: archives whose result was there already.
        complete: cases that the dataset has.
        incomplete: (archive, problem), one for each archive that was left out.
        swapped: stations found exchanged.
        doubtful: stations whose decision has little support.
        unusual: (case, its stations that have another number of slices than most archives); empty for a part.
    """

    folder: Path
    converted: int
    kept: int
    complete: int
    incomplete: tuple[tuple[str, str], ...]
    swapped: int
    doubtful: int
    unusual: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class _Job:
    """One archive."""

    name: str
    source: Path
    folder: Path
    images: str
    options: StitchOptions

    @property
    def record(self) -> Path:
        return self.folder / "records" / f"{self.name}.json"

    def files(self) -> list[Path]:
        return [self.folder / self.images / f"{self.name}_{k:04d}{ENDING}" for k in range(len(CONTRASTS))]

    def stamp(self) -> dict[str, Any]:
        """What the record must say to be of this archive and these options."""
        paths = [self.source] if self.source.is_file() else sorted(p for p in self.source.rglob("*") if p.is_file())
        stats = [path.stat() for path in paths]
        return {
            "method": METHOD,
            "archive": self.source.name,
            "bytes": sum(stat.st_size for stat in stats),
            "changed_ns": max((stat.st_mtime_ns for stat in stats), default=0),
            "options": self.options.to_json(),
        }

    def earlier(self) -> dict[str, Any] | None:
        """The record, where it is of this very archive and its images are there."""
        if not self.record.is_file():
            return None
        try:
            record = read_json(self.record, "record")
        except DatasetError:
            return None
        if record.get("stamp") != self.stamp():
            return None
        return record if record["problems"] or all(path.is_file() for path in self.files()) else None


def convert_cohort(source: Path, folder: Path, options: CohortOptions | None = None) -> CohortConversion:
    """Stitch every archive of a folder into ``folder/imagesTr/CASE_0000.nii.gz`` to ``_0003``, and write the tables.

    stations.csv has a row for each station, conversion.parquet one for each archive, groups.csv the subject of each
    case. What is there already, of the same archive with the same options, is kept. With a part, only its archives are
    done; the tables and dataset.json are written by the run without one.

    Args:
        source: folder of archives, or one.
        folder: ``raw/DatasetXXX_Name``.
        options: of the conversion.

    Raises:
        ConfigError: pydicom is missing, or the folder is something else's.
        DatasetError: no archives; or some are incomplete and not to be skipped (all are listed; others are kept).
    """
    options = options or CohortOptions()
    load_pydicom()
    archives = find_archives(Path(source))
    chosen = {**options.stitch.to_json(), "test": options.test}
    mark = {"format": "ukbb", "source": str(Path(source).resolve()), "options": chosen}
    folder = claim(Path(folder), mark, list(archives), ENDING)
    images = "imagesTs" if options.test else "imagesTr"
    jobs = [_Job(name, path, folder, images, options.stitch) for name, path in archives.items()]
    mine = options.cluster.share(jobs)
    workers = choose_workers(options.workers, len(mine), _MEMORY_GB)
    done = map_cases(_convert, mine, workers, "stitching", scheduler=options.cluster.scheduler)
    collected = tqdm(mine, "collecting", leave=False, disable=len(mine) < _MANY)  # without a part these are all
    records = [read_json(job.record, "record") for job in collected]
    problems = [(record["stamp"]["archive"], "; ".join(record["problems"])) for record in records if record["problems"]]
    unusual: dict[str, list[int]] = {}
    if options.cluster.part is None:
        unusual = _write_tables(folder, jobs, records)
    if problems and (not options.skip_incomplete or len(problems) == len(records)):
        said = [f"{name}: {problem}" for name, problem in problems]
        remedy = "download these again, or leave them out with --skip-incomplete; complete archives are converted"
        raise DatasetError(summarise_problems(said, heading=f"{len(said)} archives are incomplete; {remedy}"))
    if options.cluster.part is None:
        training = 0 if options.test else len(records) - len(problems)
        describe(folder, "UK Biobank Dixon", CONTRASTS, {}, training, ENDING)
    stations = [row for record in records if not record["problems"] for row in record["stations"]]
    return CohortConversion(
        folder,
        sum(done),
        len(mine) - sum(done),
        len(records) - len(problems),
        tuple(problems),
        sum(bool(row["swapped"]) for row in stations),
        sum(row["swap_confidence"] < DOUBTFUL for row in stations),
        tuple((case, tuple(numbers)) for case, numbers in unusual.items()),
    )


def _convert(job: _Job) -> bool:
    """Do one archive; returns whether there was anything to do. The record is written last."""
    if job.earlier() is not None:
        return False
    stamp = job.stamp()
    job.record.unlink(missing_ok=True)
    stitched = stitch_archive(job.source, job.options)
    if stitched.image is not None and stitched.geometry is not None:
        for channel, path in zip(stitched.image, job.files(), strict=True):
            write_image(channel, stitched.geometry, path)
    else:
        for path in job.files():  # of an earlier, complete archive
            path.unlink(missing_ok=True)
    write_json(job.record, {"stamp": stamp, **_record(stitched)})
    return True


def _record(stitched: StitchedCase) -> dict[str, Any]:
    return {
        "problems": list(stitched.problems),
        "ignored": list(stitched.ignored),
        "shape": None if stitched.geometry is None else list(stitched.geometry.shape),
        "spacing_mm": None if stitched.geometry is None else list(stitched.geometry.spacing_mm),
        "stations": list(stitched.stations),
    }


def _write_tables(folder: Path, jobs: Sequence[_Job], records: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """stations.csv, incomplete.csv, conversion.parquet, groups.csv; returns stations with unusual numbers of slices."""
    import pandas as pd

    pairs = list(zip(jobs, records, strict=True))
    stations = pd.DataFrame([{"case": job.name, **row} for job, record in pairs for row in record["stations"]])
    stations = add_usual_slices(stations)
    unusual = unusual_stations(stations)
    cases = pd.DataFrame([_case_row(job, record, unusual.get(job.name, [])) for job, record in pairs])
    _write(folder / "stations.csv", stations)
    _write(folder / "incomplete.csv", cases.loc[cases["problems"] != "", ["case", "archive", "problems"]])
    with atomic_path(folder / "conversion.parquet") as temporary:
        cases.to_parquet(temporary, index=False)
    write_groups(folder, {job.name: subject_of(job.name) for job, record in pairs if not record["problems"]})
    return unusual


def _write(path: Path, table: pd.DataFrame) -> None:
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)


def _case_row(job: _Job, record: dict[str, Any], unusual: Sequence[int]) -> dict[str, Any]:
    shape, spacing = record["shape"] or (np.nan,) * 3, record["spacing_mm"] or (np.nan,) * 3
    swapped = [str(row["station"]) for row in record["stations"] if row.get("swapped")]
    return {
        "case": job.name,
        "subject": subject_of(job.name),
        "archive": record["stamp"]["archive"],
        "complete": not record["problems"],
        "problems": "; ".join(record["problems"]),
        "ignored_series": "; ".join(record["ignored"]),
        "stations": len(record["stations"]),
        "unusual_stations": " ".join(str(number) for number in unusual),
        "swapped_stations": " ".join(swapped),
        "repaired": any(row.get("repaired") for row in record["stations"]),
        **{f"voxels_{axis}": value for axis, value in zip("zyx", shape, strict=True)},
        **{f"spacing_{axis}_mm": value for axis, value in zip("zyx", spacing, strict=True)},
    }
