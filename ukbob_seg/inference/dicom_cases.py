"""Cases that are folders of DICOM files: found, matched to the model's channels, predicted, and answered in DICOM."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ukbob_seg.conversion.dicom_files import holds_dicom, load_pydicom
from ukbob_seg.conversion.dicom_series import Series, read_series
from ukbob_seg.conversion.dixon import CONTRASTS, contrast_of
from ukbob_seg.dataset.image_io import write_image
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import ConfigError, DatasetError, listing
from ukbob_seg.inference.earlier import PredictionJob

if TYPE_CHECKING:
    from ukbob_seg.inference.case_predictor import CasePredictor

SEGMENTATION = "_seg.dcm"  # behind the name of a case


@dataclass(frozen=True)
class DicomJob(PredictionJob):
    """One case whose channels are DICOM series.

    Attributes:
        folder: of its files.
        channel_names: of the model.
        segmentation: DICOM Segmentation to write as well, or None.
    """

    folder: Path = Path()
    channel_names: tuple[str, ...] = ()
    segmentation: Path | None = None

    def is_finished(self) -> bool:
        """The DICOM Segmentation is written after the label map."""
        return super().is_finished() and (self.segmentation is None or self.segmentation.is_file())

    def run(self, predictor: CasePredictor, show: Callable[[int, int], None]) -> None:
        """Convert the series into files of this run alone, predict these."""
        try:
            series, problems = read_series(self.folder)
            if problems:
                raise DatasetError("; ".join(problems))
            chosen = choose_series(series, self.channel_names)
            volumes = [each.voxels() for each in chosen]
        except DatasetError as error:
            raise DatasetError(f"case {self.name} ({self.folder}): {error}") from error
        if self.segmentation is not None:
            self.segmentation.unlink(missing_ok=True)
        with TemporaryDirectory(prefix=f".{self.name}-", dir=self.output.parent) as scratch:
            paths = [Path(scratch) / f"{self.name}_{channel:04d}.nii" for channel in range(len(volumes))]
            for voxels, path in zip(volumes, paths, strict=True):
                write_image(voxels, chosen[0].geometry, path)
            del volumes
            prediction = predictor.predict_case(paths, self.output, show)
        if self.segmentation is not None:
            from ukbob_seg.inference.dicom_seg import write_dicom_seg

            write_dicom_seg(prediction.labels, predictor.written, chosen[0], self.segmentation)


def find_dicom_jobs(source: Path, output: Path, spec: DatasetSpec, dicom_seg: bool = False) -> list[PredictionJob]:
    """Cases of a folder: one, where it holds DICOM files itself, else every folder in it that does, at any depth.

    Args:
        source: a folder without files of the model's own format.
        output: a folder, or for one case also the name of the label file.
        spec: channels and file ending of the model.
        dicom_seg: write DICOM Segmentations.

    Returns:
        No jobs where the source is no such folder.

    Raises:
        ConfigError: DICOM was found, but the packages are not installed.
    """
    if not source.is_dir():
        return []
    if any(path.name.endswith(spec.file_ending) for path in source.iterdir()):
        return []
    folders = [source] if holds_dicom(source.glob("*")) else []
    if not folders:
        inside = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
        folders = [path for path in inside if holds_dicom(path.rglob("*"))]
    if folders:
        load_pydicom()
    if folders and dicom_seg:
        from ukbob_seg.inference.dicom_seg import load_highdicom

        load_highdicom()
    jobs: list[PredictionJob] = []
    for folder in folders:
        name = folder.resolve().name
        label = output / f"{name}{spec.file_ending}"
        if len(folders) == 1 and output.name.endswith(spec.file_ending):
            label = output
        beside = label.with_name(label.name.removesuffix(spec.file_ending) + SEGMENTATION) if dicom_seg else None
        jobs.append(DicomJob(name, (), label, spec.file_ending, folder, spec.channel_names, beside))
    return jobs


def choose_series(series: Sequence[Series], channels: Sequence[str]) -> list[Series]:
    """The series of each channel, on one grid.

    A single series is the channel of a model that has one. Otherwise a channel is a series whose Dixon contrast it
    names (fat, water, in-phase, out-of-phase), or else whose description holds its name as a word.

    Raises:
        DatasetError: none or several for a channel, an irregular one, or different grids.
    """
    if not series:
        raise DatasetError("no DICOM images")
    if len(series) == len(channels) == 1:
        chosen = list(series)
    else:
        chosen = [_of_channel(series, channel) for channel in channels]
    for each in chosen:
        if each.problems:
            raise DatasetError(f"series {each.number} ({each.description!r}): {'; '.join(each.problems)}")
    for each in chosen[1:]:
        names = (chosen[0].description, each.description)
        difference = chosen[0].geometry.difference(each.geometry, names)
        if difference is not None:
            raise DatasetError(f"{difference}; export series of one scan, or resample them to one grid")
    return chosen


def _of_channel(series: Sequence[Series], channel: str) -> Series:
    contrast = _contrast(channel)
    if contrast is not None:
        found = [each for each in series if contrast_of(each) == contrast]
    else:
        word = re.compile(rf"(?<![a-z0-9]){re.escape(channel.lower())}(?![a-z0-9])")
        found = [each for each in series if word.search(each.description.lower())]
    if len(found) != 1:
        there = listing([f"{each.number} ({each.description!r})" for each in series])
        state = "no series is" if not found else f"{len(found)} series are"
        raise DatasetError(f"{state} the channel {channel!r}; keep one such series in the folder, of: {there}")
    return found[0]


def _contrast(channel: str) -> str | None:
    """The Dixon contrast that a channel is named after."""
    plain = re.sub(r"^(outof|opposed|opp)", "out", re.sub(r"[^a-z]", "", channel.lower()))
    return plain if plain in CONTRASTS else None


def refuse_without_dicom(source: Path) -> ConfigError:
    """What to say where --dicom-seg was asked for images of another format."""
    return ConfigError(
        f"--dicom-seg: {source} holds no DICOM files to refer to; predict from DICOM series, or without it"
    )
