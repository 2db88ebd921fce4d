"""Cascades and 2D configurations, from plans to predictions."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from skimage import morphology as reference
from torch import nn

from ukbob_seg.dataset.image_io import Geometry, read_labels, write_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.evaluation.validate_fold import validate_fold
from ukbob_seg.inference.etta import EttaConfig
from ukbob_seg.inference.passes import AveragedPasses, Mirroring
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.inference.sliding_window import WindowSettings, predict_logits
from ukbob_seg.networks.wrappers import CascadeNetwork, SliceNetwork
from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions
from ukbob_seg.preprocessing.plans import Plans
from ukbob_seg.preprocessing.preprocessor import preprocess
from ukbob_seg.preprocessing.records import case_files, load_record
from ukbob_seg.preprocessing.storage import open_array, save_array
from ukbob_seg.training import cascade
from ukbob_seg.training.augmentation import (
    Batch,
    FlipRecord,
    RandomFlip,
    RandomIntensityShift,
    RandomRotate90,
    read_size,
)
from ukbob_seg.training.config import TrainingConfig
from ukbob_seg.training.sampling import PatchDataset, PatchSettings, TrainingCase
from ukbob_seg.training.setup import make_augmentation, prepare
from ukbob_seg.training.trainer import RunOptions, train

CONFIG = TrainingConfig(
    epochs=1, iterations_per_epoch=2, learning_rate=1e-3, schedule="one_cycle", validation_every=1,
    augmentation="strong",
)  # fmt: skip
QUIET = RunOptions(quiet=True)
FLAT = {
    "features_per_stage": [4, 8], "strides": [[1, 1], [2, 2]], "kernel_sizes": [[3, 3], [3, 3]],
    "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "deep_supervision": True, "slice_axis": 0,
}  # fmt: skip
SOLID = {**FLAT, "strides": [1, 2], "kernel_sizes": [[3, 3, 3], [3, 3, 3]]}
del SOLID["slice_axis"]


def _network(patch, arguments):
    return {"patch_size": patch, "batch_size": 2, "arguments": arguments, "estimated_memory_gb": 0.1}


@pytest.fixture
def roots(make_dataset, tmp_path):
    """A dataset with a tiny 2D configuration, a tiny low-resolution one and a second stage."""
    make_dataset(cases=5, shape=(12, 28, 20), spacing_mm=(2.5, 1.0, 1.0))
    roots = Roots.below(tmp_path)
    folder = plan_and_preprocess(7, roots, PlanOptions(memory_gb=2), configurations=()).folder
    content = json.loads((folder / "plans.json").read_text())
    shared = {"median_shape": [12, 28, 20], "image_order": 3}
    content["configurations"] = {
        "3d_fullres": {
            **shared, "spacing_mm": [2.5, 1, 1], "networks": {"plain_conv_unet": _network([8, 16, 16], SOLID)},
        },
        "3d_lowres": {**shared, "spacing_mm": [3, 2, 2], "networks": {"plain_conv_unet": _network([8, 8, 8], SOLID)}},
        "3d_cascade_fullres": {
            **shared, "spacing_mm": [2.5, 1, 1], "previous_stage": "3d_lowres", "arrays_of": "3d_fullres",
            "networks": {"plain_conv_unet": _network([8, 16, 16], {**SOLID, "previous_labels": 2})},
        },
        "2d": {
            **shared, "spacing_mm": [2.5, 1.5, 1.5], "slice_axis": 0,
            "networks": {"plain_conv_unet": _network([1, 16, 16], FLAT)},
        },
    }  # fmt: skip
    (folder / "plans.json").write_text(json.dumps(content))
    plans = Plans.load(folder / "plans.json")
    for name in content["configurations"]:
        preprocess(roots.raw / folder.name, folder, plans, name, workers=1, quiet=True)
    return roots


def test_the_cascade_needs_no_arrays_of_its_own(roots):
    folder = roots.preprocessed / "Dataset007_Blobs"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"3d_fullres", "3d_lowres", "2d"}


def test_a_cascade_from_first_stage_to_prediction(roots, tmp_path):
    with pytest.raises(ConfigError, match=r"5 of 5 cases .*ukbob_train 7 0 -c 3d_lowres --network plain_conv_unet"):
        train(7, 0, roots, CONFIG, QUIET, configuration="3d_cascade_fullres")
    for fold in range(5):
        folder = train(7, fold, roots, CONFIG, QUIET, configuration="3d_lowres")
        validate_fold(folder.parent, str(fold), roots)
    folder = train(7, 0, roots, CONFIG, QUIET, configuration="3d_cascade_fullres")
    assert folder.parent.name == "3d_cascade_fullres__plain_conv_unet"
    summary = validate_fold(folder.parent, "0", roots)
    assert len(summary.cases) == 1
    more = dataclasses.replace(CONFIG, epochs=2)
    train(7, 0, roots, more, dataclasses.replace(QUIET, resume=True), configuration="3d_cascade_fullres")
    found = cascade.find_predictions(roots.results / "Dataset007_Blobs" / "3d_lowres__plain_conv_unet", ".nii.gz")
    for path in found.values():
        os.utime(path)
    more = dataclasses.replace(CONFIG, epochs=3)
    with pytest.raises(ConfigError, match="the first stage's predictions changed since"):
        train(7, 0, roots, more, dataclasses.replace(QUIET, resume=True), configuration="3d_cascade_fullres")
    image = roots.raw / "Dataset007_Blobs" / "imagesTr" / "blob_000_0000.nii.gz"
    for etta in (False, True):
        settings = PredictionSettings(etta=EttaConfig(steps=1) if etta else None, classes=("second",))
        with Predictor.from_model_folder(folder.parent, ["0"], settings=settings) as predictor:
            result = predictor.predict_case([image], tmp_path / "out.nii.gz")
            assert result.labels.shape == (12, 28, 20)
            assert result.previous_stage.labels.shape == (12, 28, 20)
            assert predictor.written.names == ("second",)
            assert set(np.unique(result.labels)) <= {0, 2}
            assert predictor._previous_stage.written.names == ("first", "second")  # what the second stage has learnt on
    record = json.loads((tmp_path / "out_etta.json").read_text())
    assert len(record["folds"]) == 1
    assert len(record["previous_stage"]["folds"]) == 5  # every trained fold of the first stage


def test_slices_are_turned_in_their_plane(roots):
    setup = prepare(7, "0", roots, CONFIG, "2d", "plain_conv_unet", True)
    transforms = make_augmentation(setup, CONFIG, None)
    assert read_size(transforms, setup.network.patch_size) == (1, 18, 18)
    assert transforms[0].settings.axes == (1, 2)


def test_a_2d_configuration_from_plans_to_prediction(roots, tmp_path):
    folder = train(7, 0, roots, CONFIG, QUIET, configuration="2d")
    assert folder.parent.name == "2d__plain_conv_unet"
    image = roots.raw / "Dataset007_Blobs" / "imagesTr" / "blob_000_0000.nii.gz"
    with Predictor.from_model_folder(folder.parent, settings=PredictionSettings(tta=True)) as predictor:
        assert predictor.description.mirror_axes == (1, 2)  # never across the slices
        result = predictor.predict_case([image], tmp_path / "out.nii.gz")
    assert result.labels.shape == (12, 28, 20)
    adapting = PredictionSettings(etta=EttaConfig(steps=2, learning_rate=0.05, least_foreground=0.0, most_drift=10.0))
    with Predictor.from_model_folder(folder.parent, settings=adapting) as predictor:
        first, second = (predictor.predict_case([image], tmp_path / "adapted.nii.gz") for _ in range(2))
    assert first.etta == second.etta
    assert np.array_equal(first.labels, second.labels)
    assert first.etta[0]["adapted_parameters"] > 0
    assert first.etta[0]["entropy_after"] < first.etta[0]["entropy_before"]
    summary = validate_fold(folder.parent, "0", roots)
    assert len(summary.cases) == 1


def test_2d_arrays_keep_the_spacing_across_slices(roots):
    record = load_record(roots.preprocessed / "Dataset007_Blobs" / "2d", "blob_000")
    box = np.subtract(record["properties"]["box_stop"], record["properties"]["box_start"])
    assert record["properties"]["shape"] == [box[0], round(box[1] / 1.5), round(box[2] / 1.5)]


@pytest.mark.parametrize("operator", ["dilate", "erode", "open", "close"])
@pytest.mark.parametrize("radius", [1, 2, 5])
def test_morphology_is_that_of_a_ball(operator, radius, rng):
    mask = np.zeros((30, 34, 32), bool)
    mask[12:18, 12:22, 12:20] = rng.random((6, 10, 8)) < 0.6
    oracle = {
        "dilate": reference.dilation, "erode": reference.erosion, "open": reference.opening, "close": reference.closing,
    }[operator]  # fmt: skip
    np.testing.assert_array_equal(cascade.morphology(mask, operator, radius), oracle(mask, reference.ball(radius)))


@pytest.mark.parametrize("value", [True, False])
def test_morphology_of_full_and_empty_masks_changes_nothing(value):
    mask = np.full((4, 5, 6), value)
    for operator in cascade.OPERATORS:
        np.testing.assert_array_equal(cascade.morphology(mask, operator, 3), mask)


def test_an_operator_changes_one_label_as_on_the_whole_map():
    labels = np.zeros((24, 26, 28), np.uint8)
    labels[8:14, 8:14, 8:14] = 1
    labels[14:18, 8:14, 8:14] = 2
    for operator in cascade.OPERATORS:
        for radius in (1, 4, 8):
            changed = labels.copy()
            cascade._apply(changed, 1, operator, radius)
            after = cascade.morphology(labels == 1, operator, radius)
            expected = np.where(after, 1, np.where(labels == 1, 0, labels))
            np.testing.assert_array_equal(changed, expected)


def test_augmented_maps():
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[3:9, 3:9, 3:9], labels[12:18, 12:18, 4:9], labels[0, 0, 0] = 1, 2, 2
    before, different = labels.copy(), 0
    for seed in range(60):
        changed = cascade.augment_map(labels, np.random.default_rng(seed))
        again = cascade.augment_map(labels, np.random.default_rng(seed))
        np.testing.assert_array_equal(changed, again)
        assert set(np.unique(changed)) <= {0, 1, 2}
        assert changed.dtype == labels.dtype
        different += not np.array_equal(changed, labels)
    np.testing.assert_array_equal(labels, before)
    assert 20 <= different <= 45  # 1 - 0.6 * 0.8 of 60, less the operators that change nothing


def test_a_removed_part_is_never_a_large_one():
    labels = np.ones((10, 10, 10), np.uint8)
    labels[5], labels[9, 9, 9] = 0, 0
    labels[6:9], labels[9, :8] = 0, 0
    parts = {int((labels[:5] == 1).sum()), int((labels[9] == 1).sum())}
    assert max(parts) == 500
    for seed in range(10):
        changed = labels.copy()
        cascade._remove_part(changed, 1, np.random.default_rng(seed), cascade.LARGEST_REMOVED * changed.size)
        assert changed[:5].all()
        assert not changed[9].any()


@pytest.mark.parametrize(("patch_voxels", "removed"), [(None, True), (1000, True), (200, False)])
def test_a_part_is_large_compared_with_the_patch_not_with_what_is_read(monkeypatch, patch_voxels, removed):
    monkeypatch.setattr(cascade, "OPERATOR_PROBABILITY", 0.0)
    monkeypatch.setattr(cascade, "REMOVAL_PROBABILITY", 1.0)
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[:3, :4, :4] = 1  # 48 voxels
    changed = cascade.augment_map(labels, np.random.default_rng(0), patch_voxels)
    assert bool(changed.any()) is not removed


def test_first_stage_maps_move_with_the_labels():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (3, 6, 6, 6), generator=generator, dtype=torch.int32)
    image = labels.unsqueeze(1).float()
    batch = Batch(image, labels, labels.clone())
    swap = torch.tensor([0, 2, 1, 3])
    flip = RandomFlip((0, 1, 2), 0.5, 2, swap)
    record = FlipRecord(torch.tensor([[True, False, True], [False, False, False], [False, True, False]]))
    turn = RandomRotate90([(0, 1)], 1.0)
    for changed in (flip.apply(batch, record), turn.apply(batch, turn.sample(3, generator))):
        torch.testing.assert_close(changed.previous, changed.labels)
    shifted = RandomIntensityShift(0.5, 1.0)
    changed = shifted.apply(batch, shifted.sample(3, generator))
    torch.testing.assert_close(changed.previous, labels)
    assert changed.network_input().shape == (3, 2, 6, 6, 6)
    torch.testing.assert_close(changed.network_input()[:, 1], labels.float())


def test_patches_of_maps_lie_where_those_of_labels_do(roots, tmp_path):
    arrays = roots.preprocessed / "Dataset007_Blobs" / "3d_fullres"
    for name in ("blob_000", "blob_001"):
        save_array(tmp_path / "maps" / f"{name}.b2nd", open_array(case_files(arrays, name)[1])[:], (8, 8, 8))
    settings = PatchSettings((8, 16, 16), 2, 0.5, 255, 0, augment_previous=False)
    cases = [TrainingCase("blob_000"), TrainingCase("blob_001")]
    for step in range(4):
        batch = PatchDataset(arrays, cases, settings, tmp_path / "maps")[step]
        torch.testing.assert_close(batch["previous"], batch["labels"])
    augmented = PatchDataset(arrays, cases, dataclasses.replace(settings, augment_previous=True), tmp_path / "maps")
    assert any(not torch.equal((b := augmented[step])["previous"], b["labels"]) for step in range(8))


def test_maps_come_from_the_fold_that_held_the_case_out(tmp_path):
    for fold, value in (("all", 1), ("0", 2), ("3", 3)):
        path = tmp_path / f"fold_{fold}" / "validation" / f"case_{'a' if fold != '3' else 'b'}.nii.gz"
        write_labels(np.full((2, 2, 2), value, np.uint8), Geometry((2, 2, 2), (1.0, 1.0, 1.0)), path)
    found = cascade.find_predictions(tmp_path, ".nii.gz")
    assert {name: path.parent.parent.name for name, path in found.items()} == {"case_a": "fold_0", "case_b": "fold_3"}


def test_a_prediction_of_another_case_is_refused(roots, tmp_path):
    path = tmp_path / "3d_lowres__x" / "fold_0" / "validation" / "blob_000.nii.gz"
    write_labels(np.zeros((3, 3, 3), np.uint8), Geometry((3, 3, 3), (1.0, 1.0, 1.0)), path)
    arrays = roots.preprocessed / "Dataset007_Blobs" / "3d_fullres"
    spec = DatasetSpec.load(roots.raw / "Dataset007_Blobs")
    with pytest.raises(DatasetError, match=r"blob_000.nii.gz has .* voxels"):
        cascade.previous_stage_maps(tmp_path / "3d_lowres__x", arrays, tmp_path / "maps", ["blob_000"], spec, True)


def test_maps_are_made_again_when_the_prediction_changes(roots, tmp_path):
    raw = roots.raw / "Dataset007_Blobs"
    labels, geometry = read_labels(raw / "labelsTr" / "blob_000.nii.gz")
    path = tmp_path / "3d_lowres__x" / "fold_0" / "validation" / "blob_000.nii.gz"
    arrays = roots.preprocessed / "Dataset007_Blobs" / "3d_fullres"

    def make():
        spec = DatasetSpec.load(raw)
        folder = cascade.previous_stage_maps(path.parents[2], arrays, tmp_path / "maps", ["blob_000"], spec, True)
        return cascade.read_map(folder, "blob_000")[:], (folder / "blob_000.b2nd").stat().st_mtime_ns

    write_labels(labels, geometry, path)
    first, time = make()
    np.testing.assert_array_equal(first, open_array(case_files(arrays, "blob_000")[1])[:])
    assert make()[1] == time
    write_labels(np.zeros_like(labels), geometry, path)
    assert not make()[0].any()


class _PassOn(nn.Module):
    """Second stage that believes the first: channel 0 is the image, then one channel per label."""

    def forward(self, image):
        found = image[:, 1:]
        return torch.cat([1 - found.sum(1, keepdim=True), found], 1) * 10


@pytest.mark.parametrize("tta", [False, True])
def test_the_second_stage_gets_the_first_ones_labels_also_under_flips(tta):
    labels = torch.zeros(1, 1, 4, 4, 8)
    labels[..., 1:3, :3] = 1
    labels[..., 1:3, 6:] = 2
    windows = torch.cat([torch.randn(1, 1, 4, 4, 8), labels], 1)
    network = CascadeNetwork(_PassOn(), 1, 2)
    mirroring = Mirroring((0, 2) if tta else (), 2, (0, 2, 1), (0, 2, 1))
    decided = AveragedPasses([network], mirroring)(windows).argmax(1)
    torch.testing.assert_close(decided, labels[:, 0].long())


def test_flips_without_the_exchange_would_spoil_it():
    """The test above can fail: a flip alone makes left labels of right ones."""
    labels = torch.zeros(1, 1, 2, 2, 4)
    labels[..., 0] = 1
    windows = torch.cat([torch.zeros_like(labels), labels], 1)
    logits = AveragedPasses([CascadeNetwork(_PassOn(), 1, 2)], Mirroring((2,), 2, (0, 2, 1), None))(windows)
    assert bool((logits[0, 1] == logits[0, 2]).all())


def test_predictors_refuse_a_missing_or_needless_first_stage(roots):
    for fold in range(5):
        folder = train(7, fold, roots, CONFIG, QUIET, configuration="3d_lowres")
    with Predictor.from_model_folder(folder.parent) as first:
        assert first.description.configuration == "3d_lowres"
        with pytest.raises(ConfigError, match="takes no first stage"):
            Predictor([nn.Identity()], first.description, previous_stage=first)
        lone = dataclasses.replace(first.description, configuration="3d_cascade_fullres")
        with pytest.raises(ConfigError, match="takes 3d_lowres as its first stage"):
            Predictor([nn.Identity()], lone)


def test_whole_volumes_of_slices_equal_slices_one_by_one():
    torch.manual_seed(0)
    for axis in range(3):
        flat = nn.Conv2d(1, 2, 3, padding=1)
        shape = [10, 12, 14]
        shape[axis] = 19  # no multiple of the slices of a window
        image = torch.randn(1, *shape)
        patch = tuple(1 if a == axis else n for a, n in enumerate(shape))
        logits = predict_logits(SliceNetwork(flat, axis), image, WindowSettings(patch, slice_axis=axis))
        expected = torch.stack([flat(image.select(axis + 1, k)[None])[0] for k in range(19)], dim=axis + 1)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
