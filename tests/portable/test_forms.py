"""The networks of an archive in onnxruntime and in MONAI, against the networks themselves."""

import importlib
import json
import zipfile

import numpy as np
import pytest
import torch
from portable_models import CLASSES, REGIONS, SWIN, UNET, make_model, roots_of
from safetensors.torch import load

from ukbob_seg import export_model, import_model
from ukbob_seg.cli.export_model import main as export_command
from ukbob_seg.errors import ConfigError
from ukbob_seg.networks.registry import build_network
from ukbob_seg.portable import monai_state, onnx_file
from ukbob_seg.portable.export import ExportOptions, example_window
from ukbob_seg.portable.monai_state import build_monai
from ukbob_seg.training.checkpoint import load_network

FLAT = {**UNET, "strides": [[1, 1], [2, 2]], "kernel_sizes": [[3, 3], [3, 3]], "slice_axis": 0}
ONE_SHIFT = {"feature_size": 12, "depths": [2, 1, 1, 1]}  # the smallest with everything in it


def _require_onnx():
    for name in onnx_file.PACKAGES:
        pytest.importorskip(name, reason=f"{name} is not installed (extra onnx)")
    return importlib.import_module("onnxruntime")


def _exported(folder, tmp_path, **options):
    exported = export_model(folder, tmp_path / "model.zip", options=ExportOptions(**options), quiet=True)
    with zipfile.ZipFile(exported.file) as archive:
        return exported.card["models"], {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize(("network", "arguments", "patch", "dataset", "configuration"), [
    ("portable_models:Small", {}, (8, 16, 16), REGIONS, "3d_fullres"),
    ("portable_models:Small", {}, (8, 16, 16), CLASSES, "3d_cascade_fullres"),
    ("plain_conv_unet", UNET, (8, 16, 24), CLASSES, "3d_fullres"),
    ("plain_conv_unet", FLAT, (1, 16, 24), CLASSES, "3d_fullres"),
    pytest.param("swin_unetr", ONE_SHIFT, (32, 32, 64), CLASSES, "3d_fullres", marks=pytest.mark.slow),
])  # fmt: skip
def test_onnx_files_compute_the_same(tmp_path, network, arguments, patch, dataset, configuration):
    runtime = _require_onnx()
    if network == "plain_conv_unet":
        pytest.importorskip("dynamic_network_architectures")
    roots = roots_of(tmp_path)
    if configuration == "3d_cascade_fullres":
        make_model(roots, dataset, network, ("0",), "3d_lowres", arguments, patch)
    folder = make_model(roots, dataset, network, ("0",), configuration, arguments, patch)
    models, members = _exported(folder, tmp_path, onnx=True)
    model = next(iter(models))
    ours, description = load_network(folder / "fold_0" / "checkpoint_best.pt")
    window = example_window(description) * 0.5 if configuration == "3d_fullres" else example_window(description)
    assert window.shape[2:] == patch
    session = runtime.InferenceSession(members[f"{model}/fold_0/network.onnx"], providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = ours(window).numpy()
    found = session.run(["logits"], {"image": window.numpy()})[0]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    card = models[model]["folds"]["0"]["onnx"]
    assert card["shape"] == list(window.shape)
    assert 0 <= card["max_abs_difference"] <= 1e-4 * card["max_abs_output"]
    assert f"| {card['max_abs_difference']:.1e} |" in members["README.md"].decode()


def test_an_onnx_file_is_imported_beside_its_checkpoint(tmp_path):
    _require_onnx()
    _, members = _exported(make_model(roots_of(tmp_path), folds=("0",)), tmp_path, onnx=True)
    folder = import_model(tmp_path / "model.zip", tmp_path / "here", quiet=True).folders[0]
    assert (folder / "fold_0" / "network.onnx").read_bytes() == members[f"{folder.name}/fold_0/network.onnx"]
    again, _ = _exported(folder, tmp_path / "here")
    assert "onnx" not in again[folder.name]["folds"]["0"]  # no file, no claim


def test_an_onnx_file_says_nothing_of_this_machine(tmp_path):
    """The exporter notes for every operator which lines of which files made it."""
    _require_onnx()
    folder = make_model(roots_of(tmp_path), folds=("0",))
    files = [_exported(folder, path, onnx=True)[1] for path in (tmp_path / "a", tmp_path / "b")]
    content = files[0][f"{folder.name}/fold_0/network.onnx"]
    assert not any(word in content for word in (b".py", b"forward", b"stack_trace"))
    assert files[0] == files[1]


def test_a_network_that_onnx_cannot_say(tmp_path, capsys):
    _require_onnx()
    folder = make_model(roots_of(tmp_path), network="portable_models:ReadsItsInput", folds=("0",))
    given = ["-m", str(folder), "-o", str(tmp_path / "model.zip"), "--onnx"]
    assert export_command(given) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: --onnx: portable_models:ReadsItsInput cannot be exported to ONNX (")
    assert said.endswith("leave --onnx out")
    assert not list(tmp_path.glob("*.zip"))


def test_what_draws_by_a_sampler_is_refused_at_once():
    network = build_network("medsegdiff_v2", 1, 2, {"features_per_stage": [8, 8], "former_blocks": 1}).eval()
    with pytest.raises(ConfigError, match="--onnx: it draws its segmentations by a sampler, which ONNX has not"):
        onnx_file.onnx_bytes(network, torch.zeros(1, 1, 8, 8, 8), "it")


def test_an_onnx_file_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    _require_onnx()
    folder = make_model(roots_of(tmp_path), folds=("0",))
    monkeypatch.setattr(onnx_file, "LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(ConfigError, match=r"the ONNX file of .* gives other outputs"):
        _exported(folder, tmp_path, onnx=True)


def test_a_network_too_large_for_an_onnx_file(tmp_path, monkeypatch):
    _require_onnx()
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"has 1,\d{3} bytes of weights, an ONNX file at most 2 GiB; leave it out"):
        _exported(make_model(roots_of(tmp_path), folds=("0",)), tmp_path, onnx=True)


def test_onnx_packages_that_are_missing_are_named_first(tmp_path, monkeypatch):
    def lacking(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(onnx_file, "import_module", lacking)
    with pytest.raises(ConfigError, match=r"--onnx needs the package onnx: pip install 'ukbob_seg\[onnx\]'"):
        _exported(tmp_path / "nothing here", tmp_path, onnx=True)


@pytest.mark.parametrize(("arguments", "configuration"), [
    (SWIN, "3d_fullres"),
    ({**SWIN, "norm_affine": False, "depths": [1, 1, 1, 1], "qkv_bias": False, "mlp_ratio": 2.0}, "3d_fullres"),
    ({**SWIN, "deep_supervision": True, "drop_path_rate": 0.1}, "3d_fullres"),
    (SWIN, "3d_cascade_fullres"),
])  # fmt: skip
def test_monai_loads_the_weights_strictly_and_computes_the_same(tmp_path, arguments, configuration):
    pytest.importorskip("monai", reason="MONAI is not installed")
    pytest.importorskip("einops", reason="MONAI's Swin-UNETR needs einops")
    roots = roots_of(tmp_path)
    patch = (32, 32, 64)
    if configuration == "3d_cascade_fullres":
        make_model(roots, CLASSES, "swin_unetr", ("0",), "3d_lowres", arguments, patch)
    folder = make_model(roots, CLASSES, "swin_unetr", ("0",), configuration, arguments, patch)
    models, members = _exported(folder, tmp_path, monai=True)
    place = f"{next(iter(models))}/fold_0"
    named = json.loads(members[f"{place}/monai.json"])
    from monai.networks.nets import SwinUNETR

    theirs = SwinUNETR(**named["arguments"])
    theirs.load_state_dict(load(members[f"{place}/monai.safetensors"]), strict=True)
    ours, description = load_network(folder / "fold_0" / "checkpoint_best.pt")
    image = torch.randn(1, 2, *patch, generator=torch.Generator().manual_seed(3))
    one_hot = image
    if configuration == "3d_cascade_fullres":  # by hand: label 1, label 2
        first = example_window(description)[:, 2:]
        image, one_hot = torch.cat([image, first], 1), torch.cat([image, (first == 1) * 1.0, (first == 2) * 1.0], 1)
    with torch.no_grad():
        expected, found = ours(image), theirs.eval()(one_hot)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    compared = models[next(iter(models))]["folds"]["0"]["monai"]
    assert compared["max_abs_difference"] <= 1e-4 * compared["max_abs_output"]
    assert (named["class"], named["arguments"]) == (compared["class"], compared["arguments"])


@pytest.mark.parametrize(("network", "given", "patch"), [
    ("monai.networks.nets.unet:UNet", {"spatial_dims": 3, "channels": [4, 8], "strides": [2]}, (8, 16, 16)),
    ("unet", {"channels": [4, 8], "strides": [2], "num_res_units": 1}, (8, 16, 16)),
    ("unetr", {"patch_size": [16, 16, 32], "feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
     (16, 16, 32)),
])  # fmt: skip
def test_a_class_of_monai_goes_back_to_it(tmp_path, network, given, patch):
    pytest.importorskip("monai", reason="MONAI is not installed")
    folder = make_model(roots_of(tmp_path), network=network, folds=("0",), arguments=given, patch=patch)
    models, members = _exported(folder, tmp_path, monai=True)
    place = f"{next(iter(models))}/fold_0"
    named = json.loads(members[f"{place}/monai.json"])
    build_monai(named).load_state_dict(load(members[f"{place}/monai.safetensors"]), strict=True)
    assert models[next(iter(models))]["folds"]["0"]["monai"]["max_abs_difference"] == 0


def test_without_monai_the_weights_are_written_and_not_compared(tmp_path, monkeypatch, capsys):
    def lacking(name):
        raise ImportError("No module named 'monai'")

    monkeypatch.setattr(monai_state, "import_module", lacking)
    folder = make_model(roots_of(tmp_path), network="swin_unetr", folds=("0",), arguments=SWIN, patch=(32, 32, 64))
    assert export_command(["-m", str(folder), "-o", str(tmp_path / "model.zip"), "--monai"]) == 0
    assert "MONAI: not compared, as MONAI is not installed here" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert "3d_fullres__swin_unetr/fold_0/monai.safetensors" in archive.namelist()


@pytest.mark.parametrize(("network", "arguments", "said"), [
    ("portable_models:Small", {}, r"portable_models:Small is no network of MONAI"),
    ("swin_unetr", {**SWIN, "patch_merging": "legacy"}, r"merges patches as MONAI did before its fix #8285"),
])  # fmt: skip
def test_networks_that_monai_has_not(tmp_path, network, arguments, said):
    folder = make_model(roots_of(tmp_path), network=network, folds=("0",), arguments=arguments, patch=(32, 32, 64))
    with pytest.raises(ConfigError, match=said):
        _exported(folder, tmp_path, monai=True)
    assert not list(tmp_path.glob("*.zip"))
