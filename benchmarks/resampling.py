"""Resampling of an image, a label map and class logits: this package and the usual ways, one after the other.

    python benchmarks/resampling.py                                        # made-up organs
    python benchmarks/resampling.py --image ct_0000.nii.gz --labels ct_labels.nii.gz
    python benchmarks/resampling.py --classes 73 --logits-shape 100 124 105 --logits-target 149 186 157

In each round every competitor runs once; medians over the rounds are compared, the slow ones take fewer rounds. All
may use the same processors: ours and SimpleITK run as many threads as there are, scipy and skimage know only one.
Results are compared first. Memory is what Python and numpy allocate at the peak beyond the input.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
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


def skimage_resize(array: np.ndarray, shape: Shape, order: int) -> np.ndarray:
    """As nnU-Net calls it."""
    return resize(array, shape, order=order, mode="edge", anti_aliasing=False, clip=True, preserve_range=True)


def one_hot_labels(labels: np.ndarray, shape: Shape) -> np.ndarray:
    """nnU-Net's default: each label resampled alone, then thresholded; later labels overwrite."""
    result = np.zeros(shape, dtype=labels.dtype)
    for value in np.unique(labels):
        result[skimage_resize((labels == value).astype(float), shape, 1) >= 0.5] = value
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


def zoom_all_classes(logits: np.ndarray, shape: Shape) -> np.ndarray:
    """nnU-Net's way: all classes at the full size, then the argmax."""
    return np.stack([skimage_resize(channel, shape, 1) for channel in logits]).argmax(axis=0)


def compete(title: str, contest: Contest, rounds: int, slow_rounds: int, memory: bool) -> None:
    """Print medians of all, and how many times longer (and larger) each is than ours, the first."""
    times: dict[str, list[float]] = {name: [] for name in contest}
    for number in range(rounds):
        for position, (name, function) in enumerate(contest.items()):
            if position == 0 or number < slow_rounds:
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
    peaks = {name: peak_megabytes(function) for name, function in contest.items()} if memory else {}
    first = next(iter(contest))
    ours = float(np.median(times[first]))
    print(title)
    for name, values in times.items():
        line = f"  {name:<34} {np.median(values):9.4f} s {np.median(values) / ours:8.1f} x"
        if memory:
            line += f"  {peaks[name]:8.1f} MB {peaks[name] / peaks[first]:6.1f} x"
        print(line)


def peak_megabytes(function: Callable[[], object]) -> float:
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def images(image: np.ndarray, shape: Shape, options: argparse.Namespace) -> None:
    ours, theirs = resample_image(image[None], shape)[0], scipy_zoom(image, shape, 3)
    worst = np.abs(ours - theirs).max() / np.ptp(image)
    assert worst < 1e-5, f"scipy disagrees by {worst}"
    contest: Contest = {
        "ours": lambda: resample_image(image[None], shape),
        "scipy zoom": lambda: scipy_zoom(image, shape, 3),
        "skimage resize (nnU-Net)": lambda: skimage_resize(image, shape, 3),
        "SimpleITK sitkBSpline": lambda: simpleitk(image, shape, sitk.sitkBSpline),
    }
    title = f"image {image.shape} -> {shape}, order 3; largest difference from scipy {worst:.1e} of the range"
    compete(title, contest, options.repeats, options.slow_repeats, memory=False)


def label_maps(labels: np.ndarray, shape: Shape, options: argparse.Namespace) -> None:
    ours, threshold = resample_labels(labels, shape), one_hot_labels(labels, shape)
    argmax, clear = one_hot_argmax(labels, shape)
    assert np.array_equal(ours[clear], argmax[clear]), "one-hot and argmax disagrees where there is no tie"
    contest: Contest = {
        "ours": lambda: resample_labels(labels, shape),
        "one-hot, threshold (nnU-Net)": lambda: one_hot_labels(labels, shape),
        "SimpleITK sitkLabelLinear": lambda: simpleitk(labels, shape, sitk.sitkLabelLinear),
    }
    title = (
        f"labels {labels.shape} -> {shape}, {len(np.unique(labels))} labels; equal to one-hot and argmax but for ties "
        f"({(~clear).mean():.1e} of the voxels); from nnU-Net's differ {(ours != threshold).mean():.1e}"
    )
    compete(title, contest, options.repeats, options.slow_repeats, memory=False)


def logits(source: np.ndarray, shape: Shape, options: argparse.Namespace) -> None:
    differs = (logits_to_indices(source, shape) != zoom_all_classes(source, shape)).mean()
    assert differs < 1e-5, f"{differs:.1%} of voxels differ from interpolating all classes"
    half = source.astype(np.float16)
    contest: Contest = {
        "ours": lambda: logits_to_indices(source, shape),
        "ours, half-precision input": lambda: logits_to_indices(half, shape),
        "all classes, argmax (nnU-Net)": lambda: zoom_all_classes(source, shape),
    }
    title = f"logits {source.shape} -> {shape} labels; voxels that differ {differs:.1e}"
    compete(title, contest, options.repeats, 1, memory=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="an image to resample; without it a made-up one")
    parser.add_argument("--labels", type=Path, help="a label map to resample; without it a made-up one")
    parser.add_argument("--shape", type=int, nargs=3, default=(112, 101, 122), help="of the made-up ones")
    parser.add_argument("--label-planes", type=int, default=30, help="middle planes of the label map that are taken")
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
    print(f"{numba.config.NUMBA_NUM_THREADS} threads")
    if options.only in (None, "images"):
        image = read_image([options.image])[0][0] if options.image else generator.normal(20.0 * made_up, 10)
        images(image.astype(np.float32), larger(image.shape), options)
    if options.only in (None, "labels"):
        labels = read_labels(options.labels)[0] if options.labels else made_up
        first = max(0, (len(labels) - options.label_planes) // 2)
        labels = np.ascontiguousarray(labels[first : first + options.label_planes])
        label_maps(labels, larger(labels.shape), options)
    if options.only in (None, "logits"):
        source = class_logits(tuple(options.logits_shape), options.classes, options.seed)
        logits(source, tuple(options.logits_target), options)


if __name__ == "__main__":
    main()
