"""The training loop."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ukbob_seg.dataset.paths import Roots
from ukbob_seg.errors import CheckpointError, ConfigError, UkbobError
from ukbob_seg.files import digest, ensure_writable, write_json
from ukbob_seg.networks.pretrained import load_weights
from ukbob_seg.training.augmentation import Batch, Transform, augment, read_size
from ukbob_seg.training.cascade import maps_key
from ukbob_seg.training.checkpoint import NAMES, load_into, read_checkpoint, save_checkpoint
from ukbob_seg.training.config import TrainingConfig
from ukbob_seg.training.progress import write_csv, write_plot
from ukbob_seg.training.sampling import PatchDataset, PatchSettings, make_loader
from ukbob_seg.training.schedules import learning_rate
from ukbob_seg.training.setup import (
    TrainingSetup,
    choose_config,
    default_network,
    make_augmentation,
    make_loss,
    make_optimizer,
    prepare,
)
from ukbob_seg.training.validation import ValidationScore, validate

log = logging.getLogger(__name__)

MAX_BAD_STEPS = 20  # in a row, before training gives up


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; none of this changes the result on one kind of device.

    Attributes:
        device: ``cpu``, ``cuda``, ``cuda:1``, ...
        resume: continue from the last checkpoint.
        overwrite: start afresh although the fold was trained before.
        loader_workers: processes that read patches, 0 for none; None to choose.
        pretrained: checkpoint whose matching weights the run starts from.
        quiet: no progress bar.
    """

    device: str = "cpu"
    resume: bool = False
    overwrite: bool = False
    loader_workers: int | None = None
    pretrained: Path | None = None
    quiet: bool = False


@dataclass
class TrainState:
    """What changes while training."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    best_dice: float = -math.inf
    history: list[dict[str, Any]] = field(default_factory=list)
    bad_steps: int = 0  # in a row, without a finite loss and gradient


def train(
    dataset: int | str,
    fold: int | str,
    roots: Roots,
    config: TrainingConfig | None = None,
    options: RunOptions | None = None,
    *,
    configuration: str = "3d_fullres",
    network: str | None = None,
    use_filter: bool = True,
) -> Path:
    """Train one fold; returns its folder, with checkpoint_best.pt, checkpoint_final.pt, progress.csv and .png.

    Args:
        dataset: id or ``DatasetXXX_Name``, preprocessed.
        fold: 0.. or ``all``.
        roots: folders.
        config: recipe, None for the network's own (PAPER 3 for Swin-BOB).
        options: device, resuming, and so on.
        configuration: of the plans.
        network: name in the registry and the plans, None for Swin-BOB (or the only network of a 2D configuration).
        use_filter: honour the flags of ukbob_filter when there are some.

    Raises:
        ConfigError, DatasetError, CheckpointError: in one sentence, before the first step where possible.
    """
    options = options or RunOptions()
    network = network or default_network(dataset, roots, configuration)
    config = config or choose_config(dataset, roots, network, options.pretrained is not None)
    setup = prepare(dataset, str(fold), roots, config, configuration, network, use_filter)
    left_right_axis = setup.description.plans["left_right_axis"]
    transforms = make_augmentation(setup, config, left_right_axis)
    loss = make_loss(setup)
    gpus = [torch.device(options.device)] if options.device.startswith("cuda") else []
    with torch.random.fork_rng(devices=gpus):  # leaves the caller's random state as it was
        state = _start(setup, config, options)
        patches = PatchDataset(setup.arrays, setup.train, _patch_settings(setup, config, transforms), setup.previous)
        batches = _batches(patches, config, options, state.epoch)
        log.info(
            "%s fold %s: %d training and %d validation cases, %s, patch %s, batch %d, epochs %d..%d on %s",
            setup.spec.name, fold, len(setup.train), len(setup.val), network,
            "x".join(map(str, setup.network.patch_size)), setup.network.batch_size, state.epoch, config.epochs - 1,
            options.device,
        )  # fmt: skip
        bar = tqdm(
            total=config.epochs * config.iterations_per_epoch,
            initial=state.epoch * config.iterations_per_epoch,
            desc=f"training fold {fold}", unit="step", disable=options.quiet,
        )  # fmt: skip
        with bar:
            while state.epoch < config.epochs:
                started = time.perf_counter()
                mean_loss = _run_epoch(state, config, batches, transforms, loss, options.device, bar)
                score = None
                if (state.epoch + 1) % config.validation_every == 0 or state.epoch + 1 == config.epochs:
                    score = _validate(state, setup, options.device)
                _record(state, config, mean_loss, score, time.perf_counter() - started)
                bar.set_postfix_str(f"loss {mean_loss:.3f}, best Dice {max(state.best_dice, 0):.3f}")
                state.epoch += 1
                _save(state, setup, config, improved=score is not None and score.mean == state.best_dice)
        _finish(state, setup, config)
    return setup.folder


def _start(setup: TrainingSetup, config: TrainingConfig, options: RunOptions) -> TrainState:
    """A fresh network, or the one that an earlier run left."""
    final, latest = setup.folder / NAMES["final"], setup.folder / NAMES["latest"]
    if options.resume and not (latest.is_file() or final.is_file()):
        raise CheckpointError(f"nothing to resume in {setup.folder}; drop --resume to start")
    if not options.resume and not options.overwrite and (latest.is_file() or final.is_file()):
        raise ConfigError(
            f"{setup.folder} already holds a training run; go on with --resume or start afresh with --overwrite"
        )
    ensure_writable(setup.folder)
    torch.manual_seed(config.seed)  # every library draws initial weights from torch's global generator
    network = setup.description.build().to(options.device)
    state = TrainState(network, make_optimizer(network, config))
    if options.resume:
        _restore(state, setup, config, latest if latest.is_file() else final)
    elif options.pretrained is not None:
        report = load_weights(network, options.pretrained)
        log.info(
            "pretrained weights %s: %d loaded, %d missing, %d unexpected, %d of another shape",
            options.pretrained, len(report.loaded), len(report.missing), len(report.unexpected),
            len(report.shape_mismatch),
        )  # fmt: skip
    # Only now, when nothing refuses the run any more: these describe what lies in the model folder.
    write_json(setup.folder.parent / "plans.json", setup.description.plans)
    write_json(setup.folder.parent / "dataset.json", setup.spec.content)
    if not options.resume:
        for name in NAMES.values():
            (setup.folder / name).unlink(missing_ok=True)
        write_json(setup.folder / "training.json", {**config.to_json(), "cases": [case.name for case in setup.train]})
    return state


def _restore(state: TrainState, setup: TrainingSetup, config: TrainingConfig, path: Path) -> None:
    """Bring network, optimizer and history back to the end of the last finished epoch.

    Nothing else has a state: batches, augmentation, learning rate and dropout are functions of seed and step.
    """
    description, content = read_checkpoint(path)
    if description.network != setup.description.network:
        raise CheckpointError(f"{path} is of {description.network}, not {setup.description.network}")
    load_into(state.network, content, path)
    before, now = content["config"], config.to_json()
    changed = [key for key in now if key != "epochs" and before.get(key) != now[key]]
    if changed:
        listing = ", ".join(f"{key} {before.get(key)} -> {now[key]}" for key in changed)
        raise ConfigError(f"cannot resume {path} with another recipe ({listing}); give the same flags or --overwrite")
    for what, value in _fixed_inputs(setup).items():
        if content.get(what, value) != value:  # older checkpoints lack some
            raise ConfigError(f"cannot resume {path}: the {what} changed since; restore them or start with --overwrite")
    if config.epochs < content["epoch"]:
        raise ConfigError(f"{path} has already trained {content['epoch']} epochs, --epochs is {config.epochs}")
    state.optimizer.load_state_dict(content["optimizer_state"])
    state.epoch, state.history = content["epoch"], json.loads(content["history"])
    state.best_dice = content["best_dice"]
    log.info("resuming after epoch %d of %d", state.epoch - 1, config.epochs)


def _patch_settings(setup: TrainingSetup, config: TrainingConfig, transforms: list[Transform]) -> PatchSettings:
    return PatchSettings(
        patch_size=setup.network.patch_size,
        batch_size=setup.network.batch_size,
        foreground_fraction=config.foreground_fraction,
        ignore_index=setup.spec.labels.ignore_index,
        seed=config.seed,
        augment_previous=config.augmentation != "none",
        read_size=read_size(transforms, setup.network.patch_size),
    )


def _batches(
    patches: PatchDataset, config: TrainingConfig, options: RunOptions, epoch: int
) -> Iterator[tuple[int, Batch]]:
    """(step, batch on the device) from the first step of ``epoch`` to the end of the run."""
    on_gpu = options.device.startswith("cuda")
    workers = options.loader_workers if options.loader_workers is not None else (4 if on_gpu else 0)
    first, last = epoch * config.iterations_per_epoch, config.epochs * config.iterations_per_epoch
    loader = make_loader(patches, first, last, workers, pin=on_gpu)
    for step, arrays in enumerate(loader, start=first):
        yield step, Batch(**{name: array.to(options.device, non_blocking=True) for name, array in arrays.items()})


def _run_epoch(
    state: TrainState,
    config: TrainingConfig,
    batches: Iterator[tuple[int, Batch]],
    transforms: list[Transform],
    loss: Callable[..., torch.Tensor],
    device: str,
    bar: tqdm,
) -> float:
    """Train one epoch; returns the mean loss over its steps."""
    state.network.train()
    total, counted = torch.zeros((), device=device), 0
    most = config.gradient_clip or float("inf")
    for _ in range(config.iterations_per_epoch):
        step, batch = next(batches)
        seed = config.seed * 1_000_003 + step  # a resumed run draws what the uninterrupted one would have drawn
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # dropout draws from the global generator
        batch = augment(batch, transforms, generator)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        state.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.image.device.type, torch.bfloat16, enabled=device.startswith("cuda")):
            outputs = state.network(batch.network_input())
        value = loss(outputs, batch.labels)
        bar.update()
        value.backward()
        norm = nn.utils.clip_grad_norm_(state.network.parameters(), most)
        if not (torch.isfinite(value) and torch.isfinite(norm)):  # a step would spoil the weights
            state.bad_steps += 1
            if state.bad_steps >= MAX_BAD_STEPS:
                raise UkbobError(
                    f"loss or gradient were not finite for {state.bad_steps} steps in a row (epoch {state.epoch}); "
                    "lower --lr; the last good state is kept in checkpoint_latest.pt"
                )
            continue
        state.bad_steps = 0
        state.optimizer.step()
        total, counted = total + value.detach(), counted + 1
    return float(total) / counted if counted else float("nan")


def _validate(state: TrainState, setup: TrainingSetup, device: str) -> ValidationScore:
    from ukbob_seg.inference.sliding_window import WindowSettings

    windows = WindowSettings(setup.network.patch_size, slice_axis=setup.configuration.slice_axis)
    return validate(state.network, setup.arrays, setup.val, setup.spec.labels, windows, device, setup.previous)


def _record(
    state: TrainState, config: TrainingConfig, mean_loss: float, score: ValidationScore | None, seconds: float
) -> None:
    row: dict[str, Any] = {
        "epoch": state.epoch,
        "learning_rate": learning_rate(config, state.epoch * config.iterations_per_epoch),
        "train_loss": mean_loss,
        "seconds": seconds,
    }
    if score is not None:
        row["val_mean_dice"], row["val_dice"] = score.mean, list(score.per_class)
        if score.mean > state.best_dice:
            state.best_dice = score.mean
    state.history.append(row)


def _save(state: TrainState, setup: TrainingSetup, config: TrainingConfig, improved: bool) -> None:
    """Write the latest checkpoint, the best one when it is, and the curves."""
    weights = state.network.state_dict()
    if improved:
        best = {"epoch": state.epoch, "best_dice": state.best_dice}
        save_checkpoint(setup.folder / NAMES["best"], setup.description, weights, **best)
    save_checkpoint(setup.folder / NAMES["latest"], setup.description, weights, **_training_state(state, setup, config))
    names = setup.spec.labels.names
    write_csv(setup.folder / "progress.csv", state.history, names)
    write_plot(setup.folder / "progress.png", state.history, f"{setup.spec.name}, {setup.description.network}")


def _training_state(state: TrainState, setup: TrainingSetup, config: TrainingConfig) -> dict[str, Any]:
    return {
        "optimizer_state": state.optimizer.state_dict(),
        "epoch": state.epoch,
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


def _finish(state: TrainState, setup: TrainingSetup, config: TrainingConfig) -> None:
    """The final checkpoint replaces the latest; it keeps the training state, so that a run can be extended."""
    path = setup.folder / NAMES["final"]
    save_checkpoint(path, setup.description, state.network.state_dict(), **_training_state(state, setup, config))
    if not (setup.folder / NAMES["best"]).is_file():
        best = {"epoch": state.epoch, "best_dice": state.best_dice}
        save_checkpoint(setup.folder / NAMES["best"], setup.description, state.network.state_dict(), **best)
    (setup.folder / NAMES["latest"]).unlink(missing_ok=True)
