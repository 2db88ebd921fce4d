"""Write a synthetic cohort as a raw dataset, with its truth beside it."""

from __future__ import annotations

import csv
import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ukbob_seg.dataset.image_io import write_image, write_labels
from ukbob_seg.demo.anatomy import PAIRED, organ_names
from ukbob_seg.demo.cohort import CHANNELS, CohortConfig, make_case
from ukbob_seg.demo.faults import PlantedFault, pairs_of, plant_faults
from ukbob_seg.errors import ConfigError
from ukbob_seg.files import write_json, write_text
from ukbob_seg.parallel import map_cases

DATASET = "Dataset900_SyntheticDixon"


@dataclass(frozen=True)
class WrittenCohort:
    """What was written."""

    folder: Path
    faults: tuple[PlantedFault, ...]
    large_organs: tuple[tuple[str, str], ...]


def write_cohort(
    raw_root: Path,
    config: CohortConfig,
    train_cases: int,
    test_cases: int,
    fault_fraction: float = 0.02,
    test_shift: float = 0.0,
    workers: int = 1,
) -> WrittenCohort:
    """Write ``raw_root/Dataset900_SyntheticDixon``.

    Training labels carry planted faults; ``truth/`` holds the true ones, planted_faults.csv the list of faults,
    groups.csv the subject of each case, demographics.csv sex, age and genuinely large organs. Test labels are true.

    Args:
        raw_root: root of raw datasets.
        config: of the cohort.
        train_cases: number of training cases.
        test_cases: number of test cases, drawn after the training cases.
        fault_fraction: share of training organs to spoil.
        test_shift: scanner shift of the test images.
        workers: processes.
    """
    if train_cases < 1 or test_cases < 0:
        raise ConfigError(f"a cohort needs at least one training case, got {train_cases} and {test_cases} test cases")
    folder = Path(raw_root) / DATASET
    jobs = [_Job(folder, config, i, True, fault_fraction) for i in range(train_cases)]
    shifted = dataclasses.replace(config, shift=test_shift)
    jobs += [_Job(folder, shifted, i, False, 0.0) for i in range(train_cases, train_cases + test_cases)]
    records = map_cases(_write_one, jobs, workers=workers, description="synthetic cohort")
    faults = tuple(fault for record in records for fault in record.faults)
    names = {value: name for name, value in organ_names.items()}
    _write_csv(
        folder / "planted_faults.csv",
        ["case", "label", "organ", "kind", "dice_to_truth"],
        [[f.case, f.label, names[f.label], f.kind, f"{f.dice_to_truth:.4f}"] for f in faults],
    )
    _write_csv(folder / "groups.csv", ["case", "subject"], [[r.case, f"subject_{r.case}"] for r in records])
    _write_csv(
        folder / "demographics.csv",
        ["case", "sex", "age", "large_organs"],
        [[r.case, r.sex, r.age, " ".join(r.large)] for r in records],
    )
    write_json(
        folder / "dataset.json",
        {
            "name": "Synthetic Dixon cohort",
            "channel_names": {str(i): name for i, name in enumerate(CHANNELS)},
            "labels": {"background": 0, **organ_names},
            "numTraining": train_cases,
            "file_ending": ".nii.gz",
        },
    )
    return WrittenCohort(folder, faults, tuple((r.case, organ) for r in records for organ in r.large))


@dataclass(frozen=True)
class _Job:
    """One case to write."""

    folder: Path
    config: CohortConfig
    index: int
    training: bool
    fault_fraction: float


@dataclass(frozen=True)
class _Record:
    """What one case contributes to the tables."""

    case: str
    sex: str
    age: int
    large: tuple[str, ...]
    faults: tuple[PlantedFault, ...]


def _write_one(job: _Job) -> _Record:
    case = make_case(job.config, job.index)
    name, geometry = f"dixon_{job.index:04d}", job.config.geometry
    part = "Tr" if job.training else "Ts"
    labels, faults = case.labels, list[PlantedFault]()
    if job.training:
        generator = np.random.default_rng([job.config.seed, job.index, 0xFA17])
        pairs = pairs_of(organ_names, PAIRED)
        values = list(organ_names.values())
        labels, faults = plant_faults(labels, name, values, pairs, generator, job.fault_fraction)
        write_labels(case.labels, geometry, job.folder / "truth" / f"{name}.nii.gz")
    for channel, volume in enumerate(case.image):
        # Scanners store whole numbers; this also makes the files smaller.
        stored = np.rint(volume).clip(0, 65535).astype(np.uint16)
        write_image(stored, geometry, job.folder / f"images{part}" / f"{name}_{channel:04d}.nii.gz")
    write_labels(labels, geometry, job.folder / f"labels{part}" / f"{name}.nii.gz")
    return _Record(name, case.sex, case.age, case.large_organs, tuple(faults))


def _write_csv(path: Path, header: list[str], rows: list[list[object]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())
