"""Check every case of a raw dataset and report all problems at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ukbob_seg.dataset.image_io import Geometry, read_image, read_labels
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import Case, DatasetSpec, find_cases
from ukbob_seg.errors import DatasetError
from ukbob_seg.parallel import map_cases


@dataclass(frozen=True)
class LoadedCase:
    """A case in memory: image (C, Z, Y, X) float32, label indices (Z, Y, X), and its geometry."""

    image: np.ndarray
    labels: np.ndarray
    geometry: Geometry


def load_case(case: Case, scheme: LabelScheme, allow_empty: bool = False) -> LoadedCase:
    """Read a training case and check everything that later stages rely on.

    Raises:
        DatasetError: all problems of this case in one message.
    """
    loaded, problems = inspect_case(case, scheme, allow_empty)
    if loaded is None or problems:
        raise DatasetError(f"case {case.name}: " + "; ".join(problems))
    return loaded


def verify_dataset(folder: Path, workers: int = 1, allow_empty: bool = False, quiet: bool = False) -> list[str]:
    """Check every training case: readable, finite, one geometry, expected labels, some foreground.

    Returns:
        All problems, one sentence each, naming the case, the numbers and the remedy; empty when all is well.

    Raises:
        DatasetError: dataset.json itself cannot be used.
    """
    spec = DatasetSpec.load(folder)
    cases, problems = find_cases(folder, spec)
    checks = map_cases(
        _Check(spec.labels, allow_empty), cases, workers=workers, description=f"verifying {spec.name}", quiet=quiet
    )
    for case, found in zip(cases, checks, strict=True):
        problems.extend(f"case {case.name}: {problem}" for problem in found)
    stated = spec.content.get("numTraining")
    if isinstance(stated, int) and stated != len(cases) and not problems:
        problems.append(f"{spec.name}: dataset.json says numTraining {stated} but there are {len(cases)} cases")
    return problems


@dataclass(frozen=True)
class _Check:
    """Picklable check of one case for worker processes."""

    scheme: LabelScheme
    allow_empty: bool

    def __call__(self, case: Case) -> list[str]:
        return inspect_case(case, self.scheme, self.allow_empty)[1]


def inspect_case(case: Case, scheme: LabelScheme, allow_empty: bool = False) -> tuple[LoadedCase | None, list[str]]:
    """Read a training case and list everything that is wrong with it.

    Args:
        case: files of the case, with a label.
        scheme: what the label values mean.
        allow_empty: accept a label map without foreground (a healthy patient, say).

    Returns:
        (the case, or None when it cannot be used at all, and its problems).
    """
    problems: list[str] = []
    image = values = geometry = None
    try:
        image, geometry = read_image(case.images)
    except DatasetError as error:
        problems.append(str(error))
    else:
        problems.extend(
            f"{path.name} is empty: every voxel is {channel.flat[0]:g}; replace the file"
            for path, channel in zip(case.images, image, strict=True)
            if channel.size and channel.min() == channel.max()
        )
    assert case.label is not None
    try:
        values, label_geometry = read_labels(case.label)
    except DatasetError as error:
        return None, [*problems, str(error)]
    if geometry is not None:
        difference = geometry.difference(label_geometry, ("the image", "the label"))
        if difference is not None:
            problems.append(f"{difference}; resample the label to the image's grid or correct its header")
    try:
        indices = scheme.to_indices(values, where=case.label.name)
    except DatasetError as error:
        return None, [*problems, str(error)]
    if not allow_empty and not ((indices > 0) & (indices != scheme.ignore_index)).any():
        problems.append(
            f"{case.label.name} is all background; label the case, remove it, or allow such cases with --allow-empty"
        )
    if image is None or geometry is None:
        return None, problems
    return LoadedCase(image, indices, geometry), problems
