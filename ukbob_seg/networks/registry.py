"""Networks by name. One literal table; anything importable works by dotted path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.construction import construct, import_class
from ukbob_seg.networks.diffusion import DiffusionNetwork, MedSegDiffV1, MedSegDiffV2, stage_divisor
from ukbob_seg.networks.monai_networks import EXTRA, halvings_divisor, monai_builder
from ukbob_seg.networks.nnunet_networks import PACKAGE, nnunet_builder, strides_divisor
from ukbob_seg.networks.swin_unetr import SwinUNETR
from ukbob_seg.networks.wrappers import CascadeNetwork, SliceNetwork, unwrapped

Builder = Callable[[int, int, Mapping[str, Any]], nn.Module]
Divisor = Callable[[Mapping[str, Any]], tuple[int, int, int]]


@dataclass(frozen=True)
class NetworkEntry:
    """How a named network is built.

    Attributes:
        build: called with (in_channels, out_channels, arguments).
        description: one line for help texts.
        divisor: called with the arguments; the patch (z, y, x) must be divisible by what it returns.
        requires: how to install what the network needs beyond this package; empty where nothing is.
        patch_argument: argument that must be the patch (z, y, x) of the plan, since the network has weights for every
            place in it; empty where it takes patches of any size.
    """

    build: Builder
    description: str
    divisor: Divisor
    requires: str = ""
    patch_argument: str = ""


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
        found = import_class(name)
        return construct(found, name, {"in_channels": in_channels, "out_channels": out_channels, **arguments})
    if name not in NETWORKS:
        raise ConfigError(f"unknown network {name!r}; choose from {', '.join(NETWORKS)} or give package.module:Class")
    with _explained(name, arguments):
        return NETWORKS[name].build(in_channels, out_channels, arguments)


@contextmanager
def _explained(name: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """What a constructor of our own or of a library says of arguments that somebody edited, in one sentence."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AssertionError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ConfigError(
            f"network {name!r} cannot be built with the arguments {dict(arguments)}: {said.splitlines()[0]}; correct "
            "them in plans.json"
        ) from error


def set_deep_supervision(network: nn.Module, enabled: bool) -> None:
    """Switch the extra coarse outputs of a network that has them; others are left as they are."""
    inner: Any = unwrapped(network)
    for part in (inner, getattr(inner, "decoder", inner)):  # Swin-UNETR has the switch itself, nnU-Net's in the decoder
        if isinstance(getattr(part, "deep_supervision", None), bool):
            part.deep_supervision = enabled


def check_patch(name: str, arguments: Mapping[str, Any], patch_size: Sequence[int]) -> None:
    """Refuse a patch that a named network cannot halve as often as it has to, or was not built for.

    Raises:
        ConfigError: says by what each axis must be divisible. Networks given by a dotted path are not checked.
    """
    entry = NETWORKS.get(name)
    if entry is None:
        return
    with _explained(name, arguments):
        divisor = entry.divisor(arguments)
    if any(n % d for n, d in zip(patch_size, divisor, strict=True)):
        raise ConfigError(
            f"network {name!r} needs a patch (z, y, x) divisible by {tuple(divisor)}, the plans say {tuple(patch_size)}"
        )
    built_for = arguments.get(entry.patch_argument, patch_size) if entry.patch_argument else patch_size
    if list(built_for) != list(patch_size):
        raise ConfigError(
            f"network {name!r} is built for one patch: its argument {entry.patch_argument} is {list(built_for)}, the "
            f"patch_size of the plans {list(patch_size)}; make them equal"
        )


def _swin_unetr(in_channels: int, out_channels: int, arguments: Mapping[str, Any]) -> nn.Module:
    given = {"in_channels": in_channels, "out_channels": out_channels, **arguments}
    if "drop_path_rate" in given:  # what plans called it before 2026-11-25
        given["dropout_path_rate"] = given.pop("drop_path_rate")
    return construct(SwinUNETR, "swin_unetr", given)


def _swin_divisor(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    edge = 16 * int(arguments.get("patch_size", 2))
    return edge, edge, edge


def _cube(edge: int) -> Divisor:
    return lambda arguments: (edge, edge, edge)


def _own(path: str, description: str, patch_argument: str = "", requires: str = "") -> NetworkEntry:
    """A class of this package by ``module:Class``, imported when it is first built.

    Its constructor takes (in_channels, out_channels) and JSON values; ``divisor(arguments)`` stands beside it.
    """
    module, _, name = f"ukbob_seg.networks.{path}".partition(":")

    def build(in_channels: int, out_channels: int, arguments: Mapping[str, Any]) -> nn.Module:
        given = {"in_channels": in_channels, "out_channels": out_channels, **arguments}
        return construct(import_class(f"{module}:{name}"), path, given)

    def divisor(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
        z, y, x = import_module(module).divisor(arguments)
        return z, y, x

    return NetworkEntry(build, description, divisor, requires, patch_argument)


def _monai(name: str, description: str, divisor: Divisor | None = None, patch_argument: str = "") -> NetworkEntry:
    return NetworkEntry(monai_builder(name), description, divisor or halvings_divisor(name), EXTRA, patch_argument)


def _diffusion(kind: type[DiffusionNetwork], name: str, description: str, patch_argument: str = "") -> NetworkEntry:
    def build(in_channels: int, out_channels: int, arguments: Mapping[str, Any]) -> nn.Module:
        return construct(kind, name, {"in_channels": in_channels, "out_channels": out_channels, **arguments})

    return NetworkEntry(build, description, partial(stage_divisor, kind), patch_argument=patch_argument)


NETWORKS: dict[str, NetworkEntry] = {
    "swin_unetr": NetworkEntry(_swin_unetr, "Swin-UNETR, the paper's network (Swin-BOB)", _swin_divisor),
    "plain_conv_unet": NetworkEntry(
        nnunet_builder("plain_conv_unet", "PlainConvUNet"), "nnU-Net's standard U-Net", strides_divisor, PACKAGE
    ),
    "residual_encoder_unet": NetworkEntry(
        nnunet_builder("residual_encoder_unet", "ResidualEncoderUNet", "n_blocks_per_stage"),
        "nnU-Net's residual-encoder U-Net",
        strides_divisor,
        PACKAGE,
    ),
    "unet": _monai("unet", "3D U-Net (Çiçek et al. 2016), MONAI's with residual units"),
    "vnet": _monai("vnet", "V-Net (Milletari et al. 2016), MONAI's", _cube(16)),
    "segresnet": _monai("segresnet", "SegResNet (Myronenko 2018), MONAI's"),
    "attention_unet": _monai("attention_unet", "Attention U-Net (Oktay et al. 2018), MONAI's"),
    "resunet_pp": _own("baselines.resunet_pp:ResUNetPlusPlus", "ResUNet++ (Jha et al. 2019), in 3D"),
    "unetr": _monai("unetr", "UNETR (Hatamizadeh et al. 2022), MONAI's", _cube(16), "patch_size"),
    "transunet": _own("baselines.transunet:TransUNet", "3D TransUNet (Chen et al. 2023)", "patch_size"),
    "transbts": _own("baselines.transbts:TransBTS", "TransBTS (Wang et al. 2021)", "patch_size"),
    "nnformer": _own("baselines.nnformer:NNFormer", "nnFormer (Zhou et al. 2023)"),
    "medformer": _own("baselines.medformer:MedFormer", "MedFormer (Gao et al. 2022)"),
    "ux_net": _own("baselines.ux_net:UXNet", "3D UX-Net (Lee et al. 2023)"),
    "swin_unetr_v2": _monai("swin_unetr_v2", "Swin-UNETR-V2 (He et al. 2023), MONAI's", _cube(32)),
    "medsegdiff_v1": _diffusion(MedSegDiffV1, "medsegdiff_v1", "MedSegDiff (Wu et al. 2023): denoising", "image_size"),
    "medsegdiff_v2": _diffusion(MedSegDiffV2, "medsegdiff_v2", "MedSegDiff-V2 (Wu et al. 2024): with a transformer"),
}
# The same network under the names of the sizes that --preset nnunet plans (nnU-Net's ResEnc presets).
NETWORKS |= {f"resenc_unet_{size}": NETWORKS["residual_encoder_unet"] for size in ("m", "l", "xl")}
