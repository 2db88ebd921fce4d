"""The second stage of a cascade: what the first stage found in each training case, and its augmentation.

The first stage's cross-validation predictions are used, so that every case is segmented by a network that has not
seen it, as at test time (Isensee et al., Nature Methods 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ukbob_seg.dataset.image_io import Geometry, read_labels
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.files import digest, read_json, write_json
from ukbob_seg.parallel import map_cases
from ukbob_seg.preprocessing.preprocessor import CaseProperties, preprocess_labels
from ukbob_seg.preprocessing.records import load_record
from ukbob_seg.preprocessing.storage import open_array, save_array

OPERATOR_PROBABILITY = 0.4
MOST_RADIUS = 8  # voxels by which a shape grows or shrinks, at most
REMOVAL_PROBABILITY = 0.2
LARGEST_REMOVED = 0.15  # share of the patch; larger parts are never removed
OPERATORS = ("dilate", "erode", "open", "close")


def previous_stage_maps(
    model: Path, arrays: Path, output: Path, names: Sequence[str], spec: DatasetSpec, quiet: bool = False
) -> Path:
    """Bring the first stage's predictions of some cases to the grid of the second stage's arrays.

    Maps that are there and made from the same predictions are left alone.

    Args:
        model: model folder of the first stage, with ``fold_K/validation/CASE.ext``.
        arrays: preprocessed configuration of the second stage.
        output: folder for the maps, ``CASE.b2nd``.
        names: of the cases.
        spec: the dataset's contract.
        quiet: no progress bar.

    Returns:
        ``output``.

    Raises:
        ConfigError: a case has no prediction; says what to train.
        DatasetError: a prediction is damaged, or not of this case.
    """
    found = find_predictions(model, spec.file_ending)
    lacking = [name for name in names if name not in found]
    if lacking:
        raise ConfigError(
            f"{len(lacking)} of {len(names)} cases (such as {lacking[0]}) have no prediction of the first stage in "
            f"{model}; train every fold of it with validation on all cases, for example: "
            f"ukbob_train {int(spec.name[7:10])} 0 -c {model.name.split('__')[0]} --network {model.name.split('__')[1]}"
        )
    worker = _MapMaker(spec.labels, arrays, output)
    map_cases(worker, [(name, found[name]) for name in names], description="first stage of the cascade", quiet=quiet)
    return output


def maps_key(folder: Path | None, names: Sequence[str]) -> str:
    """Hash of the predictions that the maps of some cases were made from; the same for no maps at all."""
    return digest([] if folder is None else [_known_key(folder / f"{name}.json") for name in names])


def find_predictions(model: Path, file_ending: str) -> dict[str, Path]:
    """Validation prediction of each case; one of a fold that held the case out, rather than of the fold ``all``."""
    folders = sorted(model.glob("fold_*/validation"), key=lambda path: path.parent.name != "fold_all")
    return {
        path.name.removesuffix(file_ending): path
        for folder in folders
        for path in sorted(folder.glob(f"[!.]*{file_ending}"))
    }


@dataclass(frozen=True)
class _MapMaker:
    """Picklable resampling of one prediction."""

    scheme: LabelScheme
    arrays: Path
    output: Path

    def __call__(self, item: tuple[str, Path]) -> None:
        name, path = item
        record = load_record(self.arrays, name)
        stat = path.stat()
        key = digest([record["key"], str(path), stat.st_size, stat.st_mtime_ns])
        target, note = self.output / f"{name}.b2nd", self.output / f"{name}.json"
        if target.is_file() and _known_key(note) == key:
            return
        properties = properties_from_json(record["properties"])
        values, geometry = read_labels(path)
        if geometry.shape != properties.geometry.shape:
            raise DatasetError(
                f"{path} has {geometry.shape} voxels, case {name} {properties.geometry.shape}; train the first stage "
                "again"
            )
        labels = preprocess_labels(self.scheme.to_indices(values, str(path)), properties)
        z, y, x = (min(64, n) for n in labels.shape)
        save_array(target, np.ascontiguousarray(labels), (z, y, x))
        write_json(note, {"key": key})


def _known_key(note: Path) -> Any:
    try:
        return read_json(note)["key"]
    except (DatasetError, KeyError, TypeError):
        return None


def properties_from_json(content: dict[str, Any]) -> CaseProperties:
    """Properties as they stand in a preprocessing record."""

    def tuples(entry: dict[str, Any]) -> dict[str, Any]:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}

    return CaseProperties(**{**tuples(content), "geometry": Geometry(**tuples(content["geometry"]))})


def read_map(folder: Path, name: str) -> Any:
    """The stored map (Z, Y, X) of a case, to read patches from."""
    return open_array(folder / f"{name}.b2nd")


def augment_map(labels: np.ndarray, generator: np.random.Generator, patch_voxels: int | None = None) -> np.ndarray:
    """Make a first stage's map as imperfect as such maps are, in other ways at every step.

    With probability 0.4 every label grows, shrinks, opens or closes by a ball of 1 to 8 voxels, in random order; with
    probability 0.2 every label loses one of its connected parts, if that covers less than 15 % of the patch. These
    are nnU-Net's operations, probabilities and sizes.

    Args:
        labels: (z, y, x) label indices, not changed.
        generator: decides.
        patch_voxels: size of the patch that these labels will be cut down to, None when they are the patch.

    Returns:
        (z, y, x), same type.
    """
    if generator.random() < OPERATOR_PROBABILITY:
        labels = labels.copy()
        for value in generator.permutation(_present(labels)):
            operator = OPERATORS[int(generator.integers(len(OPERATORS)))]
            _apply(labels, int(value), operator, int(generator.integers(1, MOST_RADIUS + 1)))
    if generator.random() < REMOVAL_PROBABILITY:
        labels = labels.copy()
        for value in _present(labels):
            _remove_part(labels, int(value), generator, LARGEST_REMOVED * (patch_voxels or labels.size))
    return labels


def _present(labels: np.ndarray) -> np.ndarray:
    values = np.flatnonzero(np.bincount(labels.ravel()))
    return values[values > 0]


def _apply(labels: np.ndarray, value: int, operator: str, radius: int) -> None:
    """Change one label in place; voxels that it gains are lost by others, voxels that it loses become background."""
    where = np.nonzero(labels == value)
    if not len(where[0]):
        return  # overgrown by an earlier label
    room = radius + 1
    box = tuple(slice(max(0, int(w.min()) - room), int(w.max()) + room + 1) for w in where)
    part = labels[box]  # a view
    before = part == value
    after = morphology(before, operator, radius)
    part[before & ~after] = 0
    part[after] = value


def morphology(mask: np.ndarray, operator: str, radius: float) -> np.ndarray:
    """Dilate, erode, open or close by a ball, exactly: a voxel is within the ball when its distance is.

    What lies outside the array counts as background to a dilation and as foreground to an erosion.
    """
    from scipy.ndimage import distance_transform_edt

    def dilate(shape: np.ndarray) -> np.ndarray:
        grown: np.ndarray = distance_transform_edt(~shape) <= radius
        return grown if shape.any() else shape

    def erode(shape: np.ndarray) -> np.ndarray:
        return ~dilate(~shape)

    steps = {"dilate": (dilate,), "erode": (erode,), "open": (erode, dilate), "close": (dilate, erode)}[operator]
    for step in steps:
        mask = step(mask)
    return mask


def _remove_part(labels: np.ndarray, value: int, generator: np.random.Generator, most_voxels: float) -> None:
    from scipy.ndimage import label as find_parts

    parts, count = find_parts(labels == value, np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    small = np.flatnonzero(sizes < most_voxels) + 1
    if len(small):
        labels[parts == small[int(generator.integers(len(small)))]] = 0
