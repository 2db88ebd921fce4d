"""Swin-UNETR in 3D, the network of Swin-BOB (Hatamizadeh et al., 2022; Tang et al., CVPR 2022).

State-dict names and shapes are MONAI's. With ``norm_affine`` the residual blocks' InstanceNorms also have weights and
biases, which ETTA adapts; checkpoints without them load as weight 1 and bias 0.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.residual_blocks import Projection, SkipBlock, UpBlock, named
from ukbob_seg.networks.window_attention import MERGING_ORDERS, PatchMerging, SwinBlock, SwinStage

STAGES = 4
MOST_OUTPUTS = 65_535  # label maps are of two bytes at most


class SwinUNETR(nn.Module):
    """Swin Transformer encoder, convolutional decoder with residual skip blocks.

    Args:
        in_channels: image channels.
        out_channels: network outputs.
        feature_size: channels of the first stage, a multiple of 12.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: attention window edge, voxels of the stage.
        patch_size: edge of a token; the input must be divisible by 16 times it.
        mlp_ratio: hidden width of the MLPs.
        qkv_bias: learn a bias of query, key and value.
        dropout_path_rate: stochastic depth of the last block; earlier ones less.
        use_checkpoint: recompute the transformer blocks in the backward pass to save memory.
        norm_affine: learn weight and bias of the InstanceNorms.
        patch_merging: ``distinct`` (MONAI after #8285), or ``legacy`` for checkpoints trained before.
        deep_supervision: while training, also return logits of the next three decoder maps; the attribute of this name
            switches that off and on again, for networks built with it.

    Raises:
        ConfigError: feature_size is no multiple of 12, depths or heads do not fit, or patch_merging is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        feature_size: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        dropout_path_rate: float = 0.0,
        use_checkpoint: bool = False,
        norm_affine: bool = True,
        patch_merging: str = "distinct",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if feature_size % 12 or feature_size < 12:
            raise ConfigError(f"feature_size must be a multiple of 12, got {feature_size}")
        if not 1 <= out_channels <= MOST_OUTPUTS:
            raise ConfigError(f"Swin-UNETR has 1 to {MOST_OUTPUTS} outputs, got {out_channels}")
        if patch_merging not in MERGING_ORDERS:
            raise ConfigError(f"patch_merging must be one of {', '.join(MERGING_ORDERS)}, got {patch_merging!r}")
        if len(depths) != STAGES or len(num_heads) != STAGES:
            raise ConfigError(f"depths and num_heads need {STAGES} entries, got {tuple(depths)} and {tuple(num_heads)}")
        if any(feature_size * 2**i % heads for i, heads in enumerate(num_heads)):
            raise ConfigError(f"num_heads {tuple(num_heads)} must divide feature_size {feature_size} x (1, 2, 4, 8)")
        f, affine = feature_size, norm_affine
        self.in_channels = in_channels
        self.divisor = patch_size * 2**STAGES
        self.swinViT = SwinEncoder(
            in_channels, f, depths, num_heads, window_size, patch_size, mlp_ratio, qkv_bias, dropout_path_rate,
            use_checkpoint, patch_merging,
        )  # fmt: skip
        self.encoder1 = SkipBlock(in_channels, f, affine)
        self.encoder2 = SkipBlock(f, f, affine)
        self.encoder3 = SkipBlock(2 * f, 2 * f, affine)
        self.encoder4 = SkipBlock(4 * f, 4 * f, affine)
        self.encoder10 = SkipBlock(16 * f, 16 * f, affine)
        self.decoder5 = UpBlock(16 * f, 8 * f, 2, affine)
        self.decoder4 = UpBlock(8 * f, 4 * f, 2, affine)
        self.decoder3 = UpBlock(4 * f, 2 * f, 2, affine)
        self.decoder2 = UpBlock(2 * f, f, 2, affine)
        self.decoder1 = UpBlock(f, f, patch_size, affine)
        self.out = nn.Sequential(OrderedDict(conv=named(Projection(f, out_channels))))
        self.deep_supervision = deep_supervision
        # Last, so that the other weights are drawn as without; when off it is empty, and the names are MONAI's.
        widths = (f, 2 * f, 4 * f) if deep_supervision else ()
        self.coarse_outs = nn.ModuleList([Projection(width, out_channels) for width in widths])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(B, in_channels, D, H, W) -> (B, out_channels, D, H, W) logits.

        In training mode with deep supervision a list of four, finest first: also at 1/patch, 1/(2 patch), 1/(4 patch).

        Raises:
            ConfigError: an edge is not divisible, or the bottleneck would be a single voxel, which has no statistics.
        """
        self._check(tuple(x.shape))
        if not x.is_cuda:  # oneDNN's convolutions take half the time when the channels of a voxel lie together
            x = x.contiguous(memory_format=torch.channels_last_3d)
        tokens, stage1, stage2, stage3, stage4 = self.swinViT(x)
        x4 = self.decoder5(self.encoder10(stage4), stage3)
        x3 = self.decoder4(x4, self.encoder4(stage2))
        x2 = self.decoder3(x3, self.encoder3(stage1))
        x1 = self.decoder2(x2, self.encoder2(tokens))
        logits = self.out(self.decoder1(x1, self.encoder1(x)))
        if not (self.deep_supervision and self.training and self.coarse_outs):
            return logits
        coarse: Any = self.coarse_outs
        return [logits, *(head(x) for x, head in zip((x1, x2, x3), coarse, strict=True))]

    def _check(self, whole: tuple[int, ...]) -> None:
        if len(whole) != 5 or whole[1] != self.in_channels:
            raise ConfigError(f"Swin-UNETR takes (batch, {self.in_channels}, z, y, x), got an input of {whole}")
        shape = whole[2:]
        if any(n % self.divisor for n in shape):
            raise ConfigError(f"Swin-UNETR needs edges divisible by {self.divisor}, got an input of {shape}")
        if all(n == self.divisor for n in shape):
            raise ConfigError(
                f"an input of {shape} leaves one voxel at the bottleneck, which cannot be normalised; "
                f"use at least {2 * self.divisor} voxels along one axis"
            )


class SwinEncoder(nn.Module):
    """Patch embedding and four Swin stages; returns the normalised features of each resolution, finest first."""

    def __init__(
        self,
        in_channels: int,
        feature_size: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        patch_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        dropout_path_rate: float,
        use_checkpoint: bool,
        patch_merging: str,
    ) -> None:
        super().__init__()
        projection = nn.Conv3d(in_channels, feature_size, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        window, no_shift, half = (window_size,) * 3, (0, 0, 0), (window_size // 2,) * 3
        rates = torch.linspace(0, dropout_path_rate, sum(depths), device="cpu").tolist()  # also when building on meta
        for stage in range(STAGES):
            dim = feature_size * 2**stage
            blocks = []
            for i in range(depths[stage]):
                shift, rate = half if i % 2 else no_shift, rates[sum(depths[:stage]) + i]
                blocks.append(SwinBlock(dim, num_heads[stage], window, shift, mlp_ratio, qkv_bias, rate))
            # A list of one, and these names, because published state dicts have them.
            layer = SwinStage(blocks, PatchMerging(dim, patch_merging), use_checkpoint)
            setattr(self, f"layers{stage + 1}", nn.ModuleList([layer]))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, D, H, W) -> five maps (B, C, d, h, w), from 1/patch to 1/(16 patch) resolution."""
        x = self.patch_embed(x).permute(0, 2, 3, 4, 1).contiguous()  # channels last for linear layers
        outputs = [self._normalised(x)]
        for stage in range(STAGES):
            x = getattr(self, f"layers{stage + 1}")[0](x)
            outputs.append(self._normalised(x))
        return outputs

    @staticmethod
    def _normalised(x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:]).permute(0, 4, 1, 2, 3)  # channels last
        return x.contiguous() if x.is_cuda else x
