"""Every problem of every case is reported at once, with the case's name and the numbers."""

import gzip
import json
import re

import numpy as np
import pytest
import SimpleITK as sitk

from ukbob_seg.dataset.paths import find_dataset, list_datasets
from ukbob_seg.dataset.spec import DatasetSpec, find_cases, require_cases
from ukbob_seg.dataset.verify import verify_dataset
from ukbob_seg.errors import ConfigError, DatasetError


def _edit(path, change):
    image = sitk.ReadImage(str(path))
    array = change(sitk.GetArrayFromImage(image))
    edited = sitk.GetImageFromArray(array)
    edited.CopyInformation(image)
    sitk.WriteImage(edited, str(path))


def test_a_sound_dataset_has_no_problems(make_dataset):
    folder = make_dataset(cases=2, channel_names=("fat", "water"))
    assert verify_dataset(folder, quiet=True) == []
    cases, problems = find_cases(folder, DatasetSpec.load(folder))
    assert problems == []
    assert [case.name for case in cases] == ["blob_000", "blob_001"]
    assert [path.name for path in cases[0].images] == ["blob_000_0000.nii.gz", "blob_000_0001.nii.gz"]


def test_all_problems_at_once(make_dataset):
    folder = make_dataset(cases=9)
    images, labels = folder / "imagesTr", folder / "labelsTr"
    (images / "blob_000_0000.nii.gz").write_bytes(b"no image at all")
    _edit(labels / "blob_001.nii.gz", lambda a: np.where(a == 2, 9, a).astype(np.uint8))
    spoiled = sitk.ReadImage(str(labels / "blob_002.nii.gz"))
    spoiled.SetSpacing((2.0, 1.0, 1.0))
    sitk.WriteImage(spoiled, str(labels / "blob_002.nii.gz"))
    _edit(labels / "blob_003.nii.gz", np.zeros_like)
    _edit(images / "blob_004_0000.nii.gz", lambda a: np.where(a > 150, np.nan, a).astype(np.float32))
    (labels / "blob_005.nii.gz").unlink()
    (images / "blob_006_0000.nii.gz").unlink()
    _edit(images / "blob_007_0000.nii.gz", np.zeros_like)
    text = "\n".join(verify_dataset(folder, quiet=True))
    for expected in (
        r"case blob_000: .*blob_000_0000.nii.gz cannot be read",
        r"case blob_001: blob_001.nii.gz: unknown label values 9 \(\d+ voxels\)",
        r"case blob_002: spacing_mm differs: \(1, 1, 1\) in the image, \(1, 1, 2\) in the label",
        r"case blob_003: blob_003.nii.gz is all background",
        r"case blob_004: .*NaN or infinite voxels",
        r"case blob_005: no label file",
        r"case blob_006: label blob_006.nii.gz has no image",
        r"case blob_007: blob_007_0000.nii.gz is empty: every voxel is 0",
    ):
        assert re.search(expected, text), expected
    assert "blob_008" not in text


def test_missing_and_surplus_channels(make_dataset):
    folder = make_dataset(cases=2, channel_names=("fat", "water"))
    (folder / "imagesTr" / "blob_000_0001.nii.gz").unlink()
    (folder / "imagesTr" / "blob_001_0001.nii.gz").rename(folder / "imagesTr" / "blob_001_0007.nii.gz")
    _, problems = find_cases(folder, DatasetSpec.load(folder))
    assert any("case blob_000: missing channel blob_000_0001.nii.gz" in p for p in problems)
    assert any("blob_001_0007.nii.gz is not among the 2" in p for p in problems)


def test_duplicate_case_ids(make_dataset):
    folder = make_dataset(cases=1)
    for part in ("imagesTr/blob_000_0000.nii.gz", "labelsTr/blob_000.nii.gz"):
        twin = folder / part.replace("blob", "BLOB")
        twin.write_bytes((folder / part).read_bytes())
    with pytest.raises(DatasetError, match="duplicate case id"):
        require_cases(folder, DatasetSpec.load(folder))


def test_explicit_file_lists(make_dataset):
    folder = make_dataset(cases=2)
    content = json.loads((folder / "dataset.json").read_text())
    content["dataset"] = {
        "one": {"images": ["imagesTr/blob_000_0000.nii.gz"], "label": "labelsTr/blob_001.nii.gz"},
        "lost": {"images": ["imagesTr/none.nii.gz"], "label": "labelsTr/blob_001.nii.gz"},
    }
    spec = DatasetSpec.from_json(content, "Dataset007_Blobs")
    cases, problems = find_cases(folder, spec)
    assert [case.name for case in cases] == ["one"]
    assert cases[0].label.name == "blob_001.nii.gz"
    assert len(problems) == 1
    assert "case lost" in problems[0]


def test_unusable_entries_of_explicit_lists_are_named(make_dataset):
    folder = make_dataset(cases=1)
    content = json.loads((folder / "dataset.json").read_text())
    good = {"images": ["imagesTr/blob_000_0000.nii.gz"], "label": "labelsTr/blob_000.nii.gz"}
    content["dataset"] = {
        "good": good,
        "Good": good,
        "number": {"images": [5], "label": "a"},
        "nolabel": {"images": ["a"], "label": None},
    }
    cases, problems = find_cases(folder, DatasetSpec.from_json(content, "Dataset007_Blobs"))
    assert [case.name for case in cases] == ["Good", "good"]
    for name in ("Good", "number", "nolabel"):
        assert any(f"case {name}:" in problem for problem in problems)
    text = json.dumps(content).replace('"Good"', '"good"')
    (folder / "dataset.json").write_text(text)
    with pytest.raises(DatasetError, match="has the entry 'good' twice"):
        DatasetSpec.load(folder)


def test_a_header_with_absurd_sizes_is_one_problem_among_others(make_dataset):
    folder = make_dataset(cases=2)
    for name in ("imagesTr/blob_000_0000.nii.gz", "labelsTr/blob_000.nii.gz"):
        content = bytearray(gzip.decompress((folder / name).read_bytes()))
        content[40:56] = np.array([3, 32767, 32767, 32767, 1, 1, 1, 1], np.int16).tobytes()
        (folder / name).write_bytes(gzip.compress(bytes(content)))
    problems = verify_dataset(folder, quiet=True)
    assert len([p for p in problems if "32767 x 32767 x 32767 voxels, more than fit into memory" in p]) == 2


def test_count_differs_from_the_description(make_dataset):
    folder = make_dataset(cases=2, numTraining=5)
    assert any("numTraining 5 but there are 2" in problem for problem in verify_dataset(folder, quiet=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel_names": {}}, "channel_names"),
        ({"channel_names": {"1": "T1"}}, "numbered 0, 1"),
        ({"labels": [1, 2]}, "labels must look like"),
        ({"file_ending": "nii"}, "file_ending"),
    ],
)
def test_malformed_descriptions(make_dataset, change, message):
    folder = make_dataset(cases=1)
    content = {**json.loads((folder / "dataset.json").read_text()), **change}
    with pytest.raises(DatasetError, match=message):
        DatasetSpec.from_json(content, "Dataset007_Blobs")


def test_missing_description_and_entries(tmp_path, make_dataset):
    with pytest.raises(DatasetError, match="does not exist"):
        DatasetSpec.load(tmp_path)
    (tmp_path / "dataset.json").write_text("{ not json")
    with pytest.raises(DatasetError, match="line 1"):
        DatasetSpec.load(tmp_path)
    with pytest.raises(DatasetError, match="lacks labels, file_ending"):
        DatasetSpec.from_json({"channel_names": {"0": "T1"}}, "x")


def test_finding_datasets(make_dataset, tmp_path):
    folder = make_dataset(cases=1)
    root = folder.parent
    assert find_dataset(root, 7) == folder
    assert find_dataset(root, "007") == folder
    assert find_dataset(root, "Dataset007_Blobs") == folder
    with pytest.raises(ConfigError, match=r"no dataset '8' .*found: Dataset007_Blobs"):
        find_dataset(root, 8)
    with pytest.raises(DatasetError, match="does not exist; give it with"):
        find_dataset(tmp_path / "nowhere", 7)
    (root / "Dataset007_Twin").mkdir()
    with pytest.raises(DatasetError, match="two datasets with id 7"):
        list_datasets(root)


def test_real_datasets_are_sound(data_root):
    for name in ("Dataset005_CordLevels", "Dataset141_BrainAllen"):
        assert verify_dataset(data_root / name, quiet=True) == []
