"""Training with torch.compile and with deep supervision of Swin-UNETR: the same files, resumed across, in parallel."""

import dataclasses
import json

import pytest
import torch
from small_networks import SMALL

from ukbob_seg.networks import compiled
from ukbob_seg.networks.compiled import CompiledNetwork, maybe_compiled
from ukbob_seg.networks.registry import build_network
from ukbob_seg.networks.swin_unetr import SwinUNETR
from ukbob_seg.training import distributed
from ukbob_seg.training.checkpoint import load_network, read_checkpoint
from ukbob_seg.training.config import TrainingConfig
from ukbob_seg.training.losses import SoftmaxDiceLoss, with_deep_supervision
from ukbob_seg.training.setup import prepare
from ukbob_seg.training.trainer import ALL_USED, RunOptions, all_used, train

CONFIG = TrainingConfig(
    epochs=2, iterations_per_epoch=2, learning_rate=1e-3, schedule="constant", validation_every=2, validation_cases=1
)
QUIET = RunOptions(quiet=True)


def _weights(folder):
    return read_checkpoint(folder / "checkpoint_final.pt")[1]["network_weights"]


def _deep_swin(roots):
    """Plans of the smallest Swin-UNETR, with deep supervision."""
    path = roots.preprocessed / "Dataset007_Blobs" / "plans.json"
    content = json.loads(path.read_text())
    plan = content["configurations"]["3d_fullres"]["networks"]["swin_unetr"]
    plan |= {"patch_size": [32, 32, 64], "batch_size": 1}
    plan["arguments"] = {"feature_size": 12, "depths": [1, 1, 1, 1], "deep_supervision": True}
    path.write_text(json.dumps(content))


def test_compiled_and_plain_runs_have_the_same_checkpoints(roots, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    calls = []
    forward = CompiledNetwork.forward
    monkeypatch.setattr(CompiledNetwork, "forward", lambda self, image: calls.append(self) or forward(self, image))

    def run(config, **options):
        options = dataclasses.replace(QUIET, **options)
        return _weights(train(7, 0, roots, config, options, network="tests_tiny:Tiny"))

    plain = run(CONFIG)
    assert calls == []
    whole = run(CONFIG, compile=True, overwrite=True)
    assert len(calls) > 4  # four steps, and the windows of the validation
    assert whole.keys() == plain.keys()
    assert all(torch.allclose(whole[name], value, rtol=1e-5, atol=1e-6) for name, value in plain.items())
    run(dataclasses.replace(CONFIG, epochs=1), overwrite=True)
    across = run(CONFIG, compile=True, resume=True)
    assert all(torch.allclose(across[name], value, rtol=1e-5, atol=1e-6) for name, value in plain.items())
    back = run(dataclasses.replace(CONFIG, epochs=3), resume=True)
    assert back.keys() == plain.keys()
    assert not any("could not be compiled" in record.getMessage() for record in caplog.records)


def test_swin_unetr_trains_with_deep_supervision(roots):
    _deep_swin(roots)
    folder = train(7, 0, roots, dataclasses.replace(CONFIG, epochs=1), QUIET, network="swin_unetr")
    network, description = load_network(folder / "checkpoint_best.pt")
    assert not network.deep_supervision
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 32, 32, 64)).shape == (1, 3, 32, 32, 64)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in _weights(folder).items())
    assert not all_used(description)  # the coarsest output has no gradient
    fresh = description.build()
    assert fresh.deep_supervision
    assert not torch.equal(fresh.coarse_outs[0].weight, network.coarse_outs[0].weight)
    train(7, 0, roots, CONFIG, dataclasses.replace(QUIET, resume=True), network="swin_unetr")


def test_which_networks_use_all_parameters(roots):
    for name, expected in (("swin_unetr", True), ("plain_conv_unet", False), ("tests_tiny:Tiny", False)):
        description = prepare(7, "0", roots, CONFIG, "3d_fullres", name, True).description
        assert all_used(description) is expected


@pytest.mark.parametrize("name", ALL_USED)
def test_all_their_parameters_have_a_gradient(name):
    arguments, patch = SMALL[name]
    network = build_network(name, 1, 3, {**arguments, "deep_supervision": False}).train()
    network(torch.randn(2, 1, *patch)).square().mean().backward()
    assert not [key for key, parameter in network.named_parameters() if parameter.grad is None]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_several_processes_train_coarse_outputs_and_compiled_networks(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path / "store"),), nprocs=2)


def _one_of_two(rank, store):
    """Two steps of each kind of network; gradients must come from both processes and be those of the plain network."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    swin = SwinUNETR(1, 3, feature_size=12, depths=(1, 1, 1, 1), deep_supervision=True)
    loss, labels = with_deep_supervision(SoftmaxDiceLoss(255)), torch.randint(0, 3, (1, 32, 32, 64))
    model = distributed.spread(swin, "cpu", all_used=False)
    for _ in range(2):  # a second one fails where parameters without gradient were not expected
        loss(model(torch.randn(1, 1, 32, 32, 64)), labels).backward()
    assert swin.coarse_outs[0].weight.grad is not None

    images = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.ReLU(), torch.nn.Conv3d(2, 2, 1))
    expected = torch.autograd.grad(network(images).square().mean(), list(network.parameters()))
    compiled.BACKEND = "aot_eager"
    model = distributed.spread(maybe_compiled(network, True), "cpu", all_used=True)
    for _ in range(2):
        network.zero_grad()
        model(images[rank : rank + 1]).square().mean().backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)
    torch.distributed.destroy_process_group()
