"""How a cohort is labelled."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.settings import PredictionSettings
from ukbob_seg.parallel import HERE, Cluster

NAMES = ("auto", "model", "totalvibe")


@dataclass(frozen=True)
class LabelOptions:
    """How a cohort is labelled.

    Attributes:
        model: folder or archive of a trained model: ours, or nnU-Net's.
        folds: to average; None for all.
        checkpoint: ``best`` or ``final``; None for what the kind of model takes by itself.
        devices: of this machine; each gets a process where there are several. With a scheduler one, which its workers
            take: ``auto``, or ``cuda`` on machines of several, is chosen by each.
        settings: how to predict.
        channel: names or numbers of the cohort's channels that the model takes; None for all.
        fuse: channels to label one by one and to merge, instead.
        roi_model: predicts the label map that a model of TotalVibeSegmentator's first releases takes as a channel.
        channel_names: of the cohort; None for those of its dataset.json.
        names: of the labels: ``model``, ``totalvibe``, or ``auto`` (TotalVibeSegmentator's for a model of its values).
        copy: images, instead of linking them.
        overwrite: labels that were made otherwise.
        skip_failed: leave out cases that cannot be labelled, instead of an error at the end.
        workers: processes on a CPU; None for one, which uses all processors.
        cluster: part of the cases, and Dask.
        quiet: no progress bar.
    """

    model: Path
    folds: tuple[str, ...] | None = None
    checkpoint: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    settings: PredictionSettings = field(default_factory=PredictionSettings)
    channel: tuple[str, ...] | None = None
    fuse: tuple[str, ...] | None = None
    roi_model: Path | None = None
    channel_names: tuple[str, ...] | None = None
    names: str = "auto"
    copy: bool = False
    overwrite: bool = False
    skip_failed: bool = False
    workers: int | None = None
    cluster: Cluster = HERE
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.names not in NAMES:
            raise ConfigError(f"--names must be one of {', '.join(NAMES)}, got {self.names!r}")
        if self.channel is not None and self.fuse is not None:
            raise ConfigError("--channel and --fuse exclude each other; give one of them")
        if self.fuse is not None and len(self.fuse) < 2:
            raise ConfigError("--fuse merges at least two channels; label a single one with --channel")
        if self.cluster.scheduler is not None and self.workers is not None:
            raise ConfigError("--workers are processes of this machine, --scheduler has its own; leave out one of them")
        if self.cluster.scheduler is not None and len(self.devices) != 1:
            raise ConfigError(f"with --scheduler give one device for all workers, got {', '.join(self.devices)}")
        if self.workers is not None and len(self.devices) > 1:
            raise ConfigError(
                f"--workers has no effect on {len(self.devices)} devices, which get a process each; leave it out, or "
                "give one --device"
            )
