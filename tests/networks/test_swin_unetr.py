"""Our Swin-UNETR against MONAI's: same names, same shapes, same numbers, same gradients."""

import pytest
import torch
from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.instance_norm import InstanceNorm, has_channels_last
from ukbob_seg.networks.registry import set_deep_supervision
from ukbob_seg.networks.swin_unetr import SkipBlock, SwinUNETR
from ukbob_seg.networks.window_attention import (
    MERGING_ORDERS,
    DropPath,
    PatchMerging,
    WindowAttention,
    _BiasedAttention,
    fit_window,
    merge_windows,
    partition_windows,
    shift_mask,
)
from ukbob_seg.training.losses import SoftmaxDiceLoss, with_deep_supervision

nets = pytest.importorskip("monai.networks.nets")
pytest.importorskip("einops", reason="MONAI's Swin-UNETR needs einops")


def _pair(in_channels=1, out_channels=3, norm_affine=False, patch_merging="distinct", **options):
    """Ours and MONAI's with the same random weights; norms and position biases too, so that a wrong one would show."""
    torch.manual_seed(0)
    given = {"feature_size": 12, **options}
    norm = ("instance", {"affine": norm_affine})
    reference = nets.SwinUNETR(in_channels, out_channels, norm_name=norm, **given)
    for name, parameter in reference.named_parameters():
        if "bias_table" in name or "norm" in name:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.5)
    ours = SwinUNETR(in_channels, out_channels, norm_affine=norm_affine, patch_merging=patch_merging, **given)
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def _outputs_and_gradients(network, image):
    """Output, and by name the gradients of the input and of all parameters, for a loss that tells voxels apart."""
    image = image.clone().requires_grad_()
    output = network(image)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    gradients = torch.autograd.grad((output * weights).sum(), [image, *network.parameters()])
    return output.detach(), dict(zip(["image", *dict(network.named_parameters())], gradients, strict=True))


def _assert_close(found, expected, tolerance, name):
    """The largest difference, relative to the largest value of the tensor."""
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{name}: {error:.2e}"


def _as_before_the_fix(self, x):
    """MONAI's ``PatchMerging.forward`` until #8285, written out (its edges here are even)."""
    parts = [
        x[:, 0::2, 0::2, 0::2], x[:, 1::2, 0::2, 0::2], x[:, 0::2, 1::2, 0::2], x[:, 0::2, 0::2, 1::2],
        x[:, 1::2, 0::2, 1::2], x[:, 0::2, 1::2, 0::2], x[:, 0::2, 0::2, 1::2], x[:, 1::2, 1::2, 1::2],
    ]  # fmt: skip
    return self.reduction(self.norm(torch.cat(parts, -1)))


# Windows of 7, 5 and 3 divide no map and are padded, or cut where a map is smaller; those of 4 divide the maps. Batches
# of two reach channels last, as large maps do (PyTorch gives small single ones to another convolution).
CONFIGURATIONS = {
    "default": ((1, 1, 32, 32, 64), {}),
    "affine": ((2, 4, 32, 64, 32), {"in_channels": 4, "out_channels": 5, "feature_size": 24, "norm_affine": True,
                                    "window_size": 5}),
    "legacy": ((2, 2, 32, 32, 64), {"in_channels": 2, "out_channels": 2, "patch_merging": "legacy", "window_size": 3}),
    "dividing": ((1, 1, 32, 32, 64), {"out_channels": 2, "window_size": 4}),
    "depths": ((2, 3, 64, 32, 32), {"in_channels": 3, "out_channels": 1, "depths": (1, 2, 3, 2),
                                    "num_heads": (2, 4, 6, 8), "mlp_ratio": 2.0, "qkv_bias": False, "window_size": 5}),
}  # fmt: skip


@pytest.mark.parametrize("name", ["default", "affine", "depths"])
def test_output_and_gradients_equal_monai_in_float64(name):
    """Rounding puts a few activations on the other side of a leaky ReLU's kink: in float32 single gradients jump."""
    shape, options = CONFIGURATIONS[name]
    ours, reference = _pair(**options)
    image = torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(2))
    expected, expected_gradients = _outputs_and_gradients(reference.double(), image.double())
    found, gradients = _outputs_and_gradients(ours.double(), image.double())
    _assert_close(found, expected, 1e-10, "output")
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in gradients.items():
        _assert_close(gradient, expected_gradients[key], 1e-8, key)


def test_our_own_norm_gives_monais_gradients_in_float64(monkeypatch):
    """No convolution in float64 leaves channels last, so that they are put there."""
    original, calls = InstanceNorm.forward, []

    def with_channels_last(self, x):
        calls.append(x.shape)
        return original(self, x.contiguous(memory_format=torch.channels_last_3d))

    monkeypatch.setattr(InstanceNorm, "forward", with_channels_last)
    test_output_and_gradients_equal_monai_in_float64("affine")
    assert len(calls) >= 26


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("name", ["affine", "legacy", "depths"])
def test_batches_of_two_take_our_own_norm(name, monkeypatch):
    """Else the comparisons with MONAI would pass it by."""
    shape, options = CONFIGURATIONS[name]
    layouts = []
    original = InstanceNorm.forward
    monkeypatch.setattr(
        InstanceNorm, "forward", lambda self, x: (layouts.append(has_channels_last(x)), original(self, x))[1]
    )
    with torch.no_grad():
        SwinUNETR(**{"in_channels": 1, "out_channels": 3, "feature_size": 12, **options})(torch.randn(shape))
    assert sum(layouts) >= 20  # all 26, but for those after 1x1x1 convolutions on a single thread


def _smooth(x, slope=0.01, inplace=False):
    """A leaky ReLU without kink."""
    return slope * x + (1 - slope) * nn.functional.softplus(x, beta=4)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_output_equals_monais_and_gradients_where_nothing_has_a_kink(name, monkeypatch):
    """In float32; with leaky ReLUs the output too, and the gradients as one vector.

    A voxel that rounding puts on the other side of a kink changes single gradients of the first layers by percents, and
    the vector by 1e-3: these images have few.
    """
    shape, options = CONFIGURATIONS[name]
    if options.get("patch_merging") == "legacy":
        monkeypatch.setattr("monai.networks.nets.swin_unetr.PatchMerging.forward", _as_before_the_fix)
    ours, reference = _pair(**options)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(3 if name == "affine" else 2))
    expected, expected_gradients = _outputs_and_gradients(reference, image)
    found, gradients = _outputs_and_gradients(ours, image)
    _assert_close(found, expected, 1e-4, "output")
    whole = torch.cat([expected_gradients[key].flatten() for key in gradients])
    difference = torch.cat([gradients[key].flatten() for key in gradients]) - whole
    assert difference.norm() <= 1e-3 * whole.norm()
    monkeypatch.setattr(nn.functional, "leaky_relu", _smooth)  # MONAI's layers call it too
    expected, expected_gradients = _outputs_and_gradients(reference, image)
    found, gradients = _outputs_and_gradients(ours, image)
    _assert_close(found, expected, 1e-4, "output")
    for key, gradient in gradients.items():
        _assert_close(gradient, expected_gradients[key], 1e-3, key)


def test_gradients_in_float32_are_as_near_the_truth_as_monais():
    """All of them as one vector, against MONAI's in float64."""
    shape, options = CONFIGURATIONS["dividing"]
    ours, reference = _pair(**options)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found, theirs = _outputs_and_gradients(ours, image)[1], _outputs_and_gradients(reference, image)[1]
    truth = _outputs_and_gradients(reference.double(), image.double())[1]

    def distance(gradients):
        squares = [(gradients[key] - value).square().sum() / value.square().sum() for key, value in truth.items()]
        return torch.stack(squares).mean().sqrt()

    assert distance(found) <= 2 * distance(theirs) + 1e-4


def test_legacy_merging_is_monais_of_before_the_fix():
    """The duplicated slices, written out as in the code that the published checkpoints were trained with."""
    layer = PatchMerging(3, "legacy")
    torch.nn.init.normal_(layer.norm.weight)
    x = torch.randn(2, 4, 6, 5, 3)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
    parts = [
        padded[:, 0::2, 0::2, 0::2], padded[:, 1::2, 0::2, 0::2], padded[:, 0::2, 1::2, 0::2],
        padded[:, 0::2, 0::2, 1::2], padded[:, 1::2, 0::2, 1::2], padded[:, 0::2, 1::2, 0::2],
        padded[:, 0::2, 0::2, 1::2], padded[:, 1::2, 1::2, 1::2],
    ]  # fmt: skip
    assert torch.equal(layer(x), layer.reduction(layer.norm(torch.cat(parts, -1))))
    assert len(set(MERGING_ORDERS["legacy"])) == 6
    assert len(set(MERGING_ORDERS["distinct"])) == 8


def test_the_papers_network_has_its_parameters_and_keys():
    ours = SwinUNETR(4, 73, norm_affine=False)
    reference = nets.SwinUNETR(4, 73, feature_size=48)
    with torch.device("meta"):
        affine = nn.ModuleList([SkipBlock(48, 48, True), SkipBlock(4, 48, True)])
    assert sum(p.numel() for p in ours.parameters()) == 62_195_371
    shapes = {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    assert len(shapes) == 159
    assert shapes == {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    assert sum(".norm" in name for name in affine.state_dict()) == 2 * 5


def test_a_checkpoint_without_affine_norms_loads_unchanged():
    ours, _ = _pair()
    affine = SwinUNETR(1, 3, feature_size=12).eval()
    missing, unexpected = affine.load_state_dict(ours.state_dict(), strict=False)
    assert unexpected == []
    assert len(missing) == 52
    x = torch.randn(1, 1, 32, 64, 32)
    with torch.no_grad():
        assert torch.allclose(affine(x), ours(x), atol=1e-6)


def test_affine_norms_have_monais_names():
    ours, _ = _pair(norm_affine=True)  # loads all of MONAI's state dict and nothing else
    assert len(ours.state_dict()) == 159 + 52


@pytest.mark.parametrize("scores", [1, 70, 10**6])  # one window at a time, some, all
def test_attention_that_stores_nothing_has_the_exact_gradient(scores, monkeypatch):
    monkeypatch.setattr("ukbob_seg.networks.window_attention.BACKWARD_SCORES", scores)
    torch.manual_seed(0)
    qkv = [torch.randn(5, 2, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    bias = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_BiasedAttention.apply, (*qkv, bias))


def test_training_stores_no_attention_matrix():
    network, sizes = SwinUNETR(1, 2, feature_size=12), []

    def note(tensor):
        sizes.append(tuple(tensor.shape))
        return tensor.detach()  # the tensor itself would tie the graph to itself

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        network(torch.randn(1, 1, 64, 32, 32))
    assert any(len(s) == 4 and s[2] == 343 for s in sizes)  # queries, keys, values of whole windows are there
    assert not any(len(s) == 4 and s[2] == s[3] == 343 and s[0] > 1 for s in sizes)


def test_gradients_are_the_same_bits_every_time_on_two_threads():
    torch.manual_seed(0)
    layer, windows, threads = (
        WindowAttention(12, 3, (7, 7, 7)),
        torch.randn(1, 2, 1, 1, 343, 12),
        torch.get_num_threads(),
    )
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(4):
            layer.zero_grad()
            layer(windows, (7, 7, 7), (3, 0, 0)).square().sum().backward()
            found.append([p.grad.clone() for p in layer.parameters()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_checkpointing_changes_nothing():
    plain, _ = _pair()
    saving = SwinUNETR(1, 3, feature_size=12, norm_affine=False, use_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    image = torch.randn(1, 1, 32, 32, 64)
    expected, expected_gradients = _outputs_and_gradients(plain, image)
    found, gradients = _outputs_and_gradients(saving, image)
    _assert_close(found, expected, 1e-5, "output")
    for name, gradient in gradients.items():
        _assert_close(gradient, expected_gradients[name], 1e-5, name)


def test_deep_supervision_adds_heads_and_nothing_else():
    torch.manual_seed(0)
    plain = SwinUNETR(1, 3, feature_size=12)
    torch.manual_seed(0)
    deep = SwinUNETR(1, 3, feature_size=12, deep_supervision=True)
    own, weights = plain.state_dict(), deep.state_dict()
    assert {name for name in weights if name not in own} == {
        f"coarse_outs.{level}.{kind}" for level in range(3) for kind in ("weight", "bias")
    }
    assert all(torch.equal(weights[name], value) for name, value in own.items())
    image = torch.randn(1, 1, 32, 32, 64)
    with torch.no_grad():
        expected = plain(image)
        outputs = deep(image)
        assert torch.equal(deep.eval()(image), expected)
        set_deep_supervision(deep, False)
        assert torch.equal(deep.train()(image), expected)
        set_deep_supervision(plain, True)  # built without: there are no heads to switch on
        assert torch.equal(plain(image), expected)
    assert torch.equal(outputs[0], expected)
    assert [tuple(o.shape[2:]) for o in outputs] == [(32, 32, 64), (16, 16, 32), (8, 8, 16), (4, 4, 8)]


def test_heads_learn_from_the_loss_but_the_coarsest():
    network = SwinUNETR(1, 3, feature_size=12, deep_supervision=True)
    labels = torch.randint(0, 3, (1, 32, 32, 64))
    with_deep_supervision(SoftmaxDiceLoss(255))(network(torch.randn(1, 1, 32, 32, 64)), labels).backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == ["coarse_outs.2.weight", "coarse_outs.2.bias"]
    assert all(network.coarse_outs[level].weight.grad.abs().max() > 0 for level in (0, 1))


def test_windows_partition_and_merge():
    x = torch.randn(2, 4, 6, 9, 5)
    windows = partition_windows(x, (2, 3, 3))
    assert windows.shape == (2, 2, 2, 3, 18, 5)
    assert torch.equal(windows[1, 1, 0, 2, 0], x[1, 2, 0, 6])
    assert torch.equal(merge_windows(windows, (2, 3, 3)), x)


def test_masks_separate_wrapped_voxels():
    assert shift_mask((4, 4, 4), (2, 2, 2), (False, False, False), torch.device("cpu")) is None
    assert shift_mask((4, 4, 4), (0, 2, 2), (True, False, False), torch.device("cpu")) is None
    mask = shift_mask((4, 1, 1), (1, 0, 0), (True, True, True), torch.device("cpu"))
    apart = mask < 0
    assert apart.tolist() == [[False] * 3 + [True]] * 3 + [[True] * 3 + [False]]


def test_windows_are_fitted_without_changing_the_block():
    assert fit_window((6, 14, 7), (7, 7, 7), (3, 3, 3)) == ((6, 7, 7), (0, 3, 0))
    network = SwinUNETR(1, 2, feature_size=12).eval()
    x = torch.randn(1, 1, 64, 64, 64)
    with torch.no_grad():
        before = network(x)
        network(torch.randn(1, 1, 64, 32, 32))  # a small input must not disable shifting for ever after
        assert torch.equal(network(x), before)


def test_drop_path():
    layer = DropPath(0.5)
    x = torch.ones(400, 3)
    out = layer.train()(x)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert (out.min(dim=1).values == out.max(dim=1).values).all()
    assert torch.equal(layer.eval()(x), x)


def test_bad_inputs_are_explained():
    network = SwinUNETR(1, 2, feature_size=12)
    with pytest.raises(ConfigError, match=r"divisible by 32, got an input of \(48, 64, 64\)"):
        network(torch.zeros(1, 1, 48, 64, 64))
    with pytest.raises(ConfigError, match="one voxel at the bottleneck"):
        network(torch.zeros(1, 1, 32, 32, 32))
    with pytest.raises(ConfigError, match=r"takes \(batch, 1, z, y, x\), got an input of \(1, 2, 32, 64, 64\)"):
        network(torch.zeros(1, 2, 32, 64, 64))
    with pytest.raises(ConfigError, match=r"takes \(batch, 1, z, y, x\)"):
        network(torch.zeros(1, 32, 64, 64))
    with pytest.raises(ConfigError, match="need 4 entries"):
        SwinUNETR(1, 2, depths=(2, 2))
    with pytest.raises(ConfigError, match="must divide feature_size"):
        SwinUNETR(1, 2, num_heads=(5, 6, 12, 24))
    with pytest.raises(ConfigError, match="multiple of 12"):
        SwinUNETR(1, 2, feature_size=20)
    with pytest.raises(ConfigError, match="patch_merging"):
        SwinUNETR(1, 2, patch_merging="new")
