"""What filtering buys: training on labels with planted faults, with and without the filter, scored on clean labels.

    python benchmarks/solf_training.py --dataset DIR/Dataset004_Hippocampus --output DIR
    python benchmarks/solf_training.py --dataset DIR/Dataset004_Hippocampus --output DIR --fraction 0.1 --seeds 1
    python benchmarks/solf_training.py --dataset DIR/Dataset004_Hippocampus --output DIR --seeds 0  # spoilt labels only

The labels of the 150 training cases are spoilt (half missing, leaking, in fragments, the two organs exchanged, eroded).
A small PlainConvUNet is trained from each seed on the true labels, on the spoilt ones, and on the spoilt ones after
ukbob_filter by several rules and policies; the 50 test cases have their true labels. All runs of a seed see the same
patches in the same order. Runs that are finished are not done again. Needs dynamic-network-architectures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd

from ukbob_seg import evaluate, plan_and_preprocess, solf_filter, train
from ukbob_seg.dataset.image_io import read_labels, write_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.demo.faults import KINDS, plant_faults
from ukbob_seg.evaluation.evaluate import ReportOptions
from ukbob_seg.filtering.config import FilterConfig
from ukbob_seg.filtering.policies import FilterPolicy
from ukbob_seg.inference.predict import predict
from ukbob_seg.inference.predictor import Predictor
from ukbob_seg.training.config import TrainingConfig
from ukbob_seg.training.trainer import RunOptions

FILTERS: dict[str, FilterConfig | None] = {
    "true labels": None,
    "spoilt, no filter": None,
    "spoilt, solf, ignore": FilterConfig(body="union"),
    "spoilt, joint, ignore": FilterConfig(rule="joint", body="union"),
    "spoilt, joint, drop scan": FilterConfig(rule="joint", body="union", policy=FilterPolicy("ignore", 0)),
}
FEATURES = [16, 32, 64]


def write_spoilt(source: Path, target: Path, fraction: float) -> pd.DataFrame:
    """A raw dataset like ``source`` with faults in its training labels; returns what is wrong."""
    if target.exists():
        return pd.read_csv(target / "faults.csv")
    scratch = target.with_name(f"{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "labelsTr").mkdir(parents=True)
    shutil.copy(source / "dataset.json", scratch)
    os.symlink((source / "imagesTr").resolve(), scratch / "imagesTr")
    generator = np.random.default_rng(0)
    faults = []
    for path in sorted(source.glob("labelsTr/*.nii.gz")):
        labels, geometry = read_labels(path)
        spoilt, wrong = plant_faults(labels, path.name[:-7], [1, 2], [(1, 2)], generator, fraction, tuple(KINDS))
        write_labels(spoilt, geometry, scratch / "labelsTr" / path.name)
        faults += [(fault.case, fault.label, fault.kind) for fault in wrong]
    table = pd.DataFrame(faults, columns=["case", "label", "kind"])
    table.to_csv(scratch / "faults.csv", index=False)
    scratch.rename(target)
    return table


def prepare(roots: Roots, dataset: str) -> None:
    """Plan and preprocess; then make the network small, as a user may by editing plans.json."""
    plans_file = roots.preprocessed / dataset / "plans.json"
    if plans_file.is_file():
        return
    plan_and_preprocess(dataset, roots)
    plans = json.loads(plans_file.read_text())
    network = plans["configurations"]["3d_fullres"]["networks"]["plain_conv_unet"]
    stages = len(FEATURES)
    arguments = network["arguments"]
    for name in ("strides", "kernel_sizes", "n_conv_per_stage"):
        arguments[name] = arguments[name][:stages]
    arguments.update(features_per_stage=FEATURES, n_conv_per_stage_decoder=[2] * (stages - 1))
    network.update(patch_size=[32, 48, 32], batch_size=2)
    plans_file.write_text(json.dumps(plans, indent=2))


def run(source: Path, roots: Roots, dataset: str, seed: int, steps: int, quiet: bool) -> float:
    """Train and predict; returns the mean Dice of the test cases."""
    config = TrainingConfig(
        epochs=10,
        iterations_per_epoch=steps // 10,
        learning_rate=1e-3,
        schedule="one_cycle",
        mirror_axes=(),
        validation_every=10,
        validation_cases=1,
        seed=seed,
    )
    options = RunOptions(quiet=quiet, overwrite=True)
    fold = train(dataset, "all", roots, config, options, network="plain_conv_unet")
    output = fold / "test"
    with Predictor.from_model_folder(fold.parent, ["all"], "final") as predictor:
        predict(predictor, source / "imagesTs", output, quiet=quiet)
    summary = evaluate(output, source / "labelsTs", report=ReportOptions(write=False))
    return float(summary.table["dice"].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", type=Path, required=True, help="raw hippocampus dataset with imagesTs and labelsTs"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--fraction", type=float, default=0.2, help="spoilt share of the labels")
    parser.add_argument("--seeds", type=int, default=3, help="0: only write the spoilt labels")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()

    name = options.dataset.name
    clean = Roots(options.dataset.parent, options.output / "clean_preprocessed", options.output / "clean_results")
    spoilt = Roots(*(options.output / f"spoilt_{part}" for part in ("raw", "preprocessed", "results")))
    faults = write_spoilt(options.dataset, spoilt.raw / name, options.fraction)
    print(f"{len(faults)} of {2 * 150} labels spoilt: {faults['kind'].value_counts().to_dict()}", flush=True)
    if not options.seeds:
        return
    results_file = options.output / "results.json"
    results = json.loads(results_file.read_text()) if results_file.is_file() else {}
    for seed in range(options.seeds):
        for condition, filtering in FILTERS.items():
            key = f"{condition} | seed {seed}"
            if key in results:
                continue
            roots = clean if condition == "true labels" else spoilt
            prepare(roots, name)
            solf_folder = roots.preprocessed / name / "solf"
            shutil.rmtree(solf_folder, ignore_errors=True)
            if filtering is not None:
                flags = solf_filter(roots.raw / name, solf_folder, filtering).trust.flags
                wrong = set(zip(faults["case"], faults["label"], strict=True))
                found = {(case, value) for case, values in flags.items() for value in values}
                print(f"{condition}: {len(found)} flagged, {len(found & wrong)} of them spoilt", flush=True)
            start = time.perf_counter()
            results[key] = run(options.dataset, roots, name, seed, options.steps, not options.verbose)
            results_file.write_text(json.dumps(results, indent=2))
            print(f"{key}: Dice {results[key]:.4f} ({time.perf_counter() - start:.0f} s)", flush=True)
    print("\nmean Dice of the test cases, by seed")
    for condition in FILTERS:
        dice = [results[f"{condition} | seed {seed}"] for seed in range(options.seeds)]
        print(f"{condition:<26}{np.mean(dice):.4f}   " + " ".join(f"{value:.4f}" for value in dice))


if __name__ == "__main__":
    main()
