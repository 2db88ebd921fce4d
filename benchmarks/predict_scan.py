"""Time and memory of segmenting a whole-body scan: in slabs, as ``ukbob_predict`` does, and with all classes at once.

    python benchmarks/predict_scan.py                               # 501 x 160 x 224 voxels, 73 classes
    python benchmarks/predict_scan.py --shape 149 186 157 --spacing 1.5

The network is small (three convolutions), so that windows take little beside what becomes of their logits; it predicts
at ``--spacing`` times the voxel size of the scan. Each way runs in a process of its own. Printed are the seconds in all
and the peak resident memory above that after one window, so without interpreter, network and its activations (Linux).
The two label maps are compared.
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
from torch import nn

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.inference.export import decide_resampled, to_file_values
from ukbob_seg.inference.passes import AveragedPasses
from ukbob_seg.inference.predictor import Predictor
from ukbob_seg.inference.sliding_window import predict_logits
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan, Plans
from ukbob_seg.preprocessing.preprocessor import preprocess_image
from ukbob_seg.training.checkpoint import ModelDescription

WAYS = ("in slabs", "whole")


def peak_gib() -> float:
    """Largest resident set of this process so far."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def make_predictor(options: argparse.Namespace, seed: int = 0) -> Predictor:
    """A small network with random weights, and plans around it."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv3d(options.channels, 8, 3, padding=1), nn.LeakyReLU(inplace=True),
        nn.Conv3d(8, 8, 3, padding=1), nn.LeakyReLU(inplace=True), nn.Conv3d(8, options.classes, 1),
    )  # fmt: skip
    spacing = (options.spacing,) * 3
    plan = NetworkPlan(tuple(options.patch), 1, {}, 0.1)
    configuration = ConfigurationPlan(spacing, tuple(options.shape), 3, {"small": plan})
    plans = Plans(
        "Dataset001_Scan", "default", 1.0, (ChannelNormalization("zscore"),) * options.channels, None,
        {"3d_fullres": configuration},
    )  # fmt: skip
    dataset = {
        "channel_names": {str(n): "MRI" for n in range(options.channels)},
        "labels": {"background": 0} | {f"organ {n}": n for n in range(1, options.classes)},
        "file_ending": ".nii.gz",
    }
    description = ModelDescription("small", {}, "3d_fullres", "0", "softmax", (), plans.to_json(), dataset)
    return Predictor([network.eval()], description)


def whole(predictor: Predictor, network: nn.Module, image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The same with the logits of all classes at the network's resolution."""
    array, properties = preprocess_image(image, geometry, predictor.plans, predictor.configuration)
    logits = predict_logits(AveragedPasses([network]), torch.from_numpy(array), predictor._windows)
    return to_file_values(decide_resampled(logits, properties, False), properties, predictor.spec.labels.output_values)


def alone(options: argparse.Namespace) -> None:
    """Predict in one way; print seconds and GiB, and write the labels."""
    predictor = make_predictor(options)
    network = predictor._networks[0]
    generator = np.random.default_rng(0)
    image = generator.normal(size=(options.channels, *options.shape)).astype(np.float32)
    geometry = Geometry(tuple(options.shape), (1.0, 1.0, 1.0))
    with torch.no_grad():
        network(torch.zeros(1, options.channels, *options.patch))
    start, before = time.perf_counter(), peak_gib()
    if options.way == "whole":
        labels = whole(predictor, network, image, geometry)
    else:
        labels = predictor.predict_array(image, geometry).labels
    print(time.perf_counter() - start, peak_gib() - before)
    np.save(options.labels, labels)


def main() -> None:
    """Run each way, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(501, 160, 224), metavar=("Z", "Y", "X"))
    parser.add_argument("--spacing", type=float, default=1.25, help="of the network, in voxels of the scan")
    parser.add_argument("--patch", type=int, nargs=3, default=(96, 96, 96), metavar=("Z", "Y", "X"))
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--classes", type=int, default=73)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--labels", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        alone(options)
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            path = Path(folder) / f"{way}.npy"
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--labels", str(path)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            taken, memory = map(float, output.split()[-2:])
            print(f"{way:9s} {taken:8.1f} s  {memory:6.2f} GiB", flush=True)
            found.append(np.load(path))
    print(f"voxels that differ: {int((found[0] != found[1]).sum())} of {found[0].size}")


if __name__ == "__main__":
    main()
