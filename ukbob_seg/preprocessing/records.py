"""The record that completes a preprocessed case: what it was made from, and how to tell whether it is still whole."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ukbob_seg.dataset.spec import Case
from ukbob_seg.errors import DatasetError
from ukbob_seg.files import digest, json_text, read_json, write_json
from ukbob_seg.preprocessing.fingerprint_cases import file_stamps

try:  # several times as fast, where it is available
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

_BLOCK_BYTES = 2**22
SEAL = "digest"


def case_files(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """Image, label and class-location files of a preprocessed case."""
    return folder / f"{name}.b2nd", folder / f"{name}_labels.b2nd", folder / f"{name}_locations.npz"


def record_path(folder: Path, name: str) -> Path:
    """The record of a preprocessed case."""
    return folder / f"{name}.json"


def write_record(folder: Path, name: str, key: str, recipe: str, content: dict[str, Any]) -> None:
    """Write the record of a case whose files are complete. A case without it, or with other files, is done again.

    Args:
        folder: of the configuration.
        name: of the case.
        key: from ``case_key``.
        recipe: hash of what decides the arrays.
        content: further entries.
    """
    files = {path.name: _describe(path) for path in case_files(folder, name)}
    _write(record_path(folder, name), {"key": key, "recipe": recipe, "files": files, **content})


def case_key(recipe: str, stamps: Sequence[Any]) -> str:
    """Hash of the recipe and of the raw files (``file_stamps``, taken before they are read)."""
    return digest([recipe, stamps])


def is_current(folder: Path, case: Case, recipe: str) -> bool | None:
    """Whether a case was preprocessed from these files by this recipe, as far as sizes and times tell.

    Returns:
        True, False, or None when all fits but a file was written to since: then ``is_intact`` must look inside.
    """
    try:
        record = read_json(record_path(folder, case.name))
        if record[SEAL] != _seal(record) or record["key"] != case_key(recipe, file_stamps(case)):
            return False
        stats = {name: (folder / name).stat() for name in record["files"]}
        if any(stats[name].st_size != entry["bytes"] for name, entry in record["files"].items()):
            return False
        return all(stats[n].st_mtime_ns == e["mtime_ns"] for n, e in record["files"].items()) or None
    except (DatasetError, OSError, KeyError, TypeError):
        return False


def is_intact(folder: Path, case: Case, recipe: str) -> bool:
    """Whether a preprocessed case is current and every byte of its files is what was written.

    The times of files that are whole are noted, so that they need not be looked at again (after a copy, say).
    """
    known = is_current(folder, case, recipe)
    if known is False:
        return False
    path = record_path(folder, case.name)
    try:
        record = read_json(path)
        found = {name: _describe(folder / name) for name in record["files"]}
        if any(found[name]["crc32"] != entry["crc32"] for name, entry in record["files"].items()):
            return False
    except (DatasetError, OSError, KeyError, TypeError):
        return False
    if found != record["files"]:
        _write(path, {**record, "files": found})
    return True


def _write(path: Path, record: dict[str, Any]) -> None:
    write_json(path, {**record, SEAL: _seal(record)}, indent=None)


def _seal(record: dict[str, Any]) -> str:
    """Hash of all other entries as they are read back, so that a changed byte of the record itself shows."""
    return digest(json.loads(json_text({key: value for key, value in record.items() if key != SEAL})))


def load_record(folder: Path, name: str) -> dict[str, Any]:
    """The record that completes a preprocessed case.

    Raises:
        DatasetError: the case was not preprocessed.
    """
    path = record_path(folder, name)
    if not path.is_file():
        raise DatasetError(f"case {name} is not preprocessed in {folder}; run ukbob_preprocess")
    record = read_json(path, "preprocessing record")
    lost = [file for file in record.get("files", {"?": 0}) if not (folder / file).is_file()]
    if lost:
        raise DatasetError(f"case {name}: {', '.join(lost)} is missing in {folder}; run ukbob_preprocess again")
    return dict(record)


def _describe(path: Path) -> dict[str, int]:
    """Size, time and checksum of a file."""
    total = 0
    with open(path, "rb", buffering=0) as file:
        stat = os.fstat(file.fileno())
        while block := file.read(min(stat.st_size, _BLOCK_BYTES)):
            total = crc32(block, total)
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "crc32": total}
