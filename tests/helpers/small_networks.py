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
    "resunet_pp": ({"widths": [8, 8, 16, 16, 24], "rates": [1, 2]}, (16, 32, 32)),
    "transunet": (
        {"features_per_stage": [8, 16, 24], "strides": [1, 2, 2], "kernel_sizes": [3, 3, 3], "n_conv_per_stage": 1,
         "n_conv_per_stage_decoder": 1, "vit_layers": 1, "vit_dim": 24, "vit_heads": 2, "vit_hidden_dim": 48,
         "vit_dropout": 0.0, "patch_size": [32, 48, 32]},
        (32, 48, 32),
    ),
    "transbts": (
        {"base_channels": 8, "embedding_dim": 32, "heads": 2, "layers": 1, "hidden_dim": 64, "dropout": 0.0,
         "attention_dropout": 0.0, "input_dropout": 0.0, "patch_size": [32, 48, 32]},
        (32, 48, 32),
    ),
    "nnformer": (
        {"embedding_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4], "drop_path_rate": 0.0},
        (32, 64, 64),
    ),
    "medformer": (
        {"base_channels": 8, "channels": [16, 16, 24, 24, 24, 16, 16, 8], "conv_blocks": [1, 1, 0, 0, 0, 1, 1, 1],
         "attention_blocks": [0, 1, 1, 1, 1, 1, 0, 0], "heads": [1, 2, 2, 2, 2, 2, 1, 1], "map_size": [2, 2, 2],
         "expansion": 2, "fusion_dim": 24, "fusion_heads": 2, "fusion_layers": 1},
        (32, 48, 32),
    ),
    "ux_net": (
        {"feature_sizes": [8, 16, 24, 32], "hidden_size": 48, "depths": [1, 1, 1, 1], "kernel_size": 5},
        (32, 48, 32),
    ),
    "medsegdiff_v1": (
        {"features_per_stage": [8, 16, 16], "blocks_per_stage": 1, "image_size": [16, 32, 32], "steps": 20,
         "sampling_steps": 2},
        (16, 32, 32),
    ),
    "medsegdiff_v2": (
        {"features_per_stage": [8, 16, 16], "blocks_per_stage": 1, "steps": 20, "sampling_steps": 2},
        (16, 32, 32),
    ),
    "swin_unetr_v2": ({"feature_size": 12}, (32, 64, 32)),
}  # fmt: skip


def small_plan(name: str, batch: int = 1) -> dict[str, Any]:
    """An entry of ``networks`` in plans.json."""
    arguments, patch = SMALL[name]
    return {"patch_size": list(patch), "batch_size": batch, "arguments": arguments, "estimated_memory_gb": 0.1}


def present() -> list[str]:
    """Names of the registry; one without a small form is an error, so that none is forgotten."""
    assert set(NETWORKS) <= set(SMALL), sorted(set(NETWORKS) - set(SMALL))
    return list(NETWORKS)
