"""Class embeddings are what averaging all features would give; maps are repeatable; numbers mean what they say."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from threshold_network import Adaptable, model_folder, plans_of
from torch import nn

from ukbob_seg.benchmark.embeddings import (
    EmbeddingCase,
    EmbeddingModel,
    _of_regions,
    embed_cases,
    find_cases,
)
from ukbob_seg.benchmark.embeddings_features import class_features, features_of, find_head
from ukbob_seg.benchmark.embeddings_map import (
    choose_perplexity,
    make_map,
    nearest_centroids,
    standardised,
    tsne,
)
from ukbob_seg.benchmark.embeddings_report import apart, map_figure, write_report
from ukbob_seg.cli import benchmark
from ukbob_seg.dataset.image_io import Geometry, read_geometry, write_image, write_labels
from ukbob_seg.errors import CheckpointError, ConfigError, DatasetError
from ukbob_seg.inference.predictor import Predictor
from ukbob_seg.inference.settings import PredictionSettings
from ukbob_seg.inference.sliding_window import WindowSettings, gaussian_weights, predict_logits
from ukbob_seg.networks.registry import build_network, set_deep_supervision
from ukbob_seg.training.checkpoint import ModelDescription, load_network, save_checkpoint

PATCH = (8, 6, 10)
CONV = {
    "features_per_stage": [4, 8], "strides": [[1, 1, 1], [2, 2, 2]], "kernel_sizes": [[3, 3, 3]] * 2,
    "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "deep_supervision": True,
}  # fmt: skip
FLAT = {**CONV, "strides": [[1, 1], [2, 2]], "kernel_sizes": [[3, 3]] * 2, "slice_axis": 0, "deep_supervision": False}


def _network(outputs=4, seed=0):
    """Features that depend on where a voxel lies in its window, so that the weights of windows matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv3d(2, 5, 3, padding=1), nn.InstanceNorm3d(5), nn.ReLU(), nn.Conv3d(5, 7, 3, padding=1), nn.Tanh(),
            nn.Conv3d(7, outputs, 1),
        ).eval()  # fmt: skip


def _case(shape, seed=0):
    generator = np.random.default_rng(seed)
    image = torch.from_numpy(generator.normal(size=(2, *shape)).astype(np.float32))
    labels = generator.choice([0, 1, 2, 3, 255], size=shape, p=[0.5, 0.3, 0.14, 0.01, 0.05]).astype(np.uint8)
    return image, labels


def _naive(network, image, labels, settings, classes, weighted=True):
    """Accumulate the features of the whole volume as a prediction accumulates logits, then average them."""
    padded, inner = settings.pad(image)
    patch = settings.window(image.shape[1:])
    gauss = gaussian_weights(patch).double() if weighted else torch.ones(patch).double()
    total, weight = torch.zeros((7, *padded.shape[1:])).double(), torch.zeros(padded.shape[1:]).double()
    starts = settings.starts(padded.shape[1:])
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                place = (slice(z, z + patch[0]), slice(y, y + patch[1]), slice(x, x + patch[2]))
                with torch.no_grad():
                    found = network[:-1](padded[(slice(None), *place)][None])[0].double()
                total[(slice(None), *place)] += gauss * found
                weight[place] += gauss
    mean = (total / weight)[(slice(None), *inner)]
    return np.stack([mean[:, torch.from_numpy(labels == k)].mean(dim=1).numpy() for k in range(1, classes + 1)])


@pytest.mark.parametrize(
    ("shape", "step", "batch"), [((17, 11, 23), 0.5, 3), ((9, 6, 31), 0.3, 1), ((5, 4, 12), 0.5, 2)]
)
def test_streamed_means_are_those_of_the_whole_feature_volume(shape, step, batch):
    network, (image, labels) = _network(), _case(shape)
    settings = WindowSettings(PATCH, step, batch)
    with features_of(network, torch.zeros(1, 2, *PATCH), 4) as features:
        voxels, means = class_features(features, image, labels, 3, settings)
    expected = _naive(network, image, labels, settings, 3)
    assert voxels.tolist() == [int((labels == k).sum()) for k in (1, 2, 3)]
    np.testing.assert_allclose(means, expected, rtol=0, atol=2e-6)
    unweighted = _naive(network, image, labels, settings, 3, weighted=False)
    assert np.abs(unweighted - expected).max() > 1e-3  # else the comparison above could not fail for weights


def test_the_head_turns_them_into_the_mean_logits_of_the_prediction():
    network, (image, labels) = _network(), _case((14, 13, 15))
    settings = WindowSettings(PATCH, 0.5)
    with features_of(network, torch.zeros(1, 2, *PATCH), 4) as features:
        _, means = class_features(features, image, labels, 3, settings)
    with torch.no_grad():
        logits = predict_logits(network, image, settings)
        through_head = network[-1](torch.from_numpy(means.T[None, :, :, None, None]).float())[0, :, :, 0, 0].T
    for k in (1, 2, 3):
        mean = logits[:, torch.from_numpy(labels == k)].mean(dim=1)
        torch.testing.assert_close(through_head[k - 1], mean, rtol=0, atol=1e-5)


def test_classes_without_voxels_are_nan_and_their_windows_are_left_out():
    network, (image, _) = _network(), _case((20, 6, 10))
    labels = np.zeros((20, 6, 10), np.uint8)
    labels[1, 2, 3] = 2
    calls = []
    settings = WindowSettings(PATCH, 0.5)
    with features_of(network, torch.zeros(1, 2, *PATCH), 4) as features:
        voxels, means = class_features(features, image, labels, 3, settings, lambda *done: calls.append(done))
    assert voxels.tolist() == [0, 1, 0]
    assert np.isnan(means[[0, 2]]).all()
    assert np.isfinite(means[1]).all()
    assert calls == [(1, 1)]  # of four windows along z, one holds the voxel
    with features_of(network, torch.zeros(1, 2, *PATCH), 4) as features:
        voxels, means = class_features(features, image, np.zeros_like(labels), 3, settings)
    assert (voxels.sum(), means.shape) == (0, (3, 0))


@pytest.mark.parametrize(
    ("name", "arguments", "shape", "width"),
    [
        ("swin_unetr", {"feature_size": 12, "deep_supervision": True}, (64, 32, 32), 12),
        ("plain_conv_unet", CONV, (8, 8, 8), 4),
        ("residual_encoder_unet", CONV, (8, 8, 8), 4),
        ("resenc_unet_m", CONV, (8, 8, 8), 4),
        ("plain_conv_unet", FLAT, (3, 8, 8), 4),
        ("plain_conv_unet", {**FLAT, "previous_labels": 2}, (3, 8, 8), 4),
        ("plain_conv_unet", {**CONV, "previous_labels": 2}, (8, 8, 8), 4),
    ],
)
def test_every_network_has_a_head_whose_input_is_found(name, arguments, shape, width):
    if name != "swin_unetr":
        pytest.importorskip("dynamic_network_architectures")
    network = build_network(name, 2, 5, arguments).eval()
    set_deep_supervision(network, False)
    channels = 2 + ("previous_labels" in arguments)
    windows = torch.rand(2, channels, *shape)
    head = find_head(network, windows[:1], 5)
    with features_of(network, windows[:1], 5) as features, torch.no_grad():
        found, logits = features(windows), network(windows)
    assert found.shape == (2, width, *shape)
    weight, bias = head.weight.flatten(1), head.bias
    torch.testing.assert_close(
        torch.einsum("kf,bfzyx->bkzyx", weight, found) + bias[:, None, None, None], logits, rtol=0, atol=1e-4
    )
    assert not head._forward_pre_hooks  # nothing stays behind


def test_the_head_is_the_last_of_several_such_layers():
    network = nn.Sequential(nn.Conv3d(1, 3, 1), nn.ReLU(), nn.Conv3d(3, 3, 1)).eval()
    assert find_head(network, torch.zeros(1, 1, 4, 4, 4), 3) is network[2]


def test_networks_without_a_head_are_refused():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv3d(1, 6, 1)

        def forward(self, x):
            return self.layer(x)[:, :3] * self.layer(x)[:, 3:]

    class Coarse(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv3d(1, 3, 2, stride=2)

        def forward(self, x):
            return nn.functional.interpolate(self.layer(x[:, :, ::2]), size=x.shape[2:])

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv3d(1, 3, 1)

        def forward(self, x):
            return self.layer(x) + self.layer(x.flip(2))

    none = "has no convolution to 3 outputs at full resolution"
    for network, words in ((Product(), none), (Coarse(), none), (Twice(), "calls it several times")):
        with pytest.raises(ConfigError, match=words):
            find_head(network, torch.zeros(1, 1, 4, 4, 4), 3)


def _labelled(folder, cases=4):
    """Images whose two classes differ in intensity, with their labels."""
    geometry = Geometry((18, 20, 22), (1.0, 1.0, 1.0))
    for number in range(cases):
        generator = np.random.default_rng(number)
        labels = np.zeros(geometry.shape, np.uint8)
        labels[2:9, 3:12, 4:15], labels[10:16, 5:15, 6:18] = 2, 7
        image = (0.1 + 0.6 * (labels == 2) + 1.4 * (labels == 7) + generator.normal(0, 0.1, labels.shape)).astype("f4")
        write_image(image, geometry, folder / "imagesTs" / f"case_{number}_0000.nii.gz")
        write_labels(labels, geometry, folder / "labelsTs" / f"case_{number}.nii.gz")
    return folder / "imagesTs"


@pytest.fixture
def model(tmp_path):
    return model_folder(tmp_path, ("0", "1"), "Adaptable")


def test_cases_go_on_where_they_stopped_and_changes_are_noticed(tmp_path, model, monkeypatch):
    images, out = _labelled(tmp_path), tmp_path / "out"
    loaded = EmbeddingModel.load(model, "0")
    cases = find_cases(images, None, "reference", loaded)
    calls, real = [], EmbeddingModel.embed

    def embed(self, case, progress=None):
        calls.append(case.name)
        return real(self, case, progress)

    monkeypatch.setattr(EmbeddingModel, "embed", embed)
    embed_cases(loaded, cases[:2], out, quiet=True)
    table = embed_cases(loaded, cases, out, quiet=True)
    assert calls == ["case_0", "case_1", "case_2", "case_3"]
    assert list(table["class"]) == ["low", "high"] * 4
    assert set(table["voxels"]) == {7 * 9 * 11, 6 * 10 * 12}
    read = pd.read_parquet(out / "embeddings.parquet")
    np.testing.assert_array_equal(np.stack(read["features"]), np.stack(table["features"]))
    assert np.stack(read["features"]).shape == (8, 6)
    del calls[:]
    labels, geometry = np.zeros((18, 20, 22), np.uint8), Geometry((18, 20, 22), (1.0, 1.0, 1.0))
    labels[3:5, 3:5, 3:5] = 2
    write_labels(labels, geometry, tmp_path / "labelsTs" / "case_1.nii.gz")
    (out / "cases" / "case_2.json").write_text("{")
    table = embed_cases(loaded, cases, out, quiet=True)
    assert calls == ["case_1", "case_2"]
    assert table[table["case"] == "case_1"][["class", "voxels"]].to_numpy().tolist() == [["low", 8]]
    del calls[:]
    for other in (
        EmbeddingModel.load(model, "1"),
        EmbeddingModel.load(model, "0", settings=PredictionSettings(step=1)),
    ):
        embed_cases(other, cases[:1], out, quiet=True)
    assert calls == ["case_0", "case_0"]


def test_predictions_can_say_what_is_what(tmp_path, model):
    images = _labelled(tmp_path, 1)
    loaded = EmbeddingModel.load(model, "0")
    (case,) = find_cases(images, None, "prediction", loaded)
    assert case.reference is None
    with Predictor.from_model_folder(model, ["0"]) as predictor:
        predictor.predict_case(case.images, tmp_path / "predicted" / "case_0.nii.gz")
    given = EmbeddingCase("case_0", case.images, tmp_path / "predicted" / "case_0.nii.gz")
    own, other = loaded.embed(case), loaded.embed(given)
    assert own.keys() == other.keys() != set()
    for name in own:
        assert own[name][0] == other[name][0]
        np.testing.assert_array_equal(own[name][1], other[name][1])
    assert loaded.key(case) != loaded.key(given)


def test_a_cascade_gets_its_first_stages_labels(tmp_path):
    """The second stage's only feature is the map that it is given, so that its mean says which map that was."""
    plans = plans_of().to_json()
    first = plans["configurations"]["3d_fullres"]
    first["networks"] = {"threshold_network:Identity": first["networks"]["identity"]}
    second = {**first, "previous_stage": "3d_fullres", "arrays_of": "3d_fullres"}
    second["networks"] = {"threshold_network:Identity": {**first["networks"]["threshold_network:Identity"]}}
    plans["configurations"]["3d_cascade_fullres"] = second
    from threshold_network import DATASET, Identity

    description = ModelDescription("threshold_network:Identity", {}, "3d_fullres", "0", "softmax", (), plans, DATASET)
    before = tmp_path / "3d_fullres__threshold_network.Identity"
    save_checkpoint(before / "fold_0" / "checkpoint_best.pt", description, Identity(1, 3).state_dict())
    (before / "plans.json").write_text(json.dumps(plans))

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv3d(1, 3, 1)

        def forward(self, x):
            return self.head(x[:, 1:])

    images = _labelled(tmp_path, 1)
    of_second = ModelDescription(
        "threshold_network:Identity", {}, "3d_cascade_fullres", "0", "softmax", (), plans, DATASET
    )
    previous = Predictor.from_model_folder(before, ["0"])
    loaded = EmbeddingModel(Last().eval(), of_second, previous_stage=previous)
    (case,) = find_cases(images, None, "prediction", loaded)
    reference = EmbeddingCase(case.name, case.images, tmp_path / "labelsTs" / "case_0.nii.gz")
    found = loaded.embed(reference)
    with previous:
        previous.predict_case(case.images, tmp_path / "first.nii.gz")
    from ukbob_seg.dataset.image_io import read_labels

    said, truth = read_labels(tmp_path / "first.nii.gz")[0], read_labels(reference.reference)[0]
    index = np.zeros(8)
    index[[2, 7]] = 1, 2
    for name, value in (("low", 2), ("high", 7)):
        assert found[name][1] == pytest.approx([index[said[truth == value]].mean()], abs=1e-6)


def test_regions_are_unions_of_values():
    table = np.array([[True, True, False], [False, True, True], [False, False, False]])
    means = np.array([[1.0, 0.0], [4.0, 2.0], [np.nan, np.nan]])
    found = _of_regions(("whole", "core", "nothing"), table, np.array([3, 1, 0]), means)
    assert found.keys() == {"whole", "core"}
    assert (found["whole"][0], found["whole"][1].tolist()) == (4, [1.75, 0.5])
    assert (found["core"][0], found["core"][1].tolist()) == (1, [4.0, 2.0])


def test_wrong_models_and_files_are_sentences(tmp_path, model):
    images = _labelled(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"has folds 0, 1, each with features of its own; choose one with -f"):
        EmbeddingModel.load(model)
    with pytest.raises(CheckpointError, match=r"for fold 3 \(trained: 0, 1\)"):
        EmbeddingModel.load(model, "3")
    loaded = EmbeddingModel.load(model, "0")
    (tmp_path / "labelsTs" / "case_1.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"1 of 2 cases have no label file in .*: case_1; .*--of prediction"):
        find_cases(images, None, "reference", loaded)
    scans = images.rename(tmp_path / "scans")
    with pytest.raises(ConfigError, match=r"which labels belong to .*scans is not known"):
        find_cases(scans, None, "reference", loaded)
    case = find_cases(scans / "case_0_0000.nii.gz", tmp_path / "labelsTs", "reference", loaded)[0]
    write_labels(np.ones((4, 4, 4), np.uint8), Geometry((4, 4, 4), (1.0, 1.0, 1.0)), case.reference)
    with pytest.raises(DatasetError, match=r"case case_0: shape differs: \(18, 20, 22\) in the image, \(4, 4, 4\) in"):
        loaded.embed(case)
    geometry = read_geometry(case.images[0])
    write_labels(np.ones((18, 20, 22), np.uint8), Geometry((18, 20, 22), (9.0, 9.0, 9.0)), case.reference)
    with pytest.raises(DatasetError, match=r"case case_0: spacing_mm differs"):
        loaded.embed(case)
    write_labels(np.ones((18, 20, 22), np.uint8), geometry, case.reference)
    with pytest.raises(DatasetError, match="case case_0: unknown label values 1"):
        loaded.embed(case)


def _synthetic(classes=4, cases=12, apart_by=8.0, width=10, seed=0):
    generator = np.random.default_rng(seed)
    centres = apart_by * np.eye(classes, width)
    rows = [
        {"case": f"c{i}", "class": f"k{k}", "voxels": 1, "features": centres[k] + generator.normal(size=width)}
        for i in range(cases)
        for k in range(classes)
    ]
    return pd.DataFrame(rows)


def test_separable_classes_are_separated_and_meaningless_ones_are_not():
    pytest.importorskip("sklearn")
    result = make_map(_synthetic(width=5))
    assert (result.accuracy, result.judged) == (1.0, 48)
    assert result.silhouette > 0.3
    assert result.classes["correct"].tolist() == [1.0] * 4
    assert result.classes["confused"].isna().all()
    places = result.points[["x", "y"]].to_numpy()
    distances = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e9 * np.eye(len(places))
    labels = result.points["class"].to_numpy()
    assert (labels[distances.argmin(axis=1)] == labels).mean() == 1.0
    chance = make_map(_synthetic(width=5, apart_by=0.0))
    assert chance.accuracy < 0.5
    assert chance.silhouette < 0.05
    assert chance.classes["confused"].notna().all()
    json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert list(make_map(_synthetic(), order=["k2", "k0"]).classes.index) == ["k2", "k0", "k1", "k3"]


def test_maps_are_the_same_again():
    pytest.importorskip("sklearn")
    features = standardised(np.stack(_synthetic()["features"]))
    first = tsne(features, 8.0)
    np.testing.assert_array_equal(first, tsne(features, 8.0))
    assert not np.allclose(first, tsne(features, 20.0))
    one_dimension = tsne(features[:, :1], 5.0)  # has no two principal components to begin with
    np.testing.assert_array_equal(one_dimension, tsne(features[:, :1], 5.0))
    assert one_dimension.shape == (48, 2)
    assert np.isfinite(one_dimension).all()


def test_perplexity_fits_the_number_of_points():
    assert choose_perplexity(1000) == 30
    assert choose_perplexity(31) == 10
    assert choose_perplexity(4) == 1
    assert choose_perplexity(31, 7.5) == 7.5
    with pytest.raises(DatasetError, match="at least 4 embeddings"):
        choose_perplexity(3)
    with pytest.raises(ConfigError, match=r"between 1 and 10, a third of the other points \(31 embeddings\), got 11"):
        choose_perplexity(31, 11)


def test_left_out_centroids_are_those_of_the_others():
    generator = np.random.default_rng(3)
    features, labels = generator.normal(size=(40, 3)), generator.integers(0, 5, 40)
    labels[7] = 5  # the only one of its class
    found = nearest_centroids(features, labels, 6)
    for i, (point, label) in enumerate(zip(features, labels, strict=True)):
        others = np.arange(40) != i
        if not (labels[others] == label).any():
            assert found[i] == -1
            continue
        distances = {
            int(k): np.linalg.norm(point - features[others & (labels == k)].mean(axis=0)) for k in set(labels[others])
        }
        assert found[i] == min(distances, key=distances.__getitem__)
    assert (found == -1).sum() == 1


def test_constant_features_do_not_count():
    features = np.array([[1.0, 5.0, 1e6], [3.0, 5.0, 1e6], [5.0, 5.0, 1e6 + 1]])
    found = standardised(features)
    assert found[:, 1].tolist() == [0, 0, 0]
    np.testing.assert_allclose(found[:, [0, 2]].std(axis=0), 1)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-9)


@pytest.mark.parametrize("count", [2, 30, 72])
def test_names_do_not_cover_each_other(count):
    generator = np.random.default_rng(count)
    centres = generator.uniform((100, 100), (1000, 850), (count, 2))
    centres[1] = centres[0]
    sizes = np.stack([generator.uniform(30, 120, count), np.full(count, 13.0)], axis=1)
    low, high = np.array([0.0, 0.0]), np.array([1100.0, 950.0])
    placed = apart(centres, sizes, low, high)
    overlap = (sizes[:, None] + sizes[None]) / 2 - np.abs(placed[:, None] - placed[None])
    covered = (overlap > 1e-6).all(axis=2) & ~np.eye(count, dtype=bool)
    assert not covered.any()
    assert (placed - sizes / 2 >= low - 1e-6).all()
    assert (placed + sizes / 2 <= high + 1e-6).all()
    np.testing.assert_array_equal(placed, apart(centres, sizes, low, high))


@pytest.mark.parametrize("classes", [2, 72])
def test_the_page_names_every_class(classes, tmp_path):
    pytest.importorskip("sklearn")
    result = make_map(_synthetic(classes, 6, width=80))
    texts = {text.get_text() for text in map_figure(result.points, list(result.classes.index)).axes[0].texts}
    assert texts == {f"k{k}" for k in range(classes)}
    write_report(tmp_path / "page.html", result, "a model")
    page = (tmp_path / "page.html").read_text()
    assert f"guessing: {1 / classes:.3f}" in page
    assert all(f"<td>k{k}</td>" in page for k in range(classes))


def _call(model, images, out, *more):
    return benchmark.main(["embeddings", "-m", str(model), "-i", str(images), "-o", str(out), "--device", "cpu", *more])


def test_the_command(tmp_path, model, capsys):
    pytest.importorskip("sklearn")
    images, out = _labelled(tmp_path), tmp_path / "out"
    assert _call(model, images, out, "-f", "0") == 0
    assert {path.name for path in out.iterdir()} == {
        "cases", "embeddings.parquet", "embeddings.json", "tsne.csv", "embeddings.html"
    }  # fmt: skip
    printed = capsys.readouterr().out
    places = pd.read_csv(out / "tsne.csv")
    assert list(places.columns) == ["case", "class", "x", "y", "nearest", "silhouette"]
    content = json.loads((out / "embeddings.json").read_text())
    table = pd.read_parquet(out / "embeddings.parquet")
    assert (
        content["nearest_centroid_accuracy"]
        == make_map(table).accuracy
        == (places["nearest"] == places["class"]).mean()
    )
    assert f"{content['silhouette']:.3f}" in printed
    network, _ = load_network(model / "fold_0" / "checkpoint_best.pt")
    assert isinstance(network, Adaptable)
    before = (out / "tsne.csv").read_bytes()
    assert _call(model, images, out, "-f", "0") == 0
    assert (out / "tsne.csv").read_bytes() == before


def test_the_command_says_what_is_wrong(tmp_path, model, capsys, monkeypatch):
    images, out = _labelled(tmp_path, 1), tmp_path / "out"
    for more, words in (
        ((), "choose one with -f"),
        (("-f", "0", "1"), "give one model and one fold"),
        (("-f", "0", "-m", str(model)), "give one model and one fold"),
        (("-f", "0", "-d", "4"), "either as -d ID or as -m"),
        (("-f", "0", "--of", "prediction", "--references", "x"), "--references is not used with"),
        (("-f", "0", "--step-size", "0"), "--step-size must lie in"),
        (("-f", "0"), "at least 4 embeddings (cases times classes), there are 2"),
    ):
        assert _call(model, images, out, *more) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert words in error
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert _call(model, images, tmp_path / "none", "-f", "0") == 2
    assert "pip install 'ukbob_seg[tsne]'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
