"""AMOS 2022: abdominal organs in CT and MRI."""

from __future__ import annotations

import re
from pathlib import Path

from ukbob_seg.benchmark.classes import common_name
from ukbob_seg.benchmark.protocol import (
    TEST,
    TRAINING,
    VALIDATION,
    ConvertOptions,
    Found,
    Protocol,
    SourceCase,
    SubmissionRules,
    existing_folder,
    files_matching,
    not_recognised,
)
from ukbob_seg.dataset.spec import summarise_problems
from ukbob_seg.errors import DatasetError
from ukbob_seg.files import read_json

TITLE = "AMOS 2022"
LAYOUT = """  SOURCE/dataset.json
  SOURCE/imagesTr/amos_0507.nii.gz  SOURCE/labelsTr/amos_0507.nii.gz
  SOURCE/imagesVa/amos_0517.nii.gz  SOURCE/labelsVa/amos_0517.nii.gz
  SOURCE/imagesTs/amos_0540.nii.gz"""

CLASSES = {
    "spleen": 1,
    "kidney_right": 2,
    "kidney_left": 3,
    "gallbladder": 4,
    "esophagus": 5,
    "liver": 6,
    "stomach": 7,
    "aorta": 8,
    "inferior_vena_cava": 9,  # AMOS: postcava
    "pancreas": 10,
    "adrenal_gland_right": 11,
    "adrenal_gland_left": 12,
    "duodenum": 13,
    "urinary_bladder": 14,
    "prostate_uterus": 15,
}
LAST_CT = 500  # ids above are MRI
THIRTEEN = 13  # the values above are bladder and prostate/uterus

_FILE = re.compile(r"amos_(?P<id>\d{4})\.nii\.gz")
# MRI has no unit; CT has one. Both together are brought to one range.
_CHANNELS = {"mri": "rescale_to_0_1", "ct": "CT", "all": "rescale_to_0_1"}


def has_modality(number: str, modality: str) -> bool:
    """Whether a case is one of ``mri``, ``ct`` or ``all``, by its number."""
    return modality == "all" or (int(number) > LAST_CT) == (modality == "mri")


def find(source: Path, options: ConvertOptions) -> Found:
    """The cases of an AMOS folder, of the chosen modality.

    Raises:
        DatasetError: another layout, no case of the modality, or a missing label.
    """
    existing_folder(source, TITLE)
    modality = options.modality or "mri"
    for needed in ("dataset.json", "imagesTr", "labelsTr"):
        if not (source / needed).exists():
            raise not_recognised(source, TITLE, LAYOUT, f"there is no {needed}")
    _check_classes(source / "dataset.json")
    train_too = bool(options.validation)
    cases, problems = [], []
    for part in (TRAINING, VALIDATION, TEST):
        labels = files_matching(source / f"labels{part}", _FILE)
        for number, image in files_matching(source / f"images{part}", _FILE).items():
            if not has_modality(number, modality):
                continue
            if part == TRAINING and number not in labels:
                problems.append(f"{image}: no label file {source / 'labelsTr' / image.name}; copy it again")
            if part == VALIDATION and train_too and number not in labels:
                problems.append(f"{image}: no label file {source / 'labelsVa' / image.name}; needed for training")
            goes_to = TRAINING if part == VALIDATION and train_too else part
            cases.append(SourceCase(f"amos_{number}", goes_to, (image,), labels.get(number)))
    problems += _twice(cases)
    if problems:
        raise DatasetError(summarise_problems(problems))
    if not any(case.part == TRAINING for case in cases):
        raise not_recognised(source, TITLE, LAYOUT, f"imagesTr holds no case of --modality {modality}")
    kept = {name: value for name, value in CLASSES.items() if options.all_organs or value <= THIRTEEN}
    values = {value: value if value in kept.values() else 0 for value in CLASSES.values()}
    return Found(tuple(cases), (_CHANNELS[modality],), kept, values)


def _check_classes(path: Path) -> None:
    """Refuse a folder whose dataset.json says that label values mean something else than ``CLASSES``.

    Raises:
        DatasetError: names the first such value.
    """
    content = read_json(path, "AMOS description")
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, dict):
        raise DatasetError(f"{path} does not say what label values mean (no 'labels'); copy it again from AMOS")
    # {"1": "spleen"} in AMOS itself, {"spleen": 1} in copies made for nnU-Net.
    names = {str(key): value for key, value in labels.items() if str(key).isdigit()} or {
        str(value): key for key, value in labels.items()
    }
    for name, value in CLASSES.items():
        said = names.get(str(value))
        if said is None or common_name(str(said)) != name:
            raise DatasetError(f"{path} says that value {value} is {said or 'nothing'}, in AMOS 2022 it is {name}")


def _twice(cases: list[SourceCase]) -> list[str]:
    seen: dict[str, SourceCase] = {}
    return [
        f"{case.images[0]}: the case is in {seen[case.name].images[0].parent.name} as well"
        for case in cases
        if seen.setdefault(case.name, case) is not case
    ]


AMOS = Protocol(
    name="amos",
    title=TITLE,
    dataset="AMOS",
    layout=LAYOUT,
    options=frozenset({"modality", "all_organs", "validation"}),
    find=find,
    submission=SubmissionRules(
        image=re.compile(r"amos_(?P<id>\d{4})(?:_0000)?\.nii\.gz"),
        image_names="amos_0540.nii.gz or amos_0540_0000.nii.gz",
        case="amos_{id}",
        member="amos_{id}.nii.gz",
        classes={"": CLASSES},
        has_modality=has_modality,
    ),
)
