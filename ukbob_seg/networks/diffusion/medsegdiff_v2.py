"""MedSegDiff-V2 in 3D: Wu et al., Diffusion-based medical image segmentation with transformer, AAAI 2024."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.diffusion.anchor import UncertainSpatialAttention
from ukbob_seg.networks.diffusion.network import NOISE, Denoiser, DiffusionNetwork, Sampling
from ukbob_seg.networks.diffusion.schedule import REFERENCE_STEPS
from ukbob_seg.networks.diffusion.spectrum import SSFormer
from ukbob_seg.networks.diffusion.unet import (
    Decoder,
    Encoder,
    TimeEmbedding,
    checked_blocks,
    checked_features,
    group_norm,
    noise_head,
)

NAME = "medsegdiff_v2"
FEATURES = (32, 64, 128, 256, 320)


class ConditionModel(nn.Module):
    """A U-Net that segments the image by itself.

    Args:
        in_channels: image channels.
        outputs: K.
        features: channels per stage.
        blocks: residual blocks per stage.
        dropout: of the blocks.
    """

    def __init__(
        self, in_channels: int, outputs: int, features: Sequence[int], blocks: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        self.encoder = Encoder(in_channels, features, blocks, None, dropout)
        self.decoder = Decoder(features, None, dropout)
        self.activation = nn.Sequential(group_norm(features[0]), nn.SiLU())
        self.head = nn.Conv3d(features[0], outputs, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, z, y, x) -> decoded features (B, features[0], z, y, x), deepest embedding, logits (B, K, z, y, x)."""
        maps = self.encoder(image)
        decoded = self.activation(self.decoder(maps))
        return decoded, maps[-1], self.head(decoded)


class MedSegDiffV2Denoiser(Denoiser):
    """A U-Net of image and noisy map, anchored by the condition model at its first features, informed at its deepest.

    Args:
        in_channels: image channels.
        outputs: K.
        features: channels per stage, of the condition model too.
        blocks: residual blocks per stage, of the condition model too.
        former: blocks of the SS-Former, blocks of its filters and their width.
        dropout: of the residual blocks.
    """

    def __init__(
        self,
        in_channels: int,
        outputs: int,
        features: Sequence[int],
        blocks: Sequence[int],
        former: tuple[int, int, int],
        dropout: float,
    ) -> None:
        super().__init__()
        former_blocks, filter_blocks, filter_width = former
        self.time = TimeEmbedding(features[0])
        time = self.time.channels
        self.condition_model = ConditionModel(in_channels, outputs, features, blocks, dropout)
        self.encoder = Encoder(in_channels + outputs, features, blocks, time, dropout)
        self.anchor = UncertainSpatialAttention(features[0])
        self.former = SSFormer(features[-1], time, former_blocks, filter_width, filter_blocks)
        self.decoder = Decoder(features, time, dropout)
        self.head = noise_head(features[0], outputs)

    def condition(self, image: Tensor) -> tuple[Any, Tensor | None]:
        """The image, its decoded features and deepest embedding; and the condition model's own logits."""
        decoded, deepest, logits = self.condition_model(image)
        return (image, decoded, deepest), logits

    def forward(self, noisy: Tensor, time: Tensor, condition: Any) -> Tensor:
        """Noise (B, K, z, y, x)."""
        image, decoded, semantic = condition
        embedding = self.time(time)
        first = self.anchor(self.encoder.stem(torch.cat([image, noisy], dim=1)), decoded)
        maps = self.encoder.after_stem(first, embedding)
        maps[-1] = self.former(maps[-1], semantic, embedding)
        noise: Tensor = self.head(self.decoder(maps, embedding))
        return noise


class MedSegDiffV2(DiffusionNetwork):
    """MedSegDiff, second version.

    Args:
        in_channels: image channels.
        out_channels: K, classes or regions.
        features_per_stage: channels, of the condition model and of the denoiser.
        blocks_per_stage: residual blocks, of both.
        former_blocks: of the SS-Former.
        filter_blocks: of each NBP-Filter.
        filter_width: channels of these.
        condition_interval: alpha: the condition model's loss counts at the steps that this divides.
        cross_entropy_weight: beta: weight of the cross-entropy in it, against Dice.
        dropout: in the residual blocks.
        steps: of the noise schedule.
        sampling_steps: in which a segmentation is drawn.
        samples: drawn and averaged for each window.
        eta: 0 for DDIM, 1 for ancestral sampling.
        seed: of the noise in prediction.
        label_scale: of the maps that noise is added to; see ``Sampling``.
        target: what is predicted, ``noise`` as in the paper or, as planned, ``velocity``; see ``Sampling``.

    Raises:
        ConfigError: arguments out of range.
    """

    features = FEATURES

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        features_per_stage: Sequence[int] = FEATURES,
        blocks_per_stage: int | Sequence[int] = 2,
        former_blocks: int = 4,
        filter_blocks: int = 6,
        filter_width: int = 16,
        condition_interval: int = 5,
        cross_entropy_weight: float = 10.0,
        dropout: float = 0.0,
        steps: int = REFERENCE_STEPS,
        sampling_steps: int = 10,
        samples: int = 1,
        eta: float = 0.0,
        seed: int = 0,
        label_scale: float = 1.0,
        target: str = NOISE,
    ) -> None:
        features = checked_features(NAME, features_per_stage, least=2)
        blocks = checked_blocks(NAME, blocks_per_stage, len(features))
        former = (former_blocks, filter_blocks, filter_width)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in former):
            raise ConfigError(
                f"network {NAME!r}: former_blocks, filter_blocks and filter_width must be positive, got {former}"
            )
        sampling = Sampling(steps, sampling_steps, samples, eta, seed, label_scale, target)
        denoiser = MedSegDiffV2Denoiser(in_channels, out_channels, features, blocks, former, dropout)
        super().__init__(denoiser, out_channels, sampling, condition_interval, cross_entropy_weight)
