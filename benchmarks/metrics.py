"""All metrics of a pair of label maps with many classes: this package, MONAI, and google-deepmind's surface-distance.

    pip install -e '.[test]' surface-distance==0.1
    python benchmarks/metrics.py --labels ../shared/data/Dataset141_BrainAllen/labelsTr   # first file of the folder
    python benchmarks/metrics.py --labels labels.nii.gz --classes 20 --rounds 5

The prediction is the reference, moved by a few voxels. Every peer computes HD, HD95, mean surface distance and surface
Dice of every class, MONAI (on one-hot arrays) and this package Dice as well. One process takes turns, after a round
that does not count; medians. Memory is the peak of a fresh process per peer, and how much of it lies above what it
holds with both maps read (Linux only). MONAI computes distances anew for each of its metrics: its functions offer no
other way.
The numbers are compared where definitions agree: Dice, HD, HD95 and surface Dice with MONAI.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ukbob_seg.dataset.image_io import read_labels
from ukbob_seg.evaluation.metrics import evaluate_case, present_values

TOLERANCE_MM = 2.0
MOVED_VOXELS = (2, 1, -2)

Spacing = tuple[float, float, float]
Scores = dict[int, dict[str, float]]


def ours(prediction: np.ndarray, reference: np.ndarray, spacing: Spacing, values: list[int]) -> Scores:
    """As ukbob_evaluate."""
    return evaluate_case(prediction, reference, spacing, values, TOLERANCE_MM)


def monai(prediction: np.ndarray, reference: np.ndarray, spacing: Spacing, values: list[int]) -> Scores:
    """Its metrics on (1, C, Z, Y, X), background left out."""
    import torch
    from monai.metrics import (
        DiceMetric,
        compute_average_surface_distance,
        compute_hausdorff_distance,
        compute_surface_dice,
    )

    maps = [torch.from_numpy(np.stack([x == value for value in values])[None]) for x in (prediction, reference)]
    common = {"include_background": True, "spacing": spacing}
    tolerances = [TOLERANCE_MM] * len(values)
    found = {
        "dice": DiceMetric(include_background=True, reduction="none")(*maps),
        "hd": compute_hausdorff_distance(*maps, **common),
        "hd95": compute_hausdorff_distance(*maps, percentile=95, **common),
        "assd": compute_average_surface_distance(*maps, symmetric=True, **common),
        "nsd": compute_surface_dice(*maps, class_thresholds=tolerances, **common),
    }
    return {value: {name: float(x[0, k]) for name, x in found.items()} for k, value in enumerate(values)}


def deepmind(prediction: np.ndarray, reference: np.ndarray, spacing: Spacing, values: list[int]) -> Scores:
    """Class by class; it cuts out the objects' joint box by itself."""
    import surface_distance

    scores = {}
    for value in values:
        found = surface_distance.compute_surface_distances(reference == value, prediction == value, spacing)
        scores[value] = {
            "hd": surface_distance.compute_robust_hausdorff(found, 100),
            "hd95": surface_distance.compute_robust_hausdorff(found, 95),
            "assd": float(np.mean(surface_distance.compute_average_surface_distance(found))),
            "nsd": surface_distance.compute_surface_dice_at_tolerance(found, TOLERANCE_MM),
        }
    return scores


PEERS: dict[str, Callable[..., Scores]] = {"ukbob_seg": ours, "monai": monai, "surface-distance": deepmind}


def read_pair(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray, Spacing, list[int]]:
    """(prediction, reference, spacing, values); the first file of a folder."""
    file = path if path.is_file() else sorted(path.glob("*.nii.gz"))[0]
    reference, geometry = read_labels(file)
    prediction = np.roll(reference, MOVED_VOXELS, (0, 1, 2))
    return prediction, reference, geometry.spacing_mm, present_values(reference)[:classes]


def status_kb(field: str) -> int:
    """A figure of this process's memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """Time, compare, measure memory, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True, help="a label map, or a folder of them")
    parser.add_argument("--classes", type=int, default=73, help="at most so many (default: 73)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    pair = read_pair(arguments.labels, arguments.classes)
    if arguments.memory_of:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again: a new process inherits its parent's
        before = status_kb("VmRSS")
        PEERS[arguments.memory_of](*pair)
        print(before, status_kb("VmHWM"))
        return
    print(f"{'x'.join(map(str, pair[1].shape))} voxels (z, y, x), {len(pair[3])} classes")
    scores = {name: peer(*pair) for name, peer in PEERS.items()}
    for metric in ("dice", "hd", "hd95", "nsd"):
        worst = max(abs(scores["ukbob_seg"][v][metric] - scores["monai"][v][metric]) for v in pair[3])
        print(f"largest difference to monai, {metric}: {worst:.2g}")
    seconds: dict[str, list[float]] = {name: [] for name in PEERS}
    for _ in range(arguments.rounds):
        for name, peer in PEERS.items():
            start = time.perf_counter()
            peer(*pair)
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["ukbob_seg"])
    command = [sys.executable, __file__, "--labels", str(arguments.labels), "--classes", str(arguments.classes)]
    print(f"{'':<18}{'median s':>10}{'times ours':>12}{'peak MB':>9}{'of it above the maps':>22}")
    for name in PEERS:
        printed = subprocess.run([*command, "--memory-of", name], capture_output=True, text=True, check=True).stdout
        before, peak = (int(kb) / 1024 for kb in printed.split())
        median = statistics.median(seconds[name])
        print(f"{name:<18}{median:>10.3f}{median / base:>12.1f}{peak:>9.0f}{peak - before:>22.0f}")


if __name__ == "__main__":
    main()
