"""Accumulation, averaged weights, early stopping, TensorBoard, clipping, and several folds."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import sys

import pytest
import torch
import torch.nn.functional as F

from ukbob_seg.cli import train as command
from ukbob_seg.errors import ConfigError
from ukbob_seg.training import trainer
from ukbob_seg.training.augmentation import Batch
from ukbob_seg.training.checkpoint import load_network, read_checkpoint
from ukbob_seg.training.config import RunOptions, TrainingConfig
from ukbob_seg.training.ema import WeightAverage, averaged
from ukbob_seg.training.state import TrainState
from ukbob_seg.training.stopping import StopRequest, validations_without_gain
from ukbob_seg.training.validation import ValidationScore

CONFIG = TrainingConfig(
    epochs=3, iterations_per_epoch=2, learning_rate=1e-3, schedule="one_cycle", validation_every=1, validation_cases=1
)
QUIET = RunOptions(quiet=True)


def _train(roots, config=CONFIG, options=QUIET, network="tests_tiny:Tiny"):
    return trainer.train(7, 0, roots, config, options, network=network)


def _content(folder, name="final"):
    return read_checkpoint(folder / f"checkpoint_{name}.pt")[1]


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _step(config, batches, network=None, loss=F.cross_entropy):
    """One step of the loop on given batches; returns the network and the state after it."""
    torch.manual_seed(0)
    network = network or torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3), torch.nn.InstanceNorm3d(4), torch.nn.Flatten(2))
    state = TrainState(network, torch.optim.SGD(network.parameters(), lr=1.0))
    run = trainer.Run(config, None, RunOptions(), network, network, [], loss, StopRequest())
    trainer._train_step(run, state, iter(enumerate(batches)))
    return network, state


def _batch(first, last):
    generator = torch.Generator().manual_seed(2)
    image, labels = torch.randn(6, 1, 5, 5, 5, generator=generator), torch.randint(0, 4, (6, 27), generator=generator)
    return Batch(image[first:last], labels[first:last])


def test_accumulation_is_the_gradient_of_one_large_batch_where_the_loss_is_a_mean_over_elements():
    config = TrainingConfig(schedule="constant", learning_rate=0.5)
    whole, large = _step(config, [_batch(0, 6)])
    parts, small = _step(dataclasses.replace(config, accumulate=3), [_batch(0, 2), _batch(2, 4), _batch(4, 6)])
    assert float(small.loss_sum) == pytest.approx(float(large.loss_sum), abs=1e-6)
    for one, other in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_accumulation_takes_the_next_batches(roots):
    """N batches per step: as many steps in an epoch, N times the patches; resuming continues with the right ones."""
    config = dataclasses.replace(CONFIG, accumulate=3, schedule="constant")
    folder = _train(roots, config)
    whole = _content(folder)["network_weights"]
    _train(roots, dataclasses.replace(config, epochs=1), dataclasses.replace(QUIET, overwrite=True))
    assert _same(_content(_train(roots, config, dataclasses.replace(QUIET, resume=True)))["network_weights"], whole)
    with pytest.raises(ConfigError, match=r"another recipe \(accumulate 3 -> 1\)"):
        _train(roots, dataclasses.replace(config, accumulate=1, epochs=5), dataclasses.replace(QUIET, resume=True))


def test_the_gradient_is_clipped():
    config = TrainingConfig(schedule="constant", learning_rate=1.0, gradient_clip=1e-3)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3), torch.nn.Flatten(2))
    before = [parameter.detach().clone() for parameter in network.parameters()]
    _step(config, [_batch(0, 6)], network, lambda outputs, labels: 1e3 * F.cross_entropy(outputs, labels))
    moved = torch.cat([(a - b).flatten() for a, b in zip(network.parameters(), before, strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(1e-3, rel=1e-3)


def test_a_bad_step_changes_nothing():
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3), torch.nn.Flatten(2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    config = TrainingConfig(schedule="constant", accumulate=2)
    bad = Batch(_batch(0, 3).image * float("nan"), _batch(0, 3).labels)
    _, state = _step(config, [_batch(0, 3), bad], network)
    assert _same(network.state_dict(), before)
    assert (state.bad_steps, state.counted) == (1, 0)


def test_the_average_follows_its_formula():
    network = torch.nn.BatchNorm1d(2)
    average = WeightAverage(network, 0.5)
    expected = torch.ones(2)
    for step in range(8):
        with torch.no_grad():
            network.weight.fill_(step + 2.0)
            network.num_batches_tracked += 1
        average.update(network, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 2)
    torch.testing.assert_close(average.weights["weight"], expected)
    assert int(average.weights["num_batches_tracked"]) == 8
    with averaged(network, average):
        torch.testing.assert_close(network.weight.detach(), expected)
    assert network.weight.tolist() == [9.0, 9.0]


def test_averaged_weights_are_validated_stored_and_resumed(roots, monkeypatch):
    config = dataclasses.replace(CONFIG, ema=0.9, schedule="constant")
    seen = []

    def spy(network, *arguments, **more):
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return validate(network, *arguments, **more)

    validate = trainer.validate
    monkeypatch.setattr(trainer, "validate", spy)
    folder = _train(roots, config)
    whole = _content(folder)
    assert _same(seen[-1], whole["network_weights"])
    assert not _same(whole["network_weights"], whole["training_weights"])
    plain = _train(roots, dataclasses.replace(config, ema=0.0), dataclasses.replace(QUIET, overwrite=True))
    assert _same(whole["training_weights"], _content(plain)["network_weights"])  # the average only watches
    assert "training_weights" not in _content(plain)
    _train(roots, dataclasses.replace(config, epochs=1), dataclasses.replace(QUIET, overwrite=True))
    resumed = _content(_train(roots, config, dataclasses.replace(QUIET, resume=True)))
    for weights in ("network_weights", "training_weights"):
        assert _same(resumed[weights], whole[weights])
    best = _content(folder, "best")
    assert "training_weights" not in best
    network, _ = load_network(folder / "checkpoint_best.pt")
    assert any(_same(network.state_dict(), weights) for weights in seen[-3:])


def test_checkpoints_from_before_these_options(roots):
    """They lack the new entries of the recipe and the step; they predict, and resume as they were."""
    config = dataclasses.replace(CONFIG, schedule="constant")
    folder = _train(roots, config)
    straight = dataclasses.replace(config, epochs=5)
    content = torch.load(folder / "checkpoint_final.pt", weights_only=True)
    for key in ("step", "loss_sum", "counted", "seconds", "data_seconds", "bad_steps"):
        del content[key]
    for key in ("accumulate", "ema", "early_stopping"):
        del content["config"][key]
    torch.save(content, folder / "checkpoint_final.pt")
    load_network(folder / "checkpoint_final.pt")
    found = _content(_train(roots, straight, dataclasses.replace(QUIET, resume=True)))["network_weights"]
    whole = _content(_train(roots, straight, dataclasses.replace(QUIET, overwrite=True)))["network_weights"]
    assert _same(found, whole)


def test_validations_without_gain():
    def history(*scores):
        return [{"val_mean_dice": score} if score is not None else {} for score in scores]

    assert validations_without_gain(history()) == 0
    assert validations_without_gain(history(None, 0.1, None, 0.2)) == 0
    assert validations_without_gain(history(0.1, 0.3, 0.2, None, 0.3)) == 2
    assert validations_without_gain(history(float("nan"), float("nan"))) == 2


def test_early_stopping(roots, monkeypatch, caplog):
    dice = [0.2, 0.5, 0.4, 0.5, 0.6, 0.3, 0.3, 0.9, 0.9, 0.9]
    calls = []

    def scripted(*arguments, **more):
        calls.append(dice[len(calls)])
        return ValidationScore((calls[-1], calls[-1]), calls[-1])

    monkeypatch.setattr(trainer, "validate", scripted)
    config = dataclasses.replace(CONFIG, epochs=9, schedule="constant", early_stopping=2)
    with caplog.at_level("INFO", logger="ukbob_seg"):
        folder = _train(roots, config)
    sentence = "stopped early after epoch 3: 2 validations without a higher mean Dice than 0.500 of epoch 1"
    assert f"{sentence}; the best weights are in checkpoint_best.pt" in caplog.text
    assert json.loads((folder / "training.json").read_text())["ended"] == sentence
    assert not (folder / "checkpoint_latest.pt").exists()
    before = (folder / "checkpoint_final.pt").read_bytes()
    resume = dataclasses.replace(QUIET, resume=True)
    _train(roots, config, resume)  # it is finished
    assert len(calls) == 4
    assert (folder / "checkpoint_final.pt").read_bytes() == before
    _train(roots, dataclasses.replace(config, early_stopping=3), resume)  # more patience: it goes on
    assert _content(folder)["epoch"] == 9
    assert _content(folder)["best_dice"] == 0.9
    assert json.loads((folder / "training.json").read_text())["ended"] == "all 9 epochs are done"
    with pytest.raises(ConfigError, match="early_stopping must not be negative"):
        dataclasses.replace(CONFIG, early_stopping=-1)
    with pytest.raises(ConfigError, match=r"ema must lie in \[0, 1\), got 1"):
        dataclasses.replace(CONFIG, ema=1)
    with pytest.raises(ConfigError, match="accumulate must be at least 1"):
        dataclasses.replace(CONFIG, accumulate=0)


def test_tensorboard_is_refused_without_its_package(roots, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="--tensorboard needs a package that is not installed: pip install"):
        _train(roots, options=dataclasses.replace(QUIET, tensorboard=True))
    assert not (roots.results / "Dataset007_Blobs").exists()


def test_tensorboard_gets_every_epoch_once(roots):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = dataclasses.replace(CONFIG, schedule="constant", validation_every=2)
    options = dataclasses.replace(QUIET, tensorboard=True)
    folder = _train(roots, config, options)
    _train(roots, dataclasses.replace(config, epochs=5), dataclasses.replace(options, resume=True))
    found = events.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    with open(folder / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    loss = {event.step: event.value for event in found.Scalars("training/loss")}
    assert loss == pytest.approx({int(row["epoch"]): float(row["train_loss"]) for row in rows}, rel=1e-4)
    dice = {event.step: event.value for event in found.Scalars("validation/first")}
    assert sorted(dice) == [int(row["epoch"]) for row in rows if row["val_mean_dice"]]
    _train(roots, config, dataclasses.replace(QUIET, overwrite=True))
    assert not (folder / "tensorboard").exists()


def test_a_signal_in_the_final_validation(roots, monkeypatch, capsys):
    from ukbob_seg.evaluation import validate_fold

    def signalled(*arguments, **more):
        os.kill(os.getpid(), signal.SIGUSR1)
        raise AssertionError("the signal came too late")

    before = signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patched:
        patched.setattr(validate_fold, "validate_fold", signalled)
        assert _command(roots, 0) == 143
    assert "stopped by SIGUSR1 in the final validation of fold 0, when training was done" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) == before
    assert _command(roots, 0, "--resume") == 0


def _command(roots, *arguments, epochs=1):
    flags = ["--network", "tests_tiny:Tiny", "--epochs", str(epochs), "--iterations-per-epoch", "1", "--device", "cpu",
             "--validation-cases", "1", "--raw", roots.raw, "--preprocessed", roots.preprocessed,
             "--results", roots.results]  # fmt: skip
    return command.main([str(part) for part in (7, *arguments, *flags)])


def test_old_predictions_go_when_training_goes_on(roots, caplog):
    fold = roots.results / "Dataset007_Blobs" / "3d_fullres__tests_tiny.Tiny" / "fold_0"
    assert _command(roots, 0) == 0
    assert (fold / "validation" / "summary.json").is_file()
    assert _command(roots, 0, "--resume", "--no-validation") == 0  # nothing is trained, and they stay
    assert "is trained already: nothing is left to do" in caplog.text
    assert (fold / "validation" / "summary.json").is_file()
    assert _command(roots, 0, "--overwrite", "--no-validation") == 0
    assert not (fold / "validation").exists()
    assert _command(roots, 0, "--overwrite") == 0
    assert _command(roots, 0, "--resume", "--no-validation", epochs=2) == 0
    assert not (fold / "validation").exists()


def test_a_resumed_run_has_the_recipe_it_was_begun_with(roots, capsys):
    """Its own, not the preset's: the recipe of fine-tuning is another one, and its warm-up depends on the epochs."""
    model = roots.results / "Dataset007_Blobs/3d_fullres__tests_tiny.Tiny"
    assert _command(roots, 1, "--no-validation") == 0
    weights = roots.results / "weights.pt"
    (model / "fold_1" / "checkpoint_best.pt").rename(weights)
    plans = roots.preprocessed / "Dataset007_Blobs" / "plans.json"
    plans.write_text(plans.read_text().replace('"preset": "default"', '"preset": "ukbob"'))  # fine-tuning warms up
    (roots.preprocessed / "Dataset007_Blobs" / "splits.json").unlink()
    assert _command(roots, 0, "--pretrained", weights, "--lr", "1e-5", "--no-validation") == 0
    assert _command(roots, 0, "--resume", "--no-validation", epochs=52) == 0  # neither weights nor rate again
    content = read_checkpoint(model / "fold_0" / "checkpoint_final.pt")[1]
    assert (content["epoch"], content["config"]["warmup_epochs"], content["config"]["learning_rate"]) == (52, 0, 1e-5)
    (model / "fold_0" / "stopped.txt").write_text("stopped")
    assert _command(roots, 0, "--resume", "--no-validation", "--lr", "1e-4", epochs=52) == 2
    assert "another recipe (learning_rate 1e-05 -> 0.0001)" in capsys.readouterr().err
    assert (model / "fold_0" / "stopped.txt").is_file()  # the refused call changed nothing
    shutil.copytree(model / "fold_0", model / "fold_all")
    (model / "fold_all" / "pretrained.json").unlink()
    again = ("--resume", "--no-validation", "--pretrained", weights)
    assert _command(roots, 0, "all", *again, epochs=53) == 2  # before the first of them goes on
    assert "fold_all with --pretrained" in capsys.readouterr().err
    assert read_checkpoint(model / "fold_0" / "checkpoint_final.pt")[1]["epoch"] == 52


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupt_says_what_is_kept_and_how_to_go_on(roots, monkeypatch, capsys, overwrite):
    if overwrite:
        assert _command(roots, 0, "--no-validation") == 0

    def interrupted(after):
        count = iter(range(after + 1))
        original = trainer.augment

        def augment(*arguments):
            if next(count) == after:
                raise KeyboardInterrupt
            return original(*arguments)

        return augment

    flags = ["--no-validation", *(["--overwrite"] if overwrite else [])]
    for after, said in ((0, "nothing is kept; run the same command again"), (2, "with --resume (and without --over")):
        with monkeypatch.context() as patched:
            patched.setattr(trainer, "augment", interrupted(after))
            assert _command(roots, 0, *flags, epochs=3) == 130
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("interrupted")]
        assert said in line
    assert _command(roots, 0, "--resume", "--no-validation", epochs=3) == 0
    with monkeypatch.context() as patched:  # a run that is being extended is stopped: its record knows the new length
        patched.setattr(trainer, "augment", interrupted(1))
        assert _command(roots, 0, "--resume", "--no-validation", epochs=6) == 130
    description = next(roots.results.rglob("training.json"))
    content = json.loads(description.read_text())
    assert (content["epochs"], content.get("ended")) == (6, None)


def test_mistakes_are_told_before_training(roots, capsys, caplog):
    assert _command(roots, 0, "--loader-workers", -1) == 2
    assert capsys.readouterr().err == "error: --loader-workers must not be negative, got -1\n"
    with pytest.raises(SystemExit):
        _command(roots, 0, "--epoch", 5)
    assert "unrecognized arguments: --epoch 5" in capsys.readouterr().err
    assert _command(roots, 0, "-c", "3d_lowres") == 2
    capsys.readouterr()
    labels = next((roots.raw / "Dataset007_Blobs" / "labelsTr").iterdir())
    labels.rename(labels.with_suffix(".away"))
    assert _command(roots, 0) == 2
    assert f"no label file {labels}" in capsys.readouterr().err
    marginal = ("--flagged-labels", "marginal", "--no-validation")
    assert _command(roots, 0, *marginal, "--no-filter") == 2
    assert "is about the flags that --no-filter ignores" in capsys.readouterr().err
    for flag, value in (("--weight-decay", "nan"), ("--lr", "inf")):
        assert _command(roots, 0, flag, value, "--no-validation") == 2
    assert not (roots.results / "Dataset007_Blobs").exists()
    assert _command(roots, 0, *marginal) == 0  # needs no raw labels
    assert "marginal has no effect: Dataset007_Blobs has no flags" in caplog.text


def test_several_folds_one_after_the_other(roots, capsys):
    model = roots.results / "Dataset007_Blobs" / "3d_fullres__tests_tiny.Tiny"
    assert _command(roots, 0, 9) == 2
    assert "fold must be 0..4 or 'all', got '9'" in capsys.readouterr().err
    assert not model.exists()  # refused before the first fold
    assert _command(roots, 1, 1) == 2
    assert "fold 1 is given twice" in capsys.readouterr().err
    assert _command(roots, 1, "--no-validation") == 0
    capsys.readouterr()
    assert _command(roots, 0, 1) == 2
    assert "fold_1 already holds a training run" in capsys.readouterr().err
    assert not (model / "fold_0").exists()
    assert _command(roots, 0, 1, "--resume") == 0
    out = capsys.readouterr().out
    assert out.count("trained -> ") == out.count("validation -> ") == 2
    stamps = {path: path.stat().st_mtime_ns for path in model.rglob("*") if path.suffix in (".pt", ".gz")}
    assert _command(roots, 0, 1, "--resume") == 0
    assert "validation -> " not in capsys.readouterr().out  # finished folds are left alone
    assert stamps == {path: path.stat().st_mtime_ns for path in model.rglob("*") if path.suffix in (".pt", ".gz")}
    os.utime(model / "fold_1" / "checkpoint_final.pt")  # trained after its validation
    assert _command(roots, 0, 1, "--resume") == 0
    out = capsys.readouterr().out
    assert out.count("validation -> ") == 1
    assert "fold_1" in out.split("validation -> ")[1]
