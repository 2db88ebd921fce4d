"""Zero-shot scoring: prediction and reference name their classes differently, and are compared on those they share."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ukbob_seg.benchmark.classes import mapped_values
from ukbob_seg.dataset.image_io import largest_voxels, read_labels, write_labels
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import DatasetSpec, summarise_problems
from ukbob_seg.errors import DatasetError
from ukbob_seg.evaluation.evaluate import DEFAULT_REPORT, ReportOptions, prepare_output, score_pairs, write_output
from ukbob_seg.evaluation.metrics import Tolerances
from ukbob_seg.evaluation.pairing import match_files
from ukbob_seg.evaluation.summary import EvaluationSummary
from ukbob_seg.files import read_json
from ukbob_seg.parallel import choose_workers, map_cases

_BYTES_PER_VOXEL = 12


@dataclass(frozen=True)
class ScoreOptions:
    """How to score.

    Attributes:
        prediction_labels: dataset.json of the predictions; None: beside them or one folder up.
        reference_labels: dataset.json of the references, likewise.
        tolerance_mm: of the normalized surface Dice, one or several.
        workers: processes; None chooses.
        allow_missing: score what is there when predictions are missing.
        report: whether and how to write the HTML report.
    """

    prediction_labels: Path | None = None
    reference_labels: Path | None = None
    tolerance_mm: Tolerances = 2.0
    workers: int | None = None
    allow_missing: bool = False
    report: ReportOptions = DEFAULT_REPORT


def score(
    prediction: Path, reference: Path, protocol: str, output: Path, options: ScoreOptions | None = None
) -> EvaluationSummary:
    """Map both sides to common class names and score them.

    Args:
        prediction: folder of label files, or one file.
        reference: folder of label files named like the predictions, or one file.
        protocol: which classes count: ``ten``, ``btcv`` or ``amos``.
        output: folder for summary.json, metrics.csv and report.html.
        options: everything else.

    Raises:
        ConfigError: unknown protocol, or regions.
        DatasetError: a class of the protocol that one side lacks, missing files, unreadable files, unknown values.
    """
    prediction, reference, output = Path(prediction), Path(reference), Path(output)
    options = options or ScoreOptions()
    files = match_files(prediction, reference, options.allow_missing)
    theirs = load_scheme(prediction, options.prediction_labels, "prediction", "--prediction-labels")
    ours = load_scheme(reference, options.reference_labels, "reference", "--reference-labels")
    predicted, referred = (
        mapped_values(theirs, protocol, "prediction"),
        mapped_values(ours, protocol, "reference"),
    )
    names = tuple(predicted)
    ignore = len(names) + 1 if ours.ignore_value is not None else None
    scheme = LabelScheme(names, tuple((k,) for k in range(1, len(names) + 1)), None, ignore)
    prepare_output(output, options.report)
    originals = {pair.case: (str(pair.prediction), str(pair.reference)) for pair in files.pairs}
    with tempfile.TemporaryDirectory(prefix="ukbob_score_") as folder:
        jobs, pairs = [], []
        for pair in files.pairs:
            one, two = (Path(folder) / side / f"{pair.case}.nii.gz" for side in ("prediction", "reference"))
            jobs.append(_Job(pair.case, pair.prediction, one, theirs, predicted, None))
            jobs.append(_Job(pair.case, pair.reference, two, ours, referred, ignore))
            pairs.append((pair.case, one, two))
        voxels = largest_voxels([pair.reference for pair in files.pairs])
        count = choose_workers(options.workers, len(jobs), voxels * _BYTES_PER_VOXEL / 2**30)
        problems = [problem for problem in map_cases(_map_file, jobs, count, "mapping classes") if problem]
        if problems:
            raise DatasetError(summarise_problems(problems))
        summary = score_pairs(pairs, scheme, options.tolerance_mm, options.workers)
        summary = replace(summary, missing=files.missing, unmatched=files.unmatched)
        write_output(output, summary, options.report, originals)
    return replace(summary, files=originals)


def load_scheme(files: Path, given: Path | None, what: str, option: str) -> LabelScheme:
    """What label values mean, from the dataset.json given, beside the files, or one folder up.

    Raises:
        DatasetError: there is none, or it cannot be used.
    """
    folder = (files if files.is_dir() else files.parent).resolve()
    places = [Path(given)] if given is not None else [folder / "dataset.json", folder.parent / "dataset.json"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        if given is not None:
            raise DatasetError(f"{option} {given} does not exist")
        raise DatasetError(f"no dataset.json names the classes of the {what} {files}; give it with {option}")
    return DatasetSpec.from_json(read_json(path, "dataset description"), str(path)).labels


@dataclass(frozen=True)
class _Job:
    """One label file to rewrite with common values."""

    case: str
    source: Path
    target: Path
    scheme: LabelScheme
    values: Mapping[str, tuple[int, ...]]
    ignore: int | None


def _map_file(job: _Job) -> str:
    """Write the mapped file; returns what is wrong with it, if anything."""
    try:
        labels, geometry = read_labels(job.source)
        if job.scheme.unexpected(labels):
            raise DatasetError(f"{job.source}: {job.scheme.describe_unexpected(labels)}")
        table = np.zeros(max(*job.scheme.values, job.scheme.ignore_value or 0) + 1, dtype=np.uint8)
        for number, values in enumerate(job.values.values(), start=1):
            table[list(values)] = number
        if job.ignore is not None and job.scheme.ignore_value is not None:
            table[job.scheme.ignore_value] = job.ignore
        write_labels(table[labels], geometry, job.target)
    except DatasetError as error:
        return f"case {job.case}: {error}"
    return ""
