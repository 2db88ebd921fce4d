"""The networks as the toolkit calls them: logits that repeat, gradients, shapes, arguments."""

import pytest
import torch
from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.etta import EttaConfig, OutputMeaning, adapted, norm_layers
from ukbob_seg.inference.sliding_window import WindowSettings, predict_logits
from ukbob_seg.networks.compiled import CompiledNetwork
from ukbob_seg.networks.diffusion import DiffusionNetwork, set_head
from ukbob_seg.networks.diffusion.network import Denoiser, Sampling
from ukbob_seg.networks.registry import NETWORKS, build_network, check_patch
from ukbob_seg.networks.wrappers import unwrapped

SMALL = {"features_per_stage": [4, 8, 12], "blocks_per_stage": 1, "steps": 20, "sampling_steps": 2}
ARGUMENTS = {
    "medsegdiff_v1": {**SMALL, "image_size": [8, 8, 8]},
    "medsegdiff_v2": {**SMALL, "former_blocks": 1, "filter_blocks": 1, "filter_width": 2},
}
BOTH = pytest.mark.parametrize("name", ARGUMENTS)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _build(name, in_channels=1, outputs=3, **more):
    """A network whose zeroed layers are not, as after some training."""
    torch.manual_seed(0)
    network = build_network(name, in_channels, outputs, {**ARGUMENTS[name], **more})
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=_generator()) * 0.1)
    return network.eval()


def _image(batch=1, channels=1, shape=(8, 8, 8), seed=0):
    return torch.randn(batch, channels, *shape, generator=_generator(seed))


class _Known(Denoiser):
    """Knows the map: its answer is the noise that must have been added, or that noise's velocity."""

    def __init__(self, probability, schedule_of):
        super().__init__()
        self.clean, self.schedule_of = probability * 2 - 1, schedule_of

    def condition(self, image):
        return image, None

    def forward(self, noisy, time, condition):
        schedule, sampling = self.schedule_of[0].schedule, self.schedule_of[0].sampling
        step = (time * schedule.steps / 1000).round().long()
        clean = sampling.label_scale * self.clean.expand_as(noisy)
        noise = schedule.noise(noisy, step, clean)
        return noise if sampling.target == "noise" else schedule.velocity(clean, step, noise)


@pytest.mark.parametrize("target", ["noise", "velocity"])
@pytest.mark.parametrize("scale", [1.0, 0.2])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_logits_are_those_of_the_probabilities_that_the_denoiser_sees(head, scale, target):
    probability = torch.tensor([0.7, 0.2, 0.1]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 2, 2).clone()
    probability[..., 1] = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    itself = []
    sampling = Sampling(steps=20, sampling_steps=5, samples=2, label_scale=scale, target=target)
    network = DiffusionNetwork(_Known(probability, itself), 3, sampling)
    itself.append(network)
    set_head(network, head)
    logits = network(torch.zeros(2, 1, 2, 2, 2))
    found = logits.softmax(1) if head == "softmax" else logits.sigmoid()
    assert torch.isfinite(logits).all()
    assert torch.allclose(found, probability.expand_as(found), atol=1e-3)


@BOTH
def test_predictions_repeat_in_whatever_batches(name):
    network, image = _build(name, eta=0.5, samples=2), _image(3)
    with torch.no_grad():
        torch.manual_seed(1)
        first = network(image)
        torch.manual_seed(2)
        assert torch.equal(network(image), first)
        single = torch.cat([network(one[None]) for one in image])
    assert first.shape == (3, 3, 8, 8, 8)
    assert torch.allclose(single.softmax(1), first.softmax(1), atol=1e-3)  # the first steps amplify rounding
    other = _build(name, eta=0.5, samples=2, seed=5)
    with torch.no_grad():
        assert not torch.allclose(other(image), first, atol=1e-2)


@BOTH
def test_samples_are_averaged_as_probabilities(name):
    image = _image()
    with torch.no_grad():
        one, two = (_build(name, seed=seed)(image).softmax(1) for seed in (3, 4))
        both = _build(name, seed=3, samples=2)(image).softmax(1)
    assert torch.allclose(both, (one + two) / 2, atol=1e-5)


@BOTH
def test_more_steps_and_ancestral_noise_act(name):
    image = _image()
    with torch.no_grad():
        plain = _build(name)(image)
        assert not torch.allclose(_build(name, sampling_steps=20)(image), plain, atol=1e-2)
        assert not torch.allclose(_build(name, eta=1.0)(image), plain, atol=1e-2)


@BOTH
def test_the_image_and_every_channel_of_it_matter(name):
    network, image = _build(name, in_channels=2), _image(channels=2)
    with torch.no_grad():
        before = network(image)
        for channel in (0, 1):
            changed = image.clone()
            changed[:, channel] += torch.randn(8, 8, 8, generator=_generator(7))
            assert not torch.allclose(network(changed), before, atol=1e-3)


@BOTH
def test_every_parameter_learns(name):
    """One training call of many elements, with every one of the condition model's steps."""
    network = _build(name, **({"condition_interval": 1} if name == "medsegdiff_v2" else {})).train()
    clean = torch.where(_image(4, 3, seed=1) > 0, 1.0, -1.0)
    torch.manual_seed(0)
    found = network(_image(4), clean)
    assert found.predicted.shape == found.target.shape == clean.shape
    assert ((found.step >= 0) & (found.step < 20)).all()
    assert (found.condition is None) == (name == "medsegdiff_v1")
    loss = (found.predicted - found.target).square().mean()
    if found.condition is not None:
        assert found.condition.shape == clean.shape
        loss = loss + found.condition.square().mean()
    loss.backward()
    silent = [
        key for key, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent == []


@BOTH
def test_a_fresh_network_predicts_no_noise(name):
    torch.manual_seed(0)
    network = build_network(name, 1, 3, ARGUMENTS[name])
    assert not network(_image(), torch.ones(1, 3, 8, 8, 8)).predicted.any()


@BOTH
def test_noise_is_added_to_maps_of_the_labels_scale(name):
    clean, seen = torch.where(_image(2, 3) > 0, 1.0, -1.0), []
    for scale in (1.0, 0.25):
        network = _build(name, label_scale=scale)
        network.denoiser.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        torch.manual_seed(1)
        found = network(_image(2), clean)
    bar = network.schedule.alpha_bar(found.step, clean)
    assert torch.allclose(seen[0] - seen[1], 0.75 * bar.sqrt() * clean, atol=1e-5)


@BOTH
def test_what_is_to_be_predicted(name):
    """Noise, or its velocity v = sqrt(abar) e - sqrt(1 - abar) x, from the same draws."""
    clean, found = torch.where(_image(2, 3) > 0, 1.0, -1.0), {}
    for target in ("noise", "velocity"):
        network = _build(name, target=target, label_scale=0.5)
        torch.manual_seed(1)
        found[target] = network(_image(2), clean)
    noise, bar = found["noise"].target, network.schedule.alpha_bar(found["noise"].step, clean)
    assert torch.equal(found["noise"].predicted, found["velocity"].predicted)
    assert torch.allclose(found["velocity"].target, bar.sqrt() * noise - (1 - bar).sqrt() * 0.5 * clean, atol=1e-6)


@BOTH
def test_training_noise_comes_from_the_global_generator(name):
    network, clean = _build(name, target="noise"), torch.ones(2, 3, 8, 8, 8)
    torch.manual_seed(1)
    first = network(_image(2), clean)
    torch.manual_seed(1)
    again = network(_image(2), clean)
    other = network(_image(2), clean)
    assert torch.equal(first.target, again.target)
    assert torch.equal(first.step, again.step)
    assert not torch.equal(first.target, other.target)
    assert abs(float(first.target.std()) - 1) < 0.1


@BOTH
def test_entropy_reaches_the_norm_layers_through_the_last_step_alone(name):
    network, calls = _build(name, sampling_steps=4), []
    network.denoiser.register_forward_hook(lambda module, given, result: calls.append(result.requires_grad))
    logits = network(_image())
    assert calls == [False, False, False, True]
    p = logits.softmax(1)
    (-(p * p.log()).sum(1).mean()).backward()
    reached = [layer for layer in norm_layers(network) if layer.weight.grad is not None and layer.weight.grad.any()]
    assert len(reached) == len(norm_layers(network))
    assert all(isinstance(layer, nn.GroupNorm | nn.LayerNorm) for layer in reached)


@BOTH
def test_adaptation_lowers_the_entropy_and_is_undone(name):
    network, image = _build(name), _image(shape=(8, 8, 12))[0]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    windows = WindowSettings((8, 8, 8))
    limits = EttaConfig(learning_rate=1e-4, certain_background=1.0, least_foreground=0.0, most_drift=10.0)
    with adapted(network, image, windows, OutputMeaning("softmax"), limits) as record:
        inside = predict_logits(network, image, windows)
    assert record.steps > 0
    assert record.entropy_after < record.entropy_before
    assert not torch.allclose(inside, predict_logits(network, image, windows))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@BOTH
def test_it_predicts_by_windows(name):
    network, image = _build(name), _image(shape=(12, 8, 10))[0]
    logits = predict_logits(network, image, WindowSettings((8, 8, 8), batch_size=2))
    assert logits.shape == (3, 12, 8, 10)
    assert torch.isfinite(logits).all()


@BOTH
def test_a_cascade_passes_the_clean_map_on(name):
    torch.manual_seed(0)
    network = build_network(name, 1, 3, {**ARGUMENTS[name], "previous_labels": 2})
    image = torch.cat([_image(), torch.randint(0, 3, (1, 1, 8, 8, 8)).float()], dim=1)
    assert network(image).shape == (1, 3, 8, 8, 8)
    assert network(image, torch.ones(1, 3, 8, 8, 8)).predicted.shape == (1, 3, 8, 8, 8)
    set_head(network, "sigmoid")
    assert unwrapped(network).head == "sigmoid"


def test_compiled_it_is_the_same():
    network = _build("medsegdiff_v1", features_per_stage=[4, 8, 8]).train()
    compiled, clean = CompiledNetwork(network, "eager"), torch.ones(2, 3, 8, 8, 8)
    torch.manual_seed(1)
    expected = network(_image(2), clean)
    torch.manual_seed(1)
    found = compiled(_image(2), clean)
    assert torch.allclose(found.predicted, expected.predicted, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(compiled(_image(2)), network(_image(2)), atol=1e-5)
    assert not compiled.fell_back


FULL = {"medsegdiff_v1": (35_370_307, [32, 64, 128]), "medsegdiff_v2": (73_420_469, [32, 64, 128, 256, 320])}


@BOTH
def test_the_full_networks_by_shape(name):
    """Without memory: parameters, and what each stage of the noisy map's encoder gives."""
    parameters, features = FULL[name]
    with torch.device("meta"):
        network = build_network(name, 1, 3, {})
        assert sum(parameter.numel() for parameter in network.parameters()) == parameters
        seen = []
        encoder = getattr(network.denoiser, "of_noisy", None) or network.denoiser.encoder
        encoder.register_forward_hook(lambda module, given, result: seen.extend(result))
        for stage in encoder.stages:
            stage.register_forward_hook(lambda module, given, result: seen.append(result))
        found = network(torch.zeros(1, 1, 96, 96, 96), torch.zeros(1, 3, 96, 96, 96))
    assert found.predicted.shape == (1, 3, 96, 96, 96)
    edges = [96, 48, 24, 12, 6][: len(features)]
    assert [tuple(x.shape[1:]) for x in seen[: len(features)]] == [
        (width, edge, edge, edge) for width, edge in zip(features, edges, strict=True)
    ]


def test_the_first_version_has_resnet34s_blocks():
    with torch.device("meta"):
        denoiser = build_network("medsegdiff_v1", 1, 2, {}).denoiser
    for encoder in (denoiser.of_image, denoiser.of_noisy):
        assert [len(stage) for stage in encoder.stages] == [3, 4, 6]
    assert len(denoiser.last) == 3
    assert [encoding.parser.size for encoding in denoiser.encodings] == [(48, 48, 48), (24, 24, 24)]


def test_patches_must_be_divisible():
    assert NETWORKS["medsegdiff_v1"].divisor({}) == (8, 8, 8)
    assert NETWORKS["medsegdiff_v2"].divisor({}) == (16, 16, 16)
    assert NETWORKS["medsegdiff_v2"].divisor(SMALL) == (4, 4, 4)
    with pytest.raises(ConfigError, match=r"divisible by \(8, 8, 8\)"):
        check_patch("medsegdiff_v1", {}, (40, 56, 36))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("medsegdiff_v1", {"width": 3}, "cannot be built with"),
        ("medsegdiff_v1", {"features_per_stage": [4, 8]}, "features_per_stage must be 3 or more"),
        ("medsegdiff_v1", {"blocks_per_stage": [1, 2]}, "blocks_per_stage must be a positive number, or 4"),
        ("medsegdiff_v1", {"image_size": [96, 96, 90]}, "three multiples of 8"),
        ("medsegdiff_v2", {"filter_width": 0}, "must be positive"),
        ("medsegdiff_v2", {"condition_interval": 0}, "condition_interval must be"),
        ("medsegdiff_v2", {"cross_entropy_weight": -1.0}, "cross_entropy_weight must not be negative"),
        ("medsegdiff_v2", {"sampling_steps": 1001}, "at least 1 and at most 1000"),
        ("medsegdiff_v2", {"samples": 0}, "samples must be"),
        ("medsegdiff_v2", {"seed": 1.5}, "seed must be"),
        ("medsegdiff_v2", {"eta": 2.0}, r"eta must lie in \[0, 1\]"),
        ("medsegdiff_v1", {"label_scale": 0.0}, r"label_scale must lie in \(0, 1\]"),
        ("medsegdiff_v2", {"target": "map"}, "target must be noise or velocity, got 'map'"),
    ],
)
def test_wrong_arguments_are_explained(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_network(name, 1, 2, arguments)
