"""From predictions to the archive that a challenge's organisers expect."""

from __future__ import annotations

import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ukbob_seg.benchmark.classes import ADRENAL_SIDES, ADRENALS, EITHER, common_name
from ukbob_seg.benchmark.protocol import SubmissionRules
from ukbob_seg.benchmark.protocols import submission_rules
from ukbob_seg.benchmark.score import load_scheme
from ukbob_seg.benchmark.sides import find_midline, split_sides
from ukbob_seg.benchmark.testset import find_test_images
from ukbob_seg.dataset.image_io import largest_voxels, read_geometry, read_image, read_labels, write_labels_like
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import summarise_problems
from ukbob_seg.errors import ConfigError, DatasetError, listing
from ukbob_seg.evaluation.pairing import label_files
from ukbob_seg.files import atomic_path
from ukbob_seg.parallel import choose_workers, map_cases

ENDING = ".zip"
_LANDMARKS = ("inferior_vena_cava", "aorta", "kidney_right", "kidney_left")
_BYTES_PER_VOXEL = 40
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest a zip knows: equal predictions make equal archives


@dataclass(frozen=True)
class Packaged:
    """What went into an archive.

    Attributes:
        path: of the archive.
        cases: number of label maps.
        editions: of the challenge; ("",) where there is one.
        empty: classes of the challenge that the prediction has no class for: they are empty everywhere.
        dropped: classes of the prediction that the challenge does not have: they became background.
        extra: predictions without a test image; not packaged.
        sides: landmark -> cases whose adrenal glands were told apart by it; empty where that was not needed.
    """

    path: Path
    cases: int
    editions: tuple[str, ...]
    empty: tuple[str, ...]
    dropped: tuple[str, ...]
    extra: tuple[str, ...]
    sides: Mapping[str, int]


def package(
    name: str,
    predictions: Path,
    images: Path,
    output: Path,
    dataset_json: Path | None = None,
    modality: str | None = None,
    workers: int | None = None,
) -> Packaged:
    """Write the archive: every test case, the challenge's label values and file names, the test image's geometry.

    Classes are matched by name, so that the model may have other values, or more classes, than the challenge. A class
    of both adrenal glands is divided into right and left by ``split_sides``.

    Args:
        name: of the challenge.
        predictions: folder of label maps, named like the converted test cases.
        images: folder of the test images.
        output: the archive, ``.zip``; replaced when it is complete.
        dataset_json: names the classes of the predictions; None: beside them, or one folder up.
        modality: AMOS: which test cases; None is ``mri``.
        workers: processes; None chooses.

    Raises:
        ConfigError: no such challenge, another file ending, or classes that do not fit.
        DatasetError: missing predictions (all are listed), other grids, unknown values.
    """
    rules = submission_rules(name)
    if Path(output).suffix != ENDING:
        raise ConfigError(f"-o must end in {ENDING}, got {output}")
    tests = find_test_images(rules, images, modality)
    if not Path(predictions).is_dir():
        raise DatasetError(f"prediction folder {predictions} does not exist")
    files = label_files(Path(predictions))
    cases = {number: rules.case.format(id=number) for number in tests}
    missing = [case for case in cases.values() if case not in files]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(cases)} test images have no prediction in {predictions} (named like "
            f"{missing[0]}.nii.gz): {listing(missing)}"
        )
    scheme = load_scheme(Path(predictions), dataset_json, "prediction", "--dataset-json")
    editions = tuple(sorted({rules.edition_of(number) for number in tests}))
    plans = {edition: _value_plan(rules, edition, scheme) for edition in editions}
    with tempfile.TemporaryDirectory(prefix="ukbob_package_") as folder:
        jobs = [
            _Job(case, files[case], tests[number], Path(folder) / rules.member.format(id=number), scheme,
                 plans[rules.edition_of(number)])
            for number, case in cases.items()
        ]  # fmt: skip
        count = choose_workers(workers, len(jobs), largest_voxels(list(tests.values())) * _BYTES_PER_VOXEL / 2**30)
        outcomes = map_cases(_write_member, jobs, count, f"packaging {name}")
        problems = [outcome.problem for outcome in outcomes if outcome.problem]
        if problems:
            raise DatasetError(summarise_problems(problems))
        _write_zip(Path(output), [job.target for job in jobs])
    plan = plans[editions[0]]
    sides = Counter(outcome.landmark for outcome in outcomes if outcome.landmark)
    extra = tuple(case for case in files if case not in set(cases.values()))
    return Packaged(Path(output), len(jobs), editions, plan.empty, plan.dropped, extra, dict(sides))


@dataclass(frozen=True)
class _ValuePlan:
    """How a prediction's values become the challenge's.

    Attributes:
        table: prediction value -> challenge value; values that are not there become 0.
        empty: see ``Packaged``.
        dropped: see ``Packaged``.
        split: (merged value in the prediction, right value, left value in the challenge), or None.
        landmarks: common name -> prediction values, of the organs that show where the body's middle is.
    """

    table: Mapping[int, int]
    empty: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    split: tuple[int, int, int] | None = None
    landmarks: Mapping[str, tuple[int, ...]] | None = None


def _value_plan(rules: SubmissionRules, edition: str, scheme: LabelScheme) -> _ValuePlan:
    if rules.regions and scheme.has_regions:
        wanted = LabelScheme.from_json({"background": 0, **rules.region_labels}, rules.region_order)
        difference = wanted.difference(scheme, ("the challenge's conversion", "the prediction"))
        if difference is not None:
            raise ConfigError(f"{difference}; predict with a model of the converted dataset")
        return _ValuePlan(rules.regions[edition])
    if scheme.has_regions:
        raise ConfigError("the prediction has regions, and this challenge has classes; they cannot be matched by name")
    classes = rules.classes[edition]
    common = {name: common_name(name) for name in scheme.names}
    table: dict[int, int] = {}
    split = None
    filled: dict[str, str] = {}
    used: set[str] = set()
    for name, values in zip(scheme.names, scheme.members, strict=True):
        target = common[name]
        if target == ADRENALS and all(side in classes for side in ADRENAL_SIDES):
            split = (values[0], classes[ADRENAL_SIDES[0]], classes[ADRENAL_SIDES[1]])
            reached: tuple[str, ...] = ADRENAL_SIDES
        elif target is not None and target in classes:
            table[values[0]] = classes[target]
            reached = (target,)
        else:
            continue
        for one in reached:
            if one in filled and one not in EITHER:
                raise DatasetError(f"the prediction has two classes for {one}: {filled[one]} and {name}")
            filled[one] = name
            used.add(name)
    empty = tuple(one for one in classes if one not in filled)
    dropped = tuple(name for name in scheme.names if name not in used)
    if len(empty) == len(classes):
        raise ConfigError(
            f"no class of the prediction has a name of this challenge ({', '.join(classes)}); it has "
            f"{listing(list(scheme.names))}"
        )
    value_of = {common[name]: values for name, values in zip(scheme.names, scheme.members, strict=True)}
    return _ValuePlan(table, empty, dropped, split, {one: value_of[one] for one in _LANDMARKS if one in value_of})


@dataclass(frozen=True)
class _Job:
    """One label map to write."""

    case: str
    prediction: Path
    image: Path
    target: Path
    scheme: LabelScheme
    plan: _ValuePlan


@dataclass(frozen=True)
class _Outcome:
    """What is wrong with a case, and by what its sides were told apart."""

    problem: str = ""
    landmark: str = ""


def _write_member(job: _Job) -> _Outcome:
    try:
        labels, geometry = read_labels(job.prediction)
        difference = read_geometry(job.image).difference(geometry, (job.image.name, "the prediction"))
        if difference is not None:
            raise DatasetError(f"{job.prediction}: {difference}; predict the test image as it is")
        allowed = {0, *map(int, job.scheme.output_values)}
        unknown = [str(value) for value in map(int, np.unique(labels)) if value not in allowed]
        if unknown:
            raise DatasetError(f"{job.prediction}: values {listing(unknown)} are not in its dataset.json")
        table = np.zeros(max(allowed) + 1, dtype=np.uint8)
        for value, becomes in job.plan.table.items():
            table[value] = becomes
        written, landmark = table[labels], ""
        if job.plan.split is not None:
            merged, right_value, left_value = job.plan.split
            both = labels == merged
            if both.any():
                organs = {name: np.isin(labels, values) for name, values in (job.plan.landmarks or {}).items()}
                midline = find_midline(organs, lambda: read_image([job.image])[0][0], geometry)
                right, left = split_sides(both, midline, geometry)
                written[right], written[left] = right_value, left_value
                landmark = midline.landmark
        write_labels_like(written, job.image, job.target)
    except DatasetError as error:
        return _Outcome(problem=f"case {job.case}: {error}")
    return _Outcome(landmark=landmark)


def _write_zip(output: Path, members: Sequence[Path]) -> None:
    with atomic_path(output) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(members):
            information = zipfile.ZipInfo(path.name, _EPOCH)
            information.external_attr = 0o644 << 16
            archive.writestr(information, path.read_bytes())
