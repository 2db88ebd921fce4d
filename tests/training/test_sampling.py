"""Patch sampling: the same step gives the same batch, foreground is centred, padding is where it must be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ukbob_seg.training.sampling import centred_patches, choose_start, read_patch


@given(
    shape=st.tuples(*[st.integers(1, 20)] * 3), patch=st.tuples(*[st.integers(1, 20)] * 3), seed=st.integers(0, 1000)
)
@settings(max_examples=100, deadline=None)
def test_patches_stay_inside_or_are_padded_evenly(shape, patch, seed):
    array = np.arange(1, np.prod(shape) + 1).reshape(1, *shape)
    start = choose_start(shape, patch, np.random.default_rng(seed), {})
    result = read_patch(array, start, patch)
    assert result.shape == (1, *patch)
    # Every voxel that the patch shows is where it belongs, and there are as many as can be.
    assert (result > 0).sum() == np.prod([min(n, p) for n, p in zip(shape, patch, strict=True)])
    voxel = np.argwhere(result[0] > 0)[0]
    assert result[0][tuple(voxel)] == array[0][tuple(voxel + start)]


def test_every_start_is_reachable():
    generator = np.random.default_rng(0)
    starts = {choose_start((5, 4, 4), (3, 4, 6), generator, {}) for _ in range(300)}
    assert {s[0] for s in starts} == {0, 1, 2}
    assert {s[1] for s in starts} == {0}
    assert {s[2] for s in starts} == {-1}


def test_foreground_voxel_is_inside_the_patch():
    locations = {1: np.array([[19, 0, 10]], dtype=np.uint16), 4: np.array([[0, 19, 10]], dtype=np.uint16)}
    seen = set()
    for seed in range(40):
        start = choose_start((20, 20, 20), (8, 8, 8), np.random.default_rng(seed), locations)
        hits = [k for k, v in locations.items() if all(s <= c < s + 8 for s, c in zip(start, v[0], strict=True))]
        assert len(hits) == 1
        seen.add(hits[0])
    assert seen == {1, 4}  # rare classes are drawn as often as frequent ones


@pytest.fixture
def preprocessed(make_dataset, tmp_path):
    from ukbob_seg.dataset.spec import DatasetSpec
    from ukbob_seg.preprocessing.fingerprint import extract_fingerprint
    from ukbob_seg.preprocessing.planner import PlanOptions, plan
    from ukbob_seg.preprocessing.preprocessor import preprocess

    raw = make_dataset(cases=3, shape=(30, 34, 28))
    fingerprint = extract_fingerprint(raw, tmp_path / "p", workers=1, quiet=True)
    plans = plan(fingerprint, DatasetSpec.load(raw), PlanOptions(memory_gb=2))
    preprocess(raw, tmp_path / "p", plans, workers=1, quiet=True)
    return tmp_path / "p" / "3d_fullres"


def _dataset(folder, lookup=None, seed=5, batch_size=4, fraction=0.5, read_size=None):
    from ukbob_seg.training.sampling import PatchDataset, PatchSettings, TrainingCase

    cases = [TrainingCase(f"blob_{i:03d}", lookup) for i in range(3)]
    return PatchDataset(
        folder, cases, PatchSettings((16, 16, 16), batch_size, fraction, 255, seed, read_size=read_size)
    )


def test_a_step_is_the_same_in_every_process(preprocessed):
    from ukbob_seg.training.sampling import make_loader

    here = list(make_loader(_dataset(preprocessed), 3, 9, workers=0, pin=False))
    there = list(make_loader(_dataset(preprocessed), 3, 9, workers=2, pin=False))
    assert len(here) == len(there) == 6
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["labels"], b["labels"])
    resumed = next(iter(make_loader(_dataset(preprocessed), 5, 9, workers=0, pin=False)))
    assert torch.equal(resumed["image"], here[2]["image"])
    other = next(iter(make_loader(_dataset(preprocessed, seed=6), 3, 9, workers=0, pin=False)))
    assert not torch.equal(other["image"], here[0]["image"])


def test_the_foreground_share_of_a_batch(preprocessed):
    batch = _dataset(preprocessed, batch_size=6, fraction=1.0)[0]
    assert batch["image"].shape == (6, 1, 16, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert (batch["labels"][:, 8, 8, 8] > 0).any()
    assert all((labels > 0).any() for labels in batch["labels"])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.33, 0.5, 1.0])
def test_the_share_is_kept_at_every_batch_size(batch_size, share):
    counts = [centred_patches(step, batch_size, share) for step in range(3000)]
    nnunets = sum(not position < round(batch_size * (1 - share)) for position in range(batch_size))
    assert min(counts) >= nnunets
    assert max(counts) <= batch_size
    mean = sum(counts) / len(counts) / batch_size
    assert mean >= share - 1e-3
    if nnunets <= batch_size * share:
        assert mean == pytest.approx(share, abs=1e-3)
    else:
        assert set(counts) == {nnunets}  # such as one of two at 0.33


def test_single_patches_are_centred_as_often_as_asked(preprocessed):
    """A batch of one takes part in the share; half of 0.33 was none."""
    centred = []
    dataset = _dataset(preprocessed, batch_size=1, fraction=0.33)
    plain = _dataset(preprocessed, batch_size=1, fraction=0.0)
    for step in range(30):
        centred.append(not torch.equal(dataset[step]["image"], plain[step]["image"]))
    assert sum(centred) == 9
    assert [step for step in range(30) if centred[step]] == [3, 6, 9, 12, 15, 18, 21, 24, 27]


def test_more_may_be_read_around_the_same_patches(preprocessed):
    from ukbob_seg.training.augmentation import Batch, RandomSpatial, SpatialSettings, augment

    nothing = RandomSpatial((16, 16, 16), (1, 1, 1), SpatialSettings(p_rotation=0, p_scale=0))
    surroundings = 0
    for step in range(4):
        small = _dataset(preprocessed, batch_size=6, fraction=1.0)[step]
        large = _dataset(preprocessed, batch_size=6, fraction=1.0, read_size=(25, 24, 40))[step]
        assert large["image"].shape == (6, 1, 25, 24, 40)
        cut = augment(Batch(large["image"], large["labels"]), [nothing], torch.Generator())
        assert torch.equal(cut.image, small["image"])
        assert torch.equal(cut.labels, small["labels"])
        assert cut.image.is_contiguous()  # and the large one can be freed
        assert bool((large["image"][..., 0] == 0).all())  # beyond the case, which is 28 voxels wide
        surroundings += int((large["labels"][:, :4] > 0).sum())
    assert surroundings > 0


def test_flagged_classes_are_ignored_and_not_centred_on(preprocessed):
    lookup = np.arange(256, dtype=np.uint8)
    lookup[2] = 255
    batch = _dataset(preprocessed, lookup, batch_size=8, fraction=1.0)[0]
    assert set(batch["labels"].unique().tolist()) <= {0, 1, 255}
    assert all((labels == 1).any() for labels in batch["labels"])


def test_few_cases_are_held_open(preprocessed, monkeypatch):
    from ukbob_seg.training import sampling

    whole = [_dataset(preprocessed)[step] for step in range(12)]
    monkeypatch.setattr(sampling, "MOST_OPEN", 2)
    dataset = _dataset(preprocessed)
    for step in range(12):
        assert torch.equal(dataset[step]["image"], whole[step]["image"])
        assert len(dataset._open) <= 2
