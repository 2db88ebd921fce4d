"""The Gaussian diffusion process in closed form.

Notation of Ho et al., Denoising diffusion probabilistic models, NeurIPS 2020: beta_t is the variance that step t adds,
alpha_t = 1 - beta_t, and abar_t the product of alpha_0..alpha_t. Steps are counted from 0, the least noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError

REFERENCE_STEPS = 1000  # for which the first and last beta are given
FIRST_BETA, LAST_BETA = 1e-4, 0.02
MOST_BETA = 0.999  # of schedules of very few steps


class NoiseSchedule(nn.Module):
    """Linear schedule of the noise; 1000 steps in both MedSegDiff papers.

    With other numbers of steps the betas are scaled so that the noise grows along the same curve (Nichol and Dhariwal,
    ICML 2021). The tables belong to no checkpoint: the number of steps gives them.

    Args:
        steps: T, at least 2.

    Raises:
        ConfigError: fewer.
    """

    betas: Tensor
    alpha_bars: Tensor

    def __init__(self, steps: int = REFERENCE_STEPS) -> None:
        super().__init__()
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
            raise ConfigError(f"a diffusion network needs at least 2 steps, got {steps!r}")
        self.steps = steps
        scale = REFERENCE_STEPS / steps
        betas = torch.linspace(scale * FIRST_BETA, scale * LAST_BETA, steps, dtype=torch.float64).clamp(max=MOST_BETA)
        self.register_buffer("betas", betas.float(), persistent=False)
        self.register_buffer("alpha_bars", (1 - betas).cumprod(0).float(), persistent=False)

    def alpha_bar(self, step: Tensor, like: Tensor) -> Tensor:
        """abar of each element's step, 1 for step -1 (no noise).

        Args:
            step: (B,) int64 in -1..T-1.
            like: (B, ...) tensor that the result is to be multiplied with.

        Returns:
            (B, 1, ..., 1) float32.
        """
        values = torch.where(step < 0, 1.0, self.alpha_bars[step.clamp(min=0)])
        return values.view(-1, *(1 for _ in like.shape[1:]))

    def noisy(self, clean: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """A draw of q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), Eq. 4 of Ho et al.

        Args:
            clean: (B, ...) x_0.
            step: (B,) t.
            noise: (B, ...) standard normal.
        """
        alpha_bar = self.alpha_bar(step, clean)
        return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise

    def clean(self, noisy: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """x_0 from x_t and its noise: inverse of ``noisy``."""
        alpha_bar = self.alpha_bar(step, noisy)
        return (noisy - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()

    def noise(self, noisy: Tensor, step: Tensor, clean: Tensor) -> Tensor:
        """The noise in x_t where x_0 is known; step at least 0."""
        alpha_bar = self.alpha_bar(step, noisy)
        return (noisy - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()

    def velocity(self, clean: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """v = sqrt(abar_t) e - sqrt(1 - abar_t) x_0 (Salimans and Ho, Progressive distillation, ICLR 2022): mostly the
        noise where there is little of it, mostly the negative map where there is little of that.
        """
        alpha_bar = self.alpha_bar(step, clean)
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean

    def noise_of_velocity(self, noisy: Tensor, step: Tensor, velocity: Tensor) -> Tensor:
        """The noise in x_t whose velocity is known."""
        alpha_bar = self.alpha_bar(step, noisy)
        return (1 - alpha_bar).sqrt() * noisy + alpha_bar.sqrt() * velocity

    def posterior(self, noisy: Tensor, step: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and variance (B, 1, ..., 1) of q(x_{t-1} | x_t, x_0), Eq. 6 and 7 of Ho et al."""
        now, before = self.alpha_bar(step, noisy), self.alpha_bar(step - 1, noisy)
        beta = self.betas[step].view_as(now)
        mean = (before.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - before) * noisy) / (1 - now)
        return mean, beta * (1 - before) / (1 - now)
