"""Which organ labels of a cohort can be trusted: the Specialized Organ Label Filter and its baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ukbob_seg.errors import ConfigError
from ukbob_seg.filtering.bounds import (
    EPSILON,
    MIN_SAMPLES,
    PLAIN_VOLUME,
    SOLF_FEATURES,
    CohortBounds,
    doubts,
    has_anatomy,
    learn_bounds,
    outside,
)
from ukbob_seg.filtering.joint import CONFIDENCE


@dataclass(frozen=True)
class Rule:
    """A way to decide from a table of features and their ``<feature>_outside`` columns.

    Attributes:
        features: columns that the rule judges by; those in ``MODELS`` are made from others.
        decide: table -> (rows,) bool, whether each label is inaccurate.
    """

    features: tuple[str, ...]
    decide: Callable[[pd.DataFrame], np.ndarray]


def _at_least(needed: int, *features: str) -> Rule:
    columns = [f"{feature}_outside" for feature in features]
    return Rule(features, lambda table: table[columns].to_numpy(bool).sum(axis=1) >= needed)


# Columns made by models -> the part of the bounds that makes them.
MODELS = {"doubt": "joint", "anatomy_doubt": "anatomy"}

RULES: dict[str, Rule] = {
    "solf": _at_least(2, *SOLF_FEATURES),
    "volume": _at_least(1, "normalized_volume"),
    "iqr": _at_least(1, PLAIN_VOLUME),
    "joint": _at_least(1, "doubt"),
    "anatomy": _at_least(1, "anatomy_doubt"),
    "none": _at_least(1),
}


def get_rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        ConfigError: unknown; lists the choices.
    """
    if name not in RULES:
        raise ConfigError(f"unknown rule {name!r}; choose one of {', '.join(RULES)}")
    return RULES[name]


def flag_organs(
    features: pd.DataFrame,
    epsilon: float = EPSILON,
    rule: str = "solf",
    *,
    bounds: CohortBounds | None = None,
    min_samples: int = MIN_SAMPLES,
    confidence: float = CONFIDENCE,
) -> pd.DataFrame:
    """Flag the labels that are probably inaccurate.

    ``solf``: at least two of normalized volume, sphericity and eccentricity lie outside the organ's percentile
    limits. ``volume``: the normalized volume does. ``iqr``: ``volume_mm3`` lies outside Tukey's fences. ``joint``:
    the three features together are less probable than 1 - confidence. ``anatomy``: size, sphericity, axes and place
    beside the scan's other organs are. ``none``: nothing is flagged.

    Args:
        features: one row per case and label, with the columns case, label, normalized_volume, sphericity,
            eccentricity; volume_mm3 for the rule ``iqr``; those of ``organ_evidence`` for ``anatomy``.
        epsilon: percent cut off by the percentile limits, half at each end; not used when ``bounds`` are given.
        rule: solf, volume, iqr, joint, anatomy or none.
        bounds: limits learnt elsewhere; None learns them from this table.
        min_samples: an organ with fewer finite values of a feature has no limits there; not used with ``bounds``.
        confidence: share of ordinary labels that joint and anatomy call ordinary; not used with ``bounds``.

    Returns:
        A copy with the same rows in the same order and, added, ``<feature>_outside`` (bool) per feature, ``votes``
        (0-3: SOLF features outside, whatever the rule) and ``flagged`` (bool). A NaN feature is never outside. Where
        the models were learnt (always for the rules ``joint`` and ``anatomy``) also ``doubt`` and ``anatomy_doubt``,
        see ``JointModel.doubt``, and their ``_outside``.

    Raises:
        ConfigError: unknown rule, epsilon out of range, or a column is missing.
    """
    chosen = get_rule(rule)
    needed = ("case", "label", *SOLF_FEATURES, *chosen.features)
    missing = [name for name in needed if name not in MODELS and name not in features.columns]
    if missing:
        raise ConfigError(f"the feature table lacks {', '.join(dict.fromkeys(missing))} (needed by the rule {rule!r})")
    if rule == "anatomy" and not has_anatomy(features):
        raise ConfigError("the rule 'anatomy' needs the columns of organ_evidence (ukbob_filter --evidence)")
    modelled = [name for name in chosen.features if name in MODELS]
    if bounds is None:
        bounds = learn_bounds(features, epsilon, min_samples, confidence=confidence, joint=bool(modelled))
    table = features.copy()
    for feature in (*SOLF_FEATURES, PLAIN_VOLUME):
        if feature in features.columns:
            table[f"{feature}_outside"] = outside(features, feature, bounds)
    for name, model in MODELS.items():
        possible = model == "joint" or has_anatomy(features)
        if name in modelled or (possible and has_model(bounds, model)):
            table[name] = doubts(features, bounds, model)
            table[f"{name}_outside"] = table[name] > bounds.most_doubt
    table["votes"] = sum(table[f"{feature}_outside"].to_numpy(np.int8) for feature in SOLF_FEATURES)
    table["flagged"] = chosen.decide(table)
    return table


def unjudged_labels(features: pd.DataFrame, bounds: CohortBounds, rule: str) -> list[int]:
    """Labels of the table for which the rule has no limits or model (too few samples), ascending."""
    needed = get_rule(rule).features
    return [
        int(label)
        for label in np.unique(features["label"].to_numpy())
        if any(not _is_known(bounds, int(label), feature) for feature in needed)
    ]


def _is_known(bounds: CohortBounds, label: int, feature: str) -> bool:
    if feature in MODELS:
        return label in bounds.organs and getattr(bounds.organs[label], MODELS[feature]) is not None
    return not np.isnan(bounds.limits(label, feature)[0])


def has_model(bounds: CohortBounds, model: str) -> bool:
    """Whether any organ has the model (``joint`` or ``anatomy``)."""
    return any(getattr(organ, model) is not None for organ in bounds.organs.values())
