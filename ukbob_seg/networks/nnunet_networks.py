"""nnU-Net's own networks, of the package dynamic-network-architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from math import prod
from typing import Any

from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.construction import construct

PACKAGE = "pip install --no-deps dynamic-network-architectures"
_NORMS = {"instance": (nn.InstanceNorm3d, nn.InstanceNorm2d), "batch": (nn.BatchNorm3d, nn.BatchNorm2d)}
_LAYERS: dict[str, type[nn.Module]] = {
    layer.__name__: layer
    for layer in (
        nn.LeakyReLU, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.PReLU, nn.Mish, nn.Dropout, nn.Dropout2d, nn.Dropout3d,
    )
}  # fmt: skip


def nnunet_builder(
    name: str, class_name: str, blocks: str = "n_conv_per_stage"
) -> Callable[[int, int, Mapping[str, Any]], nn.Module]:
    """Builder of one of them, with the settings and the initial weights that nnU-Net gives it.

    Args:
        name: of the network, for messages.
        class_name: in the package.
        blocks: what the class calls the convolutions (or residual blocks) per encoder stage.
    """

    def build(in_channels: int, out_channels: int, arguments: Mapping[str, Any]) -> nn.Module:
        try:
            module = import_module("dynamic_network_architectures.architectures.unet")
        except ImportError as error:
            raise ConfigError(f"network {name!r} needs a package that is not installed: {PACKAGE}") from error
        given = dict(arguments)
        if "n_conv_per_stage" in given and blocks not in given:
            given[blocks] = given.pop("n_conv_per_stage")
        _check_stages(name, given, blocks)
        norm = given.pop("norm", "instance")
        if norm not in _NORMS:
            raise ConfigError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
        flat = any(not isinstance(kernel, int) and len(kernel) == 2 for kernel in given["kernel_sizes"])
        fixed = {
            "input_channels": in_channels,
            "num_classes": out_channels,
            "n_stages": len(given["features_per_stage"]),
            "conv_op": nn.Conv2d if flat else nn.Conv3d,
            "conv_bias": True,
            "norm_op": _NORMS[norm][flat],
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": nn.LeakyReLU,
            "nonlin_kwargs": {"inplace": True},
        }
        kind = getattr(module, class_name)
        for part in ("nonlin", "dropout_op"):  # by name, as JSON has no classes
            if isinstance(given.get(part), str):
                if given[part] not in _LAYERS:
                    raise ConfigError(f"{part} must be one of {', '.join(_LAYERS)}, got {given[part]!r}")
                given[part] = _LAYERS[given[part]]
        network = construct(kind, name, {**fixed, **given})
        network.apply(kind.initialize)  # the package leaves He initialisation to its caller, as nnU-Net does it
        return network

    return build


def strides_divisor(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Product of the strides along each axis (1 across slices); a stride may be one number for all axes."""
    strides = [(s, s, s) if isinstance(s, int) else list(s) for s in arguments["strides"]]
    if (across := arguments.get("slice_axis")) is not None:
        strides = [(*stride[:across], 1, *stride[across:2]) for stride in strides]
    z, y, x = (prod(stride[axis] for stride in strides) for axis in range(3))
    return z, y, x


def _check_stages(name: str, given: Mapping[str, Any], blocks: str) -> None:
    """The package asserts or fails deep inside on lists of different lengths."""
    needed = ("features_per_stage", "strides", "kernel_sizes", blocks, "n_conv_per_stage_decoder")
    absent = [key for key in needed if key not in given]
    if absent:
        raise ConfigError(f"network {name!r} needs the arguments {', '.join(absent)}")
    stages = len(given["features_per_stage"])
    for key in needed[1:]:
        expected = stages - (key == "n_conv_per_stage_decoder")
        if not isinstance(given[key], int) and len(given[key]) != expected:
            raise ConfigError(f"network {name!r}: {key} must have {expected} entries, got {len(given[key])}")
