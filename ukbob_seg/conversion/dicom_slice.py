"""One DICOM file as a slice: its geometry, and the tags that say which scan it is of, all checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ukbob_seg.conversion.dicom_tags import (
    moment_of,
    number_of,
    numbers_of,
    text_of,
    texts_of,
    value_of,
    whole_of,
)
from ukbob_seg.errors import DatasetError

if TYPE_CHECKING:
    from pydicom import Dataset

_DIRECTION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Origin:
    """Which scan a slice is of.

    Attributes:
        patient, study, series, frame, instance: PatientID, StudyInstanceUID, SeriesInstanceUID, FrameOfReferenceUID,
            SOPInstanceUID; empty where there is none.
        description, image_type, number: of the series; number 0 where there is none.
        acquired_s, started_s: AcquisitionTime and SeriesTime with their dates; None where there is none.
        acquisition: AcquisitionNumber; None where there is none.
    """

    patient: str
    study: str
    series: str
    frame: str
    instance: str
    description: str
    image_type: tuple[str, ...]
    number: int
    acquired_s: float | None
    started_s: float | None
    acquisition: int | None


@dataclass(frozen=True)
class Slice:
    """One image of a series.

    Attributes:
        name: of its file.
        dataset: as read.
        origin: which scan it is of.
        position_mm: of the first pixel, LPS.
        rows_mm, columns_mm: unit vectors along a row and along a column, LPS.
        spacing_mm: between rows and between columns (y, x).
        shape: rows and columns.
        thickness_mm: what its tags say of the distance to the next; 1 where they say nothing.
    """

    name: str
    dataset: Dataset
    origin: Origin
    position_mm: np.ndarray
    rows_mm: np.ndarray
    columns_mm: np.ndarray
    spacing_mm: tuple[float, float]
    shape: tuple[int, int]
    thickness_mm: float

    @cached_property
    def normal(self) -> np.ndarray:
        """Unit vector of the direction in which slices follow each other."""
        return np.cross(self.rows_mm, self.columns_mm)

    @cached_property
    def height_mm(self) -> float:
        """Position along the normal."""
        return float(self.position_mm @ self.normal)


def read_slice(dataset: Dataset, name: str) -> Slice:
    """Geometry and origin of one file, checked.

    Raises:
        DatasetError: no pixel data; no position, orientation or spacing; or a tag that is not as it must be.
    """
    if value_of(dataset, "PixelData", name) is None or "Columns" not in dataset:
        raise DatasetError(f"{name} has no pixel data: it is truncated; download it again")
    origin = _origin(dataset, name)
    if not origin.series:
        raise DatasetError(f"{name} has no SeriesInstanceUID; export the scan again, with its geometry")
    position = np.asarray(numbers_of(dataset, "ImagePositionPatient", name, 3))
    rows, columns = _directions(dataset, name)
    height, width = numbers_of(dataset, "PixelSpacing", name, 2)
    if min(height, width) <= 0:
        raise DatasetError(f"{name}: PixelSpacing {[height, width]} must be positive")
    shape = whole_of(dataset, "Rows", name), whole_of(dataset, "Columns", name)
    if min(shape) < 1:
        raise DatasetError(f"{name}: Rows and Columns {list(shape)} must be positive; download it again")
    return Slice(name, dataset, origin, position, rows, columns, (height, width), shape, _thickness(dataset, name))


def _origin(dataset: Dataset, name: str) -> Origin:
    def optional(tag: str) -> int | None:
        return None if value_of(dataset, tag, name) is None else whole_of(dataset, tag, name)

    return Origin(
        text_of(dataset, "PatientID", name),
        text_of(dataset, "StudyInstanceUID", name),
        text_of(dataset, "SeriesInstanceUID", name),
        text_of(dataset, "FrameOfReferenceUID", name),
        text_of(dataset, "SOPInstanceUID", name),
        text_of(dataset, "SeriesDescription", name),
        texts_of(dataset, "ImageType", name),
        optional("SeriesNumber") or 0,
        moment_of(dataset, "Acquisition", name),
        moment_of(dataset, "Series", name),
        optional("AcquisitionNumber"),
    )


def _directions(dataset: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors along rows and along columns, orthogonal."""
    orientation = np.asarray(numbers_of(dataset, "ImageOrientationPatient", name, 6))
    rows, columns = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(rows), np.linalg.norm(columns)
    if not np.allclose([*lengths, 1 + rows @ columns], 1, atol=_DIRECTION_TOLERANCE):
        raise DatasetError(
            f"{name}: ImageOrientationPatient {orientation.tolist()} is no pair of orthogonal directions"
        )
    rows = rows / lengths[0]
    columns = columns - (columns @ rows) * rows  # decimal strings are rounded
    return rows, columns / np.linalg.norm(columns)


def _thickness(dataset: Dataset, name: str) -> float:
    for tag in ("SpacingBetweenSlices", "SliceThickness"):
        if value_of(dataset, tag, name) is not None and (found := number_of(dataset, tag, name)) > 0:
            return found
    return 1.0
