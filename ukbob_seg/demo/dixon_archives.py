"""Synthetic subjects as UK Biobank would hand them out: zip archives of DICOM series, station by station.

For tests, and to try the way from archives to scores without anybody's scan. Tags, geometry, overlaps and what can go
wrong with an archive are those of field 20201; the anatomy is the synthetic cohort's, the matrix is small.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ukbob_seg.conversion.dicom_files import load_pydicom
from ukbob_seg.conversion.dixon import CONTRASTS, FAT, WATER
from ukbob_seg.dataset.image_io import Geometry, write_labels
from ukbob_seg.demo.cohort import CohortConfig, make_case
from ukbob_seg.files import atomic_path

if TYPE_CHECKING:
    from pydicom import Dataset

_DESCRIPTIONS = {"fat": "F", "water": "W", "inphase": "in", "outphase": "opp"}
_TYPES = {"fat": "FAT", "water": "WATER", "inphase": "IN_PHASE", "outphase": "OPP_PHASE"}
_PROTOCOL = "BH_17s"
_NOON_S = 12 * 3600.0
_MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"


@dataclass(frozen=True)
class ArchivePlan:
    """How a subject is scanned, and what goes wrong. Stations count from 1, at the head; contrasts are ``CONTRASTS``.

    Attributes:
        stations: table positions.
        overlap_mm: of neighbouring stations, at least.
        slice_mm: distance of slices of each station; empty for that of the image.
        gains: factor of each station; empty for 1.
        noise: standard deviation of what each station adds by itself, in units of the image.
        slope: RescaleSlope; stored values are the intensities divided by it.
        oblique_degrees: rotation of all slices about the left-right axis.
        swapped: stations whose water and fat are exchanged.
        missing: (station, contrast) series that are not there.
        lost_slices: (station, contrast, index) slices that are not there.
        missing_stations: not there at all.
        repeated: stations scanned twice, the first time with half the signal.
        earlier_missing, later_missing: (station, contrast) series that the first, the second of two scans lacks.
        untimed: no tag tells when a series was acquired.
        strangers: stations that are another person's.
        listed: the manifest lists lost slices as well, for they got lost later.
        duplicated: slices that are in the archive twice, under another name.
        truncated: files that end too early.
        localiser: an unrelated series as well.
    """

    stations: int = 6
    overlap_mm: float = 24.0
    slice_mm: tuple[float, ...] = ()
    gains: tuple[float, ...] = ()
    noise: float = 0.0
    slope: float = 1.0
    oblique_degrees: float = 0.0
    swapped: frozenset[int] = frozenset()
    missing: frozenset[tuple[int, str]] = frozenset()
    lost_slices: frozenset[tuple[int, str, int]] = frozenset()
    missing_stations: frozenset[int] = frozenset()
    repeated: frozenset[int] = frozenset()
    earlier_missing: frozenset[tuple[int, str]] = frozenset()
    later_missing: frozenset[tuple[int, str]] = frozenset()
    untimed: bool = False
    strangers: frozenset[int] = frozenset()
    listed: bool = False
    duplicated: int = 0
    truncated: int = 0
    localiser: bool = field(default=True)


def write_archive(path: Path, image: np.ndarray, geometry: Geometry, plan: ArchivePlan, seed: int = 0) -> None:
    """Write one archive. Names, order and numbers of its files say nothing about where slices lie.

    Args:
        path: of the zip file; its stem begins with the subject's number.
        image: (4, Z, Y, X) fat, water, in-phase, out-of-phase.
        geometry: of the image, axial in LPS.
        plan: of the scan.
        seed: of identifiers and order.

    Raises:
        ConfigError: pydicom is not installed.
    """
    generator = np.random.default_rng(seed)
    subject = path.stem.split("_")[0]
    files = [_encode(dataset) for dataset in _datasets(image, geometry, plan, subject, seed, generator)]
    for k in generator.choice(len(files), plan.truncated, replace=False):
        files[k] = files[k][: int(len(files[k]) * 0.7)]
    files += [files[k] for k in generator.choice(len(files), plan.duplicated, replace=False)]
    generator.shuffle(files)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        names = [f"1.3.12.2.1107.5.2.18.{subject}.{number:05d}.dcm" for number in range(len(files))]
        lost = [f"1.3.12.2.1107.5.2.18.{subject}.{90000 + k}.dcm" for k in range(len(plan.lost_slices))]
        archive.writestr("manifest.cvs", _manifest([*names, *lost] if plan.listed else names, subject))
        for name, content in zip(names, files, strict=True):
            archive.writestr(name, content)


def _manifest(names: Sequence[str], subject: str) -> str:
    """As published scripts have to read it: misnamed, and with dates whose comma moves all that follows."""
    head = "filename,modality,patientid,date,series discription,aet"
    return "\n".join([head, *(f"{name},MR,{subject},Jan 1, 2020 12:00:00 PM,Dixon,UNKNOWN" for name in names), ""])


def station_heights(geometry: Geometry, plan: ArchivePlan) -> list[np.ndarray]:
    """Heights (mm, ascending) of each station's slices, head first. On the image's planes where distances allow."""
    low = geometry.origin_mm[2]
    high = low + (geometry.shape[0] - 1) * geometry.spacing_mm[0]
    length = (high - low + (plan.stations - 1) * plan.overlap_mm) / plan.stations
    heights, top = [], high
    for k in range(plan.stations):
        step = plan.slice_mm[k] if plan.slice_mm else geometry.spacing_mm[0]
        steps = int(np.floor((top - low) / step + 1e-6))
        if k < plan.stations - 1:
            steps = min(steps, int(np.ceil(length / step - 1e-6)))
        bottom = top - steps * step
        heights.append(bottom + step * np.arange(steps + 1))
        top = bottom + step * np.ceil(plan.overlap_mm / step - 1e-6)
    return heights


def _datasets(
    image: np.ndarray, geometry: Geometry, plan: ArchivePlan, subject: str, seed: int, generator: np.random.Generator
) -> Iterator[Dataset]:
    """All slices of an archive."""
    study = _Study(subject, geometry, plan.oblique_degrees, seed)
    stations = station_heights(geometry, plan)
    # Neither ascending nor descending: series numbers are no table positions.
    numbers = generator.permutation(len(stations) * len(CONTRASTS)) + 5
    for k, heights in enumerate(stations):
        if k + 1 in plan.missing_stations:
            continue
        voxels = _sample(image, geometry, heights)
        if plan.noise > 0:
            voxels = np.abs(voxels + generator.normal(0, plan.noise, voxels.shape))
        voxels *= (plan.gains[k] if plan.gains else 1.0) / plan.slope
        step = float(heights[1] - heights[0])
        if k + 1 in plan.swapped:
            voxels[[FAT, WATER]] = voxels[[WATER, FAT]]
        for channel, contrast in enumerate(CONTRASTS):
            here = (k + 1, contrast)
            if here in plan.missing:
                continue
            number = int(numbers[k * len(CONTRASTS) + channel])
            start_s = None if plan.untimed else 60.0 * k + 25
            name = f"Dixon_{_PROTOCOL}_{_DESCRIPTIONS[contrast]}"
            series = _Series(name, _TYPES[contrast], number, step, plan.slope, start_s)
            kept = [j for j in range(len(heights)) if (*here, j) not in plan.lost_slices]
            whose = dataclasses.replace(study, subject=f"{subject}9") if k + 1 in plan.strangers else study
            if here not in plan.later_missing:
                yield from whose.slices(series, voxels[channel], heights, kept)
            if k + 1 in plan.repeated and here not in plan.earlier_missing:
                earlier = dataclasses.replace(
                    series, number=number - 4 - len(numbers), start_s=None if start_s is None else start_s - 25
                )
                yield from whose.slices(earlier, voxels[channel] / 2, heights, kept)
    if plan.localiser:
        scout = _Series("localizer", "NONE", 1, 10.0, 1.0)
        yield from study.slices(scout, np.ones((3, 16, 16)), np.arange(3) * 10.0, range(3))


def _sample(image: np.ndarray, geometry: Geometry, heights: np.ndarray) -> np.ndarray:
    """(4, slices, Y, X) of an image at some heights, linear between its planes."""
    index = (heights - geometry.origin_mm[2]) / geometry.spacing_mm[0]
    if np.allclose(index, np.rint(index), atol=1e-6):
        return image[:, np.rint(index).astype(int)].astype(np.float64)
    planes = np.arange(len(image))[:, None]
    below = np.clip(np.floor(index).astype(int), 0, geometry.shape[0] - 2)
    part = (index - below)[None, :, None, None]
    return image[planes, below] * (1 - part) + image[planes, below + 1] * part


@dataclass(frozen=True)
class _Series:
    """Tags that a series' slices share."""

    description: str
    image_type: str
    number: int
    step_mm: float
    slope: float
    start_s: float | None = 0.0  # after noon; None says nothing of it


@dataclass(frozen=True)
class _Study:
    """Tags that a subject's series share, and the frame in which slices lie."""

    subject: str
    geometry: Geometry
    oblique_degrees: float
    seed: int

    def slices(self, series: _Series, voxels: np.ndarray, heights: np.ndarray, kept: Any) -> Iterator[Dataset]:
        """The kept slices of a series: (Z, Y, X) voxels at heights."""
        for index in kept:
            yield self._slice(series, voxels[index], float(heights[index]), len(heights) - index)

    def _slice(self, series: _Series, pixels: np.ndarray, height: float, instance: int) -> Dataset:
        pydicom = load_pydicom()

        def uid(*parts: object) -> Any:
            return pydicom.uid.generate_uid(entropy_srcs=[str(self.seed), self.subject, *map(str, parts)])

        angle = np.deg2rad(self.oblique_degrees)
        columns = np.array([0.0, np.cos(angle), np.sin(angle)])
        normal = np.array([0.0, -np.sin(angle), np.cos(angle)])
        x, y, _ = self.geometry.origin_mm
        position = x * np.array([1.0, 0, 0]) + y * columns + height * normal
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID = _MR_IMAGE
        meta.MediaStorageSOPInstanceUID = uid(series.number, instance)
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset = pydicom.Dataset()
        dataset.file_meta = meta
        dataset.SOPClassUID, dataset.SOPInstanceUID = _MR_IMAGE, meta.MediaStorageSOPInstanceUID
        dataset.ImageType = ["DERIVED", "PRIMARY", "DIXON", series.image_type, "ND"]
        dataset.Modality, dataset.Manufacturer, dataset.ManufacturerModelName = "MR", "SIEMENS", "Aera"
        dataset.PatientID = dataset.PatientName = self.subject
        dataset.PatientBirthDate, dataset.PatientSex, dataset.StudyID, dataset.AccessionNumber = "", "O", "1", ""
        dataset.StudyDate, dataset.StudyTime, dataset.ReferringPhysicianName = "20200101", "120000", ""
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uid("study"), uid("series", series.number)
        dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = uid("frame"), ""
        dataset.SeriesDescription, dataset.ProtocolName = series.description, f"Dixon_{_PROTOCOL}"
        dataset.SeriesNumber, dataset.InstanceNumber, dataset.PatientPosition = series.number, instance, "HFS"
        if series.start_s is not None:
            dataset.AcquisitionNumber = 1
            dataset.AcquisitionDate = dataset.SeriesDate = "20200101"
            dataset.AcquisitionTime = _time(_NOON_S + series.start_s)
            dataset.SeriesTime = _time(_NOON_S + series.start_s + 17 + series.number / 1000)  # when it was sent
        dataset.ImagePositionPatient = [round(float(value), 6) for value in position]
        dataset.ImageOrientationPatient = [1, 0, 0, *(round(float(value), 8) for value in columns)]
        dataset.PixelSpacing = [float(self.geometry.spacing_mm[1]), float(self.geometry.spacing_mm[2])]
        dataset.SliceThickness, dataset.SliceLocation = series.step_mm, round(height, 4)
        stored = np.rint(pixels).clip(0, 65535).astype("<u2")
        dataset.Rows, dataset.Columns = stored.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit = 15
        if series.slope != 1:
            dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = series.slope, 0, "US"
        dataset.PixelData = stored.tobytes()
        return dataset


def _time(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600:02d}{whole // 60 % 60:02d}{whole % 60:02d}.{round((seconds - whole) * 1e6):06d}"


def _encode(dataset: Dataset) -> bytes:
    pydicom = load_pydicom()
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def write_series(
    folder: Path,
    image: np.ndarray,
    geometry: Geometry,
    description: str,
    number: int,
    slope: float = 1.0,
    oblique_degrees: float = 0.0,
    seed: int = 0,
) -> None:
    """Write one series as a folder of DICOM files, as scanners export it, whatever the image shows.

    Args:
        folder: of the files.
        image: (Z, Y, X) intensities; stored as whole multiples of ``slope``.
        geometry: of the image, axial in LPS before it is turned.
        description: SeriesDescription.
        number: SeriesNumber.
        slope: RescaleSlope.
        oblique_degrees: rotation of all slices about the left-right axis.
        seed: of identifiers and names; series of one seed are of one study.
    """
    heights = geometry.origin_mm[2] + geometry.spacing_mm[0] * np.arange(geometry.shape[0])
    series = _Series(description, "NONE", number, geometry.spacing_mm[0], slope)
    study = _Study("1000000", geometry, oblique_degrees, seed)
    names = np.random.default_rng(seed).permutation(len(heights))
    folder.mkdir(parents=True, exist_ok=True)
    for name, dataset in zip(names, study.slices(series, image / slope, heights, range(len(heights))), strict=True):
        (folder / f"IM{number:03d}{name:04d}").write_bytes(_encode(dataset))


def write_archives(folder: Path, config: CohortConfig, cases: int, plan: ArchivePlan | None = None) -> list[Path]:
    """Write ``1000000_20201_2_0.zip, ...``, and their true labels beside, on the grid of the stitched scans.

    Args:
        folder: gets ``archives`` and ``truth/CASE.nii.gz``.
        config: of the cohort.
        cases: how many subjects.
        plan: of every scan; by default stations of random gain, and one in ten with water and fat exchanged.

    Returns:
        The archives.
    """
    paths = []
    for index in range(cases):
        case = make_case(config, index)
        generator = np.random.default_rng([config.seed, index, 0xD1C0])
        own = plan or ArchivePlan(
            gains=tuple(float(value) for value in np.exp(generator.normal(0, 0.1, 6))),
            swapped=frozenset(k for k in range(1, 7) if generator.random() < 0.1),
        )
        path = folder / "archives" / f"{1000000 + index}_20201_2_0.zip"
        write_archive(path, case.image, config.geometry, own, seed=index)
        write_labels(case.labels, config.geometry, folder / "truth" / f"{path.stem}.nii.gz")
        paths.append(path)
    return paths
