"""Learning rates against torch's own schedulers and their end points."""

import dataclasses

import pytest
import torch

from ukbob_seg.errors import ConfigError
from ukbob_seg.training.config import RECIPES, TrainingConfig, recipe
from ukbob_seg.training.schedules import learning_rate


def _rates(config):
    return [learning_rate(config, step) for step in range(config.epochs * config.iterations_per_epoch)]


def test_cosine_restarts_equal_torch():
    config = TrainingConfig(epochs=12, iterations_per_epoch=5, restart_epochs=4, schedule="cosine_restarts")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=20)
    expected = []
    for _ in range(60):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert _rates(config) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("epochs", "warmup", "cycles"), [(3000, 0, 15), (500, 0, 2), (500, 50, 2), (150, 0, 1), (290, 0, 1), (310, 0, 2)]
)
def test_cosine_restarts_end_with_a_whole_cycle(epochs, warmup, cycles):
    """Also where 200 epochs do not divide the run: it must not end at half the peak."""
    config = TrainingConfig(epochs=epochs, warmup_epochs=warmup, iterations_per_epoch=1)
    rates = _rates(config)[warmup:]
    assert rates[-1] < 1e-3 * config.learning_rate
    restarts = [step for step in range(1, len(rates)) if rates[step] > rates[step - 1]]
    assert restarts == pytest.approx([(epochs - warmup) * n / cycles for n in range(1, cycles)], abs=1)
    assert all(rates[step] > 0.999 * config.learning_rate for step in (0, *restarts))


def test_poly_is_nnunets():
    config = TrainingConfig(epochs=10, iterations_per_epoch=2, schedule="poly", learning_rate=1e-2)
    expected = [1e-2 * (1 - epoch / 10) ** 0.9 for epoch in range(10) for _ in range(2)]
    assert _rates(config) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine_restarts", "cosine", "poly", "one_cycle"])
def test_every_schedule_rises_to_the_peak_and_falls(schedule):
    config = TrainingConfig(epochs=20, iterations_per_epoch=10, schedule=schedule, warmup_epochs=2)
    rates = _rates(config)
    assert max(rates) == pytest.approx(config.learning_rate, rel=0.01)
    assert rates[-1] < 0.1 * config.learning_rate
    assert min(rates) >= 0
    assert rates[:20] == pytest.approx([config.learning_rate * (i + 1) / 20 for i in range(20)])


def test_recipes_honour_the_paper():
    paper = RECIPES["ukbob"]
    assert (paper.epochs, paper.restart_epochs, paper.learning_rate, paper.weight_decay) == (3000, 200, 1e-4, 1e-5)
    assert paper.loss == "bce_dice"
    tuned = recipe("swin_unetr", "ukbob", pretrained=True)
    assert (tuned.epochs, tuned.warmup_epochs) == (500, 50)


@pytest.mark.parametrize("preset", ["default", "nnunet"])
@pytest.mark.parametrize("network", ["plain_conv_unet", "residual_encoder_unet", "resenc_unet_m", "resenc_unet_xl"])
@pytest.mark.parametrize("pretrained", [False, True])
def test_nnunets_networks_get_nnunets_recipe(network, preset, pretrained):
    config = recipe(network, preset, pretrained)
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("sgd", 1e-2, 3e-5)
    assert (config.schedule, config.epochs, config.iterations_per_epoch) == ("poly", 1000, 250)
    assert config.augmentation == "strong"
    assert (config.gradient_clip, config.foreground_fraction, config.loss) == (12.0, 0.33, "ce_dice")


def test_other_networks_get_their_preset_s_recipe():
    assert recipe("swin_unetr", "nnunet") == recipe("swin_unetr", "default") == RECIPES["swin_unetr"]
    assert recipe("mine:Net", "nnunet").optimizer == "sgd"
    assert recipe("mine:Net", "default") == RECIPES["swin_unetr"]
    assert recipe("resenc_unet_l", "ukbob") == RECIPES["ukbob"]
    assert recipe("resenc_unet_l", "ukbob").augmentation == "ukbob"
    assert recipe("swin_unetr", "default").augmentation == "ukbob"


def test_config_round_trip_and_validation():
    config = TrainingConfig(epochs=3, mirror_axes=(1,))
    assert TrainingConfig.from_json(config.to_json()) == config
    for change in (
        {"epochs": 0},
        {"loss": "mse"},
        {"learning_rate": 0.0},
        {"subset_fraction": 0.0},
        {"warmup_epochs": 9},
    ):
        with pytest.raises(ConfigError):
            dataclasses.replace(config, **change)
    with pytest.raises(ConfigError, match="unknown entry momentum"):
        TrainingConfig.from_json({"momentum": 1})
