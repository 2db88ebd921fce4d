"""A diffusion network as the rest of the toolkit sees it: an image in, logits out; noise as it learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.diffusion.sampler import sample
from ukbob_seg.networks.diffusion.schedule import REFERENCE_STEPS, NoiseSchedule
from ukbob_seg.networks.wrappers import unwrapped

LEAST_PROBABILITY = 1e-4  # so that logits are finite
MOST_SEED = 2**62
NOISE, VELOCITY = "noise", "velocity"  # what a denoiser may say


class NoisePrediction(NamedTuple):
    """What a diffusion network returns while it learns.

    Attributes:
        predicted: (B, K, z, y, x) noise, or velocity, that the network sees.
        target: (B, K, z, y, x) noise that was added, or its velocity.
        step: (B,) at which.
        condition: (B, K, z, y, x) logits of the condition model, None where there is none.
    """

    predicted: Tensor
    target: Tensor
    step: Tensor
    condition: Tensor | None


def set_head(network: nn.Module, head: str) -> None:
    """Tell a network that makes its logits from probabilities what they mean, ``softmax`` or ``sigmoid``."""
    inner = unwrapped(network)
    if isinstance(inner, DiffusionNetwork):
        inner.head = head


def stage_divisor(kind: type[DiffusionNetwork], arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """What a patch (z, y, x) must be divisible by: every stage but the first halves it."""
    edge = 2 ** (len(arguments.get("features_per_stage", kind.features)) - 1)
    return edge, edge, edge


@dataclass(frozen=True)
class Sampling:
    """How a segmentation is drawn, and what is learned for that.

    Attributes:
        steps: of the noise schedule, in training.
        sampling_steps: steps of them in which a sample is denoised.
        samples: drawn for each window; their probabilities are averaged.
        eta: 0 for DDIM, 1 for ancestral sampling.
        seed: of the noise.
        label_scale: b, in (0, 1]: noise is added to maps of b and -b. Neighbours in a map say the same, so that much of
            it shows through the noise; the smaller b, the sooner only the image says what it was (Chen, On the
            importance of noise scheduling for diffusion models, 2023).
        target: what the denoiser says, ``noise`` or ``velocity``. The squared error of the velocity is that of the
            noise divided by abar, which is the sum of the errors of noise and clean map: so what a map is counts also
            where next to nothing of it is left, from where a segmentation has to start.
    """

    steps: int = REFERENCE_STEPS
    sampling_steps: int = 10
    samples: int = 1
    eta: float = 0.0
    seed: int = 0
    label_scale: float = 1.0
    target: str = NOISE

    def __post_init__(self) -> None:
        for name, most in (("sampling_steps", self.steps), ("samples", None), ("seed", MOST_SEED)):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < least or (most is not None and value > most):
                upper = "" if most is None else f" and at most {most}"
                raise ConfigError(f"{name} must be a whole number of at least {least}{upper}, got {value!r}")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"eta must lie in [0, 1], got {self.eta}")
        if not 0 < self.label_scale <= 1:
            raise ConfigError(f"label_scale must lie in (0, 1], got {self.label_scale}")
        if self.target not in (NOISE, VELOCITY):
            raise ConfigError(f"target must be {NOISE} or {VELOCITY}, got {self.target!r}")


class Denoiser(nn.Module):
    """What predicts the noise, or its velocity; both versions of MedSegDiff are one."""

    def condition(self, image: Tensor) -> tuple[Any, Tensor | None]:
        """What is computed once for an image (B, C, z, y, x), and logits of a segmentation if there are any."""
        raise NotImplementedError

    def forward(self, noisy: Tensor, time: Tensor, condition: Any) -> Tensor:
        """Noise or velocity (B, K, z, y, x) of noisy maps of that shape, at times (B,) in [0, 1000)."""
        raise NotImplementedError


class DiffusionNetwork(nn.Module):
    """A denoiser, its noise schedule and its sampler.

    Called with an image alone it draws a segmentation and returns logits. The noise is the same for every window and
    element of a batch, and depends on the seed only: predictions repeat, in whatever batches. Gradients go through the
    condition and the last denoising step.

    Called with the clean map as well, it adds noise to that and predicts it (``Sampling.target``). Step and noise are
    drawn from torch's global generator, as dropout is.

    Args:
        denoiser: predicts noise or velocity.
        outputs: K, classes or regions.
        sampling: how segmentations are drawn.
        condition_interval: the condition model's own loss counts at steps that this divides (alpha of v2).
        cross_entropy_weight: in that loss, of the cross-entropy against Dice (beta of v2).

    Attributes:
        head: what the logits mean, ``softmax`` or ``sigmoid``; see ``set_head``.
        features: channels per stage where none are given.
    """

    features: tuple[int, ...] = ()

    def __init__(
        self,
        denoiser: Denoiser,
        outputs: int,
        sampling: Sampling,
        condition_interval: int = 1,
        cross_entropy_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if isinstance(condition_interval, bool) or not isinstance(condition_interval, int) or condition_interval < 1:
            raise ConfigError(f"condition_interval must be a whole number of at least 1, got {condition_interval!r}")
        if not cross_entropy_weight >= 0:
            raise ConfigError(f"cross_entropy_weight must not be negative, got {cross_entropy_weight}")
        self.denoiser, self.outputs, self.sampling = denoiser, outputs, sampling
        self.schedule = NoiseSchedule(sampling.steps)
        self.condition_interval, self.cross_entropy_weight = condition_interval, cross_entropy_weight
        self.head = "softmax"

    def forward(self, image: Tensor, clean: Tensor | None = None) -> Tensor | NoisePrediction:
        """Draw a segmentation, or predict the noise or velocity of a noisy one.

        Args:
            image: (B, C, z, y, x).
            clean: (B, K, z, y, x), each output's truth as 1 or -1; None to draw.

        Returns:
            Logits (B, K, z, y, x) float32, or ``NoisePrediction``.
        """
        return self.draw(image) if clean is None else self.predict_noise(image, clean)

    def predict_noise(self, image: Tensor, clean: Tensor) -> NoisePrediction:
        """Add noise at a random step of each element, and predict it, or its velocity."""
        step = torch.randint(self.schedule.steps, (len(clean),), device=clean.device)
        noise = torch.randn_like(clean)
        condition, logits = self.denoiser.condition(image)
        scaled = clean * self.sampling.label_scale
        predicted = self._called(self.schedule.noisy(scaled, step, noise), step, condition)
        target = noise if self.sampling.target == NOISE else self.schedule.velocity(scaled, step, noise)
        return NoisePrediction(predicted, target, step, logits)

    def draw(self, image: Tensor) -> Tensor:
        """(B, C, z, y, x) -> logits (B, K, z, y, x) of the mean probability of all samples."""
        condition, _ = self.denoiser.condition(image)
        total: Tensor | None = None
        for number in range(self.sampling.samples):
            clean = self._sample(image, condition, self.sampling.seed + number)
            probability = self._probability(clean)
            total = probability if total is None else total + probability
        assert total is not None
        mean = total / self.sampling.samples
        return mean.log() if self.head == "softmax" else mean.logit()

    def _sample(self, image: Tensor, condition: Any, seed: int) -> Tensor:
        """(B, K, z, y, x) in [-1, 1]."""
        generator = torch.Generator().manual_seed(seed)
        shape = (1, self.outputs, *image.shape[2:])

        def draw() -> Tensor:  # on the CPU, so that all devices get the same
            return torch.randn(shape, generator=generator).to(image.device).expand(len(image), -1, -1, -1, -1)

        clean = sample(
            lambda noisy, step: self._denoise(noisy, step, condition),
            self.schedule, draw(), self.sampling.sampling_steps, self.sampling.eta, draw, self.sampling.label_scale,
        )  # fmt: skip
        return clean / self.sampling.label_scale

    def _denoise(self, noisy: Tensor, step: Tensor, condition: Any) -> Tensor:
        """The noise in noisy maps."""
        said = self._called(noisy, step, condition)
        return said if self.sampling.target == NOISE else self.schedule.noise_of_velocity(noisy, step, said)

    def _called(self, noisy: Tensor, step: Tensor, condition: Any) -> Tensor:
        """What the denoiser says."""
        time = step * (REFERENCE_STEPS / self.schedule.steps)
        said: Tensor = self.denoiser(noisy, time, condition)
        return said.float()

    def _probability(self, clean: Tensor) -> Tensor:
        """Of each output: the best estimate of a map of 1 and -1 is 2 p - 1."""
        probability = ((clean + 1) / 2).clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        return probability / probability.sum(dim=1, keepdim=True) if self.head == "softmax" else probability
