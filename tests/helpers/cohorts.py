"""Cohorts of small scans on disk, and ukbob_label in-process."""

import json
from pathlib import Path

from nnunet_models import scan

from ukbob_seg.cli.label import main
from ukbob_seg.dataset.image_io import Geometry, write_image

GEOMETRY = Geometry((17, 23, 19), (1.0, 1.3, 0.9), (3.0, -5.0, 7.0))  # LPS
CHANNELS = ("fat", "water", "inphase", "outphase")


def make_cohort(folder: Path, cases: int = 3, channels: int = 4, described: bool = True, seed: int = 0) -> Path:
    """A raw dataset without labels: s0, s1, ..."""
    for case in range(cases):
        image = scan(channels=channels, seed=seed + case)
        for channel in range(channels):
            write_image(image[channel], GEOMETRY, folder / "imagesTr" / f"s{case}_{channel:04d}.nii.gz")
    if described:
        names = {str(k): name for k, name in enumerate(CHANNELS[:channels])}
        (folder / "dataset.json").write_text(json.dumps({"channel_names": names}))
    return folder


def label(*arguments: object) -> int:
    """Exit code of the command on the CPU."""
    return main(["--device", "cpu", *map(str, arguments)])
