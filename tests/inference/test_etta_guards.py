"""What ends or undoes adaptation, and that nothing is left of it, whatever happens."""

import dataclasses
import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from field_images import coil, tissues
from threshold_network import DATASET, REGIONS, Adaptable, ChannelsLast, Identity, plans_of, predictor_of
from torch import nn

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.inference.etta import adapted, adapted_to_case
from ukbob_seg.inference.etta_config import EttaConfig
from ukbob_seg.inference.etta_entropy import OutputMeaning, look
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.inference.sliding_window import WindowSettings
from ukbob_seg.preprocessing.intensity_field import UsualField
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.training.checkpoint import ModelDescription

WINDOWS, SOFTMAX = WindowSettings((8, 8, 8)), OutputMeaning()
NORMS = ("batch", "batch, not affine", "instance", "group", "layer")


@pytest.fixture
def image():
    return torch.randn(1, 12, 10, 9, generator=torch.Generator().manual_seed(1)) * 2 + 1


class _StopError(Exception):
    pass


def _state(network):
    return {
        "tensors": {name: value.clone() for name, value in network.state_dict().items()},
        "gradients": [(p.grad is None, p.requires_grad) for p in network.parameters()],
        "modes": [module.training for module in network.modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in network.modules()],
        "momenta": [getattr(module, "momentum", None) for module in network.modules()],
    }


def _same(a, b):
    same = all(torch.equal(value, b["tensors"][name]) for name, value in a["tensors"].items())
    return same and all(a[name] == b[name] for name in a if name != "tensors")


@pytest.mark.parametrize("norm", NORMS)
def test_whichever_pass_fails_the_network_is_what_it_was(image, norm):
    network = Adaptable(1, 3, norm).eval()
    network.first.weight.requires_grad_(False)
    before, passes, fails_at = _state(network), 0, None
    real = network.forward

    def forward(x):
        nonlocal passes
        passes += 1
        if passes == fails_at:
            raise _StopError
        return real(x)

    network.forward = forward
    with adapted(network, image, WINDOWS, SOFTMAX) as record:
        assert record.decision == "adapted"
        assert not _same(_state(network), before)
    total = passes
    assert total >= 8  # candidates, as they are, statistics or steps, at the end
    for fails_at in range(1, total + 1):
        passes = 0
        with suppress(_StopError), adapted(network, image, WINDOWS, SOFTMAX):
            pytest.fail("it was to be stopped")
        assert passes == fails_at
        assert _same(_state(network), before), f"after pass {fails_at}"


@pytest.mark.parametrize("norm", NORMS)
def test_the_same_case_gives_the_same_whatever_came_before(image, norm):
    network = Adaptable(1, 3, norm).eval()

    def predict(case):
        with adapted(network, case, WINDOWS, SOFTMAX) as record, torch.no_grad():
            return network(case[None]), record

    cases = [image, image * 3 - 1, image.flip(1)]
    forwards = [predict(case) for case in cases]
    backwards = [predict(case) for case in reversed(cases)][::-1]
    for (logits, record), (again, other) in zip(forwards, backwards, strict=True):
        assert torch.equal(logits, again)
        assert record == other


class Dark(nn.Module):
    """Everything brighter than a limit is foreground; the norm layer is there to be adapted."""

    def __init__(self, limit):
        super().__init__()
        self.norm, self.limit = ChannelsLast(1), limit

    def forward(self, x):
        return torch.cat([torch.full_like(x, self.limit), x], dim=1) + 0 * self.norm(x)


def test_without_its_field_an_image_may_lose_its_foreground():
    """Then the image as it came is predicted; and the record compares with it in any case."""
    image = torch.zeros(1, 8, 8, 8)
    image[0, :4] = 2.0
    dim = image / 4
    networks = [Dark(1.0).eval(), Dark(1.0).eval()]
    with adapted_to_case(networks, image, dim, WINDOWS, SOFTMAX) as (chosen, records):
        assert chosen is image
        assert [record.foreground_before for record in records] == [256, 256]
    # Three of four see as much in both: more than half of all is kept.
    networks = [Dark(1.0).eval(), *(Dark(0.2).eval() for _ in range(3))]
    with adapted_to_case(networks, image, dim, WINDOWS, SOFTMAX) as (chosen, records):
        assert chosen is dim
        assert [record.foreground_before for record in records] == [256] * 4
        assert [record.foreground_after for record in records] == [0, 256, 256, 256]
        assert [record.voxels_changed for record in records] == [256, 0, 0, 0]
    anything = EttaConfig(least_foreground=0.0)
    with adapted_to_case(networks[:1], image, dim, WINDOWS, SOFTMAX, anything) as (chosen, _):
        assert chosen is dim


def test_the_guard_looks_at_all_candidates():
    """An organ in one window of six, whose foreground the flat image has lost."""
    image = torch.zeros(1, 8, 8, 48)
    image[0, 2:6, 2:6, 20:24] = 2.0
    windows = WindowSettings((8, 8, 8), 1.0)
    with adapted_to_case([Dark(1.0).eval()], image, image / 4, windows, SOFTMAX) as (chosen, (record,)):
        assert chosen is image
        assert record.foreground_before == record.foreground_after == 64


def test_a_record_compares_with_the_image_as_it_came(image):
    network = Adaptable(1, 3, "instance").eval()
    flat = image * torch.linspace(0.5, 2, 12).view(1, 12, 1, 1)
    with torch.no_grad():
        windows = [image[None, :, :8, :8, :8]], [flat[None, :, :8, :8, :8]]
    before, start = (look(network, part, SOFTMAX) for part in windows)
    one = WindowSettings((8, 8, 8), 1.0)
    part, other = windows[0][0][0], windows[1][0][0]
    with adapted_to_case([network], part, other, one, SOFTMAX, EttaConfig(steps=0)) as (_, (record,)):
        assert record.entropy_before == pytest.approx(before.entropy)
        assert record.entropy_after == pytest.approx(start.entropy)
        assert record.voxels_changed == before.changes(start) > 0


def test_outputs_that_are_not_finite_fall_back(image):
    network = Adaptable(1, 3, "instance").eval()
    steps = EttaConfig.of_mode("paper", learning_rate=1e37)
    with adapted(network, image, WINDOWS, SOFTMAX, steps) as record, torch.no_grad():
        assert record.decision == "fell back: outputs were no longer finite"
        assert torch.isfinite(network(image[None])).all()
        assert math.isfinite(record.entropy_after)


def test_windows_without_foreground_decide_nothing(image):
    network = Adaptable(1, 3, "batch").eval()
    with torch.no_grad():
        network.last.bias.copy_(torch.tensor([20.0, 0, 0]))
    plain = network.norm.running_mean.clone()
    with adapted(network, image, WINDOWS, SOFTMAX) as record:
        assert record.decision == "unchanged: the chosen windows show no foreground, adapted or not"
        assert torch.equal(network.norm.running_mean, plain)
    with adapted(network, image, WINDOWS, SOFTMAX, EttaConfig.of_mode("paper")) as record:
        assert record.decision == "adapted"  # nothing is undone
        assert not torch.equal(network.norm.running_mean, plain)


def test_confident_windows_count_more():
    """Two windows, one of them certain: the statistics are its own, almost; without weights the mean of both."""
    network = Adaptable(1, 2, "batch").eval()
    with torch.no_grad():
        network.last.weight.zero_()
        network.last.weight[1, 0] = 30.0
        network.norm.weight[0], network.norm.bias[0] = 1.0, -1.5
    image = torch.randn(1, 8, 8, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    image[..., 8:] *= 40
    windows = WindowSettings((8, 8, 8), 1.0)
    seen = look(network, [image[None, ..., :8], image[None, ..., 8:]], SOFTMAX)
    a, b = (network.first(part[None]).mean((0, 2, 3, 4)) for part in (image[..., :8], image[..., 8:]))
    assert abs(seen.confidences[0] - seen.confidences[1]) > 0.05
    for weighed, (first, second) in ((True, seen.confidences), (False, (1.0, 1.0))):
        config = EttaConfig(statistics_share=1.0, steps=0, weigh_windows=weighed, least_foreground=0.0)
        with adapted(network, image, windows, SOFTMAX, config):
            torch.testing.assert_close(network.norm.running_mean, (first * a + second * b) / (first + second))


def test_a_layer_that_sees_one_value_keeps_what_is_stored(image):
    """A bottleneck of a single voxel has no variance."""
    network = nn.Sequential(
        nn.Conv3d(1, 4, 8, stride=8), nn.BatchNorm3d(4), nn.Upsample(scale_factor=8), nn.Conv3d(4, 3, 1)
    ).eval()
    with torch.no_grad():
        network[1].running_mean.copy_(torch.arange(4.0))
    before = network[1].running_mean.clone()
    config = EttaConfig(steps=0, least_foreground=0.0)
    with adapted(network, image[:, :8, :8, :8], WINDOWS, SOFTMAX, config) as record:
        assert torch.equal(network[1].running_mean, before)
        assert record.statistics_distance == 0


GEOMETRY = Geometry((20, 18, 16), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("norm", NORMS)
def test_a_predictor_adapts_any_of_them_and_forgets(norm):
    network = Adaptable(1, 3, norm).eval()
    before = _state(network)
    case = np.random.default_rng(0).normal(0.5, 1, (1, 20, 18, 16)).astype(np.float32)
    plain = predictor_of(networks=[network]).predict_array(case, GEOMETRY)
    settings = PredictionSettings(etta=EttaConfig(steps=3, learning_rate=0.03))
    predictor = predictor_of(settings, networks=[network])
    results = [predictor.predict_array(case, GEOMETRY) for _ in range(2)]
    assert _same(_state(network), before)
    assert (results[0].labels != plain.labels).any()
    assert np.array_equal(results[0].labels, results[1].labels)
    assert results[0].etta == results[1].etta
    assert results[0].etta[0]["decision"] == "adapted"


def test_regions_adapt():
    case = np.random.default_rng(0).normal(0.5, 1, (1, 20, 18, 16)).astype(np.float32)
    settings = PredictionSettings(etta=EttaConfig(steps=3, learning_rate=0.03))
    plain, adapted = (
        predictor_of(how, dataset=REGIONS, networks=[Adaptable(1, 2, "instance").eval()]).predict_array(case, GEOMETRY)
        for how in (None, settings)
    )
    assert set(np.unique(adapted.labels)) == {0, 2, 7}
    assert (plain.labels != adapted.labels).any()
    assert adapted.etta[0]["entropy_after"] < adapted.etta[0]["entropy_before"]


def test_inside_a_callers_inference_mode():
    """A service may run all of itself in it; adaptation takes gradients nevertheless."""
    settings = PredictionSettings(etta=EttaConfig(steps=3, learning_rate=0.03))
    predictor = predictor_of(settings, networks=[Adaptable(1, 3, "instance").eval()])
    case = np.random.default_rng(0).normal(0.5, 1, (1, 20, 18, 16)).astype(np.float32)
    expected = predictor.predict_array(case, GEOMETRY)
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            found = predictor.predict_array(case, GEOMETRY)
        assert np.array_equal(found.labels, expected.labels)
        assert found.etta == expected.etta
    assert expected.etta[0]["steps"] > 0


def test_the_record_tells_what_became_of_a_field():
    clean = tissues((20, 18, 16))
    shaded = (clean * coil(clean.shape)).astype(np.float32)[None]
    decisions = {}
    for name, case, limit in (("clean", clean.astype(np.float32)[None], 0.0), ("shaded", shaded, 0.0),
                              ("needed", shaded, 2.2)):  # fmt: skip
        plans = plans_of().to_json()
        plans["normalization"] = [dataclasses.asdict(ChannelNormalization("zscore"))]
        what = ModelDescription("identity", {}, "3d_fullres", "0", "softmax", (), plans, DATASET, (UsualField(),))
        settings = PredictionSettings(etta=EttaConfig(steps=0))
        network = Dark(limit).eval() if limit else Identity(1, 3).eval()
        with Predictor([network], what, settings=settings) as predictor:
            found = predictor.predict_array(case, GEOMETRY)
        decisions[name] = found.etta[0]["field_decision"], found.etta[0]["fields_removed"]
        if name == "needed":
            plain = Predictor([network], what).predict_array(case, GEOMETRY)
            assert np.array_equal(found.labels, plain.labels)
            assert found.labels.any()
    ct = ModelDescription("identity", {}, "3d_fullres", "0", "softmax", (), {**plans, "normalization": [
        dataclasses.asdict(ChannelNormalization("ct", -1.0, 3.0, 0.5, 1.0))
    ]}, DATASET, (None,))  # fmt: skip
    with Predictor([Identity(1, 3).eval()], ct, settings=PredictionSettings(etta=EttaConfig(steps=0))) as predictor:
        (record,) = predictor.predict_array(shaded, GEOMETRY).etta
    assert (record["field_decision"], record["field_gains"]) == (None, [None])
    assert decisions == {
        "clean": ("left in: weak, or as in training images", []),
        "shaded": ("divided out", [0]),
        "needed": ("left in: without it the predicted foreground collapsed", []),
    }
