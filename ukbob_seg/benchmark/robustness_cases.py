"""Which cases a model is judged on: given ones, the dataset's test cases, or those that its folds held out."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ukbob_seg.benchmark.robustness_options import ModelChoice
from ukbob_seg.dataset.image_io import read_geometry
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.dataset.spec import Case, DatasetSpec, group_channels, summarise_problems
from ukbob_seg.errors import CheckpointError, ConfigError, DatasetError, listing
from ukbob_seg.evaluation.crossval import HeldOut
from ukbob_seg.evaluation.pairing import label_files
from ukbob_seg.inference.model_folder import find_folds
from ukbob_seg.training.checkpoint import NAMES, read_checkpoint

log = logging.getLogger(__name__)

GIVE_BOTH = "give the images with -i and their labels with -r"


@dataclass(frozen=True)
class CaseGroup:
    """Cases that the same networks predict.

    Attributes:
        folds: whose networks are averaged; None for all trained.
        first_stage: in a cascade, those of its first stage; None for all trained.
        cases: with labels.
    """

    folds: tuple[str, ...] | None
    first_stage: tuple[str, ...] | None
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class JudgedCases:
    """All cases.

    Attributes:
        source: where they are from, for people.
        groups: no case is in two of them.
    """

    source: str
    groups: tuple[CaseGroup, ...]

    @property
    def cases(self) -> tuple[Case, ...]:
        """Of all groups, by name."""
        return tuple(sorted((case for group in self.groups for case in group.cases), key=lambda case: case.name))

    @property
    def example(self) -> Case:
        """The first: that the report shows."""
        return self.cases[0]

    def draw(self, count: int | None, seed: int) -> JudgedCases:
        """Some of them, by seed; all without a number.

        Raises:
            ConfigError: there are fewer.
        """
        names = [case.name for case in self.cases]
        if count is None:
            return self
        if count > len(names):
            raise ConfigError(f"--cases {count}: there are {len(names)} ({self.source})")
        drawn = set(np.random.default_rng(seed).permutation(names)[:count].tolist())
        kept = [
            replace(group, cases=tuple(case for case in group.cases if case.name in drawn)) for group in self.groups
        ]
        return replace(self, groups=tuple(group for group in kept if group.cases))


def find_judged_cases(
    model: ModelChoice, spec: DatasetSpec, images: Path | None, labels: Path | None, roots: Roots
) -> JudgedCases:
    """Given folders; else ``imagesTs`` and ``labelsTs`` of the model's raw dataset; else what its folds held out.

    Args:
        model: whose dataset's name is that of the folder that it lies in.
        spec: of the model.
        images: folder of ``CASE_0000.ext, ...``, together with ``labels``, or None.
        labels: folder of label files by case; these decide which cases count.
        roots: folders of raw and preprocessed datasets.

    Raises:
        ConfigError: one of the two folders without the other.
        DatasetError: nothing to score on, or an image is missing.
    """
    if (images is None) != (labels is None):
        raise ConfigError(f"-i and -r belong together: {GIVE_BOTH}")
    if images is not None and labels is not None:
        return _test_cases(model, spec, images, labels)
    name = model.folders[0].resolve().parent.name
    if others := {folder.resolve().parent.name for folder in model.folders} - {name}:
        raise ConfigError(f"the models are of {name} and of {listing(sorted(others))}: {GIVE_BOTH}")
    raw = roots.raw / name
    if not raw.is_dir():
        raise DatasetError(f"there is no raw dataset {raw} with cases to score on; {GIVE_BOTH}")
    if (raw / "imagesTs").is_dir() and (raw / "labelsTs").is_dir() and label_files(raw / "labelsTs"):
        return _test_cases(model, spec, raw / "imagesTs", raw / "labelsTs")
    return _held_out_cases(model, spec, raw, roots)


def model_spec(model: ModelChoice) -> DatasetSpec:
    """Channels and labels of a model.

    Raises:
        CheckpointError: nothing is trained there.
    """
    found = find_folds(model.folders[0], model.checkpoint)
    chosen = [fold for fold in model.folds or sorted(found) if fold in found]
    if not chosen:
        raise CheckpointError(
            f"{model.folders[0]} has no {NAMES[model.checkpoint]} for fold {listing(model.folds or ('any',))} "
            f"(trained: {', '.join(sorted(found)) or 'none'})"
        )
    return read_checkpoint(found[chosen[0]])[0].spec()


def check_grids(cases: Sequence[Case]) -> None:
    """Compare the headers of images and labels, before any work.

    Raises:
        DatasetError: of all cases whose grids differ, or that cannot be read, in one message.
    """
    problems = []
    for case in cases:
        try:
            image, label = read_geometry(case.images[0]), read_geometry(label_of(case))
            difference = image.difference(label, ("the image", "its labels"))
            if difference is not None:
                raise DatasetError(f"{difference}; bring both onto one grid")
        except DatasetError as error:
            problems.append(f"case {case.name}: {error}")
    if problems:
        raise DatasetError(summarise_problems(problems))


def label_of(case: Case) -> Path:
    """The label file of a case that is judged."""
    if case.label is None:
        raise RuntimeError(f"case {case.name} has no labels and should not have been chosen")
    return case.label


def shift_seed(case: str) -> int:
    """Of a case's fields and noise: the number at the end of its name, after ``_``; else made from the name."""
    number = case.rpartition("_")[2]
    return int(number) if number.isascii() and number.isdigit() else zlib.crc32(case.encode())


def _test_cases(model: ModelChoice, spec: DatasetSpec, images: Path, labels: Path) -> JudgedCases:
    """All cases of a folder of labels."""
    for option, folder in (("-i", images), ("-r", labels)):
        if not folder.is_dir():
            raise DatasetError(f"{option}: folder {folder} does not exist")
    references = label_files(labels)
    if not references:
        raise DatasetError(f"no label files in {labels}; {GIVE_BOTH}")
    grouped = group_channels(images, spec)
    problems = [problem for problem in grouped.problems if any(f"case {name}:" in problem for name in references)]
    lacking = [name for name in references if name not in grouped.cases and name not in grouped.incomplete]
    if lacking:
        problems.append(
            f"{len(lacking)} of {len(references)} label files of {labels} have no image "
            f"CASE_0000{spec.file_ending} in {images}: {listing(lacking)}"
        )
    if problems:
        raise DatasetError(summarise_problems(problems))
    if without := sorted(set(grouped.cases) - set(references)):
        log.info("%d images without labels are left out: %s", len(without), listing(without, 3))
    cases = tuple(Case(name, grouped.cases[name], path) for name, path in references.items())
    return JudgedCases(f"labels of {labels}", (CaseGroup(model.folds, None, cases),))


def _held_out_cases(model: ModelChoice, spec: DatasetSpec, raw: Path, roots: Roots) -> JudgedCases:
    """What each fold held out, for the networks of that fold alone."""
    folder = model.folders[0]
    nothing = f"{raw} has no labelled test cases (imagesTs and labelsTs)"
    if len(model.folders) > 1:
        raise DatasetError(f"{nothing}, and held-out cases are predicted by one model only; {GIVE_BOTH}")
    folds = model.folds or tuple(fold for fold in sorted(find_folds(folder, model.checkpoint)) if fold != "all")
    if not folds or "all" in folds:
        raise DatasetError(f"{nothing}, and fold all of {folder} has seen all training cases; {GIVE_BOTH}")
    try:
        held = HeldOut.load(raw.name, roots, folds)
    except DatasetError as error:
        raise DatasetError(f"{nothing}, and held-out cases cannot be used: {error}; or {GIVE_BOTH}") from error
    if difference := spec.labels.difference(held.spec.labels, (str(folder), str(raw))):
        raise DatasetError(f"{difference}; {GIVE_BOTH}")
    groups = tuple(
        CaseGroup((fold,), (fold,), tuple(held.cases[name] for name in names)) for fold, names in held.folds.items()
    )
    return JudgedCases(f"held out by fold {', '.join(folds)}, predicted by that fold's network", groups)
