"""Score predicted label files against reference files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ukbob_seg.dataset.image_io import read_geometry, read_labels
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import DatasetSpec, summarise_problems
from ukbob_seg.errors import ConfigError, DatasetError, UkbobError
from ukbob_seg.evaluation.metrics import MOST_CLASSES, check_tolerances, evaluate_case, present_values
from ukbob_seg.evaluation.summary import CaseMetrics, EvaluationSummary, collect
from ukbob_seg.files import ensure_writable, read_json
from ukbob_seg.parallel import choose_workers, map_cases

logger = logging.getLogger(__name__)

FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
_IN_PROCESS_VOXELS = 2e7  # starting worker processes takes longer than scoring this many voxels
_BYTES_PER_VOXEL = 60
_BYTES_PER_WORKER = 3e8


@dataclass(frozen=True)
class ReportOptions:
    """The HTML report: whether to write it, and where the images for its pictures are (None: grey background)."""

    write: bool = True
    images: Path | None = None


DEFAULT_REPORT = ReportOptions()


class Pair(NamedTuple):
    """A case's two label files."""

    case: str
    prediction: Path
    reference: Path


@dataclass(frozen=True)
class MatchedFiles:
    """Which files belong together: pairs to score, references and predictions that stay alone."""

    pairs: tuple[Pair, ...]
    missing: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()


def evaluate(
    prediction: Path,
    reference: Path,
    dataset_json: Path | None = None,
    output: Path | None = None,
    tolerance_mm: float = 2.0,
    workers: int | None = None,
    allow_missing: bool = False,
    report: ReportOptions = DEFAULT_REPORT,
) -> EvaluationSummary:
    """Score predictions against references, all classes of all cases.

    Args:
        prediction: folder of label files, or one file.
        reference: folder of label files named like the predictions, or one file.
        dataset_json: names the classes; None searches the prediction folder, its parent and the parent of the
            reference folder, and without one scores every value that occurs, named by its number.
        output: folder for ``summary.json``, ``metrics.csv`` and ``report.html``; None takes the prediction folder,
            and writes nothing for a single pair of files.
        tolerance_mm: of the normalized surface Dice.
        workers: processes; None chooses.
        allow_missing: score what is there when predictions are missing, and list those missing.
        report: whether and how to write the HTML report.

    Raises:
        DatasetError: missing predictions (all are listed); files that cannot be read, lie on different grids or have
            unknown label values (all in one message, each naming its case); nothing to score.
        ConfigError: a tolerance or number of workers out of range, a folder compared with a file.
    """
    prediction, reference = Path(prediction), Path(reference)
    files = match_files(prediction, reference, allow_missing)
    scheme = find_labels(prediction, reference, dataset_json)
    folder = Path(output) if output is not None else prediction if prediction.is_dir() else None
    prepare_output(folder, report)
    summary = replace(
        score_pairs(files.pairs, scheme, tolerance_mm, workers), missing=files.missing, unmatched=files.unmatched
    )
    write_output(folder, summary, report)
    return summary


def evaluate_pairs(
    pairs: Sequence[Pair | tuple[str, Path, Path]],
    scheme: LabelScheme | None,
    output: Path | None = None,
    tolerance_mm: float = 2.0,
    workers: int | None = None,
    report: ReportOptions = DEFAULT_REPORT,
) -> EvaluationSummary:
    """Score files that the caller has matched already, and write the results like ``evaluate``.

    Args:
        pairs: (case, prediction file, reference file), at least one.
        scheme: what the label values mean; None scores every value that occurs.
        output: folder for the results; None writes nothing.
        tolerance_mm: of the normalized surface Dice.
        workers: processes; None chooses.
        report: whether and how to write the HTML report.

    Raises:
        DatasetError, ConfigError: as ``evaluate``.
    """
    prepare_output(output, report)
    summary = score_pairs(pairs, scheme, tolerance_mm, workers)
    write_output(output, summary, report)
    return summary


def score_pairs(
    pairs: Sequence[Pair | tuple[str, Path, Path]],
    scheme: LabelScheme | None,
    tolerance_mm: float = 2.0,
    workers: int | None = None,
) -> EvaluationSummary:
    """Score files that the caller has matched already; nothing is written. Arguments as for ``evaluate_pairs``."""
    check_tolerances(tolerance_mm, "--tolerance-mm")
    if not pairs:
        raise DatasetError("there is no case to evaluate")
    todo = [Pair(case, Path(prediction), Path(reference)) for case, prediction, reference in pairs]
    scored = map_cases(_Score(scheme, tolerance_mm), todo, _workers(todo, workers), "evaluating")
    problems = [result for result in scored if isinstance(result, str)]
    if problems:
        raise DatasetError(summarise_problems(problems))
    cases = [result for result in scored if isinstance(result, CaseMetrics)]
    ignore_value = scheme.ignore_value if scheme else None
    return collect(cases, _classes(scheme, cases), tolerance_mm, ignore_value=ignore_value)


def match_files(prediction: Path, reference: Path, allow_missing: bool = False) -> MatchedFiles:
    """Find each reference's prediction by the file name without its ending.

    Raises:
        ConfigError: one is a folder and the other a file.
        DatasetError: something does not exist, is ambiguous, or has no counterpart.
    """
    for what, path in (("prediction", prediction), ("reference", reference)):
        if not path.exists():
            raise DatasetError(f"{what} {path} does not exist")
    if prediction.is_dir() != reference.is_dir():
        raise ConfigError(f"give two folders or two files, got {prediction} and {reference}")
    if not prediction.is_dir():
        return MatchedFiles((Pair(case_name(reference), prediction, reference),))
    predictions, references = label_files(prediction), label_files(reference)
    if not references:
        raise DatasetError(f"no label files in {reference}; expected files ending in {', '.join(FILE_ENDINGS)}")
    missing = tuple(case for case in references if case not in predictions)
    pairs = tuple(Pair(case, predictions[case], path) for case, path in references.items() if case in predictions)
    if missing and not (allow_missing and pairs):
        remedy = "score those that are there with --allow-missing" if pairs else "is this the right folder?"
        raise DatasetError(
            f"{len(missing)} of {len(references)} references have no prediction of the same name in {prediction} "
            f"({remedy}): {', '.join(missing)}"
        )
    unmatched = tuple(case for case in predictions if case not in references)
    return MatchedFiles(pairs, missing, unmatched)


def label_files(folder: Path) -> dict[str, Path]:
    """Label files of a folder by case, sorted.

    Raises:
        DatasetError: two files of one case, differing in the ending.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.lower().endswith(FILE_ENDINGS) or not path.is_file():
            continue
        other = found.setdefault(case_name(path), path)
        if other != path:
            raise DatasetError(f"case {case_name(path)}: both {other.name} and {path.name} in {folder}; keep one")
    # What ukbob_predict --save-entropy writes beside a label map is none.
    return {name: path for name, path in found.items() if name.removesuffix("_entropy") not in found.keys() - {name}}


def case_name(path: Path) -> str:
    """File name without its ending."""
    for ending in FILE_ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.stem


def find_labels(prediction: Path, reference: Path, dataset_json: Path | None = None) -> LabelScheme | None:
    """What the label values mean, from the dataset.json given or the first found near the files; None without one.

    Raises:
        DatasetError: the file does not exist or cannot be used.
    """
    here = prediction if prediction.is_dir() else prediction.parent
    there = reference if reference.is_dir() else reference.parent
    candidates = [folder.resolve() / "dataset.json" for folder in (here, here.resolve().parent, there.resolve().parent)]
    path = dataset_json if dataset_json is not None else next((p for p in candidates if p.is_file()), None)
    if path is None:
        logger.info("no dataset.json found: every label value that occurs is scored, named by its number")
        return None
    return DatasetSpec.from_json(read_json(Path(path), "dataset description"), Path(path).parent.name).labels


def prepare_output(folder: Path | None, report: ReportOptions) -> None:
    """Fail before the work, not after it."""
    if report.images is not None and not Path(report.images).is_dir():
        raise DatasetError(f"image folder {report.images} does not exist")
    if folder is not None:
        ensure_writable(Path(folder))


def write_output(
    folder: Path | None,
    summary: EvaluationSummary,
    report: ReportOptions,
    files: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Write tables and report; nothing without a folder.

    Args:
        folder: for summary.json, metrics.csv and report.html.
        summary: what to write.
        report: whether and how to write the page, whose pictures are drawn from the files that the summary names.
        files: case -> (prediction, reference) to name in summary.json instead of those.
    """
    if folder is None:
        return
    replace(summary, files=summary.files if files is None else files).write(Path(folder))
    (Path(folder) / "report.html").unlink(missing_ok=True)  # an old one would not belong to the new numbers
    if report.write:
        from ukbob_seg.evaluation.report import write_report

        write_report(Path(folder) / "report.html", summary, report.images)


@dataclass(frozen=True)
class _Score:
    """Picklable: reads and scores one case; a sentence instead of metrics when it cannot be scored."""

    scheme: LabelScheme | None
    tolerance_mm: float

    def __call__(self, pair: Pair) -> CaseMetrics | str:
        try:
            return self._score(pair)
        except UkbobError as error:
            return f"case {pair.case}: {error}"

    def _score(self, pair: Pair) -> CaseMetrics:
        reference, geometry = read_labels(pair.reference)
        prediction, other = read_labels(pair.prediction)
        difference = geometry.difference(other, ("the reference", "the prediction"))
        if difference is not None:
            raise DatasetError(f"{difference}; resample the prediction to the reference's grid or correct its header")
        labels: dict[str, tuple[int, ...]]
        ignore: int | None = None
        if self.scheme is not None:
            prediction = self.scheme.to_indices(prediction, where=f"prediction {pair.prediction.name}")
            reference = self.scheme.to_indices(reference, where=f"reference {pair.reference.name}")
            labels = {
                name: tuple(int(k) for k in np.flatnonzero(row))
                for name, row in zip(self.scheme.names, self.scheme.region_table, strict=True)
            }
            ignore = self.scheme.ignore_index if self.scheme.ignore_value is not None else None
        else:
            values = sorted({*present_values(prediction), *present_values(reference)})
            if len(values) > MOST_CLASSES:
                raise DatasetError(
                    f"{len(values)} different values in {pair.prediction.name} and {pair.reference.name}; "
                    "are these label maps, not images?"
                )
            labels = {str(value): (value,) for value in values}
        metrics = evaluate_case(
            prediction, reference, geometry.spacing_mm, labels, self.tolerance_mm, ignore_value=ignore
        )
        return CaseMetrics(pair.case, metrics, str(pair.prediction), str(pair.reference))


def _classes(scheme: LabelScheme | None, cases: Iterable[CaseMetrics]) -> dict[str, tuple[int, ...]]:
    """Class name -> file values: as dataset.json says, or all values that occur."""
    if scheme is not None:
        return dict(zip(scheme.names, scheme.members, strict=True))
    values = sorted({int(name) for case in cases for name in case.metrics})
    return {str(value): (value,) for value in values}


def _workers(pairs: Sequence[Pair], requested: int | None) -> int:
    """Processes that the work is worth and the memory allows, judged by the largest reference file."""
    largest = max(pairs, key=lambda pair: pair.reference.stat().st_size)
    try:
        voxels = float(np.prod(read_geometry(largest.reference).shape))
    except DatasetError:
        voxels = 0.0  # a file that cannot be read is reported when its turn comes
    if requested is None and voxels * len(pairs) < _IN_PROCESS_VOXELS:
        return 1
    return choose_workers(requested, len(pairs), (voxels * _BYTES_PER_VOXEL + _BYTES_PER_WORKER) / 2**30)
