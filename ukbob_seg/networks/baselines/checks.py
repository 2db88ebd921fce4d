"""What the baselines refuse: arguments of plans and inputs that would fail deep inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.swin_unetr import MOST_OUTPUTS

Triple = tuple[int, int, int]


def integers(name: str, values: Any, count: int, allowed: Sequence[int] = ()) -> tuple[int, ...]:
    """A list of a plan as a tuple.

    Args:
        name: of the argument, for the message.
        values: from JSON.
        count: entries it must have.
        allowed: the only values; any from 1 where empty.

    Raises:
        ConfigError: another number of entries, or one that is not allowed.
    """
    rule = f"of {', '.join(map(str, allowed))}" if allowed else "from 1"
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or len(values) != count or not all(_is_allowed(value, allowed) for value in values):
        raise ConfigError(f"{name} must be {count} integers {rule}, got {values!r}")
    return tuple(values)


def triple(name: str, values: Any, allowed: Sequence[int] = ()) -> Triple:
    """``integers`` of (z, y, x)."""
    z, y, x = integers(name, values, 3, allowed)
    return z, y, x


def check_channels(in_channels: int, out_channels: int) -> None:
    """Raise ConfigError unless there are channels to come in and outputs that a label map can hold."""
    if in_channels < 1 or not 1 <= out_channels <= MOST_OUTPUTS:
        raise ConfigError(
            f"a network has image channels from 1 and 1 to {MOST_OUTPUTS} outputs, got {in_channels} and {out_channels}"
        )


def check_rate(name: str, rate: float) -> None:
    """Raise ConfigError unless a probability of dropping leaves something."""
    if not 0 <= rate < 1:
        raise ConfigError(f"{name} must be in [0, 1), got {rate}")


def check_input(name: str, shape: Sequence[int], in_channels: int, divisor: Triple) -> None:
    """Raise ConfigError unless the shape is (B, in_channels, z, y, x) and the divisor divides (z, y, x).

    Args:
        name: of the network, for the message.
        shape: of the input.
        in_channels: that the network was built for.
        divisor: per axis.
    """
    if len(shape) != 5 or shape[1] != in_channels:
        raise ConfigError(f"{name} takes (batch, {in_channels}, z, y, x), got an input of {tuple(shape)}")
    if any(n == 0 or n % d for n, d in zip(shape[2:], divisor, strict=True)):
        raise ConfigError(f"{name} needs edges (z, y, x) divisible by {divisor}, got an input of {tuple(shape[2:])}")


def check_bottleneck(name: str, shape: Sequence[int], divisor: Triple) -> None:
    """Raise ConfigError if the map at the bottleneck would be one voxel, which has no statistics to normalise with."""
    if all(n == d for n, d in zip(shape[2:], divisor, strict=True)):
        raise ConfigError(
            f"an input of {tuple(shape[2:])} leaves {name} one voxel at the bottleneck, which cannot be normalised; "
            f"use at least {2 * max(divisor)} voxels along one axis"
        )


def _is_allowed(value: Any, allowed: Sequence[int]) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and (value in allowed if allowed else value >= 1)
