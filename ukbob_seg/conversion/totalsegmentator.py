"""TotalSegmentator's layout: ``s0001/ct.nii.gz`` and ``s0001/segmentations/ORGAN.nii.gz``, a mask for every organ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ukbob_seg.conversion.run import TEST, TRAINING, ConvertedCase, Layout, image_target, label_target
from ukbob_seg.conversion.steps import MergeMasks, PlaceFile, common_ending, ending_of
from ukbob_seg.dataset.spec import summarise_problems
from ukbob_seg.dataset.tables import read_table
from ukbob_seg.errors import ConfigError, DatasetError, listing

_IMAGES = {"ct": "CT", "mri": "MRI"}  # file -> name of the channel
_MASKS = "segmentations"


def find_totalsegmentator(
    source: Path, folder: Path, classes: Sequence[str] | None = None, allow_missing: bool = False
) -> Layout:
    """A folder of subjects with masks.

    Classes are the names of the masks' files in alphabetical order, or those chosen, in the order given; values count
    from 1. Subjects that meta.csv calls ``test``, and those without masks, become test cases.

    Args:
        source: folder of subjects.
        folder: the raw dataset to be.
        classes: names to take; None for all.
        allow_missing: a mask that is not there is an organ that is not there.

    Raises:
        ConfigError: a class that no subject has.
        DatasetError: another layout, or subjects that lack a mask.
    """
    images = {path.parent.name: path for path in sorted(source.glob("*/*.nii*")) if _stem(path) in _IMAGES}
    if not images:
        raise DatasetError(
            f"no subjects in {source}: expected files like s0001/ct.nii.gz and s0001/{_MASKS}/liver.nii.gz"
        )
    kinds = {_stem(path) for path in images.values()}
    if len(kinds) > 1:
        raise DatasetError(f"{source} holds CT and MRI; convert them apart, they are different channels")
    masks = {name: _masks_of(path.parent) for name, path in images.items()}
    there = sorted({organ for found in masks.values() for organ in found})
    if not there:
        raise DatasetError(f"{source} has no masks: expected files like s0001/{_MASKS}/liver.nii.gz")
    unknown = [name for name in classes or () if name not in there]
    if unknown:
        raise ConfigError(f"--classes: no subject has {listing(unknown)}; there are {listing(there, 200)}")
    names = list(dict.fromkeys(classes)) if classes else there
    _refuse_missing(masks, names, allow_missing)
    held_back = _test_subjects(source)
    ending = common_ending(list(images.values()))
    cases = []
    for name, image in images.items():
        part = TEST if name in held_back or not masks[name] else TRAINING
        label = None
        if masks[name]:
            files = tuple((value, masks[name][organ]) for value, organ in enumerate(names, 1) if organ in masks[name])
            target = label_target(folder, part, name, ending)
            label = MergeMasks(image, files, target, folder / "records" / f"{name}.json")
        placed = PlaceFile(image, image_target(folder, part, name, 0, ending))
        cases.append(ConvertedCase(name, part, (placed,), label))
    return Layout(
        format="totalsegmentator",
        title=f"TotalSegmentator: {source.name}",
        channels=(_IMAGES[kinds.pop()],),
        labels={name: value for value, name in enumerate(names, 1)},
        ending=ending,
        cases=tuple(cases),
        options={"classes": list(classes) if classes else None, "allow_missing": allow_missing},
    )


def _stem(path: Path) -> str:
    return path.name.removesuffix(".nii.gz").removesuffix(".nii")


def _masks_of(subject: Path) -> dict[str, Path]:
    paths = sorted(path for path in (subject / _MASKS).glob("*.nii*") if path.name[0] != ".")
    return {path.name.removesuffix(ending_of(path)): path for path in paths}


def _refuse_missing(masks: dict[str, dict[str, Path]], names: Sequence[str], allow_missing: bool) -> None:
    problems = []
    for subject, found in masks.items():
        missing = [name for name in names if name not in found]
        if found and missing and (not allow_missing or len(missing) == len(names)):
            problems.append(f"case {subject}: no mask of {listing(missing)}")
    if problems:
        remedy = "add the masks, or take the organs as absent with --allow-missing"
        raise DatasetError(f"{summarise_problems(problems)}; {remedy}")


def _test_subjects(source: Path) -> set[str]:
    """Subjects that meta.csv, where it is there, calls ``test``."""
    path = source / "meta.csv"
    if not path.is_file():
        return set()
    try:
        table = read_table(path, "the table of subjects", ["image_id", "split"])
    except DatasetError:
        return set()  # older editions have no column of that name
    return set(table.loc[table["split"] == "test", "image_id"])
