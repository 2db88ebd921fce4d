"""What each transform does to a real case: the slice in the middle, as it is and after each transform, labels outlined.

    python benchmarks/augmentation_pictures.py --image case_0000.nii.gz --labels case.nii.gz --output transforms.png
    python benchmarks/augmentation_pictures.py --image case_0000.nii.gz --set strong --draws 6 --output strong.png

Without ``--set`` every transform of the set ``mri``, and the quarter turns of ``ukbob``, is shown alone and always
applied; with it whole sets are drawn as in training, with their probabilities. Several ``--image`` are channels; one is
shown.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.training.augmentation import (
    AugmentationSetup,
    Batch,
    RandomRotate90,
    RandomSpatial,
    Transform,
    augment,
    make_transforms,
    read_size,
)
from ukbob_seg.training.sampling import read_patch, widen

Panel = tuple[str, Batch]


def always(transform: Transform) -> list[tuple[str, Transform]]:
    """The transform with every probability 1; the spatial one once for each thing that it does."""
    name = type(transform).__name__.removeprefix("Random")
    if not getattr(transform, "planes", True) or (name == "ChannelDropout" and transform.channels == 1):
        return []  # it can do nothing here
    if isinstance(transform, RandomSpatial):
        still = dataclasses.replace(transform.settings, p_rotation=0.0, p_scale=0.0, p_shear=0.0, p_elastic=0.0)
        return [
            (what, RandomSpatial(transform.patch_size, transform.spacing_mm, dataclasses.replace(still, **{key: 1.0})))
            for what, key in (
                ("rotation", "p_rotation"),
                ("scale", "p_scale"),
                ("shear", "p_shear"),
                ("elastic", "p_elastic"),
            )
        ]
    for attribute in ("probability", "channel_probability"):
        if hasattr(transform, attribute):
            setattr(transform, attribute, 1.0)
    return [(name + (" (inverted)" if getattr(transform, "inverted", False) else ""), transform)]


def middle(image: np.ndarray, labels: np.ndarray, patch: tuple[int, int, int], read: tuple[int, int, int]) -> Batch:
    """What would be read for a patch in the middle of the labels (or of the image)."""
    voxels = np.argwhere(labels)
    centre = voxels.mean(axis=0).round().astype(int) if len(voxels) else np.array(labels.shape) // 2
    z, y, x = (int(c - p // 2) for c, p in zip(centre, patch, strict=True))
    start, size = widen((z, y, x), patch, read)
    return Batch(
        torch.from_numpy(np.ascontiguousarray(read_patch(image, start, size)))[None],
        torch.from_numpy(read_patch(labels, start, size).astype(np.int32))[None],
    )


def draw(panels: list[Panel], columns: int, axis: int, channel: int, path: Path) -> None:
    """Save a grid of middle slices; grey values are those of the first panel."""
    first = panels[0][1].image[0, channel]
    low, high = np.quantile(first.numpy(), (0.002, 0.998))
    height, width = (n for a, n in enumerate(first.shape) if a != axis)
    rows = -(-len(panels) // columns)
    size = (2 * columns, (2 * height / width + 0.25) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for place in axes.flat:
        place.axis("off")
    for place, (title, batch) in zip(axes.flat, panels, strict=False):
        index = batch.labels.shape[axis + 1] // 2
        labels = batch.labels[0].select(axis, index).numpy()
        place.imshow(batch.image[0, channel].select(axis, index), cmap="gray", vmin=low, vmax=high, origin="lower")
        for value in np.unique(labels[labels > 0])[:40]:
            place.contour(labels == value, levels=[0.5], colors=[plt.cm.tab20(int(value) % 20)], linewidths=0.6)
        place.set_title(title, fontsize=8, pad=2)
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=72)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, nargs="+", required=True, help="the channels of one case")
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--patch", type=int, nargs=3, default=(96, 96, 96), help="voxels (z, y, x), at most the case")
    parser.add_argument("--set", choices=("ukbob", "strong", "mri"), help="draw from whole sets")
    parser.add_argument("--draws", type=int, default=2, help="pictures of each transform, or of the set")
    parser.add_argument("--columns", type=int, default=7)
    parser.add_argument("--axis", type=int, choices=(0, 1, 2), default=0, help="across which slices are cut")
    parser.add_argument("--channel", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("augmentation.png"))
    options = parser.parse_args()

    image, geometry = read_image(options.image)
    mean, deviation = image.mean(axis=(1, 2, 3), keepdims=True), image.std(axis=(1, 2, 3), keepdims=True)
    image = ((image - mean) / deviation).astype(np.float32)
    labels = read_labels(options.labels)[0] if options.labels else np.zeros(image.shape[1:], np.uint8)
    z, y, x = (min(p, n) for p, n in zip(options.patch, labels.shape, strict=True))
    patch = (z, y, x)
    setup = AugmentationSetup(patch, geometry.spacing_mm, channels=len(image))
    before = middle(image, labels, patch, patch)
    surroundings = read_size(make_transforms("mri", setup), patch)  # as in training, also for a lone shear

    def panels_of(name: str, transforms: list[Transform]) -> list[Panel]:
        spatial = isinstance(transforms[0], RandomSpatial)
        source = middle(image, labels, patch, surroundings if spatial else patch)
        seeds = range(options.seed, options.seed + options.draws)
        return [(name, augment(source, transforms, torch.Generator().manual_seed(seed))) for seed in seeds]

    panels: list[Panel] = [("as it is", before)]
    if options.set:
        panels += panels_of(options.set, make_transforms(options.set, setup))
    else:
        turns = [t for t in make_transforms("ukbob", setup) if isinstance(t, RandomRotate90)]
        for transform in [*make_transforms("mri", setup), *turns]:
            for name, one in always(transform):
                panels += panels_of(name, [one])
    draw(panels, options.columns, options.axis, options.channel, options.output)
    print(f"pictures -> {options.output}")


if __name__ == "__main__":
    main()
