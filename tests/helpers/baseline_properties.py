"""What holds for every baseline network, whatever it computes."""

import pickle

import torch

from ukbob_seg.training.losses import SoftmaxDiceLoss, with_deep_supervision


def noise(*shape, seed=0):
    """Standard normal numbers, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def perturb(network, seed=0):
    """Move all parameters and running means, so that zeros and ones of the first day hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator)


def parameter_count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def assert_every_parameter_learns(network, shape, but=()):
    """One patch is a batch. Gradients are there for all, and different from zero but for names that end as given."""
    network.train()
    network.zero_grad()
    output = network(noise(*shape))
    (output * noise(*output.shape, seed=1)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any() or name.endswith(tuple(but)), name


def assert_elements_are_independent(network, shape):
    """Of a batch in evaluation mode."""
    network.eval()
    batch = noise(2, *shape[1:], seed=2)
    with torch.no_grad():
        both, second = network(batch), network(batch[1:])
        other = network(torch.cat([batch[:1] + 1, batch[1:]]))
    torch.testing.assert_close(both[1:], second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other[1:], second, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other[0], both[0], atol=1e-3)


def assert_pickled_and_loaded_alike(network, fresh, shape):
    """A pickled copy, and another network of the same arguments with the state dict, give the same numbers."""
    fresh.load_state_dict(network.state_dict())
    image = noise(*shape, seed=3)
    with torch.no_grad():
        expected = network.eval()(image)
        for other in (pickle.loads(pickle.dumps(network)), fresh):
            assert torch.equal(other.eval()(image), expected)


def assert_deep_supervision_trains(network, shape, scales):
    """Outputs fine to coarse in any mode, in bfloat16 nearly those of float32; the toolkit's loss takes them.

    The gradients are taken in float32: on CPUs PyTorch 2.13's bfloat16 ones of the weights are wrong where a map is
    shorter than the reach of a convolution, and training on CPUs never uses them.

    Args:
        network: built with deep supervision.
        shape: of the input; one element.
        scales: per output, by what the edges (z, y, x) are divided.

    Returns:
        Names of the parameters that the loss gives no gradient.
    """
    labels = torch.zeros(1, *shape[2:], dtype=torch.long)
    labels[:, ::2] = 1
    for train in (False, True):
        outputs = network.train(train)(noise(*shape))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rounded = network(noise(*shape))
        found = [tuple(output.shape[2:]) for output in outputs]
        assert found == [tuple(n // s for n, s in zip(shape[2:], scale, strict=True)) for scale in scales]
        for output, other in zip(outputs, rounded, strict=True):
            assert other.dtype == torch.bfloat16
            assert (other - output).norm() < 0.1 * output.norm()
    with_deep_supervision(SoftmaxDiceLoss(255))(outputs, labels).backward()
    missing = {name for name, p in network.named_parameters() if p.grad is None}
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    network.deep_supervision = False
    with torch.no_grad():
        assert isinstance(network.eval()(noise(*shape)), torch.Tensor)
    return missing
