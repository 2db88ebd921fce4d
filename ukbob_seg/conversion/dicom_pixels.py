"""Stored values of DICOM slices, decompressed by pydicom, or by SimpleITK's decoders where pydicom has none."""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ukbob_seg.conversion.dicom_files import load_pydicom
from ukbob_seg.conversion.dicom_tags import first_line, number_of, value_of, whole_of
from ukbob_seg.errors import DatasetError

if TYPE_CHECKING:
    from pydicom import Dataset

_PIXEL_TAGS = (
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelData",
)  # fmt: skip
_JPEG = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70, 80, 81, 90, 91))  # SimpleITK's
_HIGH_THROUGHPUT = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (201, 202, 203))
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def pixels_of(dataset: Dataset, name: str) -> np.ndarray:
    """The stored values (Y, X) of a slice, rescaled where the slice says so (then float32).

    Raises:
        DatasetError: damaged, truncated, more than one frame, colours, or compressed in a way that nothing here reads.
    """
    if value_of(dataset, "NumberOfFrames", name) is not None and whole_of(dataset, "NumberOfFrames", name) > 1:
        raise DatasetError(f"{name} has several frames in one file, which is not supported; export single slices")
    if whole_of(dataset, "SamplesPerPixel", name, 1) != 1:
        raise DatasetError(f"{name} is in colour; give the scan, not a screenshot")
    slope = number_of(dataset, "RescaleSlope", name, 1.0)
    intercept = number_of(dataset, "RescaleIntercept", name, 0.0)
    if slope == 0:
        raise DatasetError(f"{name}: RescaleSlope is 0, which leaves nothing of the image; export the scan again")
    values = _stored(dataset, name)
    if (slope, intercept) == (1.0, 0.0):
        return values
    return (values * slope + intercept).astype(np.float32)


def _stored(dataset: Dataset, name: str) -> np.ndarray:
    syntax = str(value_of(dataset.file_meta, "TransferSyntaxUID", name) or "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = _by_simpleitk(dataset, syntax, name) if _undecodable(syntax) else np.asarray(dataset.pixel_array)
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever the damage leads to
        raise DatasetError(f"{name} is damaged or truncated ({first_line(error)}); download it again") from error
    shape = whole_of(dataset, "Rows", name), whole_of(dataset, "Columns", name)
    if values.shape != shape:
        raise DatasetError(f"{name} has pixels of shape {values.shape}, not {shape} as it says; download it again")
    return values


def _undecodable(syntax: str) -> bool:
    """Whether pixels are compressed, and pydicom lacks the packages to read them."""
    load_pydicom()
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    if not UID(syntax).is_transfer_syntax or not UID(syntax).is_encapsulated:
        return False
    try:
        return not get_decoder(syntax).is_available  # type: ignore[no-untyped-call]
    except NotImplementedError:
        return True


def _by_simpleitk(dataset: Dataset, syntax: str, name: str) -> np.ndarray:
    """Pixels alone, without anything that says whose they are, through a file that is deleted at once."""
    from pydicom.uid import UID

    if syntax not in _JPEG:
        decoder = "pip install pylibjpeg pylibjpeg-openjpeg" if syntax in _HIGH_THROUGHPUT else "export it uncompressed"
        raise DatasetError(f"{name} is compressed as {UID(syntax).name}, which nothing installed reads; {decoder}")
    import SimpleITK as sitk

    with TemporaryDirectory(prefix="ukbob-") as folder:
        path = Path(folder) / "slice.dcm"
        _pixels_only(dataset, syntax).save_as(path, enforce_file_format=True)
        return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(path)))[0]


def _pixels_only(dataset: Dataset, syntax: str) -> Any:
    pydicom = load_pydicom()
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, _SECONDARY_CAPTURE
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    plain = pydicom.Dataset()
    plain.file_meta = meta
    plain.SOPClassUID, plain.SOPInstanceUID = _SECONDARY_CAPTURE, meta.MediaStorageSOPInstanceUID
    for tag in _PIXEL_TAGS:
        if tag in dataset:
            plain[tag] = dataset[tag]
    return plain
