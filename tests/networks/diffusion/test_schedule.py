"""The noise process against brute force, and samplers whose denoiser knows the answer."""

import math

import pytest
import torch

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.diffusion.sampler import backward_step, chosen_steps, sample
from ukbob_seg.networks.diffusion.schedule import NoiseSchedule


def test_the_usual_schedule_is_that_of_ddpm():
    """Linear from 1e-4 to 0.02 in 1000 steps; at the end a map is noise."""
    schedule = NoiseSchedule(1000)
    assert schedule.betas[[0, 499, 999]].tolist() == pytest.approx([1e-4, 1e-4 + 499 / 999 * 0.0199, 0.02], rel=1e-5)
    bar = math.prod(1 - (1e-4 + t / 999 * 0.0199) for t in range(1000))
    assert float(schedule.alpha_bars[-1]) == pytest.approx(bar, rel=1e-4)
    assert schedule.state_dict() == {}


@pytest.mark.parametrize("steps", [2, 7, 50, 250])
def test_fewer_steps_follow_the_same_curve(steps):
    schedule, full = NoiseSchedule(steps), NoiseSchedule(1000)
    assert (schedule.alpha_bars.diff() < 0).all()
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    if steps >= 50:
        middle = float(schedule.alpha_bars[steps // 2 - 1].log() / full.alpha_bars[499].log())
        assert middle == pytest.approx(1, abs=0.15)


def test_moments_of_noisy_maps():
    """q(x_t | x_0) has mean sqrt(abar) x_0 and variance 1 - abar, and equals t + 1 single steps."""
    schedule, generator = NoiseSchedule(20), torch.Generator().manual_seed(1)
    clean = torch.tensor([1.0, -1.0, 0.25]).view(3, 1).expand(3, 40_000)
    step = torch.tensor([0, 9, 19])
    noisy = schedule.noisy(clean, step, torch.randn(clean.shape, generator=generator))
    bar = schedule.alpha_bars[step]
    assert torch.allclose(noisy.mean(1), bar.sqrt() * clean[:, 0], atol=0.02)
    assert torch.allclose(noisy.var(1), 1 - bar, atol=0.02)
    walked = clean[1]
    for beta in schedule.betas[:10]:
        walked = (1 - beta).sqrt() * walked + beta.sqrt() * torch.randn(walked.shape, generator=generator)
    assert torch.allclose(walked.mean(), noisy[1].mean(), atol=0.02)
    assert torch.allclose(walked.var(), noisy[1].var(), atol=0.02)


def test_noise_and_clean_map_are_inverses():
    schedule, generator = NoiseSchedule(50), torch.Generator().manual_seed(2)
    clean, noise = torch.randn(2, 4, 3, 2, 3, 1, generator=generator)
    step = torch.tensor([0, 9, 20, 49])
    noisy = schedule.noisy(clean, step, noise)
    assert torch.allclose(schedule.clean(noisy, step, noise), clean, atol=1e-3)
    assert torch.allclose(schedule.noise(noisy, step, clean), noise, atol=1e-3)


def test_the_velocity_says_noise_and_clean_map():
    """And its squared error is that of the noise over abar: the sum of the errors of noise and clean map."""
    schedule, generator = NoiseSchedule(50), torch.Generator().manual_seed(2)
    clean, noise, off = torch.randn(3, 4, 3, 2, 3, 1, generator=generator)
    step = torch.tensor([0, 9, 20, 49])
    noisy = schedule.noisy(clean, step, noise)
    velocity = schedule.velocity(clean, step, noise)
    assert torch.allclose(schedule.noise_of_velocity(noisy, step, velocity), noise, atol=1e-5)
    found = schedule.noise_of_velocity(noisy, step, velocity + 0.1 * off)
    of_noise, bar = (found - noise).square(), schedule.alpha_bar(step, noisy)
    of_clean = (schedule.clean(noisy, step, found) - clean).square()
    assert torch.allclose(of_noise / bar, 0.01 * off.square(), rtol=1e-2, atol=1e-6)
    assert torch.allclose(of_noise + of_clean, 0.01 * off.square(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("number", [1, 5, 19])
def test_the_posterior_is_the_product_of_two_gaussians(number):
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): on a fine grid, normalised."""
    schedule = NoiseSchedule(20)
    noisy, clean = 0.7, -1.0
    beta, before = float(schedule.betas[number]), float(schedule.alpha_bars[number - 1])
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    log = -((noisy - math.sqrt(1 - beta) * x) ** 2) / (2 * beta) - (x - math.sqrt(before) * clean) ** 2 / (
        2 * (1 - before)
    )
    weights = (log - log.max()).exp()
    weights /= weights.sum()
    mean = float((weights * x).sum())
    variance = float((weights * (x - mean) ** 2).sum())
    found = schedule.posterior(torch.full((1, 1), noisy), torch.tensor([number]), torch.full((1, 1), clean))
    assert float(found[0]) == pytest.approx(mean, abs=1e-4)
    assert float(found[1]) == pytest.approx(variance, rel=1e-3)


def test_ancestral_sampling_is_the_posterior():
    """With eta = 1 a step to the neighbour has the posterior's mean and variance."""
    schedule, generator = NoiseSchedule(20), torch.Generator().manual_seed(3)
    noisy, clean, draw = torch.randn(3, 4, 5, generator=generator)
    step = torch.tensor([1, 4, 10, 19])
    mean, variance = schedule.posterior(noisy, step, clean)
    found = backward_step(schedule, noisy, step, step - 1, clean, 1.0, draw)
    assert torch.allclose(found, mean + variance.sqrt() * draw, atol=1e-4)
    last = backward_step(schedule, noisy, torch.zeros(4, dtype=torch.long), torch.full((4,), -1), clean, 1.0, draw)
    assert torch.allclose(last, clean, atol=1e-4)


def test_the_steps_of_a_short_chain():
    assert chosen_steps(1000, 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert chosen_steps(6, 6) == [5, 4, 3, 2, 1, 0]
    assert chosen_steps(100, 1) == [99]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 4, 50])
def test_a_perfect_denoiser_recovers_the_map(count, eta):
    schedule, generator = NoiseSchedule(50), torch.Generator().manual_seed(4)
    truth = torch.where(torch.rand(2, 3, 4, 4, 4, generator=generator) < 0.5, -1.0, 1.0)
    visited = []

    def perfect(noisy, step):
        visited.append(int(step[0]))
        return schedule.noise(noisy, step, truth)

    def draw():
        return torch.randn(truth.shape, generator=generator)

    found = sample(perfect, schedule, draw(), count, eta, draw)
    assert torch.allclose(found, truth, atol=1e-3)
    truth = truth / 4
    assert torch.allclose(sample(perfect, schedule, draw(), count, eta, draw, 0.25), truth, atol=1e-3)
    visited = visited[:count]
    assert visited == chosen_steps(50, count)


def test_ddim_stays_on_the_line_between_map_and_noise():
    """With eta = 0 the noise in x stays the one that the chain began with."""
    schedule, generator = NoiseSchedule(50), torch.Generator().manual_seed(5)
    truth, noise = torch.randn(2, 1, 6, generator=generator)
    step, before = torch.tensor([40]), torch.tensor([20])
    noisy = schedule.noisy(truth, step, noise)
    found = backward_step(schedule, noisy, step, before, truth, 0.0, None)
    assert torch.allclose(found, schedule.noisy(truth, before, noise), atol=1e-4)


@pytest.mark.parametrize("steps", [1, 0, 2.5, True])
def test_a_schedule_needs_two_steps(steps):
    with pytest.raises(ConfigError, match="at least 2 steps"):
        NoiseSchedule(steps)
