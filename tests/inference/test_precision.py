"""Prediction in a chosen precision: heeded in every pass, also of adaptation, part of the record, and no worse."""

import dataclasses

import numpy as np
import pytest
import torch
from threshold_network import blobs, predictor_of
from torch import nn

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.inference.earlier import what_matters
from ukbob_seg.inference.etta import EttaConfig
from ukbob_seg.inference.predictor import PredictionSettings

SHAPE = (22, 31, 27)
GEOMETRY = Geometry(SHAPE, (1.0, 1.0, 1.0))


class Deep(nn.Module):
    """Five convolutions, and a norm layer that ETTA changes."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.norm = nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6)
            self.middle = nn.ModuleList(nn.Conv3d(6, 6, 3, padding=1) for _ in range(3))
            self.head = nn.Conv3d(6, 3, 1)

    def forward(self, x):
        x = self.norm(self.first(x))
        for layer in self.middle:
            x = x + torch.relu(layer(x))
        return 4 * self.head(x)


@pytest.fixture
def network():
    return Deep().eval()


@pytest.fixture
def types(network):
    """In which types its inner convolutions answered; those at both ends are always in float32."""
    seen = []
    for layer in network.middle[:2]:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    return seen


def _predicted(network, **settings):
    return predictor_of(PredictionSettings(**settings), networks=[network]).predict_array(blobs(SHAPE), GEOMETRY)


@pytest.mark.parametrize("etta", [None, EttaConfig()])
@pytest.mark.parametrize(("precision", "expected"), [
    ("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16),
])  # fmt: skip
def test_every_pass_is_in_it(network, types, precision, expected, etta):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    result = _predicted(network, precision=precision, etta=etta, tta=True)
    assert set(types) == {expected}
    assert [len(result.etta), len(types) > 8] == [int(etta is not None), True]
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_few_voxels_change(network):
    exact, rounded = (_predicted(network, precision=name).labels for name in ("float32", "bfloat16"))
    assert len(np.unique(exact)) > 1
    assert (exact != rounded).mean() < 0.001


def test_another_choice_for_the_same_predictor(network, types):
    predictor = predictor_of(PredictionSettings(precision="bfloat16"), networks=[network])
    for name, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        types.clear()
        predictor = predictor.with_settings(dataclasses.replace(predictor.settings, precision=name))
        predictor.predict_array(blobs(SHAPE), GEOMETRY)
        assert set(types) == {expected}


def test_a_run_can_be_resumed_in_the_same_precision_only():
    """Records of earlier versions say nothing of it, and were made by what is auto now."""
    assert "precision" not in what_matters(PredictionSettings())
    assert what_matters(PredictionSettings(precision="bfloat16"))["precision"] == "bfloat16"
