"""The filter's report: what was flagged, why, and how it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ukbob_seg.dataset.spec import Case
from ukbob_seg.errors import listing
from ukbob_seg.filtering.agreement import agreement, rule_flags
from ukbob_seg.filtering.body import BODY_IMAGE, BODY_UNION
from ukbob_seg.filtering.bounds import IQR_FACTOR, PLAIN_VOLUME, SOLF_FEATURES, excess
from ukbob_seg.filtering.policies import ACTIONS
from ukbob_seg.filtering.report_figures import (
    Specimen,
    distribution_figures,
    gallery_figure,
    organ_share_figure,
    scan_count_figure,
)
from ukbob_seg.filtering.review import label_scores, scan_scores
from ukbob_seg.filtering.solf import MODELS, get_rule
from ukbob_seg.filtering.strata import StratifiedBounds
from ukbob_seg.report_page import ReportPage

if TYPE_CHECKING:
    from ukbob_seg.filtering.cohort import FilterSummary
    from ukbob_seg.filtering.config import FilterConfig

WORST_PICTURES = 12
ORDINARY_PICTURES = 8
WORST_ROWS = 30
WORST_SCANS = 10
NAMES_PER_SCAN = 3
SHORT_NAMES = {
    "normalized_volume": "normalized volume",
    "sphericity": "sphericity",
    "eccentricity": "eccentricity",
    PLAIN_VOLUME: "volume (mm³)",
    "doubt": "doubt",
    "anatomy_doubt": "doubt (anatomy)",
    "stray": "stray pieces",
    "swapped": "sides exchanged",
}


def write_report(
    path: Path, summary: FilterSummary, flags: pd.DataFrame, cases: Mapping[str, Case], config: FilterConfig
) -> None:
    """Write the self-contained HTML report.

    Args:
        path: of the HTML file.
        summary: what the filter found.
        flags: the table of ``flag_organs`` with the columns organ, stratum and body_voxels.
        cases: by name; image and label of those that are shown are read again for their pictures.
        config: the options used.
    """
    shown = _shown_features(config.rule)
    worst = worst_labels(flags, summary.bounds, config.rule)
    page = ReportPage(f"Label filter: {summary.dataset}", _rule_sentence(config, summary.bounds))
    _overview(page, summary, config)
    page.heading("Most extreme flagged labels")
    _worst_section(page, worst, summary.bounds, cases, shown)
    _ordinary_section(page, flags, worst, cases)
    page.heading("Flags per scan")
    _scan_section(page, summary, flags)
    page.heading("Agreement of the rules")
    _agreement_section(page, flags, config.rule)
    page.heading("Organs")
    page.figure(
        organ_share_figure({o.name: 100 * o.share for o in sorted(summary.organs, key=lambda o: -o.share)}),
        "Flagged share of each organ's labels.",
    )
    page.paragraph(
        "Mean ± standard deviation over all labels, and over the labels that were kept. The volume is normalized: "
        "percent of the body."
    )
    _organ_table(page, flags, shown)
    page.heading("Distributions and bounds")
    page.paragraph(
        "One row per organ. Blue bars: kept labels. Red ticks: flagged labels. Dashed lines: bounds. Values far "
        "beyond the bounds are drawn at the edge as triangles."
    )
    for figure, caption in distribution_figures(flags, summary.bounds, {name: SHORT_NAMES[name] for name in shown}):
        page.figure(figure, caption)
    page.write(path)


def worst_labels(flags: pd.DataFrame, bounds: StratifiedBounds, rule: str) -> pd.DataFrame:
    """The flagged rows, the most extreme first, with a column ``severity``.

    Severity is the doubt for the rules ``joint`` and ``anatomy``; otherwise the sum, over the rule's features, of how
    far the value lies beyond its bounds, in widths of the bounds. Equal severities keep the order of the table.
    """
    features = get_rule(rule).features
    severity = pd.Series(0.0, index=flags.index)
    for _, limits, rows in bounds.split(flags):
        for feature in features:
            severity[rows.index] += rows[feature] if feature in MODELS else excess(rows, feature, limits)
    flagged = flags.assign(severity=severity)[flags["flagged"].to_numpy(bool)]
    return flagged.sort_values("severity", ascending=False, kind="stable")


def ordinary_labels(flags: pd.DataFrame, organs: Sequence[int]) -> pd.DataFrame:
    """The least doubtful kept label of each of the given organs; of equals the first in the table."""
    kept = flags[~flags["flagged"].to_numpy(bool) & flags["label"].isin(list(organs)).to_numpy(bool)]
    order = kept.assign(score=label_scores(kept)).sort_values("score", kind="stable")
    first = order.drop_duplicates("label").set_index("label", drop=False)
    return first.loc[[label for label in organs if label in first.index]]


def _shown_features(rule: str) -> tuple[str, ...]:
    """SOLF's features, and whatever else the rule reads."""
    return tuple(dict.fromkeys((*SOLF_FEATURES, *get_rule(rule).features)))


def _rule_sentence(config: FilterConfig, bounds: StratifiedBounds) -> str:
    source = "learnt on this cohort" if config.bounds_file is None else f"read from {config.bounds_file.name}"
    if bounds.columns:
        source += f", separately for each {' and '.join(bounds.columns)}"
    epsilon = bounds.any.epsilon
    percent = f"percentiles {epsilon / 2:g} and {100 - epsilon / 2:g} of its organ ({source})"
    return {
        "solf": "A label is flagged when at least two of normalized volume, sphericity and eccentricity lie outside "
        f"the {percent}.",
        "volume": f"A label is flagged when its normalized volume lies outside the {percent}.",
        "iqr": f"A label is flagged when its volume lies more than {IQR_FACTOR:g} interquartile ranges beyond the "
        f"quartiles of its organ ({source}).",
        "joint": "A label is flagged when its normalized volume, sphericity and eccentricity together are as unusual "
        f"as one ordinary label in {1 / (1 - bounds.any.confidence):,.0f}, by the robust mean and covariance of its "
        f"organ ({source}).",
        "anatomy": "A label is flagged when its volume, sphericity, principal axes and place, beside the other organs "
        f"of its scan, are as unusual as one ordinary label in {1 / (1 - bounds.any.confidence):,.0f}, by the robust "
        f"mean and covariance of its organ ({source}).",
        "none": "No label is flagged (rule none); the features are listed for reference.",
    }.get(config.rule, f"Rule {config.rule}, bounds {source}.")


def _overview(page: ReportPage, summary: FilterSummary, config: FilterConfig) -> None:
    scans = sum(1 for values in summary.trust.flags.values() if values)
    page.tiles(
        [
            ("scans", f"{summary.cases:,}"),
            ("organs", str(len(summary.organs))),
            ("labels", f"{summary.labels:,}"),
            ("flagged labels", f"{summary.flagged:,} ({100 * summary.flagged / summary.labels:.2f} %)"),
            ("scans with a flag", f"{scans:,}"),
            ("scans dropped", f"{len(summary.trust.dropped_cases):,}"),
        ]
    )
    dropping = config.policy.max_flags
    body = {BODY_IMAGE: "foreground of the first image channel", BODY_UNION: "union of all labels"}
    notes = [
        f"In training: {ACTIONS[config.policy.action]}"
        + ("." if dropping is None else f"; scans with more than {dropping} flagged organs are dropped."),
        f"Body volume: {body.get(config.body, 'masks given by the user')}.",
    ]
    if summary.small_bodies:
        notes.append(
            f"In {summary.small_bodies} of {summary.cases} scans the body is smaller than the labelled organs, so the "
            "normalized volume is doubtful there; use --body union or a folder of masks."
        )
    if summary.unjudged:
        few = f"fewer than {summary.bounds.any.min_samples} values were there to learn bounds from"
        reason = few if summary.bounds_file is None else f"{summary.bounds_file.name} has no bounds for them"
        notes.append(f"Never flagged, since {reason}: " + ", ".join(summary.unjudged) + ".")
    if summary.verdicts:
        notes.append(f"{summary.verdicts} labels were decided by a reviewer, whatever the rule says.")
    if summary.skipped:
        notes.append(f"{len(summary.skipped)} scans could not be measured and are left out.")
    epsilon = summary.bounds.any.epsilon
    coarse = _coarse_organs(summary.bounds)
    if coarse and config.rule in ("solf", "volume"):
        notes.append(
            f"Percentiles at epsilon {epsilon:g} need {200 / epsilon:.0f} labels of an "
            f"organ; with fewer, its lowest and highest values always count as outside (organs concerned: {coarse})."
        )
    page.bullets(notes)


def _coarse_organs(bounds: StratifiedBounds) -> int:
    """Organs whose bounds come from so few labels that the outermost ones are outside by construction."""
    if bounds.any.epsilon == 0:
        return 0
    needed = 200 / bounds.any.epsilon
    return sum(
        1
        for limits in bounds.strata.values()
        for organ in limits.organs.values()
        if organ.limits and organ.cases < needed
    )


def _ordinary_section(page: ReportPage, flags: pd.DataFrame, worst: pd.DataFrame, cases: Mapping[str, Case]) -> None:
    """For comparison: ordinary labels of the organs shown above, then of others."""
    organs = list(dict.fromkeys([*worst["label"].head(WORST_PICTURES), *sorted(flags["label"].unique())]))
    rows = ordinary_labels(flags, organs).head(ORDINARY_PICTURES)
    if rows.empty:
        return
    page.heading("The most ordinary labels")
    page.figure(
        gallery_figure([Specimen(cases[row.case], int(row.label), str(row.organ)) for row in rows.itertuples()]),
        "The kept label that is nearest to the middle of its organ's distributions, for comparison (green).",
    )


def _agreement_section(page: ReportPage, flags: pd.DataFrame, rule: str) -> None:
    """How many labels each pair of rules flags together."""
    decisions = rule_flags(flags)
    table = agreement(decisions)
    page.paragraph(
        "Labels flagged by both the rule of the row and that of the column, with the bounds of this run; in the "
        f"diagonal all that a rule flags. This run used {rule}."
    )
    page.table(
        ["rule", *table.columns, "flagged, %"],
        [
            [name, *(int(value) for value in row), f"{100 * decisions[name].mean():.2f}"]
            for name, row in zip(table.index, table.to_numpy(), strict=True)
        ],
    )


def _organ_table(page: ReportPage, flags: pd.DataFrame, shown: tuple[str, ...]) -> None:
    header = ["organ", "flagged"]
    for feature in shown:
        header += ["volume, %" if feature == "normalized_volume" else SHORT_NAMES[feature], "kept"]
    rows = []
    for _, organ in flags.groupby("label", sort=True):
        kept = organ[~organ["flagged"].to_numpy(bool)]
        flagged = len(organ) - len(kept)
        row: list[object] = [organ["organ"].iloc[0], f"{flagged} of {len(organ)} ({100 * flagged / len(organ):.1f} %)"]
        for feature in shown:
            scale, decimals = (100, 6) if feature == "normalized_volume" else (1, 3)
            row += [_mean_sd(scale * table[feature], decimals) for table in (organ, kept)]
        rows.append(row)
    page.table(header, rows)


def _worst_section(
    page: ReportPage, worst: pd.DataFrame, bounds: StratifiedBounds, cases: Mapping[str, Case], shown: tuple[str, ...]
) -> None:
    if worst.empty:
        page.paragraph("No label was flagged.")
        return
    pictures = [
        Specimen(cases[row.case], int(row.label), str(row.organ), _reasons(row, bounds, shown))
        for row in worst.head(WORST_PICTURES).itertuples()
    ]
    page.figure(
        gallery_figure(pictures),
        "The flagged organ in red, other labels in pale blue; the slice is the one that shows most of the organ.",
    )
    if len(worst) > WORST_ROWS:
        page.paragraph(f"The {WORST_ROWS} most extreme of {len(worst)}; all are in flags.parquet.")
    page.paragraph("Values outside their bounds are shown with the bound that they pass.")
    page.table(
        ["scan", "organ", "votes", *(SHORT_NAMES[feature] for feature in shown)],
        [
            [row.case, row.organ, row.votes, *(_against_bound(row, bounds, feature) for feature in shown)]
            for row in worst.head(WORST_ROWS).itertuples()
        ],
    )


def _scan_section(page: ReportPage, summary: FilterSummary, flags: pd.DataFrame) -> None:
    counts = flags.groupby("case")["flagged"].sum()
    page.figure(scan_count_figure(counts.to_numpy()), "Scans by number of flagged organs.")
    scores = scan_scores(flags)
    order = pd.DataFrame({"flagged": counts, "score": scores.reindex(counts.index)})
    most = order[order["flagged"] > 0].sort_values(["flagged", "score"], ascending=False, kind="stable")
    if most.empty:
        return
    page.paragraph("The doubt of a scan is the sum of its labels' doubts, as far as they are larger than 2.")
    most = most.head(WORST_SCANS)
    shown = flags[flags["flagged"].to_numpy(bool) & flags["case"].isin(most.index).to_numpy(bool)]
    names = shown.groupby("case")["organ"].agg(lambda organs: listing(organs.tolist(), NAMES_PER_SCAN))
    dropped = summary.trust.dropped_cases
    page.table(
        ["scan", "flagged", "doubt", "dropped", "organs"],
        [
            [case, int(count), f"{score:.1f}", "yes" if case in dropped else "no", names[case]]
            for case, count, score in most.itertuples(name=None)
        ],
    )


def _reasons(row: Any, bounds: StratifiedBounds, features: tuple[str, ...]) -> str:
    """The features of a row that are outside their bounds, and on which side; other evidence; one a line."""
    parts = []
    for feature in features:
        if feature not in MODELS and getattr(row, f"{feature}_outside"):
            side = "low" if getattr(row, feature) < bounds.strata[row.stratum].limits(row.label, feature)[0] else "high"
            parts.append(f"{SHORT_NAMES[feature]} {side}")
    parts += [SHORT_NAMES[name] for name in ("stray", "swapped") if getattr(row, name, False)]
    if getattr(row, "verdict", ""):
        parts.append("rejected by a reviewer")
    return "\n".join(parts) or "unusual combination"


def _against_bound(row: Any, bounds: StratifiedBounds, feature: str) -> str:
    """``0.0872 > 0.0755`` for a value above its upper bound, the value alone inside."""
    value = getattr(row, feature)
    limits = bounds.strata[row.stratum]
    low, high = (0.0, limits.most_doubt) if feature in MODELS else limits.limits(row.label, feature)
    if not getattr(row, f"{feature}_outside"):
        return f"{value:.3g}" if np.isfinite(value) else "-"
    return f"{value:.3g} < {low:.3g}" if value < low else f"{value:.3g} > {high:.3g}"


def _mean_sd(values: pd.Series, most_decimals: int) -> str:
    """``mean ± sd`` with two significant digits of the standard deviation, as far as the decimals allow."""
    finite = values.to_numpy(np.float64)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return "-"
    spread = float(finite.std())
    decimals = int(np.clip(1 - np.floor(np.log10(spread)), 0, most_decimals)) if spread > 0 else 3
    return f"{finite.mean():.{decimals}f} ± {spread:.{decimals}f}"
