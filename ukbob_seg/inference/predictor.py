"""The predictor: loads a trained model once, predicts arrays and files."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.filtering.body import body_mask, otsu_threshold
from ukbob_seg.inference.case_predictor import CasePredictor, Prediction, Progress
from ukbob_seg.inference.entropy_map import EntropyMap
from ukbob_seg.inference.etta import adapted_to_case, norm_layers
from ukbob_seg.inference.etta_entropy import OutputMeaning
from ukbob_seg.inference.etta_field import remove_fields
from ukbob_seg.inference.export import (
    RowStream,
    WrittenClasses,
    box_shape,
    decide_resampled,
    probability_planes,
    probability_stream,
    to_file_values,
)
from ukbob_seg.inference.model_folder import first_stage_folder, load_folds, of_first_stage, postprocessing_of
from ukbob_seg.inference.passes import INTENSITY_CHANGES, AveragedPasses, Mirroring
from ukbob_seg.inference.postprocessing import Postprocessing
from ukbob_seg.inference.settings import PredictionSettings
from ukbob_seg.inference.sliding_window import (
    OWN_WEIGHTING,
    Accumulation,
    EmptySpace,
    Slab,
    WindowSettings,
    choose_accumulation,
    iterate_slabs,
)
from ukbob_seg.networks.compiled import maybe_compiled
from ukbob_seg.networks.precision import in_precision
from ukbob_seg.nnunet.folders import is_nnunet_model
from ukbob_seg.preprocessing.preprocessor import CaseProperties, preprocess_image, preprocess_labels
from ukbob_seg.training.checkpoint import ModelDescription
from ukbob_seg.training.left_right import label_swap, output_swap

log = logging.getLogger(__name__)
SURE = 10.0  # logit of background where nothing was predicted
# What the record of ETTA says of an image's field.
FIELD_USUAL = "left in: weak, or as in training images"
FIELD_REMOVED = "divided out"
FIELD_NEEDED = "left in: without it the predicted foreground collapsed"


@dataclass(frozen=True)
class CaseStream:
    """A case on its way through a model.

    Attributes:
        properties: where its grid lies in the file's.
        slabs: finished rows of logits; the windows run while these are taken.
        etta: one record per network, empty without adaptation.
        previous_stage: of a cascade, or None.
    """

    properties: CaseProperties
    slabs: Iterator[Slab]
    etta: tuple[dict[str, Any], ...]
    previous_stage: Prediction | None


class Predictor(CasePredictor):
    """A trained model, ready to predict on one device.

    Threads may share it: reading and preprocessing run side by side, the networks serve one case at a time.

    Args:
        networks: one per fold, in evaluation mode on ``device``; their logits are averaged.
        description: of the checkpoints.
        device: where the networks are.
        settings: how to predict.
        previous_stage: predictor whose label map is a further input, for the second stage of a cascade.
        postprocessing: of its label maps, None for none.

    Raises:
        ConfigError: classes that the model does not have, or a first stage is lacking.
    """

    # What models of another origin do otherwise.
    weighting = OWN_WEIGHTING  # of overlapping windows
    half = torch.bfloat16  # on CUDA
    intensity_changes: Sequence[tuple[float, float]] = INTENSITY_CHANGES  # of ``--tta``

    def __init__(
        self,
        networks: Sequence[nn.Module],
        description: ModelDescription,
        device: str = "cpu",
        settings: PredictionSettings | None = None,
        previous_stage: Predictor | None = None,
        postprocessing: Postprocessing | None = None,
    ) -> None:
        self._postprocessing = postprocessing or Postprocessing()
        self.settings = settings or PredictionSettings()
        self.device = device
        self.description = description
        self.spec = description.spec()
        self.written = WrittenClasses.of(self.spec.labels, self.settings.classes)
        self.plans = description.parsed_plans()
        self.configuration = self.plans.configuration(description.configuration)
        # Adaptation changes the networks for the time of a case. The stages of a cascade take turns, too.
        self._serving: threading.Lock = threading.Lock() if previous_stage is None else previous_stage._serving
        if self.settings.compile and self.settings.precision == "bfloat16" and device == "cpu":
            raise ConfigError("--compile and --precision bfloat16 exclude each other on a CPU; leave one of them out")
        self._networks = [in_precision(network, self.settings.precision) for network in networks]
        if self.settings.etta is not None:
            for network in self._networks:
                norm_layers(network)  # or say at once that there is none
        self._called = [maybe_compiled(network, self.settings.compile) for network in self._networks]
        network_plan = self.configuration.network(description.network)
        self._windows = WindowSettings(
            network_plan.patch_size,
            self.settings.step,
            self.settings.window_batch,
            self.configuration.slice_axis,
            self.weighting,
        )
        self._origin: list[str] = []
        self._files: list[Path] = []
        self._last_sums: Accumulation | None = None
        self._previous_stage = previous_stage
        if (previous_stage is not None) != (self.configuration.previous_stage is not None):
            raise ConfigError(
                f"{description.configuration} takes {self.configuration.previous_stage or 'no first stage'} as its "
                f"first stage, got {previous_stage and previous_stage.description.configuration}"
            )
        self._mirroring = Mirroring(
            axes=description.mirror_axes if self.settings.tta and self.settings.mirror else (),
            left_right_axis=self.plans.left_right_axis,
            output_swap=output_swap(self.spec.labels),
            input_swap=None if previous_stage is None else _table(label_swap(self.spec.labels)),
        )

    @classmethod
    def from_model_folder(
        cls,
        folder: Path,
        folds: Sequence[str] | None = None,
        checkpoint: str | None = None,
        device: str = "cpu",
        settings: PredictionSettings | None = None,
        previous_folds: Sequence[str] | None = None,
    ) -> Predictor:
        """Load a model folder (``CONFIG__NETWORK``), and for a cascade the first stage's, which lies beside it.

        Args:
            folder: holds ``fold_K`` folders; or a model of nnU-Net v2, a folder or an exported archive
                (``NnunetPredictor``).
            folds: which to average, None for every trained one.
            checkpoint: ``best`` or ``final``; None for best, of a model of nnU-Net final.
            device: where to predict.
            settings: how to predict, in both stages of a cascade.
            previous_folds: which folds of a cascade's first stage to average, None for every trained one.

        Raises:
            CheckpointError: nothing trained there, a fold is missing, or folds of different models.
        """
        if is_nnunet_model(Path(folder)):
            from ukbob_seg.inference.nnunet_predictor import NnunetPredictor

            return NnunetPredictor.from_nnunet(Path(folder), folds, checkpoint, device, settings, previous_folds)
        checkpoint = "best" if checkpoint is None else checkpoint
        loaded = load_folds(Path(folder), folds, checkpoint, device)
        first = loaded.description
        if settings is not None and settings.etta is not None and first.fields is None:
            log.warning("%s says nothing of the intensity fields of its training images: ETTA leaves fields in", folder)
        previous, beside = None, first_stage_folder(folder, first)
        if beside is not None:
            plain = of_first_stage(settings or PredictionSettings())
            previous = cls.from_model_folder(beside, previous_folds, checkpoint, device, plain)
        after = postprocessing_of(folder, first, settings)
        predictor = cls(loaded.networks, first, device, settings, previous, after)
        predictor._origin, predictor._files = loaded.origin, [Path(path) for path in loaded.origin]
        return predictor

    def with_settings(self, settings: PredictionSettings) -> Predictor:
        """As of all predictors; postprocessing stays as it was loaded."""
        previous = self._previous_stage
        if previous is not None:
            previous = previous.with_settings(of_first_stage(settings))
        other = self._again(settings, previous)
        other._serving, other._origin, other._files = self._serving, self._origin, self._files
        return other

    def _again(self, settings: PredictionSettings, previous: Predictor | None) -> Predictor:
        """A predictor of the same networks."""
        return Predictor(self._networks, self.description, self.device, settings, previous, self._postprocessing)

    def origin(self) -> list[str]:
        """Checkpoints of the folds, and of the stages before; nothing for networks that were given."""
        return [*self._origin, *(self._previous_stage.origin() if self._previous_stage is not None else [])]

    def checkpoint_files(self) -> list[Path]:
        """The files of ``origin``."""
        return [*self._files, *(self._previous_stage.checkpoint_files() if self._previous_stage is not None else [])]

    def predict_array(
        self,
        image: np.ndarray,
        geometry: Geometry,
        probabilities: Path | None = None,
        progress: Progress | None = None,
    ) -> Prediction:
        """Segment one image; see ``CasePredictor.predict_array``."""
        with self.stream(image, geometry, progress) as case:
            entropy = EntropyMap(case.properties, self.description.head) if self.settings.save_entropy else None
            decision = self._decide(case, probabilities, entropy)
        labels = to_file_values(decision, case.properties, self.written.decision_values)
        labels = self._postprocessing.apply(labels, self.spec.labels)
        return Prediction(labels, case.etta, case.previous_stage, None if entropy is None else entropy.values)

    @contextmanager
    def stream(self, image: np.ndarray, geometry: Geometry, progress: Progress | None = None) -> Iterator[CaseStream]:
        """Prepare one image, adapt the networks for the duration of the block, and give logits as they are finished.

        Other threads wait for the networks meanwhile. Postprocessing is left to the caller.

        Args:
            image: (C, Z, Y, X) float32 as read from file.
            geometry: its grid.
            progress: called with (windows done, windows in all).

        Raises:
            DatasetError: wrong number of channels, or voxels that are not finite.
        """
        if not np.isfinite(image).all():
            raise DatasetError("the image has NaN or infinite voxels; replace them (for example by 0)")
        # Adaptation takes gradients, which a caller's inference mode would forbid.
        with torch.inference_mode(False):
            first = None
            if self._previous_stage is not None:
                first = self._previous_stage.predict_array(image, geometry, progress=progress)
            array, properties = self._prepare(image, geometry, None if first is None else first.labels)
            tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
            flat, fields = self._without_fields(tensor)
            with self._serving, self._adapted_networks(tensor, flat, progress) as (networks, chosen, records):
                changes = self.intensity_changes if self.settings.tta else ()
                passes = AveragedPasses(networks, self._mirroring, changes, len(self.spec.channel_names), self.half)
                if fields["fields_removed"] and chosen is tensor:
                    fields |= {"fields_removed": [], "field_decision": FIELD_NEEDED}
                etta = tuple({**record, **fields} for record in records)
                yield CaseStream(properties, self._slabs(passes, chosen, progress), etta, first)

    def _prepare(
        self, image: np.ndarray, geometry: Geometry, first: np.ndarray | None
    ) -> tuple[np.ndarray, CaseProperties]:
        """What the networks take of an image as read: (C, z, y, x) float32, with the label indices of the first stage
        as a further channel in a cascade; ``first`` are its label values (Z, Y, X).
        """
        array, properties = preprocess_image(image, geometry, self.plans, self.configuration)
        if first is None:
            return array, properties
        indices = preprocess_labels(self.spec.labels.to_indices(first, "the first stage"), properties)
        return np.concatenate([array, indices.astype(np.float32)[None]]), properties

    def stages(self) -> list[Predictor]:
        """This predictor and, in a cascade, those of the stages before it."""
        return [self, *(self._previous_stage.stages() if self._previous_stage is not None else [])]

    def close(self) -> None:
        """Let go of the networks and their memory; waits for a case that another thread predicts."""
        with self._serving:
            self._networks.clear()
            self._called.clear()
        if self._previous_stage is not None:
            self._previous_stage.close()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _without_fields(self, image: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """The image as ETTA wants it, and what its record says of that."""
        etta = self.settings.etta
        usual = self.description.fields
        if etta is None or etta.least_field_gain is None or usual is None:
            return image, {"fields_removed": []}
        limits = etta.least_field_gain, etta.least_field_spread, etta.field_margin
        flat, fields, removed = remove_fields(image, self.plans.normalization, usual, *limits)
        return flat, {
            "field_gains": [None if field is None else field.gain for field in fields],
            "field_spreads": [
                None if field is None else field.spread(expected) for field, expected in zip(fields, usual, strict=True)
            ],
            "fields_removed": list(removed),
            "field_decision": FIELD_REMOVED if removed else FIELD_USUAL if any(fields) else None,
        }

    @contextmanager
    def _adapted_networks(
        self, image: torch.Tensor, flat: torch.Tensor, progress: Progress | None
    ) -> Iterator[tuple[list[nn.Module], torch.Tensor, list[dict[str, Any]]]]:
        """The networks as trained, or adapted to this image for the duration of the block; and what they shall see, the
        image or that without a field.

        ``progress`` is called before every pass of the adaptation too, so that it can end that by raising.
        """
        if not self._networks:
            raise ConfigError("this predictor is closed; load the model again")
        if self.settings.etta is None:
            yield self._called, image, []
            return
        meaning = OutputMeaning(self.description.head, self.spec.labels.has_regions)
        with ExitStack() as stack:
            with ExitStack() as hooks:
                for network in self._networks:
                    hooks.callback(network.register_forward_pre_hook(partial(_tell, progress)).remove)
                adapting = adapted_to_case(self._networks, image, flat, self._windows, meaning, self.settings.etta)
                chosen, records = stack.enter_context(adapting)
            yield self._called, chosen, [record.to_json() for record in records]

    def _slabs(self, passes: AveragedPasses, image: torch.Tensor, progress: Progress | None) -> Iterator[Slab]:
        """Finished rows; what memory is free is asked when the first is wanted, as other models may be at work too."""
        sums = choose_accumulation(self.spec.labels.num_outputs, image, self._windows)
        if sums != self._last_sums:  # once, not for every case
            log.info("%s", sums.reason)
            self._last_sums = sums
        empty = self._empty_space(image) if self.settings.skip_empty else None
        yield from iterate_slabs(passes, image, self._windows, progress, sums, empty)

    def _decide(self, case: CaseStream, probabilities: Path | None, entropy: EntropyMap | None) -> np.ndarray:
        """Decision for the kept box at the file's resolution; all classes are held for a few rows only."""
        regions, properties = self.spec.labels.has_regions, case.properties
        result: np.ndarray = np.empty(box_shape(properties), dtype=np.uint16)
        rows = RowStream(properties)
        with probability_stream(probabilities, properties, self.spec.labels) as stream:
            for slab in case.slabs:
                logits, planes = rows.push(slab)
                # On the device they stay there: only the decision comes back.
                deciding = self.written.deciding(logits)
                result[planes.start : planes.stop] = decide_resampled(deciding, properties, regions, planes)
                sinks = [sink for sink in (stream, entropy) if sink is not None]
                if sinks:
                    for values in probability_planes(logits, properties, self.description.head, planes):
                        for sink in sinks:
                            sink.append(values)
        return result

    def _empty_space(self, image: torch.Tensor) -> EmptySpace | None:
        """What lies outside of the body, with the logits of sure background (of no region)."""
        try:
            channel = image[0].float().cpu().numpy()
            # The body, with its dark cavities; and everything bright beside it, such as arms and legs.
            occupied = torch.from_numpy(body_mask(channel) | (channel > otsu_threshold(channel)))
        except DatasetError as error:  # a constant image
            log.warning("--skip-empty: %s; all of it is predicted", error)
            return None
        logits = torch.full((self.spec.labels.num_outputs,), -SURE)
        if not self.spec.labels.has_regions:
            logits[0] = SURE
        return EmptySpace(occupied, logits)


def _tell(progress: Progress | None, *_: Any) -> None:
    """As a hook before a pass: nothing of the windows is done yet."""
    if progress is not None:
        progress(0, 0)


def _table(swap: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if swap is None else tuple(swap.tolist())
