"""MedSegDiff v2's anchor: the condition model's decoded features tell the denoiser where to look."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL_SIZE = 5


class UncertainSpatialAttention(nn.Module):
    """U-SA (Wu et al., AAAI 2024, the anchor condition).

    f_anc = max(f_c * k_Gauss, f_c) and f' = sigmoid(k_1x1 * f_anc) f_d + f_d, with a Gaussian kernel of learned mean
    and variance: what a rough segmentation found may lie beside where it found it.

    [open] The kernel has 5 voxels along each axis and a mean and a standard deviation for each; it is the same for all
    channels and begins centred, with a standard deviation of one voxel.

    Args:
        channels: of the condition's features f_c.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(3))  # voxels (z, y, x)
        self.log_deviation = nn.Parameter(torch.zeros(3))
        self.project = nn.Conv3d(channels, 1, 1)

    def forward(self, noise_features: Tensor, condition_features: Tensor) -> Tensor:
        """f_d (B, D, z, y, x) and f_c (B, C, z, y, x) -> (B, D, z, y, x)."""
        anchor = torch.maximum(self.smoothed(condition_features), condition_features)
        result: Tensor = self.project(anchor).sigmoid() * noise_features + noise_features
        return result

    def kernels(self) -> Tensor:
        """(3, 5): weights along z, y and x, each with a sum of 1."""
        offset = torch.arange(KERNEL_SIZE, device=self.mean.device) - KERNEL_SIZE // 2
        scaled = (offset - self.mean[:, None]) / self.log_deviation.exp()[:, None]
        return (-0.5 * scaled.square()).softmax(dim=1)

    def smoothed(self, features: Tensor) -> Tensor:
        """(B, C, z, y, x) times the kernel, axis by axis, with zeros around."""
        batch, channels = features.shape[:2]
        x = features.flatten(0, 1).unsqueeze(1)
        for axis, kernel in enumerate(self.kernels()):
            shape, padding = [1, 1, 1], [0, 0, 0]
            shape[axis], padding[axis] = KERNEL_SIZE, KERNEL_SIZE // 2
            x = F.conv3d(x, kernel.view(1, 1, *shape).to(x.dtype), padding=padding)
        return x.squeeze(1).unflatten(0, (batch, channels))
