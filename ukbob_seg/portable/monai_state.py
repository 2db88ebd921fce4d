"""Networks for MONAI: a state dict that loads strictly, and what its class has to be built with."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.monai_networks import MONAI_NETWORKS, monai_call
from ukbob_seg.networks.swin_unetr import SwinUNETR
from ukbob_seg.networks.wrappers import CascadeNetwork, SliceNetwork, unwrapped
from ukbob_seg.training.checkpoint import ModelDescription

CLASS = "monai.networks.nets.SwinUNETR"
SAME = ("feature_size", "depths", "num_heads", "window_size", "patch_size", "mlp_ratio", "qkv_bias",
        "dropout_path_rate", "use_checkpoint")  # fmt: skip
OUR_NAMES = {"drop_path_rate": "dropout_path_rate"}  # of arguments in earlier plans
EXTRA = "coarse_outs."  # layers of deep supervision, which prediction does not use
LARGEST_DIFFERENCE = 1e-3  # of outputs, relative to the largest: beyond rounding


def monai_network(description: ModelDescription, network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict for MONAI's class, and that class with its arguments.

    Args:
        description: of the network.
        network: with its weights. In a cascade the network inside, which takes the first stage's labels one-hot behind
            the image channels.

    Returns:
        weights by MONAI's names, and ``{"class": ..., "arguments": {...}}``.

    Raises:
        ConfigError: MONAI has no such network, or none that computes the same.
    """
    inner = unwrapped(network)
    if description.network.startswith("monai."):  # any of its classes by dotted path: names and arguments are its own
        arguments = {"in_channels": _channels(description), "out_channels": _outputs(description)}
        own = {k: v for k, v in description.arguments.items() if k not in ("slice_axis", "previous_labels")}
        named = {"class": description.network.replace(":", "."), "arguments": {**arguments, **own}}
        return dict(inner.state_dict()), named
    if description.network in MONAI_NETWORKS:
        own = {k: v for k, v in description.arguments.items() if k not in ("slice_axis", "previous_labels")}
        call = monai_call(description.network, _channels(description), _outputs(description), own)
        return dict(inner.state_dict()), call
    if not isinstance(inner, SwinUNETR):
        raise ConfigError(
            f"--monai: {description.network} is no network of MONAI (swin_unetr, {', '.join(MONAI_NETWORKS)} are, and "
            "what was trained as --network monai.MODULE:CLASS); leave --monai out"
        )
    given = {OUR_NAMES.get(name, name): value for name, value in description.arguments.items()}
    if given.get("patch_merging", "distinct") != "distinct":
        raise ConfigError(
            f"--monai: this network merges patches as MONAI did before its fix #8285 (patch_merging "
            f"{given['patch_merging']!r}); its weights would load into today's class and compute something else. Leave "
            "--monai out"
        )
    built: dict[str, Any] = {
        "in_channels": _channels(description),
        "out_channels": _outputs(description),
        **{name: given[name] for name in SAME if name in given},
        "norm_name": ["instance", {"affine": bool(given.get("norm_affine", True))}],
        "spatial_dims": 3,
    }
    # Defaults are ours where the plans say nothing, and MONAI's differ in one.
    built.setdefault("feature_size", 48)
    weights = {name: value for name, value in inner.state_dict().items() if not name.startswith(EXTRA)}
    return weights, {"class": CLASS, "arguments": built}


def build_monai(named: dict[str, Any]) -> nn.Module:
    """MONAI's network, in evaluation mode.

    Raises:
        ConfigError: MONAI is not installed.
    """
    module, _, name = named["class"].rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except ImportError as error:
        raise ConfigError(f"{named['class']} needs MONAI: pip install monai einops ({error})") from error
    network: nn.Module = kind(**named["arguments"])
    return network.eval()


def compare_with_monai(
    network: nn.Module, weights: dict[str, Tensor], named: dict[str, Any], image: Tensor
) -> dict[str, float] | None:
    """Largest difference of outputs, after strict loading; None where MONAI is not installed.

    Args:
        network: ours, in evaluation mode.
        weights: see ``monai_network``.
        named: see ``monai_network``.
        image: (1, C, z, y, x), a window as our network sees it.

    Raises:
        ConfigError: they are not the same network.
    """
    try:
        other = build_monai(named)
    except ConfigError:
        return None
    try:
        other.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ConfigError(f"--monai: {named['class']} does not take these weights ({error}); leave it out") from error
    with torch.no_grad():
        image = window_inside(network, image)
        expected, found = unwrapped(network)(image), other(image)
    difference = float((expected - found).abs().max())
    largest = float(expected.abs().max())
    if not difference <= LARGEST_DIFFERENCE * largest:
        raise ConfigError(
            f"--monai: {named['class']} gives other outputs (difference {difference:.1e} of at most {largest:.1e}); "
            "leave --monai out"
        )
    return {"max_abs_difference": difference, "max_abs_output": largest}


def window_inside(network: nn.Module, image: Tensor) -> Tensor:
    """What the network inside all wrappers sees of a window: labels of a first stage one-hot, of slices the first."""
    while isinstance(network, (SliceNetwork, CascadeNetwork)):
        if isinstance(network, CascadeNetwork):
            labels = torch.eq(image[:, network.channels :], network.indices)  # type: ignore[arg-type]
            image = torch.cat([image[:, : network.channels], labels.to(image.dtype)], dim=1)
        else:
            image = image.movedim(network.axis + 2, 1).flatten(0, 1)[:1]
        network = network.network
    return image


def _channels(description: ModelDescription) -> int:
    return len(description.spec().channel_names) + int(description.arguments.get("previous_labels", 0))


def _outputs(description: ModelDescription) -> int:
    return description.spec().labels.num_outputs
