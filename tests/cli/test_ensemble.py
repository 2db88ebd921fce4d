"""ukbob_ensemble and ukbob_predict with several models, as a user meets them."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from ukbob_seg.cli import ensemble, predict
from ukbob_seg.dataset.image_io import Geometry, read_geometry, read_labels, write_image
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan, Plans
from ukbob_seg.preprocessing.storage import open_array
from ukbob_seg.training.checkpoint import ModelDescription, save_checkpoint

DATASET = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "low": 2, "high": 7}, "file_ending": ".nii.gz"}
GEOMETRY = Geometry((21, 14, 17), (3.0, 1.0, 0.7), (5.0, -7.0, 11.0))
NETWORK = "thresholds_network:Thresholds"


class Thresholds(nn.Module):
    """Logits that grow with the intensity; the normalization layer is there to be adapted."""

    def __init__(self, in_channels, out_channels, sharpness=2.0):
        super().__init__()
        self.norm = nn.InstanceNorm3d(1, affine=True)
        self.sharpness = nn.Parameter(torch.tensor(float(sharpness)))

    def forward(self, x):
        x = x + 0 * self.norm(x)
        return torch.cat([torch.full_like(x, 0.5), x, 3 * x - 2.4], dim=1) * self.sharpness


@pytest.fixture
def run(capsys):
    """Call a command in-process; returns (exit code, stdout, last line of stderr)."""

    def call(command, *arguments):
        try:
            code = command.main([*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, (out.err.splitlines() or [""])[-1]

    return call


@pytest.fixture
def models(tmp_path):
    """Two model folders of different spacing, and two images beside them."""
    sys.modules.setdefault("thresholds_network", sys.modules[__name__])
    for name, spacing, sharpness in (("a", (3.0, 1.0, 0.7), 1.0), ("b", (1.5, 1.5, 1.5), 3.0)):
        network = NetworkPlan((16, 12, 12), 1, {}, 0.1)
        configuration = ConfigurationPlan(spacing, (20, 20, 20), 1, {NETWORK: network})
        plans = Plans("Dataset001_X", "default", 1.0, (ChannelNormalization("no_norm"),), None,
                      {"3d_fullres": configuration}).to_json()  # fmt: skip
        description = ModelDescription(NETWORK, {}, "3d_fullres", "0", "softmax", (), plans, DATASET)
        path = tmp_path / "models" / name / "fold_0" / "checkpoint_best.pt"
        save_checkpoint(path, description, Thresholds(1, 3, sharpness).state_dict())
    for number in range(2):
        image = np.random.default_rng(number).uniform(0.01, 2, GEOMETRY.shape).astype(np.float32)
        write_image(image, GEOMETRY, tmp_path / "in" / f"c{number}_0000.nii.gz")
    return [tmp_path / "models" / "a", tmp_path / "models" / "b"]


def test_both_ways_to_average(run, models, tmp_path):
    given = ["-i", tmp_path / "in", "--device", "cpu", "--save-probabilities"]
    for name, model in zip("ab", models, strict=True):
        assert run(predict, *given, "-m", model, "-o", tmp_path / name)[0] == 0
    assert json.loads((tmp_path / "a" / "predict_args.json").read_text())["model"] == str(models[0])
    code, out, err = run(ensemble, tmp_path / "a", tmp_path / "b", "-o", tmp_path / "both", "--save-probabilities")
    assert code == 0, err
    assert out == f"2 cases -> {tmp_path / 'both'}\n"
    code, out, err = run(predict, *given, "-m", models[0], "-m", models[1], "-o", tmp_path / "once")
    assert code == 0, err
    assert out == f"2 cases -> {tmp_path / 'once'}\n"
    arguments = json.loads((tmp_path / "once" / "predict_args.json").read_text())
    assert arguments["model"] == f"{models[0]}, {models[1]}"
    for case in ("c0", "c1"):
        afterwards, at_once = (read_labels(tmp_path / name / f"{case}.nii.gz")[0] for name in ("both", "once"))
        assert set(np.unique(at_once)) == {0, 2, 7}
        assert (afterwards != at_once).mean() < 1e-3  # rounding of the files
        assert GEOMETRY.difference(read_geometry(tmp_path / "both" / f"{case}.nii.gz"), ("in", "out")) is None
        files = [tmp_path / name / f"{case}_probabilities.b2nd" for name in ("both", "once")]
        assert np.abs(open_array(files[0])[:].astype(float) - open_array(files[1])[:]).max() < 2e-3
    adapted = run(predict, *given[:-1], "-m", models[0], "-m", models[1], "-o", tmp_path / "etta", "--etta")
    assert adapted[0] == 0
    record = json.loads((tmp_path / "etta" / "c0_etta.json").read_text())
    assert [model["model"] for model in record["models"]] == [str(model) for model in models]


def test_several_models_write_some_classes_and_more_of_a_part(run, models, tmp_path):
    given = ["-i", tmp_path / "in", "--device", "cpu", "-m", models[0], "-m", models[1]]
    assert run(predict, *given, "-o", tmp_path / "all")[0] == 0
    extras = ["--classes", "high", "--statistics", "--preview", "--part", "2/2"]
    code, out, err = run(predict, *given, "-o", tmp_path / "some", *extras)
    assert code == 0, err
    assert out == f"part 2 of 2: 1 cases -> {tmp_path / 'some'}\n"
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == [
        "c1.nii.gz", "c1_preview.png", "c1_statistics.json", "dataset.json", "plans.json", "predict_args.json",
    ]  # fmt: skip
    everything, high = (read_labels(tmp_path / name / "c1.nii.gz")[0] for name in ("all", "some"))
    assert np.array_equal(high, np.where(everything == 7, 7, 0))
    statistics = json.loads((tmp_path / "some" / "c1_statistics.json").read_text())["classes"]
    assert {name: entry["voxels"] for name, entry in statistics.items()} == {"high": int((high == 7).sum())}
    arguments = json.loads((tmp_path / "some" / "predict_args.json").read_text())
    assert arguments["model"] == f"{models[0]}, {models[1]}"
    assert "part" not in arguments


def test_weights_parts_and_resuming(run, models, tmp_path):
    for name, model in zip("ab", models, strict=True):
        given = ["-i", tmp_path / "in", "-m", model, "-o", tmp_path / name, "--device", "cpu"]
        assert run(predict, *given, "--save-probabilities")[0] == 0
    given = [tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out", "--weights", 3, 1]
    assert run(ensemble, *given, "--part", "2/2")[1] == f"part 2 of 2: 1 cases -> {tmp_path / 'out'}\n"
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["c1.nii.gz"]
    made = (tmp_path / "out" / "c1.nii.gz").stat().st_mtime_ns
    assert run(ensemble, *given, "--resume")[0] == 0
    assert (tmp_path / "out" / "c0.nii.gz").is_file()
    assert (tmp_path / "out" / "c1.nii.gz").stat().st_mtime_ns == made
    assert json.loads((tmp_path / "out" / "ensemble.json").read_text())["weights"] == [3, 1]


def test_bad_input_gives_one_sentence(run, models, tmp_path):
    out = ["-o", tmp_path / "out"]
    for arguments, message in (
        ([tmp_path / "a", *out], "error: an ensemble needs at least two folders, got "),
        ([tmp_path / "a", tmp_path / "b", *out], "a does not exist"),
        ([tmp_path / "a", tmp_path / "b", *out, "--part", "3/2"], "error: --part 3/2: the first is 1/2, the last 2/2"),
        ([tmp_path / "a", tmp_path / "b", *out, "--weights", "x"], "invalid float value: 'x'"),
        ([tmp_path / "a", tmp_path / "b"], "the following arguments are required: -o/--output"),
    ):
        code, _, error = run(ensemble, *arguments)
        assert code == 2
        assert message in error
    given = ["-i", tmp_path / "in", "--device", "cpu", *out, "-m", models[0], "-m"]
    code, _, error = run(predict, *given, models[0])
    assert (code, error) == (2, f"error: model folder {models[0]} is given twice; give each model once")
    code, _, error = run(predict, *given, tmp_path / "none")
    assert code == 2
    assert "none does not exist; train it first" in error
    assert not (tmp_path / "out").exists()
