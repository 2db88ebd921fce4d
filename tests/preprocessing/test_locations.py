"""Positions of classes: right, distinct, evenly likely, and the same whichever way they are found."""

import numpy as np
import pytest

from ukbob_seg.preprocessing import locations as module
from ukbob_seg.preprocessing.locations import class_locations


@pytest.fixture(params=["numpy", "numba"])
def _way(request, monkeypatch):
    monkeypatch.setattr(module, "SMALL", 1 << 40 if request.param == "numpy" else 0)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_locations_point_at_their_class(rng, dtype):
    labels = rng.choice([0, 0, 0, 1, 5, 255], size=(30, 40, 51)).astype(dtype)
    labels[0, 0, 0] = 9
    locations, counts = class_locations(labels, "case")
    assert set(locations) == {"1", "5", "9", "255"}
    for key, voxels in locations.items():
        assert (labels[tuple(voxels.T.astype(int))] == int(key)).all()
        assert counts[key] == (labels == int(key)).sum()
        assert len(voxels) == min(counts[key], 10_000)
        assert len(np.unique(voxels, axis=0)) == len(voxels)
    assert np.array_equal(class_locations(labels, "case")[0]["1"], locations["1"])
    assert not np.array_equal(class_locations(labels, "another")[0]["1"], locations["1"])


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("shape", [(3, 3, 3), (1, 1, 1), (2, 1, 4)])
def test_no_foreground_and_nothing_else(shape):
    assert class_locations(np.zeros(shape, np.uint8), "empty") == ({}, {})
    locations, counts = class_locations(np.full(shape, 3, np.uint8), "full")
    assert counts == {"3": np.prod(shape)}
    assert len(locations["3"]) == np.prod(shape)


def test_both_ways_find_the_same(rng, monkeypatch):
    labels = rng.choice([0, 1, 2, 200], p=[0.5, 0.4, 0.099, 0.001], size=(41, 43, 47)).astype(np.uint8)[::-1, :, ::2]
    monkeypatch.setattr(module, "MAX_LOCATIONS", 50)
    found = []
    for small in (0, 1 << 40):
        monkeypatch.setattr(module, "SMALL", small)
        found.append(class_locations(labels, "case"))
    assert found[0][1] == found[1][1]
    for key, voxels in found[0][0].items():
        np.testing.assert_array_equal(voxels, found[1][0][key])


def test_large_classes_give_one_in_a_hundred_spread_over_all():
    labels = np.ones((100, 110, 120), np.uint8)
    voxels = class_locations(labels, "case")[0]["1"]
    assert len(voxels) == labels.size // 100
    share = np.histogram(voxels[:, 0], bins=10, range=(0, 100))[0] / (len(voxels) / 10)
    assert share.min() > 0.85
    assert share.max() < 1.15
