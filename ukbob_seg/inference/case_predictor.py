"""What all predictors share, of one model or of several: a case from its image files to its label file."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from ukbob_seg.dataset.image_io import Geometry, read_image, write_image, write_labels
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import CheckpointError, DatasetError
from ukbob_seg.files import file_sha256, write_json
from ukbob_seg.inference.export import WrittenClasses
from ukbob_seg.inference.settings import PredictionSettings
from ukbob_seg.inference.statistics import case_statistics
from ukbob_seg.preprocessing.plans import Plans

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
PROBABILITIES = "_probabilities.b2nd"  # behind the name of a case
SIDE_FILES = (PROBABILITIES, "_etta.json", "_statistics.json", "_preview.png")


@dataclass(frozen=True)
class Prediction:
    """Result for one case.

    Attributes:
        labels: (Z, Y, X) label values of dataset.json on the input's grid.
        etta: one record per network, empty without adaptation.
        previous_stage: of a cascade, or None.
        entropy: (Z, Y, X) float32 in nats, where the settings ask for it.
    """

    labels: np.ndarray
    etta: tuple[dict[str, Any], ...]
    previous_stage: Prediction | None = None
    entropy: np.ndarray | None = None

    def etta_record(self) -> dict[str, Any]:
        """What adaptation did, as plain values, first stages included."""
        return fold_records(self.etta, self.previous_stage)


def fold_records(etta: Sequence[dict[str, Any]], previous_stage: Prediction | None) -> dict[str, Any]:
    """What adaptation did to the folds of one model, and to those of its first stage."""
    record: dict[str, Any] = {"folds": list(etta)}
    return record if previous_stage is None else {**record, "previous_stage": previous_stage.etta_record()}


class CasePredictor(ABC):
    """Predicts arrays and files.

    Attributes:
        spec: channels, labels and file ending.
        plans: of the model.
        settings: how to predict, and what is written beside label maps.
        written: classes that label maps show.
    """

    spec: DatasetSpec
    plans: Plans
    settings: PredictionSettings
    written: WrittenClasses

    @abstractmethod
    def origin(self) -> list[str]:
        """Where the networks came from, for records."""

    @abstractmethod
    def checkpoint_files(self) -> list[Path]:
        """The files behind ``origin``, in its order; of an archive as they are unpacked for this process."""

    def checkpoint_hashes(self) -> dict[str, str]:
        """SHA-256 of the content of each checkpoint of ``origin``.

        Raises:
            CheckpointError: one was removed meanwhile.
        """
        try:
            return {name: file_sha256(path) for name, path in zip(self.origin(), self.checkpoint_files(), strict=True)}
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read again: {error.strerror}") from error

    @abstractmethod
    def with_settings(self, settings: PredictionSettings) -> CasePredictor:
        """The same networks, which both use in turn, with other settings."""

    @abstractmethod
    def predict_array(
        self,
        image: np.ndarray,
        geometry: Geometry,
        probabilities: Path | None = None,
        progress: Progress | None = None,
    ) -> Prediction:
        """Segment one image.

        Args:
            image: (C, Z, Y, X) float32 as read from file.
            geometry: its grid.
            probabilities: write class probabilities to this ``.b2nd`` file as well.
            progress: called with (windows done, windows in all).

        Raises:
            DatasetError: wrong number of channels, or voxels that are not finite.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the networks and their memory."""

    def predict_case(self, images: Sequence[Path], output: Path, progress: Progress | None = None) -> Prediction:
        """Segment the files of one case and write the label map at their geometry, last of all files.

        Args:
            images: one file per channel.
            output: label file; beside it go ``CASE_etta.json`` with ETTA, and what the settings ask for.
            progress: called with (windows done, windows in all).
        """
        channels = len(self.spec.channel_names)
        if len(images) != channels:
            raise DatasetError(f"{images[0]}: {len(images)} channel files for a model of {channels} channels")
        image, geometry = read_image(images)
        if constant := [name for name, values in zip(images, image, strict=True) if values.min() == values.max()]:
            log.warning("%s has the same value everywhere; it is predicted all the same", constant[0])
        stem = case_stem(output, self.spec.file_ending)
        path = output.with_name(f"{stem}{PROBABILITIES}") if self.settings.save_probabilities else None
        try:
            prediction = self.predict_array(image, geometry, path, progress)
        except DatasetError as error:
            raise DatasetError(f"{images[0]}: {error}") from error
        remove_outputs(output, self.spec.file_ending, () if path is None else (path,))
        if prediction.etta:
            write_json(output.with_name(f"{stem}_etta.json"), prediction.etta_record())
        if prediction.entropy is not None:
            write_image(prediction.entropy, geometry, output.with_name(f"{stem}_entropy{self.spec.file_ending}"))
        if self.settings.statistics:
            numbers = case_statistics(image, prediction.labels, geometry, self.written, self.spec.channel_names)
            write_json(output.with_name(f"{stem}_statistics.json"), numbers)
        if self.settings.preview:
            from ukbob_seg.inference.preview import write_preview  # drawing takes a second to load

            levels = self.plans.normalization[0].clip_range
            title = f"{stem}_preview.png"
            write_preview(output.with_name(title), stem, image[0], prediction.labels, geometry, self.written, levels)
        write_labels(prediction.labels, geometry, output)  # the case is finished when it has this file
        return prediction

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def remove_outputs(output: Path, ending: str, kept: Sequence[Path] = ()) -> None:
    """Remove what an earlier prediction of a case left: its label map first, then what lies beside it.

    Args:
        output: label file.
        ending: of the model's files.
        kept: what is there of the new prediction.
    """
    stem = case_stem(output, ending)
    beside = (output.with_name(f"{stem}{name}") for name in (*SIDE_FILES, f"_entropy{ending}"))
    for path in (output, *beside):
        if path not in kept:
            path.unlink(missing_ok=True)


def case_stem(path: Path, ending: str) -> str:
    """Name of a file without its ending, which need not be the model's."""
    return path.name.removesuffix(ending) if path.name.endswith(ending) else path.name.split(".")[0]
