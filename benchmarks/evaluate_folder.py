"""How long does ukbob_evaluate take for a folder, its page with pictures included?

    python benchmarks/evaluate_folder.py --dataset DIR/Dataset004_Hippocampus

The predictions are the labels of the test cases (imagesTs, labelsTs), moved by one voxel along each axis, so that no
class is exact and every distance has to be found. The command runs in a process of its own, start included, with two
processors; the median of several runs, each into a new folder, so that nothing is taken over.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ukbob_seg.dataset.image_io import read_labels, write_labels


def main() -> None:
    """Move the labels, time the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    labels = sorted((options.dataset / "labelsTs").glob("*.nii.gz"))[: options.cases]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # children inherit it
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for path in labels:
            values, geometry = read_labels(path)
            write_labels(values, geometry, work / "labels" / path.name)
            write_labels(np.roll(values, 1, (0, 1, 2)), geometry, work / "moved" / path.name)
        seconds = []
        for repeat in range(options.repeats + 1):
            command = [
                sys.executable, "-m", "ukbob_seg.cli.evaluate", str(work / "moved"), str(work / "labels"),
                "-o", str(work / f"scores_{repeat}"), "--dataset-json", str(options.dataset / "dataset.json"),
                "--images", str(options.dataset / "imagesTs"),
            ]  # fmt: skip
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
    print(f"{len(labels)} cases: first run {seconds[0]:.1f} s (compiles where nothing is cached)")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    print(
        f"median of {options.repeats} further runs {statistics.median(seconds[1:]):.2f} s, peak {peak:.0f} MB a process"
    )


if __name__ == "__main__":
    main()
