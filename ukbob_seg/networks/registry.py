"""Networks by name. One literal table; anything importable works by dotted path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from inspect import signature
from math import prod
from typing import Any

from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.diffusion import DiffusionNetwork, MedSegDiffV1, MedSegDiffV2, stage_divisor
from ukbob_seg.networks.swin_unetr import SwinUNETR
from ukbob_seg.networks.wrappers import CascadeNetwork, SliceNetwork, unwrapped


@dataclass(frozen=True)
class NetworkEntry:
    """How a named network is built.

    Attributes:
        build: called with (in_channels, out_channels, arguments).
        description: one line for help texts.
        divisor: called with the arguments; the patch (z, y, x) must be divisible by what it returns.
        requires: how to install what the network needs beyond this package; empty where nothing is.
    """

    build: Callable[[int, int, Mapping[str, Any]], nn.Module]
    description: str
    divisor: Callable[[Mapping[str, Any]], tuple[int, int, int]]
    requires: str = ""


def build_network(name: str, in_channels: int, out_channels: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network.

    Args:
        name: key of ``NETWORKS``, or ``package.module:ClassName`` of an ``nn.Module`` whose constructor takes
            ``in_channels``, ``out_channels`` and the arguments.
        in_channels: image channels.
        out_channels: outputs.
        arguments: from the plans. Two of them are not the network's own: ``slice_axis`` (it is a 2D network, fed with
            the slices across this axis) and ``previous_labels`` (it is the second stage of a cascade: its input has one
            more channel, a map of so many labels).

    Raises:
        ConfigError: unknown name, missing package, or arguments that the constructor does not take.
    """
    own = dict(arguments)
    slice_axis, previous_labels = own.pop("slice_axis", None), own.pop("previous_labels", 0)
    network = _build_plain(name, in_channels + previous_labels, out_channels, own)
    if slice_axis is not None:
        network = SliceNetwork(network, slice_axis)
    return CascadeNetwork(network, in_channels, previous_labels) if previous_labels else network


def _build_plain(name: str, in_channels: int, out_channels: int, arguments: Mapping[str, Any]) -> nn.Module:
    if ":" in name:
        found = _import_class(name)
        return _construct(found, name, {"in_channels": in_channels, "out_channels": out_channels, **arguments})
    if name not in NETWORKS:
        raise ConfigError(f"unknown network {name!r}; choose from {', '.join(NETWORKS)} or give package.module:Class")
    return NETWORKS[name].build(in_channels, out_channels, arguments)


def set_deep_supervision(network: nn.Module, enabled: bool) -> None:
    """Switch the extra coarse outputs of a network that has them; others are left as they are."""
    inner: Any = unwrapped(network)
    for part in (inner, getattr(inner, "decoder", inner)):  # Swin-UNETR has the switch itself, nnU-Net's in the decoder
        if isinstance(getattr(part, "deep_supervision", None), bool):
            part.deep_supervision = enabled


def _swin_unetr(in_channels: int, out_channels: int, arguments: Mapping[str, Any]) -> nn.Module:
    given = {"in_channels": in_channels, "out_channels": out_channels, **arguments}
    if "drop_path_rate" in given:  # what plans called it before 2026-11-25
        given["dropout_path_rate"] = given.pop("drop_path_rate")
    return _construct(SwinUNETR, "swin_unetr", given)


def check_patch(name: str, arguments: Mapping[str, Any], patch_size: Sequence[int]) -> None:
    """Refuse a patch that a named network cannot halve as often as it has to.

    Raises:
        ConfigError: says by what each axis must be divisible. Networks given by a dotted path are not checked.
    """
    entry = NETWORKS.get(name)
    if entry is None:
        return
    divisor = entry.divisor(arguments)
    if any(n % d for n, d in zip(patch_size, divisor, strict=True)):
        raise ConfigError(
            f"network {name!r} needs a patch (z, y, x) divisible by {tuple(divisor)}, the plans say {tuple(patch_size)}"
        )


def _swin_divisor(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    edge = 16 * int(arguments.get("patch_size", 2))
    return edge, edge, edge


def _conv_divisor(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Product of the strides along each axis (1 across slices); a stride may be one number for all axes."""
    strides = [(s, s, s) if isinstance(s, int) else list(s) for s in arguments["strides"]]
    if (across := arguments.get("slice_axis")) is not None:
        strides = [(*stride[:across], 1, *stride[across:2]) for stride in strides]
    z, y, x = (prod(stride[axis] for stride in strides) for axis in range(3))
    return z, y, x


def _dynamic(
    name: str, class_name: str, blocks: str = "n_conv_per_stage"
) -> Callable[[int, int, Mapping[str, Any]], nn.Module]:
    """Builder of nnU-Net's own networks, with the settings and the initial weights that nnU-Net gives them.

    ``blocks`` is what the class calls the convolutions (or residual blocks) per encoder stage.
    """

    def build(in_channels: int, out_channels: int, arguments: Mapping[str, Any]) -> nn.Module:
        try:
            module = import_module("dynamic_network_architectures.architectures.unet")
        except ImportError as error:
            raise ConfigError(f"network {name!r} needs a package that is not installed: {_DYNAMIC_PACKAGE}") from error
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
        network = _construct(kind, name, {**fixed, **given})
        network.apply(kind.initialize)  # the package leaves He initialisation to its caller, as nnU-Net does it
        return network

    return build


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


def _construct(factory: Callable[..., nn.Module], name: str, given: Mapping[str, Any]) -> nn.Module:
    """Call a constructor; only arguments that it does not take are the user's error, not a fault inside it."""
    try:
        signature(factory).bind(**given)
    except TypeError as error:
        raise ConfigError(f"network {name!r} cannot be built with {dict(given)}: {error}") from error
    return factory(**given)


def _diffusion(kind: type[DiffusionNetwork], name: str, description: str) -> NetworkEntry:
    def build(in_channels: int, out_channels: int, arguments: Mapping[str, Any]) -> nn.Module:
        return _construct(kind, name, {"in_channels": in_channels, "out_channels": out_channels, **arguments})

    return NetworkEntry(build, description, partial(stage_divisor, kind))


def _import_class(path: str) -> Callable[..., nn.Module]:
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"network {path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"network {path!r} is not a torch.nn.Module class")
    return found


_DYNAMIC_PACKAGE = "pip install --no-deps dynamic-network-architectures"
_NORMS = {"instance": (nn.InstanceNorm3d, nn.InstanceNorm2d), "batch": (nn.BatchNorm3d, nn.BatchNorm2d)}
_LAYERS: dict[str, type[nn.Module]] = {
    layer.__name__: layer
    for layer in (
        nn.LeakyReLU, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.PReLU, nn.Mish, nn.Dropout, nn.Dropout2d, nn.Dropout3d,
    )
}  # fmt: skip

NETWORKS: dict[str, NetworkEntry] = {
    "swin_unetr": NetworkEntry(_swin_unetr, "Swin-UNETR, the paper's network (Swin-BOB)", _swin_divisor),
    "plain_conv_unet": NetworkEntry(
        _dynamic("plain_conv_unet", "PlainConvUNet"), "nnU-Net's standard U-Net", _conv_divisor, _DYNAMIC_PACKAGE
    ),
    "residual_encoder_unet": NetworkEntry(
        _dynamic("residual_encoder_unet", "ResidualEncoderUNet", "n_blocks_per_stage"),
        "nnU-Net's residual-encoder U-Net",
        _conv_divisor,
        _DYNAMIC_PACKAGE,
    ),
    "medsegdiff_v1": _diffusion(MedSegDiffV1, "medsegdiff_v1", "MedSegDiff, which segments by denoising"),
    "medsegdiff_v2": _diffusion(
        MedSegDiffV2, "medsegdiff_v2", "MedSegDiff-V2, with a condition model and a transformer"
    ),
}
# The same network under the names of the sizes that --preset nnunet plans (nnU-Net's ResEnc presets).
NETWORKS |= {f"resenc_unet_{size}": NETWORKS["residual_encoder_unet"] for size in ("m", "l", "xl")}
