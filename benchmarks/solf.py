"""Organ features of one large label map: this package, a loop over organs, and SimpleITK's label statistics.

    python benchmarks/solf.py                       # 501x160x224 voxels, 72 organs
    python benchmarks/solf.py --shape 128 96 96 --organs 20 --repeats 9 --body

All run in this process, one after the other in each round, and the medians over the rounds are compared. The loop
and SimpleITK are run fewer times, since they are slow. Results are checked against each other first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import SimpleITK as sitk
from scipy.spatial import cKDTree

from ukbob_seg.filtering.body import body_voxels
from ukbob_seg.filtering.shape_features import organ_features

SPACING_MM = (2.2, 2.2, 2.2)


def torso(shape: tuple[int, int, int], organs: int, seed: int) -> np.ndarray:
    """A cylinder-like body filled with organs of irregular shape (cells of random seeds); air is 0."""
    rng = np.random.default_rng(seed)
    size = np.asarray(shape)
    seeds = (0.5 + rng.uniform(-0.5, 0.5, (organs, 3)) * (1.0, 0.8, 0.8)) * size
    coarse = np.stack(np.meshgrid(*(np.arange(0, n, 2) for n in shape), indexing="ij"), axis=-1)
    waves = sum(rng.normal(0, 4, 3) * np.sin(coarse @ (rng.normal(0, 0.08, 3))[:, None]) for _ in range(4))
    distance, nearest = cKDTree(seeds).query((coarse + waves).reshape(-1, 3))
    radius = np.linalg.norm((coarse / size - 0.5)[..., 1:] / 0.45, axis=-1)
    filled = (radius < 1) & (distance.reshape(radius.shape) < 0.9 * (size.prod() / organs) ** (1 / 3))
    labels = np.where(filled, nearest.reshape(radius.shape) + 1, 0).astype(np.uint8 if organs < 256 else np.uint16)
    for axis in range(3):
        labels = labels.repeat(2, axis=axis)
    return np.ascontiguousarray(labels[: shape[0], : shape[1], : shape[2]])


def loop_over_organs(labels: np.ndarray) -> np.ndarray:
    """The obvious way: per organ a mask, its voxels' covariance, and its exposed faces. (organs, 3)."""
    spacing = np.asarray(SPACING_MM)
    rows = []
    for value in np.unique(labels)[1:]:
        mask = labels == value
        points = np.argwhere(mask) * spacing
        eigenvalues = np.linalg.eigvalsh(np.cov(points.T, bias=True))
        surface = 0.0
        for axis in range(3):
            ends = mask.take(0, axis).sum() + mask.take(-1, axis).sum()
            faces = np.count_nonzero(np.diff(mask, axis=axis)) + ends
            surface += faces * spacing.prod() / spacing[axis]
        volume = len(points) * spacing.prod()
        sphericity = np.cbrt(np.pi) * np.cbrt(6 * volume) ** 2 / surface
        rows.append((len(points), sphericity, np.sqrt(1 - eigenvalues[0] / eigenvalues[-1])))
    return np.asarray(rows)


def simpleitk_statistics(labels: np.ndarray) -> np.ndarray:
    """Voxels and principal moments per label with SimpleITK, perimeter included in the work. (organs, 2)."""
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(SPACING_MM[::-1])
    statistics = sitk.LabelShapeStatisticsImageFilter()
    statistics.ComputePerimeterOn()
    statistics.Execute(image)
    rows = []
    for value in statistics.GetLabels():
        moments = statistics.GetPrincipalMoments(value)
        statistics.GetPerimeter(value)
        rows.append((statistics.GetNumberOfPixels(value), np.sqrt(1 - min(moments) / max(moments))))
    return np.asarray(rows)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(501, 160, 224), metavar=("Z", "Y", "X"))
    parser.add_argument("--organs", type=int, default=72)
    parser.add_argument("--repeats", type=int, default=7, help="rounds of the pass")
    parser.add_argument("--slow-repeats", type=int, default=3, help="rounds of the loop and of SimpleITK")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--body", action="store_true", help="also time the body mask of an image of that size")
    options = parser.parse_args()

    labels = torso(tuple(options.shape), options.organs, options.seed)
    table = organ_features(labels, SPACING_MM)  # also compiles
    by_loop, by_itk = loop_over_organs(labels), simpleitk_statistics(labels)
    found = table[["voxels", "sphericity", "eccentricity"]].to_numpy()
    assert np.allclose(found, by_loop, rtol=1e-6, atol=1e-6), "the loop over organs disagrees"
    assert np.allclose(found[:, [0, 2]], by_itk, rtol=1e-4, atol=1e-4), "SimpleITK disagrees"
    print(f"{labels.shape} voxels, {len(table)} organs, {100 * (labels > 0).mean():.0f} % labelled; results agree")

    times: dict[str, list[float]] = {"ours": [], "loop over organs": [], "SimpleITK": []}
    for number in range(max(options.repeats, options.slow_repeats)):
        if number < options.repeats:
            times["ours"].append(seconds(lambda: organ_features(labels, SPACING_MM)))
        if number < options.slow_repeats:
            times["loop over organs"].append(seconds(lambda: loop_over_organs(labels)))
            times["SimpleITK"].append(seconds(lambda: simpleitk_statistics(labels)))
    ours = float(np.median(times["ours"]))
    for name, values in times.items():
        print(f"{name:<17} {np.median(values):8.4f} s  {np.median(values) / ours:7.1f} x")
    if options.body:
        image = np.random.default_rng(options.seed).normal(100 * (labels > 0), 10).astype(np.float32)
        print(f"{'body mask':<17} {np.median([seconds(lambda: body_voxels(image)) for _ in range(3)]):8.4f} s")


if __name__ == "__main__":
    main()
