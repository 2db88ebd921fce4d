"""Layers of maps with channels last against PyTorch's own in float64, which ones go another way, and whole networks."""

import pytest
import torch
from small_networks import SMALL
from torch import nn
from torch.nn import functional as F

from ukbob_seg.inference.passes import forward
from ukbob_seg.networks import quick_layers
from ukbob_seg.networks.channels_last import (
    HALF as HALVES,
)
from ukbob_seg.networks.channels_last import (
    has_channels_last,
    normalised,
    statistics,
    types_with_channels_last,
    with_channels_last,
)
from ukbob_seg.networks.convolution import quick_convolutions
from ukbob_seg.networks.recompute import recomputed
from ukbob_seg.networks.registry import build_network, set_deep_supervision
from ukbob_seg.networks.residual_blocks import Projection

CPU = torch.device("cpu")
LAST = torch.channels_last_3d
HALF = torch.bfloat16
UNIT = {torch.float32: 1e-6, HALF: 2.0**-8}  # largest relative error: of some additions, of rounding once
TYPES = pytest.mark.parametrize("dtype", [torch.float32, HALF])
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def _values(shape, seed=0):
    """What bfloat16 holds."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _found(call, dtype=HALF, network=None):
    half = dtype == HALF
    with torch.no_grad(), torch.autocast("cpu", HALF, enabled=half), quick_convolutions(CPU, network):
        return call()


def _check(found, expected, units=1.0):
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= units * UNIT[found.dtype] * expected.abs().max()


def _junk():
    """Leaves memory behind in which nothing is a number."""
    junk = [torch.full((2**n,), float("nan")) for n in range(6, 17) for _ in range(20)]
    del junk


@TYPES
@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 1, "stride": 2}, {"padding": 2, "dilation": 2}])
@pytest.mark.parametrize("shape", [(1, 5, 9, 8, 7), (2, 5, 9, 8, 7), (1, 2, 30, 32, 28)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_convolution(options, shape, layout, dtype):
    image, weight, bias = _values(shape), _values((6, shape[1], 3, 3, 3), 1), _values((6,), 2)
    expected = F.conv3d(image.double(), weight.double(), bias.double(), **options)
    image = image.to(dtype).contiguous(memory_format=layout)
    found = _found(lambda: F.conv3d(image, weight.float(), bias.float(), **options), dtype, nn.Identity())
    assert found.dtype == dtype
    assert has_channels_last(found)
    _check(found, expected)


@pytest.mark.parametrize("edge", [9, 40])
def test_the_first_convolution_gives_the_layout_of_a_single_channel(edge):
    """For PyTorch such an image has both layouts; 40: more than what PyTorch does without oneDNN."""
    image, weight = _values((1, 1, edge, 3 * edge**2 // 2, 8)).float(), _values((6, 1, 3, 3, 3), 1).float()
    assert with_channels_last(image).data_ptr() == image.data_ptr()
    found = _found(lambda: F.conv3d(image, weight, padding=1), torch.float32, nn.Identity())
    assert found.stride()[1] == 1
    _check(found, F.conv3d(image.double(), weight.double(), padding=1))


@TYPES
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("shape", [(2, 5, 4, 6, 3), (1, 3, 1, 1, 9), (1, 3, 7, 1, 1), (1, 4, 96, 96, 96)])
def test_statistics(shape, offset, dtype):
    image = (_values(shape) + offset).to(dtype).contiguous(memory_format=LAST)
    mean, variance = statistics(image)
    exact = image.double()
    assert mean.dtype == variance.dtype == torch.float64
    torch.testing.assert_close(mean, exact.mean((2, 3, 4)), rtol=2e-7, atol=2e-7)
    close = 2e-5 if offset else 2e-6  # of lanes' means of 100, rounded
    torch.testing.assert_close(variance, exact.var((2, 3, 4), correction=0), rtol=close, atol=1e-9)


@TYPES
@pytest.mark.parametrize("offset", [0.0, 8.0, 1000.0])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 4, 6, 3), (2, 5, 4, 6, 3), (1, 4, 48, 48, 48)])
def test_instance_norm(monkeypatch, shape, affine, offset, dtype):
    gone = []
    monkeypatch.setattr(quick_layers, "normalised", lambda *a: gone.append(1) or normalised(*a))
    image = (_values(shape).float() + offset).to(dtype).contiguous(memory_format=LAST)
    weight, bias = (_values((shape[1],), 1).float(), _values((shape[1],), 2).float()) if affine else (None, None)
    wide = [None if each is None else each.double() for each in (weight, bias)]
    expected = F.instance_norm(image.double(), weight=wide[0], bias=wide[1], eps=1e-4)
    found = _found(lambda: F.instance_norm(image, weight=weight, bias=bias, eps=1e-4), dtype)
    assert found.dtype == dtype
    _check(found, expected, {0.0: 1, 8.0: 2, 1000.0: 60}[offset] if dtype == torch.float32 else 1)  # 1000 is rounded
    assert gone == [1]
    assert has_channels_last(found)


@TYPES
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("offset", [0.0, 8.0])
@pytest.mark.parametrize("shape", [(2, 5, 4, 6, 3), (1, 4, 96, 96, 96)])
def test_batch_norm_by_the_batchs_own_statistics(shape, affine, offset, dtype):
    """As ETTA measures those of a case: PyTorch's own of this layout are wrong by 4e-4 at 96^3."""
    image = (_values(shape) + offset).to(dtype).contiguous(memory_format=LAST)
    layer = nn.BatchNorm3d(shape[1], affine=affine, momentum=0.3).train()
    exact = nn.BatchNorm3d(shape[1], affine=affine, momentum=0.3).double().train()
    if affine:
        for each in (layer, exact):
            each.weight.data.copy_(_values((shape[1],), 1)), each.bias.data.copy_(_values((shape[1],), 2))
    found = _found(lambda: layer(image), dtype)
    with torch.no_grad():
        _check(found, exact(image.double()), 2 if offset else 1)
    assert found.dtype == dtype
    assert has_channels_last(found)
    torch.testing.assert_close(layer.running_mean.double(), exact.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-6, atol=1e-6)
    assert layer.num_batches_tracked == 1


@TYPES
@pytest.mark.parametrize("kernel", [(2, 2, 2), (1, 2, 2), (2, 1, 3)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_transposed_convolution(monkeypatch, kernel, batch, biased, dtype):
    gone, real = [], quick_layers.placed_products
    monkeypatch.setattr(quick_layers, "placed_products", lambda *a: gone.append(1) or real(*a))
    image, weight = _values((batch, 5, 4, 6, 3)).to(dtype).contiguous(memory_format=LAST), _values((5, 4, *kernel), 1)
    bias = _values((4,), 2) if biased else None
    wide = None if bias is None else bias.double()
    expected = F.conv_transpose3d(image.double(), weight.double(), wide, stride=kernel)
    given = None if bias is None else bias.float()
    found = _found(lambda: F.conv_transpose3d(image, weight.float(), given, stride=kernel), dtype)
    assert found.dtype == dtype
    _check(found, expected, 2)  # PyTorch rounds the product once more before it adds the bias
    assert gone == [1]


@TYPES
@pytest.mark.parametrize("blocks", [(2, 2, 2), (1, 2, 2), (4, 1, 3), (1, 1, 1)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layer", [False, True])
def test_average_pool(monkeypatch, blocks, batch, layer, dtype):
    gone, real = [], quick_layers.mean_of_blocks
    monkeypatch.setattr(quick_layers, "mean_of_blocks", lambda *a: gone.append(1) or real(*a))
    image = _values((batch, 5, 8, 4, 6)).to(dtype).contiguous(memory_format=LAST)
    found = _found((lambda: nn.AvgPool3d(blocks)(image)) if layer else lambda: F.avg_pool3d(image, blocks), dtype)
    assert gone == [1]
    assert found.dtype == dtype
    assert has_channels_last(found)
    _check(found, F.avg_pool3d(image.double(), blocks), 2 if dtype == HALF else 1)


@pytest.mark.parametrize("call", [
    lambda: F.conv3d(_values((1, 1, 4, 5, 6)), _values((3, 1, 3, 3, 3), 1), padding=1),
    lambda: F.conv3d(_values((1, 4, 4, 5, 6)), _values((4, 1, 3, 3, 3), 1), padding=1, groups=4),
    lambda: F.instance_norm(_values((1, 3, 4, 4, 4)), torch.zeros(3), torch.ones(3), use_input_stats=False),
    lambda: F.conv_transpose3d(_values((1, 4, 3, 3, 3)), _values((4, 2, 3, 3, 3), 1), stride=2),
    lambda: F.conv_transpose3d(_values((1, 4, 3, 3, 3)), _values((4, 2, 2, 2, 2), 1), stride=2, groups=2),
    lambda: F.conv_transpose2d(_values((1, 4, 3, 3)), _values((4, 2, 2, 2), 1), stride=2),
    lambda: F.batch_norm(_values((1, 3, 4, 4, 4)), torch.zeros(3), torch.ones(3)),
    lambda: F.batch_norm(_values((2, 3, 4, 4)), None, None, training=True),
], ids=["one channel", "groups", "running", "overlap", "up groups", "up 2d", "stored", "2d"])  # fmt: skip
def test_the_others_are_as_ever(call):
    with torch.no_grad(), torch.autocast("cpu", HALF):
        expected = call()
    assert torch.equal(_found(call), expected)


@pytest.mark.parametrize("options", [
    {"padding": 1}, {"stride": 1}, {"divisor_override": 3}, {"kernel_size": 3}, {"kernel_size": 3, "ceil_mode": True},
])  # fmt: skip
def test_other_averages_are_as_ever(options, monkeypatch):
    monkeypatch.setattr(quick_layers, "mean_of_blocks", None)  # calling it would fail
    image = _values((1, 5, 8, 4, 6)).float().contiguous(memory_format=LAST)
    options = {"kernel_size": 2, **options}
    assert torch.equal(_found(lambda: F.avg_pool3d(image, **options), torch.float32), F.avg_pool3d(image, **options))


@TYPES
def test_gradients_go_the_usual_way(monkeypatch, dtype):
    for name in ("normalised", "placed_products", "mean_of_blocks"):
        monkeypatch.setattr(quick_layers, name, None)  # calling it would fail
    image = _values((1, 3, 6, 6, 6)).float().contiguous(memory_format=LAST).requires_grad_()
    with torch.autocast("cpu", HALF, enabled=dtype == HALF), quick_convolutions(CPU, nn.Identity()):
        maps = F.instance_norm(F.conv3d(image, _values((4, 3, 3, 3, 3), 1).float()))
        maps = F.conv_transpose3d(maps, _values((4, 2, 2, 2, 2), 2).float(), stride=2)
        F.avg_pool3d(maps.float(), 2).square().sum().backward()
    exact = image.detach().double().requires_grad_()
    maps = F.instance_norm(F.conv3d(exact, _values((4, 3, 3, 3, 3), 1).double()))
    maps = F.conv_transpose3d(maps, _values((4, 2, 2, 2, 2), 2).double(), stride=2)
    F.avg_pool3d(maps, 2).square().sum().backward()
    close = 1e-5 if dtype == torch.float32 else 0.1
    assert (image.grad - exact.grad).abs().max() < close * exact.grad.abs().max()


@pytest.mark.parametrize("name", ["unet", "attention_unet", "resunet_pp", "swin_unetr", "ux_net"])
def test_networks_keep_the_layout_and_their_numbers(name):
    arguments, patch = SMALL[name]
    torch.manual_seed(0)
    network = build_network(name, 1, 3, arguments).eval()
    set_deep_supervision(network, False)
    assert types_with_channels_last(network) == HALVES | {torch.float32}
    window, seen = torch.randn(1, 1, *patch, generator=torch.Generator().manual_seed(1)), []
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d) and layer.groups == 1 and not isinstance(layer, Projection):  # which leaves it
            layer.register_forward_hook(
                lambda _, __, output: seen.append((output[0, 0].numel(), has_channels_last(output)))
            )
    with torch.no_grad():
        found = forward(network, window)
        assert all(is_last for voxels, is_last in seen if voxels >= 64)  # of fewer PyTorch makes what it likes
        assert any(voxels >= 64 for voxels, _ in seen)
        expected = network.double()(window.double())
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("call", [
    lambda image, weight: F.conv3d(image, weight, padding=1),
    lambda image, weight: F.conv3d(image, weight[:, :1], padding=1, groups=24),
    lambda image, weight: F.conv2d(image[:, :, 0], weight[:, :, 0], padding=1),
    lambda image, weight: F.conv_transpose3d(image, weight, padding=1),
    lambda image, weight: F.conv_transpose2d(image[:, :, 0], weight[:, :, 0], padding=1),
], ids=["3d", "groups", "2d", "transposed", "transposed 2d"])  # fmt: skip
def test_gradients_of_weights_are_not_made_in_half_precision(call):
    """In which oneDNN makes some of them of memory that was never written: here nothing in it is a number."""
    image, weight = _values((1, 24, 2, 2, 2)).float(), _values((24, 24, 3, 3, 3), 1).float().requires_grad_()
    exact = weight.detach().double().requires_grad_()
    call(image.double(), exact).square().sum().backward()
    for _ in range(5):
        weight.grad = None
        _junk()
        with torch.autocast("cpu", HALF), quick_convolutions(CPU):
            result = call(image, weight)
            assert result.dtype == HALF
        _junk()
        result.float().square().sum().backward()
        assert (weight.grad - exact.grad).abs().max() < 0.02 * exact.grad.abs().max()


def test_maps_that_are_computed_again_are_of_the_same_layers():
    """An output one voxel wide is made in float32 within the context; PyTorch itself would make it in half."""
    image, weight = _values((1, 4, 6, 6, 2)).float().requires_grad_(), _values((4, 4, 3, 3, 3), 1).float()
    with torch.autocast("cpu", HALF), quick_convolutions(CPU):
        made = recomputed(lambda x: F.conv3d(x, weight, stride=2, padding=1).sin().exp(), image)
    assert made.dtype == HALF
    _junk()
    made.float().sum().backward()
    exact = image.detach().double().requires_grad_()
    F.conv3d(exact, weight.double(), stride=2, padding=1).sin().exp().sum().backward()
    assert (image.grad - exact.grad).abs().max() < 0.05 * exact.grad.abs().max()


class _Viewing(nn.Module):
    """Somebody's network, which counts on the usual layout."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv3d(2, 4, 3, padding=1)

    def forward(self, x):
        return self.convolution(x).view(len(x), -1).view(len(x), 4, *x.shape[2:])


@TYPES
def test_networks_of_others_and_group_norms_keep_the_usual_layout(dtype):
    window = torch.randn(1, 2, 8, 8, 8)
    assert types_with_channels_last(nn.Sequential(_Viewing())) == frozenset()
    with torch.no_grad(), torch.autocast("cpu", HALF, enabled=dtype == HALF):
        assert forward(nn.Sequential(_Viewing()), window).shape == (1, 4, 8, 8, 8)
    grouped = nn.Sequential(nn.Conv3d(2, 4, 3), nn.GroupNorm(2, 4))
    assert types_with_channels_last(grouped) == HALVES
