"""Which archives a folder holds, at any depth: zip files, or folders of DICOM files; each is a case."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ukbob_seg.conversion.dicom_files import holds_dicom
from ukbob_seg.conversion.target import check_names
from ukbob_seg.errors import DatasetError

log = logging.getLogger(__name__)

FIELD = "20201"
_NAME = re.compile(r"(?P<subject>\d+)_(?P<field>\d+)_(?P<instance>\d+)_(?P<array>\d+)")


def subject_of(name: str) -> str:
    """The participant of an archive's name; two visits are one subject."""
    match = _NAME.fullmatch(name)
    return match["subject"] if match is not None else name


def find_archives(source: Path) -> dict[str, Path]:
    """Archives by the name of their case, sorted: zip files of field 20201 (or of any other form of name) and folders
    of DICOM files, at any depth, as UK Biobank's platform sorts them into ``10/1000016_20201_2_0.zip``.

    A folder is an archive where it is named like one, or holds DICOM files (at any depth) and no archives; of such
    folders in each other the outermost one. The source itself is one where DICOM files lie in it. Archives of other
    fields, and folders without DICOM files, are passed over.

    Raises:
        DatasetError: none is there, or two have one name.
    """
    if source.is_file():
        found = [source]
    elif source.is_dir():
        found = _search(source, set()) or ([source] if holds_dicom(_visible(source)) else [])
    else:
        raise DatasetError(f"{source} does not exist; give a folder of archives such as 1234567_{FIELD}_2_0.zip")
    named = [(path.resolve().name if path.is_dir() else path.stem, path) for path in found]
    other = [path for name, path in named if (match := _NAME.fullmatch(name)) and match["field"] != FIELD]
    if other:
        log.warning("%d archives of other fields are passed over, such as %s", len(other), other[0].name)
    passed = set(other)
    named = [(name, path) for name, path in named if path not in passed]
    if not named:
        raise DatasetError(f"no archives in {source}: expected files like 1234567_{FIELD}_2_0.zip")
    _refuse_twins(named, source)
    check_names([name for name, _ in named], source)
    return dict(sorted(named))


def _refuse_twins(named: list[tuple[str, Path]], source: Path) -> None:
    first: dict[str, Path] = {}
    for name, path in named:
        earlier = first.setdefault(name.casefold(), path)
        if earlier is not path:
            raise DatasetError(
                f"{source} has two archives of the case {name}: {earlier.relative_to(source)} and "
                f"{path.relative_to(source)}; move one of them elsewhere"
            )


def _visible(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def _search(folder: Path, seen: set[Path]) -> list[Path]:
    """Archives in a folder."""
    archives, scans, passed = _look(folder, seen)
    found = archives + scans
    if found and holds_dicom(_visible(folder)):
        log.warning("DICOM files in %s itself are passed over, for there are archives in it", folder)
    if passed:
        log.warning("%d folders without DICOM files are passed over, such as %s", len(passed), passed[0])
    return found


def _look(folder: Path, seen: set[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """(archives, folders that are some if nothing around them is, folders with nothing in them)."""
    archives: list[Path] = []
    scans: list[Path] = []
    passed: list[Path] = []
    if folder.resolve() in seen:  # a link that leads back
        return archives, scans, passed
    seen.add(folder.resolve())
    for path in _visible(folder):
        if path.is_file():
            archives += [path] if path.suffix.lower() == ".zip" else []
            continue
        if not path.is_dir():
            continue
        inner, parts, empty = _look(path, seen)
        if inner:
            archives += inner + parts
            passed += empty
        elif _NAME.fullmatch(path.name):
            archives.append(path)
        elif parts or holds_dicom(_visible(path)):
            scans.append(path)
        else:
            passed.append(path)
    return archives, scans, passed
