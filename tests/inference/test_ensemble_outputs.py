"""Some classes only, statistics and previews of an ensemble, against plain numpy: networks that see single voxels."""

import json

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from ukbob_seg.dataset.image_io import Geometry, read_labels, write_image
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.ensemble_predictor import EnsemblePredictor
from ukbob_seg.inference.export import WrittenClasses
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.inference.preview import write_preview
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan, Plans
from ukbob_seg.preprocessing.storage import open_array
from ukbob_seg.training.checkpoint import ModelDescription

CHANNELS = {"channel_names": {"0": "fat", "1": "water"}, "file_ending": ".nii.gz"}
# Not in the order of their values, which is that of the outputs.
CLASSES = {**CHANNELS, "labels": {"background": 0, "spleen": 300, "liver": 7, "heart": 9}}
REGIONS = {
    **CHANNELS,
    "labels": {"background": 0, "whole": [2, 4, 9], "core": [4, 9], "active": [9]},
    "regions_class_order": [2, 4, 9],
}
SPACING = (3.0, 1.0, 0.7)
SHAPE, BOX = (19, 24, 22), (slice(3, 17), slice(2, 20), slice(4, 21))


class Voxelwise(nn.Module):
    """Logits are linear in the two channels of a voxel."""

    def __init__(self, outputs, seed):
        super().__init__()
        generator = np.random.default_rng(seed)
        self.table, self.bias = generator.normal(0, 2, (outputs, 2)), generator.normal(0, 0.7, outputs)

    def forward(self, x):
        table, bias = torch.from_numpy(self.table).float(), torch.from_numpy(self.bias).float()
        return torch.einsum("kc,bczyx->bkzyx", table, x) + bias[:, None, None, None]


def _member(dataset, seed, settings=None, patch=(16, 12, 12)):
    regions = dataset is REGIONS
    configuration = ConfigurationPlan(SPACING, (20, 20, 20), 1, {"voxelwise": NetworkPlan(patch, 1, {}, 0.1)})
    normalization = (ChannelNormalization("no_norm"),) * 2
    plans = Plans("Dataset001_X", "default", 1.0, normalization, None, {"3d_fullres": configuration}).to_json()
    head = "sigmoid" if regions else "softmax"
    description = ModelDescription("voxelwise", {}, "3d_fullres", "0", head, (), plans, dataset)
    return Predictor([Voxelwise(3 if regions else 4, seed).eval()], description, settings=settings)


def _image():
    image = np.zeros((2, *SHAPE), np.float32)
    image[(slice(None), *BOX)] = np.random.default_rng(0).normal(0, 1, (2, 14, 18, 17))
    return image


def _mean_probabilities(members, image, regions):
    """(K, Z, Y, X) float64 of the whole file; outside of the box sure background."""
    result = np.zeros((3 if regions else 4, *SHAPE))
    result[0] = not regions
    inside = (slice(None), *BOX)
    result[inside] = 0
    for member in members:
        network = member._networks[0]
        logits = np.tensordot(network.table, image[inside].astype(float), 1) + network.bias[:, None, None, None]
        powers = np.exp(logits)
        result[inside] += (powers / (1 + powers) if regions else powers / powers.sum(0)) / len(members)
    return result


def _labels(mean, dataset, names):
    """Label values: a left-out class that wins is background; left-out regions never existed."""
    result = np.zeros(SHAPE, int)
    if dataset is REGIONS:
        for output, (name, value) in enumerate((("whole", 2), ("core", 4), ("active", 9))):
            if name in names:
                result[mean[output] > 0.5] = value
        return result
    winner = np.array([0, 7, 9, 300])[mean.argmax(0)]
    for name in names:
        value = dataset["labels"][name]
        result[winner == value] = value
    return result


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        (CLASSES, ("liver",)), (CLASSES, ("heart", "spleen")), (CLASSES, None),
        (REGIONS, ("whole",)), (REGIONS, ("core",)), (REGIONS, ("active", "whole")), (REGIONS, None),
    ],
)  # fmt: skip
def test_classes_statistics_and_previews_of_two_models(tmp_path, dataset, names):
    settings = PredictionSettings(classes=names, statistics=True, preview=True, save_probabilities=True)
    members = {"a": _member(dataset, 2, settings), "b": _member(dataset, 10, patch=(8, 20, 16))}  # the first's count
    image, geometry = _image(), Geometry(SHAPE, SPACING)
    files = [tmp_path / f"c_000{channel}.nii.gz" for channel in (0, 1)]
    for path, values in zip(files, image, strict=True):
        write_image(values, geometry, path)
    with EnsemblePredictor(members) as predictor:
        mean = _mean_probabilities(members.values(), image, dataset is REGIONS)
        predictor.predict_case(files, tmp_path / "c.nii.gz")

    every = tuple(name for name in dataset["labels"] if name != "background")
    expected = _labels(mean, dataset, names or every)
    assert len(np.unique(expected)) == len(names or every) + 1
    found, grid = read_labels(tmp_path / "c.nii.gz")
    assert np.array_equal(found, expected)
    assert np.abs(open_array(tmp_path / "c_probabilities.b2nd")[:] - mean).max() < 5e-4  # of all classes

    statistics = json.loads((tmp_path / "c_statistics.json").read_text())
    assert statistics["channel_names"] == ["fat", "water"]
    assert list(statistics["classes"]) == [name for name in every if name in (names or every)]
    for name, entry in statistics["classes"].items():
        inside = np.isin(expected, dataset["labels"][name])
        assert entry["voxels"] == inside.sum() > 0
        assert entry["volume_ml"] == pytest.approx(inside.sum() * 2.1e-3, rel=1e-6)
        assert entry["mean"] == pytest.approx(image[:, inside].mean(1, dtype=float), rel=1e-6, abs=1e-6)
        assert entry["sd"] == pytest.approx(image[:, inside].std(1, dtype=float), rel=1e-6)

    written = WrittenClasses.of(LabelScheme.from_json(dataset["labels"], dataset.get("regions_class_order")), names)
    write_preview(tmp_path / "right.png", "c", image[0], expected.astype(found.dtype), grid, written)
    assert np.array_equal(imread(tmp_path / "c_preview.png"), imread(tmp_path / "right.png"))


def test_what_is_written_beside_the_labels_of_an_ensemble_is_asked_for(tmp_path):
    members = {
        "a": _member(CLASSES, 2),
        "b": _member(CLASSES, 10, PredictionSettings(classes=("liver",), preview=True)),
    }
    files = [tmp_path / "in" / f"c_000{channel}.nii.gz" for channel in (0, 1)]
    for path, values in zip(files, _image(), strict=True):
        write_image(values, Geometry(SHAPE, SPACING), path)
    with EnsemblePredictor(members) as predictor:
        assert predictor.written.names == ("spleen", "liver", "heart")
        predictor.predict_case(files, tmp_path / "out" / "c.nii.gz")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["c.nii.gz"]
    assert set(np.unique(read_labels(tmp_path / "out" / "c.nii.gz")[0])) == {0, 7, 9, 300}
    with pytest.raises(ConfigError, match="no class 'kidney'; choose from spleen, liver, heart"):
        _member(CLASSES, 1, PredictionSettings(classes=("kidney",)))
