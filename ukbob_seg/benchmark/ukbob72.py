"""UKBOB-72: four-channel Dixon scans with the 72 labels of TotalVibeSegmentator."""

from __future__ import annotations

import re
from pathlib import Path

from ukbob_seg.benchmark.protocol import (
    ENDING,
    TRAINING,
    ConvertOptions,
    Found,
    Protocol,
    SourceCase,
    existing_folder,
    not_recognised,
)
from ukbob_seg.benchmark.totalvibe import TOTALVIBE_LABELS
from ukbob_seg.dataset.spec import summarise_problems
from ukbob_seg.errors import DatasetError

TITLE = "UKBOB-72"
LAYOUT = """  SOURCE/images/CASE_{0000,0001,0002,0003}.nii.gz (or imagesTr)  SOURCE/labels/CASE.nii.gz (or labelsTr)
  SOURCE/CASE/{fat,water,inphase,outphase}.nii.gz  SOURCE/labels/CASE.nii.gz (or SOURCE/CASE/labels.nii.gz)"""
CHANNELS = ("fat", "water", "inphase", "outphase")

_NUMBERED = re.compile(r"(?P<case>[^.].*)_(?P<channel>000[0-3])\.nii\.gz")


def find(source: Path, _: ConvertOptions) -> Found:
    """The cases of a folder of UKBOB scans and label maps.

    Raises:
        DatasetError: another layout, or a missing channel or label.
    """
    existing_folder(source, TITLE)
    cases, problems = [], []
    for name, images in sorted((_numbered(source) or _named(source)).items()):
        label = _label_of(source, name)
        problems += [f"case {name}: {path} does not exist" for path in images if not path.is_file()]
        if label is None:
            problems.append(f"case {name}: no label file {source / 'labels' / f'{name}{ENDING}'}")
        cases.append(SourceCase(name, TRAINING, images, label))
    if not cases:
        raise not_recognised(source, TITLE, LAYOUT, "there is no case")
    problems += _labels_alone(source, {case.name for case in cases})
    if problems:
        raise DatasetError(summarise_problems(problems))
    return Found(tuple(cases), CHANNELS, TOTALVIBE_LABELS, {value: value for value in TOTALVIBE_LABELS.values()})


def _numbered(source: Path) -> dict[str, tuple[Path, ...]]:
    """Cases whose channels are numbered files of one folder; all four are listed, whether they are there or not."""
    folder = next((f for f in (source / "images", source / "imagesTr") if f.is_dir()), source)
    matches = [_NUMBERED.fullmatch(path.name) for path in folder.iterdir() if path.is_file()]
    names = {match["case"] for match in matches if match is not None}
    return {name: tuple(folder / f"{name}_{k:04d}{ENDING}" for k in range(len(CHANNELS))) for name in names}


def _named(source: Path) -> dict[str, tuple[Path, ...]]:
    """Cases that are folders with one file per channel."""
    folders = [path for path in source.iterdir() if any((path / f"{name}{ENDING}").is_file() for name in CHANNELS)]
    return {folder.name: tuple(folder / f"{name}{ENDING}" for name in CHANNELS) for folder in folders}


def _label_of(source: Path, name: str) -> Path | None:
    places = (source / "labels", source / "labelsTr")
    candidates = [*(place / f"{name}{ENDING}" for place in places), source / name / f"labels{ENDING}"]
    return next((path for path in candidates if path.is_file()), None)


def _labels_alone(source: Path, names: set[str]) -> list[str]:
    folders = [folder for folder in (source / "labels", source / "labelsTr") if folder.is_dir()]
    paths = [path for folder in folders for path in sorted(folder.glob(f"*{ENDING}")) if path.name[0] != "."]
    return [f"{path}: no image of this case" for path in paths if path.name.removesuffix(ENDING) not in names]


UKBOB72 = Protocol(
    name="ukbob72", title=TITLE, dataset="UKBOB72", layout=LAYOUT, options=frozenset(), find=find, submission=None
)
