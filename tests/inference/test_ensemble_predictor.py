"""Several models at once against whole volumes, and against saved probabilities that are averaged afterwards."""

import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ukbob_seg.dataset.image_io import Geometry, read_labels, write_image
from ukbob_seg.errors import CheckpointError, ConfigError
from ukbob_seg.inference import export
from ukbob_seg.inference.ensemble import ensemble
from ukbob_seg.inference.ensemble_predictor import EnsemblePredictor, in_blocks, load_predictor
from ukbob_seg.inference.etta import EttaConfig
from ukbob_seg.inference.passes import AveragedPasses
from ukbob_seg.inference.predict import predict
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.inference.sliding_window import WindowSettings, predict_logits
from ukbob_seg.preprocessing import resampling
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan, Plans
from ukbob_seg.preprocessing.preprocessor import preprocess_image
from ukbob_seg.preprocessing.storage import open_array
from ukbob_seg.training.checkpoint import ModelDescription, save_checkpoint

CLASSES = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "low": 2, "high": 7}, "file_ending": ".nii.gz"}
REGIONS = {**CLASSES, "labels": {"background": 0, "whole": [2, 7], "core": [7]}, "regions_class_order": [2, 7]}
FLOAT16_STEP = 2.0**-11  # of values from 0.5 to 1


class Small(nn.Module):
    """Sees its neighbourhood, and has affine layers to adapt."""

    def __init__(self, in_channels, out_channels, seed=0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(in_channels, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.ReLU(),
            nn.Conv3d(4, out_channels, 3, padding=1),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.layers[0], self.layers[3]):
            nn.init.normal_(layer.weight, std=0.5, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.layers(x)


def _plans(spacing, network="small", previous=None):
    plan = NetworkPlan((16, 12, 12), 1, {}, 0.1)
    configurations = {"3d_fullres": ConfigurationPlan(spacing, (20, 20, 20), 1, {network: plan})}
    if previous is not None:
        configurations["3d_lowres"] = ConfigurationPlan(previous, (20, 20, 20), 1, {network: plan})
        configurations["3d_cascade_fullres"] = ConfigurationPlan(
            spacing, (20, 20, 20), 1, {network: plan}, previous_stage="3d_lowres", arrays_of="3d_fullres"
        )
    return Plans("Dataset001_Small", "default", 1.0, (ChannelNormalization("no_norm"),), None, configurations)


def _member(spacing, seeds=(0,), dataset=CLASSES, settings=None, device="cpu"):
    regions = "regions_class_order" in dataset
    networks = [Small(1, 2 if regions else 3, seed).eval() for seed in seeds]
    head = "sigmoid" if regions else "softmax"
    description = ModelDescription("small", {}, "3d_fullres", "0", head, (), _plans(spacing).to_json(), dataset)
    return Predictor(networks, description, device, settings)


def _image(shape, margin=(0, 0, 0), seed=0):
    """A smooth image (1, Z, Y, X) without a zero, in a frame of zeros."""
    coarse = np.random.default_rng(seed).normal(1.0, 0.8, (1, 4, 5, 6))
    inner = np.abs(resampling.resample_image(coarse, shape, 3)) + 0.01
    return np.pad(inner, [(0, 0), *((m, m + 1 if m else 0) for m in margin)]).astype(np.float32)


CASES = {
    "anisotropic": (_image((19, 26, 31)), (3.0, 1.0, 0.7)),
    "cropped": (_image((14, 20, 25), (5, 3, 2)), (3.0, 1.0, 0.7)),
    "padded": (_image((5, 9, 8)), (1.0, 1.3, 0.7)),
}


def _whole_probabilities(member, image, geometry):
    """Of one model on the file's grid, (K, Z, Y, X) float32, at full size and without anything clever."""
    array, properties = preprocess_image(image, geometry, member.plans, member.configuration)
    windows = WindowSettings((16, 12, 12))
    logits = predict_logits(AveragedPasses(member._networks), torch.from_numpy(array.copy()), windows)
    box = tuple(s.stop - s.start for s in properties.box)
    planes = resampling.PlaneRange(0, box[0])
    values = torch.from_numpy(resampling.resample_logits_planes(logits.numpy(), box, planes, properties.coarse_axis))
    values = values.softmax(0) if member.description.head == "softmax" else values.sigmoid()
    result = np.zeros((len(values), *geometry.shape), np.float32)
    result[0] = member.description.head == "softmax"
    result[(slice(None), *properties.box)] = values.numpy()
    return result


def _labels(mean):
    if len(mean) == 2:
        return np.where(mean[1] > 0.5, 7, np.where(mean[0] > 0.5, 2, 0))
    return np.array([0, 2, 7])[mean.argmax(0)]


@pytest.mark.parametrize("dataset", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("case", CASES)
def test_planes_in_step_equal_whole_volumes(tmp_path, case, dataset):
    """Three models at spacings of their own, one of two folds."""
    image, spacing = CASES[case]
    geometry = Geometry(image.shape[1:], spacing)
    members = {
        "a": _member((3.0, 1.0, 0.7), (0,), dataset),
        "b": _member((1.1, 1.6, 1.2), (1, 2), dataset),
        "c": _member((4.0, 0.9, 0.9), (3,), dataset),
    }
    path = tmp_path / "p.b2nd"
    with EnsemblePredictor(members) as predictor:
        whole = [_whole_probabilities(member, image, geometry) for member in members.values()]
        labels = predictor.predict_array(image, geometry, path).labels
        assert np.array_equal(predictor.predict_array(image, geometry).labels, labels)
    mean = sum(whole) / 3
    expected = _labels(mean)
    assert len(np.unique(expected)) == 3
    assert all((_labels(alone) != expected).any() for alone in whole)  # each model matters
    assert np.array_equal(labels, expected)
    stored = open_array(path)
    assert stored.dtype == np.float16
    assert np.abs(stored[:] - mean).max() <= FLOAT16_STEP / 2 + 1e-6


@pytest.mark.parametrize("dataset", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_logits_that_stay_on_the_device_give_the_same(tmp_path, monkeypatch, dataset):
    """What a GPU runs, here on tensors of the CPU: labels equal, probabilities to the last bit."""
    image, spacing = CASES["cropped"]
    members = {"a": _member((3.0, 1.0, 0.7), (0,), dataset), "b": _member((1.1, 1.6, 1.2), (1,), dataset)}
    results = []
    for on_device in (False, True):
        monkeypatch.setattr(export, "_on_device", lambda logits, answer=on_device: answer)
        path = tmp_path / f"{on_device}.b2nd"
        labels = EnsemblePredictor(members).predict_array(image, Geometry(image.shape[1:], spacing), path).labels
        results.append((labels, open_array(path)[:]))
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dataset", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_on_the_fly_equals_saved_probabilities_up_to_their_rounding(tmp_path, dataset):
    """Labels may differ where the first two classes, or a region and a half, are closer than float16 can tell.

    Here in 215 of 35924 voxels with classes and 71 with regions. In 202 of the 215 one model is sure of one class and
    the other of another: 0.9999 is stored as 1, and the tie goes to the lower class.
    """
    differing = voxels = 0
    saving = PredictionSettings(save_probabilities=True)
    members = {
        "a": _member((3.0, 1.0, 0.7), (0,), dataset, saving),
        "b": _member((1.1, 1.6, 1.2), (1,), dataset, saving),
    }
    for name, (image, spacing) in CASES.items():
        write_image(image[0], Geometry(image.shape[1:], spacing), tmp_path / f"in/{name}_0000.nii.gz")
    for name, member in members.items():
        predict(member, tmp_path / "in", tmp_path / name, quiet=True)
    afterwards = ensemble([tmp_path / "a", tmp_path / "b"], tmp_path / "after", quiet=True)
    at_once = predict(EnsemblePredictor(members), tmp_path / "in", tmp_path / "once", quiet=True)
    assert [path.name for path in afterwards] == [path.name for path in at_once]
    for one, other, name in zip(afterwards, at_once, sorted(CASES), strict=True):
        (here, grid), (there, same) = read_labels(one), read_labels(other)
        assert grid.difference(same, ("after", "once")) is None
        image, spacing = CASES[name]
        exact = sum(_whole_probabilities(m, image, Geometry(image.shape[1:], spacing)) for m in members.values()) / 2
        if dataset is REGIONS:
            margin = np.abs(exact - 0.5).min(0)
        else:
            ordered = np.sort(exact, axis=0)
            margin = ordered[-1] - ordered[-2]
        assert margin[here != there].max(initial=0) <= FLOAT16_STEP
        differing, voxels = differing + int((here != there).sum()), voxels + here.size
    assert 0 < differing <= 1e-2 * voxels


def test_one_model_averaged_with_itself_is_that_model():
    image, spacing = CASES["cropped"]
    geometry = Geometry(image.shape[1:], spacing)
    one = _member((1.1, 1.6, 1.2))
    with EnsemblePredictor({"a": one, "b": _member((1.1, 1.6, 1.2))}) as both:
        assert np.array_equal(both.predict_array(image, geometry).labels, one.predict_array(image, geometry).labels)


def test_models_advance_in_step():
    """Otherwise the first would have to keep all of its probabilities until the last has made its own."""
    calls = []

    class Noted(Small):
        def __init__(self, name, seed):
            super().__init__(1, 3, seed)
            self.name = name

        def forward(self, x):
            calls.append(self.name)
            return super().forward(x)

    image = _image((120, 12, 12))
    members = {name: _member((1.0, 1.0, 1.0)) for name in "ab"}
    for seed, (name, member) in enumerate(members.items()):
        member._called = [Noted(name, seed).eval()]
    told = []
    with EnsemblePredictor(members) as predictor:
        predictor.predict_array(image, Geometry((120, 12, 12), (1.0, 1.0, 1.0)), progress=lambda *n: told.append(n))
    assert calls.count("a") == calls.count("b") == 14  # one window per position along z
    lead = list(itertools.accumulate(1 if name == "a" else -1 for name in calls))
    assert max(map(abs, lead)) <= 2
    assert told[-1] == (28, 28)


@given(counts=st.lists(st.integers(0, 11), max_size=12), depth=st.integers(1, 9))
def test_blocks_hold_the_same_planes(counts, depth):
    planes = torch.arange(sum(counts), dtype=torch.float32)[None, :, None, None]
    blocks = list(in_blocks(planes.split(counts, dim=1) if counts else [], depth))
    assert all(block.shape[1] == depth for block in blocks[:-1])
    assert not blocks or 1 <= blocks[-1].shape[1] <= depth
    assert torch.equal(torch.cat([planes[:, :0], *blocks], dim=1), planes)


class _Cascade(nn.Module):
    """Raises the logit of the class that the first stage chose."""

    def forward(self, x):
        return nn.functional.one_hot(x[:, 1].long(), 3).movedim(-1, 1).float() + 0.2 * x[:, :1]


def test_a_cascade_is_a_member_like_any_other():
    image, spacing = CASES["anisotropic"]
    geometry = Geometry(image.shape[1:], spacing)
    plans = _plans((2.0, 1.0, 1.0), previous=(4.0, 2.0, 2.0)).to_json()
    low = ModelDescription("small", {}, "3d_lowres", "0", "softmax", (), plans, CLASSES)
    high = ModelDescription("small", {}, "3d_cascade_fullres", "0", "softmax", (), plans, CLASSES)
    settings = PredictionSettings(etta=EttaConfig(steps=1))
    plain, twin = (Predictor([_Cascade()], high, previous_stage=Predictor([Small(1, 3, 5).eval()], low)) for _ in "ab")
    with pytest.raises(ConfigError, match="one predictor serves two models"):
        EnsemblePredictor({"cascade": plain, "low": plain.stages()[1]})
    with EnsemblePredictor({"cascade": plain, "twin": twin}) as predictor:
        found = predictor.predict_array(image, geometry).labels
        assert np.array_equal(found, plain.predict_array(image, geometry).labels)
        assert len(np.unique(found)) == 3
    first = Predictor([Small(1, 3, 5).eval()], low, settings=settings)
    adapting = Predictor([Small(2, 3, 6).eval()], high, settings=settings, previous_stage=first)
    with EnsemblePredictor({"cascade": adapting, "plain": _member((3.0, 1.0, 0.7), settings=settings)}) as predictor:
        cascade, single = predictor.predict_array(image, geometry).etta_record()["models"]
    assert cascade["previous_stage"]["folds"][0]["adapted_parameters"] == 8
    assert set(single) == {"model", "folds"}


def test_etta_adapts_each_model_by_itself(tmp_path):
    settings = PredictionSettings(etta=EttaConfig(steps=1))
    members = {
        "a": _member((3.0, 1.0, 0.7), (0, 4), settings=settings),
        "b": _member((1.1, 1.6, 1.2), (1,), settings=settings),
    }
    before = [p.clone() for m in members.values() for n in m._networks for p in n.state_dict().values()]
    geometries = {name: Geometry(image.shape[1:], spacing) for name, (image, spacing) in CASES.items()}
    with EnsemblePredictor(members) as predictor:
        first = {name: predictor.predict_array(CASES[name][0], geometries[name]) for name in CASES}
        for name in reversed(CASES):
            again = predictor.predict_array(CASES[name][0], geometries[name])
            assert np.array_equal(again.labels, first[name].labels)
            assert again.etta == first[name].etta
        after = [p for m in members.values() for n in m._networks for p in n.state_dict().values()]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        alone = members["b"].predict_array(CASES["cropped"][0], geometries["cropped"])
        image = tmp_path / "c_0000.nii.gz"
        write_image(CASES["cropped"][0][0], geometries["cropped"], image)
        predictor.predict_case([image], tmp_path / "c.nii.gz")
    record = json.loads((tmp_path / "c_etta.json").read_text())
    assert [(model["model"], len(model["folds"])) for model in record["models"]] == [("a", 2), ("b", 1)]
    assert record["models"][1]["folds"] == alone.etta_record()["folds"]  # as without the other model


def test_threads_may_share_an_ensemble():
    settings = PredictionSettings(etta=EttaConfig(steps=1))
    members = {name: _member((1.5, 1.0, 1.2), (n,), settings=settings) for n, name in enumerate("ab")}
    image, spacing = CASES["cropped"]
    images = [image, image[:, :, ::-1].copy()] * 2
    with EnsemblePredictor(members) as predictor, ThreadPoolExecutor(4) as threads:
        expected = [predictor.predict_array(one, Geometry(image.shape[1:], spacing)).labels for one in images]
        found = threads.map(lambda one: predictor.predict_array(one, Geometry(image.shape[1:], spacing)).labels, images)
        assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_models_that_cannot_be_averaged():
    with pytest.raises(ConfigError, match="at least one model"):
        EnsemblePredictor({})
    one = _member((1.0, 1.0, 1.0))
    other = {**CLASSES, "labels": {"background": 0, "low": 2, "top": 7}}
    with pytest.raises(CheckpointError, match="labels differ: high = 7 in one, top = 7 in two; only models"):
        EnsemblePredictor({"one": one, "two": _member((1.0, 1.0, 1.0), dataset=other)})
    other = {**CLASSES, "channel_names": {"0": "T2"}}
    with pytest.raises(CheckpointError, match="channels differ: T1 in one, T2 in two; only models"):
        EnsemblePredictor({"one": one, "two": _member((1.0, 1.0, 1.0), dataset=other)})


def _model_folder(tmp_path, name, spacing, seed, dataset=CLASSES):
    sys.modules.setdefault("small_network", sys.modules[__name__])
    network = "small_network:Small"
    description = ModelDescription(
        network, {}, "3d_fullres", "0", "softmax", (), _plans(spacing, network).to_json(), dataset
    )
    folder = tmp_path / name
    save_checkpoint(folder / "fold_0" / "checkpoint_best.pt", description, Small(1, 3, seed).state_dict())
    return folder


def test_model_folders_predict_a_folder_and_resume(tmp_path):
    folders = [_model_folder(tmp_path, "a", (3.0, 1.0, 0.7), 0), _model_folder(tmp_path, "b", (1.1, 1.6, 1.2), 1)]
    for name, (image, spacing) in CASES.items():
        write_image(image[0], Geometry(image.shape[1:], spacing), tmp_path / f"in/{name}_0000.nii.gz")
    with load_predictor(folders, settings=PredictionSettings(save_probabilities=True)) as predictor:
        assert isinstance(predictor, EnsemblePredictor)
        written = predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True)
        assert len(list((tmp_path / "out").glob("*_probabilities.b2nd"))) == len(CASES)
        for path in written:
            image, spacing = CASES[path.name.removesuffix(".nii.gz")]
            geometry = Geometry(image.shape[1:], spacing)
            assert np.array_equal(read_labels(path)[0], predictor.predict_array(image, geometry).labels)
        right = written[1].read_bytes()
        written[0].write_bytes(b"finished")
        written[1].unlink()
        predict(predictor, tmp_path / "in", tmp_path / "out", resume=True, quiet=True)
        assert written[0].read_bytes() == b"finished"
        assert written[1].read_bytes() == right
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == CLASSES
    with load_predictor(folders[:1]) as predictor:
        assert isinstance(predictor, Predictor)
    with pytest.raises(ConfigError, match="a is given twice; give each model once"):
        load_predictor([*folders, tmp_path / "b" / ".." / "a"])


def test_an_interruption_leaves_no_incomplete_file(tmp_path):
    """One of the models fails in the middle of a case."""
    saving = PredictionSettings(save_probabilities=True)
    members = {"a": _member((3.0, 1.0, 0.7), settings=saving), "b": _member((1.1, 1.6, 1.2), settings=saving)}
    image, spacing = CASES["cropped"]
    write_image(image[0], Geometry(image.shape[1:], spacing), tmp_path / "in" / "c_0000.nii.gz")
    calls = itertools.count()

    class Failing(Small):
        def forward(self, x):
            if next(calls) == 5:
                raise KeyboardInterrupt
            return super().forward(x)

    members["b"]._called = [Failing(1, 3).eval()]
    with EnsemblePredictor(members) as predictor, pytest.raises(KeyboardInterrupt):
        predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True)
    assert next(calls) == 6
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dataset.json", "plans.json", "predict_args.json",
    ]  # fmt: skip
