"""Slices of a case before and after preprocessing, for the report. What cannot be shown becomes a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import Case, DatasetSpec
from ukbob_seg.dataset.verify import LoadedCase, inspect_case
from ukbob_seg.drawing import fullest_slice, grey_levels, slice_name
from ukbob_seg.errors import DatasetError
from ukbob_seg.files import read_json
from ukbob_seg.preprocessing.fingerprint_cases import CaseFingerprint
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import Plans
from ukbob_seg.preprocessing.preprocessor import arrays_folder, preprocessing_recipe
from ukbob_seg.preprocessing.records import case_files, is_current, record_path
from ukbob_seg.preprocessing.report_figures import SliceView
from ukbob_seg.preprocessing.storage import open_array

MAX_CHANNELS = 4
MAX_ARRAYS = 2


@dataclass(frozen=True)
class CaseSlices:
    """What can be shown of a case.

    Attributes:
        views: the file, then arrays; empty when the file cannot be read.
        normal: axis across the slice.
        place: such as ``z = 12``.
        problems: why something is not shown.
    """

    views: tuple[SliceView, ...]
    normal: int = 0
    place: str = ""
    problems: tuple[str, ...] = ()


def case_slices(sizes: CaseFingerprint, case: Case | None, plans: Plans, spec: DatasetSpec, folder: Path) -> CaseSlices:
    """The slice of a case with the most foreground (the middle one without any), in the file and in its arrays.

    Args:
        sizes: of the case.
        case: its files, None when they are gone.
        plans: whose arrays to show.
        spec: the dataset's contract.
        folder: preprocessed dataset.
    """
    if case is None:
        return CaseSlices((), problems=("no picture, since its files are no longer in the raw dataset.",))
    loaded, problems = inspect_case(case, spec.labels, allow_empty=True)
    if loaded is None or loaded.image.shape[1:] != loaded.labels.shape:
        return CaseSlices((), problems=(f"no picture: {'; '.join(problems)}.",))
    spacing = np.asarray(loaded.geometry.spacing_mm)
    foreground = (loaded.labels > 0) & (loaded.labels != spec.labels.ignore_index)
    normal, index = fullest_slice(foreground, spacing)
    if not foreground.any():
        index = loaded.labels.shape[normal] // 2
    views = [_raw_view(loaded, normal, index, plans.normalization)]
    sentences = [] if foreground.any() else ["no foreground; the middle slice is shown."]
    for name in _shown_configurations(plans, folder):
        place = arrays_folder(folder, plans, name)
        recipe = preprocessing_recipe(plans, plans.configuration(name), spec)
        if is_current(place, case, recipe) is False:
            sentences.append(f"no picture of {name}: the case is not preprocessed, or from other files or plans.")
            continue
        try:
            views.append(_array_view(place, case.name, normal, index, spacing))
        except (DatasetError, KeyError, TypeError, ValueError, IndexError) as error:
            sentences.append(f"no picture of {name}: {error}")
    return CaseSlices(tuple(views), normal, slice_name(normal, index), tuple(sentences))


def index_names(scheme: LabelScheme) -> list[str]:
    """A name for each label index from 1: its class, or the regions that it is part of."""
    return [
        " + ".join(name for name, row in zip(scheme.names, scheme.region_table, strict=True) if row[k])
        for k in range(1, len(scheme.values) + 1)
    ]


def _shown_configurations(plans: Plans, folder: Path) -> list[str]:
    """The first configurations with arrays of their own on disk."""
    own = [name for name, plan in plans.configurations.items() if plan.arrays_of is None]
    return [name for name in own if any(arrays_folder(folder, plans, name).glob("*.b2nd"))][:MAX_ARRAYS]


def _raw_view(loaded: LoadedCase, normal: int, index: int, schemes: Sequence[ChannelNormalization]) -> SliceView:
    pixels = loaded.image[:MAX_CHANNELS].take(index, normal + 1)
    step = np.delete(np.asarray(loaded.geometry.spacing_mm), normal)
    windows = tuple(scheme.clip_range or grey_levels(plane) for plane, scheme in zip(pixels, schemes, strict=False))
    note = _describe(loaded.labels.shape, loaded.geometry.spacing_mm)
    labels = loaded.labels.take(index, normal)
    return SliceView("before", pixels, labels, (float(step[0]), float(step[1])), (0.0, 0.0), windows, note)


def _array_view(folder: Path, name: str, normal: int, index: int, spacing: np.ndarray) -> SliceView:
    """The place of a file's slice in a preprocessed array.

    Raises:
        DatasetError: a file is missing or damaged.
    """
    properties: dict[str, Any] = read_json(record_path(folder, name), "preprocessing record")["properties"]
    start, stop, shape = (np.asarray(properties[key]) for key in ("box_start", "box_stop", "shape"))
    step = (stop - start) * spacing / shape  # the exact extent of the box: the target spacing but for rounding
    at = int(np.clip((index + 0.5 - start[normal]) * spacing[normal] / step[normal], 0, shape[normal] - 1))
    image_path, label_path, _ = case_files(folder, name)
    image, labels = open_array(image_path), open_array(label_path)
    cut: list[slice | int] = [slice(None)] * 3
    cut[normal] = at
    pixels = np.stack([image[(channel, *cut)] for channel in range(min(MAX_CHANNELS, image.shape[0]))])
    (high, wide), (top, left) = np.delete(step, normal), np.delete(start * spacing, normal)
    windows = tuple(grey_levels(plane) for plane in pixels)
    note = f"{_describe(tuple(shape), tuple(step))}, {slice_name(normal, at)}"
    return SliceView(
        f"after ({folder.name})", pixels, labels[tuple(cut)], (float(high), float(wide)), (float(top), float(left)),
        windows, note,
    )  # fmt: skip


def _describe(shape: Sequence[int], spacing_mm: Sequence[float]) -> str:
    return " x ".join(str(int(n)) for n in shape) + " voxels of " + " x ".join(f"{v:.3g}" for v in spacing_mm) + " mm"
