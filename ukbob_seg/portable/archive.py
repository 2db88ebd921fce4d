"""The zip file that a model travels in: written with the checksum of every member, and read only if all is as it says.

Members are JSON, Markdown, safetensors and ONNX: nothing in it is unpickled or run. Refused in one sentence, before
anything is unpacked, are names that lead out of a folder, links, encrypted members, archives that unpack to far more
than their size, members that are missing, not announced or changed, and formats of a later version.
"""

from __future__ import annotations

import hashlib
import json
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from ukbob_seg import __version__
from ukbob_seg.errors import CheckpointError, listing
from ukbob_seg.files import json_text
from ukbob_seg.zips import MANIFEST, MODEL_FORMAT, is_encrypted, is_special, repeated_name

FORMAT_VERSION = 1
MOST_MEMBERS = 2_000
MOST_TEXT = 64 * 2**20  # bytes of a JSON or Markdown member
MOST_GROWTH = 4  # unpacked size / size of the archive: weights, which are most of it, are stored as they are
ALLOWANCE = 64 * 2**20  # bytes that small archives of much text may grow by beyond that
TEXT = (".json", ".md")
EARLIEST = (1980, 1, 1, 0, 0, 0)  # the same model gives the same bytes, whenever it is exported
CHUNK = 2**20
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError)


class ArchiveWriter:
    """Puts members into a zip file, and at the end the manifest that lists them.

    Args:
        file: to write; the caller gives it its final name when all is done.
    """

    def __init__(self, file: Path) -> None:
        self._zip = zipfile.ZipFile(file, "w")
        self._members: dict[str, dict[str, Any]] = {}

    def add(self, name: str, content: bytes) -> None:
        """One member; texts are compressed, weights would not get smaller."""
        kind = zipfile.ZIP_DEFLATED if name.endswith(TEXT) else zipfile.ZIP_STORED
        entry = zipfile.ZipInfo(name, EARLIEST)
        entry.compress_type = kind
        entry.external_attr = (stat.S_IFREG | 0o644) << 16
        with self._zip.open(entry, "w", force_zip64=True) as member:
            member.write(content)
        self._members[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def add_json(self, name: str, content: Any) -> None:
        """One member, as JSON.

        Raises:
            TypeError, ValueError: something in it is no JSON value.
        """
        self.add(name, json_text(content).encode())

    def finish(self, description: Mapping[str, Any]) -> None:
        """Write the manifest, with what else it says, and close the file."""
        head = {"format": MODEL_FORMAT, "format_version": FORMAT_VERSION, "ukbob_seg": __version__}
        members = dict(self._members)
        self.add_json(MANIFEST, {**head, **description, "members": members})
        self._zip.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._zip.close()


class Archive:
    """A model's zip file, of which every member was checked. Made by ``open_archive``.

    Attributes:
        path: of the file, for messages.
        manifest: what it says of itself.
    """

    def __init__(self, path: Path, opened: zipfile.ZipFile, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._zip = opened

    @property
    def names(self) -> tuple[str, ...]:
        """Of all members but the manifest."""
        return tuple(self.manifest["members"])

    @property
    def maker(self) -> str:
        """Version of this package that wrote it."""
        return _maker(self.manifest)

    def read(self, name: str) -> bytes:
        """Content of a member.

        Raises:
            CheckpointError: there is none of that name, or it changed since the archive was made.
        """
        if name not in self.manifest["members"]:
            raise CheckpointError(f"{self.path} lacks {name}; {_AGAIN}")
        return b"".join(self._chunks(name))

    def read_json(self, name: str) -> Any:
        """A member of JSON; see ``read``."""
        return _parse(self.read(name), f"{name} in {self.path}")

    def check_all(self) -> None:
        """Compare every member with its checksum, a little at a time.

        Raises:
            CheckpointError: names the first that differs.
        """
        for name in self.names:
            for _ in self._chunks(name):
                pass

    def _chunks(self, name: str) -> Iterator[bytes]:
        """Content of a member, a little at a time; raises at the end where the checksum differs."""
        found = hashlib.sha256()
        try:
            with self._zip.open(name) as member:
                while chunk := member.read(CHUNK):
                    found.update(chunk)
                    yield chunk
        except _DAMAGED as error:
            raise CheckpointError(f"{self.path} is damaged: {name} cannot be unpacked ({error}); {_AGAIN}") from error
        if found.hexdigest() != self.manifest["members"][name]["sha256"]:
            raise CheckpointError(f"{self.path} is damaged: {name} has not the checksum of the manifest; {_AGAIN}")


_AGAIN = "get the file again, or export the model again"


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a model's zip file and check all of it; see the module.

    Raises:
        CheckpointError: says what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"model archive {path} does not exist, or is no file")
    try:
        opened = zipfile.ZipFile(path)
    except OSError as error:
        raise CheckpointError(f"model archive {path} cannot be read: {error.strerror or error}") from error
    except _DAMAGED as error:
        raise CheckpointError(f"{path} is no zip file, or a damaged one; give what ukbob_export_model wrote") from error
    with opened:
        entries = [entry for entry in opened.infolist() if not _is_folder(entry, path)]
        _check_entries(path, entries)
        archive = Archive(path, opened, _read_manifest(path, opened, entries))
        archive.check_all()
        yield archive


def is_safe_name(name: str) -> bool:
    """Whether a part of a path is a plain name on every system: no separator, drive or way up, nothing hidden."""
    return (
        0 < len(name) <= 200
        and name.isprintable()
        and not name.startswith(".")
        and not name.endswith((".", " "))
        and not set(name) & set('/\\:*?"<>|')
    )


def _is_folder(entry: zipfile.ZipInfo, path: Path) -> bool:
    """An entry for a folder alone, as other tools add when they pack anew; of no use here, but no harm."""
    if not entry.filename.endswith("/"):
        return False
    _check_name(path, entry.filename[:-1])
    if entry.file_size or is_special(entry):
        raise CheckpointError(f"{path} is refused: its member {entry.filename!r} is no folder, as its name says")
    return True


def _check_name(path: Path, name: str) -> None:
    if not all(is_safe_name(part) for part in name.split("/")):
        raise CheckpointError(f"{path} is refused: its member {name!r} would lie outside of the model's folder")


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """What the table of contents alone says.

    Raises:
        CheckpointError: the archive is dangerous.
    """
    if len(entries) > MOST_MEMBERS:
        raise CheckpointError(f"{path} is refused: it has {len(entries)} members, a model at most {MOST_MEMBERS}")
    for entry in entries:
        name = entry.filename
        _check_name(path, name)
        if is_special(entry):
            raise CheckpointError(f"{path} is refused: its member {name!r} is a link or another special file")
        if is_encrypted(entry):
            raise CheckpointError(f"{path} is refused: its member {name!r} is encrypted")
        if name.endswith(TEXT) and entry.file_size > MOST_TEXT:
            raise CheckpointError(
                f"{path} is refused: its member {name!r} unpacks to {entry.file_size:,} bytes of text"
            )
    if (twice := repeated_name(entries)) is not None:
        raise CheckpointError(f"{path} is refused: it has the member {twice!r} twice")
    unpacked, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if unpacked > MOST_GROWTH * size + ALLOWANCE:
        raise CheckpointError(f"{path} is refused: its {size:,} bytes unpack to {unpacked:,}, as no model's do")


def _read_manifest(path: Path, opened: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> dict[str, Any]:
    """The manifest, which lists exactly the members that are there.

    Raises:
        CheckpointError: none, of a later version, or it does not fit the members.
    """
    sizes = {entry.filename: entry.file_size for entry in entries}
    if MANIFEST not in sizes:
        raise CheckpointError(f"{path} holds no model: it lacks {MANIFEST}; give what ukbob_export_model wrote")
    try:
        manifest = _parse(opened.read(MANIFEST), f"{MANIFEST} in {path}")
    except _DAMAGED as error:
        raise CheckpointError(f"{path} is damaged: {MANIFEST} cannot be unpacked ({error}); {_AGAIN}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != MODEL_FORMAT:
        raise CheckpointError(f"{path} holds no model of this package; give what ukbob_export_model wrote")
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, made by ukbob_seg {_maker(manifest)}; this is ukbob_seg "
            f"{__version__}, which reads format {FORMAT_VERSION}: update it"
        )
    members: Any = manifest.get("members")
    if version != FORMAT_VERSION or not _is_table(members):
        raise CheckpointError(f"{path} is damaged: {MANIFEST} has no valid list of members; {_AGAIN}")
    del sizes[MANIFEST]
    if lacking := sorted(set(members) - set(sizes)):
        raise CheckpointError(f"{path} is damaged: it lacks {listing(lacking)}; {_AGAIN}")
    if others := sorted(set(sizes) - set(members)):
        raise CheckpointError(f"{path} is refused: {listing(others)} is not in the list of {MANIFEST}")
    if wrong := [name for name, size in sizes.items() if members[name]["bytes"] != size]:
        raise CheckpointError(f"{path} is damaged: {wrong[0]} has not the size of the manifest; {_AGAIN}")
    return manifest


def _maker(manifest: Mapping[str, Any]) -> str:
    version = str(manifest.get("ukbob_seg"))
    return version if version.isprintable() else repr(version)


def _is_table(members: Any) -> bool:
    """Whether a manifest's list of members has its form."""
    return isinstance(members, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("bytes"), int)
        for entry in members.values()
    )


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # also: no UTF-8, numbers of thousands of digits, endless nesting
        raise CheckpointError(f"{where} is no valid JSON ({error}); {_AGAIN}") from error
