"""Calling constructors of networks so that a user's mistake is one sentence and a fault inside keeps its traceback."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

from torch import nn

from ukbob_seg.errors import ConfigError


def construct(factory: Callable[..., nn.Module], name: str, given: dict[str, Any]) -> nn.Module:
    """Call a constructor; only arguments that it does not take are the user's error, not a fault inside it.

    Args:
        factory: class or function.
        name: of the network, for the message.
        given: keyword arguments.

    Raises:
        ConfigError: arguments that it does not take, or that are missing.
    """
    try:
        signature(factory).bind(**given)
    except TypeError as error:
        raise ConfigError(f"network {name!r} cannot be built with {given}: {error}") from error
    return factory(**given)


def import_class(path: str) -> Callable[..., nn.Module]:
    """The class of ``package.module:ClassName``.

    Raises:
        ConfigError: it cannot be imported, or is no network.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"network {path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"network {path!r} is not a torch.nn.Module class")
    return found
