"""Layer normalisation of the channels of a voxel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the channels of each voxel of a map that has its channels first."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, d, h, w) -> the same shape, with the channels of a voxel together in memory."""
        voxels = input.permute(0, 2, 3, 4, 1)
        voxels = F.layer_norm(voxels, self.normalized_shape, self.weight, self.bias, self.eps)
        return voxels.permute(0, 4, 1, 2, 3)
