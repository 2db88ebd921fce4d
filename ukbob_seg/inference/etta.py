"""Entropy Test-Time Adaptation: a case's own statistics first, then a few entropy steps on the norm layers.

The paper (section 3.4) names batch normalization; the reference Swin-UNETR has none. So every normalization layer
with affine parameters adapts (Batch, Instance, Group, Layer), statistics are re-estimated where a layer keeps
running ones, and everything else stays frozen. Each case starts from the trained weights again.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.etta_config import EttaConfig, EttaRecord
from ukbob_seg.inference.etta_statistics import CaseStatistics
from ukbob_seg.inference.passes import forward
from ukbob_seg.inference.sliding_window import WindowSettings

__all__ = ["EttaConfig", "EttaRecord", "OutputMeaning", "adapt", "adapted", "norm_layers", "voxel_entropy"]

LEAST_SHARE, FAR = 0.75, 0.005  # share of the case's statistics where they are near, distance at which it is 1
NORM_LAYERS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)


def voxel_entropy(logits: Tensor, head: str) -> Tensor:
    """Shannon entropy of each voxel's prediction, in nats.

    Args:
        logits: (B, K, z, y, x), any float dtype; computed in float32.
        head: ``softmax`` (one distribution over K classes) or ``sigmoid`` (K binary ones, summed).

    Returns:
        (B, z, y, x) float32, in [0, log K] or [0, K log 2].

    Reference: UKBOB, section 3.4; Wang et al., Tent, ICLR 2021.
    """
    logits = logits.float()
    if head == "softmax":
        log_p = F.log_softmax(logits, dim=1)
        return -(log_p.exp() * log_p).sum(dim=1)
    return (F.softplus(logits) - logits * logits.sigmoid()).sum(dim=1)


@dataclass(frozen=True)
class OutputMeaning:
    """What the logits of a network mean.

    Attributes:
        head: ``softmax`` (one distribution over all outputs) or ``sigmoid`` (a binary one each).
        has_regions: outputs may overlap and none stands for background.
    """

    head: str = "softmax"
    has_regions: bool = False

    def decide(self, logits: Tensor) -> Tensor:
        """(B, K, z, y, x) -> (B, z, y, x): 0 is background."""
        if not self.has_regions:
            return logits.argmax(dim=1)
        order = torch.arange(1, logits.shape[1] + 1, device=logits.device).view(1, -1, 1, 1, 1)
        return ((logits > 0) * order).amax(dim=1)


def adapt(
    network: nn.Module, image: Tensor, windows: WindowSettings, meaning: OutputMeaning, config: EttaConfig | None = None
) -> tuple[nn.Module, EttaRecord]:
    """Adapt a copy of a network to one image; the network itself is untouched.

    Args:
        network: any network of the toolkit, in evaluation mode.
        image: (C, Z, Y, X), preprocessed, on the network's device.
        windows: the windows that prediction will use.
        meaning: of the network's outputs.
        config: limits.

    Raises:
        ConfigError: the network has no normalization layer that could adapt.
    """
    own = copy.deepcopy(network)
    record = _adapt_in_place(own, image, windows, meaning, config or EttaConfig())
    return own, record


@contextmanager
def adapted(
    network: nn.Module, image: Tensor, windows: WindowSettings, meaning: OutputMeaning, config: EttaConfig | None = None
) -> Iterator[EttaRecord]:
    """Adapt a network to one image inside a ``with`` block and restore it, bit for bit, at its end."""
    tensors = {name: value.detach().clone() for name, value in _adaptable_state(network).items()}
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield _adapt_in_place(network, image, windows, meaning, config or EttaConfig())
    finally:
        with torch.no_grad():
            for name, value in _adaptable_state(network).items():
                value.copy_(tensors[name])
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


def norm_layers(network: nn.Module) -> list[nn.Module]:
    """All normalization layers that adaptation can use: with affine parameters or with running statistics."""
    return [
        layer
        for layer in network.modules()
        if isinstance(layer, NORM_LAYERS)
        and (getattr(layer, "weight", None) is not None or getattr(layer, "running_mean", None) is not None)
    ]


def _adaptable_state(network: nn.Module) -> dict[str, Tensor]:
    """Every tensor that adaptation may change."""
    state: dict[str, Tensor] = {}
    for number, layer in enumerate(norm_layers(network)):
        for name, value in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            state[f"{number}.{name}"] = value
    return state


def _adapt_in_place(
    network: nn.Module, image: Tensor, windows: WindowSettings, meaning: OutputMeaning, config: EttaConfig
) -> EttaRecord:
    layers = norm_layers(network)
    parameters = [p for layer in layers for p in layer.parameters(recurse=False)]
    with_statistics = [layer for layer in layers if getattr(layer, "running_mean", None) is not None]
    if not layers:
        raise ConfigError(
            f"{type(network).__name__} has no normalization layer with affine parameters or running statistics: "
            "there is nothing for --etta to adapt; predict without it"
        )
    network.eval().requires_grad_(False)
    patches = _choose_patches(network, image, windows, meaning, config)
    record = EttaRecord(config.mode, adapted_parameters=sum(p.numel() for p in parameters), patches=len(patches))
    record.statistics_layers = len(with_statistics)
    record.entropy_before, before = _measure(network, patches, meaning)
    record.foreground_before = _foreground(before)
    start = {name: value.detach().clone() for name, value in _adaptable_state(network).items()}
    if with_statistics:
        _take_statistics(network, with_statistics, patches, config, record)
    if parameters and config.steps:
        rate = config.rate(bool(with_statistics))
        record.steps = _descend(network, parameters, patches, meaning, config, rate)
    record.entropy_after, after = _measure(network, patches, meaning)
    record.foreground_after = _foreground(after)
    if record.foreground_after < config.least_foreground * record.foreground_before:
        record.decision = "fell back: the predicted foreground collapsed"
        with torch.no_grad():
            for name, value in _adaptable_state(network).items():
                value.copy_(start[name])
        after, record.entropy_after = before, record.entropy_before
    elif record.steps == 0 and not with_statistics:
        reason = (
            "no step lowered the entropy and kept the foreground" if config.steps else "no steps, and no statistics"
        )
        record.decision = f"unchanged: {reason}"
    record.voxels_changed = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    return record


def _take_statistics(
    network: nn.Module, layers: Sequence[nn.Module], patches: Sequence[Tensor], config: EttaConfig, record: EttaRecord
) -> None:
    """Give layers a share of the case's own statistics; all of them, or as their distance says."""
    statistics = CaseStatistics.measure(layers, patches, lambda patch: forward(network, patch))
    record.statistics_distance = statistics.distance()
    share = config.statistics_share
    record.statistics_share = choose_share(record.statistics_distance) if share is None else share
    statistics.mix(record.statistics_share)


def choose_share(distance: float) -> float:
    """Weight of a case's own statistics, from their distance to the stored ones."""
    return float(min(1.0, max(LEAST_SHARE, distance / FAR)))


def spread_corners(starts: Sequence[Sequence[int]], most: int) -> list[tuple[int, int, int]]:
    """First voxels of some of the windows that begin at ``starts`` along z, y and x: of all, if they are few.

    Else they are spread along z, and each lies elsewhere than the one before: in the middle first, where the body is.
    """
    z, y, x = starts
    if len(z) * len(y) * len(x) <= most:
        return list(itertools.product(z, y, x))
    places = list(itertools.product(range(len(y)), range(len(x))))

    def off_centre(place: tuple[int, int]) -> float:
        return max(abs((2 * i + 1) / n - 1) for i, n in zip(place, (len(y), len(x)), strict=True))

    inward = sorted(places, key=lambda place: (off_centre(place), place))
    chosen = []
    for i in range(most):
        row_y, row_x = inward[i % len(inward)]
        chosen.append((z[int((i + 0.5) * len(z) / most)], y[row_y], x[row_x]))
    return chosen


@torch.no_grad()
def _choose_patches(
    network: nn.Module, image: Tensor, windows: WindowSettings, meaning: OutputMeaning, config: EttaConfig
) -> list[Tensor]:
    """Windows (1, C, z, y, x) that show foreground and are uncertain, from evenly spread candidates."""
    patch = windows.window(image.shape[1:])
    padded, _ = windows.pad(image)
    starts = windows.starts(padded.shape[1:])
    patches = [
        padded[:, z : z + patch[0], y : y + patch[1], x : x + patch[2]].unsqueeze(0)
        for z, y, x in spread_corners(starts, config.candidates)
    ]
    if len(patches) <= config.max_patches:
        return patches
    scores = []
    for position, candidate in enumerate(patches):
        logits = forward(network, candidate)
        entropy = float(voxel_entropy(logits, meaning.head).mean())
        scores.append((_foreground([meaning.decide(logits)]) > 0, entropy, -position))
    best = sorted(range(len(patches)), key=lambda i: scores[i], reverse=True)[: config.max_patches]
    return [patches[i] for i in sorted(best)]


@torch.no_grad()
def _measure(network: nn.Module, patches: Sequence[Tensor], meaning: OutputMeaning) -> tuple[float, list[Tensor]]:
    """Mean entropy over the patches, and the decision of each."""
    entropies, decisions = [], []
    for patch in patches:
        logits = forward(network, patch)
        entropies.append(float(voxel_entropy(logits, meaning.head).mean()))
        decisions.append(meaning.decide(logits))
    return sum(entropies) / len(entropies), decisions


def _foreground(decisions: Sequence[Tensor]) -> int:
    return sum(int((decision > 0).sum()) for decision in decisions)


def possible_foreground(logits: Tensor, meaning: OutputMeaning, certain_background: float) -> Tensor:
    """Where background is less probable than a limit: (B, K, z, y, x) -> (B, z, y, x) bool.

    With regions: where any region is more probable than what the limit leaves.
    """
    logits = logits.float()
    if meaning.has_regions:
        return (logits.sigmoid() > 1 - certain_background).any(dim=1)
    background = logits.softmax(dim=1)[:, 0] if meaning.head == "softmax" else logits[:, 0].sigmoid()
    return background < certain_background


def _voxel_weights(logits: Tensor, meaning: OutputMeaning, config: EttaConfig) -> Tensor:
    """What each voxel of a patch counts for in the entropy that the steps lower: (B, z, y, x), with a sum of 1, or 0
    where no voxel counts.

    Most voxels are background that nobody doubts. In a mean over all voxels they would outvote the others, and whole
    organs are cheaply made certain by calling them background.
    """
    if config.certain_background >= 1:
        return torch.full_like(logits[:, 0], 1 / logits[:, 0].numel(), dtype=torch.float32)
    counted = possible_foreground(logits, meaning, config.certain_background).float()
    return counted / counted.sum().clamp_min(1)


def _descend(
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    patches: Sequence[Tensor],
    meaning: OutputMeaning,
    config: EttaConfig,
    rate: float,
) -> int:
    """Minimise the mean entropy over the patches; returns the steps that led to the parameters that are kept.

    In mode ``guarded`` these are the best seen, and the steps end once the entropy no longer falls, or the amount of
    foreground drifts away: low entropy is cheap where every doubtful voxel becomes the same. Which voxels count is
    decided before the first step.
    """
    weights: list[Tensor] = []
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    best_entropy, best_step, foreground_at_first = float("inf"), 0, 0
    best = [p.detach().clone() for p in parameters]
    for step in range(config.steps + 1):
        optimizer.zero_grad(set_to_none=True)
        entropy, foreground = 0.0, 0
        last = step == config.steps
        for number, patch in enumerate(patches):
            with torch.set_grad_enabled(not last):
                logits = forward(network, patch)
                if step == 0:
                    weights.append(_voxel_weights(logits.detach(), meaning, config))
                value = (voxel_entropy(logits, meaning.head) * weights[number]).sum() / len(patches)
            if not last:
                value.backward()
            entropy += float(value.detach())
            foreground += _foreground([meaning.decide(logits.detach())])
        if step == 0:
            foreground_at_first = foreground
        drift = abs(foreground - foreground_at_first) / max(1, foreground_at_first)
        if config.mode == "guarded" and (not entropy < best_entropy or drift > config.most_drift):
            break
        best_entropy, best_step = entropy, step
        best = [p.detach().clone() for p in parameters]
        if not last:
            optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
            parameter.requires_grad_(False)
            parameter.grad = None
    return best_step
