"""Recomputing: the same numbers, nothing kept between input and output, and the last layer not repeated."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ukbob_seg.networks import recompute
from ukbob_seg.networks.recompute import recomputed
from ukbob_seg.networks.residual_blocks import ResidualBlock
from ukbob_seg.networks.window_attention import SwinBlock


class Operators(TorchDispatchMode):
    """Counts what is executed."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def _layer():
    torch.manual_seed(0)
    convolution = nn.Conv3d(3, 2, 3, padding=1)
    return convolution, lambda x, y: convolution((x * y).exp().sin())


def test_gradients_are_the_same_bits():
    convolution, function = _layer()
    inputs = [torch.randn(2, 3, 4, 5, 6, requires_grad=True) for _ in range(2)]
    wanted = [*inputs, *convolution.parameters()]
    plain, again = function(*inputs), recomputed(function, *inputs)
    assert torch.equal(plain, again)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (plain, again)), strict=True):
        assert torch.equal(a, b)


def test_only_what_stands_before_the_last_layer_is_repeated():
    _, function = _layer()
    inputs = [torch.randn(2, 3, 4, 5, 6, requires_grad=True) for _ in range(2)]
    with Operators() as forward:
        output = recomputed(function, *inputs)
    with Operators() as backward:
        output.sum().backward()
    assert (forward.counts["convolution"], forward.counts["exp"]) == (1, 1)
    assert (backward.counts["convolution"], backward.counts["exp"]) == (0, 1)


def test_without_gradients_the_function_is_called_plainly(monkeypatch):
    """In prediction there is nothing to keep, and no machinery to pay for."""
    asked = []
    monkeypatch.setattr(recompute, "checkpoint", lambda function, *inputs, **_: asked.append(1) or function(*inputs))
    _, function = _layer()
    inputs = torch.randn(2, 1, 3, 4, 4, 4)
    with torch.no_grad():
        plain = recomputed(function, *inputs)
    assert asked == []
    assert torch.equal(recomputed(function, *inputs), plain)
    assert asked == [1]


def _kept(network, image):
    """Numbers of values of all tensors that autograd keeps outside of recomputed parts, without weights."""
    weights = {id(p) for p in network.parameters()}
    kept = {}

    def keep(tensor):
        if id(tensor) not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(image)
    return sorted(tensor.numel() for tensor in kept.values())


def test_a_residual_block_repeats_its_first_activation(monkeypatch):
    image = torch.randn(1, 4, 6, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    block = ResidualBlock(4, 8, norm_affine=False)
    calls = []
    monkeypatch.setattr(F, "leaky_relu", lambda x, *_, **__: calls.append(tuple(x.shape)) or x.clamp(min=0))
    output = block(image)
    assert len(calls) == 2
    output.sum().backward()
    assert len(calls) == 3  # the first activation once more


def test_a_transformer_block_keeps_no_hidden_map():
    block = SwinBlock(12, 3, (4, 4, 4), (0, 0, 0))
    x = torch.randn(1, 4, 4, 4, 12)
    sizes = _kept(block, x)
    assert 48 * 64 not in sizes
