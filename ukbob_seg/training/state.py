"""What changes while a network trains: how it begins, is stored, and is taken up again."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ukbob_seg.errors import CheckpointError, ConfigError
from ukbob_seg.files import digest, ensure_writable, write_json
from ukbob_seg.networks.pretrained import Pretrained
from ukbob_seg.networks.transfer import TransferReport
from ukbob_seg.training.cascade import maps_key
from ukbob_seg.training.checkpoint import IMPORTED, NAMES, load_into, read_checkpoint, save_checkpoint
from ukbob_seg.training.config import RunOptions, TrainingConfig
from ukbob_seg.training.distributed import is_first
from ukbob_seg.training.ema import WeightAverage
from ukbob_seg.training.finetune import check_same_source, start_from, write_record
from ukbob_seg.training.progress import write_csv, write_plot
from ukbob_seg.training.schedules import learning_rate
from ukbob_seg.training.setup import DESCRIPTION, TrainingSetup, make_optimizer
from ukbob_seg.training.stopping import STOPPED, validations_without_gain
from ukbob_seg.training.validation import ValidationScore

log = logging.getLogger(__name__)

CURVES = ("progress.csv", "progress.png")
MAY_CHANGE = ("epochs", "early_stopping")  # of the recipe, when a run is resumed


@dataclass
class TrainState:
    """What changes while training. All processes of a run have the same."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the running epoch
    loss_sum: float | torch.Tensor = 0.0  # over the epoch's steps that counted
    counted: int = 0
    seconds: float = 0.0  # of the running epoch
    waited: float = 0.0  # of these, until patches were there
    bad_steps: int = 0  # in a row, without a finite loss and gradient
    best_dice: float = -math.inf
    history: list[dict[str, Any]] = field(default_factory=list)

    def weights(self) -> dict[str, Any]:
        """The weights to predict with."""
        return self.network.state_dict() if self.average is None else self.average.weights

    def describe_best(self) -> str:
        """For the progress bar."""
        return f"best Dice {self.best_dice:.3f}" if self.best_dice >= 0 else "not validated yet"

    def mean_loss(self) -> float:
        """Over the steps of the running epoch, NaN before the first one that counted."""
        return float(self.loss_sum) / self.counted if self.counted else math.nan

    def is_finished(self, config: TrainingConfig) -> bool:
        """Whether nothing is left to train."""
        return self.epoch >= config.epochs or self.stops_early(config)

    def stops_early(self, config: TrainingConfig) -> bool:
        """Whether the last validations brought no higher Dice."""
        return 0 < config.early_stopping <= validations_without_gain(self.history)

    def close_epoch(self, config: TrainingConfig, score: ValidationScore | None) -> bool:
        """Write the epoch into the history and begin the next; returns whether its validation was the best."""
        row: dict[str, Any] = {
            "epoch": self.epoch,
            "learning_rate": learning_rate(config, self.epoch * config.iterations_per_epoch),
            "train_loss": self.mean_loss(),
            "seconds": self.seconds,
            "data_seconds": self.waited,
            "skipped_steps": self.step - self.counted,
        }
        if score is not None:
            row["val_mean_dice"], row["val_dice"] = score.mean, list(score.per_class)
        improved = score is not None and score.mean > self.best_dice
        if score is not None and improved:
            self.best_dice = score.mean
        self.history.append(row)
        self.epoch += 1
        self.step, self.loss_sum, self.counted, self.seconds, self.waited = 0, 0.0, 0, 0.0, 0.0
        return improved


def has_run(folder: Path) -> bool:
    """Whether a fold's folder holds a training run, finished or not."""
    return (folder / NAMES["latest"]).is_file() or (folder / NAMES["final"]).is_file()


@contextmanager
def interrupt_explained(folder: Path) -> Iterator[None]:
    """Let an interrupt (Ctrl-C) of the block say how to go on: what the same command again would refuse to do."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        kept = (
            "run the same command with --resume (and without --overwrite) to go on after the last finished epoch"
            if has_run(folder)
            else "no epoch was finished, so that nothing is kept; run the same command again"
        )
        raise KeyboardInterrupt(f"interrupted; {kept}") from interrupt


def check_start(folder: Path, options: RunOptions) -> None:
    """Refuse to go on from nothing, and to overwrite silently.

    Raises:
        CheckpointError, ConfigError: says what to do instead.
    """
    if options.resume and options.overwrite:
        raise ConfigError("--resume goes on with the run that --overwrite would delete; give one of them")
    if (folder / IMPORTED).is_file() and not options.overwrite:
        given = next((folder / name for name in NAMES.values() if (folder / name).is_file()), folder)
        raise ConfigError(
            f"{folder} holds an imported model, which has no training state to go on with; start from its weights "
            f"under another --results folder with --pretrained {given}, or replace it with --overwrite"
        )
    if options.resume and not has_run(folder):
        raise CheckpointError(f"nothing to resume in {folder}; drop --resume to start")
    if options.resume:
        check_same_source(folder, options.pretrained, options.pretrained_dataset)
    if not options.resume and not options.overwrite and has_run(folder):
        raise ConfigError(
            f"{folder} already holds a training run; go on with --resume or start afresh with --overwrite"
        )


def start(
    setup: TrainingSetup, config: TrainingConfig, options: RunOptions, pretrained: Pretrained | None = None
) -> TrainState:
    """A fresh network, one with given weights, or the one that an earlier run left.

    Only the first process writes files.
    """
    check_start(setup.folder, options)
    torch.manual_seed(config.seed)  # every library draws initial weights from torch's global generator
    network = setup.description.build().to(options.device)
    ensure_writable(setup.folder)
    state = TrainState(network, make_optimizer(network, config))
    report = None if pretrained is None else start_from(network, setup, pretrained)
    if options.resume:
        latest = setup.folder / NAMES["latest"]
        restore(state, setup, config, latest if latest.is_file() else setup.folder / NAMES["final"])
    else:
        state.average = WeightAverage(network, config.ema) if config.ema else None
    if is_first():  # only now, when nothing refuses the run any more
        (setup.folder / STOPPED).unlink(missing_ok=True)
        _describe(setup, config, report, options)
        if not state.is_finished(config):
            write_description(setup, config)  # a run that is extended has more epochs from here on, also when stopped
            shutil.rmtree(setup.folder / "validation", ignore_errors=True)  # of the network as it was
    return state


def _describe(setup: TrainingSetup, config: TrainingConfig, report: TransferReport | None, options: RunOptions) -> None:
    """Write what lies in the model folder; a fresh run begins by removing what an earlier one left."""
    write_json(setup.folder.parent / "plans.json", setup.description.plans)
    write_json(setup.folder.parent / "dataset.json", setup.spec.content)
    if not options.resume:
        for name in NAMES.values():
            (setup.folder / name).unlink(missing_ok=True)
        for name in (*CURVES, IMPORTED):
            (setup.folder / name).unlink(missing_ok=True)
        shutil.rmtree(setup.folder / "tensorboard", ignore_errors=True)
        write_record(setup, report, options.pretrained_dataset)


def write_description(setup: TrainingSetup, config: TrainingConfig, ended: str | None = None) -> None:
    """training.json: recipe, cases, and at the end why the run ended."""
    content = {**config.to_json(), "cases": [case.name for case in setup.train]}
    write_json(setup.folder / DESCRIPTION, content if ended is None else {**content, "ended": ended})


def restore(state: TrainState, setup: TrainingSetup, config: TrainingConfig, path: Path) -> None:
    """Bring network, optimizer and history back to the last finished step that was stored.

    Nothing else has a state: batches, augmentation, learning rate and dropout are functions of seed and step.
    """
    description, content = read_checkpoint(path)
    if description.network != setup.description.network:
        raise CheckpointError(f"{path} is of {description.network}, not {setup.description.network}")
    before, now = {**TrainingConfig().to_json(), **content["config"]}, config.to_json()  # older ones lack some
    changed = [key for key in now if key not in MAY_CHANGE and before[key] != now[key]]
    if changed:
        listing = ", ".join(f"{key} {before[key]} -> {now[key]}" for key in changed)
        raise ConfigError(f"cannot resume {path} with another recipe ({listing}); give the same flags or --overwrite")
    for what, value in _fixed_inputs(setup).items():
        if content.get(what, value) != value:  # older checkpoints lack some
            raise ConfigError(f"cannot resume {path}: the {what} changed since; restore them or start with --overwrite")
    if config.epochs < before["epochs"]:
        raise ConfigError(
            f"cannot resume {path} with --epochs {config.epochs}: it was started with {before['epochs']}, and may only "
            "be extended; --early-stopping ends a run sooner"
        )
    load_into(state.network, content, path)
    state.epoch, state.step = content["epoch"], content.get("step", 0)
    if config.ema:
        state.average = WeightAverage(state.network, config.ema)  # of the averaged weights, which were loaded
        state.network.load_state_dict(content["training_weights"])
    state.optimizer.load_state_dict(content["optimizer_state"])
    state.history, state.best_dice = json.loads(content["history"]), content["best_dice"]
    state.loss_sum, state.counted = content.get("loss_sum", 0.0), content.get("counted", 0)
    state.seconds, state.waited = content.get("seconds", 0.0), content.get("data_seconds", 0.0)
    state.bad_steps = content.get("bad_steps", 0)
    if not state.is_finished(config):
        log.info("resuming at step %d of epoch %d", state.step, state.epoch)


def save(state: TrainState, setup: TrainingSetup, config: TrainingConfig, improved: bool) -> None:
    """After an epoch: the latest checkpoint, the best one when it is, and the curves."""
    if improved:
        _save_best(state, setup)
    save_training(state, setup, config, "latest")
    if is_first():
        table, picture = (setup.folder / name for name in CURVES)
        write_csv(table, state.history, setup.spec.labels.names)
        write_plot(picture, state.history, f"{setup.spec.name}, {setup.description.network}")


def save_training(state: TrainState, setup: TrainingSetup, config: TrainingConfig, name: str) -> None:
    """A checkpoint that holds all that resuming needs, also within an epoch."""
    if not is_first():
        return
    path = setup.folder / NAMES[name]
    save_checkpoint(path, setup.description, state.weights(), **_training_state(state, setup, config))


def finish(state: TrainState, setup: TrainingSetup, config: TrainingConfig) -> None:
    """The final checkpoint replaces the latest; it keeps the training state, so that a run can be extended."""
    ended = f"all {state.epoch} epochs are done"
    if state.stops_early(config):
        scores = {row["epoch"]: row["val_mean_dice"] for row in state.history if row.get("val_mean_dice") is not None}
        best = next((epoch for epoch, score in scores.items() if score == state.best_dice), None)
        ended = (
            f"stopped early after epoch {state.epoch - 1}: {config.early_stopping} validations without a higher mean "
            + ("Dice" if best is None else f"Dice than {state.best_dice:.3f} of epoch {best}")
        )
        log.info("%s; the best weights are in checkpoint_best.pt", ended)
    latest, final = setup.folder / NAMES["latest"], setup.folder / NAMES["final"]
    if is_first() and (latest.is_file() or not final.is_file()):  # else it was finished before
        save_training(state, setup, config, "final")
        if not (setup.folder / NAMES["best"]).is_file():
            _save_best(state, setup)
        write_description(setup, config, ended)
        latest.unlink(missing_ok=True)


def _save_best(state: TrainState, setup: TrainingSetup) -> None:
    if is_first():
        best = {"epoch": state.epoch, "best_dice": state.best_dice}
        save_checkpoint(setup.folder / NAMES["best"], setup.description, state.weights(), **best)


def _training_state(state: TrainState, setup: TrainingSetup, config: TrainingConfig) -> dict[str, Any]:
    return {
        "optimizer_state": state.optimizer.state_dict(),
        **({} if state.average is None else {"training_weights": state.network.state_dict()}),
        "epoch": state.epoch,
        "step": state.step,
        "loss_sum": float(state.loss_sum),
        "counted": state.counted,
        "seconds": state.seconds,
        "data_seconds": state.waited,
        "bad_steps": state.bad_steps,
        "best_dice": state.best_dice,
        "history": json.dumps(state.history),
        "config": config.to_json(),
        **_fixed_inputs(setup),
    }


def _fixed_inputs(setup: TrainingSetup) -> dict[str, Any]:
    """What besides the recipe must be the same for a run to go on exactly."""
    flags = {case.name: np.flatnonzero(case.lookup != np.arange(len(case.lookup))).tolist()
             for case in setup.train if case.lookup is not None}  # fmt: skip
    return {
        "training cases": [case.name for case in setup.train],
        "patch and batch size": [*setup.network.patch_size, setup.network.batch_size],
        "filter flags": digest(flags),
        "preprocessed data": setup.recipe,
        "first stage's predictions": maps_key(setup.previous, [case.name for case in setup.train]),
        "validation cases": [case.name for case in setup.val],
        "network arguments": json.loads(json.dumps(setup.description.arguments)),
    }
