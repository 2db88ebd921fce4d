"""Building networks by name."""

import pytest
import torch
from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.registry import NETWORKS, build_network, check_patch, set_deep_supervision

CONV = {
    "features_per_stage": [4, 8, 16],
    "strides": [[1, 1, 1], [2, 2, 2], [1, 2, 2]],
    "kernel_sizes": [[3, 3, 3]] * 3,
    "n_conv_per_stage": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
    "deep_supervision": True,
}


class OwnNetwork(nn.Module):
    """A user's own network."""

    def __init__(self, in_channels, out_channels, width=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(in_channels, width, 1), nn.Conv3d(width, out_channels, 1))

    def forward(self, x):
        return self.layers(x)


def test_plain_conv_unet_and_deep_supervision():
    pytest.importorskip("dynamic_network_architectures")
    network = build_network("plain_conv_unet", 2, 5, CONV)
    outputs = network(torch.zeros(1, 2, 8, 16, 16))
    assert [tuple(o.shape) for o in outputs] == [(1, 5, 8, 16, 16), (1, 5, 4, 8, 8)]
    set_deep_supervision(network, False)
    assert network(torch.zeros(1, 2, 8, 16, 16)).shape == (1, 5, 8, 16, 16)
    assert sum(isinstance(m, nn.InstanceNorm3d) and m.affine for m in network.modules()) > 5
    batch = build_network("plain_conv_unet", 2, 5, {**CONV, "norm": "batch"})
    assert any(isinstance(m, nn.BatchNorm3d) for m in batch.modules())


def test_a_network_by_dotted_path(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "own_networks", sys.modules[__name__])
    network = build_network("own_networks:OwnNetwork", 2, 3, {"width": 7})
    assert network(torch.zeros(1, 2, 4, 4, 4)).shape == (1, 3, 4, 4, 4)
    with pytest.raises(ConfigError, match="cannot be imported"):
        build_network("own_networks:Other", 2, 3, {})
    with pytest.raises(ConfigError, match="cannot be built with"):
        build_network("own_networks:OwnNetwork", 2, 3, {"depth": 7})
    with pytest.raises(ConfigError, match=r"is not a torch\.nn\.Module"):
        build_network("pathlib:Path", 2, 3, {})


def test_nnunets_networks_start_from_nnunets_weights():
    dynamic = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    common = {key: CONV[key] for key in CONV if key != "n_conv_per_stage"} | {
        "input_channels": 2, "num_classes": 5, "n_stages": 3, "conv_op": nn.Conv3d, "conv_bias": True,
        "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    for name, kind, blocks in (
        ("plain_conv_unet", dynamic.PlainConvUNet, "n_conv_per_stage"),
        ("residual_encoder_unet", dynamic.ResidualEncoderUNet, "n_blocks_per_stage"),
    ):
        torch.manual_seed(3)
        reference = kind(**common, **{blocks: [2, 2, 2]})
        reference.apply(reference.initialize)
        torch.manual_seed(3)
        found = build_network(name, 2, 5, CONV).state_dict()
        assert found.keys() == reference.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in reference.state_dict().items())


def test_patches_must_be_divisible_by_what_the_entry_says():
    assert NETWORKS["swin_unetr"].divisor({}) == (32, 32, 32)
    assert NETWORKS["plain_conv_unet"].divisor(CONV) == (2, 4, 4)
    assert NETWORKS["plain_conv_unet"].divisor({"strides": [1, 2, [1, 2, 2]]}) == (2, 4, 4)
    assert "dynamic-network-architectures" in NETWORKS["residual_encoder_unet"].requires


def test_wrong_arguments_are_explained():
    pytest.importorskip("dynamic_network_architectures")
    with pytest.raises(ConfigError, match="needs the arguments features_per_stage, strides"):
        build_network("plain_conv_unet", 1, 2, {"n_conv_per_stage": [2], "n_conv_per_stage_decoder": []})
    with pytest.raises(ConfigError, match="n_conv_per_stage_decoder must have 2 entries, got 3"):
        build_network("plain_conv_unet", 1, 2, {**CONV, "n_conv_per_stage_decoder": [2, 2, 2]})
    with pytest.raises(ConfigError, match="norm must be one of instance, batch"):
        build_network("plain_conv_unet", 1, 2, {**CONV, "norm": "layer"})
    with pytest.raises(ConfigError, match="cannot be imported"):
        build_network(":Network", 1, 2, {})


def test_a_missing_package_names_its_remedy(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "dynamic_network_architectures.architectures.unet", None)
    with pytest.raises(ConfigError, match="pip install --no-deps dynamic-network-architectures"):
        build_network("plain_conv_unet", 1, 2, CONV)


def test_a_fault_inside_a_users_network_keeps_its_traceback(monkeypatch):
    import sys

    class Faulty(nn.Module):
        def __init__(self, in_channels, out_channels):
            super().__init__()
            len(in_channels)

    monkeypatch.setattr(sys.modules[__name__], "Faulty", Faulty, raising=False)
    monkeypatch.setitem(sys.modules, "own_networks", sys.modules[__name__])
    with pytest.raises(TypeError, match="has no len"):
        build_network("own_networks:Faulty", 1, 2, {})


def test_unknown_names_list_the_choices():
    with pytest.raises(ConfigError, match=r"unknown network 'u_net'; choose from swin_unetr, plain_conv_unet"):
        build_network("u_net", 1, 2, {})


@pytest.mark.parametrize(("name", "arguments"), [
    ("unet", {"strides": [2]}),
    ("segresnet", {"init_filters": 12}),
    ("segresnet", {"blocks_down": [1, 1, 1], "blocks_up": [1]}),
    ("unetr", {"patch_size": [32, 32, 32], "num_heads": 7}),
    ("swin_unetr_v2", {"feature_size": 13}),
    ("plain_conv_unet", {"features_per_stage": [4, 8]}),
    ("transunet", {"strides": 2}),
    ("medformer", {"channels": 3}),
    ("medsegdiff_v1", {"features_per_stage": 5}),
    ("medsegdiff_v2", {"eta": "x"}),
    ("medsegdiff_v2", {"dropout": 2}),
])  # fmt: skip
def test_arguments_that_somebody_edited_are_refused_in_one_sentence(name, arguments):
    if NETWORKS[name].requires:
        pytest.importorskip("monai" if "baselines" in NETWORKS[name].requires else "dynamic_network_architectures")

    def begin():  # as a training does
        check_patch(name, arguments, (32, 32, 32))
        build_network(name, 1, 3, arguments)

    with pytest.raises(ConfigError) as caught:
        begin()
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_strides_per_axis_of_monais_networks():
    pytest.importorskip("monai", reason="MONAI is not installed")
    arguments = {"channels": [8, 16, 24], "strides": [[1, 2, 2], [2, 2, 2]]}
    check_patch("unet", arguments, (6, 16, 16))
    with pytest.raises(ConfigError, match=r"divisible by \(2, 4, 4\)"):
        check_patch("unet", arguments, (5, 16, 16))
    assert build_network("unet", 1, 3, arguments)(torch.zeros(1, 1, 6, 16, 16)).shape == (1, 3, 6, 16, 16)
