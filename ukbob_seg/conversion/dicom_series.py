"""DICOM slices into volumes: series, order by position, and every check that a regular grid needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ukbob_seg.conversion.dicom_files import is_dicom, parse, read_files
from ukbob_seg.conversion.dicom_pixels import pixels_of
from ukbob_seg.conversion.dicom_slice import Origin, Slice, read_slice
from ukbob_seg.conversion.dicom_tags import text_of
from ukbob_seg.conversion.manifest import is_manifest, listed_files, missing_files
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
    def origin(self) -> Origin:
        """Which scan it is of, by its first slice."""
        return self.slices[0].origin

    @property
    def acquired_s(self) -> float | None:
        """The earliest AcquisitionTime of its slices; None where there is none."""
        return min((each.origin.acquired_s for each in self.slices if each.origin.acquired_s is not None), default=None)

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

    def same_pixels(self, other: Series) -> bool:
        """Whether another series has the same stored pixels, slice by slice."""
        return len(self.slices) == len(other.slices) and all(map(_same_pixels, self.slices, other.slices))

    def voxels(self) -> np.ndarray:
        """(Z, Y, X) in the order of the slices: stored integers, or float32 where any slice is rescaled.

        Raises:
            DatasetError: pixel data are damaged or truncated.
        """
        return np.stack([pixels_of(each.dataset, each.name) for each in self.slices])


def read_series(source: Path, manifest: bool = False) -> tuple[list[Series], list[str]]:
    """Every series of images of an archive or a folder, by number.

    Files that are no DICOM and DICOM objects that are no images are passed over.

    Args:
        source: the archive, or the folder.
        manifest: that files which a manifest lists are not there is a problem.

    Returns:
        (series, problems of files, and of the whole: several people or studies, missing files).

    Raises:
        DatasetError: the source is refused (see ``check_archive``) or damaged as a whole.
    """
    slices: dict[str, list[Slice]] = {}
    problems = []
    names: list[str] = []
    listed: set[str] = set()
    for name, content in read_files(source):
        names.append(name)
        if is_manifest(name):
            listed |= listed_files(content)
        if not is_dicom(content):
            continue
        try:
            dataset = parse(content, name)
            if "Rows" in dataset or _is_image(dataset, name):
                found = read_slice(dataset, name)
                slices.setdefault(found.origin.series, []).append(found)
        except DatasetError as error:
            problems.append(str(error))
    if manifest:
        problems += missing_files(listed, names)
    problems += _strangers([each.origin for members in slices.values() for each in members])
    series = [_series(uid, members) for uid, members in slices.items()]
    return sorted(series, key=lambda each: (each.number, each.uid)), problems


def _strangers(origins: Sequence[Origin]) -> list[str]:
    """Several people, or several studies of one."""
    for what, found in (
        ("people (PatientID)", {each.patient for each in origins}),
        ("studies (StudyInstanceUID)", {each.study for each in origins}),
    ):
        found.discard("")
        if len(found) > 1:
            named = listing(sorted(found), most=3)
            return [f"images of {len(found)} {what} are in one place: {named}; give each its own archive or folder"]
    return []


def _is_image(dataset: Dataset, name: str) -> bool:
    """Whether an object that has no rows should have some: it is truncated, where a report is not."""
    kind = text_of(dataset, "SOPClassUID", name) or text_of(dataset.file_meta, "MediaStorageSOPClassUID", name)
    return kind in _IMAGE_CLASSES


def _series(uid: str, slices: Sequence[Slice]) -> Series:
    origin = slices[0].origin
    problems: list[str] = []
    for what in ("shape", "spacing_mm"):
        found = {getattr(each, what) for each in slices}
        if len(found) > 1:
            problems.append(f"slices differ in {what}: {listing([str(each) for each in sorted(found)])}")
    if len({each.origin.frame for each in slices}) > 1:
        problems.append("slices differ in FrameOfReferenceUID")
    turned = [each for each in slices if not _parallel(each, slices[0])]
    if turned:
        problems.append(f"slices differ in orientation ({turned[0].name} and {slices[0].name})")
        ordered, duplicates = tuple(slices), 0
    else:
        ordered, duplicates, again = _ordered(slices)
        problems += again + _irregular(ordered)
    return Series(uid, origin.description, origin.image_type, origin.number, ordered, duplicates, tuple(problems))


def _parallel(one: Slice, other: Slice) -> bool:
    return np.allclose(one.rows_mm, other.rows_mm, atol=_DIRECTION_TOLERANCE) and np.allclose(
        one.columns_mm, other.columns_mm, atol=_DIRECTION_TOLERANCE
    )


def _ordered(slices: Sequence[Slice]) -> tuple[tuple[Slice, ...], int, list[str]]:
    """(slices by position, slices left out because they are there twice, problems)."""
    ordered: list[Slice] = []
    duplicates, problems = 0, []
    for each in sorted(slices, key=lambda one: (one.height_mm, one.origin.instance, one.name)):
        if ordered and abs(each.height_mm - ordered[-1].height_mm) < 0.01:
            if _same_pixels(each, ordered[-1]):
                duplicates += 1
            else:
                problems.append(f"two different slices at {each.height_mm:.1f} mm ({ordered[-1].name} and {each.name})")
            continue
        ordered.append(each)
    return tuple(ordered), duplicates, problems


def _same_pixels(one: Slice, other: Slice) -> bool:
    return bool(one.dataset.PixelData == other.dataset.PixelData)


def _slice_spacing(slices: Sequence[Slice]) -> float:
    """Distance of slices by their positions; of a single one what its tags say (which may be wrong, or without gap)."""
    if len(slices) > 1:
        return float(np.median(np.diff([each.height_mm for each in slices])))
    return slices[0].thickness_mm


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
