"""Memory and time of averaging two models on a whole-body scan: while predicting, and from saved probabilities.

    python benchmarks/ensemble_scan.py                              # 501 x 160 x 224 voxels, 73 classes
    python benchmarks/ensemble_scan.py --shape 149 186 157

The networks and the meaning of the numbers are those of ``predict_scan.py``, but averaging files is counted from before
any window; the models predict at 1.25 and 1.6 times the voxel size of the scan. Each step runs in a process of its own:
one model alone, both at once, and the averaging of what both saved, without and with saving the averages. The label
maps of the two ways are compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from predict_scan import make_predictor, peak_gib

from ukbob_seg.dataset.image_io import Geometry, read_labels, write_labels
from ukbob_seg.files import write_json
from ukbob_seg.inference.ensemble import ensemble
from ukbob_seg.inference.ensemble_predictor import EnsemblePredictor

SPACINGS = {"a": 1.25, "b": 1.6}
STEPS = ("a", "b", "at once", "from files", "from files, saving")


def work(options: argparse.Namespace) -> None:
    """Do one step in the common folder; print seconds and GiB."""
    folder, geometry = options.folder, Geometry(tuple(options.shape), (1.0, 1.0, 1.0))
    if not options.step.startswith("from"):
        members = {}
        for seed, (name, spacing) in enumerate(SPACINGS.items()):
            options.spacing = spacing
            members[name] = make_predictor(options, seed)
        image = np.random.default_rng(0).standard_normal((options.channels, *options.shape), dtype=np.float32)
        with torch.no_grad():
            members["a"]._networks[0](torch.zeros(1, options.channels, *options.patch))
    start, before = time.perf_counter(), peak_gib()
    if options.step in SPACINGS:
        target = folder / options.step
        labels = members[options.step].predict_array(image, geometry, target / "scan_probabilities.b2nd").labels
        write_labels(labels, geometry, target / "scan.nii.gz")
        write_json(target / "dataset.json", members[options.step].spec.content)
    elif options.step == "at once":
        labels = EnsemblePredictor(members).predict_array(image, geometry).labels
        write_labels(labels, geometry, folder / "at once.nii.gz")
    else:
        ensemble([folder / "a", folder / "b"], folder / "both", None, options.step.endswith("saving"), quiet=True)
    print(time.perf_counter() - start, peak_gib() - before)


def main() -> None:
    """Run each step, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(501, 160, 224), metavar=("Z", "Y", "X"))
    parser.add_argument("--patch", type=int, nargs=3, default=(96, 96, 96), metavar=("Z", "Y", "X"))
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--classes", type=int, default=73)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        work(options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in STEPS:
            command = [sys.executable, __file__, *sys.argv[1:], "--step", step, "--folder", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            taken, memory = map(float, output.split()[-2:])
            print(f"{step:20s} {taken:8.1f} s  {memory:6.2f} GiB", flush=True)
        size = sum((folder / model / "scan_probabilities.b2nd").stat().st_size for model in SPACINGS) / 2**30
        labels = [read_labels(path)[0] for path in (folder / "at once.nii.gz", folder / "both" / "scan.nii.gz")]
    print(f"saved probabilities: {size:.2f} GiB")
    print(f"voxels that differ: {int((labels[0] != labels[1]).sum())} of {labels[0].size}")


if __name__ == "__main__":
    main()
