"""Filter a dataset: measure every organ, learn the bounds, flag, and write down what training shall do."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ukbob_seg.errors import listing
from ukbob_seg.files import atomic_path
from ukbob_seg.filtering.config import FilterConfig
from ukbob_seg.filtering.evidence import paired_organs, stray, swapped
from ukbob_seg.filtering.features import Cohort
from ukbob_seg.filtering.measure import CohortMeasurement
from ukbob_seg.filtering.policies import (
    FLAGS_FILE,
    POLICY_FILE,
    STARTED_FILE,
    FilterPolicy,
    LabelTrust,
    is_complete,
    mark_started,
)
from ukbob_seg.filtering.review import REVIEW_FILE, apply_verdicts, read_verdicts, write_review
from ukbob_seg.filtering.solf import flag_organs, unjudged_labels
from ukbob_seg.filtering.strata import StratifiedBounds
from ukbob_seg.parallel import Part

logger = logging.getLogger(__name__)

FEATURES_FILE = "features.parquet"
BOUNDS_FILE = "bounds.json"
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class OrganSummary:
    """Flags of one organ."""

    label: int
    name: str
    cases: int
    flagged: int

    @property
    def share(self) -> float:
        """Flagged part of the organ's labels, 0 to 1."""
        return self.flagged / self.cases


@dataclass(frozen=True)
class FilterSummary:
    """What the filter found.

    Attributes:
        folder: where the files are.
        dataset: ``DatasetXXX_Name``.
        cases: scans of the dataset.
        computed: scans measured in this run; the others were kept from an earlier one.
        skipped: scans that cannot be measured and were left out on request.
        organs: one entry per organ that occurs.
        unjudged: names of organs without bounds for the rule (too few samples); they are never flagged.
        small_bodies: scans whose body volume is smaller than their labelled volume, a sign of a wrong body mask.
        trust: the decisions, as training will read them.
        bounds: the limits applied.
        verdicts: labels that a reviewer decided.
        bounds_file: where the limits come from; None when they were learnt here.
    """

    folder: Path
    dataset: str
    cases: int
    computed: int
    skipped: tuple[str, ...]
    organs: tuple[OrganSummary, ...]
    unjudged: tuple[str, ...]
    small_bodies: int
    trust: LabelTrust
    bounds: StratifiedBounds
    verdicts: int = 0
    bounds_file: Path | None = None

    @property
    def labels(self) -> int:
        """Organ labels in all scans together."""
        return sum(organ.cases for organ in self.organs)

    @property
    def flagged(self) -> int:
        """Flagged labels in all scans together."""
        return sum(organ.flagged for organ in self.organs)


def measure_part(raw_folder: Path, output_folder: Path, part: Part, config: FilterConfig | None = None) -> int:
    """Measure one part of a cohort and keep the features for a later ``solf_filter``; for job arrays.

    Args:
        raw_folder: a raw dataset (``DatasetXXX_Name``).
        output_folder: the same for all parts and for the run that follows.
        part: which.
        config: the same for all.

    Returns:
        Scans measured now; those that an earlier run measured are not measured again.

    Raises:
        DatasetError: cases cannot be measured; names them. The others are kept.
    """
    config = config or FilterConfig()
    cohort = Cohort.open(raw_folder, output_folder, config)
    config.load_bounds(cohort.names)  # what the last run will need must be usable before hours of work
    _verdicts(cohort.folder, config)
    if not is_complete(cohort.folder):  # a part that is run again later changes no decision
        mark_started(cohort.folder)
    return cohort.measure(part).computed


def solf_filter(raw_folder: Path, output_folder: Path, config: FilterConfig | None = None) -> FilterSummary:
    """Find the organ labels of a dataset that cannot be trusted.

    Writes features.parquet, bounds.json, flags.parquet, policy.json and report.html (and review.csv on request).
    Features are kept in ``shards/``: a run that was killed goes on where it was, and a second run reads no image or
    label again for the tables (only the report reads the few that it shows).

    Args:
        raw_folder: a raw dataset (``DatasetXXX_Name``).
        output_folder: by convention ``preprocessed/DatasetXXX_Name/solf``, where training looks for it.
        config: None takes the defaults.

    Raises:
        DatasetError: files of cases cannot be used; names the cases.
        ConfigError: bounds that belong to other organs or strata.
    """
    config = config or FilterConfig()
    cohort = Cohort.open(raw_folder, output_folder, config)
    folder, names = cohort.folder, cohort.names
    bounds, verdicts = config.load_bounds(names), _verdicts(folder, config)  # refused before the work
    mark_started(folder)
    measured = cohort.measure()
    features = cohort.features(measured)
    bounds = bounds or config.learn(features, names)
    flags = flag_cohort(features, bounds, config.rule)
    if config.evidence:
        flags["stray"] = stray(flags)
        flags["swapped"] = swapped(flags, paired_organs(names))
    if config.review:
        flags = apply_verdicts(flags, verdicts)
        write_review(folder / REVIEW_FILE, flags, verdicts)
    _write(folder, features, flags, bounds, config.policy)

    summary = _summarise(flags, bounds, cohort, measured)
    _warn(summary, config)
    if config.report:
        from ukbob_seg.filtering.report import write_report

        write_report(folder / REPORT_FILE, summary, flags, {case.name: case for case in cohort.cases}, config)
    else:
        (folder / REPORT_FILE).unlink(missing_ok=True)  # an older one would show other decisions
    return summary


def flag_cohort(features: pd.DataFrame, bounds: StratifiedBounds, rule: str) -> pd.DataFrame:
    """``flag_organs`` in every stratum; rows and their order stay.

    Args:
        features: with the column ``stratum``.
        bounds: of these strata.
        rule: name of a rule.
    """
    parts = [flag_organs(rows, rule=rule, bounds=limits) for _, limits, rows in bounds.split(features)]
    return pd.concat(parts).loc[features.index]


def _verdicts(folder: Path, config: FilterConfig) -> dict[tuple[str, int], str]:
    """What a reviewer said in the review.csv of an earlier run, overruled by the file asked for."""
    if not config.review:
        return {}
    before = read_verdicts(folder / REVIEW_FILE) if (folder / REVIEW_FILE).is_file() else {}
    return before | (read_verdicts(config.review_file) if config.review_file is not None else {})


def _write(
    folder: Path, features: pd.DataFrame, flags: pd.DataFrame, bounds: StratifiedBounds, policy: FilterPolicy
) -> None:
    """Write the decisions; the policy last, so that training never sees new flags with an old policy."""
    (folder / POLICY_FILE).unlink(missing_ok=True)
    for name, table in ((FEATURES_FILE, features), (FLAGS_FILE, flags)):
        with atomic_path(folder / name) as temporary:
            shown = table if bounds.columns else table.drop(columns="stratum")
            shown.to_parquet(temporary, index=False)
    bounds.save(folder / BOUNDS_FILE)
    policy.save(folder / POLICY_FILE)
    (folder / STARTED_FILE).unlink(missing_ok=True)


def _summarise(
    flags: pd.DataFrame, bounds: StratifiedBounds, cohort: Cohort, measured: CohortMeasurement
) -> FilterSummary:
    names = cohort.names
    per_organ = flags.groupby("label")["flagged"].agg(["size", "sum"])
    per_case = flags.groupby("case").agg(body=("body_voxels", "first"), labelled=("voxels", "sum"))
    return FilterSummary(
        folder=cohort.folder,
        dataset=cohort.spec.name,
        cases=len(cohort.cases) - len(measured.failures),
        computed=measured.computed,
        skipped=tuple(measured.failures),
        organs=tuple(
            OrganSummary(int(label), names[label], int(size), int(flagged))
            for label, size, flagged in per_organ.itertuples(name=None)
        ),
        unjudged=_unjudged(flags, bounds, cohort.config.rule, names),
        small_bodies=int((per_case["body"] < per_case["labelled"]).sum()),
        trust=LabelTrust.from_flags(flags, cohort.config.policy),
        bounds=bounds,
        verdicts=int((flags["verdict"] != "").sum()) if "verdict" in flags else 0,
        bounds_file=cohort.config.bounds_file,
    )


def _unjudged(flags: pd.DataFrame, bounds: StratifiedBounds, rule: str, names: dict[int, str]) -> tuple[str, ...]:
    """Names of organs without bounds, with their stratum where there are several."""
    return tuple(
        names[label] + (f" ({stratum})" if stratum else "")
        for stratum, limits, rows in bounds.split(flags)
        for label in unjudged_labels(rows, limits, rule)
    )


def _warn(summary: FilterSummary, config: FilterConfig) -> None:
    if summary.small_bodies:
        logger.warning(
            "warning: in %d of %d scans the body (--body %s) is smaller than the labelled organs; "
            "use --body union or a folder of masks",
            summary.small_bodies,
            summary.cases,
            config.body,
        )
    if summary.skipped:
        logger.warning(
            "warning: %d cases could not be measured and were left out: %s",
            len(summary.skipped),
            listing(summary.skipped),
        )
