"""How far the rules agree on the same table."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ukbob_seg.filtering.solf import RULES


def rule_flags(flags: pd.DataFrame) -> dict[str, np.ndarray]:
    """What each rule but ``none`` says about the rows of a table of ``flag_organs``.

    Returns:
        rule -> (rows,) bool, for the rules whose columns the table has.
    """
    return {
        name: rule.decide(flags)
        for name, rule in RULES.items()
        if rule.features and all(f"{feature}_outside" in flags for feature in rule.features)
    }


def agreement(decisions: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Labels flagged by both rules, for every pair; the diagonal holds what a rule flags alone.

    Args:
        decisions: rule -> (rows,) bool.
    """
    table = np.array([[int((one & other).sum()) for other in decisions.values()] for one in decisions.values()])
    return pd.DataFrame(table, index=list(decisions), columns=list(decisions))
