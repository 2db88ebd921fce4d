"""Fingerprint, plan and preprocess in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ukbob_seg.dataset.paths import Roots, find_dataset
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.files import ensure_writable
from ukbob_seg.parallel import Cluster, check_workers
from ukbob_seg.preprocessing.fingerprint import Fingerprint, extract_fingerprint
from ukbob_seg.preprocessing.fingerprint_cases import LoadedCases
from ukbob_seg.preprocessing.planner import PlanOptions, plan
from ukbob_seg.preprocessing.plans import Plans
from ukbob_seg.preprocessing.preprocessor import arrays_folder, preprocess


@dataclass(frozen=True)
class Prepared:
    """What ``plan_and_preprocess`` did."""

    folder: Path
    fingerprint: Fingerprint
    plans: Plans
    cases_done: int
    cases_total: int  # over the distinct configurations


def plan_and_preprocess(
    dataset: int | str,
    roots: Roots,
    options: PlanOptions | None = None,
    configurations: Sequence[str] = ("3d_fullres",),
    workers: int | None = None,
    verify: bool = False,
    allow_empty: bool = False,
    keep_plans: bool = False,
    scheduler: str | None = None,
    report: bool = False,
) -> Prepared:
    """Read a raw dataset, decide how to treat it, and preprocess its training cases.

    Args:
        dataset: id or ``DatasetXXX_Name``.
        roots: where raw and preprocessed datasets are.
        options: the user's wishes for the planner.
        configurations: which configurations to preprocess; none to stop after planning.
        workers: processes, None to choose.
        verify: read and check every case again even when nothing has changed.
        allow_empty: accept cases without foreground.
        keep_plans: follow the plans.json that is there; new cases are then the only ones to be preprocessed.
        scheduler: address of a Dask scheduler whose workers read and preprocess.
        report: write report.html as well.

    Raises:
        DatasetError: every problem of every case, in one message.
        ConfigError: unknown dataset or configuration, or a wish that cannot be met.
    """
    check_workers(workers)
    raw_folder = find_dataset(roots.raw, dataset)
    folder = roots.preprocessed / raw_folder.name
    ensure_writable(folder)
    loaded = LoadedCases()
    fingerprint = extract_fingerprint(
        raw_folder, folder, workers, allow_empty, force=verify, loaded=loaded, scheduler=scheduler
    )
    if keep_plans:
        plans = Plans.load(folder / "plans.json")
    else:
        plans = plan(fingerprint, DatasetSpec.load(raw_folder), options)
    # Configurations that share arrays are one piece of work.
    distinct = {arrays_folder(folder, plans, name): name for name in configurations}
    if not keep_plans:
        plans.save(folder / "plans.json")
    done = sum(
        preprocess(
            raw_folder,
            folder,
            plans,
            name,
            workers,
            allow_empty,
            verify=verify,
            loaded=loaded,
            cluster=Cluster(scheduler),
        )
        for name in distinct.values()
    )
    if report:
        from ukbob_seg.preprocessing.report import write_report  # matplotlib takes its time to import

        write_report(raw_folder, folder)
    elif not keep_plans:
        (folder / "report.html").unlink(missing_ok=True)  # it shows earlier plans
    return Prepared(folder, fingerprint, plans, done, len(fingerprint.cases) * len(distinct))
