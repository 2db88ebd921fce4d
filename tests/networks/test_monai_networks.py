"""MONAI's networks by short name: published sizes, logits, what they refuse, and what they hand back to MONAI."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.monai_networks import MONAI_NETWORKS, monai_call
from ukbob_seg.networks.registry import NETWORKS, build_network, check_patch

SMALL = {
    "unet": {"channels": [4, 8, 12], "strides": [2, 2], "num_res_units": 1},
    "vnet": {},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "attention_unet": {"channels": [4, 8, 12], "strides": [2, 2]},
    "unetr": {"patch_size": [16, 32, 32], "feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 2},
    "swin_unetr_v2": {"feature_size": 12},
}
# As published, and for MONAI's own classes counted from the layers that the papers name; millions of parameters.
SIZES = {"unet": 4.8, "vnet": 45.6, "segresnet": 18.8, "attention_unet": 5.9, "unetr": 92.8, "swin_unetr_v2": 72.8}


@pytest.fixture(autouse=True)
def _needs_monai():
    pytest.importorskip("monai", reason="MONAI is not installed")
    pytest.importorskip("einops", reason="einops is not installed")


def _published(name):
    return {"patch_size": [96, 96, 96]} if name == "unetr" else {}


@pytest.mark.parametrize("name", MONAI_NETWORKS)
def test_published_sizes(name):
    network = build_network(name, 1, 3, _published(name)).to("meta")
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=0.06)


@pytest.mark.parametrize("name", MONAI_NETWORKS)
def test_logits_of_the_patch_and_gradients_everywhere(name):
    torch.manual_seed(0)
    network = build_network(name, 2, 3, SMALL[name]).train()
    shape = (16, 32, 32) if name == "unetr" else (32, 32, 64)
    check_patch(name, SMALL[name], shape)
    logits = network(torch.randn(2, 2, *shape))
    assert logits.shape == (2, 3, *shape)
    assert (logits < 0).any()  # neither a softmax nor a sigmoid ends it
    assert not torch.allclose(logits.exp().sum(1), torch.ones(1))
    logits.square().mean().backward()
    without = {key for key, value in network.named_parameters() if value.grad is None}
    assert all("cross_attn" in key for key in without), without  # of MONAI's general transformer block


@pytest.mark.parametrize("name", MONAI_NETWORKS)
def test_no_dropout_but_what_the_arguments_say(name):
    def rates(**more):
        kinds = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)
        modules = build_network(name, 1, 2, {**SMALL[name], **more}).modules()
        return [module.p for module in modules if isinstance(module, kinds)]

    option = {"segresnet": "dropout_prob", "unetr": "dropout_rate", "swin_unetr_v2": "dropout_path_rate"}.get(name)
    option = option or "dropout"
    assert set(rates()) <= ({0.2} if name == "segresnet" else {0.0})
    assert option in MONAI_NETWORKS[name].defaults
    if name != "swin_unetr_v2":  # which drops whole branches
        assert 0.35 in rates(**{option: 0.35})


@pytest.mark.parametrize("name", MONAI_NETWORKS)
def test_monai_alone_builds_the_same_network(name):
    """What a portable export says about it."""
    import monai.networks.nets

    network = build_network(name, 2, 3, SMALL[name]).eval()
    call = json.loads(json.dumps(monai_call(name, 2, 3, SMALL[name])))
    theirs = getattr(monai.networks.nets, call["class"].rpartition(".")[2])(**call["arguments"]).eval()
    theirs.load_state_dict(network.state_dict(), strict=True)
    image = torch.randn(1, 2, *((16, 32, 32) if name == "unetr" else (32, 32, 64)))
    with torch.no_grad():
        assert torch.equal(network(image), theirs(image))


def test_v_net_repeats_its_input_so_that_some_channels_are_refused():
    for channels in (1, 2, 4):
        build_network("vnet", channels, 2, {})
    for channels in (3, 32):
        with pytest.raises(ConfigError, match=f"vnet' takes 1, 2, 4, 8 or 16 input channels.*have {channels}"):
            build_network("vnet", channels, 2, {})


def test_wrong_arguments_and_patches_are_explained():
    with pytest.raises(ConfigError, match="'unet' takes no argument depth; it takes channels, strides"):
        build_network("unet", 1, 2, {"depth": 3})
    with pytest.raises(ConfigError, match="norm must be one of batch, instance, got 'group'"):
        build_network("unet", 1, 2, {"norm": "group"})
    with pytest.raises(ConfigError, match="'unetr' needs the argument patch_size"):
        build_network("unetr", 1, 2, {})
    with pytest.raises(ConfigError, match=r"its argument patch_size is \[32, 32, 32\], the patch_size of the plans"):
        check_patch("unetr", {"patch_size": [32, 32, 32]}, (32, 32, 48))
    with pytest.raises(ConfigError, match=r"divisible by \(8, 8, 8\)"):
        check_patch("segresnet", {}, (12, 16, 16))
    assert NETWORKS["segresnet"].divisor({"blocks_down": [1, 2]}) == (2, 2, 2)
    assert NETWORKS["unet"].divisor({"channels": [4, 8], "strides": [4]}) == (4, 4, 4)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_the_u_nets_normalisation_can_adapt(norm):
    kinds = {"batch": nn.BatchNorm3d, "instance": nn.InstanceNorm3d}
    network = build_network("unet", 1, 2, {**SMALL["unet"], "norm": norm})
    found = [module for module in network.modules() if isinstance(module, kinds[norm])]
    assert found
    assert all(module.affine for module in found)


def test_without_monai_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(ConfigError, match=r"'unetr' needs .* pip install 'ukbob_seg\[baselines\]'$"):
        build_network("unetr", 1, 2, {"patch_size": [16, 16, 16]})
    assert "baselines" in NETWORKS["vnet"].requires


def test_the_registry_imports_no_baseline():
    code = (
        "import sys, ukbob_seg.networks.registry\n"
        "print([n for n in sys.modules if n.split('.')[0] == 'monai' or n.startswith('ukbob_seg.networks.baselines')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
