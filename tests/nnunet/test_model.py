"""Reading model folders: folds, checkpoints, what is refused, and how models of nnU-Net behave in the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunet_models import Tiny, scan, write_model
from portable_models import make_model, roots_of

from ukbob_seg.cli.export_model import main as export_main
from ukbob_seg.cli.predict import main as predict_main
from ukbob_seg.dataset.image_io import Geometry, read_labels, write_image
from ukbob_seg.errors import CheckpointError, ConfigError
from ukbob_seg.inference.ensemble_predictor import load_predictor
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.nnunet.architecture import AxisOrder
from ukbob_seg.nnunet.model import NnunetModel, resolve_configuration
from ukbob_seg.nnunet.resampling import ResamplingRule
from ukbob_seg.preprocessing.storage import open_array

pytest.importorskip("dynamic_network_architectures", reason="pip install --no-deps dynamic-network-architectures")
GEOMETRY = Geometry((17, 23, 19), (1.0, 1.3, 0.9), (3.0, -5.0, 7.0))


def edit(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def test_all_folds_but_the_one_of_all_cases_are_averaged(tmp_path):
    folder = write_model(Tiny(folds=("0", "1", "all")), tmp_path)
    assert NnunetModel.load(folder).folds == ("0", "1")
    assert NnunetModel.load(folder, ["all"]).folds == ("all",)
    with pytest.raises(CheckpointError, match=r"for fold 3 \(trained: 0, 1, all final, none best\)"):
        NnunetModel.load(folder, ["3"])
    with pytest.raises(ConfigError, match="twice"):
        NnunetModel.load(folder, ["1", "1"])
    assert NnunetModel.load(write_model(Tiny(folds=("all",)), tmp_path / "b")).folds == ("all",)


def test_the_final_checkpoint_is_taken_unless_told_otherwise(tmp_path):
    folder = write_model(Tiny(), tmp_path)
    final = folder / "fold_0" / "checkpoint_final.pth"
    best = final.with_name("checkpoint_best.pth")
    best.write_bytes(final.read_bytes())
    assert NnunetModel.load(folder).checkpoint == "final"
    assert NnunetModel.load(folder, checkpoint="best").checkpoint == "best"
    final.unlink()
    assert NnunetModel.load(folder).checkpoint == "best"
    with pytest.raises(CheckpointError, match=r"no checkpoint_final\.pth"):
        NnunetModel.load(folder, checkpoint="final")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.update(image_reader_writer="NaturalImage2DIO"), "image reader NaturalImage2DIO"),
        (lambda p: p["configurations"]["3d_fullres"].update(preprocessor_name="Own"), "preprocessor Own"),
        (lambda p: p["configurations"]["3d_fullres"]["architecture"].update(network_class_name="a.Primus"), "Primus"),
        (lambda p: p["configurations"]["3d_fullres"].update(normalization_schemes=["Own"]), "normalization Own"),
        (lambda p: p["configurations"]["3d_fullres"].update(resampling_fn_data="own"), "resample data by own"),
        (lambda p: p["configurations"]["3d_fullres"]["resampling_fn_probabilities_kwargs"].update(order=3), "order 1"),
        (lambda p: p.update(transpose_forward=[0, 0, 1]), "transpose_forward"),
        (lambda p: p.update(configurations={}), "no usable configuration '3d_fullres'"),
        (lambda p: p.pop("dataset_name"), "dataset_name"),
        (lambda p: p["configurations"]["3d_fullres"].update(patch_size="x"), "not what nnU-Net v2 writes"),
        (lambda p: p["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(odd=1), "argument odd"),
        (lambda p: p["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(nonlin="os.system"),
         "nonlin must be one of"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_here_is_said(change, said, tmp_path):
    folder = write_model(Tiny(), tmp_path)
    edit(folder, "plans.json", change)
    with pytest.raises(CheckpointError, match=said):
        Predictor.from_model_folder(folder)


def test_weights_of_another_network_are_refused(tmp_path):
    folder = write_model(Tiny(), tmp_path)
    edit(folder, "dataset.json", lambda d: d["labels"].update(third=3))
    with pytest.raises(CheckpointError, match="of another shape"):
        Predictor.from_model_folder(folder)


def test_a_cascade_without_its_first_stage(tmp_path):
    folder = write_model(Tiny(configuration="3d_cascade_fullres", previous="3d_lowres"), tmp_path)
    with pytest.raises(CheckpointError, match=r"no models of its first stage \(3d_lowres\)"):
        Predictor.from_model_folder(folder)


def test_inheritance_of_configurations():
    plans = {
        "configurations": {"a": {"x": 1, "y": 1}, "b": {"inherits_from": "a", "y": 2}, "c": {"inherits_from": "c"}}
    }
    assert resolve_configuration(plans, "b", "here") == {"x": 1, "y": 2, "inherits_from": "a"}
    with pytest.raises(CheckpointError, match="here: the plans hold no usable configuration 'c'"):
        resolve_configuration(plans, "c", "here")


def test_axis_order_of_three_and_two_dimensions():
    order = AxisOrder((2, 0, 1), False)  # nnU-Net's first axis is x
    assert order.per_axis(["x", "z", "y"]) == ("z", "y", "x")
    assert [order.in_file(axis) for axis in range(3)] == [2, 0, 1]
    weight = torch.arange(24.0).reshape(1, 1, 2, 3, 4)  # (x, z, y)
    turned = order.weights({"w": weight, "b": torch.ones(2)})["w"]
    assert turned.shape == (1, 1, 3, 4, 2)
    assert turned[0, 0, 2, 1, 0] == weight[0, 0, 0, 2, 1]
    flat = AxisOrder((1, 2, 0), True)  # slices across y; rows are x, columns z
    assert flat.slice_axis == 1
    assert flat.per_axis(["x", "z"], "y") == ("z", "y", "x")
    assert flat.spatial([5, 7]) == [7, 5]
    assert flat.weights({"w": torch.zeros(1, 1, 5, 7)})["w"].shape == (1, 1, 7, 5)


def test_the_linear_resampling_of_torch(tmp_path):
    """nnU-Net's other function interpolates images linearly too."""
    torch_way = {f"resampling_fn_{kind}": "resample_torch_fornnunet" for kind in ("data", "seg", "probabilities")}
    torch_way |= {
        f"resampling_fn_{kind}_kwargs": {"is_seg": kind == "seg", "force_separate_z": False,
                                         "memefficient_seg_resampling": False}
        for kind in ("data", "seg", "probabilities")
    }  # fmt: skip
    folder = write_model(Tiny(resampling=torch_way), tmp_path)
    image = scan(margin=0)
    image[image == 0] = 1  # nothing is cropped
    with Predictor.from_model_folder(folder) as predictor:
        array, properties = predictor._prepare(image, GEOMETRY, None)
    normal = (image - image.mean()) / image.std()
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(normal)[None], size=properties.shape, mode="trilinear", antialias=False
    )[0].numpy()
    assert np.abs(array - expected).max() < 1e-4
    assert ResamplingRule.from_plans(torch_way, "seg").votes


def test_the_command_writes_the_labels_of_the_api(tmp_path):
    folder = write_model(Tiny(mirror=(0, 2)), tmp_path / "results")
    image = scan()
    for name in ("a", "b"):
        write_image(image[0], GEOMETRY, tmp_path / "images" / f"{name}_0000.nii.gz")
    outputs = tmp_path / "out"
    command = ["-i", str(tmp_path / "images"), "-o", str(outputs), "-m", str(folder), "--tta", "--device", "cpu"]
    assert predict_main([*command, "--save-probabilities", "--statistics", "--save-entropy"]) == 0
    with Predictor.from_model_folder(folder, settings=PredictionSettings(tta=True)) as predictor:
        expected = predictor.predict_array(image, GEOMETRY).labels
    labels, geometry = read_labels(outputs / "b.nii.gz")
    assert np.array_equal(labels, expected)
    assert GEOMETRY.difference(geometry, ("image", "labels")) is None
    record = json.loads((outputs / "predict_args.json").read_text())
    assert record["checkpoints"] == [f"{folder}/fold_0/checkpoint_final.pth"]
    for side in ("a_probabilities.b2nd", "a_statistics.json", "a_entropy.nii.gz"):
        assert (outputs / side).is_file()
    changed = (outputs / "a.nii.gz").stat().st_mtime_ns
    again = [*command, "--save-probabilities", "--statistics", "--save-entropy", "--resume"]
    assert predict_main(again) == 0
    assert (outputs / "a.nii.gz").stat().st_mtime_ns == changed


def test_models_of_both_kinds_are_averaged(tmp_path):
    """One of ours and one of nnU-Net, of other spacings: the decision is that of the mean of both probabilities."""
    tiny = Tiny()
    theirs = write_model(tiny, tmp_path / "theirs")
    dataset = {name: value for name, value in tiny.dataset().items() if name != "numTraining"}
    ours = make_model(roots_of(tmp_path), dataset, folds=("0",))
    image, probabilities, labels = scan(), [], []
    for number, folder in enumerate((theirs, ours)):
        with load_predictor([folder]) as predictor:
            path = tmp_path / f"{number}.b2nd"
            labels.append(predictor.predict_array(image, GEOMETRY, path).labels)
            probabilities.append(open_array(path)[:].astype(np.float32))
    with load_predictor([theirs, ours]) as predictor:
        assert [Path(path).suffix for path in predictor.origin()] == [".pth", ".pt"]
        both = predictor.predict_array(image, GEOMETRY).labels
    mean = np.sort(sum(probabilities) / 2, axis=0)
    clear = mean[-1] - mean[-2] > 2e-3  # they were stored in half precision
    assert clear.mean() > 0.9
    assert np.array_equal(both[clear], sum(probabilities).argmax(axis=0)[clear])
    for alone in labels:
        assert not np.array_equal(both, alone)


def test_resuming_with_another_model_of_the_same_name_is_refused(tmp_path, capsys):
    """A model that was trained again lies where the first did."""
    folder = write_model(Tiny(), tmp_path / "results")
    write_image(scan()[0], GEOMETRY, tmp_path / "images" / "a_0000.nii.gz")
    outputs = tmp_path / "out"
    command = ["-i", str(tmp_path / "images"), "-o", str(outputs), "-m", str(folder), "--device", "cpu"]
    assert predict_main(command) == 0
    record = json.loads((outputs / "predict_args.json").read_text())
    write_model(Tiny(seed=9), tmp_path / "results")
    before = (outputs / "a.nii.gz").stat().st_mtime_ns
    assert predict_main([*command, "--resume"]) == 2
    assert "has other checkpoint_sha256 than this run" in capsys.readouterr().err
    assert (outputs / "a.nii.gz").stat().st_mtime_ns == before
    del record["checkpoint_sha256"]  # of an earlier version, which cannot tell
    (outputs / "predict_args.json").write_text(json.dumps(record))
    assert predict_main([*command, "--resume"]) == 0


def test_a_folder_one_level_too_high(tmp_path, capsys):
    folder = write_model(Tiny(), tmp_path / "results")
    write_image(scan()[0], GEOMETRY, tmp_path / "images" / "a_0000.nii.gz")
    for given in (folder.parent, tmp_path / "results"):
        command = ["-i", str(tmp_path / "images"), "-o", str(tmp_path / "out"), "-m", str(given), "--device", "cpu"]
        assert predict_main(command) == 2
        assert f"{given} is no model folder, but the folder of models: give {folder}" in capsys.readouterr().err
    assert export_main(["-m", str(folder.parent), "-o", str(tmp_path / "x.zip")]) == 2
    assert f"give {folder}" in capsys.readouterr().err
    assert export_main(["-m", str(folder), "-o", str(tmp_path / "x.zip")]) == 2
    assert "a model of nnU-Net v2" in (said := capsys.readouterr().err)
    assert "nnUNetv2_export_model_to_zip" in said
    assert not (tmp_path / "x.zip").exists()


def test_averages_over_nothing_are_refused(tmp_path, capsys):
    """nnU-Net's models are averaged over flips alone; ours over changes of intensity, too."""
    theirs = write_model(Tiny(), tmp_path / "results")
    command = ["-i", str(tmp_path), "-o", str(tmp_path / "out"), "-m", str(theirs), "--device", "cpu"]
    assert predict_main([*command, "--tta", "--no-mirror"]) == 2
    assert "--tta --no-mirror has no effect on a model of nnU-Net" in capsys.readouterr().err
    dataset = {name: value for name, value in Tiny().dataset().items() if name != "numTraining"}
    ours = make_model(roots_of(tmp_path), dataset, folds=("0",))
    with load_predictor([theirs, ours], settings=PredictionSettings(tta=True, mirror=False)) as predictor:
        assert len(predictor.origin()) == 2


def test_the_orientation_of_the_inference_configuration_comes_before_the_datasets(tmp_path):
    folder = write_model(Tiny(extra={"orientation": ["L", "P", "S"]}), tmp_path)
    assert NnunetModel.load(folder).rules.orientation == "LPS"
    (folder / "inference_config.json").write_text(json.dumps({"model_expected_orientation": ["R", "A", "S"]}))
    model = NnunetModel.load(folder)
    assert (model.rules.orientation, model.rules.most_intensity) == ("RAS", 10_000.0)
    (folder / "inference_config.json").write_text(json.dumps({"model_expected_orientation": ["R", "A", "A"]}))
    with pytest.raises(CheckpointError, match="orientation"):
        NnunetModel.load(folder)


def test_the_channel_of_a_roi_model_is_resampled_as_a_label_map(tmp_path):
    """Values between two labels are of neither."""
    two = {"schemes": ("ZScoreNormalization", "NoNormalization"), "masked": (False, False)}
    folder = write_model(Tiny(**two, extra={"roi": 278}), tmp_path)
    image = scan(channels=2)
    low, high = np.quantile(image[0], (0.5, 0.8))
    image[1] = (image[0] > low) * 3 + (image[0] > high) * 8
    with Predictor.from_model_folder(folder) as predictor:
        assert predictor.model.roi == "278"
        array, _ = predictor._prepare(image, GEOMETRY, None)
    assert array.shape[1:] != image.shape[1:]
    assert set(np.unique(array[1])) == {0, 3, 11}
    with Predictor.from_model_folder(write_model(Tiny(**two), tmp_path / "plain")) as predictor:
        plain, _ = predictor._prepare(image, GEOMETRY, None)
    assert np.array_equal(plain[0], array[0])
    assert len(np.unique(plain[1])) > 3
    with pytest.raises(CheckpointError, match=r"names a ROI model \(278\) but no channel"):
        NnunetModel.load(write_model(Tiny(extra={"roi": 278}), tmp_path / "one"))


@pytest.mark.parametrize("how", ["dataset.json", "NibabelIOWithReorient"])
def test_images_are_turned_as_the_model_wants_and_labels_are_turned_back(how, tmp_path):
    """The same scan, stored along other axes, has the same labels in the same places."""
    from ukbob_seg.dataset.orientation import turn_to

    turned = {"extra": {"orientation": ["R", "A", "S"]}} if how == "dataset.json" else {"reader": how}
    folder = write_model(Tiny(**turned), tmp_path)
    plain = write_model(Tiny(), tmp_path / "plain")
    image = scan()
    geometry = Geometry(image.shape[1:], (1.0, 1.3, 0.9), (3.0, -5.0, 7.0), (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))  # RAS
    with Predictor.from_model_folder(plain) as predictor:
        expected = predictor.predict_array(image, geometry, tmp_path / "plain.b2nd").labels
    turn = turn_to(geometry, "PSR")
    stored, grid = np.ascontiguousarray(turn.apply(image)), turn.geometry(geometry)
    settings = PredictionSettings(save_entropy=True)
    with Predictor.from_model_folder(folder, settings=settings) as predictor:
        found = predictor.predict_array(stored, grid, tmp_path / "turned.b2nd")
        assert np.array_equal(predictor.predict_array(image, geometry).labels, expected)
    assert found.labels.shape == grid.shape
    assert np.array_equal(turn.undo(found.labels), expected)
    assert found.entropy.shape == grid.shape
    probabilities = open_array(tmp_path / "turned.b2nd")[:]
    assert probabilities.shape == (3, *grid.shape)
    assert np.array_equal(turn.undo(probabilities), open_array(tmp_path / "plain.b2nd")[:])
    assert not list(tmp_path.glob(".turned-*"))
    with load_predictor([folder, plain]) as predictor, pytest.raises(ConfigError, match="cannot be averaged"):
        predictor.predict_array(stored, grid)


def test_bright_images_are_divided_for_models_that_say_an_orientation(tmp_path):
    """Without normalization the network sees it; a maximum of exactly 10,000 is left."""
    tiny = Tiny(schemes=("NoNormalization",), extra={"orientation": ["L", "P", "S"]}, spacing=GEOMETRY.spacing_mm)
    folder = write_model(tiny, tmp_path)
    image = scan()
    with Predictor.from_model_folder(folder) as predictor:
        for top, expected in ((40_000.0, 1000.0), (10_000.0, 10_000.0)):
            bright = image * (top / image.max())
            array, _ = predictor._prepare(bright, GEOMETRY, None)
            assert array.max() == pytest.approx(expected)
            assert bright.max() == pytest.approx(top)
