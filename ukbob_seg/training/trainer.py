"""The training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ukbob_seg.dataset.paths import Roots
from ukbob_seg.errors import StoppedError, UkbobError
from ukbob_seg.networks.compiled import maybe_compiled
from ukbob_seg.networks.pretrained import Pretrained
from ukbob_seg.parallel import cpu_count
from ukbob_seg.training.augmentation import Batch, Transform, augment, read_size
from ukbob_seg.training.checkpoint import ModelDescription
from ukbob_seg.training.config import RunOptions, TrainingConfig
from ukbob_seg.training.distributed import (
    PartOfBatch,
    check_batch,
    exchange,
    gather,
    is_first,
    rank,
    said_once,
    same_everywhere,
    spread,
    together,
    world_size,
)
from ukbob_seg.training.ema import averaged
from ukbob_seg.training.finetune import PretrainedOptions, read_weights
from ukbob_seg.training.noise_loss import NoiseLoss
from ukbob_seg.training.prefetch import to_device
from ukbob_seg.training.progress import scalar_log
from ukbob_seg.training.sampling import PatchDataset, PatchSettings, make_loader
from ukbob_seg.training.schedules import learning_rate
from ukbob_seg.training.setup import (
    TrainingSetup,
    choose_config,
    default_network,
    make_augmentation,
    make_loss,
    prepare,
    recorded_config,
)
from ukbob_seg.training.state import (
    TrainState,
    finish,
    has_run,
    interrupt_explained,
    save,
    save_training,
    start,
)
from ukbob_seg.training.stopping import StopRequest, catch_signals, stop_noted
from ukbob_seg.training.validation import ValidationScore, validate

__all__ = ["RunOptions", "train"]

log = logging.getLogger(__name__)

GPU_WORKERS = 4  # processes that read patches, where there are as many processors
MAX_BAD_STEPS = 20  # in a row, before training gives up
# Networks whose every parameter has a gradient in every step, without coarse outputs.
ALL_USED = ("swin_unetr", "resunet_pp", "transunet", "transbts", "nnformer", "medformer", "ux_net")


@dataclass(frozen=True)
class Run:
    """What stays the same while training.

    Attributes:
        config: recipe.
        setup: data, plans and folders.
        options: device and so on.
        network: the state's network, compiled where that was asked for.
        model: what to take gradients through: the network; with several processes it averages them.
        transforms: augmentation of this process's part of a batch.
        loss: of the outputs and the labels; a diffusion network's also makes the map that noise is added to.
        stop: whether a signal asked for the end.
        read_size: voxels (z, y, x) to read for a patch, None for the patch alone.
    """

    config: TrainingConfig
    setup: TrainingSetup
    options: RunOptions
    network: nn.Module
    model: nn.Module
    transforms: list[Transform]
    loss: Callable[..., torch.Tensor]
    stop: StopRequest
    read_size: tuple[int, int, int] | None = None


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

    Within ``distributed.process_group`` all processes call it alike and share the work.

    Args:
        dataset: id or ``DatasetXXX_Name``, preprocessed.
        fold: 0.. or ``all``.
        roots: folders.
        config: recipe, None for the network's own (PAPER 3 for Swin-BOB), or that of the run that is resumed.
        options: device, resuming, and so on.
        configuration: of the plans.
        network: name in the registry and the plans, None for Swin-BOB (or the only network of a 2D configuration).
        use_filter: honour the flags of ukbob_filter when there are some.

    Raises:
        ConfigError, DatasetError, CheckpointError: in one sentence, before the first step where possible.
        StoppedError: a signal came, and ``options.stop_on_signals``; a resumed run continues exactly.
    """
    options = options or RunOptions()

    def ready() -> tuple[TrainingSetup, TrainingConfig, Pretrained | None]:
        given = PretrainedOptions(options.pretrained, options.pretrained_dataset, options.pretrained_merging)
        name = network or default_network(dataset, roots, configuration)
        begun = recorded_config(dataset, [str(fold)], roots, configuration, name) if options.resume else None
        recipe = config or choose_config(dataset, roots, name, options.pretrained is not None, begun)
        found = prepare(dataset, str(fold), roots, recipe, configuration, name, use_filter)
        check_batch(found.network.batch_size)
        found, weights = read_weights(found, given, options.resume)
        return found, recipe, weights

    setup, config, pretrained = together(ready)
    gpus = [torch.device(options.device)] if options.device.startswith("cuda") else []
    # The first leaves the caller's random state as it was.
    caught = catch_signals(options.stop_on_signals)
    with (
        torch.random.fork_rng(devices=gpus),
        stop_noted(setup.folder),
        interrupt_explained(setup.folder),
        caught as stop,
    ):
        _train(setup, config, options, pretrained, stop)
    return setup.folder


def _train(
    setup: TrainingSetup,
    config: TrainingConfig,
    options: RunOptions,
    pretrained: Pretrained | None,
    stop: StopRequest,
) -> None:
    """Epoch after epoch: steps, validation, checkpoint."""
    with scalar_log(setup.folder if options.tensorboard and is_first() else None) as write_scalars:
        state = together(lambda: start(setup, config, options, pretrained))
        run = _make_run(setup, config, options, state, stop)
        batches = _batches(run, state)
        with _progress_bar(run, state) as bar:
            try:
                while not state.is_finished(config):
                    _run_epoch(run, state, batches, bar)
                    score = _validate(run, state) if _is_validated(state, config) else None
                    improved = state.close_epoch(config, score)
                    save(state, setup, config, improved)
                    bar.set_postfix_str(f"loss {state.history[-1]['train_loss']:.3f}, {state.describe_best()}")
                    write_scalars(state.history[-1], setup.spec.labels.names)
            except StoppedError:  # raised between steps only, so that the state is whole
                save_training(state, setup, config, "latest")
                raise
        finish(state, setup, config)
        gather(None)  # nobody goes on before the files are there
        stop.check("when training was done, before the final validation")


def _make_run(
    setup: TrainingSetup, config: TrainingConfig, options: RunOptions, state: TrainState, stop: StopRequest
) -> Run:
    transforms = make_augmentation(setup, config, setup.description.plans["left_right_axis"])
    size = read_size(transforms, setup.network.patch_size)
    if world_size() > 1:
        transforms = [PartOfBatch(transform) for transform in transforms]
    network = maybe_compiled(state.network, options.compile)
    model = spread(network, options.device, all_used=all_used(setup.description))
    if state.is_finished(config):
        log.info("%s fold %s is trained already: nothing is left to do", setup.spec.name, setup.description.fold)
        return Run(config, setup, options, network, model, transforms, make_loss(setup, state.network), stop, size)
    log.info(
        "%s fold %s: %d training and %d validation cases, %s, patch %s, batch %d%s, epochs %d..%d on %s",
        setup.spec.name, setup.description.fold, len(setup.train), len(setup.val), setup.description.network,
        "x".join(map(str, setup.network.patch_size)), setup.network.batch_size,
        f" x {config.accumulate}" if config.accumulate > 1 else "", state.epoch, config.epochs - 1,
        options.device if world_size() == 1 else f"{world_size()} processes",
    )  # fmt: skip
    return Run(config, setup, options, network, model, transforms, make_loss(setup, state.network), stop, size)


def all_used(description: ModelDescription) -> bool:
    """Whether every parameter of a network has a gradient in every step; the coarsest output of several has none."""
    return description.network in ALL_USED and not description.arguments.get("deep_supervision", False)


def _progress_bar(run: Run, state: TrainState) -> tqdm:
    return tqdm(
        total=run.config.epochs * run.config.iterations_per_epoch,
        initial=state.epoch * run.config.iterations_per_epoch + state.step,
        desc=f"training fold {run.setup.description.fold}",
        unit="step",
        disable=run.options.quiet or not is_first(),
    )


def _batches(run: Run, state: TrainState) -> Iterator[tuple[int, Batch]]:
    """(number, this process's part of the batch, on the device) from where the state is to the end of the run."""
    setup, config = run.setup, run.config
    settings = PatchSettings(
        patch_size=setup.network.patch_size,
        batch_size=setup.network.batch_size,
        foreground_fraction=config.foreground_fraction,
        ignore_index=setup.spec.labels.ignore_index,
        seed=config.seed,
        rank=rank(),
        ranks=world_size(),
        augment_previous=config.augmentation != "none",
        read_size=run.read_size,
    )
    patches = PatchDataset(setup.arrays, setup.train, settings, setup.previous)
    on_gpu = run.options.device.startswith("cuda")
    workers = run.options.loader_workers
    if workers is None:
        workers = min(GPU_WORKERS, cpu_count()) if on_gpu else 0
    first = (state.epoch * config.iterations_per_epoch + state.step) * config.accumulate
    last = config.epochs * config.iterations_per_epoch * config.accumulate
    loader = make_loader(patches, first, last, workers, pin=on_gpu)
    yield from enumerate(to_device(loader, run.options.device), start=first)


def _run_epoch(run: Run, state: TrainState, batches: Iterator[tuple[int, Batch]], bar: tqdm) -> None:
    """Train to the end of the epoch in which the state is.

    Raises:
        StoppedError: after a whole step, when a signal came.
    """
    run.model.train()
    while state.step < run.config.iterations_per_epoch:
        run.stop.check(f"after step {state.step} of {run.config.iterations_per_epoch} in epoch {state.epoch}")
        started = time.perf_counter()
        _train_step(run, state, batches)
        state.step += 1
        state.seconds += time.perf_counter() - started
        bar.update()
    bar.set_postfix_str(f"loss {state.mean_loss():.3f}, {state.describe_best()}")


def _train_step(run: Run, state: TrainState, batches: Iterator[tuple[int, Batch]]) -> None:
    """One step of the optimizer: the mean gradient of one batch or several, left out when it is not finite.

    Raises:
        UkbobError: too many in a row were not finite.
    """
    config, step = run.config, state.epoch * run.config.iterations_per_epoch + state.step
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=run.options.device)
    for part in range(config.accumulate):
        asked = time.perf_counter()
        number, batch = next(batches)
        state.waited += time.perf_counter() - asked
        seed = config.seed * 1_000_003 + number  # a resumed run draws what the uninterrupted one would have drawn
        torch.manual_seed(seed + 500_000_003 * rank())  # dropout draws from the global generator
        batch = augment(batch, run.transforms, torch.Generator().manual_seed(seed))
        with exchange(run.model, now=part + 1 == config.accumulate):
            with torch.autocast(batch.image.device.type, torch.bfloat16, enabled=run.options.device.startswith("cuda")):
                clean = (run.loss.clean(batch.labels),) if isinstance(run.loss, NoiseLoss) else ()
                outputs = run.model(batch.network_input(), *clean)
            value = run.loss(outputs, batch.labels) / config.accumulate
            value.backward()
        total = total + value.detach()
    norm = nn.utils.clip_grad_norm_(state.network.parameters(), config.gradient_clip or float("inf"))
    if not (torch.isfinite(total) and torch.isfinite(norm)):  # a step would spoil the weights
        state.bad_steps += 1
        if state.bad_steps >= MAX_BAD_STEPS:
            raise said_once(
                UkbobError(
                    f"loss or gradient were not finite for {state.bad_steps} steps in a row (epoch {state.epoch}); "
                    f"lower --lr{'; the last checkpoint is from before' if has_run(run.setup.folder) else ''}"
                )
            )
        return
    state.bad_steps = 0
    state.optimizer.step()
    if state.average is not None:
        state.average.update(state.network, step)
    state.loss_sum, state.counted = state.loss_sum + total, state.counted + 1


def _is_validated(state: TrainState, config: TrainingConfig) -> bool:
    return (state.epoch + 1) % config.validation_every == 0 or state.epoch + 1 == config.epochs


def _validate(run: Run, state: TrainState) -> ValidationScore | None:
    """Dice of the weights that prediction would use.

    Raises:
        StoppedError: between two cases, when a signal came; a resumed run begins with this validation.
    """
    from ukbob_seg.inference.sliding_window import WindowSettings

    started = time.perf_counter()
    setup = run.setup
    windows = WindowSettings(setup.network.patch_size, slice_axis=setup.configuration.slice_axis)
    same_everywhere(state.weights().values())
    with averaged(state.network, state.average):
        score = validate(
            run.network, setup.arrays, setup.val, setup.spec.labels, windows, run.options.device, setup.previous,
            stop=lambda: run.stop.signal is not None,
        )  # fmt: skip
    if score is None:
        run.stop.check(f"in the validation after epoch {state.epoch}")
    state.seconds += time.perf_counter() - started
    return score
