"""The robust covariance against scikit-learn, and the doubt against the chi-square distribution."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2, median_abs_deviation, multivariate_normal
from sklearn.covariance import MinCovDet

from ukbob_seg.filtering.joint import (
    JointModel,
    central_half,
    learn_joint,
    minimum_covariance_determinant,
    shape_vectors,
)


@pytest.mark.parametrize("contamination", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("n", [100, 200, 800])
def test_equals_scikit_learn(rng: np.random.Generator, n: int, contamination: float) -> None:
    """Where both find the same half of the points the results agree to rounding; elsewhere they are close."""
    points = rng.normal(size=(n, 3)) @ rng.normal(size=(3, 3)) + [5, -3, 100]
    bad = int(contamination * n)
    points[:bad] = points[:bad] * 0.2 + rng.normal(size=3) * 40
    centre, covariance, _ = minimum_covariance_determinant(points)
    reference = MinCovDet(random_state=0).fit(points)
    scale = np.sqrt(np.diag(reference.covariance_))
    assert np.abs((centre - reference.location_) / scale).max() < 0.1
    assert np.abs((covariance - reference.covariance_) / np.outer(scale, scale)).max() < 0.25


def test_a_third_of_the_points_cannot_bend_it(rng: np.random.Generator) -> None:
    points = rng.normal(size=(400, 3)) @ rng.normal(size=(3, 3))
    points[:140] = points[:140] * 0.2 + rng.normal(size=3) * 40
    centre, covariance, samples = minimum_covariance_determinant(points)
    clean = points[140:]
    scale = clean.std(axis=0)
    assert np.abs((centre - clean.mean(axis=0)) / scale).max() < 0.1
    assert np.abs((covariance - np.cov(clean, rowvar=False)) / np.outer(scale, scale)).max() < 0.25
    assert 240 <= samples <= 260


def test_central_half_is_as_compact_as_scikit_learns_and_free_of_outliers(rng: np.random.Generator) -> None:
    """Heavy tails leave several halves that are nearly as compact; both search, so either may find the better one."""
    for _ in range(5):
        points = rng.standard_t(3, size=(150, 3)) @ rng.normal(size=(3, 3))
        points[:20] += 25
        scaled = (points - np.median(points, axis=0)) / median_abs_deviation(points, axis=0, scale="normal")
        half = central_half(scaled)
        assert len(half) == 77
        assert half.min() >= 20
        reference = MinCovDet(random_state=0, support_fraction=77 / 150).fit(scaled)
        assert reference.raw_support_.sum() == 77
        ours, theirs = (np.linalg.slogdet(np.cov(scaled[rows].T))[1] for rows in (half, reference.raw_support_))
        assert ours < theirs + 0.1


def test_the_same_points_give_the_same_bits(rng: np.random.Generator) -> None:
    points = rng.standard_t(3, size=(150, 3))
    for one, other in zip(*(minimum_covariance_determinant(points) for _ in range(2)), strict=True):
        assert np.array_equal(one, other)


def test_follows_a_change_of_units(rng: np.random.Generator) -> None:
    points = rng.normal(size=(300, 3)) @ rng.normal(size=(3, 3))
    centre, covariance, _ = minimum_covariance_determinant(points)
    units = np.array([1e-6, 3.0, 1e5])
    moved, stretched, _ = minimum_covariance_determinant(points * units + 7)
    assert moved == pytest.approx(centre * units + 7)
    assert stretched == pytest.approx(covariance * np.outer(units, units))


def test_points_in_a_plane_are_refused(rng: np.random.Generator) -> None:
    points = rng.normal(size=(50, 3))
    points[:, 2] = points[:, 0] + points[:, 1]
    with pytest.raises(np.linalg.LinAlgError):
        minimum_covariance_determinant(points)
    points[:40, 2] = 3.0
    with pytest.raises(np.linalg.LinAlgError):
        minimum_covariance_determinant(points)


def test_doubt_is_the_decimal_logarithm_of_the_tail(rng: np.random.Generator) -> None:
    scatter = np.array([[2.0, 0.3, 0.1], [0.3, 1.0, -0.2], [0.1, -0.2, 0.5]])
    model = JointModel((0, 1, 2), (1.0, 2.0, 3.0), tuple(map(tuple, scatter.tolist())), 10**9)
    sample = multivariate_normal((1, 2, 3), scatter, seed=3).rvs(200_000)
    doubt = model.doubt(sample)
    for decades in (0.5, 1, 2, 3):
        assert (doubt > decades).mean() == pytest.approx(10.0**-decades, rel=0.15)
    assert model.doubt(np.array([[1.0, 2.0, 3.0]])) == pytest.approx([0])
    far = np.array([[1e9, 2, 3]])
    assert model.doubt(far).tolist() == [300.0]


def test_doubt_of_a_new_label_allows_for_few_samples(rng: np.random.Generator) -> None:
    """Mean and covariance of 30 normal vectors; one new vector in ten has a doubt above 1, one in 100 above 2."""
    found = []
    for _ in range(20_000):
        points = rng.normal(size=(30, 3))
        covariance = np.cov(points, rowvar=False)
        model = JointModel((0, 1, 2), tuple(points.mean(axis=0)), tuple(map(tuple, covariance.tolist())), 30)
        found.append(model.doubt(rng.normal(size=(1, 3)))[0])
    for decades in (0.3, 1, 2):
        assert (np.array(found) > decades).mean() == pytest.approx(10.0**-decades, rel=0.15)


def test_ordinary_cohorts_raise_few_alarms(rng: np.random.Generator) -> None:
    """Of normal labels one in 1,000 has a doubt above 3; more in small cohorts, which this bounds."""
    for n, most in ((60, 0.01), (200, 0.003), (1000, 0.002)):
        alarms = []
        for _ in range(12_000 // n):
            x = rng.normal(0, 0.1, (n, 3))
            model = learn_joint(x, 20)
            assert model is not None
            alarms.append((model.doubt(x) > 3).mean())
        assert np.mean(alarms) < most


def test_missing_entries_are_left_out() -> None:
    model = JointModel((0, 1, 2), (0.0, 0.0, 0.0), ((4.0, 0.0, 1.0), (0.0, 9.0, 0.0), (1.0, 0.0, 1.0)), 10**9)
    found = model.doubt(np.array([[2.0, np.nan, np.nan], [2.0, 3.0, np.nan], [np.nan, np.nan, np.nan]]))
    assert found[0] == pytest.approx(-np.log10(chi2.sf(1.0, 1)))
    assert found[1] == pytest.approx(-np.log10(chi2.sf(2.0, 2)))
    assert np.isnan(found[2])


def test_degenerate_organs_have_defined_vectors() -> None:
    table = pd.DataFrame(
        {"normalized_volume": [0.1, 0.1, 0.0], "sphericity": [0.5, 0.8, 0.5], "eccentricity": [1.0, np.nan, 0.6]}
    )
    vectors = shape_vectors(table)
    assert vectors[0] == pytest.approx([np.log(0.1), np.log(0.5), -np.log(1e-4)])
    assert np.isnan(vectors[1, 2])
    assert np.isnan(vectors[2, 0])
    assert vectors[2, 2] == pytest.approx(-np.log(0.64))


def test_entries_that_most_labels_lack_are_left_out(rng: np.random.Generator) -> None:
    points = rng.normal(size=(200, 4))
    points[:150, 2] = np.nan
    points[5, 1] = np.nan
    model = learn_joint(points, 20)
    assert model is not None
    assert model.entries == (0, 1, 3)
    again = learn_joint(np.delete(points, 2, axis=1), 20)
    assert again is not None
    assert model.doubt(points).tolist() == again.doubt(np.delete(points, 2, axis=1)).tolist()


def test_no_model_from_too_little(rng: np.random.Generator) -> None:
    points = rng.normal(size=(30, 3))
    assert learn_joint(points, 31) is None
    model = learn_joint(points, 30)
    assert model is not None
    assert JointModel.from_json(model.as_json()) == model
    points[:, 1] = 0.3
    assert learn_joint(points, 20) is None
    assert learn_joint(points[:5], 2) is None
    assert learn_joint(np.full((30, 3), np.nan), 2) is None
