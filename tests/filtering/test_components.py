"""Connected parts against scipy, organ by organ."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from ukbob_seg.filtering.components import connect, gaps_between, organ_components, runs_above, runs_of_labels


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("shape", [(9, 11, 13), (1, 20, 17), (14, 1, 6), (8, 7, 1)])
@pytest.mark.parametrize("density", [0.1, 0.35, 0.7])
def test_parts_of_a_mask_are_those_of_scipy(
    rng: np.random.Generator, shape: tuple[int, int, int], density: float, diagonal: bool
) -> None:
    for _ in range(5):
        mask = rng.random(shape) < density
        expected, count = ndimage.label(mask, np.ones((3, 3, 3)) if diagonal else None)
        runs = runs_above(mask.astype(np.uint8), 0)
        assert (runs.paint(np.ones(len(runs.start), bool)) == mask).all()
        root = connect(runs, diagonal)
        assert len(np.unique(root)) == count
        for part in np.unique(root):
            painted = runs.paint(root == part)
            assert len(np.unique(expected[painted])) == 1
            assert painted.sum() == (expected == expected[painted][0]).sum()
        gaps = gaps_between(runs, root == root[0] if count else np.zeros(0, bool))
        body = runs.paint(root == root[0]) if count else np.zeros(shape, bool)
        assert (gaps.paint(np.ones(len(gaps.start), bool)) == ~body).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_pieces_of_organs_are_those_of_scipy(rng: np.random.Generator, dtype: type) -> None:
    for smooth in (0.0, 1.0):
        noise = ndimage.gaussian_filter(rng.normal(size=(5, 12, 14, 16)), (0, smooth, smooth, smooth))
        labels = (noise.argmax(axis=0) * 60).astype(dtype)
        table = organ_components(runs_of_labels(labels))
        assert table["label"].tolist() == [60, 120, 180, 240]
        for row in table.itertuples():
            parts, count = ndimage.label(labels == row.label, np.ones((3, 3, 3)))
            sizes = np.bincount(parts.ravel())[1:]
            assert row.components == count
            assert row.largest_component == pytest.approx(sizes.max() / sizes.sum())


def test_a_run_touches_two_neighbours_across_a_change_of_label() -> None:
    """Diagonal contact on both sides of runs that end at the same place."""
    labels = np.zeros((1, 2, 6), np.uint8)
    labels[0, 0] = [1, 1, 1, 2, 2, 0]
    labels[0, 1] = [2, 2, 2, 1, 1, 0]
    assert organ_components(runs_of_labels(labels))["components"].tolist() == [1, 1]
    runs = runs_of_labels(labels)
    assert len(np.unique(connect(runs, diagonal=False))) == 4


def test_no_labels() -> None:
    assert organ_components(runs_of_labels(np.zeros((3, 4, 5), np.uint8))).empty
