"""The recipe of a training run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ukbob_seg.errors import ConfigError

LOSSES = ("ce_dice", "bce_dice")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine_restarts", "cosine", "poly", "one_cycle", "constant")
AUGMENTATIONS = ("ukbob", "strong", "mri", "none")
FLAGGED_LABELS = ("ignore", "marginal")


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the weights, besides data and plans; stored in the checkpoint.

    Attributes:
        epochs: number of epochs; may be raised when resuming.
        iterations_per_epoch: training steps per epoch.
        loss: ``ce_dice`` (softmax) or ``bce_dice`` (a sigmoid per output; always used for regions).
        optimizer: ``adamw`` (betas 0.9, 0.999) or ``sgd`` (Nesterov momentum 0.99).
        learning_rate: peak rate.
        weight_decay: of the optimizer.
        schedule: shape of the learning rate over the run.
        warmup_epochs: linear rise at the start.
        restart_epochs: about the length of a cosine cycle; a run has a whole number of them.
        gradient_clip: largest norm of the gradient, 0 for none.
        foreground_fraction: share of the patches that are centred on a labelled voxel, at least.
        augmentation: ``ukbob`` (the paper's set), ``strong`` (nnU-Net's), ``mri`` (more, for MR images) or ``none``.
        mirror_axes: axes (0 = z, 1 = y, 2 = x) that augmentation flips, and that test-time flips may use.
        validation_every: epochs between validations.
        validation_cases: validate on the first so many cases, 0 for all.
        subset_fraction: share of the training cases that is used.
        flagged_labels: ``ignore`` (what the filter's policy says: by default the organ's voxels count for nothing) or
            ``marginal`` (in that case the organ is one class with background).
        accumulate: batches per optimizer step, one after the other, with the mean of their gradients.
        ema: decay of a moving average of the weights, which validation and prediction then use; 0 for none.
        early_stopping: end after so many validations in a row without a higher mean Dice, 0 for never; may be changed
            when resuming.
        seed: decides initial weights, case and patch choice, and augmentation.
    """

    epochs: int = 500
    iterations_per_epoch: int = 250
    loss: str = "ce_dice"
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    schedule: str = "cosine_restarts"
    warmup_epochs: int = 0
    restart_epochs: int = 200
    gradient_clip: float = 12.0
    foreground_fraction: float = 0.33
    augmentation: str = "ukbob"
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    validation_every: int = 10
    validation_cases: int = 0
    subset_fraction: float = 1.0
    flagged_labels: str = "ignore"
    accumulate: int = 1
    ema: float = 0.0
    early_stopping: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("loss", LOSSES),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("augmentation", AUGMENTATIONS),
            ("flagged_labels", FLAGGED_LABELS),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("epochs", "iterations_per_epoch", "restart_epochs", "validation_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_epochs", "validation_cases", "weight_decay", "gradient_clip", "early_stopping", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.seed >= 2**31:
            raise ConfigError(f"seed must be below {2**31}, got {self.seed}")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise ConfigError(f"warmup_epochs ({self.warmup_epochs}) must be fewer than epochs ({self.epochs})")
        if not 0 < self.subset_fraction <= 1:
            raise ConfigError(f"subset_fraction must lie in (0, 1], got {self.subset_fraction}")
        if not 0 <= self.foreground_fraction <= 1:
            raise ConfigError(f"foreground_fraction must lie in [0, 1], got {self.foreground_fraction}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must lie in [0, 1), got {self.ema}")
        if not set(self.mirror_axes) <= {0, 1, 2}:
            raise ConfigError(f"mirror_axes must be among 0, 1, 2, got {self.mirror_axes}")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainingConfig:
        """Inverse of ``to_json``."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise ConfigError(f"training configuration: unknown entry {', '.join(unknown)}")
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
        return cls(**values)


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; none of this changes the result on one kind of device (``compile``: but for rounding).

    Attributes:
        device: ``cpu``, ``cuda``, ``cuda:1``, ...
        resume: continue from the last checkpoint.
        overwrite: start afresh although the fold was trained before.
        loader_workers: processes that read patches, 0 for none; None to choose.
        pretrained: checkpoint whose matching weights the run starts from.
        pretrained_dataset: its dataset.json, where it does not hold one itself.
        pretrained_merging: how a Swin network of others merged patches, ``legacy`` or ``distinct``.
        tensorboard: write curves for TensorBoard as well.
        compile: call the network through ``torch.compile``; as it is, with a warning, where that fails.
        stop_on_signals: on SIGTERM or SIGUSR1 finish the step, write a checkpoint and raise ``StoppedError``.
        quiet: no progress bar.
    """

    device: str = "cpu"
    resume: bool = False
    overwrite: bool = False
    loader_workers: int | None = None
    pretrained: Path | None = None
    pretrained_dataset: Path | None = None
    pretrained_merging: str | None = None
    tensorboard: bool = False
    compile: bool = False
    stop_on_signals: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.loader_workers is not None and self.loader_workers < 0:
            raise ConfigError(f"--loader-workers must not be negative, got {self.loader_workers}")


# The recipes that users start from; every field can be overridden by a flag of ukbob_train.
RECIPES: dict[str, TrainingConfig] = {
    # Swin-BOB, PAPER 3 with the loss that fits exclusive labels.
    "swin_unetr": TrainingConfig(),
    # nnU-Net's own recipe for its own networks.
    "nnunet": TrainingConfig(
        epochs=1000, optimizer="sgd", learning_rate=1e-2, weight_decay=3e-5, schedule="poly", augmentation="strong"
    ),
    # PAPER 3 to the letter: BCE + Dice, 3000 epochs, a warm restart every 200.
    "ukbob": TrainingConfig(epochs=3000, loss="bce_dice", gradient_clip=0.0),
    # PAPER 3, fine-tuning.
    "finetune": TrainingConfig(epochs=500, warmup_epochs=50),
}


NNUNET_NETWORKS = ("plain_conv_unet", "residual_encoder_unet", "resenc_unet_m", "resenc_unet_l", "resenc_unet_xl")


def recipe(network: str, preset: str, pretrained: bool = False) -> TrainingConfig:
    """The recipe that a run starts from.

    nnU-Net's networks are trained by its recipe, and with preset ``nnunet`` every network but Swin-UNETR; other
    networks take Swin-UNETR's. Preset ``ukbob`` has one recipe for all.
    """
    if preset == "ukbob":
        paper = RECIPES["ukbob"]
        return dataclasses.replace(paper, epochs=500, warmup_epochs=50) if pretrained else paper
    if pretrained and network == "swin_unetr":
        return RECIPES["finetune"]
    own = network in NNUNET_NETWORKS or (preset == "nnunet" and network != "swin_unetr")
    return RECIPES["nnunet" if own else "swin_unetr"]
