"""The raw dataset that a conversion writes: its folder is claimed first, its dataset.json comes last."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ukbob_seg.dataset.paths import list_datasets
from ukbob_seg.errors import ConfigError, DatasetError, listing
from ukbob_seg.files import read_json, write_json, write_text

MARKER = "conversion.json"
_NAME = re.compile(r"Dataset(\d{3,})_(.+)")
_CASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def has_free_number(folder: Path) -> bool:
    """Whether a folder is named DatasetXXX_Name at all.

    Raises:
        ConfigError: it is, and another dataset beside it has that number.
    """
    match = _NAME.fullmatch(folder.name)
    if match is None:
        return False
    if folder.parent.is_dir():
        other = list_datasets(folder.parent).get(int(match[1]))
        if other is not None and other.name != folder.name:
            raise ConfigError(f"number {int(match[1])} belongs to {other}; choose another one for {folder.name}")
    return True


def claim(folder: Path, mark: Mapping[str, Any], known: Sequence[str], ending: str) -> Path:
    """Make the dataset's folder, or recognise it as begun earlier by the same conversion.

    Args:
        folder: ``.../DatasetXXX_Name``.
        mark: of this conversion: format, source and options; kept in conversion.json.
        known: names of all cases, to notice files of others.
        ending: of image files.

    Raises:
        ConfigError: another form of name, a number that another dataset has, or a folder of something else.
        DatasetError: the folder holds cases that the source does not have.
    """
    if not has_free_number(folder):
        raise ConfigError(f"-o must end in DatasetXXX_Name, such as ukbob_data/raw/Dataset020_Dixon, got {folder}")
    mark = dict(mark)
    if folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
        earlier = read_json(folder / MARKER, "mark") if (folder / MARKER).is_file() else None
        if earlier != mark:
            what = f"of {_difference(earlier, mark)}" if isinstance(earlier, dict) else "not made by this command"
            raise ConfigError(f"{folder} is there and {what}; give another folder with -o, or delete this one")
    names = set(known)
    strangers = [
        str(path.relative_to(folder))
        for path in sorted(folder.glob(f"images??/*{ending}"))
        if path.name[0] != "." and path.name.removesuffix(ending).rpartition("_")[0] not in names
    ]
    if strangers:
        raise DatasetError(f"{folder} holds cases that the source does not have; delete them: {listing(strangers)}")
    write_json(folder / MARKER, mark)  # also proves that the folder can be written; parts of one job may do it at once
    return folder


def _difference(earlier: Mapping[str, Any], mark: Mapping[str, Any]) -> str:
    key = next(key for key in sorted({*earlier, *mark}) if earlier.get(key) != mark.get(key))
    return f"another {key}: {earlier.get(key)}, now {mark.get(key)}"


def check_names(names: Sequence[str], source: Path) -> None:
    """Refuse case names that make no portable file names, or that are there twice.

    Raises:
        DatasetError: such a name.
    """
    for name in names:
        if _CASE.fullmatch(name) is None:
            raise DatasetError(f"{source}: {name!r} cannot be the name of a case; use letters, digits, . _ + and -")
    lowered = [name.lower() for name in names]
    twice = (
        sorted({name for name in names if lowered.count(name.lower()) > 1}) if len(set(lowered)) < len(names) else []
    )
    if twice:
        raise DatasetError(f"{source} has several cases named {listing(twice)}; rename all but one")


def describe(
    folder: Path,
    title: str,
    channels: Sequence[str],
    labels: Mapping[str, int],
    training: int,
    ending: str,
    **extra: Any,
) -> None:
    """Write dataset.json, without which no command takes the folder for a dataset."""
    content = {
        "name": title,
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": {"background": 0, **labels},
        "numTraining": training,
        "file_ending": ending,
        **extra,
    }
    write_json(folder / "dataset.json", content)


def write_groups(folder: Path, subjects: Mapping[str, str]) -> None:
    """Write groups.csv: the subject of each case."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([("case", "subject"), *sorted(subjects.items())])
    write_text(folder / "groups.csv", buffer.getvalue())
