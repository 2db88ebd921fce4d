"""Losses against MONAI and hand computation, with ignored voxels and many classes."""

import pytest
import torch
import torch.nn.functional as F

from ukbob_seg.training.losses import SigmoidDiceLoss, SoftmaxDiceLoss, shrink_labels, with_deep_supervision


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, 4, 6, 5, generator=generator, requires_grad=True)
    labels = torch.randint(0, 5, (2, 4, 6, 5), generator=generator)
    return logits, labels


def test_softmax_loss_equals_monai(batch):
    losses = pytest.importorskip("monai.losses")
    logits, labels = batch
    reference = losses.DiceLoss(
        softmax=True, to_onehot_y=True, include_background=False, batch=True, smooth_nr=1e-5, smooth_dr=1e-5
    )(logits, labels[:, None]) + F.cross_entropy(logits, labels)
    ours = SoftmaxDiceLoss(ignore_index=255)(logits, labels)
    assert torch.allclose(ours, reference, atol=1e-6)
    (ours_gradient,) = torch.autograd.grad(ours, logits, retain_graph=True)
    (reference_gradient,) = torch.autograd.grad(reference, logits)
    assert torch.allclose(ours_gradient, reference_gradient, atol=1e-7)


def test_sigmoid_loss_equals_monai(batch):
    losses = pytest.importorskip("monai.losses")
    logits, labels = batch
    onehot = F.one_hot(labels, 5).movedim(-1, 1).float()
    reference = losses.DiceLoss(sigmoid=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5)(
        logits, onehot
    ) + F.binary_cross_entropy_with_logits(logits, onehot)
    ours = SigmoidDiceLoss(torch.eye(5, dtype=torch.bool), ignore_index=255)(logits, labels)
    assert torch.allclose(ours, reference, atol=1e-6)


@pytest.mark.parametrize("loss", [SoftmaxDiceLoss(9), SigmoidDiceLoss(torch.eye(5, dtype=torch.bool), 9)])
def test_ignored_voxels_change_nothing(batch, loss):
    logits, labels = batch
    labels = labels.clone()
    labels[:, :2] = 9
    whole = loss(logits, labels)
    part = loss(logits[:, :, 2:], labels[:, 2:])
    assert torch.allclose(whole, part, atol=1e-6)
    (gradient,) = torch.autograd.grad(whole, logits)
    assert (gradient[:, :, :2] == 0).all()
    assert (gradient[:, :, 2:] != 0).any()


@pytest.mark.parametrize("loss", [SoftmaxDiceLoss(9), SigmoidDiceLoss(torch.eye(5, dtype=torch.bool), 9)])
def test_everything_ignored_gives_no_gradient(batch, loss):
    logits, labels = batch
    value = loss(logits, torch.full_like(labels, 9))
    assert torch.isfinite(value)
    (gradient,) = torch.autograd.grad(value, logits)
    assert (gradient == 0).all()


def test_regions_overlap():
    """A voxel of label 2 belongs to both regions {1, 2} and {2}: the perfect prediction has both positive."""
    table = torch.tensor([[False, True, True], [False, False, True]])
    labels = torch.tensor([[[[0, 1, 2]]]])
    perfect = torch.tensor([[-1.0, 1, 1], [-1, -1, 1]]).view(1, 2, 1, 1, 3) * 40
    assert SigmoidDiceLoss(table, 255)(perfect, labels) < 1e-4
    assert SigmoidDiceLoss(table, 255)(-perfect, labels) > 2


def test_perfect_prediction_of_a_class_that_is_absent_costs_nothing():
    labels = torch.tensor([[[[0, 1, 1]]]])
    logits = F.one_hot(labels, 4).movedim(-1, 1).float() * 80
    assert SoftmaxDiceLoss(255)(logits, labels) < 1e-4


def test_deep_supervision_weights():
    values = []

    def loss(output, labels):
        values.append(tuple(labels.shape[1:]))
        return output.sum()

    outputs = [torch.full((1, 1, *shape), 1.0 / shape[0] ** 3) for shape in ((8, 8, 8), (4, 4, 4), (2, 2, 2))]
    total = with_deep_supervision(loss)(outputs, torch.zeros(1, 8, 8, 8, dtype=torch.long))
    assert values == [(8, 8, 8), (4, 4, 4)]  # the coarsest output is left out
    assert torch.allclose(total, torch.tensor(1.0))


def test_shrunk_labels_are_nearest_voxels():
    labels = torch.arange(8).view(1, 8, 1, 1)
    assert shrink_labels(labels, (4, 1, 1)).ravel().tolist() == [1, 3, 5, 7]
    assert shrink_labels(labels, (8, 1, 1)) is labels
