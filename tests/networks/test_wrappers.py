"""Wrappers: slices for 2D networks, label maps for cascades."""

import pytest
import torch
from torch import nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.registry import build_network, check_patch, set_deep_supervision
from ukbob_seg.networks.wrappers import CascadeNetwork, SliceNetwork, unwrapped

FLAT_UNET = {
    "features_per_stage": [4, 8], "strides": [[1, 1], [2, 2]], "kernel_sizes": [[3, 3], [3, 3]],
    "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "deep_supervision": True,
}  # fmt: skip


class _Pyramid(nn.Module):
    """Two outputs, the second at half size."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 2, stride=2)

    def forward(self, image):
        return [self.fine(image), self.coarse(image)]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_2d_network_sees_every_slice_by_itself(axis):
    network, image = _Pyramid(), torch.randn(2, 2, 6, 8, 10)
    fine, coarse = SliceNetwork(network, axis)(image)
    halves = [n if a == axis else n // 2 for a, n in enumerate((6, 8, 10))]
    assert fine.shape == (2, 3, 6, 8, 10)
    assert coarse.shape == (2, 3, *halves)
    for k in range(image.shape[axis + 2]):
        for volume, slice_ in zip((fine, coarse), network(image.select(axis + 2, k)), strict=True):
            torch.testing.assert_close(volume.select(axis + 2, k), slice_)


def test_a_label_map_becomes_one_channel_per_label():
    seen = []

    class _Recorder(nn.Module):
        def forward(self, image):
            seen.append(image)
            return image

    image = torch.randn(1, 3, 2, 3, 4)
    image[:, 2] = torch.randint(0, 5, (1, 2, 3, 4))
    CascadeNetwork(_Recorder(), 2, 3)(image)
    assert seen[0].shape == (1, 5, 2, 3, 4)
    torch.testing.assert_close(seen[0][:, :2], image[:, :2])
    for label in (1, 2, 3):  # 4 is no label of this network: background
        torch.testing.assert_close(seen[0][:, 1 + label], (image[:, 2] == label).float())


def test_the_registry_builds_wrapped_networks():
    flat = build_network("plain_conv_unet", 2, 4, {**FLAT_UNET, "slice_axis": 1})
    assert isinstance(flat, SliceNetwork)
    assert not any(isinstance(module, nn.Conv3d) for module in flat.modules())
    outputs = flat(torch.randn(1, 2, 8, 3, 12))
    assert tuple(outputs[0].shape) == (1, 4, 8, 3, 12)
    set_deep_supervision(flat, False)
    assert flat(torch.randn(1, 2, 8, 3, 12)).shape == (1, 4, 8, 3, 12)
    solid = {**FLAT_UNET, "strides": [1, 2], "kernel_sizes": [[3, 3, 3], [3, 3, 3]], "deep_supervision": False}
    second = build_network("plain_conv_unet", 2, 4, {**solid, "previous_labels": 3})
    assert isinstance(second, CascadeNetwork)
    assert second(torch.zeros(1, 3, 8, 8, 8)).shape == (1, 4, 8, 8, 8)
    assert "indices" not in second.state_dict()
    assert unwrapped(second) is second.network


def test_the_patch_of_a_2d_network():
    arguments = {**FLAT_UNET, "slice_axis": 1}
    check_patch("plain_conv_unet", arguments, (8, 1, 6))
    with pytest.raises(ConfigError, match=r"divisible by \(2, 1, 2\)"):
        check_patch("plain_conv_unet", arguments, (8, 1, 7))
