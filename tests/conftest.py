"""Shared fixtures: the real test data, and small raw datasets written on the fly. Processes share the processors."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

# Before anything loads OpenMP: test processes whose threads outnumber the processors wait for each other.
if (_WORKERS := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

import numpy as np
import psutil
import pytest

from ukbob_seg.dataset.image_io import Geometry, write_image, write_labels

REPOSITORY = Path(__file__).resolve().parents[1]
MOST_WORKERS = 8  # the longest file of tests takes a twelfth of all


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes of ``-n auto``: one per processor, as far as there are 4 GiB of memory for each."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux alone says which processors a process may use
    processors = len(allowed(0)) if allowed else os.cpu_count() or 1
    return max(1, min(processors, psutil.virtual_memory().available // 2**32, MOST_WORKERS))


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> None:
    """Tests interrupt themselves; a shell starts what runs in its background with interrupts ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real test data; tests that need it are skipped when it is absent."""
    root = Path(os.environ.get("UKBOB_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real test data in {root}; set UKBOB_TEST_DATA to their folder")
    return root


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator."""
    return np.random.default_rng(20251123)


def blob_case(rng: np.random.Generator, shape: tuple[int, int, int] = (24, 28, 20)) -> tuple[np.ndarray, np.ndarray]:
    """An image (Z, Y, X) float32 with two bright ellipsoids in a noisy body, and its labels 1 and 2."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1).astype(float)
    size = np.asarray(shape, dtype=float)
    labels = np.zeros(shape, dtype=np.uint8)
    for value, fraction in ((1, 0.33), (2, 0.67)):
        centre = size * (0.5, fraction, 0.5) + rng.uniform(-1, 1, 3)
        radius = size * 0.16 + rng.uniform(0, 1, 3)
        labels[(((grid - centre) / radius) ** 2).sum(-1) < 1] = value
    body = (((grid - size / 2) / (size * 0.48)) ** 2).sum(-1) < 1
    image = body * (100.0 + 60.0 * (labels == 1) + 120.0 * (labels == 2) + rng.normal(0, 8, shape))
    return image.astype(np.float32), labels


@pytest.fixture
def make_dataset(tmp_path: Path, rng: np.random.Generator) -> Callable[..., Path]:
    """Write a small raw dataset and return its folder (``<tmp>/raw/Dataset007_Blobs``)."""

    def make(
        cases: int = 4,
        test_cases: int = 0,
        spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
        channel_names: tuple[str, ...] = ("MRI",),
        labels: dict[str, object] | None = None,
        shape: tuple[int, int, int] = (24, 28, 20),
        **extra: object,
    ) -> Path:
        folder = tmp_path / "raw" / "Dataset007_Blobs"
        geometry = Geometry(shape, spacing_mm, (3.0, -5.0, 7.0))
        for number in range(cases + test_cases):
            image, label = blob_case(rng, shape)
            part = "Tr" if number < cases else "Ts"
            for channel in range(len(channel_names)):
                path = folder / f"images{part}" / f"blob_{number:03d}_{channel:04d}.nii.gz"
                write_image(image * (channel + 1), geometry, path)
            write_labels(label, geometry, folder / f"labels{part}" / f"blob_{number:03d}.nii.gz")
        content = {
            "channel_names": {str(i): name for i, name in enumerate(channel_names)},
            "labels": labels or {"background": 0, "first": 1, "second": 2},
            "numTraining": cases,
            "file_ending": ".nii.gz",
            **extra,
        }
        (folder / "dataset.json").write_text(json.dumps(content))
        return folder

    return make
