"""Crop, normalise, resample and store every training case, and prepare one image for prediction in the same way."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import Case, DatasetSpec, require_cases
from ukbob_seg.dataset.verify import load_case
from ukbob_seg.errors import DatasetError
from ukbob_seg.files import atomic_path, digest, ensure_writable, read_json, write_json
from ukbob_seg.parallel import choose_workers, map_cases
from ukbob_seg.preprocessing.cropping import nonzero_box, nonzero_mask
from ukbob_seg.preprocessing.fingerprint import file_stamps, largest_voxels
from ukbob_seg.preprocessing.normalization import normalize
from ukbob_seg.preprocessing.planner import ANISOTROPY_THRESHOLD, resampled_shape
from ukbob_seg.preprocessing.plans import ConfigurationPlan, Plans
from ukbob_seg.preprocessing.resampling import resample_image, resample_labels
from ukbob_seg.preprocessing.storage import save_array

FORMAT_VERSION = 1
MAX_LOCATIONS = 10_000  # per class and case, or 1% of the class where that is more
SMALL_CASE_GB = 0.05  # below this, one process is faster than starting several
WORKING_COPIES = 8  # float32 copies of the resampled volume that a case needs at its peak, roughly


@dataclass(frozen=True)
class CaseProperties:
    """How a preprocessed array relates to the file it came from.

    Attributes:
        geometry: of the file.
        box_start: first voxel (z, y, x) of the nonzero box that was kept.
        box_stop: one past its last voxel.
        shape: voxels (z, y, x) of the preprocessed array.
        coarse_axis: axis resampled by nearest neighbour (images: by ``coarse_order``) because its voxels are much
            longer, or None.
    """

    geometry: Geometry
    box_start: tuple[int, int, int]
    box_stop: tuple[int, int, int]
    shape: tuple[int, int, int]
    coarse_axis: int | None

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """The kept part of the file's array."""
        z, y, x = (slice(a, b) for a, b in zip(self.box_start, self.box_stop, strict=True))
        return z, y, x


def preprocess_image(
    image: np.ndarray, geometry: Geometry, plans: Plans, configuration: ConfigurationPlan
) -> tuple[np.ndarray, CaseProperties]:
    """Bring one image to the form that networks of this configuration take.

    Args:
        image: (C, Z, Y, X) float32 as read.
        geometry: of the file.
        plans: normalization of each channel.
        configuration: target spacing and interpolation.

    Returns:
        (C, z, y, x) float32 at the configuration's spacing, and what leads back to the file's grid.

    Raises:
        DatasetError: the number of channels differs from the plans'.
    """
    if len(image) != len(plans.normalization):
        raise DatasetError(f"the image has {len(image)} channels, the plans were made for {len(plans.normalization)}")
    box = nonzero_box(image)
    cropped = image[(slice(None), *box)]
    masked = any(entry.mask_nonzero for entry in plans.normalization)
    normalized = normalize(cropped, plans.normalization, nonzero_mask(cropped) if masked else None)
    z, y, x = cropped.shape[1:]
    shape = resampled_shape((z, y, x), geometry.spacing_mm, configuration.spacing_mm)
    axis = find_coarse_axis(geometry.spacing_mm, configuration.spacing_mm)
    properties = CaseProperties(
        geometry=geometry,
        box_start=(box[0].start, box[1].start, box[2].start),
        box_stop=(box[0].stop, box[1].stop, box[2].stop),
        shape=shape,
        coarse_axis=axis,
    )
    if shape != (z, y, x):
        normalized = resample_image(
            normalized,
            shape,
            order=configuration.image_order,
            coarse_axis=axis,
            coarse_order=configuration.coarse_order,
            anti_alias=configuration.anti_alias,
        )
    return normalized, properties


def find_coarse_axis(spacing_mm: tuple[float, float, float], target_mm: tuple[float, float, float]) -> int | None:
    """The axis along which voxels are over three times as long as along the finest, in the file or in the target.

    None when there is none, or when two axes are equally coarse (then interpolating all three is right).
    """
    for spacing in (spacing_mm, target_mm):
        if max(spacing) / min(spacing) > ANISOTROPY_THRESHOLD:
            coarsest = [axis for axis in range(3) if np.isclose(spacing[axis], max(spacing))]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def preprocess(
    raw_folder: Path,
    output_folder: Path,
    plans: Plans,
    configuration: str = "3d_fullres",
    workers: int | None = None,
    allow_empty: bool = False,
    quiet: bool = False,
) -> int:
    """Preprocess every training case of a dataset; cases that are present and up to date are left alone.

    Args:
        raw_folder: raw dataset.
        output_folder: preprocessed dataset; cases go to ``output_folder/configuration``.
        plans: from the planner.
        configuration: which configuration of the plans.
        workers: processes, None to choose by processors and memory.
        allow_empty: accept cases without foreground.
        quiet: no progress bar.

    Returns:
        How many cases were done now (the others were up to date).

    Raises:
        DatasetError: a case cannot be used; finished cases are kept.
    """
    spec = DatasetSpec.load(raw_folder)
    cases = require_cases(raw_folder, spec)
    plan = plans.configuration(configuration)
    folder = Path(output_folder) / configuration
    ensure_writable(folder)
    write_json(Path(output_folder) / "dataset.json", spec.content)
    recipe = preprocessing_recipe(plans, plan, spec)
    worker = _Preprocessor(spec.labels, plans, plan, folder, recipe, allow_empty)
    todo = [case for case in cases if not is_current(folder, case, recipe)]
    voxels = max(float(np.prod(plan.median_shape)), largest_voxels(todo))
    gigabytes = WORKING_COPIES * len(spec.channel_names) * voxels * 4 / 2**30
    count = choose_workers(workers, len(todo), gigabytes)
    if workers is None and gigabytes < SMALL_CASE_GB:
        count = 1
    map_cases(worker, todo, workers=count, description=f"preprocessing {spec.name} {configuration}", quiet=quiet)
    return len(todo)


def preprocessing_recipe(plans: Plans, plan: ConfigurationPlan, spec: DatasetSpec) -> str:
    """Hash of everything in the plans and labels that decides a preprocessed array."""
    normalization = [dataclasses.asdict(entry) for entry in plans.normalization]
    recipe = [FORMAT_VERSION, normalization, plan.spacing_mm, plan.image_order, spec.content["labels"]]
    # Only where they differ from the default, so that arrays made before there was a choice stay valid.
    options = {"anti_alias": plan.anti_alias, "coarse_order": plan.coarse_order}
    chosen = {name: value for name, value in options.items() if value}
    return digest([*recipe, chosen] if chosen else recipe)


def is_current(folder: Path, case: Case, recipe: str) -> bool:
    """Whether a case was preprocessed completely, from these files, by this recipe."""
    try:
        record = read_json(folder / f"{case.name}.json")
        return record["key"] == digest([recipe, file_stamps(case)]) and all(
            (folder / name).stat().st_size == size for name, size in record["files"].items()
        )
    except (DatasetError, OSError, KeyError, TypeError):
        return False


@dataclass(frozen=True)
class _Preprocessor:
    """Picklable preprocessing of one training case for worker processes."""

    scheme: LabelScheme
    plans: Plans
    plan: ConfigurationPlan
    folder: Path
    recipe: str
    allow_empty: bool

    def __call__(self, case: Case) -> None:
        stamps = file_stamps(case)
        loaded = load_case(case, self.scheme, self.allow_empty)
        image, properties = preprocess_image(loaded.image, loaded.geometry, self.plans, self.plan)
        labels = loaded.labels[properties.box]
        if labels.shape != properties.shape:
            labels = resample_labels(labels, properties.shape, nearest_axis=properties.coarse_axis)
        locations, counts = class_locations(labels, case.name)
        patch = self.plan.networks["swin_unetr"].patch_size if "swin_unetr" in self.plan.networks else (64, 64, 64)
        image_path, label_path, table_path = case_files(self.folder, case.name)
        save_array(image_path, image, patch)
        save_array(label_path, np.ascontiguousarray(labels), patch)
        with atomic_path(table_path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **locations)  # type: ignore[arg-type]
        # The record is written last: a case without it, or with other sizes in it, is done again.
        write_json(
            self.folder / f"{case.name}.json",
            {
                "key": digest([self.recipe, stamps]),
                "recipe": self.recipe,
                "files": {path.name: path.stat().st_size for path in (image_path, label_path, table_path)},
                "properties": dataclasses.asdict(properties),
                "voxels_per_label": counts,
            },
        )


def case_files(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """Image, label and class-location files of a preprocessed case."""
    return folder / f"{name}.b2nd", folder / f"{name}_labels.b2nd", folder / f"{name}_locations.npz"


def load_record(folder: Path, name: str) -> dict[str, Any]:
    """The record that completes a preprocessed case.

    Raises:
        DatasetError: the case was not preprocessed.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise DatasetError(f"case {name} is not preprocessed in {folder}; run ukbob_preprocess")
    record = read_json(path, "preprocessing record")
    lost = [file for file in record.get("files", {"?": 0}) if not (folder / file).is_file()]
    if lost:
        raise DatasetError(f"case {name}: {', '.join(lost)} is missing in {folder}; run ukbob_preprocess again")
    return dict(record)


def class_locations(labels: np.ndarray, seed_text: str) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Where each class lies, for foreground oversampling.

    Args:
        labels: (Z, Y, X) label indices.
        seed_text: seeds the choice among many voxels.

    Returns:
        ({index: (n, 3) voxel positions}, {index: voxel count}) for each index above 0 that occurs, the ignore index
        included; n = min(count, max(10 000, 1% of count)).
    """
    flat = np.flatnonzero(labels)
    values = labels.ravel()[flat]
    order = np.argsort(values, kind="stable")
    present, starts = np.unique(values[order], return_index=True)
    generator = np.random.default_rng([zlib.crc32(seed_text.encode())])
    locations, counts = {}, {}
    for value, part in zip(present, np.split(flat[order], starts[1:]) if len(present) else [], strict=True):
        counts[str(int(value))] = len(part)
        keep = min(len(part), max(MAX_LOCATIONS, len(part) // 100))
        chosen = np.sort(generator.choice(part, keep, replace=False)) if keep < len(part) else part
        locations[str(int(value))] = np.stack(np.unravel_index(chosen, labels.shape), axis=1).astype(np.uint16)
    return locations, counts
