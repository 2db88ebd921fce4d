"""ETTA: entropy against closed forms, only norm layers move, everything is restored."""

import math

import pytest
import torch
from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.etta import adapt, adapted, choose_share, norm_layers
from ukbob_seg.inference.etta_config import EttaConfig
from ukbob_seg.inference.etta_entropy import OutputMeaning, possible_foreground, voxel_entropy
from ukbob_seg.inference.etta_windows import spread_corners
from ukbob_seg.inference.sliding_window import WindowSettings

WINDOWS = WindowSettings((8, 8, 8))
SOFTMAX = OutputMeaning()


def _network(norm, outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1), norm, nn.ReLU(), nn.Dropout(0.5), nn.Conv3d(6, outputs, 1)
    ).eval()


NORMS = {
    "batch": lambda: nn.BatchNorm3d(6),
    "instance": lambda: nn.InstanceNorm3d(6, affine=True),
    "group": lambda: nn.GroupNorm(2, 6),
}


@pytest.fixture
def image():
    return torch.randn(1, 12, 10, 9, generator=torch.Generator().manual_seed(1)) * 2 + 1


def test_entropy_closed_forms():
    assert torch.allclose(voxel_entropy(torch.zeros(1, 4, 1, 1, 1), "softmax"), torch.tensor(math.log(4)))
    assert torch.allclose(voxel_entropy(torch.zeros(1, 4, 1, 1, 1), "sigmoid"), torch.tensor(4 * math.log(2)))
    sure = torch.tensor([100.0, -100, -100]).view(1, 3, 1, 1, 1)
    assert voxel_entropy(sure, "softmax").item() == pytest.approx(0, abs=1e-6)
    assert voxel_entropy(sure, "sigmoid").item() == pytest.approx(0, abs=1e-6)
    logits = torch.randn(2, 5, 2, 3, 4)
    reference = torch.distributions.Categorical(logits=logits.movedim(1, -1)).entropy()
    assert torch.allclose(voxel_entropy(logits, "softmax"), reference, atol=1e-6)
    binary = torch.distributions.Bernoulli(logits=logits).entropy().sum(1)
    assert torch.allclose(voxel_entropy(logits, "sigmoid"), binary, atol=1e-5)
    assert voxel_entropy(logits.half(), "softmax").dtype == torch.float32


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm", NORMS)
def test_entropy_falls_and_only_norm_layers_move(image, norm, head):
    network = _network(NORMS[norm]())
    own, record = adapt(
        network, image, WINDOWS, OutputMeaning(head), EttaConfig(steps=8, learning_rate=0.02, max_patches=4)
    )
    assert record.decision == "adapted"
    assert record.steps >= 1
    moved = {name for (name, a), (_, b) in zip(own.named_parameters(), network.named_parameters(), strict=True)
             if not torch.equal(a, b)}  # fmt: skip
    assert moved == {"1.weight", "1.bias"}
    if norm != "batch":  # with BatchNorm the statistics step alone may raise the entropy first
        assert record.entropy_after < record.entropy_before
    assert record.patches == 4
    assert not own.training


def test_the_network_is_restored_bit_for_bit(image):
    network = _network(NORMS["batch"]())
    network[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plain = network(image[None])
    with adapted(network, image, WINDOWS, SOFTMAX):
        inside = network(image[None])
        assert not torch.equal(inside, plain)
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(network(image[None]), plain)
    assert not network[0].weight.requires_grad
    assert network[1].weight.requires_grad
    assert network[1].momentum == 0.1
    assert all(p.grad is None for p in network.parameters())


def test_restored_even_when_prediction_fails(image):
    network = _network(NORMS["instance"]())
    before = network[1].weight.detach().clone()
    with pytest.raises(ZeroDivisionError), adapted(network, image, WINDOWS, SOFTMAX):
        raise ZeroDivisionError
    assert torch.equal(network[1].weight, before)


def test_order_of_cases_does_not_matter(image):
    network = _network(NORMS["batch"]())

    def predict(case):
        with adapted(network, case, WINDOWS, SOFTMAX), torch.no_grad():
            return network(case[None])

    first, other = predict(image), predict(image * 3)
    assert torch.equal(predict(image * 3), other)
    assert torch.equal(predict(image), first)


def test_statistics_are_those_of_the_case():
    """One window that covers the image: running statistics must equal the layer's input statistics."""
    network = _network(nn.BatchNorm3d(6))
    image = torch.randn(1, 8, 8, 8) * 5 - 2
    whole = EttaConfig(steps=1, learning_rate=1e-9, statistics_share=1.0)
    own, record = adapt(network, image, WINDOWS, SOFTMAX, whole)
    features = network[0](image[None])
    assert record.statistics_layers == 1
    assert torch.allclose(own[1].running_mean, features.mean((0, 2, 3, 4)), atol=1e-5)
    assert torch.allclose(own[1].running_var, features.var((0, 2, 3, 4)), rtol=1e-4)
    half, _ = adapt(network, image, WINDOWS, SOFTMAX, EttaConfig(steps=1, learning_rate=1e-9, statistics_share=0.5))
    assert torch.allclose(half[1].running_mean, own[1].running_mean / 2, atol=1e-5)


def test_nothing_to_adapt_is_an_error(image):
    for norm in (nn.Identity(), nn.InstanceNorm3d(6, affine=False)):
        with pytest.raises(ConfigError, match="nothing for --etta to adapt"):
            adapt(_network(norm), image, WINDOWS, SOFTMAX)


def test_collapse_falls_back(image):
    """A rate so high that everything becomes background must leave the trained weights in place."""
    network = _network(NORMS["instance"]())
    with torch.no_grad():
        network[4].bias.copy_(torch.tensor([1.5, 0.0, 0.0]))
    own, record = adapt(network, image, WINDOWS, SOFTMAX, EttaConfig(
        steps=30, learning_rate=0.5, least_foreground=1.0, most_drift=math.inf
    ))  # fmt: skip
    if record.foreground_after < record.foreground_before:
        assert record.decision.startswith("fell back")
        assert record.steps == 0
        assert torch.equal(own[1].weight, network[1].weight)
        assert record.voxels_changed == 0
    else:
        pytest.fail("the case was meant to collapse")


def test_candidates_are_spread_over_all_axes():
    starts = [list(range(0, 406, 45)), [0, 21, 42, 64], [0, 32, 64, 128]]
    chosen = spread_corners(starts, 6)
    assert len({z for z, _, _ in chosen}) == len({(y, x) for _, y, x in chosen}) == len(chosen) == 6
    assert sum(y in (21, 42) and x in (32, 64) for _, y, x in chosen) == 4
    assert {starts[0].index(z) // 5 for z, _, _ in chosen} == {0, 1}
    assert spread_corners([[0, 5], [0], [0, 3, 6]], 6) == [(z, 0, x) for z in (0, 5) for x in (0, 3, 6)]
    assert len(set(spread_corners([[0], [0, 1, 2], [0, 1, 2]], 4))) == 4
    assert len(set(spread_corners([[0, 1], [0, 1, 2], [0, 1]], 11))) == 11
    assert spread_corners([[0, 1, 2, 3], [0], [0]], 2) == [(1, 0, 0), (3, 0, 0)]


@pytest.mark.parametrize("norm", NORMS)
def test_the_steps_end_before_the_foreground_drifts_away(image, norm):
    """The steps that are kept are the first of those without a limit, up to the last within it."""
    network = _network(NORMS[norm]())
    steps = {"learning_rate": 0.03, "certain_background": 1.0, "max_patches": 1}

    def run(count, drift):
        return adapt(network, image, WINDOWS, SOFTMAX, EttaConfig(steps=count, most_drift=drift, **steps))

    _, start = run(0, 0.0)
    reached = [abs(run(count, math.inf)[1].foreground_after / start.foreground_after - 1) for count in range(1, 31)]
    assert reached[-1] > 0.1  # so there is something to end
    within = next(n for n, drift in enumerate(reached) if drift > 0.1)  # steps before the first that goes too far
    own, record = run(30, 0.1)
    assert record.steps == within
    expected, _ = run(within, math.inf)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), expected.parameters(), strict=True))
    everything = EttaConfig(stop_early=False, steps=30, most_drift=math.inf, **steps)
    assert adapt(network, image, WINDOWS, SOFTMAX, everything)[1].steps == 30


def test_layer_norm_counts():
    assert len(norm_layers(nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False)))) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -1}, {"learning_rate": 0.0}, {"statistics_share": 1.5}, {"candidates": 1, "max_patches": 2},
{"certain_background": 0.0}, {"certain_background": 1.1}, {"least_field_gain": -0.1},
        {"least_field_spread": -1.0}, {"field_margin": -1.0}, {"most_drift": -0.1}, {"most_drift": math.nan},
        {"least_foreground": -0.1},
    ],
)  # fmt: skip
def test_bad_configurations(change):
    with pytest.raises(ConfigError):
        EttaConfig(**change)


def test_regions_have_no_background_channel(image):
    """Channel 0 of a region head is a region; nothing is background only where no region is positive."""
    meaning = OutputMeaning("sigmoid", has_regions=True)
    logits = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [1.0, 2.0]]).view(3, 2, 1, 1, 1)
    assert meaning.decide(logits).ravel().tolist() == [1, 0, 2]
    assert OutputMeaning("sigmoid").decide(logits).ravel().tolist() == [0, 0, 1]
    _, record = adapt(_network(NORMS["instance"](), outputs=2), image, WINDOWS, meaning, EttaConfig(steps=1))
    assert record.foreground_before > 0


def test_the_papers_recipe_takes_every_step_and_undoes_nothing(image):
    """Also where the entropy rises and the foreground collapses, which the guarded mode prevents."""
    network = _network(NORMS["instance"]())
    with torch.no_grad():
        network[4].bias.copy_(torch.tensor([1.5, 0.0, 0.0]))
    wild = {"steps": 30, "learning_rate": 0.5}
    own, record = adapt(network, image, WINDOWS, SOFTMAX, EttaConfig.of_mode("paper", **wild))
    assert (record.mode, record.decision, record.steps) == ("paper", "adapted", 30)
    assert record.foreground_after < record.foreground_before
    assert not torch.equal(own[1].weight, network[1].weight)
    _, guarded = adapt(network, image, WINDOWS, SOFTMAX, EttaConfig(**wild))
    assert (guarded.decision, guarded.steps) == (
        "unchanged: no step lowered the entropy and kept the foreground",
        0,
    )


def test_statistics_alone(image):
    network = _network(NORMS["batch"]())
    own, record = adapt(network, image, WINDOWS, SOFTMAX, EttaConfig.of_mode("paper", steps=0))
    assert (record.steps, record.statistics_share) == (0, 1.0)
    assert torch.equal(own[1].weight, network[1].weight)
    assert not torch.equal(own[1].running_mean, network[1].running_mean)
    _, none = adapt(_network(NORMS["instance"]()), image, WINDOWS, SOFTMAX, EttaConfig(steps=0))
    assert none.decision == "unchanged: no steps, and no statistics"
    assert none.voxels_changed == 0


def test_unknown_modes_are_refused():
    with pytest.raises(ConfigError, match="--etta-mode must be one of guarded, paper, got 'plain'"):
        EttaConfig.of_mode("plain")
    assert EttaConfig.of_mode("paper", steps=None, learning_rate=0.1).learning_rate == 0.1
    assert EttaConfig.of_mode("guarded") == EttaConfig()
    assert (EttaConfig().mode, EttaConfig.of_mode("paper").mode) == ("guarded", "paper")


def test_distant_cases_take_more_of_their_own_statistics(image):
    shares = [choose_share(distance) for distance in (0.0, 0.002, 0.005, 0.008, 0.01, 1.0)]
    assert shares == pytest.approx([0.25, 0.25, 0.5, 0.8, 1.0, 1.0])
    network = _network(NORMS["batch"]())
    network.train()
    for _ in range(60):  # statistics of such images
        network(image[None] + 0.01 * torch.randn(1, *image.shape))
    network.eval()
    _, near = adapt(network, image[:, :8, :8, :8], WINDOWS, SOFTMAX)
    _, far = adapt(network, 5 * image[:, :8, :8, :8] + 3, WINDOWS, SOFTMAX)
    assert near.statistics_distance < far.statistics_distance
    assert far.statistics_share == 1.0
    assert near.statistics_share == choose_share(near.statistics_distance)
    _, instance = adapt(_network(NORMS["instance"]()), image, WINDOWS, SOFTMAX)
    assert instance.statistics_distance is instance.statistics_share is None


def test_voxels_of_certain_background_do_not_count(image):
    """Entropy of two voxels only: the others may become as uncertain as they like."""
    logits = torch.tensor([[4.0, 0, 0], [0.0, 1, 0], [2.9, 0, -9]]).T.reshape(1, 3, 3, 1, 1)
    counted = possible_foreground(logits, SOFTMAX, 0.95)
    assert (
        counted.flatten().tolist() == [bool(p < 0.95) for p in logits.softmax(1)[0, 0].flatten()] == [False, True, True]
    )
    regions = OutputMeaning("sigmoid", has_regions=True)
    assert possible_foreground(
        torch.tensor([[-4.0, -2.0], [-4.0, -4.0]]).T.reshape(1, 2, 2, 1, 1), regions, 0.95
    ).flatten().tolist() == [True, False]


def test_the_steps_lower_the_entropy_of_the_voxels_that_count():
    """A network that is sure of background almost everywhere: one step with each objective, against its gradient."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.GroupNorm(1, 1), nn.Conv3d(1, 2, 1)).eval()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([-0.3, 0.3]).view(2, 1, 1, 1, 1))
        network[1].bias.copy_(torch.tensor([0.6, -0.6]))
    image = torch.randn(1, 8, 8, 8)
    logits = network(image[None])
    counted = logits.softmax(1)[:, 0] < 0.5
    assert 0.002 < counted.float().mean() < 0.8
    signs = []
    for limit, voxels in ((0.5, counted), (1.0, torch.ones_like(counted))):
        value = voxel_entropy(network(image[None]), "softmax")[voxels].mean()
        gradient = torch.autograd.grad(value, network[0].bias)[0]
        config = EttaConfig.of_mode("paper", steps=1, learning_rate=0.01, certain_background=limit)
        own, _ = adapt(network, image, WINDOWS, SOFTMAX, config)
        assert own[0].bias.item() == pytest.approx(-0.01 * gradient.sign().item(), rel=1e-3)  # Adam's first step
        signs.append(gradient.sign().item())
    assert signs == [-1, 1]  # over all voxels background pulls the other way


def test_without_any_possible_foreground_nothing_moves():
    network = nn.Sequential(nn.GroupNorm(1, 1), nn.Conv3d(1, 2, 1)).eval()
    with torch.no_grad():
        network[1].bias.copy_(torch.tensor([50.0, -50.0]))
    own, record = adapt(network, torch.randn(1, 8, 8, 8), WINDOWS, SOFTMAX)
    assert record.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), network.parameters(), strict=True))


def test_the_rate_depends_on_stored_statistics():
    assert EttaConfig().rate(True) < EttaConfig().rate(False)
    assert EttaConfig(learning_rate=0.1).rate(True) == EttaConfig(learning_rate=0.1).rate(False) == 0.1
