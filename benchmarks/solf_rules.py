"""How well each rule finds planted label faults, and what it throws away that is right.

    python benchmarks/solf_rules.py                                            # synthetic cohort of 2,000 scans
    python benchmarks/solf_rules.py --hippocampus DIR/Dataset004_Hippocampus   # real label maps, faults planted
    python benchmarks/solf_rules.py --false-alarms                             # labels without any fault

Synthetic: organs of known shape in deformed bodies; 2% of the labels are spoilt (half missing, leaking, in fragments,
left and right exchanged, eroded), 1% of the organs are genuinely 30% larger and right. Hippocampus: the label maps of
imagesTr and imagesTs, 2% spoilt; repeated with other seeds, since there are few. False alarms: no label maps, but
features drawn from normal distributions, in cohorts of 50 to 400 scans of 13 organs; the share of these labels that the
rules joint and anatomy flag at confidence 0.999.

Recall: flagged part of the spoilt labels, by kind. Precision: spoilt part of the flagged labels. "overrun" labels were
ruined by a neighbour that leaked; they count as spoilt.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ukbob_seg.dataset.image_io import Geometry, read_labels
from ukbob_seg.demo.anatomy import PAIRED, organ_names
from ukbob_seg.demo.cohort import CohortConfig, make_labels
from ukbob_seg.demo.faults import KINDS, SWAPPED, pairs_of, plant_faults
from ukbob_seg.filtering.evidence import AXIS_COLUMNS, POSITION_COLUMNS, organ_evidence
from ukbob_seg.filtering.shape_features import organ_features
from ukbob_seg.filtering.solf import flag_organs
from ukbob_seg.parallel import cpu_count, map_cases

FAULT_KINDS = (*KINDS, SWAPPED)


@dataclass(frozen=True)
class Measured:
    """Features of one scan's labels after faults were planted, with the truth in the columns kind and large."""

    config: CohortConfig
    fraction: float

    def __call__(self, index: int) -> pd.DataFrame:
        subject = make_labels(self.config, index)
        generator = np.random.default_rng([self.config.seed, index, 1])
        large = {organ_names[name] for name in subject.large_organs}
        return spoil(
            f"case_{index:05d}",
            subject.labels,
            self.config.geometry,
            pairs_of(organ_names, PAIRED),
            generator,
            self.fraction,
            int(subject.body.sum()),
        ).assign(large=lambda table: table["label"].isin(large))


def spoil(
    case: str,
    truth: np.ndarray,
    geometry: Geometry,
    pairs: Sequence[tuple[int, int]],
    generator: np.random.Generator,
    fraction: float,
    body: int | None,
) -> pd.DataFrame:
    """Plant faults in a label map and measure it."""
    values = [int(value) for value in np.unique(truth) if value]
    labels, faults = plant_faults(truth, case, values, pairs, generator, fraction, tuple(KINDS))
    kinds = {fault.label: fault.kind for fault in faults}
    table = organ_features(labels, geometry.spacing_mm, body).merge(organ_evidence(labels, geometry), on="label")
    table.insert(0, "case", case)
    return table.assign(kind=table["label"].map(lambda value: kinds.get(value, "")), large=False)


def synthetic(cases: int, shape: tuple[int, int, int], seed: int, fraction: float) -> pd.DataFrame:
    """Features of a synthetic cohort."""
    config = CohortConfig(shape=shape, seed=seed)
    return pd.concat(
        map_cases(Measured(config, fraction), list(range(cases)), cpu_count(), "synthetic cohort"), ignore_index=True
    )


def hippocampus(folder: Path, seed: int, fraction: float) -> pd.DataFrame:
    """Features of real label maps with planted faults."""
    generator = np.random.default_rng(seed)
    tables = []
    for path in sorted([*folder.glob("labelsTr/*.nii.gz"), *folder.glob("labelsTs/*.nii.gz")]):
        labels, geometry = read_labels(path)
        tables.append(spoil(path.name[:-7], labels, geometry, [(1, 2)], generator, fraction, None))
    return pd.concat(tables, ignore_index=True)


def ordinary(scans: int, organs: int, generator: np.random.Generator) -> pd.DataFrame:
    """Features of scans whose labels are all right: normal (most of them after a logarithm), patients of any size."""

    def normal(mean: np.ndarray | float, spread: float) -> np.ndarray:
        return generator.normal(mean, spread, scans * organs)

    label = np.tile(np.arange(1, organs + 1), scans)
    size = np.repeat(generator.normal(0, 0.15, scans), organs)
    table = pd.DataFrame({"case": np.repeat([f"case_{k:05d}" for k in range(scans)], organs), "label": label})
    table["volume_mm3"] = np.exp(normal(10 + label / 4 + size, 0.1))
    table["normalized_volume"] = np.exp(normal(-6 + label / 4, 0.1))
    table["sphericity"] = np.exp(normal(-0.7, 0.05))
    table["eccentricity"] = np.sqrt(1 - np.exp(-normal(1.2, 0.15)))
    for column in AXIS_COLUMNS:
        table[column] = np.exp(normal(3 + size / 3, 0.05))
    for column in POSITION_COLUMNS:
        shift = np.repeat(generator.normal(0, 50, scans), organs)
        table[column] = normal(generator.normal(0, 100, organs)[label - 1] * np.exp(size / 3) + shift, 5)
    return table


def false_alarms(cohort_sizes: Sequence[int], organs: int, labels: int, seed: int) -> pd.DataFrame:
    """Percent of the labels of faultless cohorts that each rule flags, by labels per organ; over ``labels`` of each."""
    generator = np.random.default_rng(seed)
    rows = {}
    for scans in cohort_sizes:
        cohorts = [
            flag_organs(ordinary(scans, organs, generator), rule="anatomy") for _ in range(labels // (scans * organs))
        ]
        flags = pd.concat(cohorts)
        rows[scans] = {"joint": 100 * flags["doubt_outside"].mean(), "anatomy": 100 * flags["flagged"].mean()}
    return pd.DataFrame(rows).T


def rules() -> dict[str, Callable[[pd.DataFrame], np.ndarray]]:
    """Name -> decision about a table of features."""

    def percentile(rule: str, epsilon: float) -> Callable[[pd.DataFrame], np.ndarray]:
        return lambda table: flag_organs(table, epsilon, rule)["flagged"].to_numpy()

    def joint(confidence: float) -> Callable[[pd.DataFrame], np.ndarray]:
        return lambda table: flag_organs(table, rule="joint", confidence=confidence)["flagged"].to_numpy()

    def anatomy(confidence: float) -> Callable[[pd.DataFrame], np.ndarray]:
        return lambda table: flag_organs(table, rule="anatomy", confidence=confidence)["flagged"].to_numpy()

    return {
        **{f"solf, epsilon {e}": percentile("solf", e) for e in (1, 2, 3, 4, 5, 8)},
        **{f"volume, epsilon {e}": percentile("volume", e) for e in (2, 4)},
        "iqr": percentile("iqr", 2),
        **{f"joint, confidence {c}": joint(c) for c in (0.99, 0.999, 0.9999, 0.99999)},
        **{f"anatomy, confidence {c}": anatomy(c) for c in (0.99, 0.999, 0.9997, 0.9999, 0.99999)},
    }


def score(table: pd.DataFrame, flagged: np.ndarray) -> dict[str, float]:
    """Recall by kind, precision, flagged share, and the share of genuinely large organs that is kept."""
    faulty = (table["kind"] != "").to_numpy()
    row: dict[str, float] = {}
    for kind in (*FAULT_KINDS, "overrun"):
        here = (table["kind"] == kind).to_numpy()
        row[kind] = float(flagged[here].mean()) if here.any() else np.nan
    three = table["kind"].isin(("missing_half", "leakage", "fragments")).to_numpy()
    row["first three"] = float(flagged[three].mean())
    row["all"] = float(flagged[faulty].mean())
    row["precision"] = float(faulty[flagged].mean()) if flagged.any() else np.nan
    large = table["large"].to_numpy(bool) & ~faulty
    row["large kept"] = float(1 - flagged[large].mean()) if large.any() else np.nan
    row["flagged, %"] = float(100 * flagged.mean())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--shape", type=int, nargs=3, default=(96, 40, 56), metavar=("Z", "Y", "X"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fraction", type=float, default=0.02, help="spoilt share of the labels")
    parser.add_argument("--hippocampus", type=Path, metavar="FOLDER", help="real label maps instead")
    parser.add_argument("--repeats", type=int, default=10, help="seeds for --hippocampus")
    parser.add_argument("--cache", type=Path, help="keep the synthetic features in this Parquet file")
    parser.add_argument("--false-alarms", action="store_true", help="only labels without faults, drawn as features")
    options = parser.parse_args()

    if options.false_alarms:
        print("percent flagged, by labels of an organ")
        print(false_alarms((50, 100, 200, 400), 13, 100_000, options.seed).to_string(float_format="{:.2f}".format))
        return
    if options.hippocampus:
        tables = [hippocampus(options.hippocampus, options.seed + k, options.fraction) for k in range(options.repeats)]
    elif options.cache and options.cache.is_file():
        tables = [pd.read_parquet(options.cache)]
    else:
        tables = [synthetic(options.cases, tuple(options.shape), options.seed, options.fraction)]
        if options.cache:
            tables[0].to_parquet(options.cache)
    planted = pd.concat(tables)["kind"].value_counts()
    print(f"{sum(len(table) for table in tables)} labels; spoilt: {planted.drop('').to_dict()}")

    rows = {}
    for name, decide in rules().items():
        rows[name] = pd.DataFrame([score(table, decide(table)) for table in tables]).mean()
    print(pd.DataFrame(rows).T.to_string(float_format=lambda value: f"{value:.2f}"))


if __name__ == "__main__":
    main()
