"""--preset nnunet against what nnU-Net's own planners decided (recorded by benchmarks/nnunet_planner.py)."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.registry import build_network, check_patch, set_deep_supervision
from ukbob_seg.preprocessing.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from ukbob_seg.preprocessing.nnunet_rules import (
    SIZINGS,
    Cases,
    Topology,
    build_topology,
    coarsest_first,
    feature_map_values,
    size_all,
    size_network,
    target_spacing,
)
from ukbob_seg.preprocessing.planner import PlanOptions, plan
from ukbob_seg.preprocessing.plans import Plans

RECORDED = json.loads((Path(__file__).parent / "nnunet_decisions.json").read_text(encoding="utf-8"))["datasets"]
SCHEMES = {
    "CTNormalization": "ct",
    "ZScoreNormalization": "zscore",
    "NoNormalization": "no_norm",
    "RescaleTo01Normalization": "rescale_to_0_1",
    "RGBTo01Normalization": "rgb_to_0_1",
}
STATISTICS = IntensityStatistics(20.0, 18.0, 40.0, -1000.0, 900.0, -100.0, 300.0)


def _spec(dataset):
    content = {
        "channel_names": {str(i): name for i, name in enumerate(dataset["channels"])},
        "labels": dataset["label_table"],
        "file_ending": ".nii.gz",
    }
    if dataset.get("regions"):
        content["regions_class_order"] = list(range(1, dataset["labels"] + 1))
    return DatasetSpec.from_json(content, "Dataset001_Test")


def _fingerprint(dataset):
    entries = [entry for entry in dataset["groups"] for _ in range(entry["count"])]
    cases = tuple(
        CaseFingerprint(f"c{i}", tuple(entry["shape"]), tuple(entry["spacing"]), tuple(entry["cropped"]), None)
        for i, entry in enumerate(entries)
    )
    return Fingerprint("Dataset001_Test", cases, (STATISTICS,) * len(dataset["channels"]), {"1": len(cases)}, "hash")


@cache
def _plans(key, **wishes):
    dataset = RECORDED[key]
    spacing = tuple(dataset["spacing"]) if "spacing" in dataset else None
    options = PlanOptions(preset="nnunet", memory_gb=dataset.get("memory_gb"), spacing_mm=spacing, **wishes)
    return plan(_fingerprint(dataset), _spec(dataset), options)


def _our_name(configuration, network):
    """Low resolutions of the residual networks carry their name."""
    own = network != "plain_conv_unet" and configuration in ("3d_lowres", "3d_cascade_fullres")
    return f"{configuration}_{network}" if own else configuration


def _zyx(values, axes):
    """From nnU-Net's order of axes to the array's."""
    return [value for _, value in sorted(zip(axes, values, strict=True))]


@pytest.mark.parametrize("key", RECORDED)
@pytest.mark.parametrize("network", SIZINGS)
def test_the_plans_are_nnunets(key, network):
    plans, theirs = _plans(key), RECORDED[key]["decisions"][network]
    ours = {name for name, entry in plans.configurations.items() if network in entry.networks}
    assert ours == {_our_name(name, network) for name in theirs["configurations"]}
    schemes, masks = theirs["normalization"]
    assert [(entry.scheme, entry.mask_nonzero) for entry in plans.normalization] == [
        (SCHEMES[scheme], mask) for scheme, mask in zip(schemes, masks, strict=True)
    ]
    for name, expected in theirs["configurations"].items():
        configuration = plans.configuration(_our_name(name, network))
        entry = configuration.network(network)
        if "inherits_from" in expected:
            assert configuration.previous_stage == _our_name(expected["previous_stage"], network)
            assert configuration.arrays_of == expected["inherits_from"] == "3d_fullres"
            full = plans.configuration("3d_fullres").network(network)
            assert entry.arguments == {**full.arguments, "previous_labels": RECORDED[key]["labels"]}
            assert (entry.patch_size, entry.batch_size) == (full.patch_size, full.batch_size)
            continue
        axes = theirs["transpose"][1:] if name == "2d" else theirs["transpose"]
        assert configuration.slice_axis == (theirs["transpose"][0] if name == "2d" else None)
        assert [configuration.spacing_mm[axis] for axis in axes] == expected["spacing"]
        assert [configuration.median_shape[axis] for axis in axes] == [int(n) for n in expected["median_shape"]]
        assert [entry.patch_size[axis] for axis in axes] == expected["patch"]
        assert np.prod(entry.patch_size) == np.prod(expected["patch"])
        assert entry.batch_size == expected["batch"]
        arguments = entry.arguments
        assert arguments["strides"] == [_zyx(stride, axes) for stride in expected["strides"]]
        assert arguments["kernel_sizes"] == [_zyx(kernel, axes) for kernel in expected["kernels"]]
        assert arguments["features_per_stage"] == expected["features"]
        assert arguments["n_conv_per_stage"] == expected["encoder"]
        assert arguments["n_conv_per_stage_decoder"] == expected["decoder"]


@pytest.mark.parametrize("key", RECORDED)
def test_the_rules_are_nnunets_to_the_last_bit(key):
    """Before the axes go back and medians are cut to whole voxels."""
    dataset = RECORDED[key]
    cases = _fingerprint(dataset).cases
    given = Cases(
        np.array([case.spacing_mm for case in cases]),
        np.array([case.cropped_shape for case in cases]),
        len(dataset["label_table"]),
    )
    target = np.array(dataset["spacing"]) if "spacing" in dataset else target_spacing(given)
    for network, theirs in dataset["decisions"].items():
        assert list(coarsest_first(target)) == theirs["transpose"]
        found = size_all(given, target, SIZINGS[network], dataset.get("memory_gb"))
        for name, size in found.items():
            expected = theirs["configurations"][name]
            assert list(size.spacing_mm) == expected["spacing"]
            assert list(size.median_shape) == expected["median_shape"]
            assert (list(size.topology.patch), size.batch) == (expected["patch"], expected["batch"])


@pytest.mark.parametrize("key", ["prostate", "coarse_last", "ukb", "single_slices"])
def test_plans_survive_their_file(key, tmp_path):
    _plans(key).save(tmp_path / "plans.json")
    assert Plans.load(tmp_path / "plans.json") == _plans(key)


def test_every_planned_patch_suits_its_network():
    for key in RECORDED:
        for configuration in _plans(key).configurations.values():
            for name, entry in configuration.networks.items():
                if configuration.slice_axis is None:
                    check_patch(name, entry.arguments, entry.patch_size)


def _small_topology(dims):
    patch, spacing = ((16, 24, 8), (1.0, 1.0, 2.5)) if dims == 3 else ((24, 32), (1.0, 1.1))
    return build_topology(spacing, patch)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("network", ["plain_conv_unet", "resenc_unet_l"])
def test_the_estimate_is_nnunets_count_of_feature_maps(network, dims, monkeypatch):
    dynamic = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    from torch import nn

    sizing, topology = SIZINGS[network], _small_topology(dims)
    monkeypatch.setattr("ukbob_seg.preprocessing.nnunet_rules.BASE_FEATURES", 4)
    monkeypatch.setattr("ukbob_seg.preprocessing.nnunet_rules.MAX_FEATURES", {2: 14, 3: 10})
    stages = len(topology.strides)
    assert stages >= 3
    arguments = {
        "features_per_stage": list(topology.features),
        "strides": [list(stride) for stride in topology.strides],
        "kernel_sizes": [list(kernel) for kernel in topology.kernels],
        "n_conv_per_stage": list(sizing.encoder_blocks[:stages]),
        "n_conv_per_stage_decoder": [sizing.decoder_convolutions] * (stages - 1),
    }
    if dims == 3:
        built = build_network(network, 2, 5, {**arguments, "deep_supervision": True})
        set_deep_supervision(built, False)
    else:
        blocks = arguments.pop("n_conv_per_stage")
        kind = dynamic.ResidualEncoderUNet if sizing.residual else dynamic.PlainConvUNet
        built = kind(
            input_channels=2, num_classes=5, n_stages=stages, conv_op=nn.Conv2d, conv_bias=True,
            norm_op=nn.InstanceNorm2d, norm_op_kwargs={}, nonlin=nn.LeakyReLU,
            **{"n_blocks_per_stage" if sizing.residual else "n_conv_per_stage": blocks}, **arguments,
        )  # fmt: skip
    assert feature_map_values(topology, sizing, 5) == built.compute_conv_feature_map_size(topology.patch)


def test_the_estimate_of_the_reference_networks():
    """The figures that nnU-Net's source states for its residual reference networks, which have deep supervision."""
    sizing = SIZINGS["resenc_unet_m"]
    cube = Topology((128,) * 3, ((1,) * 3,) + ((2,) * 3,) * 5, ((3,) * 3,) * 6, (32,) * 3)
    square = Topology((512, 512), ((1, 1),) + ((2, 2),) * 6, ((3, 3),) * 7, (64, 64))
    assert feature_map_values(cube, sizing, 3) + 3 * sum((128 >> k) ** 3 for k in range(1, 5)) == 558_319_104
    assert feature_map_values(square, sizing, 3) + 3 * sum((512 >> k) ** 2 for k in range(1, 6)) == 129_793_792


def test_topology_of_slabs_and_short_axes():
    slab = build_topology((5.0, 1.0, 1.0), (16, 128, 128))
    assert slab.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    assert slab.kernels == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert build_topology((1.0, 1.0), (11, 3)).strides == ((1, 1),)  # one axis alone is pooled from 12 voxels on
    assert build_topology((1.0, 1.0), (12, 3)).strides == ((1, 1), (2, 1))
    assert build_topology((1.0, 1.0), (12.5, 9)).patch == (14, 10)


def test_memory_scales_the_reference():
    options = {"memory_gb": None}, {"memory_gb": 8.0}, {"memory_gb": 16.0}
    shape, voxels = (300, 300, 300), 1e10
    small, same, large = (size_network((1.0,) * 3, shape, voxels, 5, SIZINGS["plain_conv_unet"], **o) for o in options)
    assert small == same
    assert np.prod(large.topology.patch) > np.prod(small.topology.patch)
    assert small.memory_gb <= 8
    half, l_default = (size_network((1.0,) * 3, shape, voxels, 5, SIZINGS["resenc_unet_l"], m) for m in (12.0, None))
    assert np.prod(half.topology.patch) < np.prod(l_default.topology.patch)


def test_a_patch_that_cannot_shrink_is_no_endless_loop(monkeypatch):
    monkeypatch.setattr("ukbob_seg.preprocessing.nnunet_rules._shrink", lambda topology, *_: topology)
    with pytest.raises(ConfigError, match="no patch of a network with 5 outputs fits 8 GB"):
        size_network((1.0,) * 3, (300, 300, 300), 1e10, 5, SIZINGS["plain_conv_unet"])


def test_wishes_with_the_preset():
    larger = _plans("hippocampus", batch_size=3)
    for configuration in larger.configurations.values():
        assert {entry.batch_size for entry in configuration.networks.values()} == {3}
    for wish in ({"patch_size": (64, 64, 64)}, {"feature_size": 24}):
        with pytest.raises(ConfigError, match="cannot be combined with --preset nnunet"):
            PlanOptions(preset="nnunet", **wish)
    ukb = _plans("ukb")
    assert ukb.memory_gb == 8.0
    swin = ukb.configuration("3d_cascade_fullres").network("swin_unetr")
    assert swin.arguments["previous_labels"] == 72
    assert "swin_unetr" not in ukb.configuration("2d").networks
    assert any("24 GB (resenc_unet_l)" in reason for reason in ukb.reasons)


def test_cases_too_small_for_nnunet():
    dataset = {**RECORDED["tiny"], "groups": [{"count": 4, "shape": [7] * 3, "spacing": [1.0] * 3, "cropped": [7] * 3}]}
    with pytest.raises(ConfigError, match="cases of 7x7x7 voxels and 3 outputs, because its patch would be too small"):
        plan(_fingerprint(dataset), _spec(dataset), PlanOptions(preset="nnunet"))
