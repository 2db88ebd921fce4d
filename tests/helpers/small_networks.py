"""Every network of the registry at a size that trains in seconds: arguments and the patch (z, y, x) that fits them."""

from __future__ import annotations

from typing import Any

from ukbob_seg.networks.registry import NETWORKS

UNET = {
    "features_per_stage": [8, 16, 24], "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "kernel_sizes": [[3, 3, 3]] * 3,
    "n_conv_per_stage": [1, 1, 1], "n_conv_per_stage_decoder": [1, 1], "deep_supervision": True, "norm": "instance",
}  # fmt: skip
SMALL: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "swin_unetr": ({"feature_size": 12}, (32, 64, 32)),
    "plain_conv_unet": (UNET, (32, 32, 32)),
    "residual_encoder_unet": (UNET, (32, 32, 32)),
    "resenc_unet_m": (UNET, (32, 32, 32)),
    "resenc_unet_l": (UNET, (32, 32, 32)),
    "resenc_unet_xl": (UNET, (32, 32, 32)),
    "unet": ({"channels": [8, 16, 32], "strides": [2, 2], "num_res_units": 2}, (32, 32, 32)),
    "vnet": ({}, (16, 32, 16)),
    "segresnet": (
        {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1], "dropout_prob": 0.0},
        (16, 32, 32),
    ),
    "attention_unet": ({"channels": [8, 16, 24], "strides": [2, 2]}, (32, 32, 32)),
    "unetr": (
        {"patch_size": [32, 48, 32], "feature_size": 8, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4},
        (32, 48, 32),
    ),
    "swin_unetr_v2": ({"feature_size": 12}, (32, 64, 32)),
}


def small_plan(name: str, batch: int = 1) -> dict[str, Any]:
    """An entry of ``networks`` in plans.json."""
    arguments, patch = SMALL[name]
    return {"patch_size": list(patch), "batch_size": batch, "arguments": arguments, "estimated_memory_gb": 0.1}


def present() -> list[str]:
    """Names of the registry; one without a small form is an error, so that none is forgotten."""
    assert set(NETWORKS) <= set(SMALL), sorted(set(NETWORKS) - set(SMALL))
    return list(NETWORKS)
