"""ResUNet++, nnFormer and 3D UX-Net on a CUDA device: the CPU's numbers, and training in bfloat16."""

import pytest
import torch
from baseline_properties import noise

from ukbob_seg.networks.baselines.nnformer import NNFormer
from ukbob_seg.networks.baselines.resunet_pp import ResUNetPlusPlus
from ukbob_seg.networks.baselines.ux_net import UXNet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NETWORKS = {
    "resunet_pp": lambda: ResUNetPlusPlus(1, 3),
    "nnformer": lambda: NNFormer(1, 3, embedding_dim=24, num_heads=(3, 6, 12, 24), drop_path_rate=0.0),
    "ux_net": lambda: UXNet(1, 3, feature_sizes=(12, 24, 48, 96), hidden_size=192, layer_scale=0.5),
}
SHAPE = (1, 1, 96, 64, 64)  # no multiple of nnFormer's windows along z


def _gradients(network, image):
    """Of all parameters as one vector, for a loss that tells voxels apart."""
    network.zero_grad()
    output = network(image)
    (output.float() * noise(*output.shape, seed=1).to(output.device)).mean().backward()
    return output.detach().float(), torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_on_the_device(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    network, image = NETWORKS[name](), noise(*SHAPE)
    output, gradients = _gradients(network, image)
    network.cuda()
    found, theirs = _gradients(network, image.cuda())
    torch.testing.assert_close(found.cpu(), output, rtol=1e-3, atol=1e-3 * output.abs().max().item())
    assert (theirs.cpu() - gradients).norm() < 0.02 * gradients.norm()
    with torch.autocast("cuda", torch.bfloat16):
        rounded, theirs = _gradients(network, image.cuda())
    assert (rounded.cpu() - output).norm() < 0.1 * output.norm()
    assert (theirs.cpu() - gradients).norm() < 0.5 * gradients.norm()
