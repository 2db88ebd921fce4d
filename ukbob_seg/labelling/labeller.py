"""Labels cases: what every process, thread and Dask worker runs."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ukbob_seg.allocator import reuse_freed_memory
from ukbob_seg.dataset.image_io import read_geometry
from ukbob_seg.dataset.orientation import orientation_of
from ukbob_seg.dataset.spec import Case
from ukbob_seg.errors import DatasetError, stops_all
from ukbob_seg.files import write_json
from ukbob_seg.inference.case_predictor import CasePredictor, Progress
from ukbob_seg.labelling.checks import orientation_warnings
from ukbob_seg.labelling.devices import device_of_worker
from ukbob_seg.labelling.fusion import FusedPredictor
from ukbob_seg.labelling.options import LabelOptions
from ukbob_seg.labelling.outputs import (
    RECORDS,
    image_stamps,
    label_path,
    place_images,
    record_path,
    remove_case,
)
from ukbob_seg.labelling.roi import load_model
from ukbob_seg.nnunet.archive import ArchiveKey, share_unpacked
from ukbob_seg.parallel import as_finished

log = logging.getLogger(__name__)
CASES_AT_ONCE = 2  # one in the networks, one that is read or written


@dataclass(frozen=True)
class Labeller:
    """Labels one case after the other; picklable, and loads the model once per process.

    Attributes:
        options: all but the device.
        device: where to predict; of a Dask worker what it is to choose from.
        channels: numbers of the cohort's channels that are given to the model.
        channel_names: their names.
        values: of the labels by name.
        output: dataset folder.
        ending: of its files.
        unpacked: of archives, by the process that fans out.
        is_elsewhere: in a Dask worker, which chooses its device.
    """

    options: LabelOptions
    device: str
    channels: tuple[int, ...]
    channel_names: tuple[str, ...]
    values: tuple[tuple[str, int], ...]
    output: Path
    ending: str
    unpacked: tuple[tuple[ArchiveKey, str], ...] = ()
    is_elsewhere: bool = False

    def __call__(self, case: Case) -> str:
        """Label a case and write its files; returns its name."""
        return self.label(case)

    def label(self, case: Case, progress: Progress | None = None) -> str:
        """As a call; ``progress`` may end the case by raising. What is wrong with a case goes into its record."""
        predictor = loaded(self)
        beside = self.output / RECORDS / f"{case.name}{self.ending}"
        images = [case.images[k] for k in self.channels]
        try:
            stamps = image_stamps(case)
            prediction = predictor.predict_case(images, beside, progress)
            geometry = read_geometry(images[0])
        except DatasetError as error:
            if stops_all(error):
                raise
            log.warning("case %s is left out: %s", case.name, error)
            remove_case(self.output, case, self.ending, images=True)  # of images that it had before
            write_json(record_path(self.output, case.name), {"case": case.name, "problem": str(error)})
            return case.name
        warnings = orientation_warnings(prediction.labels, geometry, dict(self.values))
        for warning in warnings:
            log.warning("case %s: %s", case.name, warning)
        place_images(case, self.output / "imagesTr", self.options.copy)
        record = {
            "case": case.name,
            "images": stamps,
            "orientation": orientation_of(geometry),
            "labels": int(np.count_nonzero(np.unique(prediction.labels))),
            "labelled_voxels": int(np.count_nonzero(prediction.labels)),
            "warnings": warnings,
        }
        label = label_path(self.output, case, self.ending)
        label.unlink(missing_ok=True)  # of other images, which the record would belie
        write_json(record_path(self.output, case.name), record)
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

        description = "labelling" if row <= 0 and len(self.options.devices) == 1 else f"labelling on {self.device}"
        with (
            tqdm(total=len(cases), desc=description, unit="case", disable=row < 0, position=max(row, 0)) as bar,
            ThreadPoolExecutor(min(at_once, max(1, len(cases)))) as pool,
        ):
            waiting: list[Future[str]] = []
            try:  # from the first on: an interrupt while the others are handed over would let all of those go on
                for case in cases:
                    waiting.append(pool.submit(self.label, case, watch))
                for done in as_finished(waiting):
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


_MODELS: dict[Labeller, CasePredictor] = {}  # at most one, of this process
_LOADING = threading.RLock()  # Dask workers have several threads, which share the model


def keep(labeller: Labeller, predictor: CasePredictor) -> None:
    """Use a model that is loaded already."""
    with _LOADING:
        close()
        _MODELS[labeller] = predictor


def close() -> None:
    """Let go of the model of this process."""
    with _LOADING:
        while _MODELS:
            _MODELS.popitem()[1].close()


def loaded(labeller: Labeller) -> CasePredictor:
    """The model of a process, loaded when it is first needed."""
    with _LOADING:
        if labeller not in _MODELS:
            close()
            reuse_freed_memory()
            share_unpacked(dict(labeller.unpacked))
            device = device_of_worker(labeller.device) if labeller.is_elsewhere else labeller.device
            predictor = load_model(labeller.options, device)
            _MODELS[labeller] = with_fusion(labeller.options, predictor, labeller.channel_names, dict(labeller.values))
        return _MODELS[labeller]


def with_fusion(
    options: LabelOptions, predictor: CasePredictor, channels: Sequence[str], values: dict[str, int]
) -> CasePredictor:
    """The predictor, or one of several channels that merges its label maps, where that is asked for."""
    return predictor if options.fuse is None else FusedPredictor(predictor, channels, values)
