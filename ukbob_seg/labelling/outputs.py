"""The files of a labelled dataset: images, label maps, records, and how the labels are called."""

from __future__ import annotations

import csv
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ukbob_seg.benchmark.totalvibe import TOTALVIBE_LABELS
from ukbob_seg.dataset.spec import Case, DatasetSpec
from ukbob_seg.errors import ConfigError, DatasetError, UkbobError
from ukbob_seg.files import atomic_path, read_json

log = logging.getLogger(__name__)
RECORDS, HOW, TABLE = "labelling", "labelling.json", "labelling.csv"
_CLOCK_NS = 2 * 10**9  # file systems keep times of copies to two seconds at worst


def label_path(output: Path, case: Case, ending: str) -> Path:
    """Label map of a case."""
    return output / "labelsTr" / f"{case.name}{ending}"


def record_path(output: Path, name: str) -> Path:
    """Record of a case."""
    return output / RECORDS / f"{name}.json"


def image_stamps(case: Case) -> dict[str, list[int]]:
    """Size and time of every image of a case, by its name: what tells whether it has changed.

    Raises:
        DatasetError: one is gone.
    """
    try:
        stats = {path.name: path.stat() for path in case.images}
    except OSError as error:
        raise DatasetError(f"{error.filename} cannot be read: {error.strerror}") from error
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def is_finished(output: Path, case: Case, ending: str) -> bool:
    """Whether a case has its label map, of the images that it has now.

    The map is the last of a case's files and appears when it is complete. Records of earlier versions do not know the
    images.
    """
    if not label_path(output, case, ending).is_file():
        return False
    path = record_path(output, case.name)
    known = read_json(path, "record").get("images") if path.is_file() else None
    return known is None or known == image_stamps(case)


def place_images(case: Case, folder: Path, copy: bool) -> None:
    """Link the images of a case into a dataset, or copy them; the same ones that are there already are left.

    Raises:
        UkbobError: the file system knows no links; says to copy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for image in case.images:
        target = folder / image.name
        if _is_placed(image, target, copy):
            continue
        with atomic_path(target) as temporary:
            if copy:
                shutil.copyfile(image, temporary)
                stat = image.stat()
                os.utime(temporary, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # by which the copy is known again
                continue
            try:
                temporary.symlink_to(image.resolve())
            except OSError as error:
                raise UkbobError(f"cannot link {image} into {folder} ({error}); copy the images with --copy") from error


def _is_placed(image: Path, target: Path, copy: bool) -> bool:
    """Whether a target is a link to an image, where links will do, or a copy of it."""
    if target.is_symlink():
        return not copy and target.is_file() and target.resolve() == image.resolve()
    if not target.is_file():
        return False
    there, here = target.stat(), image.stat()
    return there.st_size == here.st_size and abs(there.st_mtime_ns - here.st_mtime_ns) <= _CLOCK_NS


def remove_case(output: Path, case: Case, ending: str, images: bool) -> None:
    """Remove the label map of a case, which comes first, its record, and what stands for its images if asked."""
    label_path(output, case, ending).unlink(missing_ok=True)
    record_path(output, case.name).unlink(missing_ok=True)
    if images:
        for image in case.images:
            (output / "imagesTr" / image.name).unlink(missing_ok=True)


def write_table(output: Path, names: Iterable[str]) -> dict[str, str]:
    """The records of these cases, as far as there are any, as ``labelling.csv``; problems and warnings first.

    Returns:
        What is wrong with each case that could not be labelled.
    """
    paths = [path for name in names if (path := record_path(output, name)).is_file()]
    records = [read_json(path, "record") for path in paths]
    records.sort(key=lambda record: ("problem" not in record, not record.get("warnings"), record["case"]))
    with atomic_path(output / TABLE) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "orientation", "labels", "labelled_voxels", "warnings", "problem"])
        for record in records:
            row = [record.get(key, "") for key in ("case", "orientation", "labels", "labelled_voxels")]
            writer.writerow([*row, "; ".join(record.get("warnings", [])), record.get("problem", "")])
    return {record["case"]: record["problem"] for record in records if "problem" in record}


def label_names(spec: DatasetSpec, choice: str) -> dict[str, Any]:
    """``labels`` of dataset.json: the model's own without the ignore label, or TotalVibeSegmentator's.

    Raises:
        ConfigError: TotalVibeSegmentator's names for a model of other values.
    """
    own = {name: value for name, value in spec.content["labels"].items() if name.lower() != "ignore"}
    values = set(spec.labels.values)
    theirs = set(TOTALVIBE_LABELS.values())
    fits = not spec.labels.has_regions and values <= theirs and max(values) == max(theirs)
    if choice == "totalvibe" and not fits:
        raise ConfigError(
            f"--names totalvibe: the model has the label values {min(values)} to {max(values)}, TotalVibeSegmentator "
            f"{min(theirs)} to {max(theirs)}"
        )
    names = set(spec.labels.names)
    known = names <= set(TOTALVIBE_LABELS) or all(name.isdigit() for name in names) or "vibe" in spec.name.lower()
    if choice == "totalvibe" or (choice == "auto" and fits and known):
        if choice == "auto" and names != set(TOTALVIBE_LABELS):
            log.info(
                "the model has the label values of TotalVibeSegmentator, whose names are used (--names model: not)"
            )
        return {"background": 0, **TOTALVIBE_LABELS}
    return own
