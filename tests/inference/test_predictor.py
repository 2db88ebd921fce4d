"""Prediction end to end: geometry, folds, probabilities, resume, bad input; with networks that need no training."""

import dataclasses
import json
import math
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from ukbob_seg.dataset.image_io import Geometry, read_image, read_labels, write_image
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import CheckpointError, ConfigError, DatasetError
from ukbob_seg.inference import case_predictor, export
from ukbob_seg.inference.etta import EttaConfig
from ukbob_seg.inference.predict import find_jobs, predict
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.networks import compiled
from ukbob_seg.parallel import Part
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan, Plans
from ukbob_seg.preprocessing.storage import open_array
from ukbob_seg.training.checkpoint import ModelDescription, save_checkpoint

DATASET = {
    "channel_names": {"0": "noNorm"},
    "labels": {"background": 0, "low": 2, "high": 7},
    "file_ending": ".nii.gz",
}


class Identity(nn.Module):
    """Segments by thresholds of the intensity, so that the right answer is known for any image.

    ``norm`` gives it something to adapt: an affine LayerNorm over one value is a constant 0 plus bias.
    """

    def __init__(self, in_channels, out_channels, sharpness=50.0):
        super().__init__()
        self.norm = nn.LayerNorm(1)
        self.scale = nn.Parameter(torch.tensor(float(sharpness)))

    def forward(self, x):
        x = x[:, 0] + 0 * self.norm(x[:, 0, ..., None])[..., 0]
        bumps = [x.new_full(x.shape, 0.5), x, 3 * x - 2.4]  # argmax: < 0.5, 0.5..1.2, > 1.2
        return torch.stack(bumps, dim=1) * self.scale


REGIONS = {**DATASET, "labels": {"background": 0, "whole": [2, 7], "core": [7]}, "regions_class_order": [2, 7]}


class Regions(nn.Module):
    """The same thresholds as overlapping regions."""

    def forward(self, x):
        return torch.stack([x[:, 0] - 0.5, x[:, 0] - 1.2], dim=1)


def _plans(spacing=(1.0, 1.0, 1.0)):
    network = NetworkPlan((16, 16, 16), 1, {}, 0.1)
    configuration = ConfigurationPlan(spacing, (20, 20, 20), 1, {"identity": network})
    return Plans("Dataset001_Identity", "default", 1.0, (ChannelNormalization("no_norm"),), 2,
                 {"3d_fullres": configuration})  # fmt: skip


def _predictor(settings=None, spacing=(1.0, 1.0, 1.0), dataset=None, networks=None, mirror=(0, 1, 2)):
    description = ModelDescription(
        "identity", {}, "3d_fullres", "0", "softmax", mirror, _plans(spacing).to_json(), dataset or DATASET
    )
    return Predictor(networks or [Identity(1, 3).eval()], description, settings=settings)


def _truth(image):
    return np.where(image[0] > 1.2, 7, np.where(image[0] > 0.5, 2, 0)).astype(np.uint8)


def _blobs(shape, seed=0):
    """A smooth image whose labels are large compared with a voxel."""
    generator = np.random.default_rng(seed)
    coarse = generator.normal(0.7, 0.6, (4, 4, 4))
    from ukbob_seg.preprocessing.resampling import resample_image

    return resample_image(coarse[None], shape, 3)


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
    image = _blobs((22, 31, 27))
    geometry = Geometry((22, 31, 27), spacing, (5.0, -7.0, 11.0), DIRECTIONS[direction])
    write_image(image[0], geometry, tmp_path / "case_0000.nii.gz")
    _predictor(spacing=spacing).predict_case([tmp_path / "case_0000.nii.gz"], tmp_path / "out.nii.gz")
    labels, found = read_labels(tmp_path / "out.nii.gz")
    assert geometry.difference(found, ("input", "output")) is None
    assert np.array_equal(labels, _truth(image))


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_flipped_image_gives_flipped_labels(axes):
    """Exactly: cropping, windows and resampling must not favour a side."""
    image = _blobs((22, 31, 27))
    geometry = Geometry((22, 31, 27), (2.0, 1.0, 0.7))
    predictor = _predictor(spacing=(1.5, 1.5, 1.5))
    plain = predictor.predict_array(image, geometry).labels
    flipped = np.ascontiguousarray(np.flip(image, [a + 1 for a in axes]))
    result = predictor.predict_array(flipped, geometry).labels
    different = np.flip(result, axes) != plain
    assert different.mean() < 2e-3  # only where interpolated logits tie
    assert plain.max() == 7


def test_resampled_predictions_follow_the_image():
    image = _blobs((22, 31, 27))
    labels = _predictor(spacing=(1.5, 1.0, 1.2)).predict_array(image, Geometry((22, 31, 27), (1.0, 1.0, 1.0))).labels
    truth = _truth(image)
    dice = 2 * ((labels == 7) & (truth == 7)).sum() / ((labels == 7).sum() + (truth == 7).sum())
    assert dice > 0.93


def test_empty_borders_are_cropped_and_put_back():
    image = np.zeros((1, 40, 40, 40), np.float32)
    image[:, 12:30, 9:33, 15:31] = np.abs(_blobs((18, 24, 16))) + 0.01
    labels = _predictor().predict_array(image, Geometry((40, 40, 40), (1.0, 1.0, 1.0))).labels
    assert np.array_equal(labels, _truth(image))


def test_an_image_smaller_than_the_patch():
    image = _blobs((5, 9, 16))
    labels = _predictor().predict_array(image, Geometry((5, 9, 16), (1.0, 1.0, 1.0))).labels
    assert np.array_equal(labels, _truth(image))


@pytest.mark.parametrize("settings", [
    PredictionSettings(tta=True),
    PredictionSettings(window_batch=3, step=0.3),
    PredictionSettings(etta=EttaConfig(steps=2)),
])  # fmt: skip
def test_settings_do_not_change_a_perfect_network(settings):
    image = _blobs((22, 31, 27))
    result = _predictor(settings).predict_array(image, Geometry((22, 31, 27), (1.0, 1.0, 1.0)))
    assert np.array_equal(result.labels, _truth(image))
    assert bool(result.etta) == (settings.etta is not None)


@pytest.mark.parametrize("etta", [None, EttaConfig(steps=2)])
def test_compiled_networks_predict_the_same(monkeypatch, caplog, etta):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    image = _blobs((22, 31, 27))
    with _predictor(PredictionSettings(etta=etta, compile=True)) as predictor:
        for _ in range(2):  # ETTA changes the weights in place, and back
            result = predictor.predict_array(image, Geometry((22, 31, 27), (1.0, 1.0, 1.0)))
            assert np.array_equal(result.labels, _truth(image))
    assert not any("could not be compiled" in record.getMessage() for record in caplog.records)


def test_regions_are_written_in_order():
    for spacing in ((1.0, 1.0, 1.0), (1.4, 1.0, 1.0)):
        predictor = _predictor(dataset=REGIONS, networks=[Regions()], spacing=spacing)
        image = _blobs((22, 31, 27))
        labels = predictor.predict_array(image, Geometry((22, 31, 27), (1.0, 1.0, 1.0))).labels
        agree = (labels == _truth(image)).mean()
        assert agree == 1 if spacing[0] == 1.0 else agree > 0.95


def test_probabilities(tmp_path):
    image = np.zeros((1, 20, 20, 20), np.float32)
    image[:, 3:18, 2:19, 4:20] = np.abs(_blobs((15, 17, 16))) + 0.01
    path = tmp_path / "p.b2nd"
    labels = _predictor(networks=[Identity(1, 3, sharpness=2.0).eval()]).predict_array(
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
    assert np.array_equal(labels, _truth(image))


@pytest.mark.parametrize("regions", [False, True])
def test_logits_that_stay_on_the_device_give_the_same(tmp_path, monkeypatch, regions):
    """What a GPU runs, here on tensors of the CPU: labels equal, probabilities to the last bit."""
    given = {"dataset": REGIONS, "networks": [Regions()]} if regions else {}
    image = _blobs((22, 31, 27))
    geometry = Geometry((22, 31, 27), (5.0, 1.0, 1.0) if regions else (1.0, 1.0, 1.0))  # one with a coarse axis
    results = []
    for on_device in (False, True):
        monkeypatch.setattr(export, "_on_device", lambda logits, answer=on_device: answer)
        predictor = _predictor(spacing=(1.5, 1.0, 1.2), **given)
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
    image, geometry = _blobs((22, 31, 27)), Geometry((22, 31, 27), (1.0, 1.0, 1.0))
    truth = _truth(image)
    exclusive, regions = {}, {"dataset": REGIONS, "networks": [Regions()]}
    for given, name, expected in (
        (exclusive, "low", np.where(truth == 2, 2, 0)),
        (exclusive, "high", np.where(truth == 7, 7, 0)),
        (regions, "whole", np.where(truth > 0, 2, 0)),  # the core, which is left out, is part of it
        (regions, "core", np.where(truth == 7, 7, 0)),
    ):
        predictor = _predictor(PredictionSettings(classes=(name,), tta=tta), **given)
        assert np.array_equal(predictor.predict_array(image, geometry).labels, expected)
    with pytest.raises(ConfigError, match="no class 'liver'; choose from low, high"):
        _predictor(PredictionSettings(classes=("liver",)))


def _model_folder(tmp_path, folds=("0", "1")):
    import sys

    sys.modules.setdefault("identity_network", sys.modules[__name__])
    plans = _plans().to_json()
    plans["configurations"]["3d_fullres"]["networks"]["identity_network:Identity"] = plans["configurations"][
        "3d_fullres"
    ]["networks"].pop("identity")
    folder = tmp_path / "3d_fullres__identity"
    for fold in folds:
        network = Identity(1, 3, sharpness=float(fold) + 1)
        description = ModelDescription(
            "identity_network:Identity", {}, "3d_fullres", fold, "softmax", (0,), plans, DATASET
        )
        save_checkpoint(folder / f"fold_{fold}" / "checkpoint_best.pt", description, network.state_dict())
    return folder


def test_a_model_folder_predicts_a_folder_and_resumes(tmp_path):
    folder = _model_folder(tmp_path)
    for i in range(3):
        write_image(_blobs((20, 20, 20), i)[0], Geometry((20, 20, 20), (1, 1, 1)), tmp_path / f"in/c{i}_0000.nii.gz")
    with Predictor.from_model_folder(folder) as predictor:
        written = predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True, arguments={"folds": None})
        assert [path.name for path in written] == ["c0.nii.gz", "c1.nii.gz", "c2.nii.gz"]
        for i, path in enumerate(written):
            assert np.array_equal(read_labels(path)[0], _truth(_blobs((20, 20, 20), i)))
        assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == DATASET
        assert (tmp_path / "out" / "plans.json").is_file()
        assert json.loads((tmp_path / "out" / "predict_args.json").read_text()) == {"folds": None}
        written[1].unlink()
        before = written[0].stat().st_mtime_ns
        predict(predictor, tmp_path / "in", tmp_path / "out", resume=True, quiet=True)
        assert written[1].is_file()
        assert written[0].stat().st_mtime_ns == before
        predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True)
        assert written[0].stat().st_mtime_ns > before


SIDE_FILES = ("probabilities.b2nd", "preview.png", "statistics.json")
EVERYTHING = PredictionSettings(save_probabilities=True, preview=True, statistics=True, step=1.0)


def _images(folder, count, spacing=(3.0, 1.0, 0.7)):
    for i in range(count):
        write_image(_blobs((20, 20, 20), i)[0], Geometry((20, 20, 20), spacing), folder / f"c{i}_0000.nii.gz")


def test_parts_share_the_cases_and_one_output_folder(tmp_path):
    _images(tmp_path / "in", 5)
    predictor = _predictor(PredictionSettings(step=1.0))
    out, note = tmp_path / "out", {"folds": None}
    expected = {1: ["c0", "c2", "c4"], 2: ["c1", "c3"]}
    kept = None
    for number in (2, 1):
        written = predict(predictor, tmp_path / "in", out, part=Part(number, 2), arguments=note, quiet=True)
        assert [path.name for path in written] == [f"{name}.nii.gz" for name in expected[number]]
        model = {name: (out / name).read_bytes() for name in ("dataset.json", "plans.json", "predict_args.json")}
        assert kept in (None, model)
        kept = model
    whole = predict(predictor, tmp_path / "in", tmp_path / "whole", arguments=note, quiet=True)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for path in whole:
        assert (out / path.name).read_bytes() == path.read_bytes()
    (out / "c1.nii.gz").unlink()
    (out / "c2.nii.gz").unlink()
    predict(predictor, tmp_path / "in", out, part=Part(2, 2), resume=True, quiet=True)
    assert (out / "c1.nii.gz").is_file()
    assert not (out / "c2.nii.gz").exists()  # of the other part
    assert predict(predictor, tmp_path / "in", out, part=Part(7, 9), quiet=True) == []  # more parts than cases


@pytest.mark.parametrize("stopped_by", ["write_labels", "case_statistics"])
def test_the_label_file_is_written_last_of_all(tmp_path, monkeypatch, stopped_by):
    _images(tmp_path / "in", 1)
    predictor, out = _predictor(EVERYTHING), tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"ukbob_seg.inference.case_predictor.{stopped_by}", stop)
        with pytest.raises(KeyboardInterrupt):
            predict(predictor, tmp_path / "in", out, quiet=True)
    assert not (out / "c0.nii.gz").exists()
    assert all((out / f"c0_{name}").is_file() for name in SIDE_FILES) == (stopped_by == "write_labels")
    predict(predictor, tmp_path / "in", out, resume=True, quiet=True)
    names = {"c0.nii.gz", *(f"c0_{name}" for name in SIDE_FILES), "dataset.json", "plans.json", "predict_args.json"}
    assert {path.name for path in out.iterdir()} == names


def test_statistics_are_those_of_the_written_labels_and_the_file(tmp_path):
    _images(tmp_path / "in", 1)
    settings = PredictionSettings(step=1.0, statistics=True, classes=("high",))
    predict(_predictor(settings), tmp_path / "in", tmp_path / "out", quiet=True)
    found = json.loads((tmp_path / "out" / "c0_statistics.json").read_text())
    image, labels = _blobs((20, 20, 20), 0)[0], read_labels(tmp_path / "out" / "c0.nii.gz")[0]
    assert found["spacing_mm"] == pytest.approx([3, 1, 0.7])
    assert set(found["classes"]) == {"high"}
    high = found["classes"]["high"]
    assert high["voxels"] == (labels == 7).sum() > 0
    assert high["volume_ml"] == pytest.approx(high["voxels"] * 2.1e-3)
    assert high["mean"] == pytest.approx([image[labels == 7].mean()])


def _many_cases(folder, count=4):
    for number in range(count):
        image = _blobs((16, 15, 14), number).astype(np.float32)
        write_image(image[0], Geometry((16, 15, 14), (3.0, 1.0, 0.7)), folder / f"case_{number}_0000.nii.gz")


def test_the_next_case_is_read_while_the_networks_work(tmp_path, monkeypatch):
    """The first case waits inside the network until the second has been read; one at a time that would never happen."""
    _many_cases(tmp_path / "in")
    read, second_is_read, waited = [], threading.Event(), []

    def noting(images):
        read.append(images[0].name)
        if len(read) == 2:
            second_is_read.set()
        return read_image(images)

    class Waiting(Identity):
        def forward(self, x):
            if not waited:
                waited.append(second_is_read.wait(20))
            return super().forward(x)

    monkeypatch.setattr(case_predictor, "read_image", noting)
    predictor = _predictor(networks=[Waiting(1, 3).eval()])
    written = predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True)
    assert waited == [True]
    alone = _predictor(PredictionSettings(overlap=False))
    expected = predict(alone, tmp_path / "in", tmp_path / "alone", quiet=True)
    assert [path.name for path in written] == [path.name for path in expected]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(written, expected, strict=True))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failing_case_ends_the_others_and_finished_ones_stay(tmp_path, overlap):
    _many_cases(tmp_path / "in", 6)
    (tmp_path / "in" / "case_2_0000.nii.gz").write_bytes(b"broken")
    predictor = _predictor(PredictionSettings(overlap=overlap))
    with pytest.raises(DatasetError, match="case_2_0000"):
        predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "case_0.nii.gz" in names
    assert "case_5.nii.gz" not in names
    assert not any(name.startswith(".") for name in names)
    _many_cases(tmp_path / "in", 3)
    predict(predictor, tmp_path / "in", tmp_path / "out", resume=True, quiet=True)
    assert sum(path.name.endswith(".nii.gz") for path in (tmp_path / "out").iterdir()) == 6


def test_an_interrupt_ends_adaptation_too(tmp_path):
    _many_cases(tmp_path / "in", 3)
    passes = []

    class Endless(Identity):
        def forward(self, x):
            passes.append(1)
            if len(passes) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            return super().forward(x)

    settings = PredictionSettings(etta=EttaConfig.of_mode("paper", steps=50))
    with pytest.raises(KeyboardInterrupt):
        predict(_predictor(settings, networks=[Endless(1, 3).eval()]), tmp_path / "in", tmp_path / "out", quiet=True)
    assert len(passes) < 6


def test_a_closed_predictor_says_so():
    predictor = _predictor()
    predictor.close()
    with pytest.raises(ConfigError, match="this predictor is closed; load the model again"):
        predictor.predict_array(_blobs((16, 16, 16)).astype(np.float32), Geometry((16, 16, 16), (1, 1, 1)))


def test_an_interrupt_ends_prediction_at_the_next_window(tmp_path, monkeypatch):
    _many_cases(tmp_path / "in", 8)
    windows = []

    class Endless(Identity):
        def forward(self, x):
            windows.append(1)
            if len(windows) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            return super().forward(x)

    predictor = _predictor(networks=[Endless(1, 3).eval()])
    with pytest.raises(KeyboardInterrupt):
        predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True)
    assert len(windows) < 6  # one in each case: those that were begun end, no other begins
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) < 6
    assert not list((tmp_path / "out").glob(".*"))


def test_etta_leaves_a_record_and_any_order_gives_the_same(tmp_path):
    folder = _model_folder(tmp_path, ("0",))
    cases = [_blobs((20, 20, 20), i) for i in range(2)]
    geometry = Geometry((20, 20, 20), (1.0, 1.0, 1.0))
    with Predictor.from_model_folder(folder, settings=PredictionSettings(etta=EttaConfig(steps=1))) as predictor:
        first = [predictor.predict_array(case, geometry) for case in cases]
        second = [predictor.predict_array(case, geometry) for case in reversed(cases)][::-1]
        for a, b in zip(first, second, strict=True):
            assert np.array_equal(a.labels, b.labels)
            assert a.etta == b.etta
        write_image(cases[0][0], geometry, tmp_path / "one_0000.nii.gz")
        predictor.predict_case([tmp_path / "one_0000.nii.gz"], tmp_path / "one.nii.gz")
    (record,) = json.loads((tmp_path / "one_etta.json").read_text())["folds"]
    assert record["adapted_parameters"] == 2
    assert set(record) >= {"decision", "entropy_before", "entropy_after", "voxels_changed", "steps"}


def test_etta_divides_a_field_out_before_anything_else():
    """The network only compares with thresholds, so what helps is the image that it is given."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, (10, 10, 10)).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    clean = np.array([0.3, 1.0, 2.2])[kinds] + rng.normal(scale=0.02, size=kinds.shape)
    shaded = clean * np.exp(np.linspace(-1, 1, 40)[:, None, None] + np.linspace(-0.5, 0.5, 40))
    plans = _plans().to_json()
    plans["normalization"] = [dataclasses.asdict(ChannelNormalization("zscore"))]
    geometry = Geometry(clean.shape, (1.0, 1.0, 1.0))
    found = {}
    for name, image, etta in (
        ("clean", clean, None), ("shaded", shaded, None), ("flat", shaded, EttaConfig(steps=0)),
        ("left", shaded, EttaConfig(steps=0, least_field_gain=None)), ("small", clean, EttaConfig(steps=0)),
    ):  # fmt: skip
        description = ModelDescription("identity", {}, "3d_fullres", "0", "softmax", (0,), plans, DATASET)
        with Predictor([Identity(1, 3).eval()], description, settings=PredictionSettings(etta=etta)) as predictor:
            found[name] = predictor.predict_array(image[None].astype(np.float32), geometry)
    clear, shade, flat, left, small = (found[name].labels for name in ("clean", "shaded", "flat", "left", "small"))
    assert (shade != clear).mean() > 0.15
    assert (flat != clear).mean() < 0.5 * (shade != clear).mean()
    assert np.array_equal(left, shade)
    assert np.array_equal(small, clear)
    assert found["flat"].etta[0]["fields_removed"] == [0]
    assert found["small"].etta[0]["fields_removed"] == []
    assert 0 <= found["small"].etta[0]["field_spreads"][0] < 0.15 < found["flat"].etta[0]["field_spreads"][0]
    assert found["left"].etta[0]["field_gains"] is None


def test_folds_that_are_not_there(tmp_path):
    folder = _model_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint_best\.pt for fold 3 \(trained: 0, 1\)"):
        Predictor.from_model_folder(folder, ["0", "3"])
    with pytest.raises(ConfigError, match="fold 0 is given twice"):
        Predictor.from_model_folder(folder, ["0", "1", "0"])
    with pytest.raises(CheckpointError, match=r"no checkpoint_final\.pt for fold any \(trained: none\)"):
        Predictor.from_model_folder(folder, checkpoint="final")
    with pytest.raises(CheckpointError, match="does not exist; train first"):
        Predictor.from_model_folder(tmp_path / "nothing")
    (folder / "fold_1" / "checkpoint_best.pt").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="damaged"):
        Predictor.from_model_folder(folder)


def test_a_model_folders_postprocessing_is_done_unless_declined(tmp_path, caplog):
    folder = _model_folder(tmp_path)
    (folder / "postprocessing.json").write_text(json.dumps({"largest_component": ["high"]}))
    image = np.zeros((1, 24, 24, 24), np.float32)
    image[0, 2:8, 2:8, 2:8] = 2.0
    image[0, 20:22, 20:22, 20:22] = 2.0
    geometry = Geometry((24, 24, 24), (1, 1, 1))
    with caplog.at_level("INFO", logger="ukbob_seg"), Predictor.from_model_folder(folder) as predictor:
        assert (predictor.predict_array(image, geometry).labels == 7).sum() == 6**3
    assert "stray pieces are removed of high (postprocessing.json)" in caplog.text
    with Predictor.from_model_folder(folder, settings=PredictionSettings(postprocessing=False)) as predictor:
        assert (predictor.predict_array(image, geometry).labels == 7).sum() == 6**3 + 2**3
    for names, voxels in ((("high",), 6**3), (("low",), 0)):
        with Predictor.from_model_folder(folder, settings=PredictionSettings(classes=names)) as predictor:
            assert (predictor.predict_array(image, geometry).labels == 7).sum() == voxels


def test_threads_may_share_a_predictor():
    """Adaptation changes the networks while a case is predicted: another thread's case must wait for the end of it."""
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 3, 1)).eval()
    predictor = _predictor(PredictionSettings(etta=EttaConfig(steps=3, learning_rate=0.05)), networks=[network])
    geometry = Geometry((20, 18, 16), (1, 1, 1))
    images = [_blobs((20, 18, 16), seed).astype(np.float32) * (seed + 1) for seed in range(4)]
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
    image[0, 4:20, 5:20, 6:22] = _blobs((16, 15, 16)) + 0.5
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
        predictor = _predictor(PredictionSettings(skip_empty=skip), (3.0, 1.0, 0.7), dataset, [network])
        results.append(predictor.predict_array(image, geometry).labels)
        counts.append(len(seen))
    assert np.array_equal(*results)
    assert (results[0][30:36, 48:55, 80:88] == 7).all()
    assert counts[1] < counts[0] / 2
    with pytest.raises(DatasetError, match=r"--skip-empty: the image is constant.*; predict this case without it"):
        predictor.predict_array(np.ones((1, 20, 20, 20), np.float32), Geometry((20, 20, 20), (1, 1, 1)))


@pytest.mark.parametrize(("axes", "passes"), [((), 5), ((0,), 6), ((0, 1, 2), 12)])
def test_only_the_flips_of_training_are_averaged_over_and_changes_of_intensity(axes, passes):
    seen = []

    class Watching(Identity):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    predictor = _predictor(PredictionSettings(tta=True), networks=[Watching(1, 3).eval()], mirror=axes)
    predictor.predict_array(_blobs((16, 16, 16)).astype(np.float32), Geometry((16, 16, 16), (1, 1, 1)))
    assert len(seen) == passes
    plain, changed = seen[0], seen[-4:]
    for view, (factor, offset) in zip(changed, ((1.1, 0), (0.9, 0), (1, 0.1), (1, -0.1)), strict=True):
        torch.testing.assert_close(view, plain * factor + offset)
    assert all(torch.allclose(other.flatten().sort()[0], plain.flatten().sort()[0]) for other in seen[1:-4])


def test_finding_jobs(tmp_path):
    spec = DatasetSpec.from_json({**DATASET, "channel_names": {"0": "fat", "1": "water"}}, "Dataset001_X")
    for name in ("a_0000", "a_0001", "b_0000"):
        write_image(np.ones((2, 2, 2), np.float32), Geometry((2, 2, 2), (1, 1, 1)), tmp_path / f"in/{name}.nii.gz")
    with pytest.raises(DatasetError, match=r"case b: missing channel b_0001\.nii\.gz"):
        find_jobs(tmp_path / "in", tmp_path / "out", spec)
    (job,) = find_jobs(tmp_path / "in" / "a_0000.nii.gz", tmp_path / "out.nii.gz", spec)
    assert [path.name for path in job.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert job.output == tmp_path / "out.nii.gz"
    with pytest.raises(DatasetError, match=r"out\.png ends like a file .* ends in \.mha, \.nii, \.nii\.gz, \.nrrd"):
        find_jobs(tmp_path / "in" / "a_0000.nii.gz", tmp_path / "out.png", spec)
    with pytest.raises(DatasetError, match="takes 2 channels; missing"):
        find_jobs(tmp_path / "in" / "b_0000.nii.gz", tmp_path / "out", spec)
    with pytest.raises(DatasetError, match="does not exist"):
        find_jobs(tmp_path / "none", tmp_path / "out", spec)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no cases in"):
        find_jobs(tmp_path / "empty", tmp_path / "out", spec)


def test_unusable_images(tmp_path):
    predictor = _predictor()
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
    predictor = _predictor(PredictionSettings(step=1.0), spacing=(3.0, 3.0, 3.0))
    predictor.predict_case([source], tmp_path / "o.nii.gz")
    image, geometry = read_image([source])
    labels, found = read_labels(tmp_path / "o.nii.gz")
    assert geometry.difference(found, ("a", "b")) is None
    if np.allclose(geometry.spacing_mm, 3.0, atol=1e-6):
        assert np.array_equal(labels, _truth(image))
