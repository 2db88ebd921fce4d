"""Filter a dataset: measure every organ, learn the bounds, flag, and write down what training shall do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import DatasetSpec, require_cases
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.files import atomic_path, ensure_writable
from ukbob_seg.filtering.bounds import EPSILON, MIN_SAMPLES, CohortBounds, learn_bounds
from ukbob_seg.filtering.measure import BODY_IMAGE, BODY_UNION, CaseMeasurement, check_label_values, measure_cohort
from ukbob_seg.filtering.policies import FLAGS_FILE, POLICY_FILE, FilterPolicy, LabelTrust
from ukbob_seg.filtering.solf import flag_organs, get_rule, unjudged_labels

logger = logging.getLogger(__name__)

FEATURES_FILE = "features.parquet"
BOUNDS_FILE = "bounds.json"
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class FilterConfig:
    """How a cohort is filtered.

    Attributes:
        rule: ``solf``, ``volume``, ``iqr`` or ``none``.
        epsilon: percent cut off by the percentile bounds; None means 2, or that of ``bounds_file``.
        min_samples: fewest samples for bounds; None means 20, or that of ``bounds_file``.
        bounds_file: bounds learnt on another cohort; None learns them on this one.
        body: ``image`` (foreground of the first channel), ``union`` (of all labels), or a folder of masks.
        policy: what a flag does in training.
        workers: processes; None chooses.
        report: write the HTML report.
        quiet: no progress bar.
    """

    rule: str = "solf"
    epsilon: float | None = None
    min_samples: int | None = None
    bounds_file: Path | None = None
    body: str = BODY_IMAGE
    policy: FilterPolicy = field(default_factory=FilterPolicy)
    workers: int | None = None
    report: bool = True
    quiet: bool = False

    def __post_init__(self) -> None:
        get_rule(self.rule)
        if self.bounds_file is not None and (self.epsilon is not None or self.min_samples is not None):
            raise ConfigError(
                "epsilon and the minimum of samples are fixed in a bounds file; give either them or --bounds"
            )
        CohortBounds(*self._learning, {})  # refuses values out of range
        if self.body not in (BODY_IMAGE, BODY_UNION) and not Path(self.body).is_dir():
            raise ConfigError(f"body must be image, union or an existing folder of masks, got {self.body!r}")

    @property
    def _learning(self) -> tuple[float, int]:
        """(epsilon, min_samples) that bounds are learnt with."""
        return (
            EPSILON if self.epsilon is None else self.epsilon,
            MIN_SAMPLES if self.min_samples is None else self.min_samples,
        )

    def bounds_for(self, features: pd.DataFrame, names: Mapping[int, str]) -> CohortBounds:
        """The limits to apply: those of the bounds file, or learnt from the features.

        Raises:
            DatasetError: the bounds file cannot be read.
            ConfigError: the bounds belong to other organs.
        """
        if self.bounds_file is not None:
            return _load_bounds(self.bounds_file, names)
        return learn_bounds(features, *self._learning, names)


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
        organs: one entry per organ that occurs.
        unjudged: names of organs with too few samples for the rule; they are never flagged.
        small_bodies: scans whose body volume is smaller than their labelled volume, a sign of a wrong body mask.
        trust: the decisions, as training will read them.
        bounds: the limits applied.
    """

    folder: Path
    dataset: str
    cases: int
    computed: int
    organs: tuple[OrganSummary, ...]
    unjudged: tuple[str, ...]
    small_bodies: int
    trust: LabelTrust
    bounds: CohortBounds

    @property
    def labels(self) -> int:
        """Organ labels in all scans together."""
        return sum(organ.cases for organ in self.organs)

    @property
    def flagged(self) -> int:
        """Flagged labels in all scans together."""
        return sum(organ.flagged for organ in self.organs)


def solf_filter(raw_folder: Path, output_folder: Path, config: FilterConfig | None = None) -> FilterSummary:
    """Find the organ labels of a dataset that cannot be trusted.

    Writes features.parquet, bounds.json, flags.parquet, policy.json and report.html. Features of single cases are
    kept in ``cases/``: a run that was killed goes on where it was, and a second run reads no image or label again
    for the tables (only the report reads the few that it shows).

    Args:
        raw_folder: a raw dataset (``DatasetXXX_Name``).
        output_folder: by convention ``preprocessed/DatasetXXX_Name/solf``, where training looks for it.
        config: None takes the defaults.

    Raises:
        DatasetError: a file of a case cannot be used; names the case.
        ConfigError: bounds that belong to other organs.
    """
    config = config or FilterConfig()
    folder = Path(output_folder)
    spec = DatasetSpec.load(raw_folder)
    cases = require_cases(raw_folder, spec)
    names = organ_names(spec.labels)
    if config.bounds_file is not None:
        _load_bounds(config.bounds_file, names)  # fail before the long work
    ensure_writable(folder)

    measurement = CaseMeasurement(folder / "cases", spec.file_ending, spec.labels.ignore_value, config.body)
    features, computed = measure_cohort(cases, measurement, config.workers, config.quiet)
    check_label_values(features, spec)
    if features.empty:
        raise DatasetError(f"{spec.name}: none of the {len(cases)} label maps holds an organ; nothing to filter")
    features.insert(1, "organ", features["label"].map(names))

    bounds = config.bounds_for(features, names)
    flags = flag_organs(features, rule=config.rule, bounds=bounds)
    _write(folder, features, flags, bounds, config.policy)

    summary = _summarise(flags, bounds, config, spec, folder, (len(cases), computed))
    if summary.small_bodies:
        logger.warning(
            "warning: in %d of %d scans the body (--body %s) is smaller than the labelled organs; "
            "use --body union or a folder of masks",
            summary.small_bodies,
            len(cases),
            config.body,
        )
    if config.report:
        from ukbob_seg.filtering.report import write_report

        write_report(folder / REPORT_FILE, summary, flags, {case.name: case for case in cases}, config)
    else:
        (folder / REPORT_FILE).unlink(missing_ok=True)  # an older one would show other decisions
    return summary


def organ_names(scheme: LabelScheme) -> dict[int, str]:
    """Name of every label value; members of overlapping regions have none of their own and get ``label N``."""
    if scheme.has_regions:
        return {value: f"label {value}" for value in scheme.values}
    return dict(zip(scheme.values, scheme.output_names[1:], strict=True))


def _load_bounds(path: Path, names: Mapping[int, str]) -> CohortBounds:
    bounds = CohortBounds.load(path)
    for label, organ in bounds.organs.items():
        if organ.name and organ.name != names.get(label, organ.name):
            raise ConfigError(
                f"{path}: label {label} is {organ.name!r} there and {names[label]!r} in this dataset; "
                "bounds can only be applied to the same organs"
            )
    return bounds


def _write(
    folder: Path, features: pd.DataFrame, flags: pd.DataFrame, bounds: CohortBounds, policy: FilterPolicy
) -> None:
    """Write the decisions; the policy last, so that training never sees new flags with an old policy."""
    (folder / POLICY_FILE).unlink(missing_ok=True)
    for name, table in ((FEATURES_FILE, features), (FLAGS_FILE, flags)):
        with atomic_path(folder / name) as temporary:
            table.to_parquet(temporary, index=False)
    bounds.save(folder / BOUNDS_FILE)
    policy.save(folder / POLICY_FILE)


def _summarise(
    flags: pd.DataFrame,
    bounds: CohortBounds,
    config: FilterConfig,
    spec: DatasetSpec,
    folder: Path,
    counts: tuple[int, int],
) -> FilterSummary:
    names = organ_names(spec.labels)
    per_organ = flags.groupby("label")["flagged"].agg(["size", "sum"])
    per_case = flags.groupby("case").agg(body=("body_voxels", "first"), labelled=("voxels", "sum"))
    return FilterSummary(
        folder=folder,
        dataset=spec.name,
        cases=counts[0],
        computed=counts[1],
        organs=tuple(
            OrganSummary(int(label), names[label], int(size), int(flagged))
            for label, size, flagged in per_organ.itertuples(name=None)
        ),
        unjudged=tuple(names[label] for label in unjudged_labels(flags, bounds, config.rule)),
        small_bodies=int((per_case["body"] < per_case["labelled"]).sum()),
        trust=LabelTrust.from_flags(flags, config.policy),
        bounds=bounds,
    )
