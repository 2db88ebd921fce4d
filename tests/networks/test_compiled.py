"""Compiled networks: one graph for Swin-UNETR, the same numbers, and the network itself where compiling fails."""

import logging
import shutil

import pytest
import torch
from torch import nn

from ukbob_seg.errors import ConfigError, is_out_of_memory
from ukbob_seg.networks import compiled
from ukbob_seg.networks.compiled import CompiledNetwork, maybe_compiled
from ukbob_seg.networks.instance_norm import InstanceNorm, has_channels_last
from ukbob_seg.networks.swin_unetr import SwinUNETR

pytestmark = pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch without torch.compile")
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@pytest.fixture(autouse=True)
def fresh():
    """Every test compiles anew."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Small(nn.Module):
    """A network with random draws, running statistics, and an output that no loss need use."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Dropout(0.5))
        self.heads = nn.ModuleList([nn.Conv3d(4, 2, 1), nn.Conv3d(4, 2, 1)])

    def forward(self, image):
        if image.shape[1] != 1:
            raise ConfigError("one channel, please")
        features = self.body(image)
        return [head(features) for head in self.heads]


def _warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == compiled.__name__]


def _small():
    torch.manual_seed(0)
    return Small()


def _gradients(call, network, image):
    """Output, and gradients of the input and of all parameters."""
    image = image.clone().requires_grad_()
    output = call(image)
    output = output if isinstance(output, torch.Tensor) else torch.cat([each.flatten() for each in output])
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), [image, *network.parameters()])]


def _assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize(
    ("backend", "options"), [("eager", {"use_checkpoint": True, "deep_supervision": True}), ("aot_eager", {})]
)
def test_swin_unetr_is_one_graph_with_the_same_numbers(backend, options):
    torch.manual_seed(0)
    network = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 2, 1), window_size=4, **options)
    image = torch.randn(2, 1, 32, 32, 64)  # two, so that the maps have channels last and our own norm is in the graph
    whole = torch.compile(network, backend=backend, fullgraph=True, dynamic=False)  # raises where a graph breaks
    _assert_close(_gradients(whole, network, image), _gradients(network, network, image))


@pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler on the CPU")
def test_inductor_gives_the_same_numbers(caplog):
    torch.manual_seed(0)
    layers = nn.Conv3d(2, 4, 3, padding=1, bias=False), InstanceNorm(4, affine=True), nn.LeakyReLU(0.01)
    network = nn.Sequential(*layers)  # a bias before a norm would have no gradient but rounding
    image = torch.randn(2, 2, 8, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    assert has_channels_last(layers[0](image))  # what our own norm is for
    found = _gradients(CompiledNetwork(network, "inductor"), network, image)
    assert _warnings(caplog) == []  # did not fall back
    _assert_close(found, _gradients(network, network, image))


def test_the_network_keeps_its_names_and_weights():
    network = _small()
    names = list(network.state_dict())
    called = CompiledNetwork(network, "aot_eager")
    called(torch.randn(2, 1, 4, 4, 4))
    assert list(network.state_dict()) == names
    assert list(map(id, called.parameters())) == list(map(id, network.parameters()))
    called.eval()
    assert not network.training
    assert maybe_compiled(network, False) is network


def test_the_first_step_is_a_step_like_any_other():
    """Compiling runs the network once more: no draw, running statistic or gradient may show that."""
    network, other = _small(), _small()
    called, image = CompiledNetwork(network, "eager"), torch.randn(2, 1, 4, 4, 4)
    results = []
    for call in (called, other):
        torch.manual_seed(5)
        results.append(call(image)[0])
    assert torch.equal(*results)
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), other.buffers(), strict=True))
    assert all(parameter.grad is None for parameter in network.parameters())


def _fails_at_the_first_call(graph, inputs):
    raise RuntimeError("no compiler found\nand many more lines")


def _fails_in_the_backward_pass(graph, inputs):
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda g, i: g, bw_compiler=_fails_at_the_first_call)(graph, inputs)


@pytest.mark.parametrize(
    "backend", ["no_such_backend", _fails_at_the_first_call, _fails_in_the_backward_pass], ids=["build", "call", "back"]
)
def test_where_compiling_fails_the_network_runs_with_one_warning(backend, caplog):
    caplog.set_level(logging.WARNING, "ukbob_seg")
    network, other = _small().eval(), _small().eval()
    called, image = CompiledNetwork(network, backend), torch.randn(2, 1, 4, 4, 4)
    for _ in range(2):
        found, expected = called(image)[0], other(image)[0]
        assert torch.equal(found, expected)
        found.sum().backward()
        expected.sum().backward()
    assert torch.equal(network.body[0].weight.grad, other.body[0].weight.grad)
    (message,) = _warnings(caplog)
    assert message.startswith("the network could not be compiled and runs as it is, with the same results (")
    assert "\n" not in message


def _runs_out_of_memory(graph, inputs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_too_little_memory_is_not_the_compilers_fault(caplog):
    """The network as it is would need no less; saying that it cannot be compiled would hide the cause."""
    called = CompiledNetwork(_small().eval(), _runs_out_of_memory)
    with torch.no_grad(), pytest.raises(Exception, match="Tried to allocate") as caught:
        called(torch.randn(1, 1, 4, 4, 4))
    assert is_out_of_memory(caught.value)
    assert not called.fell_back
    assert _warnings(caplog) == []


def test_a_wrong_input_is_not_the_compilers_fault(caplog):
    called = CompiledNetwork(_small().eval(), "eager")
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(ConfigError, match="one channel"):
                called(torch.randn(1, 2, 4, 4, 4))
        called(torch.randn(1, 1, 4, 4, 4))
    assert _warnings(caplog) == []
