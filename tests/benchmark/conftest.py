"""Miniatures of the challenges' folders: small volumes with the right names, geometry and label values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from official_labels import AMOS_LABELS

SHAPE = (32, 32, 32)  # x, y, z, as the files have them
RIGHT = (4, 8, 12)  # positions along the right-left axis, in voxels from the patient's right
LEFT = (18, 22, 26)

NETWORK = """
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self, in_channels, out_channels, width):
        super().__init__(nn.Conv3d(in_channels, width, 3, padding=1), nn.InstanceNorm3d(width, affine=True),
                         nn.ReLU(), nn.Conv3d(width, out_channels, 1))
"""


def affine(toward_left: bool) -> np.ndarray:
    """A matrix (RAS) with unequal spacing; index x grows to the patient's left or to the right."""
    matrix = np.diag([-1.1 if toward_left else 1.1, -0.9, 1.5, 1.0])
    matrix[:3, 3] = (12.3 if toward_left else -21.8, 40.2, -107.7)
    return matrix


def save(array: np.ndarray, path: Path, toward_left: bool = True) -> None:
    """Write a NIfTI file as a challenge would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine(toward_left))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def organs(values: Iterable[int], toward_left: bool, places: dict[int, int] | None = None) -> np.ndarray:
    """A label map with one box per value; those in ``places`` at that distance from the patient's right."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    free = [(y, z) for z in (6, 14, 22) for y in (6, 10, 14, 18, 22)]
    for number, value in enumerate(values):
        y, z = free[number % len(free)]
        x = (places or {}).get(value, (*RIGHT, *LEFT)[number % 6])
        x = x if toward_left else SHAPE[0] - x - 3
        labels[x : x + 3, y : y + 3, z : z + 4] = value
    return labels


def scan(labels: np.ndarray, rng: np.random.Generator, low: float = -1000.0, scale: float = 20.0) -> np.ndarray:
    """An image of the labels: a bright body in the dark."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    body = (((grid - 15.5) / 15.0) ** 2).sum(-1) < 1
    inside = 40.0 + scale * labels + rng.normal(0, 5, SHAPE)
    return np.where(body, inside, low).round().astype(np.int16)


SIDES = {2: 4, 3: 26, 12: 9, 13: 21, 9: 12, 8: 18}  # kidneys, adrenal glands, vena cava, aorta (BTCV's values)


@pytest.fixture
def btcv(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Five training and two test cases, in RawData."""
    folder = tmp_path / "official" / "RawData"
    for number in (1, 2, 3, 4, 5):
        labels = organs(range(1, 14), True, SIDES)
        save(scan(labels, rng), folder / "Training" / "img" / f"img{number:04d}.nii.gz")
        save(labels, folder / "Training" / "label" / f"label{number:04d}.nii.gz")
    for number in (61, 62):
        toward_left = number == 61
        labels = organs(range(1, 14), toward_left, SIDES)
        save(scan(labels, rng), folder / "Testing" / "img" / f"img{number:04d}.nii.gz", toward_left)
        save(labels, tmp_path / "truth" / f"btcv_{number:04d}.nii.gz", toward_left)
    return folder.parent


@pytest.fixture
def amos(tmp_path: Path, rng: np.random.Generator) -> Path:
    """MRI: five training, one validation, two test cases; CT: one of each."""
    folder = tmp_path / "official"
    for part, numbers in {"Tr": (1, 507, 508, 509, 510, 511), "Va": (20, 517), "Ts": (30, 540, 541)}.items():
        for number in numbers:
            labels = organs(range(1, 16), True)
            save(scan(labels, rng, low=0.0), folder / f"images{part}" / f"amos_{number:04d}.nii.gz")
            if part != "Ts":
                save(labels, folder / f"labels{part}" / f"amos_{number:04d}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({"name": "AMOS", "labels": AMOS_LABELS}))
    return folder


@pytest.fixture
def brats(tmp_path: Path, rng: np.random.Generator) -> Callable[[str], Path]:
    """Five training scans of four patients and two test scans, in the layout of an edition."""

    def make(edition: str) -> Path:
        folder = tmp_path / "official"
        new = edition == "2023"
        training = ["00000-000", "00000-001", "00002-000", "00003-000", "00005-000"] if new else range(5)
        test = ["00010-000", "00011-000"] if new else (10, 11)
        suffixes = ("-t1n", "-t1c", "-t2w", "-t2f", "-seg") if new else ("_t1", "_t1ce", "_t2", "_flair", "_seg")
        for part, cases in (("TrainingData", training), ("ValidationData", test)):
            for case in cases:
                name = f"BraTS-GLI-{case}" if new else f"BraTS2021_{case:05d}"
                labels = np.zeros(SHAPE, dtype=np.uint8)
                labels[8:24, 8:24, 8:24] = 2
                labels[12:20, 12:20, 12:20] = 1
                labels[14:18, 14:18, 14:18] = 3 if new else 4
                for suffix in suffixes[:4]:
                    save(scan(labels, rng, low=0.0), folder / part / name / f"{name}{suffix}.nii.gz")
                if part == "TrainingData":
                    save(labels, folder / part / name / f"{name}{suffixes[4]}.nii.gz")
        return folder

    return make


@pytest.fixture
def ukbob72(tmp_path: Path, rng: np.random.Generator) -> Callable[[bool], Path]:
    """Five scans, with numbered or named channels."""

    def make(numbered: bool) -> Path:
        folder = tmp_path / "official"
        for number in range(5):
            name = f"scan_{number:07d}"
            labels = organs((1, 2, 3, 5, 69, 72), True)
            for channel, word in enumerate(("fat", "water", "inphase", "outphase")):
                path = folder / "images" / f"{name}_{channel:04d}.nii.gz"
                save(scan(labels, rng, low=0.0), path if numbered else folder / name / f"{word}.nii.gz")
            save(labels, folder / "labels" / f"{name}.nii.gz")
        return folder

    return make


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Put a network that trains in seconds into a plan, as ``tests_tiny_benchmark:Tiny``."""
    (tmp_path / "tests_tiny_benchmark.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)

    def put(plans: Path) -> None:
        content = json.loads(plans.read_text())
        content["configurations"]["3d_fullres"]["networks"]["tests_tiny_benchmark:Tiny"] = {
            "patch_size": [16, 16, 16],
            "batch_size": 1,
            "arguments": {"width": 4},
            "estimated_memory_gb": 0.1,
        }
        plans.write_text(json.dumps(content))

    return put
