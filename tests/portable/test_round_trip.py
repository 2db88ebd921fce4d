"""Exported and imported models predict what the original predicts, to the last bit."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from portable_models import CLASSES, GEOMETRY, NAME, REGIONS, SMALL, SWIN, UNET, image_of, make_model, roots_of

from ukbob_seg import export_model, import_model
from ukbob_seg.cli.export_model import main as export_command
from ukbob_seg.cli.import_model import main as import_command
from ukbob_seg.cli.predict import main as predict_command
from ukbob_seg.dataset.image_io import read_labels, write_image
from ukbob_seg.errors import ConfigError
from ukbob_seg.files import write_json
from ukbob_seg.filtering.bounds import CohortBounds, OrganBounds
from ukbob_seg.filtering.strata import StratifiedBounds
from ukbob_seg.inference.etta import EttaConfig
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.networks.pretrained import read_pretrained
from ukbob_seg.portable.export import ExportOptions
from ukbob_seg.preprocessing.storage import open_array
from ukbob_seg.training.checkpoint import load_network, read_checkpoint
from ukbob_seg.training.config import RunOptions
from ukbob_seg.training.state import check_start

ETTA = EttaConfig(steps=2, learning_rate=0.05, least_foreground=0.0, most_drift=10.0)
SEEDS = {"classes": 0, "regions": 3, "cascade": 0}  # whose random networks find something
WAYS = {"plain": {}, "tta": {"tta": True}, "etta": {"etta": ETTA}, "both": {"tta": True, "etta": ETTA}}


def _predicted(folder, tmp_path, folds=None, **settings):
    """Labels, probabilities and ETTA record of one image."""
    path = tmp_path / f"{folder.parents[2].name}.b2nd"
    with Predictor.from_model_folder(folder, folds, settings=PredictionSettings(**settings)) as predictor:
        result = predictor.predict_array(image_of(0), GEOMETRY, path)
    return result.labels, open_array(path)[:], result.etta_record()


def _moved(folder, tmp_path, **options):
    """The folder after an export and an import elsewhere."""
    export_model(folder, tmp_path / "model.zip", quiet=True, **options)
    return import_model(tmp_path / "model.zip", roots_of(tmp_path, "here").results, quiet=True).folders[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["classes", "regions", "cascade"])
def test_predictions_are_identical(tmp_path, kind, way):
    roots = roots_of(tmp_path)
    if kind == "cascade":
        make_model(roots, configuration="3d_lowres", folds=("0", "1", "2"))
    configuration = "3d_cascade_fullres" if kind == "cascade" else "3d_fullres"
    folder = make_model(roots, REGIONS if kind == "regions" else CLASSES, configuration=configuration, seed=SEEDS[kind])
    if kind != "regions":
        write_json(folder / "postprocessing.json", {"largest_component": ["low"]})
    moved = _moved(folder, tmp_path)
    labels, probabilities, record = _predicted(folder, tmp_path, **WAYS[way])
    found, found_probabilities, found_record = _predicted(moved, tmp_path, **WAYS[way])
    assert np.array_equal(found, labels)
    assert np.array_equal(found_probabilities, probabilities)
    assert found_record == record
    assert len(np.unique(labels)) == 3  # not of an image that nothing is found in


def test_everything_that_travels_matters(tmp_path):
    """Were one of them lost, the test above could not tell."""
    folder = make_model(roots_of(tmp_path))
    labels, probabilities, record = _predicted(folder, tmp_path, **WAYS["both"])
    assert not np.array_equal(_predicted(folder, tmp_path, ["0"], **WAYS["both"])[1], probabilities)
    assert not np.array_equal(_predicted(folder, tmp_path, **WAYS["tta"])[1], probabilities)
    assert not np.array_equal(_predicted(folder, tmp_path, **WAYS["etta"])[1], probabilities)
    assert record["folds"][0]["field_gains"][0] is not None  # the usual fields are looked at
    write_json(folder / "postprocessing.json", {"largest_component": ["low", "high"]})
    assert not np.array_equal(_predicted(folder, tmp_path, **WAYS["both"])[0], labels)


@pytest.mark.parametrize("name", ["best", "final"])
def test_checkpoints_are_the_same_but_for_the_training_state(tmp_path, name):
    folder = make_model(roots_of(tmp_path), checkpoint=name)
    moved = _moved(folder, tmp_path, options=ExportOptions(checkpoint=name))
    for fold in ("0", "1"):
        before, content = read_checkpoint(folder / f"fold_{fold}" / f"checkpoint_{name}.pt")
        after, imported = read_checkpoint(moved / f"fold_{fold}" / f"checkpoint_{name}.pt")
        assert after.fields == before.fields
        assert after.plans == before.plans
        assert after.dataset == {key: value for key, value in before.dataset.items() if key != "dataset"}
        assert (after.network, after.arguments, after.mirror_axes, after.head, after.fold, after.configuration) == (
            before.network, before.arguments, before.mirror_axes, before.head, before.fold, before.configuration,
        )  # fmt: skip
        assert "optimizer_state" in content
        assert set(imported) == {"format_version", "model", "network_weights", "epoch", "best_dice"}
        assert content["network_weights"].keys() == imported["network_weights"].keys()
        for key, weight in content["network_weights"].items():
            assert weight.dtype == imported["network_weights"][key].dtype
            assert torch.equal(weight, imported["network_weights"][key])
    assert sorted(path.name for path in moved.parent.parent.iterdir()) == [NAME]  # nothing temporary is left


@pytest.mark.parametrize(("network", "arguments"), [("swin_unetr", SWIN), ("plain_conv_unet", UNET)])
def test_registered_networks_are_checked_and_come_whole(tmp_path, network, arguments):
    if network == "plain_conv_unet":
        pytest.importorskip("dynamic_network_architectures")
    folder = make_model(roots_of(tmp_path), network=network, folds=("0",), arguments=arguments, patch=(32, 32, 64))
    moved = _moved(folder, tmp_path)
    image = torch.randn(1, 2, 32, 32, 64, generator=torch.Generator().manual_seed(0))
    (ours, _), (theirs, _) = (load_network(path / "fold_0" / "checkpoint_best.pt") for path in (folder, moved))
    with torch.no_grad():
        assert torch.equal(ours(image), theirs(image))


def test_some_folds_alone(tmp_path):
    folder = make_model(roots_of(tmp_path), folds=("0", "1", "2"))
    moved = _moved(folder, tmp_path, folds=["2", "0"])
    assert sorted(path.name for path in moved.glob("fold_*")) == ["fold_0", "fold_2"]
    assert np.array_equal(_predicted(moved, tmp_path)[1], _predicted(folder, tmp_path, ["0", "2"])[1])


def test_an_imported_fold_belongs_to_one_that_was_trained_here(tmp_path):
    """Their plans and arguments are equal as stored, or averaging would refuse them."""
    roots = roots_of(tmp_path)
    folder = make_model(roots)
    export_model(folder, tmp_path / "model.zip", ["1"], quiet=True)
    here = roots_of(tmp_path, "here")
    stripped = {key: value for key, value in CLASSES.items() if key != "dataset"}
    imported = import_model(tmp_path / "model.zip", here.results, quiet=True).folders[0]
    make_model(here, stripped, folds=("0",))
    assert np.array_equal(_predicted(imported, tmp_path)[1], _predicted(folder, tmp_path)[1])


def test_the_same_model_gives_the_same_bytes(tmp_path):
    folder = make_model(roots_of(tmp_path))
    first, second = (export_model(folder, tmp_path / name, quiet=True).file for name in ("a.zip", "b.zip"))
    assert first.read_bytes() == second.read_bytes()


def test_commands_from_one_results_folder_to_another(tmp_path, capsys, monkeypatch):
    roots = roots_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = make_model(roots)
    bounds = CohortBounds(2.0, 20, {2: OrganBounds(30, {"sphericity": (0.2, 0.9)}, "low")})
    (roots.preprocessed / NAME / "solf").mkdir(parents=True)
    StratifiedBounds((), {"": bounds}).save(roots.preprocessed / NAME / "solf" / "bounds.json")
    given = ["--results", str(roots.results), "--preprocessed", str(roots.preprocessed)]
    assert export_command(["-d", "6", "--licence", "CC BY-NC 4.0", *given]) == 0
    file = Path(f"{NAME}__3d_fullres__portable_models.Small.zip")
    assert str(file) in capsys.readouterr().out
    assert import_command([str(file), "--results", "here"]) == 0
    printed = capsys.readouterr().out
    assert "licence: CC BY-NC 4.0" in printed
    for channel, values in enumerate(image_of(1)):
        write_image(values, GEOMETRY, tmp_path / "images" / f"case_{channel:04d}.nii.gz")
    line = next(line for line in printed.splitlines() if "ukbob_predict" in line).split()[1:]
    line = ["images" if word == "IMAGES" else "new" if word == "PREDICTIONS" else word for word in line]
    assert predict_command([*line, "--device", "cpu"]) == 0
    assert predict_command(["-m", str(folder), "-i", "images", "-o", "old", "--device", "cpu"]) == 0
    old, new = (read_labels(tmp_path / name / "case.nii.gz")[0] for name in ("old", "new"))
    assert np.array_equal(old, new)
    imported = tmp_path / "here" / NAME / folder.name
    assert StratifiedBounds.load(imported / "bounds.json").strata[""].limits(2, "sphericity") == (0.2, 0.9)
    # Exported again, it keeps licence and bounds.
    assert export_command(["-m", str(imported), "-o", "again.zip", *given]) == 0
    with zipfile.ZipFile("again.zip") as again, zipfile.ZipFile(file) as first:
        for name in ("model_card.json", "bounds.json", "README.md"):
            assert again.read(name) == first.read(name), name


def test_what_is_in_the_file(tmp_path):
    roots = roots_of(tmp_path)
    make_model(roots, configuration="3d_lowres")
    folder = make_model(roots, configuration="3d_cascade_fullres", folds=("0",))
    export_model(folder, tmp_path / "model.zip", quiet=True)
    first, second = "3d_lowres__portable_models.Small", "3d_cascade_fullres__portable_models.Small"
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        names = archive.namelist()
        everything = b"".join(archive.read(name) for name in names)
        manifest = json.loads(archive.read("manifest.json"))
    assert sorted(names) == sorted([
        "manifest.json", "model_card.json", "README.md",
        *(f"{model}/{name}" for model in (first, second) for name in ("plans.json", "dataset.json")),
        *(f"{model}/fold_{fold}/{name}" for model, folds in ((first, "01"), (second, "0")) for fold in folds
          for name in ("model.json", "weights.safetensors")),
    ])  # fmt: skip
    assert manifest["models"] == [second, first]
    assert manifest["members"].keys() == set(names) - {"manifest.json"}
    assert b"Jane" not in everything  # nor where her images lie
    assert b"momentum" not in everything


def test_a_lost_first_stage(tmp_path):
    folder = make_model(roots_of(tmp_path), configuration="3d_cascade_fullres")
    with pytest.raises(Exception, match=r"3d_lowres__portable_models\.Small does not exist"):
        export_model(folder, tmp_path / "model.zip", quiet=True)
    assert not list(tmp_path.glob("*.zip"))


def test_fine_tuning_starts_from_an_imported_model(tmp_path):
    moved = _moved(make_model(roots_of(tmp_path)), tmp_path)
    pretrained = read_pretrained(moved / "fold_0" / "checkpoint_best.pt")
    assert pretrained.interface.outputs == ("background", "low", "high")
    assert pretrained.network == SMALL
    network, _ = load_network(moved / "fold_0" / "checkpoint_best.pt")
    assert torch.equal(pretrained.weights["first.weight"], network.state_dict()["first.weight"])


def test_training_neither_resumes_nor_silently_replaces_an_imported_model(tmp_path):
    moved = _moved(make_model(roots_of(tmp_path)), tmp_path)
    for options in (RunOptions(), RunOptions(resume=True)):
        with pytest.raises(
            ConfigError, match=r"imported model.*--pretrained .*fold_0/checkpoint_best\.pt.*--overwrite"
        ):
            check_start(moved / "fold_0", options)
    check_start(moved / "fold_0", RunOptions(overwrite=True))
