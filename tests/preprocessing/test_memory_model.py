"""Memory model: its counts are those of the networks, and it lies near the peaks that were measured."""

import math

import pytest
import torch

from ukbob_seg.networks.registry import build_network
from ukbob_seg.preprocessing.memory_model import CONV, GIB, plain_conv_unet_memory_gb, swin_unetr_memory_gb

# (patch, batch, feature size, channels, outputs), GiB: benchmarks/memory_model.py
SWIN_CPU = [
    (((32, 32, 64), 1, 24, 1, 3), 1.10),
    (((32, 64, 32), 7, 24, 1, 3), 2.12),
    (((64, 64, 64), 1, 12, 1, 3), 1.41),
    (((64, 64, 64), 1, 48, 4, 73), 2.40),
    (((96, 96, 96), 1, 12, 1, 3), 2.06),
    (((96, 96, 96), 1, 24, 4, 73), 3.14),
    (((96, 96, 96), 1, 48, 1, 14), 3.96),
]
SWIN_CUDA = [
    (((64, 64, 64), 1, 12, 1, 3), 1.84),
    (((64, 64, 64), 2, 24, 1, 3), 3.92),
    (((32, 64, 32), 7, 24, 1, 3), 4.21),
    (((64, 64, 64), 1, 48, 4, 73), 2.71),
    (((96, 96, 96), 1, 24, 1, 3), 5.77),
    (((64, 64, 64), 1, 24, 1, 139), 2.17),
]
STRIDES = [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)]
FEATURES = (32, 64, 128, 256, 320)
BLOCKS = (1, 3, 4, 6, 6)


@pytest.mark.parametrize(("sizes", "measured"), SWIN_CPU)
def test_swin_near_the_peak_of_a_process_on_the_cpu(sizes, measured):
    assert 0.95 <= swin_unetr_memory_gb(*sizes, device="cpu") / measured <= 1.45


@pytest.mark.parametrize(("sizes", "measured"), SWIN_CUDA)
def test_swin_near_the_peak_reserved_on_a_gpu(sizes, measured):
    assert 0.9 <= swin_unetr_memory_gb(*sizes, device="cuda") / measured <= 1.62


@pytest.mark.parametrize(
    ("patch", "batch", "outputs", "blocks", "measured"),
    [
        ((64, 64, 64), 1, 3, None, 1.43),
        ((64, 64, 64), 1, 139, None, 2.06),
        ((96, 96, 96), 1, 3, None, 2.97),
        ((64, 64, 64), 1, 3, BLOCKS, 2.19),
    ],
)
def test_conv_near_the_peak_of_a_process_on_the_cpu(patch, batch, outputs, blocks, measured):
    predicted = plain_conv_unet_memory_gb(patch, batch, STRIDES, FEATURES, 1, outputs, blocks)
    assert 0.95 <= predicted / measured <= 1.4


def test_without_a_device_the_larger_counts():
    for sizes, _ in SWIN_CPU + SWIN_CUDA:
        each = [swin_unetr_memory_gb(*sizes, device=device) for device in ("cpu", "cuda")]
        assert swin_unetr_memory_gb(*sizes) == max(each)


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["plain", "residual"])
def test_counts_are_those_of_the_network(blocks):
    """Weights, and values that the forward pass keeps for the backward pass."""
    pytest.importorskip("dynamic_network_architectures", reason="nnU-Net's networks are optional")
    stages, outputs, patch = len(STRIDES), 3, (64, 64, 64)
    arguments = {
        "features_per_stage": list(FEATURES), "strides": [list(s) for s in STRIDES],
        "kernel_sizes": [[3, 3, 3]] * stages, "n_conv_per_stage": list(blocks or [2] * stages),
        "n_conv_per_stage_decoder": [1 if blocks else 2] * (stages - 1), "deep_supervision": True,
    }  # fmt: skip
    name = "residual_encoder_unet" if blocks else "plain_conv_unet"
    with torch.device("meta"):
        network = build_network(name, 1, outputs, arguments)
        kept: dict[int, torch.UntypedStorage] = {}
        of_weights = {p.untyped_storage()._cdata for p in network.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in of_weights:
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(torch.zeros(1, 1, *patch))
    values = sum(storage.nbytes() for storage in kept.values()) / 4 / math.prod(patch)
    weights = sum(p.numel() for p in network.parameters())

    def predicted(batch):
        return plain_conv_unet_memory_gb(patch, batch, STRIDES, FEATURES, 1, outputs, blocks)

    per_voxel = (predicted(2) - predicted(1)) * GIB / 4 / math.prod(patch)
    per_output = CONV.per_output * outputs * sum(8.0**-n for n in range(stages - 1))
    assert (per_voxel - per_output - 2) / CONV.per_value == pytest.approx(values, rel=0.03)
    assert (2 * predicted(1) - predicted(2) - CONV.base_gb) * GIB / 16 == pytest.approx(weights, rel=0.03)


@pytest.mark.parametrize("features", [12, 48])
def test_weights_of_swin(features):
    network = build_network("swin_unetr", 1, 3, {"feature_size": features})
    counted = sum(p.numel() for p in network.parameters())
    assert 27_000 * features**2 == pytest.approx(counted, rel=0.06)
