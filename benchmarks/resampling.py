"""Resampling of an image, a label map and class logits: this package and the usual ways, one after the other.

    python benchmarks/resampling.py                                        # made-up organs, a few minutes
    python benchmarks/resampling.py --image ct_0000.nii.gz --labels ct_labels.nii.gz
    python benchmarks/resampling.py --classes 73 --logits-shape 100 124 105 --logits-target 149 186 157

nnU-Net's own function is called where nnunetv2 can be imported (an environment that has it and this package's
dependencies), otherwise the same steps with skimage. In each round every competitor runs once; medians over the rounds
are compared, the slow ones take fewer rounds; compiled loops are loaded before. All may use the same processors: ours
and SimpleITK run as many threads as there are, scipy and skimage know only one. Results are compared as well. Memory is
the peak of the process during the call above what it held before, result included (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.transform import resize

from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.preprocessing.resampling import logits_to_indices, resample_image, resample_labels

try:
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    NNUNET = f"nnU-Net {importlib.metadata.version('nnunetv2')}"
except ImportError:
    resample_data_or_seg_to_shape = None
    NNUNET = "nnU-Net's steps, skimage"

Shape = tuple[int, ...]
Contest = dict[str, Callable[[], np.ndarray]]


def organs(shape: Shape, count: int, seed: int) -> np.ndarray:
    """A label map of cells around random points in a box of air."""
    generator = np.random.default_rng(seed)
    points = generator.uniform(0.15, 0.85, (count, 3)) * shape
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    distance, nearest = cKDTree(points).query(voxels.reshape(-1, 3))
    inside = distance < 0.7 * (np.prod(shape) / count) ** (1 / 3)
    return np.where(inside, nearest + 1, 0).reshape(shape).astype(np.uint8 if count < 256 else np.uint16)


def class_logits(shape: Shape, classes: int, seed: int) -> np.ndarray:
    """(classes, *shape) float32: each class is likely in its cell, with noise, as a network would have it."""
    labels = organs(shape, classes - 1, seed)
    logits = np.random.default_rng(seed).normal(-4, 1, (classes, *shape)).astype(np.float32)
    np.put_along_axis(logits, labels[None].astype(np.intp), 4.0, axis=0)
    return ndimage.uniform_filter(logits, (0, 3, 3, 3), output=np.float32)


def scipy_zoom(array: np.ndarray, shape: Shape, order: int) -> np.ndarray:
    factors = [n / o for n, o in zip(shape, array.shape, strict=True)]
    return ndimage.zoom(array, factors, order=order, mode="nearest", grid_mode=True)


def nnunet(data: np.ndarray, shape: Shape, order: int, is_seg: bool = False) -> np.ndarray:
    """nnU-Net's default resampling of isotropic (C, Z, Y, X): every channel, class or label alone."""
    if resample_data_or_seg_to_shape is not None:
        spacing = (1.0, 1.0, 1.0)
        return resample_data_or_seg_to_shape(data, shape, spacing, spacing, is_seg=is_seg, order=order, order_z=0)
    result = np.zeros((len(data), *shape), dtype=data.dtype)
    data = data.astype(float, copy=False)
    for target, channel in zip(result, data, strict=True):
        if not is_seg:
            target[:] = resize(channel, shape, order, mode="edge", anti_aliasing=False)
            continue
        best = np.full(shape, -np.inf)
        for value in np.unique(channel):
            votes = resize((channel == value).astype(float), shape, order, mode="edge", clip=True, anti_aliasing=False)
            better = votes > best
            target[better], best[better] = value, votes[better]
    return result


def one_hot_argmax(labels: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Each label resampled alone, the best kept, and where it is clearly the best: the slow way to our result."""
    result, best, second = np.zeros(shape, dtype=labels.dtype), np.zeros(shape), np.zeros(shape)
    for value in np.unique(labels):
        votes = scipy_zoom((labels == value).astype(float), shape, 1)
        result[votes > best] = value
        second = np.maximum(second, np.minimum(votes, best))
        best = np.maximum(votes, best)
    return result, best - second > 1e-9


def simpleitk(array: np.ndarray, shape: Shape, interpolator: int) -> np.ndarray:
    image = sitk.GetImageFromArray(array)
    scale = [o / n for o, n in zip(array.shape[::-1], shape[::-1], strict=True)]
    origin = [0.5 * s - 0.5 for s in scale]
    return sitk.GetArrayFromImage(
        sitk.Resample(
            image, list(shape[::-1]), sitk.Transform(), interpolator, origin, scale, image.GetDirection(), 0,
            image.GetPixelID(), True,
        )
    )  # fmt: skip


def held_megabytes(entry: str) -> float:
    """``VmRSS``: what the process holds; ``VmHWM``: the most since ``forget_peak``."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.split(f"{entry}:")[1].split()[0]) * 1024 / 1e6


def forget_peak() -> float | None:
    """Give freed memory back to the system and start a new peak; what is held in MB, None where this is unknown."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return held_megabytes("VmRSS")
    except (OSError, AttributeError):
        return None


def compete(contest: Contest, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Print medians of all, and how many times longer (and larger) each is than ours; ``ours`` take every round.

    Returns:
        The result of each in its first round.
    """
    times: dict[str, list[float]] = {name: [] for name in contest}
    peaks: dict[str, list[float]] = {name: [] for name in contest}
    results: dict[str, np.ndarray] = {}
    for number in range(max(options.repeats, options.slow_repeats)):
        for name, function in contest.items():
            if number < (options.repeats if name.startswith("ours") else options.slow_repeats):
                held = forget_peak()
                start = time.perf_counter()
                result = function()
                times[name].append(time.perf_counter() - start)
                if held is not None:
                    peaks[name].append(held_megabytes("VmHWM") - held)
                results.setdefault(name, result)
                del result
    ours = next(iter(contest))
    for name in contest:
        seconds = float(np.median(times[name]))
        line = f"  {name:<40} {seconds:9.4f} s {seconds / np.median(times[ours]):8.1f} x"
        if peaks[name]:
            megabytes = float(np.median(peaks[name]))
            line += f"  {megabytes:8.1f} MB {megabytes / np.median(peaks[ours]):6.1f} x"
        print(f"{line}  ({len(times[name])} rounds)", flush=True)
    return results


def images(image: np.ndarray, shape: Shape, options: argparse.Namespace) -> None:
    print(f"image {image.shape} -> {shape}, order 3")
    resample_image(image[None, :4, :4, :4], (5, 5, 5))  # loads the compiled loops
    found = compete(
        {
            "ours": lambda: resample_image(image[None], shape)[0],
            NNUNET: lambda: nnunet(image[None], shape, 3)[0],
            "scipy zoom": lambda: scipy_zoom(image, shape, 3),
            "SimpleITK sitkBSpline": lambda: simpleitk(image, shape, sitk.sitkBSpline),
        },
        options,
    )
    ours = found.pop("ours")
    for name, result in found.items():
        inner = (slice(6, -6),) * 3  # SimpleITK mirrors at the border, the others repeat it
        plain = np.abs(result - ours) / np.ptp(image)
        clipped = np.abs(result - ours.clip(image.min(), image.max())) / np.ptp(image)
        print(
            f"  {name}: largest difference from ours {plain.max():.1e} of the range, away from the border "
            f"{plain[inner].max():.1e}; from ours clipped to the range, as skimage does, {clipped.max():.1e}"
        )
        assert name != "scipy zoom" or plain.max() < 1e-5, "scipy disagrees"


def label_maps(labels: np.ndarray, shape: Shape, options: argparse.Namespace) -> None:
    print(f"labels {labels.shape} -> {shape}, {len(np.unique(labels))} labels")
    resample_labels(labels[:4, :4, :4], (5, 5, 5))
    found = compete(
        {
            "ours": lambda: resample_labels(labels, shape),
            NNUNET: lambda: nnunet(labels[None], shape, 1, is_seg=True)[0],
            "SimpleITK sitkLabelLinear": lambda: simpleitk(labels, shape, sitk.sitkLabelLinear),
        },
        options,
    )
    argmax, clear = one_hot_argmax(labels, shape)
    for name, result in found.items():
        print(
            f"  {name}: {(result != argmax)[clear].mean():.1e} of the voxels differ from one-hot and argmax where "
            f"there is no tie, {(result != found['ours']).mean():.1e} of all from ours"
        )
    assert np.array_equal(found["ours"][clear], argmax[clear]), "one-hot and argmax disagrees where there is no tie"


def logits(source: np.ndarray, shape: Shape, options: argparse.Namespace) -> None:
    """nnU-Net's predictor hands on half precision, ours single."""
    print(f"logits {source.shape} -> labels {shape}")
    logits_to_indices(source[:, :4, :4, :4], (5, 5, 5))
    half = source.astype(np.float16)
    found = compete(
        {
            "ours": lambda: logits_to_indices(source, shape),
            "ours, half precision": lambda: logits_to_indices(half, shape),
            f"{NNUNET}, half precision": lambda: nnunet(half, shape, 1).argmax(0),
        },
        options,
    )
    _, in_half, theirs = found.values()
    differs = (in_half != theirs).mean()
    print(f"  {differs:.1e} of the voxels differ in half precision: nnU-Net also rounds what it interpolated")
    assert differs < 1e-2, f"{differs:.1%} of the voxels differ from interpolating all classes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="an image to resample; without it a made-up one")
    parser.add_argument("--labels", type=Path, help="a label map to resample; without it a made-up one")
    parser.add_argument("--shape", type=int, nargs=3, default=(112, 101, 122), help="of the made-up ones")
    parser.add_argument("--label-planes", type=int, default=30, help="planes of the label map (the middle ones)")
    parser.add_argument("--organs", type=int, default=42)
    parser.add_argument("--factor", type=float, default=1.5)
    parser.add_argument("--classes", type=int, default=73)
    parser.add_argument("--logits-shape", type=int, nargs=3, default=(100, 124, 105))
    parser.add_argument("--logits-target", type=int, nargs=3, default=(149, 186, 157))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--slow-repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("images", "labels", "logits"))
    options = parser.parse_args()

    def larger(shape: Shape) -> Shape:
        return tuple(round(n * options.factor) for n in shape)

    generator = np.random.default_rng(options.seed)
    made_up = organs(tuple(options.shape), options.organs, options.seed)
    thin = organs((options.label_planes, *options.shape[1:]), options.organs, options.seed)
    print(f"{numba.config.NUMBA_NUM_THREADS} threads; ratios are to ours")
    if options.only in (None, "images"):
        image = read_image([options.image])[0][0] if options.image else generator.normal(20.0 * made_up, 10)
        images(image.astype(np.float32), larger(image.shape), options)
    if options.only in (None, "labels"):
        labels = read_labels(options.labels)[0] if options.labels else thin
        first = max(0, (len(labels) - options.label_planes) // 2)
        labels = np.ascontiguousarray(labels[first : first + options.label_planes])
        label_maps(labels, larger(labels.shape), options)
    if options.only in (None, "logits"):
        source = class_logits(tuple(options.logits_shape), options.classes, options.seed)
        logits(source, tuple(options.logits_target), options)


if __name__ == "__main__":
    main()
