"""From noise to a clean map, in all steps of the schedule or in a few of them.

One update serves both samplers (Song et al., Denoising diffusion implicit models, ICLR 2021, Eq. 12 and 16): with
eta = 0 it is DDIM, without noise after the first; with eta = 1 it draws from the posterior, which in neighbouring steps
is the ancestral sampling of Ho et al.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ukbob_seg.networks.diffusion.schedule import NoiseSchedule

Denoise = Callable[[Tensor, Tensor], Tensor]  # noisy (B, ...), step (B,) -> noise (B, ...)


def chosen_steps(total: int, count: int) -> list[int]:
    """The steps to denoise in, from T - 1 downwards, evenly spaced.

    The last one is T / count - 1, whose result is the clean map at once: all but the last step of a full schedule would
    else be followed by a step with next to no noise, in which the network decides nothing (the "trailing" choice of Lin
    et al., Common diffusion noise schedules and sample steps are flawed, WACV 2024). With count = T every step is used.

    Args:
        total: T, steps of the schedule.
        count: in 1..T.
    """
    return [round(total * i / count) - 1 for i in range(count, 0, -1)]


def backward_step(
    schedule: NoiseSchedule, noisy: Tensor, step: Tensor, before: Tensor, clean: Tensor, eta: float, draw: Tensor | None
) -> Tensor:
    """x at an earlier step from x_t and an estimate of x_0.

    Args:
        schedule: of the noise.
        noisy: (B, ...) x_t.
        step: (B,) t.
        before: (B,) step to go to, below t; -1 for the clean map.
        clean: (B, ...) estimate of x_0.
        eta: share of the posterior's standard deviation that is drawn anew, in [0, 1].
        draw: (B, ...) standard normal, not needed with eta = 0.
    """
    now, then = schedule.alpha_bar(step, noisy), schedule.alpha_bar(before, noisy)
    deviation = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
    direction = (1 - then - deviation.square()).clamp(min=0).sqrt() * schedule.noise(noisy, step, clean)
    result = then.sqrt() * clean + direction
    return result if eta == 0 or draw is None else result + deviation * draw


def sample(
    denoise: Denoise,
    schedule: NoiseSchedule,
    start: Tensor,
    count: int,
    eta: float = 0.0,
    draw: Callable[[], Tensor] | None = None,
    bound: float = 1.0,
) -> Tensor:
    """Denoise from pure noise to a clean map.

    Only the last step has gradients: a chain of many would need the memory of as many networks.

    Args:
        denoise: predicts the noise in x_t.
        schedule: of the noise.
        start: (B, ...) standard normal, x at the last step.
        count: steps to denoise in.
        eta: 0 for DDIM, 1 for ancestral sampling.
        draw: gives further standard normal tensors like ``start``; needed where eta > 0.
        bound: largest value of a clean map; the least is its negative.

    Returns:
        (B, ...) the last estimate of x_0, clipped to the bounds. Estimates on the way are clipped too, as no clean map
        leaves them.
    """
    steps, noisy = chosen_steps(schedule.steps, count), start
    with torch.no_grad():
        for number, before in itertools.pairwise(steps):
            step, target = (torch.full((len(start),), k, device=start.device) for k in (number, before))
            clean = schedule.clean(noisy, step, denoise(noisy, step)).clamp(-bound, bound)
            fresh = draw() if eta > 0 and draw is not None else None
            noisy = backward_step(schedule, noisy, step, target, clean, eta, fresh)
    step = torch.full((len(start),), steps[-1], device=start.device)
    return schedule.clean(noisy, step, denoise(noisy, step)).clamp(-bound, bound)
