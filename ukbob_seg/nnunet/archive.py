"""Model archives (zip) from elsewhere: checked as a whole before anything is written, unpacked once and only as needed.

An archive is refused for what no export of a model has: names that lead out of its folder, links, encryption, one name
twice, and sizes or compression that only fill a disk ("bombs").
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ukbob_seg.errors import CheckpointError
from ukbob_seg.zips import is_encrypted, is_special, leads_out, repeated_name

ArchiveKey = tuple[str, int, int]  # path, size and time: a changed archive is another one
_UNPACKED: dict[ArchiveKey, tempfile.TemporaryDirectory[str]] = {}  # the folders vanish with the process
_SHARED: dict[ArchiveKey, Path] = {}  # folders of the process that started this one, and outlives it
_UNPACKING = threading.RLock()


@dataclass(frozen=True)
class ArchiveLimits:
    """What an archive may hold.

    Attributes:
        entries: files and folders.
        total_bytes: of all files, unpacked.
        ratio: unpacked / packed bytes of one file; float32 weights reach 1.1, JSON of many numbers 20.
        small_bytes: files below this may be packed at any ratio.
    """

    entries: int = 100_000
    total_bytes: int = 64 * 2**30
    ratio: float = 200.0
    small_bytes: int = 2**20


LIMITS = ArchiveLimits()


def split_archive_path(path: Path) -> tuple[Path, str] | None:
    """``model.zip/inner/folder`` as the archive and the folder in it (``""`` for the archive itself).

    None where no part of the path is a file that ends in .zip.
    """
    for candidate in (path, *path.parents):
        if candidate.suffix.lower() == ".zip" and candidate.is_file():
            inner = path.relative_to(candidate).as_posix()
            return candidate, "" if inner == "." else inner
    return None


def check_archive(path: Path, limits: ArchiveLimits = LIMITS) -> list[zipfile.ZipInfo]:
    """The files in an archive, if all of its entries are harmless by its directory.

    What an entry really unpacks to cannot exceed its entry in the directory: reading stops there.

    Raises:
        CheckpointError: no zip archive, or a hostile one; names the entry.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is not a zip archive, or is damaged ({error}); copy it again") from error
    refused = f"archive {path} was not unpacked"
    if len(entries) > limits.entries:
        raise CheckpointError(f"{refused}: it has {len(entries)} entries, at most {limits.entries} are allowed")
    for entry in entries:
        if (reason := _entry_problem(entry, limits)) is not None:
            raise CheckpointError(
                f"{refused}: entry {entry.filename[:200]!r}: {reason}; get it from a source you trust"
            )
    if (twice := repeated_name(entries)) is not None:
        raise CheckpointError(
            f"{refused}: entry {twice[:200]!r}: its name occurs twice; get it from a source you trust"
        )
    total = sum(entry.file_size for entry in entries)
    if total > limits.total_bytes:
        raise CheckpointError(
            f"{refused}: it would take {total / 2**30:.1f} GB of disk, at most {limits.total_bytes / 2**30:.1f} are "
            "allowed"
        )
    return [entry for entry in entries if not entry.is_dir()]


def _entry_problem(entry: zipfile.ZipInfo, limits: ArchiveLimits) -> str | None:
    """Why an entry must not be unpacked, or None."""
    # zipfile replaces the other separator and cuts at a NUL byte; the name as stored is what an attacker wrote.
    name = entry.orig_filename
    if "\\" in name or "\0" in name or not name.strip("/"):
        return "its name has a backslash or a NUL byte, or is empty"
    if leads_out(name):
        return "its name is absolute or leads out of the folder"
    if is_special(entry):
        return "it is a link or a device"
    if is_encrypted(entry):
        return "it is encrypted"
    if entry.file_size > limits.small_bytes and entry.file_size > limits.ratio * max(entry.compress_size, 1):
        times = entry.file_size / max(entry.compress_size, 1)
        return f"it unpacks to {times:.0f} times its size, at most {limits.ratio:.0f} are allowed"
    return None


def unpack(path: Path, entries: Iterable[zipfile.ZipInfo]) -> Path:
    """Write entries of a checked archive into a temporary folder that lives as long as the process.

    An archive has one folder, in which an entry is written once; a changed archive has another.

    Raises:
        CheckpointError: the archive is damaged or gone, or the disk is full.
    """
    with _UNPACKING:
        try:
            folder = _folder_of(path)
            lacking = [(entry, target) for entry in entries if not (target := _place(folder, entry)).is_file()]
            if lacking:
                with zipfile.ZipFile(path) as archive:
                    for entry, target in lacking:
                        _write(archive, entry, target)
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            raise CheckpointError(
                f"archive {path} cannot be unpacked ({error}); copy it again, and make room in {tempfile.gettempdir()}"
            ) from error
        except zipfile.zlib.error as error:  # type: ignore[attr-defined]
            raise CheckpointError(f"archive {path} is damaged ({error}); copy it again") from error
        return folder


def unpacked_folders() -> dict[ArchiveKey, str]:
    """Folders of this process's archives, for ``share_unpacked`` in processes that it starts."""
    with _UNPACKING:
        return {key: folder.name for key, folder in _UNPACKED.items()}


def share_unpacked(folders: Mapping[ArchiveKey, str]) -> None:
    """Use what another process, which outlives the work, has unpacked; folders that are not here are passed over."""
    with _UNPACKING:
        _SHARED.update({key: Path(folder) for key, folder in folders.items() if key not in _UNPACKED})


def _folder_of(path: Path) -> Path:
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if key in _SHARED and _SHARED[key].is_dir():  # on another machine, or when that process has ended, it is not there
        return _SHARED[key]
    if key not in _UNPACKED:
        _UNPACKED[key] = tempfile.TemporaryDirectory(prefix="ukbob_model_", ignore_cleanup_errors=True)
    return Path(_UNPACKED[key].name)


def _place(folder: Path, entry: zipfile.ZipInfo) -> Path:
    return folder.joinpath(*entry.filename.split("/"))


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """Whole or not at all: another process may use the same folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{os.getpid()}-{secrets.token_hex(4)}-{target.name}")
    try:
        with archive.open(entry) as source, open(temporary, "wb") as sink:
            shutil.copyfileobj(source, sink, 2**20)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
