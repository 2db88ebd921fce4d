"""Runs that start from given weights: patch merging is chosen and recorded; pretrained.json tells what was taken."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

from ukbob_seg.dataset.paths import Roots
from ukbob_seg.errors import CheckpointError, ConfigError
from ukbob_seg.networks.pretrained import read_pretrained
from ukbob_seg.networks.window_attention import MERGING_ORDERS
from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions
from ukbob_seg.training.checkpoint import load_network, read_checkpoint
from ukbob_seg.training.config import TrainingConfig
from ukbob_seg.training.finetune import PretrainedOptions, preprocessing_differences, read_weights
from ukbob_seg.training.setup import prepare
from ukbob_seg.training.trainer import RunOptions, train

CONFIG = TrainingConfig(
    epochs=1, iterations_per_epoch=1, learning_rate=1e-12, weight_decay=0.0, schedule="constant", validation_cases=1
)
QUIET = RunOptions(quiet=True)
TINY = "finetune_tiny:Tiny"


@pytest.fixture
def roots(make_dataset, tmp_path, monkeypatch):
    """A tiny preprocessed dataset with two networks."""
    make_dataset(cases=5)
    plan_and_preprocess(7, Roots.below(tmp_path), PlanOptions(memory_gb=2, batch_size=1, feature_size=12), workers=1)
    path = tmp_path / "preprocessed" / "Dataset007_Blobs" / "plans.json"
    content = json.loads(path.read_text())
    networks = content["configurations"]["3d_fullres"]["networks"]
    assert networks["swin_unetr"]["arguments"] == {"feature_size": 12, "patch_merging": "distinct"}
    networks[TINY] = {"patch_size": [16, 16, 16], "batch_size": 1, "arguments": {}, "estimated_memory_gb": 0.1}
    path.write_text(json.dumps(content))
    (tmp_path / "finetune_tiny.py").write_text(
        "from torch import nn\n"
        "class Tiny(nn.Sequential):\n"
        "    def __init__(self, in_channels, out_channels):\n"
        "        super().__init__(nn.Conv3d(in_channels, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, out_channels, 1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return Roots.below(tmp_path)


def _setup(roots, network="swin_unetr"):
    return prepare(7, "0", roots, CONFIG, "3d_fullres", network, use_filter=False)


def _foreign(roots, path, name="swin_unetr"):
    """A plain state dict of a network of these plans."""
    torch.manual_seed(3)
    torch.save(_setup(roots, name).description.build().state_dict(), path)
    return path


def _merging(roots, path, said=None, network="swin_unetr", resume=False):
    setup, _ = read_weights(_setup(roots, network), PretrainedOptions(path, merging=said), resume)
    return setup.description.arguments.get("patch_merging")


def test_a_legacy_network_is_built_recorded_and_resumed(roots, tmp_path):
    path = _foreign(roots, tmp_path / "given.pt")
    options = dataclasses.replace(QUIET, pretrained=path, pretrained_merging="legacy")
    folder = train(7, 0, roots, CONFIG, options)
    assert read_checkpoint(folder / "checkpoint_final.pt")[0].arguments["patch_merging"] == "legacy"
    network, _ = load_network(folder / "checkpoint_best.pt")
    assert network.swinViT.layers1[0].downsample.offsets == MERGING_ORDERS["legacy"]
    record = json.loads((folder / "pretrained.json").read_text())
    assert (record["patch_merging"], record["source"]) == ("legacy", str(path))
    assert record["counts"] == {
        "loaded": len(network.state_dict()), "mapped": 0, "inflated": 0, "identity": 0, "fresh": 0, "not_fitting": 0,
        "unused": 0,
    }  # fmt: skip
    resume = dataclasses.replace(QUIET, resume=True)
    with pytest.raises(ConfigError, match="was started with --pretrained-merging legacy, not distinct"):
        train(7, 0, roots, CONFIG, dataclasses.replace(options, resume=True, pretrained_merging="distinct"))
    train(7, 0, roots, dataclasses.replace(CONFIG, epochs=2), resume)  # knows it without being told again
    # The same command with --resume goes on; other weights are refused rather than ignored.
    train(7, 0, roots, dataclasses.replace(CONFIG, epochs=2), dataclasses.replace(options, resume=True))
    (tmp_path / "other.pt").write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match=rf"with --pretrained .*other\.pt: it was started from {path}; drop"):
        train(7, 0, roots, CONFIG, dataclasses.replace(resume, pretrained=tmp_path / "other.pt"))
    description, content = read_checkpoint(folder / "checkpoint_final.pt")
    assert (description.arguments["patch_merging"], content["epoch"]) == ("legacy", 2)
    assert _merging(roots, folder / "checkpoint_final.pt") == "legacy"  # and so does whoever starts from it
    with pytest.raises(ConfigError, match="was trained with patch_merging 'legacy' and records it"):
        _merging(roots, folder / "checkpoint_final.pt", "distinct")


def test_weights_of_others_need_to_be_told_how_they_merge(roots, tmp_path, caplog):
    path = _foreign(roots, tmp_path / "given.pt")
    for said in ("legacy", "distinct"):
        assert _merging(roots, path, said) == said
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert _merging(roots, path) == "distinct"  # the default: as in the plans
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "its weights cannot tell" in warning
    assert "#8285" in warning
    assert "--pretrained-merging legacy" in warning
    plans = roots.preprocessed / "Dataset007_Blobs" / "plans.json"
    plans.write_text(plans.read_text().replace('"distinct"', '"legacy"'))
    assert _merging(roots, path) == "legacy"


def test_options_that_contradict_each_other(roots, tmp_path):
    path = _foreign(roots, tmp_path / "given.pt", TINY)
    with pytest.raises(ConfigError, match=f"is for swin_unetr, this run trains {TINY}"):
        _merging(roots, path, "legacy", TINY)
    with pytest.raises(ConfigError, match="describe the file of --pretrained: give that"):
        PretrainedOptions(merging="legacy")
    with pytest.raises(ConfigError, match="describe the file of --pretrained: give that"):
        PretrainedOptions(dataset=tmp_path)
    with pytest.raises(ConfigError, match="must be one of distinct, legacy, got 'new'"):
        PretrainedOptions(path, merging="new")


def test_the_record_tells_what_was_taken(roots, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    old = {"channel_names": {"0": "CT", "1": "MRI"}, "labels": {"background": 0, "Second": 1, "other": 2, "x": 3},
           "file_ending": ".nii.gz"}  # fmt: skip
    (tmp_path / "old.json").write_text(json.dumps(old))
    source = {"0.weight": torch.ones(4, 2, 3, 3, 3), "0.bias": torch.ones(4), "2.weight": torch.ones(4, 4, 1, 1, 1),
              "2.bias": torch.arange(4.0), "extra": torch.ones(1)}  # fmt: skip
    torch.save(source, tmp_path / "given.pt")
    options = dataclasses.replace(
        QUIET, pretrained=tmp_path / "given.pt", pretrained_dataset=tmp_path / "old.json", overwrite=True
    )
    folder = train(7, 0, roots, CONFIG, options, network=TINY)
    record = json.loads((folder / "pretrained.json").read_text())
    assert record["rows"] == {"background": "background", "first": None, "second": "Second"}
    assert record["channels"] == {"MRI": "channel 1 (MRI)"}
    assert (record["loaded"], record["inflated"], record["unused"]) == (["0.bias"], ["0.weight"], ["extra"])
    assert record["mapped"] == ["2.bias", "2.weight"]
    assert "patch_merging" not in record
    weights = read_checkpoint(folder / "checkpoint_final.pt")[1]["network_weights"]
    torch.testing.assert_close(weights["2.bias"][[0, 2]], torch.tensor([0.0, 1.0]))
    assert any("2 output weights keep 2 of 3 classes (fresh: first)" in record.message for record in caplog.records)
    again = dataclasses.replace(QUIET, overwrite=True)
    assert (train(7, 0, roots, CONFIG, again, network=TINY) / "pretrained.json").exists() is False
    with pytest.raises(ConfigError, match=r"with --pretrained .*: it was started without; drop the option"):
        train(7, 0, roots, CONFIG, dataclasses.replace(options, overwrite=False, resume=True), network=TINY)


def test_the_weights_of_a_resumed_run_are_recognised_from_anywhere(roots, tmp_path, monkeypatch):
    torch.save({"0.bias": torch.ones(4)}, tmp_path / "given.pt")
    (tmp_path / "dataset.json").write_text(json.dumps(_setup(roots, TINY).spec.content))
    monkeypatch.chdir(tmp_path)
    options = dataclasses.replace(QUIET, pretrained=Path("given.pt"))
    train(7, 0, roots, CONFIG, options, network=TINY)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "given.pt").write_bytes(b"another")
    resume = dataclasses.replace(QUIET, resume=True)
    train(7, 0, roots, CONFIG, dataclasses.replace(resume, pretrained=Path("../given.pt")), network=TINY)
    with pytest.raises(ConfigError, match=rf"with --pretrained given\.pt: it was started from {tmp_path}/given\.pt"):
        train(7, 0, roots, CONFIG, dataclasses.replace(resume, pretrained=Path("given.pt")), network=TINY)
    both = dataclasses.replace(resume, pretrained=Path("../given.pt"), pretrained_dataset=Path("../dataset.json"))
    with pytest.raises(ConfigError, match=r"with --pretrained-dataset .* it was started without"):
        train(7, 0, roots, CONFIG, both, network=TINY)
    merging = dataclasses.replace(resume, pretrained=Path("../given.pt"), pretrained_merging="legacy")
    with pytest.raises(ConfigError, match="it was started without --pretrained-merging, not legacy"):
        train(7, 0, roots, CONFIG, merging, network=TINY)


def test_other_voxels_and_intensities_are_warned_of(roots, tmp_path):
    setup = _setup(roots)

    def differences(change):
        model = json.loads(json.dumps(setup.description.to_json()))
        change(model["plans"])
        torch.save({"model": model, "network_weights": {"a": torch.ones(1)}}, tmp_path / "theirs.pt")
        return preprocessing_differences(read_pretrained(tmp_path / "theirs.pt"), setup)

    spacing = setup.description.plans["configurations"]["3d_fullres"]["spacing_mm"]
    assert differences(lambda plans: None) == []
    assert differences(lambda plans: _edit(plans, spacing_mm=[1.05 * s for s in spacing])) == []
    (line,) = differences(lambda plans: _edit(plans, spacing_mm=[spacing[0] / 2, *spacing[1:]]))
    assert line.startswith(f"the pretrained network saw voxels of {spacing[0] / 2:.3g} x {spacing[1]:.3g} x ")
    (line,) = differences(lambda plans: plans["normalization"][0].update(scheme="no_norm"))
    assert line.startswith("channel 0 was normalised by no_norm where the weights were trained, by zscore in this run")
    for change in (lambda plans: _edit(plans, spacing_mm=[0, 1, 1]), lambda plans: _edit(plans, of_a_later_version=1)):
        (line,) = differences(change)
        assert "are not compared with the run's, because its plans cannot be read (" in line
    torch.save({"a": torch.ones(1)}, tmp_path / "others.pt")
    assert preprocessing_differences(read_pretrained(tmp_path / "others.pt"), setup) == []


def _edit(plans, **changes):
    plans["configurations"]["3d_fullres"].update(changes)


def test_a_refused_import_changes_nothing(roots, tmp_path):
    folder = train(7, 0, roots, CONFIG, QUIET, network=TINY)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    torch.save({"other": torch.ones(2)}, tmp_path / "given.pt")
    options = dataclasses.replace(QUIET, overwrite=True, pretrained=tmp_path / "given.pt")
    with pytest.raises(CheckpointError, match="not one of its 1 weights matches this network"):
        train(7, 0, roots, CONFIG, options, network=TINY)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_import_leaves_the_random_weights_of_a_run_alone(roots, tmp_path):
    """What starts fresh is what a run without the import starts with: the networks built to compare use no numbers."""
    plain = train(7, 0, roots, CONFIG, QUIET, network=TINY)
    fresh = read_checkpoint(plain / "checkpoint_final.pt")[1]["network_weights"]["2.weight"]
    torch.save({"0.bias": torch.ones(4)}, tmp_path / "given.pt")
    options = dataclasses.replace(QUIET, overwrite=True, pretrained=tmp_path / "given.pt")
    folder = train(7, 0, roots, CONFIG, options, network=TINY)
    found = read_checkpoint(folder / "checkpoint_final.pt")[1]["network_weights"]["2.weight"]
    torch.testing.assert_close(found, fresh)
