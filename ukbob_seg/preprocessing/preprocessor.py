"""Crop, normalise, resample and store every training case, and prepare one image for prediction in the same way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ukbob_seg.dataset.image_io import Geometry, largest_voxels
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import Case, DatasetSpec, require_cases
from ukbob_seg.dataset.verify import load_case
from ukbob_seg.errors import DatasetError
from ukbob_seg.files import atomic_path, digest, ensure_writable, write_json
from ukbob_seg.parallel import HERE, Cluster, choose_workers, map_cases
from ukbob_seg.preprocessing.cropping import nonzero_box, nonzero_mask
from ukbob_seg.preprocessing.fingerprint import label_content
from ukbob_seg.preprocessing.fingerprint_cases import LoadedCases, file_stamps
from ukbob_seg.preprocessing.locations import class_locations
from ukbob_seg.preprocessing.normalization import normalize
from ukbob_seg.preprocessing.plan_options import resampled_shape
from ukbob_seg.preprocessing.planner import ANISOTROPY_THRESHOLD
from ukbob_seg.preprocessing.plans import ConfigurationPlan, Plans
from ukbob_seg.preprocessing.records import case_files, case_key, is_current, is_intact, write_record
from ukbob_seg.preprocessing.storage import save_array

FORMAT_VERSION = 2
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
    target_mm = configuration.target_spacing(geometry.spacing_mm)
    shape = resampled_shape((z, y, x), geometry.spacing_mm, target_mm)
    axis = find_coarse_axis(geometry.spacing_mm, target_mm)
    properties = CaseProperties(
        geometry=geometry,
        box_start=(box[0].start, box[1].start, box[2].start),
        box_stop=(box[0].stop, box[1].stop, box[2].stop),
        shape=shape,
        coarse_axis=axis,
    )
    if shape != (z, y, x):
        # Imported here: it takes a third of a second, and many datasets have their target spacing already.
        from ukbob_seg.preprocessing.resampling import resample_image

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
    verify: bool = False,
    loaded: LoadedCases | None = None,
    cluster: Cluster = HERE,
) -> int:
    """Preprocess every training case of a dataset; cases that are present and up to date are left alone.

    Args:
        raw_folder: raw dataset.
        output_folder: preprocessed dataset; cases go to the folder of the configuration (``arrays_folder``).
        plans: from the planner.
        configuration: which configuration of the plans.
        workers: processes, None to choose by processors and memory.
        allow_empty: accept cases without foreground.
        quiet: no progress bar.
        verify: look into every file that is there, instead of trusting its size and time.
        loaded: cases that an earlier stage has in memory.
        cluster: the part of the cases to do, and on which machines.

    Returns:
        How many cases were done now (the others were up to date).

    Raises:
        DatasetError: a case cannot be used; finished cases are kept.
    """
    spec = DatasetSpec.load(raw_folder)
    cases = cluster.share(require_cases(raw_folder, spec))
    plan = plans.configuration(configuration)
    folder = arrays_folder(Path(output_folder), plans, configuration)
    ensure_writable(folder)
    write_json(Path(output_folder) / "dataset.json", spec.content)
    recipe = preprocessing_recipe(plans, plan, spec)
    # Where sizes and times do not tell, or are not to be trusted, the worker looks into the files.
    current = [is_current(folder, case, recipe) for case in cases]
    chosen = [(case, known is not False) for case, known in zip(cases, current, strict=True) if verify or not known]
    todo = [case for case, _ in chosen]
    voxels = max(float(np.prod(plan.median_shape)), largest_voxels([case.images[0] for case in todo]))
    gigabytes = WORKING_COPIES * len(spec.channel_names) * voxels * 4 / 2**30
    count = choose_workers(workers, len(todo), gigabytes)
    if workers is None and gigabytes < SMALL_CASE_GB:
        count = 1
    here = count == 1 and cluster.scheduler is None
    worker = _Preprocessor(spec.labels, plans, plan, folder, recipe, allow_empty, loaded if here else None)
    description = f"preprocessing {spec.name} {folder.name}"
    done = map_cases(worker, chosen, workers=count, description=description, quiet=quiet, scheduler=cluster.scheduler)
    return sum(done)


def arrays_folder(preprocessed: Path, plans: Plans, configuration: str) -> Path:
    """Folder of the arrays that a configuration uses: its own, or those of the one it names."""
    return preprocessed / (plans.configuration(configuration).arrays_of or configuration)


def preprocessing_recipe(plans: Plans, plan: ConfigurationPlan, spec: DatasetSpec) -> str:
    """Hash of everything in the plans and labels that decides a preprocessed array."""
    normalization = [dataclasses.asdict(entry) for entry in plans.normalization]
    return digest(
        [
            FORMAT_VERSION, normalization, plan.spacing_mm, plan.image_order, plan.anti_alias, plan.coarse_order,
            plan.slice_axis, label_content(spec),
        ]
    )  # fmt: skip


@dataclass(frozen=True)
class _Preprocessor:
    """Picklable preprocessing of one training case for worker processes; tells whether there was anything to do."""

    scheme: LabelScheme
    plans: Plans
    plan: ConfigurationPlan
    folder: Path
    recipe: str
    allow_empty: bool
    loaded: LoadedCases | None = None

    def __call__(self, item: tuple[Case, bool]) -> bool:
        case, may_be_intact = item
        if may_be_intact and is_intact(self.folder, case, self.recipe):
            return False
        stamps = file_stamps(case)
        loaded = self.loaded.get(case) if self.loaded is not None else None
        loaded = loaded or load_case(case, self.scheme, self.allow_empty)
        image, properties = preprocess_image(loaded.image, loaded.geometry, self.plans, self.plan)
        labels = preprocess_labels(loaded.labels, properties)
        locations, counts = class_locations(labels, case.name)
        patch = next(iter(self.plan.networks.values())).patch_size if self.plan.networks else (64, 64, 64)
        image_path, label_path, table_path = case_files(self.folder, case.name)
        save_array(image_path, image, patch)
        save_array(label_path, np.ascontiguousarray(labels), patch)
        with atomic_path(table_path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **locations)  # type: ignore[arg-type]
        content = {"properties": dataclasses.asdict(properties), "voxels_per_label": counts}
        write_record(self.folder, case.name, case_key(self.recipe, stamps), self.recipe, content)
        return True


def preprocess_labels(labels: np.ndarray, properties: CaseProperties) -> np.ndarray:
    """A label map (Z, Y, X) on a file's grid, brought to the grid of the preprocessed array."""
    labels = labels[properties.box]
    if labels.shape == properties.shape:
        return labels
    from ukbob_seg.preprocessing.resampling import resample_labels

    return resample_labels(labels, properties.shape, nearest_axis=properties.coarse_axis)
