"""Plans: nnU-Net's rules for spacing and normalization, patches a network can take, the same bytes every time."""

import dataclasses

import numpy as np
import pytest

from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import ConfigError
from ukbob_seg.preprocessing.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from ukbob_seg.preprocessing.network_plans import PlanningInput, plan_plain_conv_unet, plan_swin_unetr
from ukbob_seg.preprocessing.planner import PlanOptions, plan
from ukbob_seg.preprocessing.plans import Plans

STATISTICS = IntensityStatistics(20.0, 18.0, 40.0, -1000.0, 900.0, -100.0, 300.0)


def _spec(channels=("MRI",), labels=None):
    content = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": labels or {"background": 0, "a": 1, "b": 2},
        "file_ending": ".nii.gz",
    }
    return DatasetSpec.from_json(content, "Dataset001_Test")


def _fingerprint(shapes, spacings, cropped=None, channels=1, axes=(2,)):
    cropped = cropped or shapes
    cases = tuple(
        CaseFingerprint(f"c{i}", shape, spacing, crop, axes[i % len(axes)])
        for i, (shape, spacing, crop) in enumerate(zip(shapes, spacings, cropped, strict=True))
    )
    return Fingerprint("Dataset001_Test", cases, (STATISTICS,) * channels, {"1": len(cases), "2": len(cases)}, "hash")


def _plan(fingerprint, spec=None, **options):
    return plan(fingerprint, spec or _spec(), PlanOptions(**{"memory_gb": 8, **options}))


def _nnunet_target_spacing(spacings, sizes):
    """ExperimentPlanner.determine_fullres_target_spacing of nnU-Net v2, written out."""
    spacings, sizes = np.vstack(spacings), np.vstack(sizes)
    target, target_size = np.percentile(spacings, 50, 0), np.percentile(sizes, 50, 0)
    worst = int(np.argmax(target))
    others = [i for i in range(3) if i != worst]
    if target[worst] > 3 * max(target[others]) and target_size[worst] * 3 < min(target_size[others]):
        coarse = np.percentile(spacings[:, worst], 10)
        target[worst] = max(max(target[others]), coarse) + 1e-5 if coarse < max(target[others]) else coarse
    return target


@pytest.mark.parametrize("seed", range(12))
def test_target_spacing_is_nnunets(seed):
    generator = np.random.default_rng(seed)
    coarse = generator.choice([1.0, 2.0, 5.0, 8.0])
    spacings = [tuple(generator.uniform(0.6, 1.2, 3) * (coarse, 1, 1)) for _ in range(11)]
    sizes = [tuple(int(v) for v in generator.integers(20, 200, 3) // (coarse, 1, 1) + 1) for _ in range(11)]
    plans = _plan(_fingerprint(sizes, spacings))
    expected = _nnunet_target_spacing(spacings, sizes)
    assert np.allclose(plans.configuration("3d_fullres").spacing_mm, expected, atol=2e-5)


def test_the_anisotropy_rule_acts():
    spacings = [(5.0, 1.0, 1.0)] * 8 + [(4.0, 1.0, 1.0)] * 2
    plans = _plan(_fingerprint([(20, 200, 200)] * 10, spacings))
    assert plans.configuration("3d_fullres").spacing_mm == (4.0, 1.0, 1.0)
    assert any("10th percentile" in reason for reason in plans.reasons)
    thick = _plan(_fingerprint([(100, 200, 200)] * 10, spacings))  # enough slices: no special treatment
    assert thick.configuration("3d_fullres").spacing_mm == (5.0, 1.0, 1.0)


def test_normalization_follows_the_channel_names():
    fingerprint = _fingerprint([(50, 50, 50)] * 3, [(1.0, 1.0, 1.0)] * 3, channels=4)
    schemes = _plan(fingerprint, _spec(("CT", "T1", "noNorm", "rescale_to_0_1"))).normalization
    assert [s.scheme for s in schemes] == ["ct", "zscore", "no_norm", "rescale_to_0_1"]
    assert (schemes[0].clip_low, schemes[0].clip_high, schemes[0].mean, schemes[0].std) == (-100.0, 300.0, 20.0, 40.0)
    assert not schemes[1].mask_nonzero
    paper = _plan(fingerprint, _spec(("CT", "T1", "noNorm", "zscore")), preset="ukbob").normalization
    assert [s.scheme for s in paper] == ["ct_window", "rescale_to_0_1", "no_norm", "rescale_to_0_1"]
    assert (paper[0].clip_low, paper[0].clip_high) == (-175.0, 250.0)


def test_the_mask_is_used_when_cropping_removes_much():
    shapes, spacings = [(100, 100, 100)] * 3, [(1.0, 1.0, 1.0)] * 3
    much = _plan(_fingerprint(shapes, spacings, cropped=[(80, 90, 90)] * 3))  # keeps 65%
    little = _plan(_fingerprint(shapes, spacings, cropped=[(95, 95, 95)] * 3))  # keeps 86%
    assert much.normalization[0].mask_nonzero
    assert not little.normalization[0].mask_nonzero


@pytest.mark.parametrize("memory_gb", [2, 5, 8, 24, 80])
@pytest.mark.parametrize(
    "shape", [(36, 50, 35), (149, 186, 157), (10, 300, 300), (501, 160, 224), (20, 20, 20), (700, 40, 40)]
)
@pytest.mark.parametrize("outputs", [2, 73, 140])
def test_every_plan_can_be_built_and_fits(shape, memory_gb, outputs):
    given = PlanningInput(shape, (1.0, 1.0, 1.0), 30.0 * np.prod(shape), 1, outputs, memory_gb)
    swin, _ = plan_swin_unetr(given)
    assert all(edge % 32 == 0 and edge <= 96 for edge in swin.patch_size)
    assert max(swin.patch_size) >= 64
    assert swin.arguments["feature_size"] % 12 == 0
    conv, _ = plan_plain_conv_unet(given)
    strides = np.prod(conv.arguments["strides"], axis=0)
    assert all(edge % stride == 0 for edge, stride in zip(conv.patch_size, strides, strict=True))
    assert all(edge // stride >= 4 for edge, stride in zip(conv.patch_size, strides, strict=True))
    assert len(conv.arguments["features_per_stage"]) == len(conv.arguments["strides"])
    if memory_gb >= 5:
        assert swin.estimated_memory_gb <= memory_gb
        assert conv.estimated_memory_gb <= memory_gb


def test_more_memory_never_gives_less():
    previous = 0.0
    for memory_gb in (3, 5, 8, 16, 40):
        given = PlanningInput((149, 186, 157), (1.0, 1.0, 1.0), 1e9, 1, 20, memory_gb)
        swin, _ = plan_swin_unetr(given)
        size = float(np.prod(swin.patch_size)) * swin.batch_size * swin.arguments["feature_size"]
        assert size >= previous
        previous = size
    assert swin.patch_size == (96, 96, 96)
    assert swin.arguments["feature_size"] == 48


def test_anisotropic_strides_and_kernels():
    given = PlanningInput((20, 320, 320), (5.0, 0.6, 0.6), 1e9, 1, 3, 16)
    conv, _ = plan_plain_conv_unet(given)
    strides, kernels = conv.arguments["strides"], conv.arguments["kernel_sizes"]
    assert kernels[0] == [1, 3, 3]
    assert strides[1] == [1, 2, 2]
    assert max(conv.patch_size) > 4 * conv.patch_size[0]


def test_a_low_resolution_configuration_for_large_cases():
    large = _plan(_fingerprint([(501, 160, 224)] * 5, [(2.2, 2.2, 2.2)] * 5))
    assert set(large.configurations) == {"3d_fullres", "3d_lowres", "3d_cascade_fullres", "2d"}
    low = large.configuration("3d_lowres")
    assert np.prod(low.networks["swin_unetr"].patch_size) >= 0.25 * np.prod(low.median_shape)
    assert low.spacing_mm[0] > 2.2
    small = _plan(_fingerprint([(60, 60, 60)] * 5, [(1.0, 1.0, 1.0)] * 5))
    assert set(small.configurations) == {"3d_fullres", "2d"}


def test_the_cascade_takes_the_labels_of_the_low_resolution():
    plans = _plan(_fingerprint([(501, 160, 224)] * 5, [(2.2, 2.2, 2.2)] * 5), memory_gb=4)
    full, cascade = plans.configuration("3d_fullres"), plans.configuration("3d_cascade_fullres")
    assert (cascade.previous_stage, cascade.arrays_of) == ("3d_lowres", "3d_fullres")
    assert (cascade.spacing_mm, cascade.median_shape) == (full.spacing_mm, full.median_shape)
    for network in ("swin_unetr", "plain_conv_unet"):
        assert cascade.network(network).arguments["previous_labels"] == 2
        assert cascade.network(network).estimated_memory_gb <= 4
        assert "previous_labels" not in full.network(network).arguments
    many = {"background": 0} | {f"l{v}": v for v in range(1, 73)}
    wide = _plan(_fingerprint([(501, 160, 224)] * 5, [(2.2, 2.2, 2.2)] * 5), _spec(labels=many), batch_size=2)
    first, second = (wide.configuration(name).network("swin_unetr") for name in ("3d_fullres", "3d_cascade_fullres"))
    assert first.patch_size == second.patch_size
    assert second.estimated_memory_gb - first.estimated_memory_gb == pytest.approx(
        2 * 72 * 2 * np.prod(first.patch_size) * 4 / 2**30, abs=0.01
    )


@pytest.mark.parametrize(
    ("shape", "spacing", "axis"),
    [
        ((30, 200, 180), (4.0, 0.7, 0.7), 0),
        ((200, 30, 180), (0.7, 4.0, 0.7), 1),
        ((200, 180, 30), (0.7, 0.7, 4.0), 2),
        ((90, 80, 70), (1.0, 1.0, 1.0), 0),
    ],
)
def test_slices_lie_across_the_coarsest_axis(shape, spacing, axis):
    slices = _plan(_fingerprint([shape] * 5, [spacing] * 5)).configuration("2d")
    assert slices.slice_axis == axis
    assert set(slices.networks) == {"plain_conv_unet"}
    plan_2d = slices.network("plain_conv_unet")
    assert plan_2d.patch_size[axis] == 1
    edges = [n for a, n in enumerate(plan_2d.patch_size) if a != axis]
    assert len(edges) == 2
    assert all(n >= 64 for n in edges)
    assert plan_2d.arguments["slice_axis"] == axis
    assert all(len(stride) == 2 for stride in plan_2d.arguments["strides"] + plan_2d.arguments["kernel_sizes"])
    assert [n % s for n, s in zip(edges, np.prod(plan_2d.arguments["strides"], axis=0), strict=True)] == [0, 0]
    assert plan_2d.estimated_memory_gb <= 8
    assert plan_2d.batch_size >= 2


def test_slices_keep_the_spacing_across_them():
    shapes, spacings = (
        [(40, 200, 200), (20, 200, 200), (30, 200, 200)],
        [(3.0, 1.0, 1.0), (6.0, 1.0, 1.0), (5.0, 1.0, 1.0)],
    )
    slices = _plan(_fingerprint(shapes, spacings)).configuration("2d")
    assert (slices.spacing_mm, slices.median_shape) == ((5.0, 1.0, 1.0), (30, 200, 200))
    assert slices.target_spacing((3.0, 2.0, 2.0)) == (3.0, 1.0, 1.0)
    wished = _plan(_fingerprint(shapes, spacings), spacing_mm=(2.0, 2.0, 2.5), batch_size=5).configuration("2d")
    assert (wished.slice_axis, wished.spacing_mm) == (2, (2.0, 2.0, 1.0))
    assert wished.network("plain_conv_unet").batch_size == 5


@pytest.mark.parametrize("memory_gb", [1, 2, 8, 24])
def test_slices_fit_the_budget(memory_gb):
    given = PlanningInput((300, 2000, 1500), (1.0, 1.0, 1.0), 1e12, 3, 20, memory_gb, slice_axis=0)
    found, _ = plan_plain_conv_unet(given)
    assert found.estimated_memory_gb <= memory_gb or memory_gb == 1
    assert found.patch_size[0] == 1
    stages = len(found.arguments["strides"])
    assert found.arguments["features_per_stage"][-1] == min(512, 32 * 2 ** (stages - 1))


def test_patches_that_are_asked_for_leave_slices_out():
    plans = _plan(_fingerprint([(100, 100, 100)] * 5, [(1.0, 1.0, 1.0)] * 5), patch_size=(64, 64, 64))
    assert set(plans.configurations) == {"3d_fullres"}
    assert any(reason.startswith("2d: left out") for reason in plans.reasons)


def test_the_papers_preset():
    plans = _plan(_fingerprint([(501, 160, 224)] * 5, [(3.0, 2.0, 2.0)] * 5), preset="ukbob", memory_gb=4)
    full = plans.configuration("3d_fullres")
    swin = full.network("swin_unetr")
    assert (swin.patch_size, swin.batch_size, swin.arguments) == (
        (96, 96, 96), 8, {"feature_size": 48, "patch_merging": "distinct"},
    )  # fmt: skip
    assert len(set(full.spacing_mm)) == 1
    assert full.spacing_mm[0] ** 3 == pytest.approx(12.0)
    assert any("OVER the budget" in reason for reason in plans.reasons)


def test_wishes_are_honoured_or_refused():
    fingerprint = _fingerprint([(100, 100, 100)] * 5, [(1.0, 1.0, 1.0)] * 5)
    plans = _plan(fingerprint, spacing_mm=(2.0, 1.5, 1.5), patch_size=(64, 32, 64), batch_size=3, feature_size=36)
    full = plans.configuration("3d_fullres")
    assert full.spacing_mm == (2.0, 1.5, 1.5)
    assert full.network("swin_unetr").patch_size == full.network("plain_conv_unet").patch_size == (64, 32, 64)
    assert full.network("swin_unetr").batch_size == full.network("plain_conv_unet").batch_size == 3
    assert full.network("swin_unetr").arguments["feature_size"] == 36
    for wish, message in (
        ({"patch_size": (48, 64, 64)}, "multiples of 32"),
        ({"patch_size": (32, 32, 32)}, "at least 64"),
    ):
        with pytest.raises(ConfigError, match=message):
            _plan(fingerprint, **wish)
    for wish in (
        {"preset": "best"},
        {"memory_gb": 0},
        {"feature_size": 20},
        {"batch_size": 0},
        {"spacing_mm": (0, 1, 1)},
    ):
        with pytest.raises(ConfigError):
            PlanOptions(**wish)


def test_options_of_interpolation_enter_every_configuration(tmp_path):
    fingerprint = _fingerprint([(400, 400, 400)] * 5, [(1.0, 1.0, 1.0)] * 5)
    plans = _plan(fingerprint, anti_alias=True, coarse_order=1)
    plans.save(tmp_path / "plans.json")
    for configuration in Plans.load(tmp_path / "plans.json").configurations.values():
        assert configuration.anti_alias is True
        assert configuration.coarse_order == 1
    assert len(plans.configurations) == 4
    content = _plan(fingerprint).to_json()
    full = content["configurations"]["3d_fullres"]
    older = {key: value for key, value in full.items() if key not in ("anti_alias", "coarse_order")}
    read = Plans.from_json({**content, "configurations": {"3d_fullres": older}}).configuration("3d_fullres")
    assert (read.anti_alias, read.coarse_order) == (False, 0)
    for change, message in (
        ({"anti_alias": "yes"}, "anti_alias must be true or false, got 'yes'"),
        ({"coarse_order": 3}, r"coarse_order must be 0 \(nearest\) or 1 \(linear\), got 3"),
        ({"coarse_order": True}, "coarse_order must be 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Plans.from_json({**content, "configurations": {"3d_fullres": {**full, **change}}})


def test_the_same_input_gives_the_same_bytes(tmp_path):
    fingerprint = _fingerprint([(100, 90, 80)] * 5, [(1.0, 0.9, 0.8)] * 5)
    for name in ("a", "b"):
        _plan(fingerprint).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert Plans.load(tmp_path / "a") == _plan(fingerprint)
    _plan(fingerprint).save(tmp_path / "a")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_plans_that_were_edited_are_kept(tmp_path):
    fingerprint = _fingerprint([(100, 90, 80)] * 5, [(1.0, 0.9, 0.8)] * 5)
    path = tmp_path / "plans.json"
    _plan(fingerprint).save(path)
    edited = path.read_text().replace('"image_order": 3', '"image_order": 1')
    path.write_text(edited)
    _plan(fingerprint).save(path)
    assert Plans.load(path).configuration("3d_fullres").image_order == 3
    assert (tmp_path / "plans.previous.json").read_text() == edited


def test_edited_plans_are_checked():
    content = _plan(_fingerprint([(100, 90, 80)] * 5, [(1.0, 0.9, 0.8)] * 5)).to_json()
    full = {**content["configurations"]["3d_fullres"], "networks": {"swin_unetr": {"pach_size": [1, 1, 1]}}}
    with pytest.raises(ConfigError, match="unknown entry pach_size"):
        Plans.from_json({**content, "configurations": {"3d_fullres": full}})
    with pytest.raises(ConfigError, match="missing entry preset"):
        Plans.from_json({key: value for key, value in content.items() if key != "preset"})
    with pytest.raises(ConfigError, match="format 9"):
        Plans.from_json({**content, "format_version": 9})
    with pytest.raises(ConfigError, match="no configuration '4d'"):
        Plans.from_json(content).configuration("4d")
    with pytest.raises(ConfigError, match="no network 'unet'"):
        Plans.from_json(content).configuration("3d_fullres").network("unet")


def test_absent_labels_are_named():
    fingerprint = dataclasses.replace(
        _fingerprint([(50, 50, 50)], [(1.0, 1.0, 1.0)]), cases_with_label={"1": 1, "2": 0}
    )
    assert "Labels 2 occur in no case" in _plan(fingerprint).reasons[0]


def test_left_right_axis_only_when_all_cases_agree():
    shapes, spacings = [(50, 50, 50)] * 4, [(1.0, 1.0, 1.0)] * 4
    assert _plan(_fingerprint(shapes, spacings)).left_right_axis == 2
    assert _plan(_fingerprint(shapes, spacings, axes=(2, 0))).left_right_axis is None
