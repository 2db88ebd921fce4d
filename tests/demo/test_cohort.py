"""The synthetic cohort: the same bytes for a seed, anatomy that makes sense, and files that read back."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.dataset.spec import DatasetSpec, find_cases
from ukbob_seg.dataset.verify import verify_dataset
from ukbob_seg.demo import cohort
from ukbob_seg.demo.anatomy import ORGANS, PAIRED, organ_names
from ukbob_seg.demo.cohort import CohortConfig, make_case
from ukbob_seg.demo.write import write_cohort
from ukbob_seg.errors import ConfigError

SMALL = CohortConfig(shape=(64, 28, 36))


@pytest.fixture(scope="module")
def cases():
    return [make_case(SMALL, index) for index in range(24)]


def test_a_case_depends_on_seed_and_index_only(cases):
    again = make_case(SMALL, 7)
    assert np.array_equal(again.image, cases[7].image)
    assert np.array_equal(again.labels, cases[7].labels)
    assert not np.array_equal(cases[6].image, cases[7].image)
    assert not np.array_equal(make_case(dataclasses.replace(SMALL, seed=1), 7).image, again.image)


def test_every_organ_is_there_and_inside_the_body(cases):
    for case in cases:
        assert case.image.shape == (4, *SMALL.shape)
        assert case.image.dtype == np.float32
        assert np.isfinite(case.image).all()
        assert set(np.unique(case.labels)) == {0, *organ_names.values()}
        assert case.body[case.labels > 0].all()
    assert len({organ.value for organ in ORGANS}) == len(ORGANS) == 13


def test_left_is_where_x_is_large(cases):
    """LPS: x grows to the patient's left, z to the head."""
    assert SMALL.geometry.direction == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    for case in cases:
        centres = {name: np.argwhere(case.labels == value).mean(axis=0) for name, value in organ_names.items()}
        for left, right in PAIRED:
            assert centres[left][2] > centres[right][2] + 3
        assert centres["liver"][2] < centres["spleen"][2]
        assert centres["femur_left"][0] < centres["urinary_bladder"][0] < centres["liver"][0] < centres["heart"][0]
        assert centres["vertebral_column"][1] > centres["liver"][1]


def test_volumes_vary_as_in_a_population(cases):
    for name, value in organ_names.items():
        volumes = np.array([(case.labels == value).sum() for case in cases], dtype=float)
        variation = volumes.std() / volumes.mean()
        assert 0.08 < variation < 0.4, (name, variation)


def test_large_bodies_have_large_organs_and_men_are_larger(cases):
    bodies = np.array([case.body.sum() for case in cases], dtype=float)
    organs = np.array([(case.labels > 0).sum() for case in cases], dtype=float)
    assert np.corrcoef(bodies, organs)[0, 1] > 0.4
    men = np.array([case.sex == "M" for case in cases])
    assert 0 < men.sum() < len(cases)
    assert bodies[men].mean() > bodies[~men].mean()


def test_channels_follow_the_dixon_equations(monkeypatch):
    """On a scanner without noise and contrast curve the identities are exact; bias field and gain are common."""
    monkeypatch.setattr(cohort, "SCANNERS", ((200.0, 1.0, 0.0),))
    case = make_case(SMALL, 3)
    fat, water, together, apart = case.image
    np.testing.assert_allclose(together, water + fat, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(apart, np.abs(water - fat), rtol=1e-5, atol=1e-3)
    tissue = {name: case.labels == value for name, value in organ_names.items()}
    assert fat[tissue["liver"]].mean() < 0.2 * water[tissue["liver"]].mean()
    assert fat[tissue["femur_left"]].mean() > water[tissue["femur_left"]].mean()
    assert water[tissue["lung_left"]].mean() < 0.3 * water[tissue["liver"]].mean()


def test_noise_in_air_is_rayleigh(monkeypatch):
    """Magnitude noise without signal: mean = sigma sqrt(pi / 2), variance = sigma^2 (2 - pi / 2)."""
    gain, sigma = 100.0, 0.05
    monkeypatch.setattr(cohort, "SCANNERS", ((gain, 1.0, sigma),))
    case = make_case(SMALL, 5)
    air = case.image[:, ~binary_dilation(case.body | (case.labels > 0), iterations=5)]
    assert air.shape[1] > 1000
    assert air.mean() == pytest.approx(gain * sigma * np.sqrt(np.pi / 2), rel=0.02)
    assert air.std() == pytest.approx(gain * sigma * np.sqrt(2 - np.pi / 2), rel=0.03)


def test_the_shift_makes_another_scanner():
    plain, shifted = make_case(SMALL, 3), make_case(dataclasses.replace(SMALL, shift=1.0), 3)
    assert np.array_equal(plain.labels, shifted.labels)
    ratio = shifted.image[1][plain.body] / np.maximum(plain.image[1][plain.body], 1)
    assert ratio.std() / ratio.mean() > 0.2


def test_genuine_outliers_are_larger():
    """The same subjects with and without them: 30% more of the recorded organs, all else (nearly) as it was."""
    growth, others = [], []
    for index in range(40):
        plain = make_case(dataclasses.replace(SMALL, outlier_rate=0.0), index)
        large = make_case(dataclasses.replace(SMALL, outlier_rate=0.05), index)
        assert plain.large_organs == ()
        for name, value in organ_names.items():
            ratio = (large.labels == value).sum() / (plain.labels == value).sum()
            (growth if name in large.large_organs else others).append(ratio)
    assert len(growth) > 10
    assert min(growth) > 1.1
    assert np.mean(growth) == pytest.approx(1.3, abs=0.06)
    assert np.mean(others) == pytest.approx(1.0, abs=0.01)


def test_unusable_configurations():
    for change in ({"shape": (8, 40, 40)}, {"outlier_rate": 2.0}, {"shift": -1.0}, {"shift": np.nan}, {"seed": -1}):
        with pytest.raises(ConfigError):
            dataclasses.replace(SMALL, **change)


def test_the_written_cohort_is_a_sound_dataset(tmp_path):
    written = write_cohort(tmp_path, SMALL, train_cases=3, test_cases=1, fault_fraction=0.4)
    spec = DatasetSpec.load(written.folder)
    cases, problems = find_cases(written.folder, spec)
    assert problems == []
    assert verify_dataset(written.folder, quiet=True) == []
    truth = make_case(SMALL, 1)
    image, geometry = read_image(cases[1].images)
    assert geometry.difference(SMALL.geometry, ("file", "config")) is None
    assert np.abs(image - np.rint(truth.image).clip(0, 65535)).max() == 0
    assert np.array_equal(read_labels(written.folder / "truth" / "dixon_0001.nii.gz")[0], truth.labels)
    with open(written.folder / "planted_faults.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(written.faults) > 0
    spoilt, _ = read_labels(cases[1].label)
    wrong = {int(row["label"]) for row in rows if row["case"] == "dixon_0001"}
    for value in organ_names.values():
        mine, true = spoilt == value, truth.labels == value
        dice = 2 * (mine & true).sum() / (mine.sum() + true.sum())
        assert (dice <= 0.85) == (value in wrong), value
    test_labels, _ = read_labels(written.folder / "labelsTs" / "dixon_0003.nii.gz")
    assert np.array_equal(test_labels, make_case(SMALL, 3).labels)
    assert json.loads((written.folder / "dataset.json").read_text())["numTraining"] == 3
    assert (written.folder / "groups.csv").read_text().splitlines()[0] == "case,subject"
