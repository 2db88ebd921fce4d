"""DICOM slices into volumes: series, order by position, and every check that a regular grid needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ukbob_seg.conversion.dicom_files import is_dicom, parse, pixels_of, read_files
from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.errors import DatasetError, listing

if TYPE_CHECKING:
    from pydicom import Dataset

_SPACING_TOLERANCE = 0.02  # of the slice spacing
_SHIFT_TOLERANCE = 0.1  # of a pixel
_DIRECTION_TOLERANCE = 1e-3
_IMAGE_CLASSES = {
    f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2", "2.1", "4", "4.1", "20", "128")
}  # CT, MR, PET


@dataclass(frozen=True)
class Slice:
    """One image of a series.

    Attributes:
        name: of its file.
        dataset: as read.
        position_mm: of the first pixel, LPS.
        rows_mm, columns_mm: unit vectors along a row and along a column, LPS.
        spacing_mm: between rows and between columns (y, x).
        shape: rows and columns.
    """

    name: str
    dataset: Dataset
    position_mm: np.ndarray
    rows_mm: np.ndarray
    columns_mm: np.ndarray
    spacing_mm: tuple[float, float]
    shape: tuple[int, int]

    @cached_property
    def normal(self) -> np.ndarray:
        """Unit vector of the direction in which slices follow each other."""
        return np.cross(self.rows_mm, self.columns_mm)

    @cached_property
    def height_mm(self) -> float:
        """Position along the normal."""
        return float(self.position_mm @ self.normal)


@dataclass(frozen=True)
class Series:
    """The slices of one series, in the order of their position along the normal, each position once.

    Attributes:
        uid: SeriesInstanceUID.
        description: SeriesDescription.
        image_type: values of ImageType.
        number: SeriesNumber, 0 where there is none.
        slices: in order.
        duplicates: slices that were there again, with the same content.
        problems: why they are no regular volume; empty when they are.
    """

    uid: str
    description: str
    image_type: tuple[str, ...]
    number: int
    slices: tuple[Slice, ...]
    duplicates: int
    problems: tuple[str, ...]

    @property
    def extent_mm(self) -> tuple[float, float]:
        """Height of the first and the last slice."""
        return self.slices[0].height_mm, self.slices[-1].height_mm

    @property
    def geometry(self) -> Geometry:
        """The grid of the slices, which must have no problems."""
        first = self.slices[0]
        direction = np.stack([first.rows_mm, first.columns_mm, first.normal], axis=1)
        return Geometry(
            (len(self.slices), *first.shape),
            (_slice_spacing(self.slices), *first.spacing_mm),
            (float(first.position_mm[0]), float(first.position_mm[1]), float(first.position_mm[2])),
            tuple(float(value) for value in direction.ravel()),
        )

    def voxels(self) -> np.ndarray:
        """(Z, Y, X) in the order of the slices: stored integers, or float32 where any slice is rescaled.

        Raises:
            DatasetError: pixel data are damaged or truncated.
        """
        return np.stack([pixels_of(each.dataset, each.name) for each in self.slices])


def read_series(source: Path) -> tuple[list[Series], list[str]]:
    """Every series of images of an archive or a folder, by number.

    Files that are no DICOM and DICOM objects that are no images are passed over.

    Returns:
        (series, problems of files that belong to none).

    Raises:
        DatasetError: the source is refused (see ``check_archive``) or damaged as a whole.
    """
    slices: dict[str, list[Slice]] = {}
    problems = []
    for name, content in read_files(source):
        if not is_dicom(content):
            continue
        try:
            dataset = parse(content, name)
            if "Rows" in dataset or _is_image(dataset):
                found = _slice(dataset, name)
                slices.setdefault(str(dataset.SeriesInstanceUID), []).append(found)
        except DatasetError as error:
            problems.append(str(error))
    series = [_series(uid, members) for uid, members in slices.items()]
    return sorted(series, key=lambda each: (each.number, each.uid)), problems


def _is_image(dataset: Dataset) -> bool:
    """Whether an object that has no rows should have some: it is truncated, where a report is not."""
    kind = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID", "")
    return str(kind) in _IMAGE_CLASSES


def _slice(dataset: Dataset, name: str) -> Slice:
    """Geometry of one file, checked.

    Raises:
        DatasetError: no pixel data, or no position, orientation or spacing.
    """
    if "PixelData" not in dataset or "Columns" not in dataset:
        raise DatasetError(f"{name} has no pixel data: it is truncated; download it again")
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SeriesInstanceUID"):
        if not dataset.get(tag):
            raise DatasetError(f"{name} has no {tag}; export the scan again, with its geometry")
    orientation = np.asarray(dataset.ImageOrientationPatient, dtype=float)
    rows, columns = orientation[:3], orientation[3:]
    lengths = np.linalg.norm(rows), np.linalg.norm(columns)
    if not np.allclose([*lengths, 1 + rows @ columns], 1, atol=_DIRECTION_TOLERANCE):
        raise DatasetError(
            f"{name}: ImageOrientationPatient {orientation.tolist()} is no pair of orthogonal directions"
        )
    rows = rows / lengths[0]
    columns = columns - (columns @ rows) * rows  # decimal strings are rounded
    spacing = [float(value) for value in dataset.PixelSpacing]
    if min(spacing) <= 0:
        raise DatasetError(f"{name}: PixelSpacing {spacing} must be positive")
    return Slice(
        name,
        dataset,
        np.asarray(dataset.ImagePositionPatient, dtype=float),
        rows,
        columns / np.linalg.norm(columns),
        (spacing[0], spacing[1]),
        (int(dataset.Rows), int(dataset.Columns)),
    )


def _series(uid: str, slices: Sequence[Slice]) -> Series:
    first = slices[0].dataset
    problems: list[str] = []
    for what in ("shape", "spacing_mm"):
        found = {getattr(each, what) for each in slices}
        if len(found) > 1:
            problems.append(f"slices differ in {what}: {listing([str(each) for each in sorted(found)])}")
    turned = [each for each in slices if not _parallel(each, slices[0])]
    if turned:
        problems.append(f"slices differ in orientation ({turned[0].name} and {slices[0].name})")
        ordered, duplicates = tuple(slices), 0
    else:
        ordered, duplicates, again = _ordered(slices)
        problems += again + _irregular(ordered)
    image_type = tuple(str(value) for value in first.get("ImageType", ()))
    number = int(first.get("SeriesNumber") or 0)
    description = str(first.get("SeriesDescription", "")).strip()
    return Series(uid, description, image_type, number, ordered, duplicates, tuple(problems))


def _parallel(one: Slice, other: Slice) -> bool:
    return np.allclose(one.rows_mm, other.rows_mm, atol=_DIRECTION_TOLERANCE) and np.allclose(
        one.columns_mm, other.columns_mm, atol=_DIRECTION_TOLERANCE
    )


def _ordered(slices: Sequence[Slice]) -> tuple[tuple[Slice, ...], int, list[str]]:
    """(slices by position, slices left out because they are there twice, problems)."""
    ordered: list[Slice] = []
    duplicates, problems = 0, []
    for each in sorted(slices, key=lambda one: (one.height_mm, str(one.dataset.get("SOPInstanceUID", "")), one.name)):
        if ordered and abs(each.height_mm - ordered[-1].height_mm) < 0.01:
            if each.dataset.PixelData == ordered[-1].dataset.PixelData:
                duplicates += 1
            else:
                problems.append(f"two different slices at {each.height_mm:.1f} mm ({ordered[-1].name} and {each.name})")
            continue
        ordered.append(each)
    return tuple(ordered), duplicates, problems


def _slice_spacing(slices: Sequence[Slice]) -> float:
    """Distance of slices by their positions; of a single one what its tags say (which may be wrong, or without gap)."""
    if len(slices) > 1:
        return float(np.median(np.diff([each.height_mm for each in slices])))
    dataset = slices[0].dataset
    return float(dataset.get("SpacingBetweenSlices") or dataset.get("SliceThickness") or 1)


def _irregular(slices: Sequence[Slice]) -> list[str]:
    """Missing slices, unequal distances, and slices that are shifted against each other."""
    problems = []
    spacing = _slice_spacing(slices)
    gaps = np.diff([each.height_mm for each in slices]) / spacing
    missing = sum(round(gap) - 1 for gap in gaps if gap > 1.5 and abs(gap - round(gap)) < _SPACING_TOLERANCE * gap)
    unequal = [gap for gap in gaps if abs(gap - round(gap)) >= _SPACING_TOLERANCE * max(1, gap) or gap < 0.5]
    if missing:
        place = next(k for k, gap in enumerate(gaps) if gap > 1.5)
        height = slices[place].height_mm
        problems.append(f"{missing} slice{'s' if missing > 1 else ''} missing, the first after {height:.1f} mm")
    if unequal:
        distances = listing([f"{gap * spacing:.2f}" for gap in sorted(set(np.round(gaps, 3)))])
        problems.append(f"slices are not equally spaced: {distances} mm")
    first = slices[0]
    offsets = np.array([each.position_mm - first.position_mm for each in slices])
    sideways = offsets - np.outer(offsets @ first.normal, first.normal)
    shift = float(np.linalg.norm(sideways, axis=1).max())
    if shift > _SHIFT_TOLERANCE * min(first.spacing_mm):
        problems.append(f"slices are shifted by up to {shift:.2f} mm against each other (a tilted gantry)")
    return problems
