"""A cohort with a planted label fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ukbob_seg.dataset.image_io import read_labels, write_labels

FAULTY_CASE = "blob_005"


@pytest.fixture
def cohort(make_dataset: Callable[..., Path]) -> Path:
    """24 cases of two organs; in one of them the second organ has lost all but a thin plate."""
    folder = make_dataset(cases=24, spacing_mm=(2.0, 1.0, 0.8))
    path = folder / "labelsTr" / f"{FAULTY_CASE}.nii.gz"
    labels, geometry = read_labels(path)
    plate = np.argwhere(labels == 2)[:, 0].min() + 2
    labels[plate:][labels[plate:] == 2] = 0
    write_labels(labels, geometry, path)
    return folder
