"""What a user may decide about the filter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from ukbob_seg.errors import ConfigError
from ukbob_seg.filtering.body import BODY_IMAGE, BODY_MASK, body_kind
from ukbob_seg.filtering.bounds import EPSILON, MIN_SAMPLES, CohortBounds, learn_bounds
from ukbob_seg.filtering.joint import CONFIDENCE
from ukbob_seg.filtering.policies import FilterPolicy
from ukbob_seg.filtering.solf import MODELS, get_rule, has_model
from ukbob_seg.filtering.strata import StratifiedBounds, learn_strata


@dataclass(frozen=True)
class FilterConfig:
    """How a cohort is filtered.

    Attributes:
        rule: ``solf``, ``volume``, ``iqr``, ``joint``, ``anatomy`` (with ``evidence``) or ``none``.
        epsilon: percent cut off by the percentile bounds; None means 2, or that of ``bounds_file``.
        min_samples: fewest samples for bounds; None means 20, or that of ``bounds_file``.
        confidence: of the rules ``joint`` and ``anatomy``; None means 0.999, or that of ``bounds_file``.
        bounds_file: bounds learnt on another cohort; None learns them on this one.
        strata_file: CSV file with a column ``case`` and those of ``strata_columns``; None does not divide the cohort.
        strata_columns: whose values divide the cohort; bounds are learnt in each stratum.
        body: ``image`` (foreground of the first channel), ``union`` (of all labels), or a folder of masks.
        evidence: also measure pieces, axes and places; look for stray pieces and for exchanged sides.
        policy: what a flag does in training.
        review: write review.csv and obey the verdicts in it.
        review_file: also read verdicts from here; they overrule those in the review.csv of an earlier run.
        skip_unreadable: leave out cases that cannot be measured instead of stopping at the end.
        workers: processes; None chooses.
        scheduler: address of a Dask scheduler whose workers measure instead.
        report: write the HTML report.
        quiet: no progress bar.
    """

    rule: str = "solf"
    epsilon: float | None = None
    min_samples: int | None = None
    confidence: float | None = None
    bounds_file: Path | None = None
    strata_file: Path | None = None
    strata_columns: tuple[str, ...] = ()
    body: str = BODY_IMAGE
    evidence: bool = False
    policy: FilterPolicy = field(default_factory=FilterPolicy)
    review: bool = False
    review_file: Path | None = None
    skip_unreadable: bool = False
    workers: int | None = None
    scheduler: str | None = None
    report: bool = True
    quiet: bool = False

    def __post_init__(self) -> None:
        get_rule(self.rule)
        if self.bounds_file is not None and (self.epsilon, self.min_samples, self.confidence) != (None, None, None):
            raise ConfigError(
                "epsilon, confidence and the minimum of samples are fixed in a bounds file; give either them or "
                "--bounds"
            )
        epsilon, min_samples, confidence = self.learning
        CohortBounds(epsilon, min_samples, {}, confidence)  # refuses values out of range
        if (self.strata_file is None) != (not self.strata_columns):
            raise ConfigError("a table of subjects and its columns go together: give --strata FILE and --stratify-by")
        if body_kind(self.body) == BODY_MASK and not (self.body and Path(self.body).is_dir()):
            raise ConfigError(f"body must be image, union or an existing folder of masks, got {self.body!r}")
        if self.rule == "anatomy" and not self.evidence:
            raise ConfigError("the rule anatomy judges places and axes: add --evidence (labels are measured again)")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers must be at least 1, got {self.workers}")
        if self.workers is not None and self.scheduler is not None:
            raise ConfigError("--workers is about processes on this machine; a Dask cluster has its own number")

    @property
    def learning(self) -> tuple[float, int, float]:
        """(epsilon, min_samples, confidence) that bounds are learnt with."""
        return (
            EPSILON if self.epsilon is None else self.epsilon,
            MIN_SAMPLES if self.min_samples is None else self.min_samples,
            CONFIDENCE if self.confidence is None else self.confidence,
        )

    def load_bounds(self, names: Mapping[int, str]) -> StratifiedBounds | None:
        """The bounds of ``bounds_file``, or None when they are to be learnt.

        Raises:
            DatasetError: the file cannot be read.
            ConfigError: the bounds belong to other organs, or to other strata than those asked for.
        """
        if self.bounds_file is None:
            return None
        bounds = StratifiedBounds.load(self.bounds_file)
        if bounds.columns != tuple(self.strata_columns):
            raise ConfigError(
                f"{self.bounds_file} was learnt with --stratify-by {','.join(bounds.columns) or '(nothing)'}; give the "
                f"same columns (now: {','.join(self.strata_columns) or 'none'}) and --strata"
            )
        kind = body_kind(self.body)
        if bounds.body and bounds.body != kind:
            raise ConfigError(
                f"{self.bounds_file} was learnt with the body from {bounds.body}, now it is {kind}: volumes "
                "cannot be compared; give the same --body"
            )
        for feature in get_rule(self.rule).features:
            if feature in MODELS and not any(has_model(cohort, MODELS[feature]) for cohort in bounds.strata.values()):
                raise ConfigError(
                    f"{self.bounds_file} has no models for the rule {self.rule}; make it again with ukbob_filter"
                    + (" --evidence" if self.rule == "anatomy" else "")
                )
        for cohort in bounds.strata.values():
            for label, organ in cohort.organs.items():
                if organ.name and organ.name != names.get(label, organ.name):
                    raise ConfigError(
                        f"{self.bounds_file}: label {label} is {organ.name!r} there and {names[label]!r} in this "
                        "dataset; bounds can only be applied to the same organs"
                    )
        return bounds

    def learn(self, features: pd.DataFrame, names: Mapping[int, str]) -> StratifiedBounds:
        """Bounds of this cohort, from features with the column ``stratum``."""
        epsilon, min_samples, confidence = self.learning
        bounds = learn_strata(
            features, self.strata_columns, lambda rows: learn_bounds(rows, epsilon, min_samples, names, confidence)
        )
        return replace(bounds, body=body_kind(self.body))
