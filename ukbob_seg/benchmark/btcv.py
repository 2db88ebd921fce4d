"""BTCV: the abdomen of "Multi-Atlas Labeling Beyond the Cranial Vault" (Synapse syn3193805)."""

from __future__ import annotations

import re
from pathlib import Path

from ukbob_seg.benchmark.protocol import (
    TEST,
    TRAINING,
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

TITLE = "BTCV, abdominal CT"
LAYOUT = """  SOURCE/Training/img/img0001.nii.gz
  SOURCE/Training/label/label0001.nii.gz
  SOURCE/Testing/img/img0061.nii.gz
(or the same below SOURCE/RawData)"""

CLASSES = {
    "spleen": 1,
    "kidney_right": 2,
    "kidney_left": 3,
    "gallbladder": 4,
    "esophagus": 5,
    "liver": 6,
    "stomach": 7,
    "aorta": 8,
    "inferior_vena_cava": 9,
    "portal_vein_and_splenic_vein": 10,
    "pancreas": 11,
    "adrenal_gland_right": 12,
    "adrenal_gland_left": 13,
}
MERGED = {**{name: value for name, value in CLASSES.items() if value < 12}, "adrenal_glands": 12}
CLIP_HU = (-175.0, 250.0)

_IMAGE = re.compile(r"img(?P<id>\d{4})\.nii\.gz")
_LABEL = re.compile(r"label(?P<id>\d{4})\.nii\.gz")


def find(source: Path, options: ConvertOptions) -> Found:
    """The cases of a BTCV folder.

    Raises:
        DatasetError: another layout, or training images and labels that do not belong together.
    """
    existing_folder(source, TITLE)
    root = next((r for r in (source, source / "RawData") if (r / "Training" / "img").is_dir()), None)
    if root is None:
        raise not_recognised(source, TITLE, LAYOUT, "there is no folder Training/img")
    images = files_matching(root / "Training" / "img", _IMAGE)
    labels = files_matching(root / "Training" / "label", _LABEL)
    tests = files_matching(root / "Testing" / "img", _IMAGE)
    if not images:
        raise not_recognised(source, TITLE, LAYOUT, "Training/img holds no img0000.nii.gz")
    folder = root / "Training" / "label"
    problems = [
        f"{images[i]}: no label file {folder / f'label{i}.nii.gz'}; copy it again" for i in images if i not in labels
    ]
    problems += [f"{labels[i]}: no image img{i}.nii.gz in Training/img" for i in labels if i not in images]
    problems += [f"{tests[i]}: case {i} is in Training as well" for i in tests if i in images]
    if problems:
        raise DatasetError(summarise_problems(problems))
    cases = [SourceCase(f"btcv_{i}", TRAINING, (path,), labels[i]) for i, path in images.items()]
    cases += [SourceCase(f"btcv_{i}", TEST, (path,)) for i, path in tests.items()]
    separate = bool(options.separate_adrenals)
    values = {value: value if separate else min(value, 12) for value in CLASSES.values()}
    return Found(tuple(cases), ("CT",), CLASSES if separate else MERGED, values, clip=CLIP_HU)


BTCV = Protocol(
    name="btcv",
    title=TITLE,
    dataset="BTCV",
    layout=LAYOUT,
    options=frozenset({"separate_adrenals"}),
    find=find,
    submission=SubmissionRules(
        image=re.compile(r"(?:img(?=\d{4}\.)|btcv_(?=\d{4}_))(?P<id>\d{4})(?:_0000)?\.nii\.gz"),
        image_names="img0061.nii.gz or btcv_0061_0000.nii.gz",
        case="btcv_{id}",
        member="label{id}.nii.gz",
        classes={"": CLASSES},
    ),
)
