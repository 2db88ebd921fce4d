"""BRATS adult glioma: 2023 (and 2021, whose enhancing tumour is 4 instead of 3)."""

from __future__ import annotations

import re
from pathlib import Path

from ukbob_seg.benchmark.protocol import (
    ENDING,
    TEST,
    TRAINING,
    ConvertOptions,
    Found,
    Protocol,
    SourceCase,
    SubmissionRules,
    existing_folder,
    not_recognised,
)
from ukbob_seg.dataset.spec import summarise_problems
from ukbob_seg.errors import DatasetError

TITLE = "BRATS adult glioma"
LAYOUT = """  SOURCE/BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t1n,t1c,t2w,t2f,seg}.nii.gz   (2023)
  SOURCE/BraTS2021_00000/BraTS2021_00000_{t1,t1ce,t2,flair,seg}.nii.gz          (2021)
(or one folder deeper; cases without seg, in a folder of their own, are test cases)"""

CHANNELS = ("T1n", "T1c", "T2w", "T2f")
# NCR 1, ED 2, ET 3. Written in this order, later regions over earlier ones: WT as 2, TC as 1, ET as 3; what is left of
# WT is then ED, and what is left of TC is NCR.
REGIONS: dict[str, int | list[int]] = {"whole_tumour": [1, 2, 3], "tumour_core": [1, 3], "enhancing_tumour": [3]}
ORDER = (2, 1, 3)
# Value in the challenge's files -> ours.
VALUES = {"2023": {1: 1, 2: 2, 3: 3}, "2021": {1: 1, 2: 2, 4: 3}}
CLASSES = {
    "2023": {"necrotic_core": 1, "edema": 2, "enhancing_tumour": 3},
    "2021": {"necrotic_core": 1, "edema": 2, "enhancing_tumour": 4},
}
_CASES = {"2023": re.compile(r"BraTS-GLI-\d{5}-\d{3}"), "2021": re.compile(r"BraTS2021_\d{5}")}
_SUFFIXES = {"2023": ("-t1n", "-t1c", "-t2w", "-t2f"), "2021": ("_t1", "_t1ce", "_t2", "_flair")}
_SEGMENTATION = {"2023": "-seg", "2021": "_seg"}
_TEST_FOLDER = re.compile(r"valid|test", re.IGNORECASE)


def edition_of(case: str) -> str:
    """``2023`` or ``2021``, by the form of the id; empty for another one."""
    return next((edition for edition, pattern in _CASES.items() if pattern.fullmatch(case)), "")


def patient_of(case: str) -> str:
    """A case without its time point: the second component of a 2023 id is the patient; 2021 has one scan of each."""
    return case.rsplit("-", 1)[0] if edition_of(case) == "2023" else case


def find(source: Path, _: ConvertOptions) -> Found:
    """The cases of a BRATS folder.

    Raises:
        DatasetError: another layout, two editions, or missing files.
    """
    existing_folder(source, TITLE)
    parents = [source, *sorted(path for path in source.iterdir() if path.is_dir())]
    groups = {parent: _case_folders(parent) for parent in parents}
    folders = [folder for group in groups.values() for folder in group]
    editions = sorted({edition_of(folder.name) for folder in folders})
    if not editions:
        raise not_recognised(source, TITLE, LAYOUT, "there is no case folder")
    if len(editions) > 1:
        raise DatasetError(f"{source} holds cases of BRATS 2021 and 2023; convert them one after the other")
    (edition,) = editions
    cases, problems = [], []
    for parent, group in groups.items():
        some_labelled = any(_label_of(folder, edition).is_file() for folder in group)
        is_test = not some_labelled and (parent != source or _TEST_FOLDER.search(parent.name) is not None)
        for folder in group:
            case, wrong = _case(folder, edition, is_test)
            cases.append(case)
            problems += wrong
    names = [case.name for case in cases]
    problems += [
        f"case {name} is in two folders below {source}" for name in sorted(set(names)) if names.count(name) > 1
    ]
    if problems:
        raise DatasetError(summarise_problems(problems))
    if not any(case.part == TRAINING for case in cases):
        raise DatasetError(f"{source} holds no case with a label (seg); give the folder with the training data")
    return Found(tuple(cases), CHANNELS, REGIONS, VALUES[edition], ORDER, edition=edition)


def _case_folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and edition_of(path.name))


def _label_of(folder: Path, edition: str) -> Path:
    return folder / f"{folder.name}{_SEGMENTATION[edition]}{ENDING}"


def _case(folder: Path, edition: str, is_test: bool) -> tuple[SourceCase, list[str]]:
    images = tuple(folder / f"{folder.name}{suffix}{ENDING}" for suffix in _SUFFIXES[edition])
    label = None if is_test else _label_of(folder, edition)
    problems = [f"case {folder.name}: {path} does not exist" for path in images if not path.is_file()]
    if label is not None and not label.is_file():
        problems.append(f"case {folder.name}: no label file {label}; test cases belong into a folder of their own")
    part = TEST if is_test else TRAINING
    return SourceCase(folder.name, part, images, label, None if is_test else patient_of(folder.name)), problems


BRATS = Protocol(
    name="brats",
    title=TITLE,
    dataset="BRATS",
    layout=LAYOUT,
    options=frozenset(),
    find=find,
    submission=SubmissionRules(
        image=re.compile(r"(?P<id>BraTS-GLI-\d{5}-\d{3}|BraTS2021_\d{5})(?:-t1n|_t1|_0000)\.nii\.gz"),
        image_names="BraTS-GLI-00000-000-t1n.nii.gz, BraTS2021_00000_t1.nii.gz or BraTS-GLI-00000-000_0000.nii.gz",
        case="{id}",
        member="{id}.nii.gz",
        classes=CLASSES,
        regions={edition: {ours: theirs for theirs, ours in table.items()} for edition, table in VALUES.items()},
        region_labels=REGIONS,
        region_order=ORDER,
        edition_of=edition_of,
    ),
)
