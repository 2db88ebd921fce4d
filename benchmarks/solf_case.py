"""One scan from compressed files to features: how much of the time is decompression, and how much memory it takes.

    python benchmarks/solf_case.py                       # 501x160x224 voxels, 72 organs
    python benchmarks/solf_case.py --shape 128 96 96 --organs 20

Writes a label map (uint8) and an image (int16, noisy) as .nii.gz into a temporary folder. All timings are medians in
this process; memory is the peak of a fresh process per row, above what it holds after a first small case (Linux only).
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from solf import torso

from ukbob_seg.dataset import image_io
from ukbob_seg.dataset.image_io import Geometry, write_image, write_labels
from ukbob_seg.dataset.spec import Case
from ukbob_seg.filtering.measure import CaseMeasurement

SPACING_MM = (2.2, 2.2, 2.2)
_MEMORY = """
import sys
from pathlib import Path
from ukbob_seg.dataset.spec import Case
from ukbob_seg.filtering.measure import CaseMeasurement

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

folder, body = Path(sys.argv[1]), sys.argv[2]
measure = CaseMeasurement(".nii.gz", None, body, sys.argv[3] == "True")
for name in ("small", "case"):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = status("VmRSS")
    measure(Case(name, (folder / f"{name}_0000.nii.gz",), folder / f"{name}.nii.gz"))
print(before, status("VmHWM"))
"""


def write_case(folder: Path, name: str, shape: tuple[int, int, int], organs: int) -> Case:
    """A torso with tissue contrast, texture and noise, in air with noise."""
    labels = torso(shape, organs, 0)
    rng = np.random.default_rng(0)
    tissue = rng.uniform(60, 500, organs + 1).astype(np.float32)[labels]
    radius = np.linalg.norm(
        np.stack(np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape[1:]), indexing="ij")), axis=0
    )
    body = gaussian_filter((radius < 0.93).astype(np.float32), 1)[None]
    noise = [rng.standard_normal(shape, dtype=np.float32) * 12 for _ in range(2)]
    image = np.hypot(np.where(labels > 0, tissue, 200) * body + noise[0], noise[1])
    geometry = Geometry(shape, SPACING_MM)
    write_labels(labels, geometry, folder / f"{name}.nii.gz")
    write_image(np.rint(image).astype(np.int16), geometry, folder / f"{name}_0000.nii.gz")
    return Case(name, (folder / f"{name}_0000.nii.gz",), folder / f"{name}.nii.gz")


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def decompress(module: object, paths: list[Path]) -> None:
    """Read compressed files to their end, as the reader does."""
    for path in paths:
        with module.open(path, "rb") as stream:  # type: ignore[attr-defined]
            header = stream.read(352)
            sizes = np.frombuffer(header[40:56], np.int16)
            stream.readinto(bytearray(int(np.prod(sizes[1:4].astype(np.int64))) * int(header[72]) // 8))
            while stream.read(2**20):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(501, 160, 224), metavar=("Z", "Y", "X"))
    parser.add_argument("--organs", type=int, default=72)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()

    fast = image_io.gzip
    modules = {"zlib": (gzip, zlib.error)}
    if fast is not gzip:
        modules["isal"] = (fast, image_io.GzipError)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = write_case(folder, "case", tuple(options.shape), options.organs)
        write_case(folder, "small", (24, 24, 24), 5)
        voxels = int(np.prod(options.shape))
        sizes = [path.stat().st_size / 1e6 for path in (case.label, case.images[0]) if path]
        print(f"{voxels / 1e6:.1f} million voxels; compressed label {sizes[0]:.2f} MB, image {sizes[1]:.1f} MB")
        print(f"{'body':<7}{'evidence':<10}{'reader':<8}{'decompress':>11}{'whole':>9}{'share':>8}{'memory':>12}")
        for body, evidence in (("union", False), ("union", True), ("image", False)):
            paths = [case.label] if body == "union" else [case.label, case.images[0]]
            measurement = CaseMeasurement(".nii.gz", None, body, evidence)
            command = [sys.executable, "-c", _MEMORY, name, body, str(evidence)]
            low, high = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
            for reader, (module, error) in modules.items():
                image_io.gzip, image_io.GzipError = module, error
                measurement(case)
                reading = median_seconds(lambda m=module, p=paths: decompress(m, p), options.repeats)
                whole = median_seconds(lambda m=measurement: m(case), options.repeats)
                memory = f"{(high - low) * 1024 / voxels:.1f} x label" if module is fast else ""
                print(
                    f"{body:<7}{evidence!s:<10}{reader:<8}{reading:9.3f} s{whole:7.3f} s{100 * reading / whole:6.0f} %"
                    f"{memory:>12}"
                )


if __name__ == "__main__":
    main()
