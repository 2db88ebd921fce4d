"""Several models at once: each predicts, and their probabilities on the grid of the file are averaged plane by plane.

Models may differ in network, plans and spacing, so that their rows of logits do not match; planes of the file do. All
models advance in step: beyond what each needs for itself, a few planes of all classes are held per model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.errors import CheckpointError, ConfigError
from ukbob_seg.inference.case_predictor import CasePredictor, Prediction, Progress, fold_records
from ukbob_seg.inference.entropy_map import EntropyMap
from ukbob_seg.inference.export import (
    PLANES_AT_ONCE,
    RowStream,
    box_shape,
    decide_probabilities,
    probability_planes,
    probability_stream,
    to_file_values,
)
from ukbob_seg.inference.postprocessing import POSTPROCESSING, Postprocessing
from ukbob_seg.inference.predictor import CaseStream, Predictor
from ukbob_seg.inference.settings import PredictionSettings
from ukbob_seg.nnunet.folders import is_nnunet_model


class EnsemblePrediction(Prediction):
    """Result for one case; ``etta`` has one record per model."""

    def etta_record(self) -> dict[str, Any]:
        """What adaptation did to each model, as plain values."""
        return {"models": list(self.etta)}


class EnsemblePredictor(CasePredictor):
    """Models of the same channels and labels, whose probabilities are averaged.

    With ETTA each model adapts to the case by itself. ``spec``, ``plans``, ``settings`` and ``written`` are those of
    the first model; probabilities of all classes are averaged, whatever is written. What the models' own folders say
    of postprocessing is not done, as it was judged on each model alone. Threads may share an ensemble, but not two of
    the same models in different orders.

    Args:
        members: by name, for messages and records.
        largest_component: classes of which only the largest component is kept in the common label map.

    Raises:
        ConfigError: no model, or one predictor twice.
        CheckpointError: models of other channels or labels, or a class that they do not have.
    """

    def __init__(self, members: Mapping[str, Predictor], largest_component: Sequence[str] | None = None) -> None:
        if not members:
            raise ConfigError("an ensemble needs at least one model, got none")
        self._members = dict(members)
        stages = [id(stage) for member in members.values() for stage in member.stages()]
        if len(set(stages)) < len(stages):  # it would wait for itself
            raise ConfigError("one predictor serves two models of an ensemble; load it for each of them")
        (first_name, first), *others = self._members.items()
        for name, other in others:
            _check_same(first, other, (first_name, name))
        self.spec, self.plans = first.spec, first.plans
        self.settings, self.written = first.settings, first.written
        self._postprocessing = Postprocessing()
        if largest_component is not None:
            self._postprocessing = Postprocessing.of_names(largest_component, self.spec.labels, POSTPROCESSING)
            names = self._postprocessing.largest_component
            self.settings = dataclasses.replace(self.settings, largest_component=names)

    @classmethod
    def from_model_folders(
        cls,
        folders: Sequence[Path],
        folds: Sequence[str] | None = None,
        checkpoint: str | None = None,
        device: str = "cpu",
        settings: PredictionSettings | None = None,
    ) -> EnsemblePredictor:
        """Load model folders (``CONFIG__NETWORK``).

        Args:
            folders: at least one.
            folds: of each model, whose logits are averaged; None for every trained one.
            checkpoint: ``best`` or ``final``; None as ``Predictor.from_model_folder``.
            device: where to predict.
            settings: how to predict, with every model; ``largest_component`` is done to the common label map.

        Raises:
            ConfigError: a folder is given twice, or classes that the models do not have.
            CheckpointError: as ``Predictor.from_model_folder``, or models of other channels or labels.
        """
        places = [Path(folder).resolve() for folder in folders]
        if twice := [str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
            raise ConfigError(f"model folder {twice[0]} is given twice; give each model once")
        # What a model's own postprocessing removes was found in its own predictions, not in averages.
        wanted = settings or PredictionSettings()
        largest = wanted.largest_component if wanted.postprocessing else None
        settings = dataclasses.replace(wanted, postprocessing=False, largest_component=None)
        with ExitStack() as loaded:
            members = {}
            for folder in folders:
                member = Predictor.from_model_folder(Path(folder), folds, checkpoint, device, settings)
                members[str(folder)] = loaded.enter_context(member)
            predictor = cls(members, largest)
            loaded.pop_all()  # from here on close() lets go of them
        return predictor

    def with_settings(self, settings: PredictionSettings) -> EnsemblePredictor:
        """As of all predictors; postprocessing is that of these settings."""
        largest = settings.largest_component if settings.postprocessing else None
        plain = dataclasses.replace(settings, postprocessing=False, largest_component=None)
        return EnsemblePredictor({name: m.with_settings(plain) for name, m in self._members.items()}, largest)

    def predict_array(
        self,
        image: np.ndarray,
        geometry: Geometry,
        probabilities: Path | None = None,
        progress: Progress | None = None,
    ) -> EnsemblePrediction:
        """Segment one image; see ``CasePredictor.predict_array``. Windows of all models are counted together."""
        scheme, count = self.spec.labels, len(self._members)
        with ExitStack() as stack:
            cases = self._streams(image, geometry, progress, stack)
            properties = next(iter(cases.values())).properties
            decision: np.ndarray = np.empty(box_shape(properties), dtype=np.uint16)
            stream = stack.enter_context(probability_stream(probabilities, properties, scheme))
            heads = {member.description.head for member in self._members.values()}
            head = "sigmoid" if "sigmoid" in heads else "softmax"
            entropy = EntropyMap(properties, head) if self.settings.save_entropy else None
            sinks = [sink for sink in (stream, entropy) if sink is not None]
            for planes, blocks in self._blocks(cases):
                total = _sum(blocks)
                decision[planes] = self._decide(total, count)
                if sinks:
                    average = total / count
                    for sink in sinks:
                        sink.append(average)
        records = [
            {"model": name, **fold_records(case.etta, case.previous_stage)} for name, case in cases.items() if case.etta
        ]
        labels = to_file_values(decision, properties, self.written.decision_values)
        labels = self._postprocessing.apply(labels, self.spec.labels)
        return EnsemblePrediction(labels, tuple(records), entropy=None if entropy is None else entropy.values)

    def predict_subsets(
        self,
        image: np.ndarray,
        geometry: Geometry,
        subsets: Sequence[Sequence[str]],
        progress: Progress | None = None,
    ) -> list[np.ndarray]:
        """Label maps (Z, Y, X) of the averages of some of the models each, for which every model runs once.

        They are those of ensembles of these models; nothing is postprocessed.

        Args:
            image: (C, Z, Y, X) float32 as read from file.
            geometry: its grid.
            subsets: names of models, in the order in which an ensemble of them would have them.
            progress: called with (windows done, windows in all).
        """
        with ExitStack() as stack:
            cases = self._streams(image, geometry, progress, stack)
            properties = next(iter(cases.values())).properties
            decisions = [np.empty(box_shape(properties), dtype=np.uint16) for _ in subsets]
            place = {name: number for number, name in enumerate(cases)}
            for planes, blocks in self._blocks(cases):
                for decision, names in zip(decisions, subsets, strict=True):
                    decision[planes] = self._decide(_sum([blocks[place[name]] for name in names]), len(names))
        return [to_file_values(decision, properties, self.written.decision_values) for decision in decisions]

    def _streams(
        self, image: np.ndarray, geometry: Geometry, progress: Progress | None, stack: ExitStack
    ) -> dict[str, CaseStream]:
        """Every model's logits of the case, by name."""
        windows = _WindowCount(progress)
        cases = {
            name: stack.enter_context(member.stream(image, geometry, windows.of(name)))
            for name, member in self._members.items()
        }
        boxes = [case.properties.box for case in cases.values()]
        if any(box != boxes[0] for box in boxes):
            raise RuntimeError("the models crop this image differently")  # the box depends on the image alone
        return cases

    def _blocks(self, cases: Mapping[str, CaseStream]) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """The same planes of all models' probabilities, and where they are."""
        streams = [in_blocks(_planes(self._members[name], case), PLANES_AT_ONCE) for name, case in cases.items()]
        start = 0
        for blocks in zip(*streams, strict=True):
            stop = start + blocks[0].shape[1]
            yield slice(start, stop), blocks
            start = stop

    def _decide(self, total: Tensor, count: int) -> np.ndarray:
        """Decision of summed probabilities of so many models."""
        threshold = count / 2 if self.spec.labels.has_regions else None
        return decide_probabilities(self.written.deciding(total), threshold).cpu().numpy()

    def origin(self) -> list[str]:
        """Checkpoints of all models."""
        return [path for member in self._members.values() for path in member.origin()]

    def checkpoint_files(self) -> list[Path]:
        """The files of ``origin``."""
        return [path for member in self._members.values() for path in member.checkpoint_files()]

    def close(self) -> None:
        """Let go of all networks and their memory."""
        for member in self._members.values():
            member.close()


def load_predictor(
    folders: Sequence[Path],
    folds: Sequence[str] | None = None,
    checkpoint: str | None = None,
    device: str = "cpu",
    settings: PredictionSettings | None = None,
) -> Predictor | EnsemblePredictor:
    """One model folder, or the average of several; arguments as ``EnsemblePredictor.from_model_folders``.

    Raises:
        ConfigError: averages over flips without flips, of models that are averaged over nothing else.
    """
    if settings is not None and settings.tta and not settings.mirror and all(map(is_nnunet_model, map(Path, folders))):
        raise ConfigError(
            "--tta --no-mirror has no effect on a model of nnU-Net, which is averaged over flips alone; leave out "
            "--no-mirror for flips, or --tta for none"
        )
    if len(folders) == 1:
        return Predictor.from_model_folder(folders[0], folds, checkpoint, device, settings)
    return EnsemblePredictor.from_model_folders(folders, folds, checkpoint, device, settings)


def in_blocks(parts: Iterable[Tensor], depth: int) -> Iterator[Tensor]:
    """The same planes in blocks of one depth, whatever parts they come in.

    Args:
        parts: (K, n, Y, X) each, n from 0.
        depth: planes of a block; the last one may have fewer.
    """
    waiting: list[Tensor] = []
    count = 0
    for part in parts:
        rest = part
        while rest.shape[1]:
            taken, rest = rest[:, : depth - count], rest[:, depth - count :]
            waiting.append(taken)
            count += taken.shape[1]
            if count == depth:
                yield _joined(waiting)
                waiting, count = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _planes(member: Predictor, case: CaseStream) -> Iterator[Tensor]:
    """Probabilities of the kept box at the file's resolution, a few planes at a time."""
    rows = RowStream(case.properties)
    for slab in case.slabs:
        logits, planes = rows.push(slab)
        yield from probability_planes(logits, case.properties, member.description.head, planes)


def _sum(blocks: Sequence[Tensor]) -> Tensor:
    total = blocks[0].clone()
    for block in blocks[1:]:
        total += block.to(total.device)
    return total


class _WindowCount:
    """Adds up the windows of several models for one display."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._counts: dict[str, tuple[int, int]] = {}

    def of(self, name: str) -> Progress | None:
        """What one model calls."""
        if self._progress is None:
            return None
        tell = self._progress

        def show(done: int, total: int) -> None:
            self._counts[name] = (done, total)
            tell(*(sum(numbers) for numbers in zip(*self._counts.values(), strict=True)))

        return show


def _check_same(first: Predictor, other: Predictor, names: tuple[str, str]) -> None:
    """Refuse models that cannot be averaged.

    Raises:
        CheckpointError: other labels or channels.
    """
    difference = first.spec.labels.difference(other.spec.labels, names)
    mine, theirs = first.spec.channel_names, other.spec.channel_names
    if difference is None and mine != theirs:
        difference = f"channels differ: {', '.join(mine)} in {names[0]}, {', '.join(theirs)} in {names[1]}"
    if difference is not None:
        raise CheckpointError(f"{difference}; only models of the same labels and channels can be averaged")
