"""Score predicted label files against reference files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.evaluation.metrics import Tolerances, check_tolerances
from ukbob_seg.evaluation.pairing import Pair, check_images, find_labels, match_files
from ukbob_seg.evaluation.scoring import CaseScoring, ScoredCases, score_cases
from ukbob_seg.evaluation.summary import EvaluationSummary, complete_table
from ukbob_seg.files import ensure_writable
from ukbob_seg.parallel import Cluster


@dataclass(frozen=True)
class ReportOptions:
    """The HTML report: whether to write it, and where the images for its pictures are (None: grey background)."""

    write: bool = True
    images: Path | None = None


DEFAULT_REPORT = ReportOptions()


def evaluate(
    prediction: Path,
    reference: Path,
    dataset_json: Path | None = None,
    output: Path | None = None,
    tolerance_mm: Tolerances = 2.0,
    workers: int | None = None,
    allow_missing: bool = False,
    report: ReportOptions = DEFAULT_REPORT,
    *,
    scheduler: str | None = None,
    overwrite: bool = False,
) -> EvaluationSummary:
    """Score predictions against references, all classes of all cases.

    Cases whose files and options are those of an earlier run into the same folder are not scored again.

    Args:
        prediction: folder of label files, or one file.
        reference: folder of label files named like the predictions, or one file.
        dataset_json: names the classes; None searches the prediction folder, its parent and the parent of the
            reference folder, and without one scores every value that occurs, named by its number.
        output: folder for ``summary.json``, ``metrics.csv``, ``metrics.parquet`` and ``report.html``; None takes the
            prediction folder, and writes nothing for a single pair of files.
        tolerance_mm: of the normalized surface Dice, one or several.
        workers: processes; None chooses.
        allow_missing: score what is there when predictions are missing, and list those missing.
        report: whether and how to write the HTML report.
        scheduler: address of a Dask scheduler whose workers do the work instead; they must see the same files.
        overwrite: score all cases again.

    Raises:
        DatasetError: missing predictions (all are listed); files that cannot be read, lie on different grids or have
            unknown label values (all in one message, each naming its case; the others are kept); nothing to score.
        ConfigError: a tolerance or number of workers out of range, a folder compared with a file.
    """
    prediction, reference = Path(prediction), Path(reference)
    files = match_files(prediction, reference, allow_missing)
    scoring = CaseScoring(
        find_labels(prediction, reference, dataset_json), check_tolerances(tolerance_mm, "--tolerance-mm")
    )
    folder = output_folder(prediction, output)
    prepare_output(folder, report)
    if report.images is not None:
        check_images(Path(report.images), [pair.case for pair in files.pairs])
    scored = score_cases(files.pairs, scoring, folder, workers, Cluster(scheduler), overwrite)
    summary = replace(_summarise(files.pairs, scoring, scored), missing=files.missing, unmatched=files.unmatched)
    write_output(folder, summary, report, scored=scored)
    return summary


def evaluate_part(
    prediction: Path,
    reference: Path,
    cluster: Cluster,
    dataset_json: Path | None = None,
    output: Path | None = None,
    tolerance_mm: Tolerances = 2.0,
    workers: int | None = None,
    allow_missing: bool = False,
    overwrite: bool = False,
) -> int:
    """Score one part of the cases of ``evaluate`` and keep the scores for it; returns how many were scored.

    Args and errors are those of ``evaluate``. Parts may run at the same time, into one folder.
    """
    prediction, reference = Path(prediction), Path(reference)
    files = match_files(prediction, reference, allow_missing)
    scheme = find_labels(prediction, reference, dataset_json)
    folder = output_folder(prediction, output)
    if folder is None:
        raise ConfigError("a part of a single pair of files makes no sense; leave out --part")
    ensure_writable(folder)
    scoring = CaseScoring(scheme, check_tolerances(tolerance_mm, "--tolerance-mm"))
    return score_cases(files.pairs, scoring, folder, workers, cluster, overwrite).computed


def evaluate_pairs(
    pairs: Sequence[Pair | tuple[str, Path, Path]],
    scheme: LabelScheme | None,
    output: Path | None = None,
    tolerance_mm: Tolerances = 2.0,
    workers: int | None = None,
    report: ReportOptions = DEFAULT_REPORT,
) -> EvaluationSummary:
    """Score files that the caller has matched already, and write the results like ``evaluate``.

    Args:
        pairs: (case, prediction file, reference file), at least one.
        scheme: what the label values mean; None scores every value that occurs.
        output: folder for the results; None writes nothing.
        tolerance_mm: of the normalized surface Dice, one or several.
        workers: processes; None chooses.
        report: whether and how to write the HTML report.

    Raises:
        DatasetError, ConfigError: as ``evaluate``.
    """
    scoring = CaseScoring(scheme, check_tolerances(tolerance_mm, "--tolerance-mm"))
    todo = _pairs(pairs)
    prepare_output(output, report)
    scored = score_cases(todo, scoring, output, workers)
    summary = _summarise(todo, scoring, scored)
    write_output(output, summary, report, scored=scored)
    return summary


def score_pairs(
    pairs: Sequence[Pair | tuple[str, Path, Path]],
    scheme: LabelScheme | None,
    tolerance_mm: Tolerances = 2.0,
    workers: int | None = None,
) -> EvaluationSummary:
    """Score files that the caller has matched already; nothing is written. Arguments as for ``evaluate_pairs``."""
    scoring = CaseScoring(scheme, check_tolerances(tolerance_mm, "--tolerance-mm"))
    todo = _pairs(pairs)
    return _summarise(todo, scoring, score_cases(todo, scoring, None, workers))


def output_folder(prediction: Path, output: Path | None) -> Path | None:
    """Where results go: as told, else beside the predictions; nowhere for a single pair of files."""
    if output is not None:
        return Path(output)
    return Path(prediction) if Path(prediction).is_dir() else None


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
    scored: ScoredCases | None = None,
) -> None:
    """Write tables and report; nothing without a folder.

    Args:
        folder: for summary.json, metrics.csv, metrics.parquet and report.html.
        summary: what to write.
        report: whether and how to write the page, whose pictures are drawn from the files that the summary names.
        files: case -> (prediction, reference) to name in summary.json instead of those.
        scored: what the summary is of, so that a later run into the folder need not score these files again.
    """
    if folder is None:
        return
    folder = Path(folder)
    (summary if files is None else replace(summary, files=files)).write(folder)
    ScoredCases(summary.table, {} if scored is None else scored.keys, 0).keep(folder)
    (folder / "report.html").unlink(missing_ok=True)  # an old one would not belong to the new numbers
    if report.write:
        from ukbob_seg.evaluation.report import write_report

        write_report(folder / "report.html", summary, report.images)


def _pairs(pairs: Sequence[Pair | tuple[str, Path, Path]]) -> list[Pair]:
    return [Pair(case, Path(prediction), Path(reference)) for case, prediction, reference in pairs]


def _summarise(pairs: Sequence[Pair], scoring: CaseScoring, scored: ScoredCases) -> EvaluationSummary:
    classes = _classes(scoring.scheme, scored.table)
    table = complete_table(scored.table, [pair.case for pair in pairs], tuple(classes))
    files = {pair.case: (str(pair.prediction), str(pair.reference)) for pair in pairs}
    ignore_value = scoring.scheme.ignore_value if scoring.scheme else None
    return EvaluationSummary(table, classes, scoring.tolerances, files, ignore_value=ignore_value)


def _classes(scheme: LabelScheme | None, table: pd.DataFrame) -> dict[str, tuple[int, ...]]:
    """Class name -> file values: as dataset.json says, or all values that occur."""
    if scheme is not None:
        return dict(zip(scheme.names, scheme.members, strict=True))
    present = table.loc[table["n_pred"] + table["n_ref"] > 0, "class"]
    return {str(value): (value,) for value in sorted({int(name) for name in present})}
