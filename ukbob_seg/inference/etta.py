"""Entropy Test-Time Adaptation: a case's own statistics first, then a few entropy steps on the norm layers.

The paper (section 3.4) names batch normalization; the reference Swin-UNETR has none. So every normalization layer
with affine parameters adapts (Batch, Instance, Group, Layer), statistics are re-estimated where a layer keeps
running ones, and everything else stays frozen. Each case starts from the trained weights again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.etta_config import EttaConfig, EttaRecord
from ukbob_seg.inference.etta_entropy import OutputMeaning, Seen, foreground, look, voxel_entropy, voxel_weights
from ukbob_seg.inference.etta_statistics import CaseStatistics
from ukbob_seg.inference.etta_windows import choose_windows, cut, spread_corners
from ukbob_seg.inference.passes import forward
from ukbob_seg.inference.sliding_window import WindowSettings
from ukbob_seg.networks.wrappers import unwrapped

__all__ = ["EttaConfig", "EttaRecord", "OutputMeaning", "adapt", "adapted", "adapted_to_case", "norm_layers"]

LEAST_SHARE, FAR = 0.25, 0.01  # share of the case's statistics where they are near, distance at which it is 1
NORM_LAYERS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)


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
    _, records = _adapt_in_place([own], image, image, windows, meaning, config or EttaConfig())
    return own, records[0]


@contextmanager
def adapted(
    network: nn.Module, image: Tensor, windows: WindowSettings, meaning: OutputMeaning, config: EttaConfig | None = None
) -> Iterator[EttaRecord]:
    """Adapt a network to one image inside a ``with`` block and restore it, bit for bit, at its end."""
    with adapted_to_case([network], image, image, windows, meaning, config) as (_, records):
        yield records[0]


@contextmanager
def adapted_to_case(
    networks: Sequence[nn.Module],
    image: Tensor,
    flat: Tensor,
    windows: WindowSettings,
    meaning: OutputMeaning,
    config: EttaConfig | None = None,
) -> Iterator[tuple[Tensor, list[EttaRecord]]]:
    """Adapt all networks of a model to a case inside a ``with`` block and restore them, bit for bit, at its end.

    Args:
        networks: as trained, in evaluation mode.
        image: (C, Z, Y, X), preprocessed, on the networks' device.
        flat: the image without an unusual field (``etta_field.remove_fields``); the image itself if it has none.
        windows: the windows that prediction will use.
        meaning: of the networks' outputs.
        config: limits.

    Yields:
        What of the two to predict, and what was done to each network. It is the image if the networks as trained see
        much less foreground without the field.

    Raises:
        ConfigError: a network has no normalization layer that could adapt.
    """
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(_restored(network))
        yield _adapt_in_place(networks, image, flat, windows, meaning, config or EttaConfig())


@contextmanager
def _restored(network: nn.Module) -> Iterator[None]:
    """At the end of the block everything that adaptation may change is what it was."""
    tensors = {name: value.detach().clone() for name, value in _adaptable_state(network).items()}
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
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
    """All normalization layers that adaptation can use: with affine parameters or with running statistics.

    Raises:
        ConfigError: there is none.
    """
    layers: list[nn.Module] = [
        layer
        for layer in network.modules()
        if isinstance(layer, NORM_LAYERS)
        and (getattr(layer, "weight", None) is not None or getattr(layer, "running_mean", None) is not None)
    ]
    if not layers:
        raise ConfigError(
            f"{type(unwrapped(network)).__name__} has no normalization layer with affine parameters or running "
            "statistics: there is nothing for --etta to adapt; predict without it"
        )
    return layers


def _adaptable_state(network: nn.Module) -> dict[str, Tensor]:
    """Every tensor that adaptation may change."""
    state: dict[str, Tensor] = {}
    for number, layer in enumerate(norm_layers(network)):
        for name, value in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            state[f"{number}.{name}"] = value
    return state


def _adapt_in_place(
    networks: Sequence[nn.Module],
    image: Tensor,
    flat: Tensor,
    windows: WindowSettings,
    meaning: OutputMeaning,
    config: EttaConfig,
) -> tuple[Tensor, list[EttaRecord]]:
    """As ``adapted_to_case``, without restoring anything."""
    corners = spread_corners(windows.starts(windows.pad(image)[0].shape[1:]), config.candidates)
    plain, start = [], []
    for network in networks:
        network.eval().requires_grad_(False)
        plain.append(look(network, cut(image, corners, windows), meaning))
        start.append(plain[-1] if flat is image else look(network, cut(flat, corners, windows), meaning))
    chosen = flat
    if sum(seen.foreground for seen in start) < config.least_foreground * sum(seen.foreground for seen in plain):
        chosen, start = image, plain
    records = []
    for network, before, now in zip(networks, plain, start, strict=True):
        best = choose_windows(now, config.max_patches)
        records.append(_adapt_layers(network, before.only(best), now.only(best), meaning, config))
    return chosen, records


def _adapt_layers(
    network: nn.Module, plain: Seen, start: Seen, meaning: OutputMeaning, config: EttaConfig
) -> EttaRecord:
    """Adapt the layers of a network to some windows.

    Args:
        network: as trained.
        plain: what it sees in the windows of the image as it came, which is what the record compares with.
        start: the same in the windows to adapt to.
        meaning: of its outputs.
        config: limits.
    """
    layers = norm_layers(network)
    parameters = [p for layer in layers for p in layer.parameters(recurse=False)]
    with_statistics = [layer for layer in layers if getattr(layer, "running_mean", None) is not None]
    record = EttaRecord(config.mode, adapted_parameters=sum(p.numel() for p in parameters), patches=len(start.windows))
    record.statistics_layers = len(with_statistics)
    record.entropy_before, record.foreground_before = plain.entropy, plain.foreground
    trained = {name: value.detach().clone() for name, value in _adaptable_state(network).items()}
    if with_statistics:
        _take_statistics(network, with_statistics, start, config, record)
    if parameters and config.steps:
        rate = config.rate(bool(with_statistics))
        record.steps = _descend(network, parameters, start.windows, meaning, config, rate)
    end = look(network, start.windows, meaning)
    record.foreground_after = end.foreground
    record.decision = _judge(start, end, config, record)
    if record.decision != "adapted":
        end, record.steps = start, 0
        record.statistics_share = 0.0 if with_statistics else None
        with torch.no_grad():
            for name, value in _adaptable_state(network).items():
                value.copy_(trained[name])
    record.entropy_after, record.voxels_changed = end.entropy, plain.changes(end)
    return record


def _judge(start: Seen, end: Seen, config: EttaConfig, record: EttaRecord) -> str:
    """``adapted``, or why the layers are better as trained."""
    if not math.isfinite(end.entropy):
        return "fell back: outputs were no longer finite"
    if end.foreground < config.least_foreground * start.foreground:
        return "fell back: the predicted foreground collapsed"
    if start.foreground == end.foreground == 0 and config.least_foreground > 0:
        return "unchanged: the chosen windows show no foreground, adapted or not"
    if record.steps == 0 and not record.statistics_layers:
        if not config.steps:
            return "unchanged: no steps, and no statistics"
        return "unchanged: no step lowered the entropy and kept the foreground"
    return "adapted"


def _take_statistics(
    network: nn.Module, layers: Sequence[nn.Module], start: Seen, config: EttaConfig, record: EttaRecord
) -> None:
    """Give layers a share of the case's own statistics; all of them, or as their distance says."""
    weights = start.confidences if config.weigh_windows else None
    statistics = CaseStatistics.measure(layers, start.windows, lambda window: forward(network, window), weights)
    record.statistics_distance = statistics.distance()
    share = config.statistics_share
    record.statistics_share = choose_share(record.statistics_distance) if share is None else share
    statistics.mix(record.statistics_share)


def choose_share(distance: float) -> float:
    """Weight of a case's own statistics, from their distance to the stored ones."""
    return float(min(1.0, max(LEAST_SHARE, distance / FAR)))


def _descend(
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    windows: Sequence[Tensor],
    meaning: OutputMeaning,
    config: EttaConfig,
    rate: float,
) -> int:
    """Minimise the mean entropy over the windows; returns the steps that led to the parameters that are kept.

    The steps end once the entropy no longer falls, or the amount of foreground drifts away: low entropy is cheap where
    every doubtful voxel becomes the same. Which voxels count is decided before the first step.
    """
    weights: list[Tensor] = []
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    best_entropy, best_step, foreground_at_first = math.inf, 0, 0
    best = [p.detach().clone() for p in parameters]
    for step in range(config.steps + 1):
        optimizer.zero_grad(set_to_none=True)
        entropy, shown = 0.0, 0
        last = step == config.steps
        for number, window in enumerate(windows):
            with torch.set_grad_enabled(not last):
                logits = forward(network, window)
                if step == 0:
                    weights.append(voxel_weights(logits.detach(), meaning, config.certain_background))
                value = (voxel_entropy(logits, meaning.head) * weights[number]).sum() / len(windows)
            if not last:
                value.backward()
            entropy += float(value.detach())
            shown += foreground(meaning.decide(logits.detach()))
        if step == 0:
            foreground_at_first = shown
        drift = abs(shown - foreground_at_first) / max(1, foreground_at_first)
        if drift > config.most_drift or (config.stop_early and not entropy < best_entropy):
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
