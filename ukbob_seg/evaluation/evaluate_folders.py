"""Score several folders of predictions against one set of references, and compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.evaluation.comparison import Comparison, compare
from ukbob_seg.evaluation.evaluate import DEFAULT_REPORT, ReportOptions, evaluate, prepare_output
from ukbob_seg.evaluation.metrics import Tolerances
from ukbob_seg.evaluation.pairing import match_files
from ukbob_seg.evaluation.summary import EvaluationSummary


def evaluate_folders(
    predictions: Sequence[Path],
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
) -> Comparison:
    """Score every folder like ``evaluate``, and compare all with the first.

    Args:
        predictions: at least two folders; the first is the baseline.
        reference: folder of label files.
        dataset_json: names the classes, for all folders.
        output: ``comparison.json``, ``.csv`` and ``.html`` go there, each folder's own results into a folder below it
            with the folder's name. None writes each folder's results into it, and the comparison into the first.
        tolerance_mm, workers, allow_missing, report, scheduler, overwrite: as for ``evaluate``.

    Raises:
        ConfigError: fewer than two folders, one twice, or files.
        DatasetError: as ``evaluate``, or the folders were scored on different classes, or have no case in common.
    """
    folders = [Path(folder) for folder in predictions]
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise ConfigError(f"each folder to compare must be another one, got {', '.join(map(str, folders))}")
    for folder in folders:
        if not folder.is_dir():
            raise DatasetError(f"prediction folder {folder} does not exist" if not folder.exists() else
                               f"only folders of predictions can be compared; {folder} is a file")  # fmt: skip
    for folder in folders:  # say what is missing in any before the first is scored
        match_files(folder, Path(reference), allow_missing)
    names = distinct_names(folders)
    own_names = [name.replace("/", "_") for name in names]
    if len(set(own_names)) < len(own_names):
        own_names = [f"{number}_{name}" for number, name in enumerate(own_names, 1)]
    target = Path(output) if output is not None else folders[0]
    prepare_output(target, report)
    summaries, reports = {}, {}
    for name, own_name, folder in zip(names, own_names, folders, strict=True):
        own = folder if output is None else target / own_name
        summaries[name] = evaluate(
            folder, reference, dataset_json, own, tolerance_mm, workers, allow_missing, report,
            scheduler=scheduler, overwrite=overwrite,
        )  # fmt: skip
        if report.write:
            reports[name] = own / "report.html"
    comparison = compare(_of_same_classes(summaries))
    comparison.write(target)
    (target / "comparison.html").unlink(missing_ok=True)
    if report.write:
        from ukbob_seg.evaluation.comparison_report import write_comparison_report

        write_comparison_report(target / "comparison.html", comparison, report.images, reports)
    return comparison


def _of_same_classes(summaries: Mapping[str, EvaluationSummary]) -> dict[str, EvaluationSummary]:
    """Of folders without a dataset.json, whose classes are the values found: all values of any of them in each."""
    named = {name: values for summary in summaries.values() for name, values in summary.classes.items()}
    if not all(name.isdigit() and values == (int(name),) for name, values in named.items()):
        return dict(summaries)
    classes = {name: named[name] for name in sorted(named, key=int)}
    return {name: summary.with_classes(classes) for name, summary in summaries.items()}


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths, of equally many parts, that tell them apart.

    ``a/fold_0/validation`` and ``b/fold_0/validation`` become ``a/fold_0/validation`` and so on; those of different
    last names have these alone.
    """
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("the folders to compare are not different")
