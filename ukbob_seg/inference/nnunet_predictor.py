"""Models of nnU-Net v2 as predictors: nnU-Net's preprocessing, windows and mirroring, everything else as ours."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.dataset.orientation import Turn, is_oblique, turn_to
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.inference.case_predictor import PROBABILITIES, Prediction, Progress
from ukbob_seg.inference.postprocessing import Postprocessing
from ukbob_seg.inference.predictor import CaseStream, Predictor, of_first_stage, postprocessing_of
from ukbob_seg.inference.settings import PredictionSettings
from ukbob_seg.inference.sliding_window import NNUNET_WEIGHTING
from ukbob_seg.nnunet.folders import find_first_stage
from ukbob_seg.nnunet.model import NnunetModel
from ukbob_seg.nnunet.resampling import nnunet_shape, resample_intensities, resample_segmentation
from ukbob_seg.preprocessing.cropping import nonzero_box, nonzero_mask
from ukbob_seg.preprocessing.normalization import normalize
from ukbob_seg.preprocessing.preprocessor import CaseProperties
from ukbob_seg.preprocessing.resampling import resample_image
from ukbob_seg.preprocessing.storage import open_array, plane_writer

log = logging.getLogger(__name__)
PLANES = 8  # of probabilities that are turned back at once


class NnunetPredictor(Predictor):
    """A trained model of nnU-Net, ready to predict.

    ``tta`` flips along the axes that nnU-Net's training mirrored, as nnUNetv2_predict does unless told otherwise, and
    changes no intensities. Images are turned, divided and turned back where the model wants that.

    Args:
        networks: one per fold.
        model: that they are of.
        device: where they are.
        settings: how to predict.
        previous_stage: of a cascade.
        postprocessing: of label maps.
    """

    weighting = NNUNET_WEIGHTING
    half = torch.float16  # the precision that nnU-Net trains and predicts in
    intensity_changes = ()

    def __init__(
        self,
        networks: Sequence[nn.Module],
        model: NnunetModel,
        device: str = "cpu",
        settings: PredictionSettings | None = None,
        previous_stage: Predictor | None = None,
        postprocessing: Postprocessing | None = None,
    ) -> None:
        super().__init__(networks, model.description, device, settings, previous_stage, postprocessing)
        self.model = model
        # nnU-Net flips images and label maps alike, whatever the labels are called.
        self._mirroring = dataclasses.replace(self._mirroring, output_swap=None, input_swap=None)
        self._origin, self._files = model.origin(), model.checkpoint_files()

    @classmethod
    def from_nnunet(
        cls,
        folder: Path,
        folds: Sequence[str] | None = None,
        checkpoint: str | None = None,
        device: str = "cpu",
        settings: PredictionSettings | None = None,
        previous_folds: Sequence[str] | None = None,
    ) -> NnunetPredictor:
        """Load a model folder or archive of nnU-Net; arguments as of ``Predictor.from_model_folder``.

        Raises:
            CheckpointError: nothing usable there; names the file.
        """
        model = NnunetModel.load(folder, folds, checkpoint)
        previous = None
        if model.previous_stage is not None:
            beside = find_first_stage(model.files, model.previous_stage)
            plain = of_first_stage(settings or PredictionSettings())
            first = NnunetModel.of_files(beside, previous_folds, checkpoint)
            previous = cls(first.networks(device), first, device, plain)
        log.info("nnU-Net model %s, fold %s (%s)", model.files.shown, ", ".join(model.folds), model.checkpoint)
        if settings is not None and settings.etta is not None:
            log.warning(
                "%s says nothing of the intensity fields of its training images: ETTA leaves fields in",
                model.files.shown,
            )
        if settings is not None and settings.tta and not model.description.mirror_axes:
            log.warning("%s was trained without mirroring: --tta changes nothing", model.files.shown)
        if model.roi is not None:
            log.info(
                "%s takes the label map of ROI model %s as its last channel: ukbob_label --roi-model predicts that, "
                "ukbob_predict reads it from CASE_%04d",
                model.files.shown, model.roi, len(model.description.spec().channel_names) - 1,
            )  # fmt: skip
        after = postprocessing_of(model.files.folder, model.description, settings)
        return cls(model.networks(device), model, device, settings, previous, after)

    def turn_of(self, geometry: Geometry) -> Turn:
        """How an image is turned before it is predicted."""
        code = self.model.rules.orientation
        return Turn() if code is None else turn_to(geometry, code)

    def predict_array(
        self,
        image: np.ndarray,
        geometry: Geometry,
        probabilities: Path | None = None,
        progress: Progress | None = None,
    ) -> Prediction:
        """Segment one image; see ``CasePredictor.predict_array``. Everything is on the grid of the input."""
        turn = self.turn_of(geometry)
        if turn.is_identity:
            return super().predict_array(image, geometry, probabilities, progress)
        if is_oblique(geometry):
            log.warning("an image is oblique to the patient's axes; the model expects %s", self.model.rules.orientation)
        turned = np.ascontiguousarray(turn.apply(image))
        if probabilities is None:
            found = super().predict_array(turned, turn.geometry(geometry), None, progress)
        else:
            with tempfile.TemporaryDirectory(dir=probabilities.parent, prefix=".turned-") as folder:
                path = Path(folder) / f"case{PROBABILITIES}"
                found = super().predict_array(turned, turn.geometry(geometry), path, progress)
                _turn_back(path, probabilities, turn)
        return _turned_prediction(found, turn)

    @contextmanager
    def stream(self, image: np.ndarray, geometry: Geometry, progress: Progress | None = None) -> Iterator[CaseStream]:
        """As of all predictors, for images that need no turn: rows come in the order of the turned image.

        Raises:
            ConfigError: the image has another orientation than the model wants, in an average of several models.
        """
        if not self.turn_of(geometry).is_identity:
            raise ConfigError(
                f"{self.model.files.shown} turns images to {self.model.rules.orientation} and cannot be averaged with "
                "other models on the fly; predict each with --save-probabilities and average with ukbob_ensemble"
            )
        with super().stream(image, geometry, progress) as case:
            yield case

    def _again(self, settings: PredictionSettings, previous: Predictor | None) -> Predictor:
        return NnunetPredictor(self._networks, self.model, self.device, settings, previous, self._postprocessing)

    def _prepare(
        self, image: np.ndarray, geometry: Geometry, first: np.ndarray | None
    ) -> tuple[np.ndarray, CaseProperties]:
        """nnU-Net's preprocessing: crop, normalise, resample, in this order."""
        channels = len(self.plans.normalization)
        if len(image) != channels:
            raise DatasetError(f"the image has {len(image)} channels, the model takes {channels}")
        rules, box = self.model.rules, nonzero_box(image)
        cropped = _divided(image[(slice(None), *box)], rules.most_intensity, rules.divided_intensity)
        indices = None
        if first is not None:
            indices = self.spec.labels.to_indices(first, "the first stage")[box]
        mask = None
        if indices is not None or any(entry.mask_nonzero for entry in self.plans.normalization):
            mask = nonzero_mask(cropped)
        if (
            indices is not None and mask is not None
        ):  # outside of the image is a label of its own, when shares are taken
            mask = mask | (indices > 0)
            indices = np.where(mask, indices.astype(np.int16), -1)
        own_mm = geometry.spacing_mm
        target_mm = self.configuration.target_spacing(own_mm)
        shape = nnunet_shape(cropped.shape[1:], own_mm, target_mm)
        normalized = normalize(cropped, self.plans.normalization, mask)
        array = resample_intensities(normalized, shape, rules.data, rules.data.coarse_axis(own_mm, target_mm))
        if rules.label_channel is not None and array.shape != normalized.shape:
            part = slice(rules.label_channel, rules.label_channel + 1)
            array[part] = resample_image(normalized[part], shape, order=0)
        if indices is not None:
            axis = rules.segmentation.coarse_axis(own_mm, target_mm)
            labels = resample_segmentation(indices, shape, rules.segmentation, axis).clip(min=0)
            array = np.concatenate([array, labels.astype(np.float32)[None]])
        # Linear along a coarse axis as well is plain linear interpolation.
        axis = rules.probabilities.coarse_axis(target_mm, own_mm) if rules.probabilities.order_z == 0 else None
        start, stop = _triple([s.start for s in box]), _triple([s.stop for s in box])
        return array, CaseProperties(geometry, start, stop, shape, axis)


def _divided(image: np.ndarray, most: float | None, wanted: float) -> np.ndarray:
    """Channels whose maximum exceeds ``most`` divided so that it becomes ``wanted``; never the array itself."""
    if most is None:
        return image
    tops = [float(channel.max()) for channel in image]
    return np.stack([part * (wanted / top) if top > most else part for part, top in zip(image, tops, strict=True)])


def _triple(values: Sequence[int]) -> tuple[int, int, int]:
    z, y, x = values
    return int(z), int(y), int(x)


def _turned_prediction(found: Prediction, turn: Turn) -> Prediction:
    previous = found.previous_stage
    return dataclasses.replace(
        found,
        labels=np.ascontiguousarray(turn.undo(found.labels)),
        entropy=None if found.entropy is None else np.ascontiguousarray(turn.undo(found.entropy)),
        previous_stage=None if previous is None else _turned_prediction(previous, turn),
    )


def _turn_back(path: Path, target: Path, turn: Turn) -> None:
    """Write stored probabilities (K, z, y, x) of a turned image as those of the image, some planes at a time."""
    stored = open_array(path, mapped=False)
    outputs, *turned_shape = stored.shape
    shape = _triple([turned_shape[turn.axes.index(axis)] for axis in range(3)])
    across = turn.axes.index(0)  # the turned array's axis that the file's planes lie across
    with plane_writer(target, (outputs, *shape), stored.dtype) as writer:
        for start in range(0, shape[0], PLANES):
            stop = min(start + PLANES, shape[0])
            chosen = slice(shape[0] - stop, shape[0] - start) if turn.reversed[across] else slice(start, stop)
            selection = (slice(None), *(chosen if axis == across else slice(None) for axis in range(3)))
            writer.append(np.ascontiguousarray(turn.undo(stored[selection])))
