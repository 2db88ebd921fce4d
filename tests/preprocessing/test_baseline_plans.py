"""Networks planned on request: patches they take, the published arguments, memory as counted, the same plan twice."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from ukbob_seg.cli import plan as plan_command
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.registry import NETWORKS, check_patch
from ukbob_seg.preprocessing.baseline_plans import BASELINES, baseline_memory_gb, plan_baseline
from ukbob_seg.preprocessing.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from ukbob_seg.preprocessing.network_plans import PlanningInput, plan_plain_conv_unet, plan_residual_unet
from ukbob_seg.preprocessing.planner import PlanOptions, plan
from ukbob_seg.preprocessing.plans import Plans
from ukbob_seg.preprocessing.requested_networks import PLANNERS, RESIDUAL, load_plans, with_network

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPES = [(36, 50, 35), (149, 186, 157), (10, 300, 300), (20, 20, 20), (700, 40, 40)]


def _given(shape=(100, 120, 90), memory_gb=8.0, channels=1, outputs=3, **more):
    return PlanningInput(shape, (2.0, 1.0, 1.0), 30.0 * np.prod(shape), channels, outputs, memory_gb, **more)


def _spec(channels=1):
    content = {
        "channel_names": {str(i): "MRI" for i in range(channels)},
        "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz",
    }  # fmt: skip
    return DatasetSpec.from_json(content, "Dataset001_Test")


def _fingerprint(shape=(150, 180, 160), channels=1):
    statistics = IntensityStatistics(20.0, 18.0, 40.0, -1000.0, 900.0, -100.0, 300.0)
    cases = tuple(CaseFingerprint(f"c{i}", shape, (1.0, 1.0, 1.0), shape, 2) for i in range(10))
    return Fingerprint("Dataset001_Test", cases, (statistics,) * channels, {"1": 10, "2": 10}, "hash")


def test_every_network_of_the_registry_has_a_planner():
    assert set(PLANNERS) == set(NETWORKS)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory_gb", [3, 8, 40])
def test_patches_that_the_network_takes(name, shape, memory_gb):
    found, why = plan_baseline(name, _given(shape, memory_gb))
    check_patch(name, found.arguments, found.patch_size)
    divisor = NETWORKS[name].divisor(found.arguments)
    assert divisor == BASELINES[name].multiple
    assert any(edge > d for edge, d in zip(found.patch_size, divisor, strict=True))  # more than a voxel at the bottom
    assert max(found.patch_size) <= 96
    expected = baseline_memory_gb(name, found.patch_size, found.batch_size, 1, 3)
    assert found.estimated_memory_gb == pytest.approx(expected, abs=0.006)
    assert (found.estimated_memory_gb > memory_gb) == ("OVER the budget" in why)
    if memory_gb >= 8:
        assert found.estimated_memory_gb <= memory_gb


@pytest.mark.parametrize("name", BASELINES)
def test_more_memory_never_gives_less(name):
    sizes = []
    for memory_gb in (2, 4, 6, 8, 16, 40, 80):
        found, _ = plan_baseline(name, _given((149, 186, 157), memory_gb))
        sizes.append((int(np.prod(found.patch_size)), found.batch_size))
    voxels = [patch * batch for patch, batch in sizes]
    assert voxels == sorted(voxels)
    assert sizes[-1][1] >= 2


@pytest.fixture(scope="module")
def counting():
    """The script that counts."""
    where = importlib.util.spec_from_file_location("baseline_memory", REPOSITORY / "benchmarks" / "baseline_memory.py")
    module = importlib.util.module_from_spec(where)
    where.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", BASELINES)
def test_the_table_is_what_is_counted(name, counting):
    if "baselines" in NETWORKS[name].requires:
        pytest.importorskip("monai", reason="MONAI is not installed")
    found, table = counting.counts(name, BASELINES[name].arguments), BASELINES[name]
    assert table.patch_argument == NETWORKS[name].patch_argument
    assert found["weights"] == pytest.approx(table.weights, rel=0.02)
    assert found["outputs"] == pytest.approx(table.outputs, abs=0.01)
    for edge in (64, 96):
        voxels = edge**3 / 1e6
        kept = [
            linear + 3 * output + square * voxels
            for linear, output, square in (
                (found["kept"], found["kept_per_output"], found["kept_square"]),
                (table.kept, table.kept_per_output, table.kept_square),
            )
        ]
        assert kept[0] == pytest.approx(kept[1], rel=0.03)


def test_wishes_are_honoured_or_refused():
    found, _ = plan_baseline("unetr", _given(patch_size=(32, 48, 64), batch_size=3))
    assert (found.patch_size, found.batch_size) == ((32, 48, 64), 3)
    assert found.arguments == {"patch_size": [32, 48, 64]}
    found, why = plan_baseline("segresnet", _given(paper_recipe=True))
    assert (found.patch_size, found.batch_size) == ((96, 96, 96), 8)
    assert "the paper's recipe" in why
    with pytest.raises(ConfigError, match=r"unetr needs a patch \(z, y, x\) in multiples of \(16, 16, 16\)"):
        plan_baseline("unetr", _given(patch_size=(32, 40, 64)))
    with pytest.raises(ConfigError, match=r"twice as much along one axis at least; got \(32, 32, 32\)"):
        plan_baseline("swin_unetr_v2", _given(patch_size=(32, 32, 32)))
    with pytest.raises(ConfigError, match="vnet takes 1, 2, 4, 8, 16 input channels, but the data have 3"):
        plan_baseline("vnet", _given(channels=3))
    with pytest.raises(ConfigError, match="unet is a 3D network"):
        plan_baseline("unet", _given(slice_axis=0))
    found, _ = plan_baseline("vnet", _given(channels=1, previous_labels=3))  # a cascade with four channels in all
    assert found.arguments == {"previous_labels": 3}


def test_sizes_of_the_residual_networks():
    small, budget = _given((149, 186, 157), 8.0), _given((149, 186, 157), 80.0)
    plans = {name: plan_residual_unet(name, budget)[0] for name in RESIDUAL}
    for name, aim in (("resenc_unet_m", 8), ("resenc_unet_l", 24), ("resenc_unet_xl", 40)):
        assert plans[name].estimated_memory_gb <= aim
        assert plan_residual_unet(name, small)[0] == plans["resenc_unet_m"]  # the budget is less than all aims
    voxels = [int(np.prod(plans[name].patch_size)) * plans[name].batch_size for name in RESIDUAL[1:]]
    assert voxels[0] < voxels[1] < voxels[2]
    assert plans["residual_encoder_unet"].estimated_memory_gb <= 80
    stages = len(plans["resenc_unet_m"].arguments["strides"])
    assert plans["resenc_unet_m"].arguments["n_conv_per_stage"] == [1, 3, 4, 6, 6, 6][:stages]
    assert plans["resenc_unet_m"].arguments["n_conv_per_stage_decoder"] == [1] * (stages - 1)
    plain = plan_plain_conv_unet(small)[0]
    assert plain.arguments["n_conv_per_stage"][0] == 2


def test_plans_list_two_networks_unless_others_are_asked_for():
    usual = plan(_fingerprint(), _spec(), PlanOptions(memory_gb=8))
    assert list(usual.configurations["3d_fullres"].networks) == ["swin_unetr", "plain_conv_unet"]
    asked = plan(_fingerprint(), _spec(), PlanOptions(memory_gb=8, networks=["unetr", "resenc_unet_m"]))
    for name, configuration in asked.configurations.items():
        further = set(configuration.networks) - set(usual.configurations[name].networks)
        assert further == ({"resenc_unet_m"} if name == "2d" else {"unetr", "resenc_unet_m"})
        for network in usual.configurations[name].networks:
            assert configuration.networks[network] == usual.configurations[name].networks[network]
    assert asked.configurations["3d_cascade_fullres"].networks["unetr"].arguments["previous_labels"] == 2
    assert asked.configurations["2d"].networks["resenc_unet_m"].arguments["slice_axis"] == 0
    assert Plans.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    with pytest.raises(ConfigError, match=r"no planner for 'unter'; choose from swin_unetr, plain_conv_unet, .*unetr"):
        plan(_fingerprint(), _spec(), PlanOptions(networks=("unter",)))


@pytest.mark.parametrize("preset", ["default", "ukbob", "nnunet"])
@pytest.mark.parametrize("network", ["segresnet", "residual_encoder_unet"])
def test_what_training_plans_is_what_the_planner_would_have_planned(preset, network):
    options = {"memory_gb": 8, "preset": preset}
    asked = plan(_fingerprint(), _spec(), PlanOptions(**options, networks=(network,)))
    usual = plan(_fingerprint(), _spec(), PlanOptions(**options))
    for name, configuration in asked.configurations.items():
        if network in configuration.networks:
            later = with_network(usual, _fingerprint(), _spec(), name, network)
            assert later.configurations[name] == configuration
            assert later.reasons[:-1] == usual.reasons
            assert with_network(later, _fingerprint(), _spec(), name, network) is later
    assert network in asked.configurations["3d_fullres"].networks


def test_networks_that_a_configuration_cannot_have():
    plans = plan(_fingerprint(), _spec(), PlanOptions(memory_gb=8))
    with pytest.raises(ConfigError, match="unetr is a 3D network, and 2d is of slices"):
        with_network(plans, _fingerprint(), _spec(), "2d", "unetr")
    with pytest.raises(ConfigError, match=r"hold no network 'own:Net' for 2d \(found: plain_conv_unet\), and none of"):
        with_network(plans, _fingerprint(), _spec(), "2d", "own:Net")
    large = _fingerprint((300, 400, 400))
    nnunet = plan(large, _spec(), PlanOptions(preset="nnunet"))
    with pytest.raises(ConfigError, match="hold no network 'resenc_unet_l' for 3d_lowres "):
        with_network(nnunet, large, _spec(), "3d_lowres", "resenc_unet_l")  # it has 3d_lowres_resenc_unet_l


def test_the_command_writes_them_and_reading_leaves_the_file_alone(make_dataset, tmp_path, capsys):
    from ukbob_seg.cli import plan_and_preprocess

    make_dataset(cases=4)
    roots = ["--raw", str(tmp_path / "raw"), "--preprocessed", str(tmp_path / "preprocessed")]
    given = ["-d", "7", "--memory-gb", "2", *roots]
    assert plan_and_preprocess.main([*given, "--workers", "1"]) == 0
    folder = tmp_path / "preprocessed" / "Dataset007_Blobs"
    before = (folder / "plans.json").read_bytes()
    planned = load_plans(folder, "3d_fullres", "segresnet")
    assert (folder / "plans.json").read_bytes() == before
    assert plan_command.main([*given, "--networks", "segresnet"]) == 0
    assert "3d_fullres, segresnet: patch" in " ".join(capsys.readouterr().out.split())
    written = Plans.load(folder / "plans.json").configurations["3d_fullres"]
    assert written == planned.configurations["3d_fullres"]
    assert plan_command.main([*given, "--networks", "nothing"]) == 2


PEAKS_GIB = {
    "unet": 0.92, "vnet": 1.68, "unetr": 2.41, "segresnet": 1.47, "attention_unet": 1.27, "swin_unetr_v2": 3.42,
    "resunet_pp": 1.87, "transunet": 2.70, "transbts": 1.76, "nnformer": 3.89, "medformer": 2.57, "ux_net": 2.15,
}  # fmt: skip


@pytest.mark.parametrize("name", PEAKS_GIB)
def test_near_the_peak_of_a_process_on_the_cpu(name):
    """Three steps on one patch of 64^3, by benchmarks/memory_model.py."""
    assert 0.95 <= baseline_memory_gb(name, (64, 64, 64), 1, 1, 3) / PEAKS_GIB[name] <= 1.3


@pytest.mark.parametrize("patch", [(96, 96, 96), (64, 96, 32)])
def test_nnformer_tells_apart_all_places_of_its_third_stage(patch):
    given = PlanningInput((200, 200, 200), (1.0, 1.0, 1.0), 1e9, 1, 3, 100.0, patch_size=patch)
    arguments = PLANNERS["nnformer"](given)[0].arguments
    assert arguments["global_extent"] == [patch[0] // 8, patch[1] // 16, patch[2] // 16]
