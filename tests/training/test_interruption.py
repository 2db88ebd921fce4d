"""Signals of a scheduler: the real command stops in good order and continues to the same bits."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ukbob_seg.errors import StoppedError
from ukbob_seg.inference.sliding_window import WindowSettings
from ukbob_seg.training.checkpoint import read_checkpoint
from ukbob_seg.training.config import RunOptions, TrainingConfig
from ukbob_seg.training.sampling import TrainingCase
from ukbob_seg.training.stopping import StopRequest, catch_signals, outlive_one_signal
from ukbob_seg.training.trainer import train
from ukbob_seg.training.validation import validate

FOLD = Path("Dataset007_Blobs", "3d_fullres__tests_tiny.Slow", "fold_0")
STEPS = 20


def _command(roots, results, *more):
    return [
        sys.executable, "-m", "ukbob_seg.cli.train", "7", "0", "--network", "tests_tiny:Slow", "--device", "cpu",
        "--epochs", "3", "--iterations-per-epoch", str(STEPS), "--validation-every", "1", "--validation-cases", "1",
        "--no-validation", "--schedule", "one_cycle", "--ema", "0.9", "--accumulate", "2", "--loader-workers", "1",
        "--raw", str(roots.raw), "--preprocessed", str(roots.preprocessed), "--results", str(results), *more,
    ]  # fmt: skip


def _stop_after(command, environment, path, received):
    """Start the command in a group of its own, and signal all of the group shortly after ``path`` is (re)written."""
    before = path.stat().st_mtime_ns if path.exists() else None
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if path.exists() and path.stat().st_mtime_ns != before:
            break
        time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(process.pid, received)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def test_a_signal_within_an_epoch_and_resume_give_the_same_bits(roots, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    subprocess.run(_command(roots, tmp_path / "whole"), env=environment, check=True, stderr=subprocess.DEVNULL)
    latest = tmp_path / "stopped" / FOLD / "checkpoint_latest.pt"
    resume: list[str] = []
    for epoch, (received, name) in enumerate([(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")], start=1):
        command = _command(roots, tmp_path / "stopped", *resume)
        code, err = _stop_after(command, environment, latest.with_name("progress.png"), received)
        assert code == 143, err
        last = err.strip().splitlines()[-1]
        assert last.startswith(f"stopped by {name} after step "), err
        assert last.endswith(f"of {STEPS} in epoch {epoch}; run the same command with --resume to go on")
        assert "Traceback" not in err
        assert latest.with_name("stopped.txt").read_text() == f"{last}\n"
        content = read_checkpoint(latest)[1]
        assert content["epoch"] == epoch
        assert 0 < content["step"] < STEPS
        resume = ["--resume"]
    done = subprocess.run(
        _command(roots, tmp_path / "stopped", "--resume"), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not latest.with_name("stopped.txt").exists()
    found, whole = (read_checkpoint(tmp_path / n / FOLD / "checkpoint_final.pt")[1] for n in ("stopped", "whole"))
    for weights in ("network_weights", "training_weights"):
        assert all(torch.equal(found[weights][key], whole[weights][key]) for key in whole[weights])
    curves = [
        [(row["epoch"], row["train_loss"], row.get("val_mean_dice")) for row in json.loads(content["history"])]
        for content in (found, whole)
    ]
    assert curves[0] == curves[1]
    assert found["best_dice"] == whole["best_dice"]


def test_a_signal_in_the_validation_resumes_with_the_validation(roots, monkeypatch):
    import ukbob_seg.training.trainer as trainer

    config = TrainingConfig(epochs=2, iterations_per_epoch=2, validation_every=1, schedule="one_cycle")

    def run(**options):
        return train(
            7, 0, roots, config, RunOptions(quiet=True, stop_on_signals=True, **options), network="tests_tiny:Tiny"
        )

    whole = read_checkpoint(run() / "checkpoint_final.pt")[1]

    def signalled(*arguments, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*arguments, **more)

    monkeypatch.setattr(trainer, "validate", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="stopped by SIGTERM in the validation after epoch 0"):
        run(overwrite=True)
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    monkeypatch.syspath_prepend(roots.raw.parent)
    folder = run(resume=True)
    found = read_checkpoint(folder / "checkpoint_final.pt")[1]
    assert all(torch.equal(found["network_weights"][key], value) for key, value in whole["network_weights"].items())
    assert found["best_dice"] == whole["best_dice"]


def test_a_stopped_validation_gives_no_score(tmp_path):
    network = torch.nn.Conv3d(1, 2, 1)
    windows = WindowSettings((8, 8, 8))
    score = validate(network, tmp_path, [TrainingCase("absent")], None, windows, "cpu", stop=lambda: True)
    assert score is None
    assert network.training


def test_signals_are_left_alone_without_the_option_and_in_threads():
    before = signal.getsignal(signal.SIGTERM)
    with catch_signals(False):
        assert signal.getsignal(signal.SIGTERM) == before
    found = []

    def in_thread():
        with catch_signals(True) as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.signal))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert found == [(before, None)]


def test_the_first_signal_is_remembered():
    stop = StopRequest()
    stop.check("nowhere")
    stop(signal.SIGUSR1, None)
    stop(signal.SIGTERM, None)
    with pytest.raises(StoppedError, match="stopped by SIGUSR1 after this; run the same command with --resume"):
        stop.check("after this")


def test_loaders_outlive_one_signal_only():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        outlive_one_signal()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
