"""What each choice of the filter would flag, and, where manual labels exist, how right it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ukbob_seg.dataset.image_io import read_labels
from ukbob_seg.dataset.spec import Case
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.files import atomic_path
from ukbob_seg.filtering.agreement import rule_flags
from ukbob_seg.filtering.bounds import SOLF_FEATURES, CohortBounds, learn_bounds
from ukbob_seg.filtering.cohort import flag_cohort
from ukbob_seg.filtering.config import FilterConfig
from ukbob_seg.filtering.features import Cohort
from ukbob_seg.filtering.solf import MODELS
from ukbob_seg.filtering.strata import learn_strata
from ukbob_seg.parallel import choose_workers, map_cases
from ukbob_seg.report_page import ReportPage

EPSILONS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
CONFIDENCES = (0.99, 0.999, 0.9999, 0.99999)
TABLE_FILE = "ablation.csv"
PAGE_FILE = "ablation.html"
ALL = "all organs"


@dataclass(frozen=True)
class Variant:
    """One choice and what it flags.

    Attributes:
        rule: ``solf``, ``volume``, ``iqr``, ``joint``, ``anatomy``, ``none``, or a subset of features such as
            ``sphericity + eccentricity`` (both outside).
        setting: epsilon, or the confidence of the rules joint and anatomy; NaN where neither plays a part.
        flagged: (rows,) bool.
    """

    rule: str
    setting: float
    flagged: np.ndarray


def ablate(
    raw_folder: Path, output_folder: Path, config: FilterConfig | None = None, reference_folder: Path | None = None
) -> str:
    """Tabulate what the filter would flag for other choices; flags and policy of an earlier run stay as they are.

    Writes ablation.csv (one row per choice and organ) and ablation.html.

    Args:
        raw_folder: a raw dataset.
        output_folder: of the filter; features measured there are not measured again.
        config: body, strata, workers and fewest samples are used.
        reference_folder: true labels ``CASE.ext`` of some cases, to score kept and flagged labels by their Dice.

    Returns:
        A short table for the terminal.

    Raises:
        DatasetError: a file cannot be used.
        ConfigError: no case has a reference.
    """
    config = config or FilterConfig()
    if config.bounds_file is not None:
        raise ConfigError("--ablate learns bounds for every epsilon; leave --bounds out")
    cohort = Cohort.open(raw_folder, output_folder, config)
    pairs = [] if reference_folder is None else _with_reference(cohort, Path(reference_folder))
    features = cohort.features(cohort.measure())
    if pairs:
        features["dice"] = _dice_column(features, pairs, cohort)
    choices = list(variants(features, config))
    order = list(dict.fromkeys(choice.rule for choice in choices))
    table = ablation_table(features, sorted(choices, key=lambda choice: order.index(choice.rule)))
    with atomic_path(cohort.folder / TABLE_FILE) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", float_format="%.6g")
    _write_page(cohort.folder / PAGE_FILE, cohort.spec.name, table)
    return _terminal_table(table) + f"\nwritten to {cohort.folder / TABLE_FILE}; look at {cohort.folder / PAGE_FILE}"


def variants(features: pd.DataFrame, config: FilterConfig) -> Iterator[Variant]:
    """Every rule for every epsilon or confidence, and every subset of features for every epsilon.

    A subset of one or two features flags when all of them are outside; all three are SOLF's two of three.
    """
    columns, (_, min_samples, _) = config.strata_columns, config.learning
    yield Variant("none", np.nan, np.zeros(len(features), dtype=bool))
    for epsilon in EPSILONS:
        bounds = learn_strata(
            features, columns, partial(learn_bounds, epsilon=epsilon, min_samples=min_samples, joint=False)
        )
        flags = flag_cohort(features, bounds, "solf")
        decisions = rule_flags(flags)
        if epsilon == EPSILONS[0]:
            yield Variant("iqr", np.nan, decisions["iqr"])
        yield Variant("solf", epsilon, decisions["solf"])
        yield Variant("volume", epsilon, decisions["volume"])
        for size in (1, 2):
            for subset in combinations(SOLF_FEATURES, size):
                outside = flags[[f"{name}_outside" for name in subset]].to_numpy(bool).all(axis=1)
                if subset != ("normalized_volume",):  # that is the rule volume
                    yield Variant(" + ".join(subset), epsilon, outside)
    bounds = learn_strata(features, columns, partial(learn_bounds, min_samples=min_samples))
    flags = flag_cohort(features, bounds, "joint")
    for column, rule in MODELS.items():
        for confidence in CONFIDENCES if column in flags else ():
            limit = CohortBounds(0, 1, {}, confidence).most_doubt
            yield Variant(rule, confidence, flags[column].to_numpy() > limit)


def ablation_table(features: pd.DataFrame, choices: list[Variant]) -> pd.DataFrame:
    """One row per choice and organ, and one for all organs.

    Args:
        features: with the column organ, and ``dice`` where references exist (NaN for labels without one).
        choices: what to compare.

    Returns:
        Columns rule, setting, organ, labels, flagged, share (percent), and with references: scored, dice_all,
        dice_kept, dice_flagged (means over the labels that have a reference; NaN when there is none).
    """
    rows: list[dict[str, object]] = []
    organs = [(ALL, np.ones(len(features), dtype=bool))]
    organs += [(str(name), (features["organ"] == name).to_numpy()) for name in pd.unique(features["organ"])]
    dice = features["dice"].to_numpy(np.float64) if "dice" in features else None
    for choice in choices:
        for name, here in organs:
            flagged = choice.flagged & here
            row: dict[str, object] = {
                "rule": choice.rule,
                "setting": choice.setting,
                "organ": name,
                "labels": int(here.sum()),
                "flagged": int(flagged.sum()),
                "share": 100 * flagged.sum() / here.sum(),
            }
            if dice is not None:
                scored = np.isfinite(dice)
                row["scored"] = int((scored & here).sum())
                row["dice_all"] = _mean(dice[scored & here])
                row["dice_kept"] = _mean(dice[scored & here & ~flagged])
                row["dice_flagged"] = _mean(dice[scored & flagged])
            rows.append(row)
    return pd.DataFrame(rows)


def label_dice(label: np.ndarray, reference: np.ndarray) -> dict[int, float]:
    """Dice of every value that occurs in a label map against the reference's voxels of the same value."""
    here, there = np.bincount(label.ravel()), np.bincount(reference.ravel())
    both = np.bincount(label[label == reference])
    there, both = (np.pad(counts, (0, max(0, len(here) - len(counts)))) for counts in (there, both))
    return {int(v): float(2 * both[v] / (here[v] + there[v])) for v in np.flatnonzero(here) if v}


def _with_reference(cohort: Cohort, folder: Path) -> list[tuple[Case, Path]]:
    if not folder.is_dir():
        raise ConfigError(f"the folder of reference labels {folder} does not exist")
    pairs = [(case, folder / f"{case.name}{cohort.spec.file_ending}") for case in cohort.cases]
    found = [(case, path) for case, path in pairs if path.is_file()]
    if not found:
        raise ConfigError(
            f"{folder} has a reference for none of the {len(pairs)} cases; they are looked for under names such as "
            f"{pairs[0][1].name}"
        )
    return found


def _score(pair: tuple[Case, Path]) -> dict[int, float]:
    case, path = pair
    assert case.label is not None
    label, geometry = read_labels(case.label)
    reference, other = read_labels(path)
    difference = geometry.difference(other, ("the label", "the reference"))
    if difference is not None:
        raise DatasetError(f"case {case.name}: {difference}; resample the reference to the label's grid")
    if min(label.min(initial=0), reference.min(initial=0)) < 0:
        raise DatasetError(f"case {case.name}: {path} has negative values")
    return label_dice(label, reference)


def _dice_column(features: pd.DataFrame, pairs: list[tuple[Case, Path]], cohort: Cohort) -> np.ndarray:
    config = cohort.config
    workers = choose_workers(config.workers, len(pairs))
    scores = map_cases(_score, pairs, workers, "scoring labels", config.quiet, scheduler=config.scheduler)
    dice = {(case.name, value): d for (case, _), found in zip(pairs, scores, strict=True) for value, d in found.items()}
    return np.array([dice.get(key, np.nan) for key in zip(features["case"], features["label"], strict=True)])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _terminal_table(table: pd.DataFrame) -> str:
    whole = table[(table["organ"] == ALL) & table["rule"].isin(("none", "iqr", "solf", "volume", "joint", "anatomy"))]
    scored = "dice_kept" in table
    lines = [f"{'rule':<8} {'setting':>8} {'flagged':>8} {'share':>8}" + ("  Dice kept  flagged" if scored else "")]
    for row in whole.itertuples():
        setting = "-" if np.isnan(row.setting) else f"{row.setting:g}"
        line = f"{row.rule:<8} {setting:>8} {row.flagged:8d} {row.share:6.2f} %"
        lines.append(line + (f"  {row.dice_kept:9.4f}  {row.dice_flagged:7.4f}" if scored else ""))
    if scored:
        lines.append(f"labels with a reference: {int(whole['scored'].iloc[0])} of {int(whole['labels'].iloc[0])}")
    return "\n".join(lines)


def _write_page(path: Path, dataset: str, table: pd.DataFrame) -> None:
    whole = table[table["organ"] == ALL]
    page = ReportPage(
        f"Choices of the label filter: {dataset}",
        "Setting: epsilon in percent, or the confidence of the rules joint and anatomy. Subsets of features flag a "
        "label when all of them are outside their bounds; solf when two of the three are.",
    )
    page.figure(_figure(whole), "Flagged share of all labels, and Dice of the kept labels where references exist.")
    page.heading("All organs")
    scored = "dice_kept" in table
    header = ["rule", "setting", "flagged", "share, %", *(["Dice kept", "Dice flagged"] if scored else [])]
    page.table(
        header,
        [
            [row.rule, "-" if np.isnan(row.setting) else f"{row.setting:g}", row.flagged, f"{row.share:.2f}"]
            + ([float(row.dice_kept), float(row.dice_flagged)] if scored else [])
            for row in whole.itertuples()
        ],
    )
    for rule in ("solf", *MODELS.values()):
        shares = table[(table["rule"] == rule) & (table["organ"] != ALL)]
        if shares.empty:
            continue
        page.heading(f"Flagged share by organ: {rule}, %")
        wide = shares.pivot(index="organ", columns="setting", values="share").loc[pd.unique(shares["organ"])]
        page.table(
            ["organ", *(f"{setting:g}" for setting in wide.columns)],
            [
                [organ, *(f"{value:.2f}" for value in row)]
                for organ, row in zip(wide.index, wide.to_numpy(), strict=True)
            ],
        )
    page.write(path)


def _figure(whole: pd.DataFrame) -> Figure:
    scored = "dice_kept" in whole
    figure = Figure(figsize=(10 if scored else 6, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    by_epsilon = whole[whole["setting"].notna() & (~whole["rule"].isin(MODELS.values()))]
    for axis, column, heading in zip(axes, ("share", "dice_kept"), ("flagged, %", "Dice of kept labels"), strict=False):
        for rule, rows in by_epsilon.groupby("rule", sort=False):
            style = {"linewidth": 2.2} if rule in ("solf", "volume") else {"linewidth": 1, "linestyle": "--"}
            axis.plot(rows["setting"], rows[column], marker="o", markersize=3, label=rule, **style)
        for rule, setting in (("none", None), ("iqr", None), ("joint", 0.999), ("anatomy", 0.999)):
            rows = whole[(whole["rule"] == rule) & ((whole["setting"] == setting) if setting else True)]
            if len(rows) and np.isfinite(rows[column].iloc[0]):
                axis.axhline(rows[column].iloc[0], color="0.55", linewidth=0.8)
                axis.text(5, rows[column].iloc[0], f"{rule} {setting or ''}", fontsize=7, ha="right", va="bottom")
        axis.set_xlabel("epsilon, %")
        axis.set_ylabel(heading)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].legend(fontsize=7, frameon=False)
    return figure
