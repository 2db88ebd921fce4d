"""DICOM files out of a zip archive or a folder, read into memory: nothing of an archive is ever unpacked to disk."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.zips import is_encrypted, is_special, leads_out

if TYPE_CHECKING:
    from pydicom import Dataset

PREFIX_BYTES = 132  # 128 bytes of anything, then DICM
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

    Raises:
        DatasetError: the archive is refused, or a file cannot be read.
    """
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            inside = path.relative_to(source)
            if path.is_file() and not any(part.startswith(".") for part in inside.parts):
                if path.stat().st_size > limits.file_bytes:
                    raise DatasetError(f"{path} has {path.stat().st_size} bytes; no DICOM slice is as large")
                yield str(inside), path.read_bytes()
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
        raise DatasetError(f"{name} is damaged or truncated ({error}); download it again") from error
    return dataset


def pixels_of(dataset: Dataset, name: str) -> Any:
    """The stored values (Y, X) of a slice, rescaled where the slice says so (then float32).

    Raises:
        DatasetError: damaged, truncated, more than one frame, or colours.
    """
    import numpy as np

    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise DatasetError(f"{name} has several frames in one file, which is not supported; export single slices")
    if int(dataset.get("SamplesPerPixel", 1)) != 1:
        raise DatasetError(f"{name} is in colour; give the scan, not a screenshot")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = np.asarray(dataset.pixel_array)
    except Exception as error:
        raise DatasetError(
            f"{name} is damaged or truncated ({str(error).splitlines()[0]}); download it again"
        ) from error
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    if (slope, intercept) == (1.0, 0.0):
        return values
    return (values * slope + intercept).astype(np.float32)
