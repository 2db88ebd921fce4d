"""MedSegDiff in 3D: Wu et al., Medical image segmentation with diffusion probabilistic model, MIDL 2023."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.diffusion.network import NOISE, Denoiser, DiffusionNetwork, Sampling
from ukbob_seg.networks.diffusion.schedule import REFERENCE_STEPS
from ukbob_seg.networks.diffusion.spectrum import FFParser
from ukbob_seg.networks.diffusion.unet import (
    Decoder,
    Encoder,
    Stage,
    TimeEmbedding,
    checked_blocks,
    checked_features,
    convolution,
    noise_head,
)

NAME = "medsegdiff_v1"
FEATURES = (32, 64, 128, 256)
BLOCKS = (3, 4, 6, 3)  # of ResNet34
IMAGE_SIZE = (96, 96, 96)


class DynamicConditionalEncoding(nn.Module):
    """Tells the image's features where the current segmentation is: (LN(m_I) LN(m_x)) m_I, element by element.

    The segmentation's features m_x pass an FF-Parser before, which can take out the noise that the current step adds.
    [open] Both norms begin with weights of 0 and biases of 1, so that the image passes unchanged at first: a product of
    three, with noise in it, would hide the image and grow from stage to stage.

    Args:
        channels: of both.
        size: (z, y, x) of both at the size that the network is made for.
    """

    def __init__(self, channels: int, size: Sequence[int]) -> None:
        super().__init__()
        self.parser = FFParser(channels, size)
        # One group: LayerNorm over channels and space, with a weight for each channel.
        self.norm_image, self.norm_noisy = nn.GroupNorm(1, channels), nn.GroupNorm(1, channels)
        for norm in (self.norm_image, self.norm_noisy):
            nn.init.zeros_(norm.weight)
            nn.init.ones_(norm.bias)

    def forward(self, image: Tensor, noisy: Tensor) -> Tensor:
        """m_I and m_x (B, C, z, y, x) -> (B, C, z, y, x)."""
        result: Tensor = self.norm_image(image) * self.norm_noisy(self.parser(noisy)) * image
        return result


class MedSegDiffV1Denoiser(Denoiser):
    """Two encoders, of the image and of the noisy map, which share their last stage and one decoder.

    The stages between the first and the last have a dynamic conditional encoding. D(E_I + E_x): the sum of both
    encoders' maps goes on, at every resolution.

    Args:
        in_channels: image channels.
        outputs: K.
        features: channels per stage.
        blocks: residual blocks per stage.
        image_size: (z, y, x) of the windows.
        dropout: of the blocks.
    """

    def __init__(
        self,
        in_channels: int,
        outputs: int,
        features: Sequence[int],
        blocks: Sequence[int],
        image_size: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.time = TimeEmbedding(features[0])
        time = self.time.channels
        self.of_image = Encoder(in_channels, features[:-1], blocks[:-1], time, dropout)
        self.of_noisy = Encoder(outputs, features[:-1], blocks[:-1], time, dropout)
        self.encodings = nn.ModuleList(
            DynamicConditionalEncoding(width, [n >> level for n in image_size])
            for level, width in enumerate(features[1:-1], start=1)
        )
        self.shrink = convolution(features[-2], features[-2], stride=2)
        self.last = Stage(features[-2], features[-1], blocks[-1], time, dropout)
        self.decoder = Decoder(features, time, dropout)
        self.head = noise_head(features[0], outputs)

    def condition(self, image: Tensor) -> tuple[Any, Tensor | None]:
        """The image itself: its encoding depends on the noisy map."""
        return image, None

    def forward(self, noisy: Tensor, time: Tensor, condition: Any) -> Tensor:
        """Noise (B, K, z, y, x)."""
        embedding = self.time(time)
        noisy_maps = self.of_noisy(noisy, embedding)
        image_maps = self._image_maps(condition, noisy_maps, embedding)
        maps = [image + x for image, x in zip(image_maps, noisy_maps, strict=True)]
        maps.append(self.last(self.shrink(maps[-1]), embedding))
        noise: Tensor = self.head(self.decoder(maps, embedding))
        return noise

    def _image_maps(self, image: Tensor, noisy_maps: Sequence[Tensor], embedding: Tensor) -> list[Tensor]:
        """Encode the image, with the segmentation's features brought in at the middle stages."""
        encoder, maps = self.of_image, []
        x = encoder.stem(image)
        for level, stage in enumerate(encoder.stages):
            x = stage(encoder.shrink[level - 1](x) if level else x, embedding)
            if level:
                x = self.encodings[level - 1](x, noisy_maps[level])
            maps.append(x)
        return maps


class MedSegDiffV1(DiffusionNetwork):
    """MedSegDiff, first version.

    Args:
        in_channels: image channels.
        out_channels: K, classes or regions.
        features_per_stage: channels; the paper's 2D network has 128 to 512.
        blocks_per_stage: residual blocks, of the last stage too; the paper takes ResNet34's.
        image_size: (z, y, x) of the windows: the size of the FF-Parsers' tables, which are interpolated for others.
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
        blocks_per_stage: int | Sequence[int] = BLOCKS,
        image_size: Sequence[int] = IMAGE_SIZE,
        dropout: float = 0.0,
        steps: int = REFERENCE_STEPS,
        sampling_steps: int = 10,
        samples: int = 1,
        eta: float = 0.0,
        seed: int = 0,
        label_scale: float = 1.0,
        target: str = NOISE,
    ) -> None:
        features = checked_features(NAME, features_per_stage, least=3)
        blocks = checked_blocks(NAME, blocks_per_stage, len(features))
        divisor = 2 ** (len(features) - 1)
        if len(image_size) != 3 or any(n < divisor or n % divisor for n in image_size):
            raise ConfigError(
                f"network {NAME!r}: image_size must be three multiples of {divisor} (z, y, x), got {image_size!r}"
            )
        sampling = Sampling(steps, sampling_steps, samples, eta, seed, label_scale, target)
        denoiser = MedSegDiffV1Denoiser(in_channels, out_channels, features, blocks, image_size, dropout)
        super().__init__(denoiser, out_channels, sampling)
