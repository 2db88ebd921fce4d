"""The smooth field of an image: what is found, and against what."""

import numpy as np
import pytest
from field_images import coil, tissues
from scipy import ndimage
from scipy.stats import entropy

from ukbob_seg.preprocessing import intensity_field
from ukbob_seg.preprocessing.intensity_field import NO_WEIGHTS, TERMS, Field, UsualField, find_field


def test_an_exact_field_is_recovered():
    clean = tissues()
    weights = np.random.default_rng(0).normal(scale=[0.2 if sum(term) < 3 else 0.1 for term in TERMS])
    truth = Field(tuple(weights), 0, 0).logarithm(clean.shape)
    found = find_field((clean - clean.min()) * np.exp(-truth)).logarithm(clean.shape)
    assert np.std(found - truth) < 0.1 * np.std(truth)


@pytest.mark.parametrize("shape", [(7, 9, 8), (1, 6, 5)])
def test_the_logarithm_is_the_polynomial(shape):
    weights = np.random.default_rng(0).normal(size=len(TERMS))
    legendre = [lambda t: 1 + 0 * t, lambda t: t, lambda t: (3 * t**2 - 1) / 2, lambda t: (5 * t**3 - 3 * t) / 2,
                lambda t: (35 * t**4 - 30 * t**2 + 3) / 8, lambda t: (63 * t**5 - 70 * t**3 + 15 * t) / 8]  # fmt: skip
    expected = np.zeros(shape)
    for weight, term in zip(weights, TERMS, strict=True):
        for place in np.ndindex(*shape):
            at = [2 * i / (n - 1) - 1 if n > 1 else None for i, n in zip(place, shape, strict=True)]
            factors = [
                float(p == 0) if t is None else legendre[p](np.float64(t)) for p, t in zip(term, at, strict=True)
            ]
            expected[place] += weight * np.prod(factors)
    assert np.allclose(Field(tuple(weights), 0, 0).logarithm(shape), expected, atol=1e-5)
    usual = UsualField(tuple(weights / 2))
    assert np.allclose(Field(tuple(weights), 0, 0).logarithm(shape, usual), expected / 2, atol=1e-5)


def test_spread_is_the_standard_deviation_of_the_logarithm():
    usual = UsualField(tuple(np.random.default_rng(1).normal(size=len(TERMS))))
    field = Field(tuple(np.random.default_rng(0).normal(size=len(TERMS))), 0, 0)
    fine = (150, 150, 150)
    assert field.spread(usual) == pytest.approx(float(field.logarithm(fine, usual).std()), rel=0.03)
    assert field.spread() == pytest.approx(float(field.logarithm(fine).std()), rel=0.03)


def test_usual_is_the_mean_and_the_farthest():
    fields = [Field(tuple(np.full(len(TERMS), value)), 0, 0) for value in (0.0, 0.1, 0.5)]
    usual = UsualField.of(fields)
    assert np.allclose(usual.weights, 0.2)
    assert usual.spread == pytest.approx(fields[2].spread(usual))
    assert UsualField.from_json(usual.to_json()) == usual
    assert UsualField.of(fields[1:2]).spread == 0


def test_several_sets_have_one_usual_field():
    one, other = (UsualField(tuple(np.full(len(TERMS), value)), spread) for value, spread in ((0.0, 0.3), (0.2, 0.1)))
    both = UsualField.joined([one, other])
    assert both == UsualField.joined([other, one])
    assert np.allclose(both.weights, 0.1)
    assert both.spread == pytest.approx(0.3 + Field(one.weights, 0, 0).spread(both))
    assert UsualField.joined([one]) == one


def test_gain_is_measured_from_the_usual_field():
    clean = tissues()
    shaded = (clean - clean.min()) * coil(clean.shape)
    alone = find_field(shaded)
    usual = UsualField(alone.weights)
    again = find_field(shaded, usual=usual)
    assert alone.gain > 0.3
    assert abs(again.gain) < 0.05
    assert again.spread(usual) < 0.1 * alone.spread()
    assert find_field(clean, usual=usual).gain == pytest.approx(alone.gain, rel=0.5)  # which has to go back


@pytest.mark.parametrize("image", [np.full((6, 7, 8), 2.0), np.zeros((1, 1, 1))])
def test_a_constant_image_shows_no_field(image):
    assert find_field(image) == Field(NO_WEIGHTS, low=image.min())
    assert find_field(image, np.zeros(image.shape, bool)) == Field(NO_WEIGHTS, 0.0, 0.0)
    usual = UsualField(tuple(np.linspace(0, 1, len(TERMS))))
    assert find_field(image, usual=usual).spread(usual) == 0


def test_the_entropy_is_that_of_a_histogram_with_overlapping_bins():
    values = np.exp(np.random.default_rng(0).normal(size=500))
    found, _ = intensity_field._entropy(np.zeros(1), values, np.zeros((1, len(values))))
    centres = np.linspace(np.log(0.2), np.log(10.2), 192)
    places = np.minimum(np.log(values / values.mean() + 0.2), centres[-1])
    triangles = np.clip(1 - np.abs(places - centres[:, None]) / (centres[1] - centres[0]), 0, None)
    smooth = ndimage.convolve1d(triangles.sum(1), [1, 4, 6, 4, 1], mode="constant")
    assert found == pytest.approx(entropy(smooth), rel=1e-3)  # which normalises: a trace is lost at the ends


def test_the_gradient_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    count = len(TERMS)
    values, terms, weights = (
        np.abs(rng.normal(size=4000)),
        rng.normal(size=(count, 4000)) * 0.1,
        rng.normal(size=count) * 0.1,
    )
    usual = rng.normal(size=count) * 0.1
    _, gradient = intensity_field._penalised(weights, usual, values, terms)
    for number, step in enumerate(1e-5 * np.eye(count)):
        up, down = (intensity_field._penalised(weights + sign * step, usual, values, terms)[0] for sign in (1, -1))
        assert gradient[number] == pytest.approx((up - down) / 2e-5, abs=2e-3)
