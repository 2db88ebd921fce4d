"""The loss of diffusion networks: which voxels and outputs count, by hand."""

import numpy as np
import pytest
import torch

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.networks.diffusion import NoisePrediction
from ukbob_seg.networks.registry import build_network
from ukbob_seg.training.flags import FlagCodes
from ukbob_seg.training.losses import SigmoidDiceLoss, SoftmaxDiceLoss
from ukbob_seg.training.noise_loss import NoiseLoss

IGNORED = 9
REGIONS = torch.tensor([[False, True, True], [False, False, True]])  # labels {1, 2} and {2}
ARGUMENTS = {"features_per_stage": [4, 8, 8], "blocks_per_stage": 1, "steps": 20, "sampling_steps": 2}


def _network(name, outputs):
    more = {"image_size": [8, 8, 8]} if name == "medsegdiff_v1" else {"former_blocks": 1, "filter_blocks": 1}
    torch.manual_seed(0)
    return build_network(name, 1, outputs, {**ARGUMENTS, **more})


def _prediction(outputs, shape=(2, 3, 4), batch=2, step=(0, 5), seed=0, condition=False):
    generator = torch.Generator().manual_seed(seed)
    predicted, noise, logits = torch.randn(3, batch, outputs, *shape, generator=generator)
    kept = logits.requires_grad_() if condition else None
    return NoisePrediction(predicted.requires_grad_(), noise, torch.tensor(step), kept)


def test_clean_maps():
    softmax = NoiseLoss(SoftmaxDiceLoss(IGNORED), _network("medsegdiff_v1", 3))
    labels = torch.tensor([[[[0, 1, 2, IGNORED]]]], dtype=torch.uint8)
    assert softmax.clean(labels)[0, :, 0, 0].tolist() == [[1, -1, -1, 1], [-1, 1, -1, -1], [-1, -1, 1, -1]]
    regions = NoiseLoss(SigmoidDiceLoss(REGIONS, IGNORED), _network("medsegdiff_v1", 2))
    assert regions.clean(labels)[0, :, 0, 0].tolist() == [[-1, 1, 1, -1], [-1, -1, 1, -1]]


@pytest.mark.parametrize("loss", [SoftmaxDiceLoss(IGNORED), SigmoidDiceLoss(REGIONS, IGNORED)])
def test_ignored_voxels_change_neither_loss_nor_gradient(loss):
    outputs = 3 if isinstance(loss, SoftmaxDiceLoss) else 2
    noise_loss = NoiseLoss(loss, _network("medsegdiff_v2", outputs))
    found = _prediction(outputs, condition=True)
    labels = torch.randint(0, 3, (2, 2, 3, 4), generator=torch.Generator().manual_seed(1))
    labels[:, 0] = IGNORED
    value = noise_loss(found, labels)
    gradients = torch.autograd.grad(value, [found.predicted, found.condition])
    for gradient in gradients:
        assert (gradient[:, :, 0] == 0).all()
        assert (gradient[:, :, 1] != 0).any()
    part = NoisePrediction(found.predicted[:, :, 1:], found.target[:, :, 1:], found.step, found.condition[:, :, 1:])
    assert torch.allclose(value, noise_loss(part, labels[:, 1:]), atol=1e-6)


@pytest.mark.parametrize("name", ["medsegdiff_v1", "medsegdiff_v2"])
def test_a_networks_gradients_do_not_depend_on_an_ignored_label(name):
    """Whatever stands below an ignored voxel: the network learns the same."""
    network = _network(name, 3)
    loss = NoiseLoss(SoftmaxDiceLoss(IGNORED, network.cross_entropy_weight), network)
    image = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(0, 3, (2, 8, 8, 8), generator=torch.Generator().manual_seed(3))
    labels[:, :3] = IGNORED
    torch.manual_seed(4)
    found = network(image, loss.clean(labels))
    changed = found._replace(target=found.target.clone())
    changed.target[:, :, :3] += 1
    values = [loss(each, labels) for each in (found, changed)]
    gradients = [
        torch.autograd.grad(value, network.parameters(), retain_graph=True, allow_unused=True) for value in values
    ]
    assert torch.equal(*values)
    assert any(g is not None and g.any() for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_the_noise_term_is_a_mean_over_what_is_known():
    found, labels = _prediction(3), torch.zeros(2, 2, 3, 4, dtype=torch.long)
    loss = NoiseLoss(SoftmaxDiceLoss(IGNORED), _network("medsegdiff_v1", 3))
    assert torch.allclose(loss(found, labels), (found.predicted - found.target).square().mean())
    value = loss(found, torch.full_like(labels, IGNORED))
    assert value == 0
    assert not torch.autograd.grad(value, found.predicted)[0].any()


def test_the_condition_model_learns_at_its_steps_with_its_weight():
    """Steps 0 and 5 with alpha = 5 count both, 3 and 4 none, and the cross-entropy ten times."""
    network, labels = _network("medsegdiff_v2", 3), torch.randint(0, 3, (2, 2, 3, 4))
    assert (network.condition_interval, network.cross_entropy_weight) == (5, 10.0)
    loss = NoiseLoss(SoftmaxDiceLoss(IGNORED, network.cross_entropy_weight), network)
    found = _prediction(3, condition=True)
    noise = (found.predicted - found.target).square().mean()
    plain, dice_only = SoftmaxDiceLoss(IGNORED)(found.condition, labels), SoftmaxDiceLoss(IGNORED, 0.0)
    entropy = torch.nn.functional.cross_entropy(found.condition, labels)
    assert torch.allclose(loss(found, labels), noise + dice_only(found.condition, labels) + 10 * entropy, atol=1e-5)
    assert torch.allclose(plain, dice_only(found.condition, labels) + entropy, atol=1e-5)
    assert torch.allclose(loss(found._replace(step=torch.tensor([3, 4])), labels), noise, atol=1e-5)
    first = SoftmaxDiceLoss(IGNORED, 10.0)(found.condition[:1], labels[:1])
    assert torch.allclose(loss(found._replace(step=torch.tensor([10, 4])), labels), noise + first, atol=1e-5)


def _flags(scheme):
    return FlagCodes.of([[2]], scheme, None)


def test_flagged_organs_are_open_in_a_marginal_loss():
    """Where organ 2 is flagged, a voxel of background or of organ 2 says nothing about either output."""
    scheme = LabelScheme(("a", "b"), ((1,), (2,)))
    codes = _flags(scheme)
    loss = NoiseLoss(SoftmaxDiceLoss(scheme.ignore_index), _network("medsegdiff_v1", 3), codes)
    table = codes.lookup([2])
    raw = np.array([[[[0, 1, 2]]], [[[0, 1, 2]]]])
    labels = torch.from_numpy(np.stack([table[raw[0]], raw[1].astype(np.int32)]))
    known = _known(loss, labels, (1, 1, 3))
    assert known[0].tolist() == [[False, True, False], [True, True, True], [False, True, False]]
    assert known[1].all()
    assert loss.clean(labels)[0, :, 0, 0].tolist() == [[1, -1, 1], [-1, 1, -1], [-1, -1, -1]]


def test_flagged_organs_are_open_with_a_sigmoid_for_each_output():
    """With an output of background that one is open where a voxel may be the organ; the organ's own one everywhere."""
    scheme = LabelScheme(("a", "b"), ((1,), (2,)))
    codes = _flags(scheme)
    own = SigmoidDiceLoss(torch.eye(3, dtype=torch.bool), scheme.ignore_index, skip_background=True)
    labels = torch.from_numpy(codes.lookup([2])[np.array([[[[0, 1, 2]]]])])
    known = _known(NoiseLoss(own, _network("medsegdiff_v1", 3), codes), labels, (1, 1, 3))
    assert known[0].tolist() == [[False, True, False], [True, True, True], [False, False, False]]


def _known(loss, labels, shape):
    """(B, K, x): which outputs of a row of voxels have a gradient."""
    found = _prediction(3, shape, len(labels), (0,) * len(labels))
    return torch.autograd.grad(loss(found, labels), found.predicted)[0][:, :, 0, 0] != 0
