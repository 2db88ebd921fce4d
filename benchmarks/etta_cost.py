"""What ETTA adds to the prediction of a large case: the same case with and without it, in turn, in one process.

    python benchmarks/etta_cost.py --dataset DIR/Dataset141_BrainAllen
    python benchmarks/etta_cost.py --dataset DIR/Dataset141_BrainAllen --network swin_unetr --runs 1
    python benchmarks/etta_cost.py --dataset DIR/Dataset141_BrainAllen --shape 501 160 224 --runs 1     # a whole body

Plans the raw dataset and builds its network with fresh weights. Printed are the median seconds of reading,
preprocessing, prediction and writing of its first training image, and the windows and entropy steps: where fewer than
all are taken, ETTA was cheaper than it may be. With ``--shape`` that image is repeated along each axis until it fills
as many voxels: a scan as large as users have.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from predict_end_to_end import untrained

from ukbob_seg.dataset.image_io import Geometry, read_image, write_image
from ukbob_seg.inference.etta import EttaConfig
from ukbob_seg.inference.predictor import PredictionSettings, Predictor

WAYS = {
    "plain": PredictionSettings(),
    "with ETTA": PredictionSettings(etta=EttaConfig()),
    "with ETTA, paper": PredictionSettings(etta=EttaConfig.of_mode("paper")),
}


def repeated(image: Path, shape: tuple[int, int, int], path: Path) -> Path:
    """The image side by side with itself as often as the shape holds, written as another."""
    voxels, geometry = read_image([image])
    for axis, count in enumerate(shape):
        voxels = np.take(voxels, np.arange(count) % voxels.shape[axis + 1], axis=axis + 1)
    write_image(voxels[0], Geometry(shape, geometry.spacing_mm), path)
    return path


def main() -> None:
    """Parse, plan, predict in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="raw dataset, one channel")
    parser.add_argument("--network", default="plain_conv_unet", choices=("plain_conv_unet", "swin_unetr"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("Z", "Y", "X"), help="repeat the image to this size")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    image = min((options.dataset / "imagesTr").glob("*_0000.nii.gz"))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = untrained(options.dataset, work, options.network)
        if options.shape is not None:
            image = repeated(image, tuple(options.shape), work / "repeated_0000.nii.gz")
        seconds: dict[str, list[float]] = {name: [] for name in options.ways}
        windows, steps = 0, 0
        for run in range(options.runs):
            for name in options.ways:
                counted: list[int] = []
                with Predictor.from_model_folder(folder, ["all"], "final", options.device, WAYS[name]) as predictor:
                    start = time.perf_counter()
                    prediction = predictor.predict_case(
                        [image], work / "labels.nii.gz", lambda done, total, counted=counted: counted.append(total)
                    )
                    seconds[name].append(time.perf_counter() - start)
                windows, steps = counted[-1], prediction.etta[0]["steps"] if prediction.etta else 0
                print(f"run {run + 1}, {name}: {seconds[name][-1]:.1f} s, {windows} windows, {steps} steps", flush=True)
    plain = statistics.median(seconds[options.ways[0]])
    print(f"\n{image.name}, {options.network}, {options.device}, median of {options.runs}:")
    for name, values in seconds.items():
        taken = statistics.median(values)
        print(f"  {name:17} {taken:7.1f} s   adds {taken / plain - 1:5.2f} x the first")


if __name__ == "__main__":
    main()
