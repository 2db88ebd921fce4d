"""Prediction in a chosen precision: heeded in every pass, also of adaptation, part of the record, and no worse."""

import argparse
import dataclasses
import json
from importlib import import_module

import numpy as np
import pytest
import torch
from threshold_network import blobs, predictor_of
from torch import nn

from ukbob_seg.cli.models import hint_at_precision
from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.earlier import ARGUMENTS, PredictionJob, differences, what_matters
from ukbob_seg.inference.etta import EttaConfig
from ukbob_seg.inference.predictor import PredictionSettings
from ukbob_seg.preprocessing.storage import open_array

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
    assert set(types[2:]) == {expected}  # the first pass finds out which layers are at the ends
    assert [len(result.etta), len(types) > 8] == [int(etta is not None), True]
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_few_voxels_change_and_probabilities_do_by_little(network, tmp_path):
    labels, probabilities = [], []
    for name in ("float32", "bfloat16"):
        predictor = predictor_of(PredictionSettings(precision=name), networks=[network])
        path = tmp_path / f"{name}.b2nd"
        labels.append(predictor.predict_array(blobs(SHAPE), GEOMETRY, probabilities=path).labels)
        probabilities.append(np.asarray(open_array(path)[:], dtype=np.float32))
    assert len(np.unique(labels[0])) > 1
    assert (labels[0] != labels[1]).mean() < 0.001
    assert 1e-4 < np.abs(probabilities[0] - probabilities[1]).max() < 0.05


def test_compiled_networks_on_a_cpu_have_no_exact_ends_and_are_refused(network):
    with pytest.raises(ConfigError, match="--compile and --precision bfloat16 exclude each other on a CPU"):
        predictor_of(PredictionSettings(precision="bfloat16", compile=True), networks=[network])


COMMANDS = {
    "predict": ("ukbob_seg.inference.ensemble_predictor.load_predictor", ["-i", "in", "-o", "out", "-m", "model"]),
    "label": ("ukbob_seg.labelling.label.label_cohort", ["--input", "in", "--output", "out", "--model", "model"]),
    "benchmark": (
        "ukbob_seg.benchmark.robustness.robustness",
        ["robustness", "-m", "model", "-o", "out", "--images", "in", "--references", "labels"],
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_passes_it_on(command, monkeypatch, capsys):
    """And names those that there are where another is asked for."""
    target, arguments = COMMANDS[command]
    seen = []

    def stop(*given, **_):
        seen.extend(each for each in _flat(given) if isinstance(each, PredictionSettings))
        raise ConfigError("far enough")

    monkeypatch.setattr(target, stop)
    main = import_module(f"ukbob_seg.cli.{command}").main
    assert main([*arguments, "--device", "cpu", "--precision", "bfloat16"]) == 2
    assert capsys.readouterr().err == "error: far enough\n"
    assert [settings.precision for settings in seen] == ["bfloat16"]
    assert main([*arguments, "--device", "cpu", "--precision", "fp8"]) == 2
    assert "--precision must be one of auto, float32, bfloat16, got 'fp8'" in capsys.readouterr().err


def _flat(given):
    """Arguments of a call, and what options hold."""
    for each in given:
        yield each
        yield from vars(each).values() if dataclasses.is_dataclass(each) else ()


def test_what_a_resumed_run_was_made_in_is_said_in_the_words_of_the_option(tmp_path):
    (tmp_path / ARGUMENTS).write_text(json.dumps({"settings": what_matters(PredictionSettings())}))
    job = PredictionJob("case", (), tmp_path / "case.nii.gz", ".nii.gz")
    now = {"settings": what_matters(PredictionSettings(precision="bfloat16"))}
    assert "settings than this run (precision auto, now bfloat16)" in differences(tmp_path, now, [job])


def test_processors_that_would_be_faster_are_told_of(monkeypatch, caplog):
    caplog.set_level("INFO")
    for quick, precision, device, told in (
        (True, "auto", "cpu", True), (False, "auto", "cpu", False), (True, "float32", "cpu", False),
        (True, "auto", "cuda", False),
    ):  # fmt: skip
        monkeypatch.setattr("ukbob_seg.networks.precision.multiplies_bfloat16_quickly", lambda quick=quick: quick)
        caplog.clear()
        hint_at_precision(argparse.Namespace(precision=precision), device)
        assert ("--precision bfloat16" in caplog.text) == told


def test_another_choice_for_the_same_predictor(network, types):
    predictor = predictor_of(PredictionSettings(precision="bfloat16"), networks=[network])
    for name, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        types.clear()
        predictor = predictor.with_settings(dataclasses.replace(predictor.settings, precision=name))
        predictor.predict_array(blobs(SHAPE), GEOMETRY)
        assert set(types[2:]) == {expected}  # the first pass finds out which layers are at the ends


def test_it_is_part_of_the_record_that_a_resumed_run_is_compared_with():
    """Records of earlier versions say nothing of it, and were made by what is auto now."""
    assert "precision" not in what_matters(PredictionSettings())
    assert what_matters(PredictionSettings(precision="bfloat16"))["precision"] == "bfloat16"
