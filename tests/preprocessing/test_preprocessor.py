"""Fingerprint and preprocessing on small datasets: right numbers, resume, staleness, bad input."""

import dataclasses
import json
import os

import numpy as np
import pytest
import SimpleITK as sitk

from ukbob_seg.dataset.image_io import Geometry, read_image, read_labels, write_image, write_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import DatasetError
from ukbob_seg.preprocessing.fingerprint import Fingerprint, extract_fingerprint
from ukbob_seg.preprocessing.normalization import normalize
from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions, plan
from ukbob_seg.preprocessing.preprocessor import find_coarse_axis, preprocess, preprocess_image, preprocessing_recipe
from ukbob_seg.preprocessing.records import load_record
from ukbob_seg.preprocessing.resampling import resample_image
from ukbob_seg.preprocessing.storage import open_array


def test_fingerprint_numbers(make_dataset, tmp_path):
    folder = make_dataset(cases=3, channel_names=("fat", "water"), spacing_mm=(3.0, 1.0, 0.7))
    found = extract_fingerprint(folder, tmp_path / "p", workers=1, quiet=True)
    values = []
    for i in range(3):
        image, _ = read_image([folder / "imagesTr" / f"blob_{i:03d}_{c:04d}.nii.gz" for c in range(2)])
        labels, _ = read_labels(folder / "labelsTr" / f"blob_{i:03d}.nii.gz")
        values.append(image[:, labels > 0])
        box = np.argwhere(image.any(axis=0))
        assert found.cases[i].cropped_shape == tuple(box.max(0) - box.min(0) + 1)
        assert found.cases[i].spacing_mm == pytest.approx((3.0, 1.0, 0.7))
    everything = np.concatenate(values, axis=1).astype(float)
    for channel, statistics in enumerate(found.intensities):
        assert statistics.mean == pytest.approx(everything[channel].mean(), rel=1e-5)
        assert statistics.std == pytest.approx(everything[channel].std(), rel=1e-5)
        assert statistics.percentile_99_5 == pytest.approx(np.percentile(everything[channel], 99.5), rel=1e-5)
    assert found.cases_with_label == {"1": 3, "2": 3}
    assert Fingerprint.load(tmp_path / "p" / "fingerprint.json") == found


def test_fingerprint_does_not_depend_on_workers_or_sampling_order(make_dataset, tmp_path, monkeypatch):
    import ukbob_seg.preprocessing.fingerprint as module

    monkeypatch.setattr(module, "MAX_SAMPLES", 300)  # so that voxels are really drawn
    folder = make_dataset(cases=4)
    one = extract_fingerprint(folder, tmp_path / "a", workers=1, quiet=True)
    two = extract_fingerprint(folder, tmp_path / "b", workers=2, quiet=True)
    assert one == two


def test_fingerprint_is_reused_until_something_changes(make_dataset, tmp_path):
    folder = make_dataset(cases=2)
    path = tmp_path / "p" / "fingerprint.json"
    extract_fingerprint(folder, tmp_path / "p", quiet=True)
    before = path.stat().st_mtime_ns
    extract_fingerprint(folder, tmp_path / "p", quiet=True)
    assert path.stat().st_mtime_ns == before
    os.utime(folder / "imagesTr" / "blob_000_0000.nii.gz")
    extract_fingerprint(folder, tmp_path / "p", quiet=True)
    assert path.stat().st_mtime_ns > before
    path.write_text("{ broken")
    assert len(extract_fingerprint(folder, tmp_path / "p", quiet=True).cases) == 2


def _prepared(folder, tmp_path, **options):
    fingerprint = extract_fingerprint(folder, tmp_path / "p", workers=1, quiet=True)
    plans = plan(fingerprint, DatasetSpec.load(folder), PlanOptions(**{"memory_gb": 2, **options}))
    done = preprocess(folder, tmp_path / "p", plans, workers=1, quiet=True)
    return tmp_path / "p" / "3d_fullres", plans, done


def test_a_case_is_cropped_normalised_and_stored(make_dataset, tmp_path):
    folder = make_dataset(cases=2)
    arrays, _, done = _prepared(folder, tmp_path)
    assert done == 2
    image, _ = read_image([folder / "imagesTr" / "blob_000_0000.nii.gz"])
    labels, _ = read_labels(folder / "labelsTr" / "blob_000.nii.gz")
    voxels = np.argwhere(image[0] != 0)
    box = tuple(slice(a, b + 1) for a, b in zip(voxels.min(0), voxels.max(0), strict=True))
    cropped = image[0][box].astype(float)
    stored = open_array(arrays / "blob_000.b2nd")
    inside = cropped != 0
    plans = json.loads((tmp_path / "p" / "dataset.json").read_text())
    assert plans["numTraining"] == 2
    result = stored[:][0]
    assert result.shape == cropped.shape
    scale = (result[inside].max() - result[inside].min()) / np.ptp(cropped[inside])
    shifted = (cropped - cropped[inside].mean()) * scale + result[inside].mean()
    assert np.abs(result - shifted)[inside].max() < 1e-4
    assert np.array_equal(open_array(arrays / "blob_000_labels.b2nd")[:], labels[box])
    record = load_record(arrays, "blob_000")
    assert record["voxels_per_label"] == {"1": int((labels == 1).sum()), "2": int((labels == 2).sum())}


def test_resampling_brings_every_case_to_one_spacing(make_dataset, tmp_path):
    folder = make_dataset(cases=2, spacing_mm=(2.0, 1.0, 1.0))
    arrays, _, _ = _prepared(folder, tmp_path, spacing_mm=(1.0, 1.0, 1.0))
    record = load_record(arrays, "blob_000")["properties"]
    kept = np.subtract(record["box_stop"], record["box_start"])
    assert open_array(arrays / "blob_000.b2nd").shape == (1, 2 * kept[0], kept[1], kept[2])
    assert open_array(arrays / "blob_000_labels.b2nd").shape == (2 * kept[0], kept[1], kept[2])


def test_only_what_changed_is_done_again(make_dataset, tmp_path):
    folder = make_dataset(cases=3)
    arrays, plans, _ = _prepared(folder, tmp_path)

    def again():
        return preprocess(folder, tmp_path / "p", plans, workers=1, quiet=True)

    assert again() == 0
    (arrays / "blob_001.json").unlink()  # killed before the record was written
    assert again() == 1
    whole = (arrays / "blob_002.b2nd").read_bytes()
    (arrays / "blob_002.b2nd").write_bytes(whole[:100])  # a damaged file
    assert again() == 1
    assert (arrays / "blob_002.b2nd").read_bytes() == whole
    os.utime(folder / "labelsTr" / "blob_000.nii.gz")
    assert again() == 1
    fingerprint = Fingerprint.load(tmp_path / "p" / "fingerprint.json")
    other = plan(fingerprint, DatasetSpec.load(folder), PlanOptions(memory_gb=2, spacing_mm=(2.0, 2.0, 2.0)))
    assert preprocess(folder, tmp_path / "p", other, workers=1, quiet=True) == 3


OPTIONS = [{"anti_alias": True}, {"coarse_order": 1}, {"anti_alias": True, "coarse_order": 1}]


def _with(plans, **options):
    changed = dataclasses.replace(plans.configuration("3d_fullres"), **options)
    return dataclasses.replace(plans, configurations={"3d_fullres": changed})


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_interpolation_reach_the_images_alone(make_dataset, tmp_path, options):
    """Every other slice and column of a case with thick slices."""
    folder = make_dataset(cases=1, spacing_mm=(4.0, 1.0, 1.0))
    arrays, plans, _ = _prepared(folder, tmp_path, spacing_mm=(2.0, 2.0, 1.0))
    assert preprocess(folder, tmp_path / "q", _with(plans, **options), workers=1, quiet=True) == 1
    other = tmp_path / "q" / "3d_fullres"
    image, geometry = read_image([folder / "imagesTr" / "blob_000_0000.nii.gz"])
    record = load_record(other, "blob_000")["properties"]
    box = tuple(slice(a, b) for a, b in zip(record["box_start"], record["box_stop"], strict=True))
    assert record["coarse_axis"] == 0
    normalized = normalize(image[(slice(None), *box)], plans.normalization, image[(slice(None), *box)][0] != 0)
    expected = resample_image(normalized, record["shape"], coarse_axis=0, **options)
    stored = open_array(other / "blob_000.b2nd")[:]
    assert np.array_equal(stored, expected)
    assert np.array_equal(stored, preprocess_image(image, geometry, *_both(_with(plans, **options)))[0])
    assert not np.allclose(stored, open_array(arrays / "blob_000.b2nd")[:], atol=0.05)
    labels = open_array(other / "blob_000_labels.b2nd")[:]
    assert np.array_equal(labels, open_array(arrays / "blob_000_labels.b2nd")[:])


def _both(plans):
    return plans, plans.configuration("3d_fullres")


def test_every_option_makes_other_arrays(make_dataset, tmp_path):
    folder = make_dataset(cases=1)
    _, plans, _ = _prepared(folder, tmp_path)
    spec = DatasetSpec.load(folder)
    choices = [{}, *OPTIONS, {"slice_axis": 0}, {"slice_axis": 1}]
    recipes = {preprocessing_recipe(*_both(_with(plans, **options)), spec) for options in choices}
    assert len(recipes) == len(choices)
    assert preprocess(folder, tmp_path / "p", _with(plans, anti_alias=True), workers=1, quiet=True) == 1
    assert preprocess(folder, tmp_path / "p", plans, workers=1, quiet=True) == 1


def test_workers_change_nothing(make_dataset, tmp_path):
    folder = make_dataset(cases=3)
    arrays, plans, _ = _prepared(folder, tmp_path)
    preprocess(folder, tmp_path / "q", plans, workers=2, quiet=True)
    for path in sorted(arrays.iterdir()):
        if path.suffix == ".b2nd":
            # Only the header differs: it says how many threads wrote.
            mine, theirs = open_array(path), open_array(tmp_path / "q" / "3d_fullres" / path.name)
            assert np.array_equal(mine[:], theirs[:])
            assert np.array_equal(mine._sums, theirs._sums)


def test_an_interrupted_run_leaves_only_whole_cases(make_dataset, tmp_path, monkeypatch):
    folder = make_dataset(cases=3)
    image = folder / "imagesTr" / "blob_001_0000.nii.gz"
    fingerprint = extract_fingerprint(folder, tmp_path / "p", workers=1, quiet=True)
    plans = plan(fingerprint, DatasetSpec.load(folder), PlanOptions(memory_gb=2))
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match="blob_001"):
        preprocess(folder, tmp_path / "p", plans, workers=1, quiet=True)
    names = {path.name for path in (tmp_path / "p" / "3d_fullres").iterdir()}
    assert "blob_000.json" in names
    assert not any("blob_001" in name or name.startswith(".") for name in names)
    image.write_bytes(whole)
    assert preprocess(folder, tmp_path / "p", plans, workers=1, quiet=True) == 2


def test_all_problems_of_all_cases_in_one_message(make_dataset, tmp_path):
    folder = make_dataset(cases=3)
    (folder / "imagesTr" / "blob_000_0000.nii.gz").write_bytes(b"nothing")
    labels = sitk.ReadImage(str(folder / "labelsTr" / "blob_002.nii.gz"))
    sitk.WriteImage(labels * 0, str(folder / "labelsTr" / "blob_002.nii.gz"))
    with pytest.raises(DatasetError, match=r"2 problems:(.|\n)*case blob_000(.|\n)*case blob_002.*all background"):
        plan_and_preprocess(7, Roots.below(tmp_path), PlanOptions(memory_gb=2), workers=1)
    (folder / "imagesTr" / "blob_000_0000.nii.gz").unlink()
    (folder / "labelsTr" / "blob_000.nii.gz").unlink()
    prepared = plan_and_preprocess(7, Roots.below(tmp_path), PlanOptions(memory_gb=2), workers=1, allow_empty=True)
    assert prepared.cases_done == 2


def test_the_coarse_axis():
    assert find_coarse_axis((5.0, 1.0, 1.0), (5.0, 1.0, 1.0)) == 0
    assert find_coarse_axis((1.0, 1.0, 1.0), (1.0, 1.0, 4.0)) == 2
    assert find_coarse_axis((2.9, 1.0, 1.0), (1.0, 1.0, 1.0)) is None
    assert find_coarse_axis((0.2, 1.0, 1.0), (1.0, 1.0, 1.0)) is None  # two equally coarse axes


def test_the_ignore_label_is_kept_apart(tmp_path, rng):
    folder = tmp_path / "raw" / "Dataset007_Blobs"
    geometry = Geometry((20, 20, 20), (1.0, 1.0, 1.0))
    labels = rng.integers(0, 4, (20, 20, 20)).astype(np.uint8)
    write_image(rng.random((20, 20, 20)).astype(np.float32), geometry, folder / "imagesTr" / "a_0000.nii.gz")
    write_labels(labels, geometry, folder / "labelsTr" / "a.nii.gz")
    content = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "x": 1, "y": 2, "ignore": 3},
               "numTraining": 1, "file_ending": ".nii.gz"}  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(content))
    arrays, _, _ = _prepared(folder, tmp_path)
    stored = open_array(arrays / "a_labels.b2nd")[:]
    assert np.array_equal(stored == 255, labels == 3)
    assert Fingerprint.load(tmp_path / "p" / "fingerprint.json").cases_with_label == {"1": 1, "2": 1}
