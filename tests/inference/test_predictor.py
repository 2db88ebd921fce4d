"""Prediction of arrays and single files: geometry, regions, probabilities, ETTA; no network needs training here."""

import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from threshold_network import DATASET, REGIONS, Identity, Regions, blobs, plans_of, predictor_of, truth_of
from torch import nn

from ukbob_seg.dataset.image_io import Geometry, read_image, read_labels, write_image
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.inference import export
from ukbob_seg.inference.etta import EttaConfig
from ukbob_seg.inference.predict import predict
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.networks import compiled
from ukbob_seg.preprocessing.intensity_field import UsualField
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.storage import open_array
from ukbob_seg.training.checkpoint import ModelDescription

COS, SIN = math.cos(0.3), math.sin(0.3)
DIRECTIONS = {
    "LPS": (1.0, 0, 0, 0, 1, 0, 0, 0, 1),
    "flipped": (-1.0, 0, 0, 0, -1, 0, 0, 0, 1),
    "sagittal": (0.0, 0, 1, 1, 0, 0, 0, -1, 0),
    "oblique": (COS, -SIN, 0, SIN, COS, 0, 0, 0, 1),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.7)])
def test_labels_overlay_the_image_in_any_orientation(tmp_path, direction, spacing):
    image = blobs((22, 31, 27))
    geometry = Geometry((22, 31, 27), spacing, (5.0, -7.0, 11.0), DIRECTIONS[direction])
    write_image(image[0], geometry, tmp_path / "case_0000.nii.gz")
    predictor_of(spacing=spacing).predict_case([tmp_path / "case_0000.nii.gz"], tmp_path / "out.nii.gz")
    labels, found = read_labels(tmp_path / "out.nii.gz")
    assert geometry.difference(found, ("input", "output")) is None
    assert np.array_equal(labels, truth_of(image))


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_flipped_image_gives_flipped_labels(axes):
    """Exactly: cropping, windows and resampling must not favour a side."""
    image = blobs((22, 31, 27))
    geometry = Geometry((22, 31, 27), (2.0, 1.0, 0.7))
    predictor = predictor_of(spacing=(1.5, 1.5, 1.5))
    plain = predictor.predict_array(image, geometry).labels
    flipped = np.ascontiguousarray(np.flip(image, [a + 1 for a in axes]))
    result = predictor.predict_array(flipped, geometry).labels
    different = np.flip(result, axes) != plain
    assert different.mean() < 2e-3  # only where interpolated logits tie
    assert plain.max() == 7


def test_resampled_predictions_follow_the_image():
    image = blobs((22, 31, 27))
    labels = predictor_of(spacing=(1.5, 1.0, 1.2)).predict_array(image, Geometry((22, 31, 27), (1.0, 1.0, 1.0))).labels
    truth = truth_of(image)
    dice = 2 * ((labels == 7) & (truth == 7)).sum() / ((labels == 7).sum() + (truth == 7).sum())
    assert dice > 0.93


def test_empty_borders_are_cropped_and_put_back():
    image = np.zeros((1, 40, 40, 40), np.float32)
    image[:, 12:30, 9:33, 15:31] = np.abs(blobs((18, 24, 16))) + 0.01
    labels = predictor_of().predict_array(image, Geometry((40, 40, 40), (1.0, 1.0, 1.0))).labels
    assert np.array_equal(labels, truth_of(image))


def test_an_image_smaller_than_the_patch():
    image = blobs((5, 9, 16))
    labels = predictor_of().predict_array(image, Geometry((5, 9, 16), (1.0, 1.0, 1.0))).labels
    assert np.array_equal(labels, truth_of(image))


@pytest.mark.parametrize("settings", [
    PredictionSettings(tta=True),
    PredictionSettings(window_batch=3, step=0.3),
    PredictionSettings(etta=EttaConfig(steps=2)),
])  # fmt: skip
def test_settings_do_not_change_a_perfect_network(settings):
    image = blobs((22, 31, 27))
    result = predictor_of(settings).predict_array(image, Geometry((22, 31, 27), (1.0, 1.0, 1.0)))
    assert np.array_equal(result.labels, truth_of(image))
    assert bool(result.etta) == (settings.etta is not None)


@pytest.mark.parametrize("etta", [None, EttaConfig(steps=2)])
def test_compiled_networks_predict_the_same(monkeypatch, caplog, etta):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    image = blobs((22, 31, 27))
    with predictor_of(PredictionSettings(etta=etta, compile=True)) as predictor:
        for _ in range(2):  # ETTA changes the weights in place, and back
            result = predictor.predict_array(image, Geometry((22, 31, 27), (1.0, 1.0, 1.0)))
            assert np.array_equal(result.labels, truth_of(image))
    assert not any("could not be compiled" in record.getMessage() for record in caplog.records)


def test_regions_are_written_in_order():
    for spacing in ((1.0, 1.0, 1.0), (1.4, 1.0, 1.0)):
        predictor = predictor_of(dataset=REGIONS, networks=[Regions()], spacing=spacing)
        image = blobs((22, 31, 27))
        labels = predictor.predict_array(image, Geometry((22, 31, 27), (1.0, 1.0, 1.0))).labels
        agree = (labels == truth_of(image)).mean()
        assert agree == 1 if spacing[0] == 1.0 else agree > 0.95


def test_probabilities(tmp_path):
    image = np.zeros((1, 20, 20, 20), np.float32)
    image[:, 3:18, 2:19, 4:20] = np.abs(blobs((15, 17, 16))) + 0.01
    path = tmp_path / "p.b2nd"
    labels = predictor_of(networks=[Identity(1, 3, sharpness=2.0).eval()]).predict_array(
        image, Geometry((20, 20, 20), (1.0, 1.0, 1.0)), probabilities=path
    ).labels  # fmt: skip
    stored = open_array(path)
    assert stored.shape == (3, 20, 20, 20)
    assert stored.dtype == np.float16
    probabilities = stored[:].astype(float)
    assert np.abs(probabilities.sum(0) - 1).max() < 2e-3
    assert (probabilities[0][image[0] == 0] == 1).all()
    x = torch.from_numpy(image[None])
    expected = Identity(1, 3, sharpness=2.0)(x).softmax(1)[0].detach().numpy()
    inside = image[0] > 0
    assert np.abs(probabilities - expected)[:, inside].max() < 2e-3
    assert np.array_equal(labels, truth_of(image))


@pytest.mark.parametrize("regions", [False, True])
def test_logits_that_stay_on_the_device_give_the_same(tmp_path, monkeypatch, regions):
    """What a GPU runs, here on tensors of the CPU: labels equal, probabilities to the last bit."""
    given = {"dataset": REGIONS, "networks": [Regions()]} if regions else {}
    image = blobs((22, 31, 27))
    geometry = Geometry((22, 31, 27), (5.0, 1.0, 1.0) if regions else (1.0, 1.0, 1.0))  # one with a coarse axis
    results = []
    for on_device in (False, True):
        monkeypatch.setattr(export, "_on_device", lambda logits, answer=on_device: answer)
        predictor = predictor_of(spacing=(1.5, 1.0, 1.2), **given)
        path = tmp_path / f"{on_device}.b2nd"
        labels = predictor.predict_array(image, geometry, probabilities=path).labels
        assert np.array_equal(predictor.predict_array(image, geometry).labels, labels)
        results.append((labels, open_array(path)[:]))
    assert len(np.unique(results[0][0])) == 3
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("tta", [False, True])
def test_some_classes_only(monkeypatch, on_device, tta):
    monkeypatch.setattr(export, "_on_device", lambda logits: on_device)
    image, geometry = blobs((22, 31, 27)), Geometry((22, 31, 27), (1.0, 1.0, 1.0))
    truth = truth_of(image)
    exclusive, regions = {}, {"dataset": REGIONS, "networks": [Regions()]}
    for given, name, expected in (
        (exclusive, "low", np.where(truth == 2, 2, 0)),
        (exclusive, "high", np.where(truth == 7, 7, 0)),
        (regions, "whole", np.where(truth > 0, 2, 0)),  # the core, which is left out, is part of it
        (regions, "core", np.where(truth == 7, 7, 0)),
    ):
        predictor = predictor_of(PredictionSettings(classes=(name,), tta=tta), **given)
        assert np.array_equal(predictor.predict_array(image, geometry).labels, expected)
    with pytest.raises(ConfigError, match="no class 'liver'; choose from low, high"):
        predictor_of(PredictionSettings(classes=("liver",)))


def test_a_closed_predictor_says_so():
    predictor = predictor_of()
    predictor.close()
    with pytest.raises(ConfigError, match="this predictor is closed; load the model again"):
        predictor.predict_array(blobs((16, 16, 16)).astype(np.float32), Geometry((16, 16, 16), (1, 1, 1)))


def test_closing_waits_for_the_case_of_another_thread():
    inside, go_on = threading.Event(), threading.Event()

    class Slow(Identity):
        def forward(self, x):
            inside.set()
            assert go_on.wait(20)
            return super().forward(x)

    predictor, image = predictor_of(networks=[Slow(1, 3).eval()]), blobs((22, 31, 27))
    with ThreadPoolExecutor(2) as pool:
        case = pool.submit(predictor.predict_array, image, Geometry((22, 31, 27), (1.0, 1.0, 1.0)))
        assert inside.wait(20)
        closing = pool.submit(predictor.close)
        with pytest.raises(TimeoutError):
            closing.result(0.3)
        go_on.set()
        closing.result(20)
        assert np.array_equal(case.result(20).labels, truth_of(image))


def test_where_sums_are_held_is_said_once(caplog):
    predictor, image = predictor_of(), blobs((22, 31, 27))
    with caplog.at_level("INFO", logger="ukbob_seg"):
        for _ in range(2):
            predictor.predict_array(image, Geometry((22, 31, 27), (1.0, 1.0, 1.0)))
    assert [r.getMessage() for r in caplog.records if "the sums of" in r.getMessage()] == [
        "the sums of 3 classes take 1 MB of memory"
    ]


def test_etta_divides_a_field_out_before_anything_else():
    """The network only compares with thresholds, so what helps is the image that it is given."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, (10, 10, 10)).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    clean = np.array([0.3, 1.0, 2.2])[kinds] + rng.normal(scale=0.02, size=kinds.shape)
    shaded = clean * np.exp(np.linspace(-1, 1, 40)[:, None, None] + np.linspace(-0.5, 0.5, 40))
    plans = plans_of().to_json()
    plans["normalization"] = [dataclasses.asdict(ChannelNormalization("zscore"))]
    geometry = Geometry(clean.shape, (1.0, 1.0, 1.0))
    found = {}
    for name, image, etta in (
        ("clean", clean, None), ("shaded", shaded, None), ("flat", shaded, EttaConfig(steps=0)),
        ("left", shaded, EttaConfig(steps=0, least_field_gain=None)), ("before", shaded, EttaConfig(steps=0)),
        ("small", clean, EttaConfig(steps=0)),
    ):  # fmt: skip
        fields = None if name == "before" else (UsualField(),)
        description = ModelDescription("identity", {}, "3d_fullres", "0", "softmax", (0,), plans, DATASET, fields)
        with Predictor([Identity(1, 3).eval()], description, settings=PredictionSettings(etta=etta)) as predictor:
            found[name] = predictor.predict_array(image[None].astype(np.float32), geometry)
    clear, shade, flat, left, small = (found[name].labels for name in ("clean", "shaded", "flat", "left", "small"))
    assert (shade != clear).mean() > 0.15
    assert (flat != clear).mean() < 0.5 * (shade != clear).mean()
    assert np.array_equal(left, shade)
    assert np.array_equal(found["before"].labels, shade)  # nothing is known of the training images
    assert np.array_equal(small, clear)
    assert found["flat"].etta[0]["fields_removed"] == [0]
    assert found["small"].etta[0]["fields_removed"] == []
    assert 0 <= found["small"].etta[0]["field_spreads"][0] < 0.15 < found["flat"].etta[0]["field_spreads"][0]
    assert found["left"].etta[0]["field_gains"] is None


def test_threads_may_share_a_predictor():
    """Adaptation changes the networks while a case is predicted: another thread's case must wait for the end of it."""
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 3, 1)).eval()
    predictor = predictor_of(PredictionSettings(etta=EttaConfig(steps=3, learning_rate=0.05)), networks=[network])
    geometry = Geometry((20, 18, 16), (1, 1, 1))
    images = [blobs((20, 18, 16), seed).astype(np.float32) * (seed + 1) for seed in range(4)]
    alone = [predictor.predict_array(image, geometry) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: predictor.predict_array(image, geometry), images * 2))
    for found, expected in zip(together, alone * 2, strict=True):
        assert np.array_equal(found.labels, expected.labels)
        assert found.etta == expected.etta


@pytest.mark.parametrize("dataset", [DATASET, REGIONS])
def test_windows_of_air_are_left_out_on_demand(dataset):
    """The same label map where the body is, with fewer windows; what lies outside of every window is background."""
    image = np.full((1, 40, 60, 90), 0.1, np.float32)
    image[0, 4:20, 5:20, 6:22] = blobs((16, 15, 16)) + 0.5
    image[0, 30:36, 48:55, 80:88] = 2.0  # another part of the body, such as an arm
    seen = []

    class Watching(Identity if dataset is DATASET else Regions):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    network = (Watching(1, 3) if dataset is DATASET else Watching()).eval()
    geometry = Geometry((40, 60, 90), (3.0, 1.0, 0.7))
    results, counts = [], []
    for skip in (False, True):
        seen.clear()
        predictor = predictor_of(PredictionSettings(skip_empty=skip), (3.0, 1.0, 0.7), dataset, [network])
        results.append(predictor.predict_array(image, geometry).labels)
        counts.append(len(seen))
    assert np.array_equal(*results)
    assert (results[0][30:36, 48:55, 80:88] == 7).all()
    assert counts[1] < counts[0] / 2


def test_a_constant_image_has_no_air(caplog):
    predictor = predictor_of(PredictionSettings(skip_empty=True))
    labels = predictor.predict_array(np.ones((1, 20, 20, 20), np.float32), Geometry((20, 20, 20), (1, 1, 1))).labels
    assert (labels == 2).all()
    assert "--skip-empty: the image is constant" in caplog.text
    assert "all of it is predicted" in caplog.text


@pytest.mark.parametrize(
    ("axes", "mirror", "passes"),
    [((), True, 5), ((0,), True, 6), ((0, 1, 2), True, 12), ((0, 1, 2), False, 5)],
)
def test_only_the_flips_of_training_are_averaged_over_and_changes_of_intensity(axes, mirror, passes):
    seen = []

    class Watching(Identity):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    predictor = predictor_of(PredictionSettings(tta=True, mirror=mirror), networks=[Watching(1, 3).eval()], mirror=axes)
    predictor.predict_array(blobs((16, 16, 16)).astype(np.float32), Geometry((16, 16, 16), (1, 1, 1)))
    assert len(seen) == passes
    plain, changed = seen[0], seen[-4:]
    for view, (factor, offset) in zip(changed, ((1.1, 0), (0.9, 0), (1, 0.1), (1, -0.1)), strict=True):
        torch.testing.assert_close(view, plain * factor + offset)
    assert all(torch.allclose(other.flatten().sort()[0], plain.flatten().sort()[0]) for other in seen[1:-4])


def test_unusable_images(tmp_path):
    predictor = predictor_of()
    geometry = Geometry((4, 4, 4), (1.0, 1.0, 1.0))
    with pytest.raises(DatasetError, match="NaN"):
        predictor.predict_array(np.full((1, 4, 4, 4), np.nan, np.float32), geometry)
    with pytest.raises(DatasetError, match="2 channels"):
        predictor.predict_array(np.ones((2, 4, 4, 4), np.float32), geometry)
    blank = predictor.predict_array(np.zeros((1, 4, 4, 4), np.float32), geometry)
    assert (blank.labels == 0).all()
    write_image(np.ones((4, 4, 4), np.float32), geometry, tmp_path / "in" / "a_0000.nii.gz")
    with pytest.raises(ConfigError, match="is the input folder"):
        predict(predictor, tmp_path / "in", tmp_path / "in", quiet=True)
    image = tmp_path / "in" / "scan.nii.gz"
    write_image(np.ones((4, 4, 4), np.float32), geometry, image)
    before = image.read_bytes()
    for output in (tmp_path / "in", image):
        with pytest.raises(ConfigError, match=r"would replace the image .*scan\.nii\.gz"):
            predict(predictor, image, output, quiet=True)
    assert image.read_bytes() == before
    with pytest.raises(ConfigError, match="--step-size"):
        PredictionSettings(step=0)


def test_real_image_round_trip(data_root, tmp_path):
    """Labels predicted on the real CT lie on its grid, voxel for voxel."""
    source = data_root / "totalsegmentator_ct" / "ct_0000.nii.gz"
    predictor = predictor_of(PredictionSettings(step=1.0), spacing=(3.0, 3.0, 3.0))
    predictor.predict_case([source], tmp_path / "o.nii.gz")
    image, geometry = read_image([source])
    labels, found = read_labels(tmp_path / "o.nii.gz")
    assert geometry.difference(found, ("a", "b")) is None
    if np.allclose(geometry.spacing_mm, 3.0, atol=1e-6):
        assert np.array_equal(labels, truth_of(image))
