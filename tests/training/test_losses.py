"""Losses against MONAI and hand computation, with ignored voxels and many classes."""

import math

import pytest
import torch
import torch.nn.functional as F

from ukbob_seg.training.losses import (
    SigmoidDiceLoss,
    SoftmaxDiceLoss,
    merge_with_background,
    shrink_labels,
    unite_with_background,
    with_deep_supervision,
)


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


MERGED = torch.tensor([[False, False, True, False, True], [False, False, False, True, False]])


def _merged_by_hand(logits, merged):
    """Probabilities with those of merged classes added to background's."""
    p = logits.double().softmax(1)
    taken = p * merged[:, :, None, None, None]
    return torch.cat([p[:, :1] + taken.sum(1, keepdim=True), (p - taken)[:, 1:]], 1)


def test_marginal_softmax_loss_by_hand():
    """Two voxels, two elements: flagged organ 2 is one class with background in the first element only."""
    logits = torch.tensor([[[0.5, -1.0], [1.0, 0.2], [2.0, 0.3]], [[0.1, 0.4], [0.0, 3.0], [1.0, -2.0]]])
    p = logits.softmax(1)  # (B, K, x)
    merged = torch.tensor([[False, False, True], [False, False, False]])
    labels = torch.tensor([[0, 2], [2, 1]])
    together = p[0, 0] + p[0, 2]
    cross_entropy = -(together[0].log() + together[1].log() + p[1, 2, 0].log() + p[1, 1, 1].log()) / 4
    dice1 = (2 * p[1, 1, 1] + 1e-5) / (p[:, 1].sum() + 1 + 1e-5)
    dice2 = (2 * p[1, 2, 0] + 1e-5) / (p[1, 2].sum() + 1 + 1e-5)  # nothing of the first element
    expected = cross_entropy + 1 - (dice1 + dice2) / 2
    found = SoftmaxDiceLoss(255)(logits[..., None, None], labels[..., None, None], merged)
    torch.testing.assert_close(found, expected)


def test_marginal_loss_with_a_class_flagged_everywhere_is_the_loss_without_it(batch):
    logits, labels = batch
    merged = torch.zeros(2, 5, dtype=torch.bool)
    merged[:, 4] = True
    four = torch.cat([torch.logaddexp(logits[:, :1], logits[:, 4:]), logits[:, 1:4]], 1)
    expected = SoftmaxDiceLoss(255)(four, torch.where(labels == 4, 0, labels))
    found = SoftmaxDiceLoss(255)(logits, labels, merged)
    torch.testing.assert_close(found, expected)
    (a,) = torch.autograd.grad(found, logits, retain_graph=True)
    (b,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(a, b)


def test_merged_logits_have_the_summed_probability(batch):
    logits, _ = batch
    found = merge_with_background(logits, MERGED).softmax(1)
    torch.testing.assert_close(found.double(), _merged_by_hand(logits, MERGED))
    large = merge_with_background(torch.tensor([900.0, 2.0, 901.0, 0.0, -900.0]).view(1, 5, 1, 1, 1), MERGED[:1])
    assert large[0, 0, 0, 0, 0].item() == pytest.approx(901 + math.log1p(math.exp(-1)))
    extreme = (logits * 1e4).detach().requires_grad_()
    SoftmaxDiceLoss(255)(extreme, torch.zeros(2, 4, 6, 5, dtype=torch.long), MERGED).backward()
    assert torch.isfinite(extreme.grad).all()


@pytest.mark.parametrize("loss", [SoftmaxDiceLoss(9), SigmoidDiceLoss(torch.eye(5, dtype=torch.bool), 9, True)])
def test_nothing_flagged_is_the_plain_loss(batch, loss):
    logits, labels = batch
    torch.testing.assert_close(loss(logits, labels, torch.zeros(2, 5, dtype=torch.bool)), loss(logits, labels))
    assert torch.equal(loss(logits, labels, None), loss(logits, labels))


def test_the_marginal_loss_does_not_choose_between_background_and_the_flagged_organ(batch):
    """Moving probability from one to the other changes nothing, so that their gradients are in the same proportion."""
    logits, labels = batch
    merged = torch.zeros(2, 5, dtype=torch.bool)
    merged[0, 3] = True
    value = SoftmaxDiceLoss(255)(logits, labels, merged)
    (gradient,) = torch.autograd.grad(value, logits)
    p = logits.detach().softmax(1)
    torch.testing.assert_close(gradient[0, 0] * p[0, 3], gradient[0, 3] * p[0, 0])
    background = labels[0] == 0
    plain = torch.autograd.grad(SoftmaxDiceLoss(255)(logits, labels), logits)[0]
    assert (plain[0, 3][background] > 0).all()  # the plain loss pushes the flagged organ down there,
    assert (gradient[0, 3][background] < 0).all()  # the marginal one pulls it up together with background
    other = logits.detach().clone()  # the same sum of the two, shared otherwise
    total = torch.logaddexp(other[0, 0], other[0, 3])
    other[0, 0], other[0, 3] = total + torch.log(torch.tensor(0.9)), total + torch.log(torch.tensor(0.1))
    torch.testing.assert_close(SoftmaxDiceLoss(255)(other, labels, merged), value.detach())


def test_marginal_sigmoid_loss_by_hand():
    """Flagged organ 2 and background are one output, 1 - (1 - p_0)(1 - p_2), in the first element only."""
    logits = torch.tensor([[[0.5, -1.0], [1.0, 0.2], [2.0, 0.3]], [[0.1, 0.4], [0.0, 3.0], [1.0, -2.0]]])
    labels = torch.tensor([[0, 2], [2, 1]])
    merged = torch.tensor([[False, False, True], [False, False, False]])
    loss = SigmoidDiceLoss(torch.eye(3, dtype=torch.bool), 255, skip_background=True)
    value = loss(logits[..., None, None], labels[..., None, None], merged)
    p, log_p, log_q = logits.sigmoid(), F.logsigmoid(logits), F.logsigmoid(-logits)
    united = 1 - (1 - p[0, 0]) * (1 - p[0, 2])
    first = united.log().sum() + log_q[0, 1].sum()  # both voxels are "background or organ 2", neither is organ 1
    second = log_q[1, 0].sum() + log_q[1, 1, 0] + log_p[1, 1, 1] + log_p[1, 2, 0] + log_q[1, 2, 1]
    dice1 = (2 * p[1, 1, 1] + 1e-5) / (p[:, 1].sum() + 1 + 1e-5)
    dice2 = (2 * p[1, 2, 0] + 1e-5) / (p[1, 2].sum() + 1 + 1e-5)
    torch.testing.assert_close(value, -(first + second) / 10 + 1 - (dice1 + dice2) / 2)


def test_the_sigmoid_marginal_loss_does_not_teach_background_where_a_flagged_organ_may_be(batch):
    """Where background is labelled and the organ already predicted, nothing is left to learn; elsewhere both are no."""
    logits, labels = (x.detach() for x in batch)
    merged = torch.zeros(2, 5, dtype=torch.bool)
    merged[0, 3] = True
    unknown, known = (labels[0] == 0) | (labels[0] == 3), (labels[0] == 1) | (labels[0] == 2)
    logits[0, 0], logits[0, 3] = -2.0, torch.where(unknown, 30.0, -1.0)
    logits.requires_grad_()
    loss = SigmoidDiceLoss(torch.eye(5, dtype=torch.bool), 9, skip_background=True)
    (gradient,) = torch.autograd.grad(loss(logits, labels, merged), logits)
    assert gradient[0, 0][unknown].abs().max() < 1e-6
    assert (torch.autograd.grad(loss(logits, labels), logits)[0][0, 0][labels[0] == 0] < 0).all()  # the plain loss does
    assert (gradient[0, 0][known] > 0).all()
    assert (gradient[0, 3][known] > 0).all()  # the flagged organ may not grow into trusted ones
    assert (gradient[1] != 0)[:, labels[1] != 9].all()


def test_united_outputs_have_the_probability_of_any(batch):
    logits, _ = batch
    found = unite_with_background(logits, MERGED).sigmoid().double()
    q = (-logits.double()).sigmoid()
    none = torch.where(MERGED[:, :, None, None, None], q, 1.0).prod(dim=1) * q[:, 0]
    torch.testing.assert_close(found[:, 0], 1 - none)
    torch.testing.assert_close(found[:, 1:], logits[:, 1:].sigmoid().double())
    for scale in (1e4, 80.0):
        extreme = (logits * scale).detach().requires_grad_()
        unite_with_background(extreme, MERGED).sigmoid().log1p().sum().backward()
        assert torch.isfinite(extreme.grad).all()
    small = torch.full((1, 5, 1, 1, 1), -60.0)
    assert unite_with_background(small, MERGED[:1])[0, 0].item() == pytest.approx(-60 + math.log(3), abs=1e-4)
    far = torch.full((1, 5, 1, 1, 1), -200.0, requires_grad=True)  # a voxel that is far off still learns
    F.softplus(-unite_with_background(far, MERGED[:1])[0, 0]).sum().backward()
    assert far.grad[0, [0, 2, 4]].flatten().tolist() == pytest.approx([-1 / 3] * 3, rel=1e-4)


def test_regions_with_a_flagged_member_are_left_out(batch):
    table = torch.tensor([[False, True, True], [False, False, True], [False, True, False]])
    logits = batch[0][:, :3].detach().requires_grad_()
    labels = batch[1] % 3
    merged = torch.tensor([[False, False, True], [False, False, False]])
    SigmoidDiceLoss(table, 255)(logits, labels, merged).backward()
    assert (logits.grad[0, :2] == 0).all()
    assert (logits.grad[0, 2] != 0).all()
    assert (logits.grad[1] != 0).all()


def test_everything_flagged_is_no_error(batch):
    merged = torch.ones(2, 5, dtype=torch.bool)
    merged[:, 0] = False
    for loss, first in ((SoftmaxDiceLoss(9), 0), (SigmoidDiceLoss(torch.eye(5, dtype=torch.bool)[1:], 9), 1)):
        logits = batch[0][:, first:].detach().requires_grad_()
        value = loss(logits, batch[1], merged)
        value.backward()
        assert abs(value.item()) < 1e-6
        assert logits.grad.abs().max() < 1e-6


def test_deep_supervision_passes_the_flags_to_every_resolution(batch):
    logits, labels = batch
    coarse, coarsest = logits[:, :, ::2, ::2, ::2], logits[:, :, ::4, ::4, ::4]
    loss = SoftmaxDiceLoss(255)
    found = with_deep_supervision(loss)([logits, coarse, coarsest], labels, MERGED)
    shrunk = shrink_labels(labels, coarse.shape[2:])
    expected = (2 * loss(logits, labels, MERGED) + loss(coarse, shrunk, MERGED)) / 3
    torch.testing.assert_close(found, expected)
