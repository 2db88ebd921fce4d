"""The files of a labelled dataset: images, label maps, records, and how the labels are called."""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ukbob_seg.benchmark.totalvibe import TOTALVIBE_LABELS
from ukbob_seg.dataset.spec import Case, DatasetSpec
from ukbob_seg.errors import ConfigError, UkbobError
from ukbob_seg.files import atomic_path, read_json

log = logging.getLogger(__name__)
RECORDS, HOW, TABLE = "labelling", "labelling.json", "labelling.csv"


def label_path(output: Path, case: Case, ending: str) -> Path:
    """Label map of a case."""
    return output / "labelsTr" / f"{case.name}{ending}"


def is_finished(output: Path, case: Case, ending: str) -> bool:
    """Whether a case has its label map; it is the last of its files and appears when it is complete."""
    return label_path(output, case, ending).is_file()


def place_images(case: Case, folder: Path, copy: bool) -> None:
    """Link the images of a case into a dataset, or copy them; what is there already is left.

    Raises:
        UkbobError: the file system knows no links; says to copy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for image in case.images:
        target = folder / image.name
        if target.is_file():
            continue
        target.unlink(missing_ok=True)  # a link to nowhere
        with atomic_path(target) as temporary:
            if copy:
                shutil.copyfile(image, temporary)
                continue
            try:
                temporary.symlink_to(image.resolve())
            except OSError as error:
                raise UkbobError(f"cannot link {image} into {folder} ({error}); copy the images with --copy") from error


def write_table(output: Path) -> None:
    """All records that are there as ``labelling.csv``; the warnings first."""
    records = [read_json(path, "record") for path in sorted((output / RECORDS).glob("[!.]*.json"))]
    records = [record for record in records if "warnings" in record]
    records.sort(key=lambda record: (not record["warnings"], record["case"]))
    with atomic_path(output / TABLE) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "orientation", "labels", "labelled_voxels", "warnings"])
        for record in records:
            row = [record[key] for key in ("case", "orientation", "labels", "labelled_voxels")]
            writer.writerow([*row, "; ".join(record["warnings"])])


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


def difference(output: Path, record: Mapping[str, Any]) -> str | None:
    """In what way the labels that are there were made that these are not; None for none."""
    path = output / HOW
    if not path.is_file():
        return "there is no record of how" if any((output / "labelsTr").glob("[!.]*")) else None
    before = read_json(path, "record of the labelling")
    changed = [key for key in record if not isinstance(before, dict) or before.get(key) != record[key]]
    return f"other {', '.join(changed)}" if changed else None
