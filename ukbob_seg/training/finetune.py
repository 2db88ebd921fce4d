"""A training run that starts from given weights: which patch merging it needs, and the record of what was taken."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.files import read_json, write_json
from ukbob_seg.networks.pretrained import Interface, Pretrained, read_pretrained
from ukbob_seg.networks.registry import build_network
from ukbob_seg.networks.transfer import TransferReport, transfer
from ukbob_seg.networks.window_attention import MERGING_ORDERS
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import Plans
from ukbob_seg.training.setup import TrainingSetup

log = logging.getLogger(__name__)

RECORD = "pretrained.json"
DEFAULT_MERGING = "distinct"
LARGEST_SPACING_RATIO = 1.1  # between two trainings, without a warning


@dataclasses.dataclass(frozen=True)
class PretrainedOptions:
    """What the user says of the weights to start from.

    Attributes:
        weights: checkpoint file, None to start fresh.
        dataset: dataset.json of the data that they were trained with, where the checkpoint does not hold it.
        merging: ``legacy`` or ``distinct``, how a Swin network of others merged patches; None when not said.
    """

    weights: Path | None = None
    dataset: Path | None = None
    merging: str | None = None

    def __post_init__(self) -> None:
        if self.merging is not None and self.merging not in MERGING_ORDERS:
            raise ConfigError(f"--pretrained-merging must be one of {', '.join(MERGING_ORDERS)}, got {self.merging!r}")
        if self.weights is None and (self.dataset is not None or self.merging is not None):
            raise ConfigError(
                "--pretrained-dataset and --pretrained-merging describe the file of --pretrained: give that"
            )


def read_weights(
    setup: TrainingSetup, options: PretrainedOptions, resume: bool
) -> tuple[TrainingSetup, Pretrained | None]:
    """Read the weights to start from, and let the run's network merge patches as theirs did.

    A resumed run takes its weights from its own checkpoint, and how it merges from its record.

    Raises:
        ConfigError: the options contradict the network, the checkpoint or the record.
        CheckpointError, DatasetError: unusable files.
    """
    if resume:
        known = _record(setup.folder).get("patch_merging")
        if options.merging not in (None, known):
            raise ConfigError(
                f"cannot resume {setup.folder}: it was started "
                f"{f'with --pretrained-merging {known}' if known else 'without --pretrained-merging'}, not "
                f"{options.merging}"
            )
        return _with_merging(setup, known), None
    if options.weights is None:
        return setup, None
    pretrained = read_pretrained(options.weights, options.dataset)
    return _with_merging(setup, _merging(setup, pretrained, options.merging)), pretrained


def check_same_source(folder: Path, weights: Path | None, dataset: Path | None) -> None:
    """Refuse to resume a run with other weights than those that it was started from; its own are in its checkpoint.

    Args:
        folder: of the fold.
        weights: what the command names now, None for nothing, which is always right.
        dataset: its dataset.json, likewise.

    Raises:
        ConfigError: says what the run was started from.
    """
    record = _record(folder)
    for option, key, given in (("--pretrained", "file", weights), ("--pretrained-dataset", "dataset_file", dataset)):
        if given is None:
            continue
        known = record.get(key)
        if known != str(given.resolve()):
            raise ConfigError(
                f"cannot resume {folder} with {option} {given}: it was started "
                f"{f'from {known}' if known else 'without'}; drop the option, or start afresh with --overwrite"
            )


def _record(folder: Path) -> dict[str, Any]:
    """What ``write_record`` left, empty for a run that started from fresh weights."""
    path = folder / RECORD
    content = read_json(path, "record of the pretrained weights") if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def start_from(network: nn.Module, setup: TrainingSetup, pretrained: Pretrained) -> TransferReport:
    """Copy the weights, and say in the log what was loaded and what was not."""
    description, spec = setup.description, setup.spec
    previous = int(description.arguments.get("previous_labels", 0))

    def build_larger(inputs: int, outputs: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # its weights are thrown away and must not move the random state
            channels, classes = len(spec.channel_names) + inputs, spec.labels.num_outputs + outputs
            return build_network(description.network, channels, classes, description.arguments)

    report = transfer(network, pretrained, Interface.of(spec, description.head, previous), build_larger)
    report.warnings += preprocessing_differences(pretrained, setup)
    log.info("%s", report.summary())
    for warning in report.warnings:
        log.warning("%s", warning)
    return report


def preprocessing_differences(pretrained: Pretrained, setup: TrainingSetup) -> list[str]:
    """How the images that the weights were trained with were made otherwise than those of the run; a line each.

    Voxel sizes count from a tenth on. Channels are compared by position; intensity statistics belong to each dataset.
    Empty for checkpoints of others, which do not say. Plans that cannot be read, such as those of a later version, are
    a line too: the weights are good without.
    """
    if not pretrained.plans:
        return []
    ours = Plans.from_json(setup.description.plans, "plans of the run")
    try:
        theirs = Plans.from_json(pretrained.plans, f"plans in {pretrained.source}")
        there = theirs.configuration(pretrained.configuration)
    except (ConfigError, TypeError, ValueError) as error:
        return [
            "voxel size and normalization of the pretrained network are not compared with the run's, because its "
            f"plans cannot be read ({error})"
        ]
    here, found = ours.configuration(setup.description.configuration), []
    ratios = [a / b for a, b in zip(here.spacing_mm, there.spacing_mm, strict=True)]
    if max(*ratios, *(1 / ratio for ratio in ratios)) > LARGEST_SPACING_RATIO:
        found.append(
            f"the pretrained network saw voxels of {_mm(there.spacing_mm)}, this run has {_mm(here.spacing_mm)}: "
            "organs have another size in voxels (spacing_mm in plans.json, then ukbob_preprocess)"
        )
    for channel, (a, b) in enumerate(zip(ours.normalization, theirs.normalization, strict=False)):
        if (a.scheme, a.mask_nonzero) != (b.scheme, b.mask_nonzero):
            found.append(
                f"channel {channel} was normalised by {_scheme(b)} where the weights were trained, by {_scheme(a)} in "
                "this run: intensities have another range (normalization in plans.json, then ukbob_preprocess)"
            )
    return found


def _mm(spacing_mm: tuple[float, float, float]) -> str:
    return " x ".join(f"{s:.3g}" for s in spacing_mm) + " mm (z, y, x)"


def _scheme(normalization: ChannelNormalization) -> str:
    return normalization.scheme + (" inside the nonzero mask" if normalization.mask_nonzero else "")


def write_record(setup: TrainingSetup, report: TransferReport | None, dataset: Path | None) -> None:
    """Write ``pretrained.json`` into the fold's folder, or remove that of an earlier run.

    Args:
        setup: of the run.
        report: what was taken from the weights; None when the run starts fresh.
        dataset: dataset.json that was given for them.
    """
    path = setup.folder / RECORD
    if report is None:
        path.unlink(missing_ok=True)
        return
    merging = {}
    if setup.description.network == "swin_unetr":
        merging["patch_merging"] = setup.description.arguments.get("patch_merging", DEFAULT_MERGING)
    files = {"file": str(Path(report.source).resolve())}
    if dataset is not None:
        files["dataset_file"] = str(dataset.resolve())
    write_json(path, {**merging, **files, **report.to_json()})


def _merging(setup: TrainingSetup, pretrained: Pretrained, said: str | None) -> str | None:
    """How the pretrained network merged patches; None for networks that merge none."""
    if setup.description.network != "swin_unetr":
        if said is not None:
            raise ConfigError(f"--pretrained-merging is for swin_unetr, this run trains {setup.description.network}")
        return None
    if pretrained.network is not None:
        recorded = str(pretrained.arguments.get("patch_merging", DEFAULT_MERGING))
        if said not in (None, recorded):
            raise ConfigError(
                f"{pretrained.source} was trained with patch_merging {recorded!r} and records it; drop "
                f"--pretrained-merging {said}"
            )
        return recorded
    if said is not None:
        return said
    planned = str(setup.description.arguments.get("patch_merging", DEFAULT_MERGING))
    log.warning(
        "%s does not say how it merged patches, and its weights cannot tell: taken as %r, as in the plans. MONAI "
        "duplicated some slices before its fix #8285; weights from before then need --pretrained-merging legacy, or "
        "they load without complaint and compute something else",
        pretrained.source, planned,
    )  # fmt: skip
    return planned


def _with_merging(setup: TrainingSetup, merging: str | None) -> TrainingSetup:
    description = setup.description
    if merging is None or description.arguments.get("patch_merging", DEFAULT_MERGING) == merging:
        return setup
    log.info("patch_merging is %r in this run, as in the weights that it starts from", merging)
    arguments = {**description.arguments, "patch_merging": merging}
    return dataclasses.replace(setup, description=dataclasses.replace(description, arguments=arguments))
