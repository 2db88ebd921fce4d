"""Preprocessed cases survive kills, and damage to them is noticed."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ukbob_seg.dataset.paths import Roots
from ukbob_seg.dataset.spec import DatasetSpec, require_cases
from ukbob_seg.parallel import Cluster, Part
from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions
from ukbob_seg.preprocessing.preprocessor import preprocess
from ukbob_seg.preprocessing.records import case_files, is_current, load_record
from ukbob_seg.preprocessing.storage import open_array

KILLED_AT_RENAME = """
import os, signal, sys
from pathlib import Path
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.dataset.spec import DatasetSpec, require_cases
from ukbob_seg.parallel import Cluster, Part
from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions

count, real = 0, os.replace
def replace(source, target):
    global count
    count += 1
    if count == int(sys.argv[2]):
        if sys.argv[3] == "after":
            real(source, target)
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
roots = Roots.below(Path(sys.argv[1]))
plan_and_preprocess(7, roots, PlanOptions(memory_gb=2), workers=1)
"""


def _run(tmp_path, **options):
    return plan_and_preprocess(7, Roots.below(tmp_path), PlanOptions(memory_gb=2), workers=1, **options)


def _times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("rename", "moment"), [(1, "before"), (4, "after"), (6, "before"), (9, "before"), (12, "after")]
)
def test_killed_at_any_moment_it_goes_on_without_redoing_finished_cases(make_dataset, tmp_path, rename, moment):
    make_dataset(cases=3)
    whole = _run(tmp_path)
    expected = {path.name: path.read_bytes() for path in (whole.folder / "3d_fullres").glob("*.b2nd")}
    shutil.rmtree(whole.folder)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_RENAME, str(tmp_path), str(rename), moment], capture_output=True, timeout=120
    )
    assert killed.returncode == -9, killed.stderr.decode()
    arrays = whole.folder / "3d_fullres"
    finished = [path.stem for path in arrays.glob("blob_???.json")] if arrays.is_dir() else []
    before = _times(arrays) if finished else {}
    done = _run(tmp_path).cases_done
    assert done == 3 - len(finished)
    after = _times(arrays)
    for name in finished:
        for path in (*case_files(arrays, name), arrays / f"{name}.json"):
            assert after[path.name] == before[path.name]
    assert {path.name: path.read_bytes() for path in arrays.glob("[!.]*.b2nd")} == expected


def test_a_kill_comes_before_and_after_some_cases(make_dataset, tmp_path):
    """The renames above are chosen well: the later ones leave finished cases behind."""
    make_dataset(cases=3)
    subprocess.run([sys.executable, "-c", KILLED_AT_RENAME, str(tmp_path), "12", "after"], capture_output=True)
    arrays = Roots.below(tmp_path).preprocessed / "Dataset007_Blobs" / "3d_fullres"
    assert 1 <= len(list(arrays.glob("blob_???.json"))) < 3


@pytest.mark.parametrize("suffix", [".b2nd", "_labels.b2nd", "_locations.npz", ".json"])
def test_a_changed_byte_is_noticed_and_the_case_done_again(make_dataset, tmp_path, suffix):
    make_dataset(cases=2)
    arrays = _run(tmp_path).folder / "3d_fullres"
    path = arrays / f"blob_001{suffix}"
    good = bytearray(path.read_bytes())
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 0x40
    path.write_bytes(bad)
    assert _run(tmp_path).cases_done == 1
    image, _, _ = case_files(arrays, "blob_001")
    assert np.isfinite(open_array(image)[:]).all()
    if suffix.endswith("b2nd"):
        assert path.read_bytes() == good
    assert _run(tmp_path).cases_done == 0


def test_no_byte_of_a_record_can_change_unnoticed(make_dataset, tmp_path):
    make_dataset(cases=1)
    folder = _run(tmp_path).folder
    raw = tmp_path / "raw" / folder.name
    (case,) = require_cases(raw, DatasetSpec.load(raw))
    path = folder / "3d_fullres" / f"{case.name}.json"
    recipe, good = load_record(path.parent, case.name)["recipe"], path.read_bytes()
    assert is_current(path.parent, case, recipe)
    for place in range(0, len(good), 7):
        bad = bytearray(good)
        bad[place] ^= 0x40
        path.write_bytes(bad)
        assert not is_current(path.parent, case, recipe), bytes(bad[place - 10 : place + 10])


def test_damage_that_leaves_no_trace_is_found_with_verify(make_dataset, tmp_path):
    make_dataset(cases=2)
    path = _run(tmp_path).folder / "3d_fullres" / "blob_000.b2nd"
    stat = path.stat()
    bad = bytearray(path.read_bytes())
    bad[-40] ^= 1
    path.write_bytes(bad)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as when the disk itself went wrong
    assert _run(tmp_path).cases_done == 0
    assert _run(tmp_path, verify=True).cases_done == 1


def test_a_copied_folder_is_not_done_again(make_dataset, tmp_path):
    make_dataset(cases=2)
    folder = _run(tmp_path).folder
    for path in (folder / "3d_fullres").iterdir():
        os.utime(path, ns=(1, 1))
    assert _run(tmp_path).cases_done == 0
    entry = load_record(folder / "3d_fullres", "blob_000")["files"]["blob_000.b2nd"]
    assert entry["mtime_ns"] == 1  # noted, so that the next run need not look inside


def test_new_cases_are_done_alone(make_dataset, tmp_path):
    folder = make_dataset(cases=4)
    moved = [folder / "imagesTr" / "blob_003_0000.nii.gz", folder / "labelsTr" / "blob_003.nii.gz"]
    for path in moved:
        path.rename(tmp_path / path.name)
    assert _run(tmp_path).cases_done == 3
    for path in moved:
        (tmp_path / path.name).rename(path)
    prepared = _run(tmp_path)
    assert prepared.cases_done == 1
    assert len(prepared.fingerprint.cases) == 4


def test_kept_plans_need_only_the_new_cases(make_dataset, tmp_path):
    """A CT's normalization follows all cases, so that new plans would change every array."""
    folder = make_dataset(cases=4, channel_names=("CT",))
    moved = [folder / "imagesTr" / "blob_003_0000.nii.gz", folder / "labelsTr" / "blob_003.nii.gz"]
    for path in moved:
        path.rename(tmp_path / path.name)
    before = _run(tmp_path).plans
    for path in moved:
        (tmp_path / path.name).rename(path)
    kept = _run(tmp_path, keep_plans=True)
    assert kept.plans == before
    assert kept.cases_done == 1
    anew = _run(tmp_path)
    assert anew.plans.normalization != before.normalization
    assert anew.cases_done == 4


def test_parts_of_a_job_array_do_every_case_once(make_dataset, tmp_path):
    folder = make_dataset(cases=5)
    prepared = _run(tmp_path, configurations=())
    done = [
        preprocess(folder, prepared.folder, prepared.plans, workers=1, quiet=True, cluster=Cluster(part=Part(k, 3)))
        for k in (1, 2, 3)
    ]
    assert done == [2, 2, 1]
    assert _run(tmp_path).cases_done == 0
