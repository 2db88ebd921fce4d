"""The robustness protocol: a trained model on shifted images, with and without test-time adaptation, in one table.

The shifts are those of the study of ETTA (``evaluation/shifts.py``). Every case is read once; each shifted image is
predicted with every method by the package's predictors, which share their networks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ukbob_seg.benchmark.robustness_cases import (
    CaseGroup,
    JudgedCases,
    check_grids,
    find_judged_cases,
    label_of,
    model_spec,
    shift_seed,
)
from ukbob_seg.benchmark.robustness_options import METHODS, ModelChoice, RobustnessOptions
from ukbob_seg.benchmark.robustness_records import Record, RecordStore, Scores, record_key
from ukbob_seg.benchmark.robustness_table import RobustnessTable, make_table, write_tables
from ukbob_seg.dataset.image_io import read_image, read_labels, write_labels
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.dataset.spec import Case, DatasetSpec
from ukbob_seg.errors import DatasetError, UkbobError
from ukbob_seg.evaluation.metrics import check_tolerances, evaluate_case
from ukbob_seg.evaluation.shifts import apply_shift
from ukbob_seg.files import ensure_writable, file_sha256
from ukbob_seg.inference.case_predictor import CasePredictor
from ukbob_seg.inference.earlier import what_matters
from ukbob_seg.inference.ensemble_predictor import load_predictor
from ukbob_seg.inference.postprocessing import POSTPROCESSING
from ukbob_seg.inference.predictor import Predictor
from ukbob_seg.parallel import Cluster, Part

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RobustnessResult:
    """What a run has.

    Attributes:
        table: None while predictions of other parts are lacking.
        missing: how many.
        predicted: predictions of this run; the others were there.
        seconds: method -> median time of a prediction, of all there are.
    """

    table: RobustnessTable | None
    missing: int
    predicted: int
    seconds: Mapping[str, float]


class _Job(NamedTuple):
    """One prediction to make and score."""

    case: str
    shift: str
    method: str


def robustness(
    model: ModelChoice,
    output: Path,
    images: Path | None = None,
    labels: Path | None = None,
    roots: Roots | None = None,
    options: RobustnessOptions | None = None,
    part: Part | None = None,
) -> RobustnessResult:
    """Predict and score every case under every shift with every method, except what an earlier run has.

    Args:
        model: what is judged.
        output: folder for records and, once all are there, ``robustness.html``, ``.json``, ``.csv`` and ``.parquet``.
        images: folder of cases, together with ``labels``; None for those of ``find_judged_cases``.
        labels: folder of their label files.
        roots: folders of raw and preprocessed datasets, for the cases that are not given.
        options: shifts, methods, cases.
        part: only these cases, in the order of their names; parts share the output folder.

    Raises:
        DatasetError: nothing to score on, or a case that cannot be read; what was finished is kept.
        ConfigError: a network that cannot adapt, unknown names, more cases than there are.
        CheckpointError: nothing is trained there.
    """
    options = options or RobustnessOptions()
    check_tolerances(options.tolerance_mm, "--tolerance-mm")
    spec = model_spec(model)
    judged = find_judged_cases(model, spec, images, labels, roots or Roots.below(Path("ukbob_data")))
    judged = judged.draw(options.cases, options.seed)
    check_grids(judged.cases)
    ensure_writable(Path(output))
    store = RecordStore(Path(output), spec.labels.names, spec.file_ending)
    run = _Run(model, spec, judged, options, store, part)
    run.do_part()
    records = run.all_records()
    jobs = [job for case in judged.cases for job in run.jobs_of(case)]
    missing = [job for job in jobs if job not in records]
    seconds = {
        method: float(np.median([record.seconds for job, record in records.items() if job.method == method]))
        for method in options.methods
        if any(job.method == method for job in records)
    }
    if missing:
        return RobustnessResult(None, len(missing), run.predicted, seconds)
    scores: dict[tuple[str, str, str], Scores] = {job: records[job].scores for job in jobs}
    table = make_table(scores, options.shifts, options.methods, spec.labels.names)
    write_tables(Path(output), table, judged, options, run.networks())
    from ukbob_seg.benchmark.robustness_report import write_report  # drawing takes a second to load

    write_report(Path(output) / "robustness.html", table, judged, options, model, store, spec)
    return RobustnessResult(table, 0, run.predicted, seconds)


@dataclass
class _Run:
    """One run over all groups of cases."""

    model: ModelChoice
    spec: DatasetSpec
    judged: JudgedCases
    options: RobustnessOptions
    store: RecordStore
    part: Part | None
    keys: list[RecordKeys] = field(default_factory=list)  # of each group, once its networks were loaded
    predicted: int = 0

    def jobs_of(self, case: Case) -> list[_Job]:
        """All predictions of a case, by shift."""
        return [_Job(case.name, shift, method) for shift in self.options.shifts for method in self.options.methods]

    def do_part(self) -> None:
        """Make and keep what is lacking of this part's cases."""
        mine = {case.name for case in Cluster(part=self.part).share(self.judged.cases)}
        count = len(mine) * len(self.options.shifts) * len(self.options.methods)
        with tqdm(total=count, desc="robustness", unit="prediction") as bar:
            for group in self.judged.groups:
                with self._predictors(group) as predictors:
                    self.keys.append(RecordKeys.of(self.model, self.options, predictors[self.options.methods[0]]))
                    for case in group.cases:
                        if case.name in mine:
                            known = self._known(case, self.keys[-1])
                            bar.update(len(known))
                            todo = [job for job in self.jobs_of(case) if job not in known]
                            self._do_case(case, todo, predictors, bar)

    def all_records(self) -> dict[_Job, Record]:
        """What is there now, of all parts."""
        records: dict[_Job, Record] = {}
        for group, keys in zip(self.judged.groups, self.keys, strict=True):
            for case in group.cases:
                records |= self._known(case, keys)
        return records

    def networks(self) -> list[dict[str, Any]]:
        """Which networks predicted which cases, as plain values."""
        return [
            {"checkpoints": keys.checkpoints, "cases": [case.name for case in group.cases]}
            for group, keys in zip(self.judged.groups, self.keys, strict=True)
        ]

    @contextmanager
    def _predictors(self, group: CaseGroup) -> Iterator[dict[str, CasePredictor]]:
        """One per method; they share the networks."""
        with ExitStack() as loaded:
            # One that adapts says so before any work if there is nothing to adapt.
            methods = sorted(self.options.methods, key=lambda method: not METHODS[method].etta)
            first = loaded.enter_context(self._load(group, methods[0]))
            predictors = {methods[0]: first}
            for method in methods[1:]:
                predictors[method] = loaded.enter_context(first.with_settings(self.options.settings(method)))
            yield predictors

    def _load(self, group: CaseGroup, method: str) -> CasePredictor:
        model, settings = self.model, self.options.settings(method)
        if group.first_stage is None:
            return load_predictor(model.folders, group.folds, model.checkpoint, model.device, settings)
        return Predictor.from_model_folder(
            model.folders[0], group.folds, model.checkpoint, model.device, settings, group.first_stage
        )

    def _known(self, case: Case, keys: RecordKeys) -> dict[_Job, Record]:
        """What there is of a case; of the one that is drawn, label maps, too."""
        found = {}
        for job in self.jobs_of(case):
            record = self.store.load(*job, keys.key(case, job.shift, job.method))
            if record is not None and (not self._is_example(case) or self.store.example_path(*job).is_file()):
                found[job] = record
        return found

    def _do_case(self, case: Case, todo: Sequence[_Job], predictors: Mapping[str, CasePredictor], bar: tqdm) -> None:
        """Make, score and keep predictions of one case, which is read once."""
        if not todo:
            return
        try:
            image, geometry = read_image(case.images)
            scorer = CaseScorer.of(case, self.spec.labels, self.options.tolerance_mm)
            for shift in dict.fromkeys(job.shift for job in todo):
                shifted = apply_shift(image, shift, geometry.spacing_mm, shift_seed(case.name))
                for job in (job for job in todo if job.shift == shift):
                    bar.set_postfix_str(f"{case.name}, shift {shift}, method {job.method}", refresh=False)
                    start = time.perf_counter()
                    prediction = predictors[job.method].predict_array(shifted, geometry)
                    seconds = time.perf_counter() - start
                    adaptation = prediction.etta_record() if prediction.etta else {}
                    record = Record(scorer(prediction.labels), seconds, adaptation)
                    if self._is_example(case):
                        write_labels(prediction.labels, geometry, self.store.example_path(*job))
                    self.store.save(*job, self.keys[-1].key(case, shift, job.method), record)
                    self.predicted += 1
                    bar.update()
        except DatasetError as error:
            raise DatasetError(f"case {case.name}: {error}") from error

    def _is_example(self, case: Case) -> bool:
        return case.name == self.judged.example.name


@dataclass(frozen=True)
class RecordKeys:
    """What the records of a group depend on.

    Attributes:
        checkpoints: file -> SHA-256 of each network's.
        methods: plain values of each method's settings and of postprocessing.
        tolerance_mm: of the normalized surface Dice.
    """

    checkpoints: Mapping[str, str]
    methods: Mapping[str, Any]
    tolerance_mm: float

    @classmethod
    def of(cls, model: ModelChoice, options: RobustnessOptions, predictor: CasePredictor) -> RecordKeys:
        """Of a loaded model.

        Raises:
            UkbobError: a file of the model was removed meanwhile.
        """
        after = model.folders[0] / POSTPROCESSING
        is_applied = options.base.postprocessing and len(model.folders) == 1 and after.is_file()
        try:
            checkpoints = predictor.checkpoint_hashes()
            removed = file_sha256(after) if is_applied else None
        except OSError as error:
            raise UkbobError(f"{error.filename} cannot be read again: {error.strerror}") from error
        methods = {method: [what_matters(options.settings(method)), removed] for method in options.methods}
        return cls(checkpoints, methods, options.tolerance_mm)

    def key(self, case: Case, shift: str, method: str) -> str:
        """Of one record."""
        return record_key(case, shift, [*self.checkpoints.values(), self.methods[method]], self.tolerance_mm)


@dataclass(frozen=True)
class CaseScorer:
    """Scores predictions of one case as ``ukbob_evaluate`` does.

    Attributes:
        scheme: of the labels.
        reference: (Z, Y, X) label indices.
        spacing_mm: (z, y, x) of the reference's file.
        tolerance_mm: of the normalized surface Dice.
    """

    scheme: LabelScheme
    reference: np.ndarray
    spacing_mm: tuple[float, float, float]
    tolerance_mm: float

    @classmethod
    def of(cls, case: Case, scheme: LabelScheme, tolerance_mm: float) -> CaseScorer:
        """Read the reference of a case.

        Raises:
            DatasetError: it cannot be read, or has values that dataset.json does not name.
        """
        labels, geometry = read_labels(label_of(case))
        return cls(scheme, scheme.to_indices(labels, label_of(case).name), geometry.spacing_mm, tolerance_mm)

    def __call__(self, prediction: np.ndarray) -> Scores:
        """Class or region -> metrics of a predicted map (Z, Y, X) of file values."""
        members = {
            name: tuple(int(k) for k in np.flatnonzero(row))
            for name, row in zip(self.scheme.names, self.scheme.region_table, strict=True)
        }
        ignored = self.scheme.ignore_index if self.scheme.ignore_value is not None else None
        indices = self.scheme.to_indices(prediction, "the prediction")
        return evaluate_case(indices, self.reference, self.spacing_mm, members, self.tolerance_mm, ignore_value=ignored)
