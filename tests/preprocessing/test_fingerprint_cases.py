"""Readings of cases: sampled evenly, kept, and taken up again after a change or an interruption."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ukbob_seg.dataset import verify
from ukbob_seg.dataset.image_io import Geometry, read_image, write_image
from ukbob_seg.dataset.spec import Case
from ukbob_seg.dataset.verify import LoadedCase
from ukbob_seg.errors import DatasetError
from ukbob_seg.parallel import Part
from ukbob_seg.preprocessing import fingerprint as fingerprint_module
from ukbob_seg.preprocessing import fingerprint_cases as module
from ukbob_seg.preprocessing.fingerprint import extract_fingerprint


@pytest.fixture
def read_names(monkeypatch):
    """Names of the cases whose image files are read, in order."""
    names = []

    def counted(paths):
        names.append(paths[0].name.removesuffix("_0000.nii.gz"))
        return read_image(paths)

    monkeypatch.setattr(verify, "read_image", counted)
    return names


@given(st.integers(0, 5000), st.integers(0, 6000))
def test_samples_are_distinct_and_a_shorter_demand_is_a_beginning(count, wanted):
    chosen = module.spread(count, wanted)
    assert len(np.unique(chosen)) == len(chosen) == min(count, wanted)
    assert not len(chosen) or (chosen.min() >= 0 and chosen.max() < count)
    np.testing.assert_array_equal(module.spread(count, wanted // 2), chosen[: wanted // 2])


def test_samples_are_spread_evenly():
    count, wanted = 1_000_003, 10_000
    share = np.histogram(module.spread(count, wanted), bins=100, range=(0, count))[0] / (wanted / 100)
    assert share.min() > 0.9
    assert share.max() < 1.1


def test_statistics_of_samples_are_those_of_all_voxels(make_dataset, tmp_path, monkeypatch):
    folder = make_dataset(cases=3, shape=(48, 56, 40))
    everything = extract_fingerprint(folder, tmp_path / "a", quiet=True).intensities[0]
    monkeypatch.setattr(fingerprint_module, "MAX_SAMPLES", 3000)  # about a tenth
    few = extract_fingerprint(folder, tmp_path / "b", quiet=True).intensities[0]
    assert few != everything
    assert few.mean == pytest.approx(everything.mean, rel=0.01)
    assert few.std == pytest.approx(everything.std, rel=0.05)
    assert few.percentile_99_5 == pytest.approx(everything.percentile_99_5, rel=0.02)


def test_only_new_and_changed_cases_are_read(make_dataset, tmp_path, read_names, monkeypatch):
    monkeypatch.setattr(fingerprint_module, "MAX_SAMPLES", 1200)  # so that fewer samples a case are wanted later
    folder = make_dataset(cases=5)
    hidden = [folder / "imagesTr" / "blob_004_0000.nii.gz", folder / "labelsTr" / "blob_004.nii.gz"]
    for path in hidden:
        path.rename(tmp_path / path.name)
    extract_fingerprint(folder, tmp_path / "p", workers=1, quiet=True)
    assert read_names == [f"blob_00{n}" for n in range(4)]
    read_names.clear()
    for path in hidden:
        (tmp_path / path.name).rename(path)
    os.utime(folder / "imagesTr" / "blob_001_0000.nii.gz")
    found = extract_fingerprint(folder, tmp_path / "p", workers=1, quiet=True)
    assert read_names == ["blob_001", "blob_004"]
    fresh = extract_fingerprint(folder, tmp_path / "fresh", workers=1, quiet=True)
    assert found == fresh  # the way there does not matter
    # With fewer cases more samples of each are wanted. Only what was read lately, for five cases, falls short.
    for path in hidden:
        path.unlink()
    read_names.clear()
    extract_fingerprint(folder, tmp_path / "p", workers=1, quiet=True)
    assert read_names == ["blob_001"]
    assert len(module.load_readings(tmp_path / "p" / module.STORE)[0].sample_labels) == 300


def test_good_cases_are_kept_when_others_have_problems(make_dataset, tmp_path, read_names):
    folder = make_dataset(cases=3)
    path = folder / "imagesTr" / "blob_001_0000.nii.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    with pytest.raises(DatasetError, match=r"case blob_001.*corrupt"):
        extract_fingerprint(folder, tmp_path / "p", workers=1, quiet=True)
    path.write_bytes(whole)
    read_names.clear()
    assert len(extract_fingerprint(folder, tmp_path / "p", workers=1, quiet=True).cases) == 3
    assert read_names == ["blob_001"]


def test_an_interrupted_run_goes_on(make_dataset, tmp_path, read_names, monkeypatch):
    folder = make_dataset(cases=6)
    monkeypatch.setattr(module, "GROUP_CASES", 2)
    real, calls = module.GroupReader._read, []

    def interrupted(self, case, key):
        calls.append(case.name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, case, key)

    monkeypatch.setattr(module.GroupReader, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract_fingerprint(folder, tmp_path / "p", workers=1, quiet=True)
    assert len(list((tmp_path / "p" / module.PARTS).iterdir())) == 2
    read_names.clear()
    found = extract_fingerprint(folder, tmp_path / "p", workers=1, quiet=True)
    assert read_names == ["blob_004", "blob_005"]
    assert not (tmp_path / "p" / module.PARTS).exists()
    assert found == extract_fingerprint(folder, tmp_path / "fresh", workers=1, quiet=True)


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_damaged_readings_are_made_again(make_dataset, tmp_path, damage):
    folder = make_dataset(cases=2)
    found = extract_fingerprint(folder, tmp_path / "p", quiet=True)
    path = tmp_path / "p" / module.STORE
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b"{}"}[damage])
    (tmp_path / "p" / "fingerprint.json").unlink()
    assert extract_fingerprint(folder, tmp_path / "p", quiet=True) == found


def test_a_description_in_dataset_json_changes_nothing(make_dataset, tmp_path, read_names):
    folder = make_dataset(cases=2)
    extract_fingerprint(folder, tmp_path / "p", quiet=True)
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "description": "blobs"}))
    read_names.clear()
    extract_fingerprint(folder, tmp_path / "p", quiet=True)
    assert read_names == []
    regions = {"labels": {"background": 0, "both": [1, 2], "second": 2}, "regions_class_order": [1, 2]}
    (folder / "dataset.json").write_text(json.dumps({**content, **regions}))
    extract_fingerprint(folder, tmp_path / "p", quiet=True)
    assert len(read_names) == 2


def test_loaded_cases_are_limited_and_forget_changed_files(tmp_path):
    geometry = Geometry((2, 3, 4), (1.0, 1.0, 1.0))
    cases = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}_0000.nii.gz"
        write_image(np.ones((2, 3, 4), np.float32), geometry, path)
        cases.append(Case(name, (path,), None))
    loaded = LoadedCase(np.ones((1, 2, 3, 4), np.float32), np.zeros((2, 3, 4), np.uint8), geometry)
    kept = module.LoadedCases(most_bytes=150)
    for case in cases:
        kept.keep(case, module.file_stamps(case), loaded)
    assert kept.get(cases[0]) is loaded
    assert kept.get(cases[1]) is None  # 120 bytes each: the second does not fit
    os.utime(cases[0].images[0])
    assert kept.get(cases[0]) is None


def test_each_file_is_read_once_from_fingerprint_to_arrays(make_dataset, tmp_path, read_names):
    from ukbob_seg.dataset.paths import Roots
    from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
    from ukbob_seg.preprocessing.planner import PlanOptions

    folder = make_dataset(cases=3)
    roots = Roots(folder.parent, tmp_path / "p", tmp_path / "r")
    plan_and_preprocess(7, roots, PlanOptions(memory_gb=2))
    assert read_names == ["blob_000", "blob_001", "blob_002"]
    shutil.rmtree(tmp_path / "p" / folder.name / "3d_fullres")
    plan_and_preprocess(7, roots, PlanOptions(memory_gb=2))
    assert len(read_names) == 6  # the fingerprint is known, so the images are read for the arrays alone


def test_parts_give_what_one_run_gives(make_dataset, tmp_path, read_names):
    folder = make_dataset(cases=5)
    for number in (1, 2, 3):
        done = fingerprint_module.read_part(folder, tmp_path / "p", Part(number, 3), workers=1, quiet=True)
        assert done == (1 if number == 3 else 2)
    assert fingerprint_module.read_part(folder, tmp_path / "p", Part(1, 3), workers=1, quiet=True) == 0
    read_names.clear()
    found = extract_fingerprint(folder, tmp_path / "p", workers=1, quiet=True)
    assert read_names == []
    assert found == extract_fingerprint(folder, tmp_path / "fresh", workers=1, quiet=True)


def test_plans_of_a_dataset_that_changed_are_noticed(make_dataset, tmp_path):
    folder = make_dataset(cases=2)
    inputs = extract_fingerprint(folder, tmp_path / "p", quiet=True).inputs
    assert fingerprint_module.describe_changes(inputs, folder) is None
    assert fingerprint_module.describe_changes("", folder) is None  # plans of an earlier version do not say
    os.utime(folder / "imagesTr" / "blob_000_0000.nii.gz")
    assert "Dataset007_Blobs has changed" in fingerprint_module.describe_changes(inputs, folder)
