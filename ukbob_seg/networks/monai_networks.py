"""Baselines that MONAI implements, each with the configuration of its publication unless the plans say otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.construction import construct
from ukbob_seg.networks.nnunet_networks import strides_divisor

EXTRA = "pip install 'ukbob_seg[baselines]'"
MODULE = "monai.networks.nets"
VNET_FEATURES = 16  # of the first stage, which repeats the input so often that it has as many channels


@dataclass(frozen=True)
class MonaiNetwork:
    """How arguments of the plans become those of MONAI's class.

    Attributes:
        class_name: in ``monai.networks.nets``.
        defaults: every argument that plans may give, as published.
        own: called with the arguments; keyword arguments of the class, without the channels.
    """

    class_name: str
    defaults: Mapping[str, Any]
    own: Callable[[dict[str, Any]], dict[str, Any]] = dict


def _norm(given: dict[str, Any]) -> dict[str, Any]:
    """By name; instance normalisation with parameters, so that there is something to adapt at test time."""
    kinds = {"batch": "batch", "instance": ("instance", {"affine": True})}
    if given["norm"] not in kinds:
        raise ConfigError(f"norm must be one of {', '.join(kinds)}, got {given['norm']!r}")
    return {**given, "norm": kinds[given["norm"]]}


def _vnet(given: dict[str, Any]) -> dict[str, Any]:
    rate = given["dropout"]
    return {"dropout_prob_down": rate, "dropout_prob_up": (rate, rate)}


def _unetr(given: dict[str, Any]) -> dict[str, Any]:
    own = dict(given)
    size = own.pop("patch_size")
    if size is None:
        raise ConfigError("network 'unetr' needs the argument patch_size, which is that of its plan (z, y, x)")
    return {**own, "img_size": list(size)}


MONAI_NETWORKS: dict[str, MonaiNetwork] = {
    # Çiçek et al., MICCAI 2016, in MONAI's form with residual units (Kerfoot et al., STACOM 2018) and the sizes of its
    # tutorials.
    "unet": MonaiNetwork(
        "UNet",
        {"channels": [16, 32, 64, 128, 256], "strides": [2, 2, 2, 2], "num_res_units": 2, "norm": "batch",
         "dropout": 0.0},
        _norm,
    ),
    # Milletari et al., 3DV 2016; that has no dropout, MONAI's class has 0.5 unless told otherwise.
    "vnet": MonaiNetwork("VNet", {"dropout": 0.0}, _vnet),
    # Myronenko, BrainLes 2018: 32 filters, dropout of 0.2 after the first convolution; without its autoencoder branch.
    "segresnet": MonaiNetwork(
        "SegResNet",
        {"init_filters": 32, "blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1], "dropout_prob": 0.2},
    ),
    # Oktay et al., MIDL 2018; widths of the authors' repository (feature_scale 4).
    "attention_unet": MonaiNetwork(
        "AttentionUnet", {"channels": [16, 32, 64, 128, 256], "strides": [2, 2, 2, 2], "dropout": 0.0}
    ),
    # Hatamizadeh et al., WACV 2022: ViT-B/16.
    "unetr": MonaiNetwork(
        "UNETR",
        {"patch_size": None, "feature_size": 16, "hidden_size": 768, "mlp_dim": 3072, "num_heads": 12,
         "dropout_rate": 0.0},
        _unetr,
    ),
    # He et al., MICCAI 2023.
    "swin_unetr_v2": MonaiNetwork(
        "SwinUNETR",
        {"feature_size": 48, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24], "window_size": 7,
         "dropout_path_rate": 0.0, "use_checkpoint": False},
        lambda given: {**given, "use_v2": True},
    ),
}  # fmt: skip


def monai_call(name: str, in_channels: int, out_channels: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``{"class": dotted path, "arguments": {...}}``, plain values that build the network with MONAI alone.

    Args:
        name: key of ``MONAI_NETWORKS``.
        in_channels: input channels.
        out_channels: outputs, which are logits.
        arguments: those of the plans that are the network's own.

    Raises:
        ConfigError: arguments or channels that the network does not take.
    """
    entry = MONAI_NETWORKS[name]
    if unknown := sorted(set(arguments) - set(entry.defaults)):
        raise ConfigError(
            f"network {name!r} takes no argument {', '.join(unknown)}; it takes {', '.join(entry.defaults)}"
        )
    if name == "vnet" and (in_channels > VNET_FEATURES or VNET_FEATURES % in_channels):
        raise ConfigError(
            f"network 'vnet' takes 1, 2, 4, 8 or 16 input channels, since its first stage repeats them to "
            f"{VNET_FEATURES}, but the data have {in_channels}; choose another network"
        )
    given = {**entry.defaults, **arguments}
    if name == "segresnet" and len(given["blocks_up"]) != len(given["blocks_down"]) - 1:
        raise ConfigError(
            f"network 'segresnet' needs one entry less in blocks_up than in blocks_down, got {given['blocks_up']} and "
            f"{given['blocks_down']}"
        )
    own = entry.own(given)
    fixed = {"spatial_dims": 3, "in_channels": in_channels, "out_channels": out_channels}
    return {"class": f"{MODULE}.{entry.class_name}", "arguments": {**fixed, **own}}


def monai_builder(name: str) -> Callable[[int, int, Mapping[str, Any]], nn.Module]:
    """Builder of one of ``MONAI_NETWORKS``."""

    def build(in_channels: int, out_channels: int, arguments: Mapping[str, Any]) -> nn.Module:
        call = monai_call(name, in_channels, out_channels, arguments)
        try:
            import_module("einops")  # which MONAI asks for only where it is used
            kind = getattr(import_module(MODULE), MONAI_NETWORKS[name].class_name)
        except ImportError as error:
            raise ConfigError(f"network {name!r} needs packages that are not installed: {EXTRA}") from error
        network = construct(kind, name, call["arguments"])
        if name == "vnet":  # MONAI's class lets two of its dropouts not be chosen
            for module in network.modules():
                if isinstance(module, nn.Dropout3d):
                    module.p = float(arguments.get("dropout", 0.0))
        return network

    return build


def halvings_divisor(name: str) -> Callable[[Mapping[str, Any]], tuple[int, int, int]]:
    """What the patch must be divisible by, where ``strides`` (or stages) say how often the network halves it."""

    def divisor(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
        given = {**MONAI_NETWORKS[name].defaults, **arguments}
        if "strides" in given:
            return strides_divisor(given)
        edge = 2 ** (len(given["blocks_down"]) - 1)
        return edge, edge, edge

    return divisor
