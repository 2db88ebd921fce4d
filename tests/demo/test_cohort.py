"""The synthetic cohort: the same bytes for a seed, anatomy that makes sense, and files that read back."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.dataset.spec import DatasetSpec, find_cases
from ukbob_seg.dataset.verify import verify_dataset
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
        assert 0.03 < variation < 0.45, (name, variation)


def test_channels_follow_the_dixon_equations():
    """With next to no noise: in-phase = water + fat, out-of-phase = |water - fat|, up to the scanner's gamma."""
    case = make_case(dataclasses.replace(SMALL, shape=(48, 24, 32)), 3)
    fat, water, together, apart = (case.image[c][case.body] for c in range(4))
    assert np.corrcoef(fat + water, together)[0, 1] > 0.95
    assert np.corrcoef(np.abs(water - fat), apart)[0, 1] > 0.9
    assert (together >= np.maximum(fat, water) * 0.8).mean() > 0.9


def test_the_shift_makes_another_scanner():
    plain, shifted = make_case(SMALL, 3), make_case(dataclasses.replace(SMALL, shift=1.0), 3)
    assert np.array_equal(plain.labels, shifted.labels)
    ratio = shifted.image[1][plain.body] / np.maximum(plain.image[1][plain.body], 1)
    assert ratio.std() / ratio.mean() > 0.2


def test_genuine_outliers_are_larger():
    never = dataclasses.replace(SMALL, outlier_rate=0.0)
    always = dataclasses.replace(SMALL, outlier_rate=1.0)
    plain, large = make_case(never, 1), make_case(always, 1)
    assert plain.large_organs == ()
    assert set(large.large_organs) == set(organ_names)
    spleen = organ_names["spleen"]
    assert (large.labels == spleen).sum() > 1.1 * (plain.labels == spleen).sum()


def test_unusable_configurations():
    for change in ({"shape": (8, 40, 40)}, {"outlier_rate": 2.0}, {"shift": -1.0}):
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
