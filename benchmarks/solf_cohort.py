"""The part of ukbob_filter that grows with the cohort: gathering the features of 51,761 scans, bounds, flags, tables.

    python benchmarks/solf_cohort.py
    python benchmarks/solf_cohort.py --cases 2000 --organs 12

Writes shards with made-up features of the right size (as the measurement would leave them), then times each step.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from ukbob_seg.filtering.bounds import SOLF_FEATURES, learn_bounds
from ukbob_seg.filtering.measure import CaseMeasurement, join_shards, shard_path
from ukbob_seg.filtering.report_figures import distribution_figures
from ukbob_seg.filtering.solf import flag_organs
from ukbob_seg.filtering.strata import StratifiedBounds
from ukbob_seg.shards import Shard, find_shards, known_cases, load_shards, shard_size


def features(names: list[str], organs: int, rng: np.random.Generator) -> pd.DataFrame:
    """Plausible features of some scans."""
    rows = len(names) * organs
    label = np.tile(np.arange(1, organs + 1), len(names))
    volume = np.exp(rng.normal(0, 0.15, rows)) * 1e4 * label
    voxels = np.rint(volume / 10).astype(np.int64)
    return pd.DataFrame(
        {
            "case": np.repeat(names, organs),
            "body_voxels": 5_000_000,
            "label": label,
            "voxels": voxels,
            "volume_mm3": volume,
            "faces": voxels // 3,
            "surface_mm2": volume / 4,
            "normalized_volume": voxels / 5e6,
            "sphericity": rng.normal(0.5, 0.03, rows),
            "eccentricity": np.sqrt(1 - np.exp(rng.normal(-1, 0.2, rows)).clip(0.01, 0.99)),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=51_761)
    parser.add_argument("--organs", type=int, default=72)
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    names = [f"scan_{k:06d}" for k in range(options.cases)]
    keys = {name: "0123456789abcdef" for name in names}
    started = [time.perf_counter()]

    def lap(what: str) -> None:
        now = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{what:<34}{now - started[0]:8.1f} s   peak so far {peak:5.2f} GiB")
        started[0] = time.perf_counter()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = shard_size(options.cases)
        for index, start in enumerate(range(0, options.cases, size)):
            some = names[start : start + size]
            Shard({name: keys[name] for name in some}, features(some, options.organs, rng), False).save(
                shard_path(folder, index)
            )
        lap(f"writing {index + 1} shards")
        disk = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        known = known_cases(load_shards(find_shards(folder), keys).values(), keys, False)
        lap("reading them")
        columns = CaseMeasurement(".nii.gz", None, "image").columns
        table = join_shards({id(shard): shard for shard in known.values()}.values(), names, columns)
        lap("joining and sorting")
        bounds = learn_bounds(table)
        lap("learning bounds and joint models")
        flags = flag_organs(table, bounds=bounds)
        lap("flagging")
        flags["organ"], flags["stratum"] = "organ " + flags["label"].astype(str), ""
        headings = {name: name for name in SOLF_FEATURES}
        for figure, _ in distribution_figures(flags, StratifiedBounds((), {"": bounds}), headings):
            figure.savefig(folder / "figure.png", dpi=110)
        lap("distributions for the report")
        flags.to_parquet(folder / "flags.parquet", index=False)
        lap("writing flags.parquet")
        again = pd.read_parquet(folder / "flags.parquet", columns=["case", "label", "flagged"])
        lap("reading the flags for training")
        size_mb = (folder / "flags.parquet").stat().st_size / 1e6
        print(f"{len(again):,} labels; shards {disk:.0f} MB, flags {size_mb:.0f} MB")


if __name__ == "__main__":
    main()
