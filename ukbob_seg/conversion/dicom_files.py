"""DICOM files out of a zip archive or a folder, read into memory: nothing of an archive is ever unpacked to disk."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ukbob_seg.conversion.dicom_tags import first_line
from ukbob_seg.conversion.manifest import is_manifest
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.zips import is_encrypted, is_special, leads_out

if TYPE_CHECKING:
    from pydicom import Dataset

PREFIX_BYTES = 132  # 128 bytes of anything, then DICM
_LOOK_AT = 20  # files of a folder, to tell whether it holds DICOM
_UNREADABLE: tuple[Any, ...] = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class ArchiveLimits:
    """What an honest archive stays below; a UK Biobank archive has about 1,400 files and 120 MB.

    Attributes:
        members: files in the archive.
        file_bytes: of one file, unpacked.
        total_bytes: of all files, unpacked.
        ratio: unpacked to packed bytes of the whole archive, where it unpacks to more than ``ratio_from_bytes``.
        ratio_from_bytes: smaller archives may hold nothing but air.
    """

    members: int = 50_000
    file_bytes: int = 256 * 2**20
    total_bytes: int = 4 * 2**30
    ratio: float = 200.0
    ratio_from_bytes: int = 64 * 2**20


LIMITS = ArchiveLimits()


def load_pydicom() -> Any:
    """pydicom, which is an extra.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise ConfigError("DICOM files need pydicom: pip install 'ukbob_seg[dicom]'") from error
    return pydicom


def check_archive(path: Path, limits: ArchiveLimits = LIMITS) -> list[zipfile.ZipInfo]:
    """The files of a zip archive, after a look at its directory only.

    Raises:
        DatasetError: no zip archive; or a member that leaves its folder, is a link, is encrypted or not packed in a
            usual way; or more files, bytes or compression than an honest archive has.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
    except FileNotFoundError as error:
        raise DatasetError(f"archive {path} does not exist") from error
    except _UNREADABLE as error:
        raise DatasetError(f"{path} is no zip archive, or truncated ({error}); download it again") from error
    for info in members:
        if leads_out(info.filename):
            raise DatasetError(
                f"{path} holds a path that leads out of it, {info.filename!r}; do not trust this archive"
            )
        if is_special(info):
            raise DatasetError(f"{path} holds a link, {info.filename!r}; do not trust this archive")
        if is_encrypted(info):
            raise DatasetError(f"{path}: {info.filename!r} is encrypted; unpack it with its password, give the folder")
        if info.file_size > limits.file_bytes:
            raise DatasetError(
                f"{path}: {info.filename!r} unpacks to {info.file_size} bytes; no DICOM slice is as large"
            )
    total = sum(info.file_size for info in members)
    packed = max(1, path.stat().st_size)
    if len(members) > limits.members or total > limits.total_bytes:
        raise DatasetError(
            f"{path} unpacks to {len(members)} files and {total} bytes, more than the {limits.members} files and "
            f"{limits.total_bytes} bytes that are read; do not trust this archive"
        )
    if total > limits.ratio_from_bytes and total / packed > limits.ratio:
        raise DatasetError(
            f"{path} unpacks to {total / packed:.0f} times its size; no scan compresses like that, do not trust it"
        )
    return members


def read_files(source: Path, limits: ArchiveLimits = LIMITS) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every file of an archive, after ``check_archive``, or of a folder and the folders in it.

    In a folder only DICOM files and manifests are read as a whole, of others the first 132 bytes.

    Raises:
        DatasetError: the archive is refused, or a file cannot be read.
    """
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            inside = path.relative_to(source)
            if path.is_file() and not any(part.startswith(".") for part in inside.parts):
                yield str(inside), _read_file(path, limits)
        return
    members = check_archive(source, limits)
    with zipfile.ZipFile(source) as archive:
        for info in members:
            try:
                # No more bytes than the directory says, whose sum is limited; the checksum is compared at the end.
                content = archive.read(info)
            except _UNREADABLE as error:
                raise DatasetError(f"{source}: {info.filename} is damaged ({error}); download it again") from error
            yield info.filename, content


def _read_file(path: Path, limits: ArchiveLimits) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(PREFIX_BYTES)
            if not is_dicom(content) and not is_manifest(path.name):
                return content
            if (size := path.stat().st_size) > limits.file_bytes:
                raise DatasetError(f"{path} has {size} bytes; no DICOM slice is as large")
            return content + file.read()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}); check its permissions and disk") from error


def holds_dicom(files: Iterable[Path]) -> bool:
    """Whether one of the first twenty of some files begins like DICOM."""
    for path in islice((path for path in files if path.is_file()), _LOOK_AT):
        try:
            with path.open("rb") as file:
                if is_dicom(file.read(PREFIX_BYTES)):
                    return True
        except OSError:
            continue  # whoever reads it will say so
    return False


def is_dicom(content: bytes) -> bool:
    """Whether a file begins like DICOM."""
    return content[PREFIX_BYTES - 4 : PREFIX_BYTES] == b"DICM"


def parse(content: bytes, name: str, pixels: bool = True) -> Dataset:
    """Read one DICOM file.

    Args:
        content: of the file.
        name: for messages.
        pixels: also its pixel data.

    Raises:
        DatasetError: damaged or truncated.
    """
    pydicom = load_pydicom()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # values that are not quite as the standard wants, in tags of no interest
            dataset = pydicom.dcmread(BytesIO(content), stop_before_pixels=not pixels)
            dataset.get("SOPInstanceUID")
    except Exception as error:  # pydicom raises whatever the damage leads to
        raise DatasetError(f"{name} is damaged or truncated ({first_line(error)}); download it again") from error
    return dataset
