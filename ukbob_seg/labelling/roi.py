"""The first releases of TotalVibeSegmentator: a model whose last channel is the label map of another one.

Their authors' program predicts the regions of the body on the image first, and gives the label map (0 to 11, as
numbers, resampled to nearest neighbours) to the model beside the image.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.case_predictor import CasePredictor, Prediction, Progress
from ukbob_seg.inference.ensemble_predictor import load_predictor
from ukbob_seg.inference.model_folder import of_first_stage
from ukbob_seg.inference.nnunet_predictor import NnunetPredictor
from ukbob_seg.inference.settings import PredictionSettings
from ukbob_seg.labelling.options import LabelOptions


class RoiPredictor(CasePredictor):
    """Predicts the label map of a ROI model, and then the model that takes it as its last channel.

    Args:
        inner: the model.
        roi: the ROI model, of the channels before.

    Raises:
        ConfigError: the ROI model takes other channels.
    """

    def __init__(self, inner: CasePredictor, roi: CasePredictor) -> None:
        names = inner.spec.channel_names[:-1]
        if len(roi.spec.channel_names) != len(names):
            raise ConfigError(
                f"--roi-model takes {len(roi.spec.channel_names)} channels, expected {len(names)}, as the model takes "
                "beside its label map"
            )
        content = {**inner.spec.content, "channel_names": {str(k): name for k, name in enumerate(names)}}
        self.spec = DatasetSpec.from_json(content, inner.spec.name)
        self.plans, self.settings, self.written = inner.plans, inner.settings, inner.written
        self._inner, self._roi = inner, roi

    def predict_array(
        self,
        image: np.ndarray,
        geometry: Geometry,
        probabilities: Path | None = None,
        progress: Progress | None = None,
    ) -> Prediction:
        """Segment one image; see ``CasePredictor.predict_array``."""
        regions = self._roi.predict_array(image, geometry, None, progress).labels
        given = np.concatenate([image, regions[None].astype(np.float32)])
        return self._inner.predict_array(given, geometry, probabilities, progress)

    def origin(self) -> list[str]:
        """Checkpoints of both models."""
        return [*self._inner.origin(), *self._roi.origin()]

    def checkpoint_files(self) -> list[Path]:
        """The files of ``origin``."""
        return [*self._inner.checkpoint_files(), *self._roi.checkpoint_files()]

    def with_settings(self, settings: PredictionSettings) -> RoiPredictor:
        """As of all predictors."""
        return RoiPredictor(self._inner.with_settings(settings), self._roi.with_settings(of_roi(settings)))

    def close(self) -> None:
        """Let go of both models."""
        self._inner.close()
        self._roi.close()


def of_roi(settings: PredictionSettings) -> PredictionSettings:
    """Settings of the ROI model: its label map is as of a first stage, and nothing adapts."""
    return dataclasses.replace(of_first_stage(settings), etta=None)


def load_model(options: LabelOptions, device: str) -> CasePredictor:
    """The model of some options, with its ROI model where it has one.

    Raises:
        ConfigError: a ROI model is lacking, or there is one too many.
        CheckpointError: a model cannot be used.
    """
    model = load_predictor([options.model], options.folds, options.checkpoint, device, options.settings)
    needed = model.model.roi if isinstance(model, NnunetPredictor) else None
    count = len(model.spec.channel_names)
    if options.roi_model is None:
        if needed is not None and len(options.channel or ()) != count:
            raise ConfigError(
                f"{options.model} takes as its last channel the label map of TotalVibeSegmentator's ROI model "
                f"{needed}: give that model with --roi-model, or take a release without (80), or name a channel of the "
                "cohort that is this map, as the last of --channel"
            )
        return model
    if needed is None:
        raise ConfigError(f"--roi-model has no effect: {options.model} takes no label map of one; leave it out")
    roi = load_predictor([options.roi_model], device=device, settings=of_roi(options.settings))
    if isinstance(roi, NnunetPredictor) and roi.model.roi is not None:
        raise ConfigError(f"--roi-model {options.roi_model} needs a ROI model itself; give the model {needed}")
    return RoiPredictor(model, roi)
