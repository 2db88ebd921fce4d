"""Entropy maps: closed forms, the same as for logits, and on the grid of the file."""

import math

import numpy as np
import pytest
import torch

from ukbob_seg.dataset.image_io import Geometry, read_image, write_image
from ukbob_seg.inference.entropy_map import probability_entropy
from ukbob_seg.inference.etta_entropy import voxel_entropy
from ukbob_seg.inference.predict import predict
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan, Plans
from ukbob_seg.training.checkpoint import ModelDescription


def test_closed_forms_and_the_entropy_of_logits():
    assert probability_entropy(torch.full((4, 1), 0.25), "softmax").item() == pytest.approx(math.log(4))
    assert probability_entropy(torch.tensor([[1.0], [0.0]]), "softmax").item() == 0
    assert probability_entropy(torch.full((3, 1), 0.5), "sigmoid").item() == pytest.approx(3 * math.log(2))
    assert probability_entropy(torch.tensor([[1.0], [0.0]]), "sigmoid").item() == 0
    logits = torch.randn(5, 2, 3, 4) * 4
    for head, values in (("softmax", logits.softmax(0)), ("sigmoid", logits.sigmoid())):
        torch.testing.assert_close(
            probability_entropy(values, head), voxel_entropy(logits[None], head)[0], atol=1e-5, rtol=1e-4
        )


class Ramps(torch.nn.Module):
    """Logits that are linear in the intensity, so that interpolating them is interpolating the image."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x):
        return torch.cat([x * slope - 0.3 * slope for slope in range(self.outputs)], dim=1)


@pytest.mark.parametrize(("head", "labels", "order"), [
    ("softmax", {"background": 0, "low": 2, "high": 7}, None),
    ("sigmoid", {"background": 0, "whole": [2, 7], "core": [7]}, [2, 7]),
])  # fmt: skip
def test_the_map_is_that_of_the_written_probabilities(tmp_path, head, labels, order):
    """Cropped, resampled, anisotropic: entropy of what --save-probabilities writes; 0 where nothing was predicted."""
    network = NetworkPlan((16, 16, 16), 1, {}, 0.1)
    plans = Plans("Dataset001_Ramps", "default", 1.0, (ChannelNormalization("no_norm"),), 2,
                  {"3d_fullres": ConfigurationPlan((2.0, 1.0, 1.0), (20, 20, 20), 1, {"ramps": network})})  # fmt: skip
    dataset = {"channel_names": {"0": "noNorm"}, "labels": labels, "file_ending": ".nii.gz"}
    dataset |= {} if order is None else {"regions_class_order": order}
    description = ModelDescription("ramps", {}, "3d_fullres", "0", head, (), plans.to_json(), dataset)
    settings = PredictionSettings(save_entropy=True, save_probabilities=True)
    image = np.zeros((14, 24, 28), np.float32)
    image[2:12, 3:20, 4:25] = np.random.default_rng(0).uniform(0.5, 3, (10, 17, 21))
    geometry = Geometry((14, 24, 28), (3.0, 1.0, 0.7))
    write_image(image, geometry, tmp_path / "in" / "a_0000.nii.gz")
    with Predictor([Ramps(3 if order is None else 2).eval()], description, settings=settings) as predictor:
        predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True)
    from ukbob_seg.preprocessing.storage import open_array

    found, grid = read_image([tmp_path / "out" / "a_entropy.nii.gz"])
    assert grid.difference(geometry, ("map", "image")) is None
    stored = torch.from_numpy(open_array(tmp_path / "out" / "a_probabilities.b2nd")[:].astype(np.float32))
    expected = probability_entropy(stored, head)
    assert expected.max() > 0.3
    assert np.abs(found[0] - expected.numpy()).max() < 5e-3  # the file has half precision
    assert (found[0][:2] == 0).all()
    assert (found[0][:, :, 25:] == 0).all()
