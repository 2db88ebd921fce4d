"""Networks by name. One literal table; anything importable works by dotted path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.swin_unetr import SwinUNETR


@dataclass(frozen=True)
class NetworkEntry:
    """How a named network is built.

    Attributes:
        build: called with (in_channels, out_channels, arguments).
        description: one line for help texts.
    """

    build: Callable[[int, int, Mapping[str, Any]], nn.Module]
    description: str


def build_network(name: str, in_channels: int, out_channels: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network.

    Args:
        name: key of ``NETWORKS``, or ``package.module:ClassName`` of an ``nn.Module`` whose constructor takes
            ``in_channels``, ``out_channels`` and the arguments.
        in_channels: image channels.
        out_channels: outputs.
        arguments: from the plans.

    Raises:
        ConfigError: unknown name, missing package, or arguments that the constructor does not take.
    """
    try:
        if ":" in name:
            return _import_class(name)(in_channels=in_channels, out_channels=out_channels, **arguments)
        if name not in NETWORKS:
            raise ConfigError(
                f"unknown network {name!r}; choose from {', '.join(NETWORKS)} or give package.module:Class"
            )
        return NETWORKS[name].build(in_channels, out_channels, arguments)
    except TypeError as error:
        raise ConfigError(f"network {name!r} cannot be built with {dict(arguments)}: {error}") from error


def set_deep_supervision(network: nn.Module, enabled: bool) -> None:
    """Switch the extra coarse outputs of a network that has them; others are left as they are."""
    decoder = getattr(network, "decoder", None)
    if decoder is not None and hasattr(decoder, "deep_supervision"):
        decoder.deep_supervision = enabled


def _swin_unetr(in_channels: int, out_channels: int, arguments: Mapping[str, Any]) -> nn.Module:
    return SwinUNETR(in_channels, out_channels, **arguments)


def _dynamic(class_name: str) -> Callable[[int, int, Mapping[str, Any]], nn.Module]:
    """Builder of nnU-Net's own networks, with the settings that nnU-Net gives them."""

    def build(in_channels: int, out_channels: int, arguments: Mapping[str, Any]) -> nn.Module:
        try:
            module = import_module("dynamic_network_architectures.architectures.unet")
        except ImportError as error:
            raise ConfigError(
                "nnU-Net's networks need a package that is not installed: "
                "pip install --no-deps dynamic-network-architectures"
            ) from error
        given = dict(arguments)
        norm = given.pop("norm", "instance")
        if norm not in _NORMS:
            raise ConfigError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
        return getattr(module, class_name)(
            input_channels=in_channels,
            num_classes=out_channels,
            n_stages=len(given["features_per_stage"]),
            conv_op=nn.Conv3d,
            conv_bias=True,
            norm_op=_NORMS[norm],
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            **given,
        )

    return build


def _import_class(path: str) -> Callable[..., nn.Module]:
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"network {path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"network {path!r} is not a torch.nn.Module class")
    return found


_NORMS = {"instance": nn.InstanceNorm3d, "batch": nn.BatchNorm3d}

NETWORKS: dict[str, NetworkEntry] = {
    "swin_unetr": NetworkEntry(_swin_unetr, "Swin-UNETR, the paper's network (Swin-BOB)"),
    "plain_conv_unet": NetworkEntry(_dynamic("PlainConvUNet"), "nnU-Net's standard U-Net"),
    "residual_encoder_unet": NetworkEntry(_dynamic("ResidualEncoderUNet"), "nnU-Net's residual-encoder U-Net"),
}
