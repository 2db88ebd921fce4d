"""Preprocess large synthetic scans: wall time and peak memory of one worker, and how both grow with the cases.

    python benchmarks/preprocess_scan.py                              # 4 x 501x160x224 voxels, 72 labels, to 1.5 mm
    python benchmarks/preprocess_scan.py --cases 1 2 4 --workers 1
    python benchmarks/preprocess_scan.py --shape 128 96 96 --labels 20 --channels 1

Writes noisy torsos as .nii.gz into a temporary folder. ``ukbob_plan_and_preprocess --spacing`` then runs as a process
of its own, first without ``ukbob_preprocess`` (fingerprint and plan), then ``ukbob_preprocess`` alone, so that the two
passes over the files are timed apart. Peak memory is the largest sum of the proportional set sizes of all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from plan_and_preprocess import run
from solf_case import write_case

BIN = Path(sys.executable).parent


def write_dataset(folder: Path, cases: int, channels: int, shape: tuple[int, int, int], labels: int) -> None:
    """A raw dataset of copies of one scan (reading and resampling do not mind)."""
    name = "scan_000"
    case = write_case(folder, name, shape, labels)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir()
    for number in range(cases):
        for channel in range(channels):
            shutil.copy(case.images[0], folder / "imagesTr" / f"scan_{number:03d}_{channel:04d}.nii.gz")
        shutil.copy(folder / f"{name}.nii.gz", folder / "labelsTr" / f"scan_{number:03d}.nii.gz")
    content = {
        "channel_names": {str(c): f"dixon_{c}" for c in range(channels)},
        "labels": {"background": 0, **{f"organ_{k}": k for k in range(1, labels + 1)}},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(501, 160, 224), metavar=("Z", "Y", "X"))
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--labels", type=int, default=72)
    parser.add_argument("--spacing", type=float, default=1.5, help="target, mm, isotropic (scans have 2.2 mm)")
    parser.add_argument("--cases", type=int, nargs="+", default=[1])
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{'cases':>5} {'fingerprint':>12} {'peak':>8} {'preprocess':>12} {'per case':>9} {'peak':>8}")
    for cases in (1, *arguments.cases):  # the first run warms the compiled kernels and the page cache
        with tempfile.TemporaryDirectory() as scratch:
            raw = Path(scratch) / "raw"
            folder = raw / "Dataset900_Torso"
            folder.mkdir(parents=True)
            write_dataset(folder, cases, arguments.channels, tuple(arguments.shape), arguments.labels)
            common = [
                "-d", "900", "--raw", str(raw), "--preprocessed", f"{scratch}/p", "--workers", str(arguments.workers),
            ]  # fmt: skip
            spacing = ["--spacing", *[str(arguments.spacing)] * 3]
            plan = [str(BIN / "ukbob_plan_and_preprocess"), *common, "--no-preprocess", "--memory-gb", "8", *spacing]
            first = run(plan, dict(os.environ))
            second = run([str(BIN / "ukbob_preprocess"), *common], dict(os.environ))
            stored = sum(path.stat().st_size for path in Path(scratch, "p").rglob("*.b2nd")) / 1e9
        print(
            f"{cases:5d} {first[0]:10.2f} s {first[1]:5.2f} GB {second[0]:10.2f} s {second[0] / cases:7.2f} s "
            f"{second[1]:5.2f} GB  ({stored / cases:.2f} GB stored per case)",
            flush=True,
        )


if __name__ == "__main__":
    main()
