"""Label a cohort: predict every case and write images and label maps as one raw dataset.

The dataset holds ``imagesTr`` (links, or copies), ``labelsTr`` and dataset.json, and beside them ``labelling/`` with a
record per case and ``labelling.json``, which says how the labels were made. A case is finished when it has its label
map and its record; the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ukbob_seg.dataset.image_io import read_geometry
from ukbob_seg.dataset.orientation import orientation_of
from ukbob_seg.dataset.spec import Case
from ukbob_seg.errors import ConfigError
from ukbob_seg.files import ensure_writable, write_json
from ukbob_seg.inference.case_predictor import CasePredictor, Progress
from ukbob_seg.inference.earlier import what_matters
from ukbob_seg.inference.ensemble_predictor import load_predictor
from ukbob_seg.inference.settings import PredictionSettings
from ukbob_seg.labelling.checks import orientation_warnings
from ukbob_seg.labelling.cohort import Cohort
from ukbob_seg.labelling.fusion import FusedPredictor
from ukbob_seg.labelling.outputs import (
    HOW,
    RECORDS,
    difference,
    is_finished,
    label_names,
    label_path,
    place_images,
    write_table,
)
from ukbob_seg.parallel import HERE, Cluster, choose_workers, map_cases

log = logging.getLogger(__name__)
NAMES = ("auto", "model", "totalvibe")
CASES_AT_ONCE = 2  # one in the networks, one that is read or written


@dataclass(frozen=True)
class LabelOptions:
    """How a cohort is labelled.

    Attributes:
        model: folder or archive of a trained model: ours, or nnU-Net's.
        folds: to average; None for all.
        checkpoint: ``best`` or ``final``; None for what the kind of model takes by itself.
        devices: of this machine; each gets a process where there are several.
        settings: how to predict.
        channel: names or numbers of the cohort's channels that the model takes; None for all.
        fuse: channels to label one by one and to merge, instead.
        channel_names: of the cohort; None for those of its dataset.json.
        names: of the labels: ``model``, ``totalvibe``, or ``auto`` (TotalVibeSegmentator's for a model of its values).
        copy: images, instead of linking them.
        overwrite: labels that were made otherwise.
        workers: processes on a CPU; None for one, which uses all processors.
        cluster: part of the cases, and Dask.
        quiet: no progress bar.
    """

    model: Path
    folds: tuple[str, ...] | None = None
    checkpoint: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    settings: PredictionSettings = field(default_factory=PredictionSettings)
    channel: tuple[str, ...] | None = None
    fuse: tuple[str, ...] | None = None
    channel_names: tuple[str, ...] | None = None
    names: str = "auto"
    copy: bool = False
    overwrite: bool = False
    workers: int | None = None
    cluster: Cluster = HERE
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.names not in NAMES:
            raise ConfigError(f"--names must be one of {', '.join(NAMES)}, got {self.names!r}")
        if self.channel is not None and self.fuse is not None:
            raise ConfigError("--channel and --fuse exclude each other; give one of them")
        if self.fuse is not None and len(self.fuse) < 2:
            raise ConfigError("--fuse merges at least two channels; label a single one with --channel")


@dataclass(frozen=True)
class Labeller:
    """Labels one case after the other; picklable, and loads the model once per process.

    Attributes:
        options: all but the device.
        device: where to predict; ``auto`` for the process's own choice.
        channels: numbers of the cohort's channels that are given to the model.
        channel_names: their names.
        values: of the labels by name.
        output: dataset folder.
        ending: of its files.
    """

    options: LabelOptions
    device: str
    channels: tuple[int, ...]
    channel_names: tuple[str, ...]
    values: tuple[tuple[str, int], ...]
    output: Path
    ending: str

    def __call__(self, case: Case) -> str:
        """Label a case and write its files; returns its name."""
        return self.label(case)

    def label(self, case: Case, progress: Progress | None = None) -> str:
        """As a call; ``progress`` may end the case by raising."""
        predictor = _loaded(self)
        beside = self.output / RECORDS / f"{case.name}{self.ending}"
        images = [case.images[k] for k in self.channels]
        place_images(case, self.output / "imagesTr", self.options.copy)
        prediction = predictor.predict_case(images, beside, progress)
        geometry = read_geometry(images[0])
        warnings = orientation_warnings(prediction.labels, geometry, dict(self.values))
        for warning in warnings:
            log.warning("case %s: %s", case.name, warning)
        present = np.unique(prediction.labels)
        record = {
            "case": case.name,
            "orientation": orientation_of(geometry),
            "labels": int(np.count_nonzero(present)),
            "labelled_voxels": int(np.count_nonzero(prediction.labels)),
            "warnings": warnings,
        }
        write_json(self.output / RECORDS / f"{case.name}.json", record)
        label = label_path(self.output, case, self.ending)
        label.parent.mkdir(parents=True, exist_ok=True)
        os.replace(beside, label)  # the last of a case's files
        return case.name

    def all_of(self, share: tuple[Sequence[Case], int]) -> int:
        """Label many cases with one model: the next is read while the networks work on another.

        ``share`` is the cases and the row of the progress bar, -1 for none. Returns their number.
        """
        cases, row = share
        at_once = CASES_AT_ONCE if self.options.settings.overlap else 1
        given_up = threading.Event()

        def watch(*_: int) -> None:
            if given_up.is_set():
                raise _AbandonedError

        _loaded(self)  # before the threads, which would load it twice
        description = "labelling" if row <= 0 and len(self.options.devices) == 1 else f"labelling on {self.device}"
        with (
            tqdm(total=len(cases), desc=description, unit="case", disable=row < 0, position=max(row, 0)) as bar,
            ThreadPoolExecutor(min(at_once, max(1, len(cases)))) as pool,
        ):
            waiting = [pool.submit(self.label, case, watch) for case in cases]
            try:
                for done in as_completed(waiting):
                    done.result()
                    bar.update()
            except BaseException as error:  # also an interrupt: the pool would go on with all that is left
                if not isinstance(error, Exception):
                    given_up.set()
                for each in waiting:
                    each.cancel()
                raise
        return len(cases)


class _AbandonedError(Exception):
    """The user interrupted: nobody waits for this case."""


def label_cohort(source: Path, output: Path, options: LabelOptions) -> Path:
    """Label the cases of a cohort; those that are finished are left alone.

    Args:
        source: raw dataset, or folder of ``CASE_0000.ext`` files.
        output: dataset folder, ``DatasetXXX_Name``.
        options: how.

    Returns:
        ``output``.

    Raises:
        ConfigError: options that do not fit, or an output that holds labels made otherwise.
        DatasetError: a case cannot be read; finished ones are kept.
        CheckpointError: the model cannot be used.
    """
    cohort = Cohort.find(Path(source), options.channel_names)
    output = Path(output)
    if output.resolve() in (Path(source).resolve(), cohort.folder.resolve()):
        raise ConfigError(f"the output {output} is the cohort itself; give another folder with --output")
    labeller, predictor_record, content = _prepare(cohort, output, options)
    try:
        _label(cohort, output, labeller, predictor_record, content)
    finally:
        _close()
    return output


def _label(
    cohort: Cohort, output: Path, labeller: Labeller, predictor_record: dict[str, Any], content: dict[str, Any]
) -> None:
    """Write the dataset; cases that are finished are left alone."""
    options = labeller.options
    ensure_writable(output)
    changed = difference(output, predictor_record)
    if changed is not None and not options.overwrite:
        raise ConfigError(f"{output} holds labels made otherwise ({changed}); give another folder, or --overwrite")
    if changed is not None and options.cluster.part is not None:
        raise ConfigError(
            f"--overwrite with --part: parts could remove each other's labels; remove {output / 'labelsTr'} and "
            f"{output / HOW} first"
        )
    if changed is not None:
        for case in cohort.cases:
            label_path(output, case, cohort.file_ending).unlink(missing_ok=True)
    write_json(output / HOW, predictor_record)
    write_json(output / "dataset.json", content)
    mine = options.cluster.share(cohort.cases)
    todo = [case for case in mine if not is_finished(output, case, cohort.file_ending)]
    if todo:
        _run(labeller, todo, options)
    write_table(output)


def _prepare(cohort: Cohort, output: Path, options: LabelOptions) -> tuple[Labeller, dict[str, Any], dict[str, Any]]:
    """The labeller, the record of how it labels, and the content of dataset.json; the model is loaded for these."""
    device = options.devices[0]
    predictor: CasePredictor = load_predictor(
        [options.model], options.folds, options.checkpoint, device, options.settings
    )
    spec, origin = predictor.spec, predictor.origin()
    labels = label_names(spec, options.names)
    values = tuple((name, value) for name, value in labels.items() if isinstance(value, int) and value)
    if options.fuse is None:
        channels = cohort.choose(options.channel, len(spec.channel_names), "--channel")
    else:
        channels = cohort.choose(options.fuse, len(options.fuse), "--fuse")
        predictor = FusedPredictor(predictor, [cohort.channel_names[k] for k in channels], dict(values))
    names = tuple(cohort.channel_names[k] for k in channels)
    record = {
        "checkpoints": origin,
        "settings": what_matters(options.settings),
        "channels": list(names),
        "merged": options.fuse is not None,
        "labels": labels,
    }
    content: dict[str, Any] = {
        "channel_names": {str(k): name for k, name in enumerate(cohort.channel_names)},
        "labels": labels,
        "numTraining": len(cohort.cases),
        "file_ending": cohort.file_ending,
        "name": output.name,
        "description": f"labelled by {spec.name} with ukbob_label; see {HOW}",
    }
    if "regions_class_order" in spec.content and spec.labels.has_regions:
        content["regions_class_order"] = spec.content["regions_class_order"]
    labeller = Labeller(options, device, channels, names, values, output.resolve(), cohort.file_ending)
    _MODELS[labeller] = predictor
    return labeller, json.loads(json.dumps(record)), content


def _run(labeller: Labeller, todo: Sequence[Case], options: LabelOptions) -> None:
    """On the machines and devices that there are."""
    quiet, devices = options.quiet, options.devices
    if options.cluster.scheduler is not None:
        elsewhere = dataclasses.replace(labeller, device="auto")
        map_cases(elsewhere, todo, description="labelling", quiet=quiet, scheduler=options.cluster.scheduler)
    elif len(devices) > 1:
        shares = [(device, todo[k :: len(devices)]) for k, device in enumerate(devices)]
        items = [
            (dataclasses.replace(labeller, device=device), (share, -1 if quiet else row))
            for row, (device, share) in enumerate(shares)
            if share
        ]
        map_cases(_label_share, items, workers=len(items), description="labelling", quiet=True)
    elif options.workers is not None and choose_workers(options.workers, len(todo)) > 1:
        workers = choose_workers(options.workers, len(todo))
        map_cases(labeller, todo, workers=workers, description="labelling", quiet=quiet)
    else:
        labeller.all_of((todo, -1 if quiet else 0))


def _label_share(item: tuple[Labeller, tuple[Sequence[Case], int]]) -> int:
    return item[0].all_of(item[1])


_MODELS: dict[Labeller, CasePredictor] = {}  # at most one, of this process


def _close() -> None:
    while _MODELS:
        _MODELS.popitem()[1].close()


def _loaded(labeller: Labeller) -> CasePredictor:
    """The model of a process, loaded when it is first needed."""
    if labeller in _MODELS:
        return _MODELS[labeller]
    _close()
    options, device = labeller.options, labeller.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    predictor: CasePredictor = load_predictor(
        [options.model], options.folds, options.checkpoint, device, options.settings
    )
    if options.fuse is not None:
        predictor = FusedPredictor(predictor, labeller.channel_names, dict(labeller.values))
    _MODELS[labeller] = predictor
    return predictor
