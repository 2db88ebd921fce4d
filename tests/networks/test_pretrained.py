"""Starting from given weights: outputs equal MONAI's, rows and channels go by name, and the report tells all of it."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import CheckpointError, DatasetError
from ukbob_seg.networks.matching import fit_channels, match_rows
from ukbob_seg.networks.pretrained import Interface, interpret, read_pretrained
from ukbob_seg.networks.registry import build_network
from ukbob_seg.networks.swin_unetr import SwinUNETR
from ukbob_seg.networks.transfer import transfer

CONV = {
    "features_per_stage": [4, 8, 16], "strides": [1, 2, 2], "kernel_sizes": [[3, 3, 3]] * 3,
    "n_conv_per_stage": [1, 1, 1], "n_conv_per_stage_decoder": [1, 1], "deep_supervision": True,
}  # fmt: skip
SWIN = {"feature_size": 12}


def _content(labels, channels=("MRI",), **more):
    return {
        "channel_names": {str(k): name for k, name in enumerate(channels)}, "file_ending": ".nii.gz",
        "labels": {"background": 0, **({name: k for k, name in enumerate(labels, start=1)}
                                       if not isinstance(labels, dict) else labels)}, **more,
    }  # fmt: skip


def _spec(labels, channels=("MRI",), **more):
    return DatasetSpec.from_json(_content(labels, channels, **more), "Dataset001_Test")


def _build(name, arguments, spec, extra=(0, 0)):
    channels, outputs = len(spec.channel_names) + extra[0], spec.labels.num_outputs + extra[1]
    with torch.random.fork_rng(devices=[]):
        return build_network(name, channels, outputs, arguments)


def _checkpoint(network, name, arguments, labels, channels=("MRI",), head="softmax", **more):
    """What ukbob_train writes, as far as an import reads it."""
    model = {"network": name, "arguments": arguments, "head": head, "dataset": _content(labels, channels, **more)}
    return {"format_version": 1, "model": model, "network_weights": network.state_dict()}


def _transfer(network, content, name, arguments, spec, head="softmax", dataset=None):
    wanted = Interface.of(spec, head, arguments.get("previous_labels", 0))
    given = interpret(content, "given.pt", dataset)
    return transfer(network, given, wanted, lambda *more: _build(name, arguments, spec, more))


def _randomised(network):
    """Every weight away from its initial value, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(5)
    for value in network.parameters():
        value.data += 0.1 * torch.randn(value.shape, generator=generator)
    return network.eval()


class OwnNetwork(nn.Module):
    """A user's own network: the first layer's width is chosen, the last one's weights come as (in, out)."""

    def __init__(self, in_channels, out_channels, width=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(in_channels, width, 1), nn.ConvTranspose3d(width, out_channels, 1))

    def forward(self, x):
        return self.layers(x)


def _own(network, content, spec, head="softmax", dataset=None):
    given = interpret(content, "given.pt", dataset)
    return transfer(
        network, given, Interface.of(spec, head),
        lambda a, b: OwnNetwork(len(spec.channel_names) + a, spec.labels.num_outputs + b),
    )  # fmt: skip


# MONAI as the oracle


def _legacy_forward(self, x):
    """MONAI's patch merging before its fix #8285."""
    parts = [x[:, i::2, j::2, k::2] for i, j, k in
             ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))]  # fmt: skip
    return self.reduction(self.norm(torch.cat(parts, -1)))


@pytest.mark.parametrize("merging", ["legacy", "distinct"])
@pytest.mark.parametrize("affine", [True, False])
def test_outputs_equal_monais_after_the_import(merging, affine, monkeypatch):
    nets = pytest.importorskip("monai.networks.nets")
    pytest.importorskip("einops", reason="MONAI's Swin-UNETR needs einops")
    if merging == "legacy":
        monkeypatch.setattr("monai.networks.nets.swin_unetr.PatchMerging.forward", _legacy_forward)
    torch.manual_seed(0)
    reference = _randomised(nets.SwinUNETR(1, 3, feature_size=12))
    arguments = {**SWIN, "norm_affine": affine, "patch_merging": merging}
    spec = _spec(("liver", "spleen"))
    network = _build("swin_unetr", arguments, spec).eval()
    for module in network.modules():  # not identity already
        if isinstance(module, nn.InstanceNorm3d) and affine:
            nn.init.normal_(module.weight)
    wrapped = {"epoch": 7, "state_dict": {f"module.{k}": v for k, v in reference.state_dict().items()}}
    report = _transfer(network, wrapped, "swin_unetr", arguments, spec)
    assert len(report.loaded) == 159
    assert (report.fresh, report.unused, report.mapped, report.inflated, report.not_fitting) == ([], [], [], [], {})
    assert len(report.identity) == (52 if affine else 0)
    assert report.share == pytest.approx(1, abs=0.01)
    image = torch.randn(1, 1, 32, 64, 32)
    with torch.no_grad():
        expected, found = reference(image), network(image)
        assert (found - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())
        other = SwinUNETR(1, 3, 12, norm_affine=affine, patch_merging={"legacy": "distinct"}.get(merging, "legacy"))
        other.load_state_dict(network.state_dict())
        assert (other.eval()(image) - expected).abs().max() > 1e-2  # the trap: it loads, and computes something else


def test_the_self_supervised_encoder_release():
    spec = _spec(("a", "b"))
    network = _build("swin_unetr", SWIN, spec)
    released = {
        "module." + name.removeprefix("swinViT.").replace("mlp.linear1", "mlp.fc1").replace("mlp.linear2", "mlp.fc2"):
            torch.full_like(value, 0.25) if value.is_floating_point() else value
        for name, value in network.state_dict().items() if name.startswith("swinViT.")
    }  # fmt: skip
    released["module.rotation_head.weight"] = torch.ones(4, 2)
    report = _transfer(network, {"state_dict": released}, "swin_unetr", SWIN, spec)
    assert len(report.loaded) == len(released) - 1
    assert report.unused == ["swinViT.rotation_head.weight"]
    assert (network.swinViT.layers3[0].blocks[1].mlp.linear2.weight == 0.25).all()
    assert all(not name.startswith("swinViT") for name in (*report.fresh, *report.identity))
    assert len(report.fresh) + len(report.identity) + len(report.loaded) == len(network.state_dict())
    assert report.identity == []  # norms of the decoder are not those of loaded layers
    assert report.warnings == []


def test_weights_of_norms_without_place_are_a_warning():
    spec = _spec(("a", "b"))
    source = _randomised(_build("swin_unetr", SWIN, spec))
    arguments = {**SWIN, "norm_affine": False}
    report = _transfer(_build("swin_unetr", arguments, spec), source.state_dict(), "swin_unetr", arguments, spec)
    assert len(report.unused) == 52
    assert any("52 weights of norms" in text and '"norm_affine": true' in text for text in report.warnings)


# Output rows by class


@pytest.mark.parametrize(("name", "arguments"), [("swin_unetr", SWIN), ("plain_conv_unet", CONV)])
def test_shared_organs_keep_their_logits(name, arguments):
    pytest.importorskip("dynamic_network_architectures")
    old, new = _spec(("spleen", "left_kidney", "liver")), _spec(("Liver", "aorta", "Left Kidney", "spleen", "x"))
    source = _randomised(_build(name, arguments, old))
    target = _build(name, arguments, new).eval()
    fresh = {key: value.clone() for key, value in target.state_dict().items()}
    content = _checkpoint(source, name, arguments, ("spleen", "left_kidney", "liver"))
    report = _transfer(target, content, name, arguments, new)
    image = torch.randn(1, 1, 32, 64, 32)
    with torch.no_grad():
        before, after = source(image), target(image)
    if isinstance(before, torch.Tensor):
        before, after = [before], [after]
    assert len(before) == (2 if name == "plain_conv_unet" else 1)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(b[:, [0, 1, 3, 4]], a[:, [0, 3, 2, 1]])
    assert report.rows == {
        "background": "background", "Liver": "liver", "aorta": None, "Left Kidney": "left_kidney", "spleen": "spleen",
        "x": None,
    }  # fmt: skip
    heads = ["decoder.seg_layers.0", "decoder.seg_layers.1"] if name == "plain_conv_unet" else ["out.conv.conv"]
    assert report.mapped == sorted(f"{head}.{kind}" for head in heads for kind in ("weight", "bias"))
    for key in report.mapped:
        assert torch.equal(target.state_dict()[key][[2, 5]], fresh[key][[2, 5]])
    assert report.fresh == report.unused == report.inflated == report.identity == []
    assert "output weights keep 4 of 6 classes (fresh: aorta, x)" in report.summary()
    content = report.to_json()
    assert content["counts"]["mapped"] == len(report.mapped)
    assert set(json.loads(json.dumps(content))["loaded"]) == set(report.loaded)


def test_the_same_number_of_other_classes_is_not_taken_for_the_same():
    old, new = ("liver", "spleen"), _spec(("spleen", "aorta"))
    source, target = OwnNetwork(1, 3), OwnNetwork(1, 3)
    fresh = target.layers[1].weight.clone()
    report = _own(target, _checkpoint(source, "own:Network", {}, old), new)
    assert torch.equal(target.layers[1].weight[:, 1], source.layers[1].weight[:, 2])  # rows along the second axis here
    assert torch.equal(target.layers[1].weight[:, 2], fresh[:, 2])
    assert target.layers[1].bias[0] == source.layers[1].bias[0]
    assert report.rows == {"background": "background", "spleen": "spleen", "aorta": None}


def test_equal_classes_are_loaded_as_they_are():
    source, target = OwnNetwork(1, 3), OwnNetwork(1, 3)
    report = _own(target, _checkpoint(source, "own:Network", {}, ("liver", "spleen")), _spec(("LIVER", "spleen")))
    assert report.mapped == []
    assert len(report.loaded) == 4
    assert report.share == 1


def test_without_names_rows_are_kept_when_there_are_as_many():
    source, target = OwnNetwork(1, 3), OwnNetwork(1, 3)
    report = _own(target, source.state_dict(), _spec(("liver", "spleen")))
    assert len(report.loaded) == 4
    assert ["--pretrained-dataset" in text for text in report.warnings] == [True]
    target = OwnNetwork(1, 4)
    report = _own(target, source.state_dict(), _spec(("a", "b", "c")))
    assert report.not_fitting == {
        "layers.1.bias": "(3,) in the checkpoint, (4,) here",
        "layers.1.weight": "(3, 3, 1, 1, 1) in the checkpoint, (3, 4, 1, 1, 1) here",
    }
    assert report.loaded == ["layers.0.bias", "layers.0.weight"]


@pytest.mark.parametrize(("rows", "expected"), [(3, [0, 2, None, 1]), (21, [0, 20, None, 4]), (2, [None, 1, None, 0])])
def test_a_dataset_json_names_the_rows_of_others(rows, expected, tmp_path):
    """Background and the classes in order; by file value, where values have gaps; or without background."""
    (tmp_path / "dataset.json").write_text(json.dumps(_content({"liver": 4, "spleen": 20})))
    have = interpret({"w": torch.ones(1)}, "given.pt", tmp_path).interface
    assert match_rows(rows, have, Interface.of(_spec(("spleen", "aorta", "liver")))) == expected
    with pytest.raises(CheckpointError, match=r"has 7 outputs, its dataset.json names 3 \(fitting numbers: 2, 3, 21\)"):
        match_rows(7, have, Interface.of(_spec(("spleen",))))


def test_regions_go_by_region_and_another_head_is_a_warning():
    regions = {"whole": [1, 2], "core": [2]}
    spec = _spec({"core": [2], "edema": [1], "Whole": [1, 2]}, regions_class_order=[1, 2, 3])
    source, target = OwnNetwork(1, 2), OwnNetwork(1, 3)
    content = _checkpoint(source, "own:Network", {}, regions, head="sigmoid", regions_class_order=[1, 2])
    report = _own(target, content, spec, "sigmoid")
    assert report.rows == {"core": "core", "edema": None, "Whole": "whole"}
    assert torch.equal(target.layers[1].bias[[0, 2]], source.layers[1].bias[[1, 0]])
    assert report.warnings == []
    plain = OwnNetwork(1, 3)
    report = _own(plain, content, _spec(("core", "x")))
    assert report.rows == {"background": None, "core": "core", "x": None}
    assert [("a sigmoid head, this run has a softmax head" in text) for text in report.warnings] == [True]


def test_names_that_could_be_two_have_no_partner():
    have = Interface.of(_spec(("left kidney", "Left_Kidney", "liver")))
    assert match_rows(4, have, Interface.of(_spec(("LEFT KIDNEY", "left kidney", "Liver")))) == [0, None, 1, 3]


# Input channels by name


def _channels(*names, previous=0):
    return Interface.of(_spec(("a", "b"), names), "softmax", previous)


def test_channels_closed_form():
    w = torch.arange(1.0, 7).view(2, 3)  # two filters of three channels
    a, b, c = w[:, 0], w[:, 1], w[:, 2]
    have = _channels("T1", "T2", "FLAIR")

    def fitted(*names, have=have):
        return fit_channels(w, 1, have, _channels(*names))[0].unbind(1)

    for found, expected in zip(fitted("T2", "t 1"), (b, a), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(fitted("x", "T2", "y", "z"), ((a + c) / 3, b, (a + c) / 3, (a + c) / 3), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(fitted("T1", "T2", "FLAIR", "x"), (a, b, c, 0 * a), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(fitted("x", "y", "z"), (a, b, c), strict=True):  # as many, none known: by position
        torch.testing.assert_close(found, expected)
    for found, expected in zip(fitted("x", "y", have=None), ((a + b + c) / 2,) * 2, strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(fitted("T1", "CT", "x")[1], (b + c) / 2)
    origin = fit_channels(w, 1, have, _channels("CT", "T2", "x"))[1]
    assert origin == {"CT": "sum of channels 0, 2 / 2", "T2": "channel 1 (T2)", "x": "sum of channels 0, 2 / 2"}
    with pytest.raises(CheckpointError, match=r"has 3 input channels, its dataset\.json names 2"):
        fit_channels(w, 1, _channels("T1", "T2"), _channels("T1"))


@pytest.mark.parametrize("wanted", [("a", "b", "c"), ("a",), ("T2", "x", "y"), ("x", "y")])
def test_a_repeated_image_gives_the_activation_that_it_gave_before(wanted):
    torch.manual_seed(0)
    w = torch.randn(4, 2, 3, 3, 3)
    found, _ = fit_channels(w, 1, _channels("T1", "T2"), _channels(*wanted))
    torch.testing.assert_close(found.sum(1), w.sum(1))


def test_more_channels_in_swin_unetr():
    old, new = _spec(("a", "b")), _spec(("a", "b"), ("T1", "MRI", "T2"))
    source = _randomised(_build("swin_unetr", SWIN, old))
    target = _build("swin_unetr", SWIN, new).eval()
    report = _transfer(target, _checkpoint(source, "swin_unetr", SWIN, ("a", "b")), "swin_unetr", SWIN, new)
    assert report.inflated == [
        "encoder1.layer.conv1.conv.weight", "encoder1.layer.conv3.conv.weight", "swinViT.patch_embed.proj.weight"
    ]  # fmt: skip
    assert report.channels == {"T1": "zero", "MRI": "channel 0 (MRI)", "T2": "zero"}
    image = torch.randn(1, 3, 32, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(target(image), source(image[:, 1:2]))
    assert "3 input weights fitted to other channels (T1 from zero, MRI from channel 0 (MRI), T2 from zero)" in (
        report.summary()
    )


def test_a_full_resolution_network_starts_the_second_stage_of_a_cascade():
    pytest.importorskip("dynamic_network_architectures")
    spec = _spec(("a", "b"))
    source = _randomised(_build("plain_conv_unet", CONV, spec))
    arguments = {**CONV, "previous_labels": 2}
    target = _build("plain_conv_unet", arguments, spec).eval()
    report = _transfer(target, _checkpoint(source, "plain_conv_unet", CONV, ("a", "b")), "plain_conv_unet", arguments,
                       spec)  # fmt: skip
    assert report.channels == {"MRI": "channel 0 (MRI)", "first stage: a": "zero", "first stage: b": "zero"}
    assert report.fresh == report.unused == []
    image = torch.randn(1, 1, 16, 16, 16)
    labels = torch.randint(0, 3, (1, 1, 16, 16, 16)).float()
    with torch.no_grad():
        for a, b in zip(source(image), target(torch.cat([image, labels], 1)), strict=True):
            torch.testing.assert_close(a, b)
    # And from one second stage to another: labels by name.
    content = _checkpoint(_randomised(target), "plain_conv_unet", arguments, ("a", "b"))
    other = _build("plain_conv_unet", arguments, _spec(("b", "c")))
    report = _transfer(other, content, "plain_conv_unet", arguments, _spec(("b", "c")))
    assert report.channels["first stage: b"] == "first stage: b"
    assert report.channels["first stage: c"] == "zero"
    first = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(other.network.state_dict()[first][:, 1], target.network.state_dict()[first][:, 2])
    plain = _build("plain_conv_unet", CONV, spec)  # and back: the label channels are left away
    report = _transfer(plain, content, "plain_conv_unet", CONV, spec)
    assert torch.equal(plain.state_dict()[first], target.network.state_dict()[first][:, :1])
    assert all(name.startswith("encoder.") or name.startswith("decoder.") for name in report.loaded)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.network.", "model.", "net."])
def test_prefixes_of_wrappers_do_not_matter(prefix):
    source, target = OwnNetwork(1, 3), OwnNetwork(1, 3)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    assert len(_own(target, {"model_state_dict": state}, _spec(("a", "b"))).loaded) == 4
    assert torch.equal(target.layers[0].weight, source.layers[0].weight)


def test_a_network_that_takes_certain_numbers_only_is_matched_by_shape():
    def refuse(*_):
        raise ValueError("one channel only")

    source, target = OwnNetwork(1, 3), OwnNetwork(1, 3)
    given = interpret(source.state_dict(), "given.pt")
    report = transfer(target, given, Interface.of(_spec(("a", "b"))), refuse)
    assert len(report.loaded) == 4
    assert report.warnings == [
        "weights were matched by name and shape only: the network cannot be built with other channels "
        "(one channel only)"
    ]


# What is refused


def test_nothing_matching_is_an_error(tmp_path):
    spec = _spec(("a",))
    with pytest.raises(CheckpointError, match="not one of its 1 weights matches"):
        _own(OwnNetwork(1, 2), {"other": torch.ones(1)}, spec)
    with pytest.raises(CheckpointError, match=r"holds no weights \(found: epoch, x\)"):
        interpret({"epoch": 3, "x": "y"}, "given.pt")
    with pytest.raises(CheckpointError, match=r"holds no weights \(found: nothing\)"):
        interpret({}, "given.pt")
    with pytest.raises(CheckpointError, match=r"none\.pt do not exist"):
        read_pretrained(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"bad\.pt is damaged"):
        read_pretrained(tmp_path / "bad.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt holds no state dict"):
        read_pretrained(tmp_path / "list.pt")
    content = _checkpoint(nn.Conv3d(1, 1, 1), "own:Network", {}, ("a",))
    with pytest.raises(CheckpointError, match=r"\(a checkpoint of own:Network\): not one of its 2 weights"):
        _own(OwnNetwork(1, 2), content, spec)


def test_index_tables_alone_are_no_match():
    """Window attention of any width has the same table of positions; that it fits says nothing."""
    spec = _spec(("a", "b"))
    network = _build("swin_unetr", SWIN, spec)
    tables = {k: v for k, v in network.state_dict().items() if k.endswith("relative_position_index")}
    with pytest.raises(CheckpointError, match="not one of its 8 weights matches"):
        _transfer(network, tables, "swin_unetr", SWIN, spec)
    wider = {**SWIN, "feature_size": 24}
    report = _transfer(network, _build("swin_unetr", wider, spec).state_dict(), "swin_unetr", SWIN, spec)
    assert any("% of the network come from given.pt; is it of another architecture" in t for t in report.warnings)


def test_numbers_that_are_none_are_refused():
    state = OwnNetwork(1, 2).state_dict()
    state["layers.0.weight"][0] = torch.nan
    with pytest.raises(CheckpointError, match=r"given\.pt is damaged: layers\.0\.weight holds NaN"):
        _own(OwnNetwork(1, 2), state, _spec(("a",)))


def test_tensors_of_other_kinds_are_no_weights():
    state = OwnNetwork(1, 2).state_dict()
    odd = {
        "layers.0.bias": torch.empty(3, device="meta"),
        "layers.1.bias": torch.ones(2).to_sparse(),
        "x": torch.ones(2, dtype=torch.complex64),
    }
    report = _own(OwnNetwork(1, 2), {**state, **odd, 3: torch.ones(1)}, _spec(("a",)))
    assert report.loaded == ["layers.0.weight", "layers.1.weight"]
    assert report.fresh == ["layers.0.bias", "layers.1.bias"]
    half = {name: value.half() for name, value in state.items()}
    target = OwnNetwork(1, 2)
    _own(target, half, _spec(("a",)))
    assert target.layers[0].weight.dtype == torch.float32


@pytest.mark.parametrize("evil", ["open", "numpy"])
def test_code_in_a_checkpoint_does_not_run(evil, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    hidden = Evil() if evil == "open" else np.array([Evil()], dtype=object)
    torch.save({"state_dict": {"layers.0.bias": torch.ones(3)}, "x": hidden}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"holds more than weights; it was not loaded\. If you trust its origin"):
        read_pretrained(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_damaged_descriptions_are_refused(tmp_path):
    content = _checkpoint(OwnNetwork(1, 2), "own:Network", {}, ("a",))
    content["model"]["dataset"] = {"labels": {}}
    with pytest.raises(CheckpointError, match=r"given\.pt is damaged: .*lacks channel_names"):
        interpret(content, "given.pt")
    content["model"]["arguments"] = 5
    with pytest.raises(CheckpointError, match=r"given\.pt is damaged"):
        interpret(content, "given.pt")
    with pytest.raises(DatasetError, match=r"none\.json"):
        interpret({"w": torch.ones(1)}, "given.pt", tmp_path / "none.json")
