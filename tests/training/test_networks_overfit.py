"""Every network of the registry learns two real cases by heart, at a small size: its layers are connected rightly."""

import numpy as np
import pytest
import torch
from small_networks import SMALL, present

from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.networks.convolution import quick_convolutions
from ukbob_seg.networks.registry import NETWORKS, build_network, check_patch, set_deep_supervision
from ukbob_seg.training.losses import SoftmaxDiceLoss, with_deep_supervision

CASES = ("hippocampus_003", "hippocampus_006")
CLASSES = 3
STEPS, EVERY = 100, 5
# The same class and size under other names; diffusion learns otherwise, and has such a test of its own.
LEFT_OUT = ("resenc_", "medsegdiff_")
RATES = {"unet": 3e-3, "unetr": 3e-3, "vnet": 3e-3, "swin_unetr": 6e-3, "swin_unetr_v2": 6e-3}  # others 1e-2

ENOUGH = 0.8


def _fitted(array, shape, fill):
    """Cut or padded around its middle."""
    for axis, (n, m) in enumerate(zip(array.shape, shape, strict=True)):
        if n > m:
            array = array.take(range((n - m) // 2, (n - m) // 2 + m), axis)
    before = [(m - n) // 2 for n, m in zip(array.shape, shape, strict=True)]
    pads = [(b, m - n - b) for b, n, m in zip(before, array.shape, shape, strict=True)]
    return np.pad(array, pads, constant_values=fill)


@pytest.fixture(scope="module")
def cases(data_root):
    """[(image, labels)], z-scored."""
    folder, found = data_root / "Dataset004_Hippocampus", []
    for name in CASES:
        image = read_image([folder / "imagesTr" / f"{name}_0000.nii.gz"])[0][0]
        labels, _ = read_labels(folder / "labelsTr" / f"{name}.nii.gz")
        found.append(((image - image.mean()) / image.std(), labels))
    return found


def _side_by_side(cases, patch):
    """(1, 1, *patch) and (1, *patch): the middle of one case in the front half, of the other in the back half."""
    half = (patch[0], patch[1] // 2, patch[2])
    image = np.concatenate([_fitted(image, half, image.min()) for image, _ in cases], axis=1)
    labels = np.concatenate([_fitted(labels, half, 0) for _, labels in cases], axis=1)
    return torch.from_numpy(image[None, None].astype(np.float32)), torch.from_numpy(labels[None].astype(np.int32))


def _dice(network, image, labels):
    """Mean over both classes of the Dice of all voxels, as it predicts."""
    set_deep_supervision(network, False)
    network.eval()
    with torch.no_grad():
        found = network(image).argmax(1)
    network.train()
    set_deep_supervision(network, True)
    scores = []
    for value in range(1, CLASSES):
        a, b = found == value, labels == value
        scores.append(2.0 * float((a & b).sum()) / float(a.sum() + b.sum()))
    return float(np.mean(scores))


def test_enough_is_not_reached_without_learning(cases):
    image, labels = _side_by_side(cases, (32, 64, 32))
    assert set(labels.unique().tolist()) == {0, 1, 2}
    brightest = image[:, 0] > image.flatten(1).quantile(1 - float((labels > 0).float().mean()))
    for value in (1, 2):  # all voxels, or the bright ones, as one class
        for guess in (torch.ones_like(brightest), brightest):
            truth = labels == value
            assert float(2 * (guess & truth).sum() / (guess.sum() + truth.sum())) / 2 < 0.4


@pytest.mark.parametrize("name", [name for name in present() if not name.startswith(LEFT_OUT)])
def test_a_network_learns_two_cases_by_heart(name, cases):
    if "baselines" in NETWORKS[name].requires:
        pytest.importorskip("monai", reason="MONAI is not installed")
    if "dynamic" in NETWORKS[name].requires:
        pytest.importorskip("dynamic_network_architectures", reason="nnU-Net's networks are not installed")
    arguments, patch = SMALL[name]
    if patch[1] < 48 and name != "vnet":  # which is always at full width
        patch = (patch[0], 2 * patch[1], patch[2])
    check_patch(name, arguments, patch)
    torch.manual_seed(0)
    network = build_network(name, 1, CLASSES, arguments).train()
    set_deep_supervision(network, True)
    loss = with_deep_supervision(SoftmaxDiceLoss(255))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATES.get(name, 1e-2))
    image, labels = _side_by_side(cases, patch)
    best = 0.0
    with quick_convolutions(torch.device("cpu")):
        for step in range(1, STEPS + 1):
            optimizer.zero_grad(set_to_none=True)
            loss(network(image), labels).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            if step % EVERY == 0:
                best = max(best, _dice(network, image, labels))
                if best > ENOUGH:
                    break
    assert best > ENOUGH
