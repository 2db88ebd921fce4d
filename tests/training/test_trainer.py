"""Training end to end at small size: resume is exact, flags and options act, errors are sentences."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import CheckpointError, ConfigError, DatasetError
from ukbob_seg.filtering.policies import LabelTrust
from ukbob_seg.inference.sliding_window import WindowSettings
from ukbob_seg.preprocessing.plans import Plans
from ukbob_seg.preprocessing.preprocessor import preprocess
from ukbob_seg.preprocessing.records import case_files
from ukbob_seg.preprocessing.storage import open_array, save_array
from ukbob_seg.training.checkpoint import read_checkpoint
from ukbob_seg.training.config import TrainingConfig
from ukbob_seg.training.sampling import TrainingCase
from ukbob_seg.training.setup import choose_config, prepare
from ukbob_seg.training.trainer import RunOptions, train
from ukbob_seg.training.validation import validate

CONFIG = TrainingConfig(
    epochs=3, iterations_per_epoch=2, learning_rate=1e-3, schedule="one_cycle", validation_every=2, validation_cases=1
)
QUIET = RunOptions(quiet=True)


def _train(roots, config=CONFIG, options=QUIET, **more):
    return train(7, 0, roots, config, options, network="tests_tiny:Tiny", **more)


def _weights(folder, name="final"):
    return read_checkpoint(folder / f"checkpoint_{name}.pt")[1]["network_weights"]


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_leaves_everything_a_model_needs(roots):
    folder = _train(roots)
    names = {path.name for path in folder.iterdir()}
    assert names == {"checkpoint_best.pt", "checkpoint_final.pt", "progress.csv", "progress.png", "training.json"}
    assert {path.name for path in folder.parent.iterdir()} == {"fold_0", "plans.json", "dataset.json"}
    assert folder.parent.name == "3d_fullres__tests_tiny.Tiny"
    with open(folder / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert [bool(row["val_mean_dice"]) for row in rows] == [False, True, True]
    description, content = read_checkpoint(folder / "checkpoint_best.pt")
    assert (description.network, description.fold, description.head) == ("tests_tiny:Tiny", "0", "softmax")
    assert description.mirror_axes == (0, 1, 2)
    best = max(float(row["val_mean_dice"]) for row in rows if row["val_mean_dice"])
    assert content["best_dice"] == pytest.approx(best, rel=1e-5)


def test_training_learns(roots):
    config = dataclasses.replace(CONFIG, epochs=4, iterations_per_epoch=60, learning_rate=2e-2, validation_every=4)
    folder = _train(roots, config)
    with open(folder / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["train_loss"]) < 0.6 * float(rows[0]["train_loss"])
    assert float(rows[-1]["val_mean_dice"]) > 0.5


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(roots):
    first = _weights(_train(roots))
    again = _weights(_train(roots, options=dataclasses.replace(QUIET, overwrite=True)))
    other = _weights(_train(roots, dataclasses.replace(CONFIG, seed=1), dataclasses.replace(QUIET, overwrite=True)))
    assert _same(first, again)
    assert not _same(first, other)


def test_sigkill_and_resume_give_the_same_bits(roots, tmp_path):
    """The whole point of the checkpoint: kill the real command at a random moment, resume, compare."""
    flags = ["--epochs", "6", "--iterations-per-epoch", "4", "--lr", "1e-3", "--schedule", "one_cycle",
             "--validation-every", "2", "--validation-cases", "1", "--no-validation", "--device", "cpu",
             "--network", "tests_tiny:Tiny", "--raw", str(roots.raw), "--preprocessed", str(roots.preprocessed),
             "--results"]  # fmt: skip
    command = [sys.executable, "-c", "import sys; from ukbob_seg.cli.train import main; sys.exit(main())", "7", "0"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    model = Path("Dataset007_Blobs", "3d_fullres__tests_tiny.Tiny", "fold_0")
    subprocess.run([*command, *flags, str(tmp_path / "whole")], env=environment, check=True, stderr=subprocess.DEVNULL)
    uninterrupted = _weights(tmp_path / "whole" / model)
    flags.append(str(tmp_path / "killed"))
    folder = tmp_path / "killed" / model
    process = subprocess.Popen([*command, *flags], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (folder / "checkpoint_latest.pt").is_file() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "checkpoint_final.pt").exists(), "the run ended before it could be killed"
    stopped = read_checkpoint(folder / "checkpoint_latest.pt")[1]["epoch"]
    assert 1 <= stopped < 6
    done = subprocess.run([*command, *flags, "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert _same(_weights(folder), uninterrupted)
    with open(folder / "progress.csv") as file:
        assert len(list(csv.DictReader(file))) == 6


def test_a_finished_run_can_be_extended(roots):
    _train(roots, dataclasses.replace(CONFIG, schedule="constant"))
    folder = _train(
        roots, dataclasses.replace(CONFIG, schedule="constant", epochs=5), dataclasses.replace(QUIET, resume=True)
    )
    straight = _train(
        roots, dataclasses.replace(CONFIG, schedule="constant", epochs=5), dataclasses.replace(QUIET, overwrite=True)
    )
    extended = _weights(folder)
    assert _same(extended, _weights(straight))


@pytest.mark.parametrize("augmentation", ["strong", "mri"])
def test_every_set_trains_and_resumes_to_the_same_bits(roots, augmentation):
    config = dataclasses.replace(CONFIG, schedule="constant", augmentation=augmentation)
    whole = _weights(_train(roots, config))
    again = dataclasses.replace(QUIET, overwrite=True)
    _train(roots, dataclasses.replace(config, epochs=1), again)
    folder = _train(roots, config, dataclasses.replace(QUIET, resume=True, loader_workers=1))
    assert _same(_weights(folder), whole)
    paper = _weights(_train(roots, dataclasses.replace(config, augmentation="ukbob"), again))
    assert not _same(paper, whole)


def test_resuming_is_refused_where_it_cannot_be_exact(roots):
    resume = dataclasses.replace(QUIET, resume=True)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        _train(roots, options=resume)
    with pytest.raises(ConfigError, match="--resume goes on with the run that --overwrite would delete"):
        _train(roots, options=dataclasses.replace(resume, overwrite=True))
    folder = _train(roots)
    with pytest.raises(ConfigError, match="already holds a training run"):
        _train(roots)
    with pytest.raises(ConfigError, match=r"another recipe \(learning_rate 0.001 -> 0.01\)"):
        _train(roots, dataclasses.replace(CONFIG, learning_rate=1e-2), resume)
    with pytest.raises(ConfigError, match="--epochs 2: it was started with 3, and may only be extended"):
        _train(roots, dataclasses.replace(CONFIG, epochs=2), resume)
    whole = (folder / "checkpoint_final.pt").read_bytes()
    (folder / "checkpoint_final.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"checkpoint_final\.pt is damaged"):
        _train(roots, dataclasses.replace(CONFIG, epochs=5), resume)


def test_a_checkpoint_of_another_network_is_refused(roots, tmp_path):
    folder = _train(roots)
    plans = roots.preprocessed / "Dataset007_Blobs" / "plans.json"
    content = json.loads(plans.read_text())
    content["configurations"]["3d_fullres"]["networks"]["tests_tiny:Tiny"]["arguments"]["width"] = 5
    plans.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"the network arguments changed since; .* --overwrite"):
        _train(roots, dataclasses.replace(CONFIG, epochs=5), dataclasses.replace(QUIET, resume=True))
    assert (folder / "checkpoint_final.pt").is_file()


def test_pretrained_weights_are_loaded(roots, tmp_path):
    first = _train(roots)
    config = dataclasses.replace(CONFIG, epochs=1, iterations_per_epoch=1, learning_rate=1e-12, weight_decay=0.0)
    options = dataclasses.replace(QUIET, overwrite=True, pretrained=tmp_path / "given.pt")
    (tmp_path / "given.pt").write_bytes((first / "checkpoint_final.pt").read_bytes())
    given = _weights(first)
    tuned = _weights(_train(roots, config, options))
    assert all(torch.allclose(given[key], tuned[key], atol=1e-6) for key in given)


def _flag(roots, *pairs, policy="ignore"):
    """Leave a filter's decisions: label value of case number for each pair; returns the case names."""
    import pandas as pd

    from ukbob_seg.filtering.cohort import solf_filter
    from ukbob_seg.filtering.config import FilterConfig
    from ukbob_seg.filtering.policies import FilterPolicy

    folder = roots.preprocessed / "Dataset007_Blobs" / "solf"
    config = FilterConfig(rule="none", report=False, quiet=True, policy=FilterPolicy(policy))
    solf_filter(roots.raw / "Dataset007_Blobs", folder, config)
    flags = pd.read_parquet(folder / "flags.parquet")
    cases = sorted(flags.case.unique())
    for number, label in pairs:
        flags.loc[(flags.case == cases[number]) & (flags.label == label), "flagged"] = True
    flags.to_parquet(folder / "flags.parquet")
    return cases


def test_the_filters_flags_reach_the_loss(roots):
    folder = roots.preprocessed / "Dataset007_Blobs" / "solf"
    first = _flag(roots, (0, 2))[0]
    assert LabelTrust.load(folder).flagged_values(first) == (2,)
    setup = prepare(7, "all", roots, CONFIG, "3d_fullres", "swin_unetr", use_filter=True)
    tables = {case.name: case.lookup for case in setup.train}
    assert tables[first][2] == 255
    assert tables[first][1] == 1
    assert all(table is None for name, table in tables.items() if name != first)
    ignored = prepare(7, "all", roots, CONFIG, "3d_fullres", "swin_unetr", use_filter=False)
    assert all(case.lookup is None for case in ignored.train)


def test_a_marginal_loss_learns_from_flagged_cases(roots):
    """Flags of organ 2 in most cases, whose labels miss it: background there must not be what is learned."""
    cases = _flag(roots, (2, 2), (3, 2), (4, 2))
    arrays = roots.preprocessed / "Dataset007_Blobs" / "3d_fullres"
    for name in cases[2:]:
        path = case_files(arrays, name)[1]
        labels = np.asarray(open_array(path)[:])
        path.unlink()
        save_array(path, np.where(labels == 2, 0, labels).astype(np.uint8), (8, 8, 8))
    config = dataclasses.replace(CONFIG, epochs=4, iterations_per_epoch=60, learning_rate=2e-2, validation_every=4)
    dice = {}
    for flagged in ("ignore", "marginal"):
        chosen = dataclasses.replace(config, flagged_labels=flagged)
        options = dataclasses.replace(QUIET, overwrite=True)
        folder = train(7, "all", roots, chosen, options, network="tests_tiny:Tiny")
        _, content = read_checkpoint(folder / "checkpoint_final.pt")
        assert content["config"]["flagged_labels"] == flagged
        assert all(torch.isfinite(value).all() for value in content["network_weights"].values())
        dice[flagged] = json.loads(content["history"])[-1]["val_dice"][1]
    assert dice["marginal"] > dice["ignore"]
    setup = prepare(7, "all", roots, chosen, "3d_fullres", "tests_tiny:Tiny", use_filter=True)
    assert setup.train[4].lookup[[0, 1, 2, 255]].tolist() == [256, 1, 257, 255]
    assert setup.train[0].lookup is None
    every = dataclasses.replace(chosen, validation_cases=0)
    setup = prepare(7, "all", roots, every, "3d_fullres", "tests_tiny:Tiny", use_filter=True)
    assert setup.val[4].lookup[[0, 1, 2, 255]].tolist() == [0, 1, 255, 255]  # validation cannot count what is unknown
    with pytest.raises(ConfigError, match=r"another recipe \(flagged_labels marginal -> ignore\)"):
        train(7, "all", roots, config, dataclasses.replace(QUIET, resume=True), network="tests_tiny:Tiny")


def test_a_marginal_loss_contradicts_the_policy_background(roots):
    marginal = dataclasses.replace(CONFIG, flagged_labels="marginal")
    plain = prepare(7, "all", roots, marginal, "3d_fullres", "tests_tiny:Tiny", use_filter=True)
    assert plain.flag_codes is None  # never filtered
    _flag(roots, (0, 2), policy="background")
    with pytest.raises(ConfigError, match="run ukbob_filter with --policy ignore"):
        prepare(7, "all", roots, marginal, "3d_fullres", "tests_tiny:Tiny", use_filter=True)
    with pytest.raises(ConfigError, match="about the flags that --no-filter ignores"):
        prepare(7, "all", roots, marginal, "3d_fullres", "tests_tiny:Tiny", use_filter=False)


def test_a_marginal_loss_of_a_sigmoid_head(roots):
    _flag(roots, (0, 2), (1, 1))
    config = dataclasses.replace(CONFIG, flagged_labels="marginal", loss="bce_dice")
    folder = train(7, "all", roots, config, QUIET, network="tests_tiny:Tiny")
    description, content = read_checkpoint(folder / "checkpoint_final.pt")
    assert description.head == "sigmoid"
    assert all(np.isfinite(row["train_loss"]) for row in json.loads(content["history"]))


def test_checkpoints_of_before_an_option_existed_can_be_resumed(roots):
    folder = _train(roots, dataclasses.replace(CONFIG, schedule="constant"))
    content = torch.load(folder / "checkpoint_final.pt", weights_only=True)
    del content["config"]["flagged_labels"]
    torch.save(content, folder / "checkpoint_final.pt")
    longer = dataclasses.replace(CONFIG, schedule="constant", epochs=4)
    _train(roots, longer, dataclasses.replace(QUIET, resume=True))
    assert read_checkpoint(folder / "checkpoint_final.pt")[1]["epoch"] == 4


def test_options_choose_cases(roots):
    setup = prepare(7, "0", roots, dataclasses.replace(CONFIG, subset_fraction=0.5), "3d_fullres", "swin_unetr", True)
    whole = prepare(7, "0", roots, CONFIG, "3d_fullres", "swin_unetr", True)
    assert len(whole.train) == 4
    assert len(setup.train) == 2
    assert len(whole.val) == 1
    with pytest.raises(ConfigError, match=r"fold must be 0\.\.4 or 'all', got '7'"):
        prepare(7, "7", roots, CONFIG, "3d_fullres", "swin_unetr", True)
    with pytest.raises(ConfigError, match="no configuration '4d'"):
        prepare(7, "0", roots, CONFIG, "4d", "swin_unetr", True)


def test_not_preprocessed(roots):
    for path in (roots.preprocessed / "Dataset007_Blobs" / "3d_fullres").iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match="is not preprocessed for 3d_fullres; run ukbob_preprocess"):
        _train(roots)


def test_the_recipe_follows_preset_and_flags(roots):
    assert choose_config(7, roots, "swin_unetr").epochs == 500
    assert choose_config(7, roots, "plain_conv_unet").optimizer == "sgd"
    assert choose_config(7, roots, "plain_conv_unet").augmentation == "strong"
    assert choose_config(7, roots, "plain_conv_unet", augmentation="ukbob").augmentation == "ukbob"
    assert choose_config(7, roots, "swin_unetr", learning_rate=0.5, seed=None).learning_rate == 0.5
    assert choose_config(7, roots, "swin_unetr", pretrained=True).warmup_epochs == 50
    assert choose_config(7, roots, "swin_unetr", pretrained=True, epochs=10).warmup_epochs == 0


def test_a_loss_that_stays_nan_stops_with_a_sentence(roots):
    from ukbob_seg.errors import UkbobError

    config = dataclasses.replace(CONFIG, iterations_per_epoch=60, learning_rate=1e30, gradient_clip=0.0)
    with pytest.raises(UkbobError, match="loss or gradient were not finite for 20 steps in a row") as caught:
        _train(roots, config)
    assert "checkpoint" not in str(caught.value)  # there is none yet
    short = dataclasses.replace(config, epochs=30, iterations_per_epoch=4, validation_every=30)
    with pytest.raises(UkbobError, match=r"not finite for 20 steps in a row \(epoch [4-9]\); .* is from before"):
        _train(roots, short, dataclasses.replace(QUIET, overwrite=True))
    folder = roots.results / "Dataset007_Blobs/3d_fullres__tests_tiny.Tiny/fold_0"
    _, content = read_checkpoint(folder / "checkpoint_latest.pt")
    rows = list(csv.DictReader((folder / "progress.csv").read_text().splitlines()))
    assert [row["skipped_steps"] for row in rows][1:4] == ["4", "4", "4"]  # counted where everybody looks
    assert 0 < int(rows[0]["skipped_steps"]) < 4
    assert all(torch.isfinite(value).all() for value in content["network_weights"].values())


def test_arrays_of_other_plans_are_refused(roots):
    path = roots.preprocessed / "Dataset007_Blobs" / "plans.json"
    content = json.loads(path.read_text())
    content["configurations"]["3d_fullres"]["spacing_mm"] = [2.0, 2.0, 2.0]
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"blob_\d+ was preprocessed before plans\.json .* run ukbob_preprocess"):
        _train(roots)


def test_resuming_on_other_arrays_is_refused(roots):
    _train(roots)
    path = roots.preprocessed / "Dataset007_Blobs" / "plans.json"
    content = json.loads(path.read_text())
    content["configurations"]["3d_fullres"]["spacing_mm"] = [1.25, 1.25, 1.25]
    path.write_text(json.dumps(content))
    raw = roots.raw / "Dataset007_Blobs"
    preprocess(raw, path.parent, Plans.load(path), workers=1, quiet=True)
    described = roots.results / "Dataset007_Blobs" / "3d_fullres__tests_tiny.Tiny" / "plans.json"
    before = described.read_bytes()
    with pytest.raises(ConfigError, match="the preprocessed data changed since"):
        _train(roots, dataclasses.replace(CONFIG, epochs=5), dataclasses.replace(QUIET, resume=True))
    assert described.read_bytes() == before  # a refused run changes nothing in the model folder


def test_without_augmentation_no_flips_are_recorded(roots):
    config = dataclasses.replace(CONFIG, augmentation="none")
    setup = prepare(7, "0", roots, config, "3d_fullres", "swin_unetr", True)
    assert setup.description.mirror_axes == ()
    assert prepare(7, "0", roots, CONFIG, "3d_fullres", "swin_unetr", True).description.mirror_axes == (0, 1, 2)


class _Regions(torch.nn.Module):
    """Says of every voxel, whose image value is its label, which regions it is in."""

    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", torch.from_numpy(table).float() * 2 - 1)

    def forward(self, image):
        return self.table[:, image[:, 0].long()].movedim(0, 1)


@pytest.mark.parametrize("count", [3, 40, 70])
def test_every_region_is_scored_through_the_sliding_window(tmp_path, count):
    scheme = LabelScheme.from_json(
        {"background": 0, **{f"r{k}": [k, k % count + 1] for k in range(1, count + 1)}, "ignore": count + 1},
        list(range(1, count + 1)),
    )
    rng = np.random.default_rng(0)
    labels = rng.integers(0, count + 1, (20, 18, 16)).astype(np.uint8)
    table = scheme.region_table[:, : count + 1].copy()
    image = labels.astype(np.float32)[None]
    stored = np.where(rng.random(labels.shape) < 0.1, scheme.ignore_index, labels).astype(np.uint8)
    for array, path in zip((image, stored), case_files(tmp_path, "case")[:2], strict=True):
        save_array(path, array, (8, 8, 8))
    windows = WindowSettings((8, 8, 8))
    score = validate(_Regions(table), tmp_path, [TrainingCase("case")], scheme, windows, "cpu")
    assert score.per_class == (1.0,) * count
    table[-1] = False  # the last region is never found
    score = validate(_Regions(table), tmp_path, [TrainingCase("case")], scheme, windows, "cpu")
    assert score.per_class == (1.0,) * (count - 1) + (0.0,)


def test_resuming_with_another_batch_size_is_refused(roots):
    _train(roots)
    path = roots.preprocessed / "Dataset007_Blobs" / "plans.json"
    content = json.loads(path.read_text())
    content["configurations"]["3d_fullres"]["networks"]["tests_tiny:Tiny"]["batch_size"] = 3
    path.write_text(json.dumps(content))
    longer = dataclasses.replace(CONFIG, epochs=5)
    with pytest.raises(ConfigError, match="the patch and batch size changed since"):
        _train(roots, longer, dataclasses.replace(QUIET, resume=True))
