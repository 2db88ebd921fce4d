"""Learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable

from ukbob_seg.training.config import TrainingConfig

POLY_EXPONENT = 0.9
ONE_CYCLE_RISE = 0.2  # share of the run in which the rate rises


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of one training step.

    Args:
        config: recipe; a linear warm-up precedes every schedule.
        step: 0 .. epochs * iterations_per_epoch - 1.
    """
    epoch = step / config.iterations_per_epoch
    if epoch < config.warmup_epochs:
        return config.learning_rate * (step + 1) / (config.warmup_epochs * config.iterations_per_epoch)
    return config.learning_rate * _SHAPES[config.schedule](config, epoch - config.warmup_epochs)


def _cosine_restarts(config: TrainingConfig, epoch: float) -> float:
    """Cosine from 1 to 0 again and again (Loshchilov and Hutter, SGDR).

    Cycles have about ``restart_epochs``, stretched or shortened so that the run ends with a whole one: 500 epochs are
    two of 250, and the paper's 3000 epochs fifteen of exactly 200.
    """
    total = config.epochs - config.warmup_epochs
    length = total / max(1, round(total / config.restart_epochs))
    return 0.5 * (1 + math.cos(math.pi * (epoch % length) / length))


def _cosine(config: TrainingConfig, epoch: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * epoch / (config.epochs - config.warmup_epochs)))


def _poly(config: TrainingConfig, epoch: float) -> float:
    return (1 - math.floor(epoch) / (config.epochs - config.warmup_epochs)) ** POLY_EXPONENT


def _one_cycle(config: TrainingConfig, epoch: float) -> float:
    """Cosine rise from 1/25 to 1, then cosine fall to nearly 0 (Smith and Topin)."""
    share = epoch / (config.epochs - config.warmup_epochs)
    if share < ONE_CYCLE_RISE:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * share / ONE_CYCLE_RISE))
    return 1e-4 + (1 - 1e-4) * 0.5 * (1 + math.cos(math.pi * (share - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE)))


_SHAPES: dict[str, Callable[[TrainingConfig, float], float]] = {
    "cosine_restarts": _cosine_restarts,
    "cosine": _cosine,
    "poly": _poly,
    "one_cycle": _one_cycle,
    "constant": lambda config, epoch: 1.0,
}
