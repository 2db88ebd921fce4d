"""The predictor: loads a trained model once, predicts arrays and files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ukbob_seg.dataset.image_io import Geometry, read_image, write_labels
from ukbob_seg.errors import CheckpointError, ConfigError, DatasetError
from ukbob_seg.files import write_json
from ukbob_seg.inference.etta import OutputMeaning, adapted
from ukbob_seg.inference.export import (
    PROBABILITY,
    ProbabilityStream,
    RowStream,
    WrittenClasses,
    box_shape,
    decide_resampled,
    to_file_values,
)
from ukbob_seg.inference.passes import AveragedPasses, Mirroring
from ukbob_seg.inference.settings import PredictionSettings
from ukbob_seg.inference.sliding_window import WindowSettings, iterate_slabs
from ukbob_seg.inference.statistics import case_statistics
from ukbob_seg.networks.compiled import maybe_compiled
from ukbob_seg.preprocessing.preprocessor import CaseProperties, preprocess_image, preprocess_labels
from ukbob_seg.preprocessing.storage import plane_writer
from ukbob_seg.training.checkpoint import NAMES, ModelDescription, load_network
from ukbob_seg.training.left_right import label_swap, output_swap

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prediction:
    """Result for one case.

    Attributes:
        labels: (Z, Y, X) label values of dataset.json on the input's grid.
        etta: one record per network, empty without adaptation.
        previous_stage: of a cascade, or None.
    """

    labels: np.ndarray
    etta: tuple[dict[str, Any], ...]
    previous_stage: Prediction | None = None

    def etta_record(self) -> dict[str, Any]:
        """What adaptation did, as plain values, first stages included."""
        record: dict[str, Any] = {"folds": list(self.etta)}
        return (
            record if self.previous_stage is None else {**record, "previous_stage": self.previous_stage.etta_record()}
        )


class Predictor:
    """A trained model, ready to predict. One instance serves one device, one case at a time.

    Args:
        networks: one per fold, in evaluation mode on ``device``; their logits are averaged.
        description: of the checkpoints.
        device: where the networks are.
        settings: how to predict.
        previous_stage: predictor whose label map is a further input, for the second stage of a cascade.

    Raises:
        ConfigError: flips are asked of a model that was trained without any, classes that it does not have, or a first
            stage is lacking.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        description: ModelDescription,
        device: str = "cpu",
        settings: PredictionSettings | None = None,
        previous_stage: Predictor | None = None,
    ) -> None:
        self.settings = settings or PredictionSettings()
        self.device = device
        self.description = description
        self.spec = description.spec()
        self.written = WrittenClasses.of(self.spec.labels, self.settings.classes)
        self.plans = description.parsed_plans()
        self.configuration = self.plans.configuration(description.configuration)
        self._networks = list(networks)
        self._called = [maybe_compiled(network, self.settings.compile) for network in self._networks]
        network_plan = self.configuration.network(description.network)
        self._windows = WindowSettings(
            network_plan.patch_size, self.settings.step, self.settings.window_batch, self.configuration.slice_axis
        )
        self._previous_stage = previous_stage
        if (previous_stage is not None) != (self.configuration.previous_stage is not None):
            raise ConfigError(
                f"{description.configuration} takes {self.configuration.previous_stage or 'no first stage'} as its "
                f"first stage, got {previous_stage and previous_stage.description.configuration}"
            )
        if self.settings.tta and not description.mirror_axes:
            raise ConfigError("--tta averages over flips, but this model was trained without any; predict without it")
        self._mirroring = Mirroring(
            axes=description.mirror_axes if self.settings.tta else (),
            left_right_axis=self.plans.left_right_axis,
            output_swap=output_swap(self.spec.labels),
            input_swap=None if previous_stage is None else _table(label_swap(self.spec.labels)),
        )

    @classmethod
    def from_model_folder(
        cls,
        folder: Path,
        folds: Sequence[str] | None = None,
        checkpoint: str = "best",
        device: str = "cpu",
        settings: PredictionSettings | None = None,
        previous_folds: Sequence[str] | None = None,
    ) -> Predictor:
        """Load a model folder (``CONFIG__NETWORK``), and for a cascade the first stage's, which lies beside it.

        Args:
            folder: holds ``fold_K`` folders.
            folds: which to average, None for every trained one.
            checkpoint: ``best`` or ``final``.
            device: where to predict.
            settings: how to predict, in both stages of a cascade.
            previous_folds: which folds of a cascade's first stage to average, None for every trained one.

        Raises:
            CheckpointError: nothing trained there, a fold is missing, or folds of different models.
        """
        if checkpoint not in ("best", "final"):
            raise ConfigError(f"--checkpoint must be best or final, got {checkpoint!r}")
        found = find_folds(folder, checkpoint)
        chosen = list(folds) if folds else sorted(found)
        if twice := sorted({fold for fold in chosen if chosen.count(fold) > 1}):
            raise ConfigError(f"fold {twice[0]} is given twice")
        lacking = [fold for fold in chosen if fold not in found]
        if lacking or not chosen:
            raise CheckpointError(
                f"{folder} has no {NAMES[checkpoint]} for fold {', '.join(lacking) or 'any'} "
                f"(trained: {', '.join(sorted(found)) or 'none'})"
            )
        loaded = [load_network(found[fold], device) for fold in chosen]
        descriptions = [description for _, description in loaded]
        for other in descriptions[1:]:
            if dataclasses.replace(other, fold=descriptions[0].fold) != descriptions[0]:
                raise CheckpointError(
                    f"{folder}: folds {chosen} were trained with different plans or recipes; predict them apart"
                )
        log.info("model %s, fold %s (%s)", folder, ", ".join(chosen), NAMES[checkpoint])
        first = descriptions[0]
        stage = first.parsed_plans().configuration(first.configuration).previous_stage
        previous = None
        if stage is not None:
            beside = folder.resolve().with_name(f"{stage}__{first.network.replace(':', '.')}")
            everything = None if settings is None else dataclasses.replace(settings, classes=None)
            previous = cls.from_model_folder(beside, previous_folds, checkpoint, device, everything)
        return cls([network for network, _ in loaded], first, device, settings, previous)

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
        if not np.isfinite(image).all():
            raise DatasetError("the image has NaN or infinite voxels; replace them (for example by 0)")
        array, properties = preprocess_image(image, geometry, self.plans, self.configuration)
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        first = None
        if self._previous_stage is not None:
            first = self._previous_stage.predict_array(image, geometry, progress=progress)
            indices = preprocess_labels(self.spec.labels.to_indices(first.labels, "the first stage"), properties)
            tensor = torch.cat([tensor, torch.from_numpy(indices.astype(np.float32))[None].to(self.device)])
        with self._adapted_networks(tensor) as (networks, records):
            passes = AveragedPasses(networks, self._mirroring)
            decision = self._decide(passes, tensor, properties, probabilities, progress)
        labels = to_file_values(decision, properties, self.written.decision_values)
        return Prediction(labels, tuple(records), first)

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
        stem = _stem(output, self.spec.file_ending)
        path = output.with_name(f"{stem}_probabilities.b2nd") if self.settings.save_probabilities else None
        prediction = self.predict_array(image, geometry, path, progress)
        if prediction.etta:
            write_json(output.with_name(f"{stem}_etta.json"), prediction.etta_record())
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

    def close(self) -> None:
        """Let go of the networks and their memory."""
        self._networks.clear()
        self._called.clear()
        if self._previous_stage is not None:
            self._previous_stage.close()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _adapted_networks(self, image: torch.Tensor) -> Iterator[tuple[list[nn.Module], list[dict[str, Any]]]]:
        """The networks as trained, or adapted to this image for the duration of the block."""
        with ExitStack() as stack:
            meaning = OutputMeaning(self.description.head, self.spec.labels.has_regions)
            records = [
                stack.enter_context(adapted(network, image, self._windows, meaning, self.settings.etta)).to_json()
                for network in (self._networks if self.settings.etta is not None else [])
            ]
            yield self._called, records

    def _decide(
        self,
        passes: AveragedPasses,
        image: torch.Tensor,
        properties: CaseProperties,
        probabilities: Path | None,
        progress: Progress | None,
    ) -> np.ndarray:
        """Decision for the kept box at the file's resolution; all classes are held for a few rows only."""
        regions, box = self.spec.labels.has_regions, box_shape(properties)
        result: np.ndarray = np.empty(box, dtype=np.uint16)
        rows = RowStream(properties)
        with ExitStack() as stack:
            stream = None
            if probabilities is not None:
                shape = (self.spec.labels.num_outputs, *properties.geometry.shape)
                writer = stack.enter_context(plane_writer(probabilities, shape, PROBABILITY))
                stream = ProbabilityStream(writer, properties, self.description.head, exclusive=not regions)
            for slab in iterate_slabs(passes, image, self._windows, progress):
                logits, planes = rows.push(slab)
                # On the device they stay there: only the decision comes back.
                deciding = self.written.deciding(logits)
                result[planes.start : planes.stop] = decide_resampled(deciding, properties, regions, planes)
                if stream is not None:
                    stream.push(logits, planes)
        return result


def find_folds(folder: Path, checkpoint: str) -> dict[str, Path]:
    """Checkpoint of each trained fold of a model folder.

    Raises:
        CheckpointError: the folder does not exist.
    """
    if not folder.is_dir():
        raise CheckpointError(f"model folder {folder} does not exist; train first, or give it with -m")
    return {path.parent.name.removeprefix("fold_"): path for path in sorted(folder.glob(f"fold_*/{NAMES[checkpoint]}"))}


def _table(swap: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if swap is None else tuple(swap.tolist())


def _stem(path: Path, ending: str) -> str:
    return path.name.removesuffix(ending) if path.name.endswith(ending) else path.name.split(".")[0]
