"""Codes of flagged organs: they survive augmentation, and a flip exchanges left and right ones."""

import numpy as np
import pytest
import torch

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.training.augmentation import Batch, FlipRecord, RandomFlip
from ukbob_seg.training.flags import FlagCodes, with_flag_codes
from ukbob_seg.training.left_right import label_swap
from ukbob_seg.training.losses import SoftmaxDiceLoss

SCHEME = LabelScheme.from_json({"background": 0, "kidney_left": 3, "liver": 5, "kidney_right": 9}, None)  # 1, 2, 3
SWAP = label_swap(SCHEME)


def _codes(*flagged):
    return FlagCodes.of(flagged, SCHEME, SWAP)


def test_every_set_has_two_codes_and_so_has_its_mirror_image():
    codes = _codes((1,), (2,), (), (1, 2))
    assert codes.sets == ((1,), (1, 2), (2,), (2, 3), (3,))
    assert (codes.first, codes.labels) == (256, 4)
    table = codes.lookup((2, 1))
    assert table[[0, 1, 2, 3, 255]].tolist() == [258, 259, 259, 3, 255]
    extended = codes.extended(SWAP)
    assert extended[:256].equal(SWAP)
    assert extended[256:].tolist() == [264, 265, 262, 263, 260, 261, 258, 259, 256, 257]
    assert extended[extended].equal(torch.arange(266))


def test_decoding_gives_labels_and_merged_channels():
    codes = _codes((1, 2), (2,))
    stored = np.array([0, 1, 2, 3, 255])
    rows = [stored, codes.lookup((2,))[stored], codes.lookup((1, 2))[stored]]
    labels = torch.tensor(np.stack(rows), dtype=torch.int32).view(3, 5, 1, 1)
    found, merged = codes.decode(labels)
    assert found.dtype == torch.int32
    assert found.view(3, 5).tolist() == [[0, 1, 2, 3, 255], [0, 1, 2, 3, 255], [0, 1, 1, 3, 255]]
    assert merged.tolist() == [[False] * 4, [False, False, True, False], [False, True, True, False]]
    same, nothing = codes.decode(labels[:1])
    assert same is not None
    assert same.equal(labels[:1])
    assert nothing is None


def test_a_flip_exchanges_the_flagged_organs():
    codes = _codes((1,))
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 4, (2, 4, 4, 6), generator=generator).numpy()
    labels = torch.from_numpy(codes.lookup((1,))[stored])
    flip = RandomFlip((0, 1, 2), 0.5, 2, codes.extended(SWAP))
    record = FlipRecord(torch.tensor([[False, False, True], [True, False, False]]))
    changed = flip.apply(Batch(torch.zeros(2, 1, 4, 4, 6), labels), record)
    found, merged = codes.decode(changed.labels)
    assert merged.tolist() == [[False, False, False, True], [False, True, False, False]]
    flipped = SWAP[torch.from_numpy(stored[0]).flip(2)]
    assert found[0].equal(flipped.to(torch.int32))
    assert found[1].equal(torch.from_numpy(stored[1]).flip(0).to(torch.int32))


def test_the_loss_of_codes_is_that_of_labels_and_channels():
    codes = _codes((2,))
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 3, 4, 5, generator=generator)
    stored = torch.randint(0, 4, (2, 3, 4, 5), generator=generator)
    coded = torch.from_numpy(np.stack([stored[0].numpy(), codes.lookup((2,))[stored[1].numpy()]]))
    loss = SoftmaxDiceLoss(255)
    merged = torch.tensor([[False] * 4, [False, False, True, False]])
    torch.testing.assert_close(with_flag_codes(loss, codes)(logits, coded), loss(logits, stored, merged))
    assert with_flag_codes(loss, codes)(logits, stored) == loss(logits, stored)


@pytest.mark.parametrize("count", [3, 300])
def test_codes_lie_beyond_every_label(count):
    scheme = LabelScheme.from_json({"background": 0, **{f"c{k}": k for k in range(1, count + 1)}}, None)
    codes = FlagCodes.of([(count,)], scheme, label_swap(scheme))
    assert codes.first > scheme.ignore_index
    labels = torch.from_numpy(codes.lookup((count,))[np.array([0, count, 1])]).view(1, 3, 1, 1)
    found, merged = codes.decode(labels)
    assert found.ravel().tolist() == [0, count, 1]
    assert merged.nonzero().tolist() == [[0, count]]
