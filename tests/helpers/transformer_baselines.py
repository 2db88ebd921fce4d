"""What every transformer baseline must do: learn with all its parameters, in half precision too, element by element."""

import pytest
import torch
from torch import nn

from ukbob_seg.networks.registry import set_deep_supervision
from ukbob_seg.training.losses import SoftmaxDiceLoss, with_deep_supervision

IGNORED = 255


def image(channels, shape, batch=1, seed=1):
    """(batch, channels, *shape) of noise."""
    return torch.randn(batch, channels, *shape, generator=torch.Generator().manual_seed(seed))


def count(network):
    """Parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def outputs_and_loss(network, window):
    """Outputs, and the toolkit's loss of them against random labels."""
    outputs = network(window)
    finest = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(finest.shape[1], (len(window), *window.shape[2:]), generator=generator)
    return outputs, with_deep_supervision(SoftmaxDiceLoss(IGNORED))(outputs, labels)


def check_all_parameters_learn(network, window, expected_zero=()):
    """Every parameter moves the loss of one step with this window; those that cannot by design are named by a part."""
    network.train()
    _, loss = outputs_and_loss(network, window)
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
        if not any(part in name for part in expected_zero):
            assert parameter.grad.abs().max() > 0, f"{name} has a gradient of zero"


def check_bfloat16(network, window):
    """A training step under autocast."""
    network.train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs, loss = outputs_and_loss(network, window)
    loss.backward()
    finest = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    assert finest.dtype == torch.bfloat16
    assert finest.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def check_elements_are_independent(network, channels, shape):
    """In evaluation mode a batch gives what its elements give one by one, and the same again."""
    network.eval().double()  # in float32 rounding shows through many norms
    batch = image(channels, shape, batch=2).double()
    with torch.no_grad():
        together = network(batch)
        torch.testing.assert_close(network(batch), together, rtol=0, atol=0)
        for element in range(2):
            alone = network(batch[element : element + 1])
            torch.testing.assert_close(alone, together[element : element + 1], rtol=1e-8, atol=1e-8)
        assert (together[0] - together[1]).abs().max() > 1e-3


def check_deep_supervision(build, window, shapes):
    """A list while training, finest first, that the switch takes away and brings back; the other weights do not change.

    Args:
        build: takes ``deep_supervision`` and returns the network.
        window: its input.
        shapes: (z, y, x) of the outputs.
    """
    torch.manual_seed(0)
    plain = build(deep_supervision=False)
    torch.manual_seed(0)
    network = build(deep_supervision=True)
    assert network.deep_supervision is True
    assert plain.deep_supervision is False
    own, state = plain.state_dict(), network.state_dict()
    assert list(state)[: len(own)] == list(own)
    assert all(torch.equal(state[name], value) for name, value in own.items())
    set_deep_supervision(plain, True)  # built without the outputs that this needs
    assert isinstance(plain(window), torch.Tensor)
    outputs, loss = outputs_and_loss(network, window)
    assert [tuple(output.shape[2:]) for output in outputs] == shapes
    assert len({(output.shape[:2]) for output in outputs}) == 1
    loss.backward()
    untrained = [name for name, p in network.named_parameters() if p.grad is None]
    assert all(name.startswith(f"coarse_outs.{len(shapes) - 2}.") for name in untrained)  # the loss leaves it out
    set_deep_supervision(network, False)
    assert isinstance(network(window), torch.Tensor)
    set_deep_supervision(network, True)
    assert len(network(window)) == len(shapes)
    assert isinstance(network.eval()(window), torch.Tensor)


def check_window_errors(error, network, channels, divisor):
    """Inputs that cannot be halved, of other channels, or of a single voxel at the bottleneck."""
    with pytest.raises(error, match="needs edges divisible by"):
        network(image(channels, (2 * divisor[0], divisor[1], 2 * divisor[2] + 1)))
    with pytest.raises(error, match=rf"takes \(batch, {channels}, z, y, x\)"):
        network(image(channels + 1, [2 * n for n in divisor]))
    with pytest.raises(error, match="one voxel at the bottleneck"):
        network(image(channels, divisor))


def randomised(network, seed=3):
    """The network with noise on all parameters, so that zeros and ones hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def shapes_of(modules, run):
    """Shapes of the outputs of modules during a call."""
    seen = []
    hooks = [module.register_forward_hook(lambda m, i, output: seen.append(tuple(output.shape))) for module in modules]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def dropouts(network):
    """Rates of all dropout layers that drop something."""
    kinds = (nn.Dropout, nn.Dropout3d)
    return [module.p for module in network.modules() if isinstance(module, kinds) and module.p]
