"""Time of augmenting one patch on one core: this package, batchgeneratorsv2 (nnU-Net) and MONAI.

    python benchmarks/augmentation.py --nnunet-python nnunet/bin/python
    python benchmarks/augmentation.py --patch 64 64 64 --patches 20      # a quick look
    python benchmarks/augmentation.py --device cuda --batch 8            # ours as training runs them, on the device

nnU-Net's default set against ``strong``, both on the same larger patches; MONAI's transforms with the parameters of the
paper's set against ``ukbob``. All run one patch in turn, each with its own random draws of the same probabilities, so
that only the means over many patches (some hundreds) can be compared. nnU-Net may live in another environment: it runs
in a process of its own, which reads the same patches and reports the time that its transforms took. Copies of the
input, which its transforms and ours may overwrite (MONAI's make their own), and its choice of a convolution for
blurring are not counted. ``--device`` and ``--batch`` concern ours alone: the others augment one patch at a time on the
CPU. Divide the time of a batch by that of a training step (``benchmarks/swin_unetr.py --train``) for its share.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

Size = tuple[int, int, int]
Runner = Callable[[int], float]  # seed of a patch -> seconds


def made_up_patch(size: Size, channels: int, labels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (C, z, y, x) float32 and labels (z, y, x) int16 of cells around random points."""
    from scipy.spatial import cKDTree

    generator = np.random.default_rng(seed)
    points = generator.uniform(0, 1, (labels - 1, 3)) * size
    voxels = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)
    distance, nearest = cKDTree(points).query(voxels.reshape(-1, 3), workers=1)
    inside = distance < 0.8 * (np.prod(size) / labels) ** (1 / 3)
    cells = np.where(inside, nearest + 1, 0).reshape(size).astype(np.int16)
    image = np.stack([generator.normal(0, 1, labels)[cells] + generator.normal(0, 0.3, size) for _ in range(channels)])
    return image.astype(np.float32), cells


def nnunet_worker(folder: Path) -> None:
    """Augment the patches in a folder with nnU-Net's default set; a seed on each line in, seconds on each line out."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.set_num_threads(1)
    arrays = [np.load(path) for path in sorted(folder.glob("patch_*.npz"))]
    patch = tuple(int(n) for n in (folder / "size.txt").read_text().split())
    angle = np.pi / 6
    transforms = nnUNetTrainer.get_training_transforms(patch, (-angle, angle), None, (0, 1, 2), False)
    for transform in transforms.transforms:  # chooses its way of blurring by trying
        inner = getattr(transform, "transform", None)
        if type(inner).__name__ == "GaussianBlurTransform":
            for _ in range(6):
                inner(image=torch.from_numpy(arrays[0]["image"][:, : patch[0], : patch[1], : patch[2]].copy()))
    print("ready", flush=True)
    for line in sys.stdin:
        seed = int(line)
        source = arrays[seed % len(arrays)]
        given = {"image": torch.from_numpy(source["image"].copy()),
                 "segmentation": torch.from_numpy(source["labels"][None].copy())}  # fmt: skip
        np.random.seed(seed % 2**32)  # what the other library draws from
        torch.manual_seed(seed)
        start = time.perf_counter()
        transforms(**given)
        print(time.perf_counter() - start, flush=True)


def start_nnunet(python: str, folder: Path) -> Runner:
    command = [python, str(Path(__file__).resolve()), "--worker", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    for line in stdout:
        if line.strip() == "ready":
            break

    def run(seed: int) -> float:
        stdin.write(f"{seed}\n")
        stdin.flush()
        return float(stdout.readline())

    return run


def ours(name: str, patches: list[tuple[np.ndarray, np.ndarray]], patch: Size, device: str, batch: int) -> Runner:
    """Seconds per patch of batches of ``batch`` that are on the device."""
    from ukbob_seg.training.augmentation import AugmentationSetup, Batch, augment, make_transforms

    transforms = make_transforms(name, AugmentationSetup(patch, (1.0, 1.0, 1.0), channels=len(patches[0][0])))
    batches = [
        Batch(
            torch.from_numpy(image).to(device).repeat(batch, 1, 1, 1, 1),
            torch.from_numpy(labels.astype(np.int32)).to(device).repeat(batch, 1, 1, 1),
        )
        for image, labels in patches
    ]

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    def run(seed: int) -> float:
        given = batches[seed % len(batches)]
        given = replace(given, image=given.image.clone(), owned=True)  # as training hands them over
        wait()
        start = time.perf_counter()
        augment(given, transforms, torch.Generator().manual_seed(seed))
        wait()
        return (time.perf_counter() - start) / batch

    return run


def monai(patches: list[tuple[np.ndarray, np.ndarray]]) -> Runner:
    """The paper's set as MONAI has it."""
    from monai import transforms as m

    both = ["image", "label"]
    compose = m.Compose(
        [
            *[m.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)],
            m.RandRotate90d(both, prob=0.1, max_k=3),
            m.RandScaleIntensityd("image", factors=0.1, prob=0.5),
            m.RandShiftIntensityd("image", offsets=0.1, prob=0.5),
        ]
    )

    def run(seed: int) -> float:
        image, labels = patches[seed % len(patches)]
        given: dict[str, Any] = {"image": torch.from_numpy(image), "label": torch.from_numpy(labels)[None]}
        compose.set_random_state(seed)
        start = time.perf_counter()
        compose(given)
        return time.perf_counter() - start

    return run


def compete(title: str, runners: dict[str, Runner], patches: int) -> None:
    """One patch each in turn; mean, median and worst, and how many times longer than the first."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        for seed in range(3):
            run(10**6 + seed)
    for seed in range(patches):
        for name, run in runners.items():
            times[name].append(run(seed))
    print(f"{title}; {patches} patches each, ms per patch")
    mean_of_first = float(np.mean(times[next(iter(times))]))
    print(f"  {'':<34} {'mean':>8} {'median':>8} {'worst':>8}   mean / ours")
    for name, values in times.items():
        mean, median, worst = (1000 * float(f(values)) for f in (np.mean, np.median, np.max))
        print(f"  {name:<34} {mean:8.1f} {median:8.1f} {worst:8.1f} {mean / 1000 / mean_of_first:10.1f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet-python", help="interpreter that has nnunetv2; without it this one, where it has it")
    parser.add_argument("--patch", type=int, nargs=3, default=(96, 96, 96))
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--labels", type=int, default=73, help="with the background")
    parser.add_argument("--patches", type=int, default=200, help="that each competitor augments")
    parser.add_argument("--sources", type=int, default=3, help="different patches that are made up")
    parser.add_argument("--device", default="cpu", help="of ours")
    parser.add_argument("--batch", type=int, default=1, help="patches that ours augments at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        nnunet_worker(options.worker)
        return

    from ukbob_seg.training.augmentation import AugmentationSetup, make_transforms, read_size

    torch.set_num_threads(1)
    patch: Size = tuple(options.patch)
    size = read_size(make_transforms("strong", AugmentationSetup(patch, (1.0, 1.0, 1.0))), patch)
    where = options.device, options.batch
    seeds = range(options.seed, options.seed + options.sources)
    large = [made_up_patch(size, options.channels, options.labels, seed) for seed in seeds]
    what = f"{options.channels} channels, {options.labels} labels, patch {patch} read as {size}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "size.txt").write_text(" ".join(map(str, patch)))
        for number, (image, labels) in enumerate(large):
            np.savez(folder / f"patch_{number}.npz", image=image, labels=labels)
        runners = {"ours, strong": ours("strong", large, patch, *where)}
        if options.nnunet_python or importlib.util.find_spec("nnunetv2"):
            runners["batchgeneratorsv2, nnU-Net's set"] = start_nnunet(options.nnunet_python or sys.executable, folder)
        else:
            print("nnunetv2 is not installed here; name an interpreter that has it with --nnunet-python")
        runners["ours, mri"] = ours("mri", large, patch, *where)
        compete(f"nnU-Net's default set: {what}", runners, options.patches)
    small = [(image[:, : patch[0], : patch[1], : patch[2]].copy(), labels[: patch[0], : patch[1], : patch[2]].copy())
             for image, labels in large]  # fmt: skip
    runners = {"ours, ukbob": ours("ukbob", small, patch, *where)}
    if importlib.util.find_spec("monai"):
        runners["MONAI"] = monai(small)
    compete(f"the paper's set: {options.channels} channels, patch {patch}", runners, options.patches)


if __name__ == "__main__":
    main()
