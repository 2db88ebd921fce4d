"""The protocol is the plain loop that its page describes, does nothing twice, and says what it cannot do."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import shifted_models
from robust_models import CLASSES, REGIONS, make_cases, make_model

from ukbob_seg.benchmark.robustness import robustness
from ukbob_seg.benchmark.robustness_cases import shift_seed
from ukbob_seg.benchmark.robustness_options import METHODS, ModelChoice, RobustnessOptions
from ukbob_seg.benchmark.robustness_table import MEAN, Gain, make_table
from ukbob_seg.cli import benchmark, evaluate, predict
from ukbob_seg.dataset.image_io import Geometry, read_geometry, read_image, read_labels, write_labels
from ukbob_seg.errors import CheckpointError, ConfigError, DatasetError
from ukbob_seg.evaluation import shift_strengths
from ukbob_seg.evaluation.metrics import METRICS, evaluate_case
from ukbob_seg.evaluation.shifts import SHIFTS, apply_shift
from ukbob_seg.inference.ensemble_predictor import EnsemblePredictor
from ukbob_seg.inference.etta import EttaConfig
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.parallel import Part

TABLES = ("robustness.json", "robustness.csv", "robustness.parquet", "robustness.html")
QUICK = RobustnessOptions(shifts=("blur", "gamma 2"), methods=("none", "etta"), etta=EttaConfig(steps=1))


@pytest.fixture
def page():
    """Asks for the page to be drawn."""


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    if "page" not in request.fixturenames:
        monkeypatch.setattr("ukbob_seg.benchmark.robustness_report.write_report", lambda *_: None)


@pytest.fixture
def roots(tmp_path):
    return make_cases(tmp_path, CLASSES)


@pytest.fixture
def model(roots):
    return ModelChoice((make_model(roots),))


@pytest.fixture
def calls(monkeypatch):
    """Predictions as they are made: the predictors' settings."""
    made, real = [], Predictor.predict_array

    def predict_array(self, image, *arguments, **more):
        made.append((self.settings.tta, self.settings.etta is not None))
        return real(self, image, *arguments, **more)

    monkeypatch.setattr(Predictor, "predict_array", predict_array)
    return made


def _scores(output):
    return pd.read_parquet(output / "robustness.parquet").set_index(["case", "shift", "method", "class"])


def _strict(path):
    """JSON that every reader takes."""

    def refuse(name):
        raise AssertionError(f"{path} has {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


def _read(folder, case, channels=1):
    image, geometry = read_image([folder / "imagesTs" / f"{case}_{k:04d}.nii.gz" for k in range(channels)])
    return image, geometry, read_labels(folder / "labelsTs" / f"{case}.nii.gz")[0]


def test_the_table_is_that_of_a_plain_loop(roots, model, tmp_path):
    shifts = ("none", "bias field", "blur", "noise")
    options = RobustnessOptions(shifts=shifts, methods=tuple(METHODS), etta=EttaConfig(steps=1))
    table = robustness(model, tmp_path / "out", roots=roots, options=options).table
    scores, dice = _scores(tmp_path / "out"), {}
    etta = EttaConfig(steps=1)
    for method, settings in {
        "none": PredictionSettings(), "tta": PredictionSettings(tta=True), "etta": PredictionSettings(etta=etta),
        "etta+tta": PredictionSettings(tta=True, etta=etta),
    }.items():  # fmt: skip
        with Predictor.from_model_folder(model.folders[0], settings=settings) as predictor:
            for number in range(3):
                image, geometry, truth = _read(roots.raw / shifted_models.NAME, f"level_{number}")
                for shift in shifts:
                    shifted = apply_shift(image, shift, geometry.spacing_mm, seed=number)
                    labels = predictor.predict_array(shifted, geometry).labels
                    expected = evaluate_case(labels, truth, geometry.spacing_mm, {"low": 2, "high": 7})
                    for name, metrics in expected.items():
                        found = scores.loc[(f"level_{number}", shift, method, name)]
                        assert found.to_dict() == pytest.approx(metrics, nan_ok=True)
                    dice[number, shift, method] = np.mean([metrics["dice"] for metrics in expected.values()])
    assert len(scores) == 3 * 4 * 4 * 2
    content = _strict(tmp_path / "out" / "robustness.json")
    cells = {(cell["shift"], cell["method"]): cell for cell in content["table"]}
    assert [*dict.fromkeys(shift for shift, _ in cells)] == [*shifts, MEAN]
    means = table.means()
    for method in METHODS:
        by_shift = {shift: np.mean([dice[n, shift, method] for n in range(3)]) for shift in shifts}
        by_shift[MEAN] = np.mean([by_shift[shift] for shift in shifts[1:]])
        per_case = {shift: [dice[n, shift, method] - dice[n, shift, "none"] for n in range(3)] for shift in shifts}
        per_case[MEAN] = np.mean([per_case[shift] for shift in shifts[1:]], axis=0)
        for row, value in by_shift.items():
            assert means.loc[row, method] == pytest.approx(value)
            cell = cells[row, method]
            assert cell["dice"] == pytest.approx(value)
            assert cell["change"] == pytest.approx(value - by_shift["none"])
            if method != "none":
                gains = np.array(per_case[row])
                assert cell["gain"] == pytest.approx({
                    "mean": gains.mean(), "better": int((gains > 0).sum()), "worse": int((gains < 0).sum()),
                    "cases": 3, "worst": gains.min(),
                })  # fmt: skip
        assert (cells["none", "none"]["gain"], cells["none", "none"]["cases"]) == (None, 3)
    # The methods and shifts do make a difference here, so that exchanging them could not go unnoticed.
    assert means.stack().nunique() > 16
    long = pd.read_csv(tmp_path / "out" / "robustness.csv", keep_default_na=False, na_values=[""])
    assert len(long) == 4 * 4 * 2
    row = long[(long["shift"] == "blur") & (long["method"] == "etta") & (long["class"] == "high")].iloc[0]
    of_cases = scores.xs(("blur", "etta", "high"), level=("shift", "method", "class"))
    assert (row["n"], row["n_infinite"]) == (3, 0)
    for column, metric in {"mean_dice": "dice", "mean_nsd": "nsd", "mean_hd95_mm": "hd95"}.items():
        assert row[column] == pytest.approx(of_cases[metric].mean())


def test_regions_ignored_voxels_and_several_channels(tmp_path):
    roots = make_cases(tmp_path, REGIONS)
    folder = make_model(roots, REGIONS, "RegionsOfTwoChannels")
    options = RobustnessOptions(shifts=("blur",), methods=("none",))
    robustness(ModelChoice((folder,), ("1",)), tmp_path / "out", roots=roots, options=options)
    scores = _scores(tmp_path / "out")
    predictor = Predictor.from_model_folder(folder, ["1"])
    for number in range(3):
        image, geometry, truth = _read(roots.raw / shifted_models.NAME, f"level_{number}", channels=2)
        assert (truth == 9).mean() > 0.2
        for shift in ("none", "blur"):
            shifted = apply_shift(image, shift, geometry.spacing_mm, seed=number)
            labels = predictor.predict_array(shifted, geometry).labels
            labels[truth == 9] = 0
            known = np.where(truth == 9, 0, truth)
            expected = evaluate_case(labels, known, geometry.spacing_mm, {"whole": (2, 7), "core": 7})
            for name, metrics in expected.items():
                assert scores.loc[(f"level_{number}", shift, "none", name)].to_dict() == pytest.approx(metrics)


def test_no_shift_and_no_adaptation_is_what_predict_and_evaluate_give(roots, model, tmp_path):
    raw, out = roots.raw / shifted_models.NAME, tmp_path / "out"
    (model.folders[0] / "postprocessing.json").write_text('{"largest_component": ["low"]}')
    call = ["-m", str(model.folders[0]), "-f", "0", "--device", "cpu"]
    flags = ["--raw", str(roots.raw), "-o", str(out), "--shifts", "blur", "--methods", "none"]
    assert benchmark.main(["robustness", *call, *flags]) == 0
    assert predict.main([*call, "-i", str(raw / "imagesTs"), "-o", str(tmp_path / "predicted")]) == 0
    assert evaluate.main([str(tmp_path / "predicted"), str(raw / "labelsTs"), "--no-report"]) == 0
    expected = pd.read_csv(tmp_path / "predicted" / "metrics.csv").set_index(["case", "class"])
    found = _scores(out).xs(("none", "none"), level=("shift", "method"))
    pd.testing.assert_frame_equal(found[list(METRICS)], expected.loc[found.index, list(METRICS)], check_dtype=False)
    # Largest components do show in these scores.
    assert benchmark.main(["robustness", *call, *flags, "--no-postprocessing"]) == 0
    assert not _scores(out).xs(("none", "none"), level=("shift", "method"))["tp"].equals(found["tp"])


def test_an_interrupted_run_goes_on_and_ends_the_same(page, roots, model, tmp_path, calls, monkeypatch, capsys):
    robustness(model, tmp_path / "whole", roots=roots, options=QUICK)
    assert calls == [(False, False), (False, True)] * 9
    calls.clear()
    flags = ["-m", model.folders[0], "--raw", roots.raw, "-o", tmp_path / "out", "--device", "cpu", "--shifts", "blur",
             "gamma 2", "--etta-steps", 1]  # fmt: skip
    command = ["robustness", *map(str, flags)]
    counted = Predictor.predict_array

    def stop(self, *arguments, **more):
        if len(calls) == 7:
            raise KeyboardInterrupt
        return counted(self, *arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Predictor, "predict_array", stop)
        assert benchmark.main(command) == 130
    assert "what was finished is kept, run the same command again to go on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "robustness.json").exists()
    assert benchmark.main(command) == 0
    assert len(calls) == 18
    for name in TABLES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    out = capsys.readouterr().out
    assert "mean Dice of 3 cases" in out
    assert "gain over none: mean (cases better / worse)" in out
    assert benchmark.main(command) == 0
    assert len(calls) == 18
    for name in TABLES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not [path for path in (tmp_path / "out").rglob(".*")]


def test_damaged_records_are_done_again(roots, model, tmp_path, calls):
    first = robustness(model, tmp_path / "out", roots=roots, options=QUICK)
    assert (first.predicted, first.missing) == (18, 0)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in TABLES[:3]}
    records = tmp_path / "out" / "records" / "level_1"
    (records / "blur--none.json").write_bytes((records / "blur--none.json").read_bytes()[:200])
    (records / "none--none.json").write_text("[]")
    content = json.loads((records / "none--etta.json").read_text())
    content["classes"]["high"]["dice"] = "much"
    (records / "none--etta.json").write_text(json.dumps(content))
    content = json.loads((records / "blur--etta.json").read_text())
    del content["classes"]["high"]
    (records / "blur--etta.json").write_text(json.dumps(content))
    (records / "gamma_2--none.json").unlink()
    (tmp_path / "out" / "example" / "level_0" / "gamma_2--etta.nii.gz").unlink()
    calls.clear()
    assert robustness(model, tmp_path / "out", roots=roots, options=QUICK).predicted == 6
    assert len(calls) == 6
    assert {name: (tmp_path / "out" / name).read_bytes() for name in TABLES[:3]} == before


def test_records_hold_only_for_what_they_were_made_of(roots, model, tmp_path, monkeypatch):
    def again(chosen=model, **changes):
        options = RobustnessOptions(**{"shifts": ("blur",), "methods": ("none",), **changes})
        return robustness(chosen, tmp_path / "out", roots=roots, options=options).predicted

    assert again() == 6
    assert again(base=PredictionSettings(window_batch=2)) == 0
    assert again(seed=5) == 0
    assert again(shifts=("none", "blur", "noise")) == 3
    assert again(tolerance_mm=1.0) == 6
    assert again(tolerance_mm=1.0, base=PredictionSettings(step=1.0)) == 6
    assert again() == 6
    image = roots.raw / shifted_models.NAME / "imagesTs" / "level_2_0000.nii.gz"
    os.utime(image, ns=(1, 1))
    assert again() == 2
    with monkeypatch.context() as patched:
        patched.setattr(shift_strengths, "BLUR_SIGMA_MM", 2.0)
        assert again() == 3
    assert again() == 3
    (model.folders[0] / "postprocessing.json").write_text('{"largest_component": ["low"]}')
    assert again() == 6
    assert again(base=PredictionSettings(postprocessing=False)) == 6
    assert again(ModelChoice(model.folders, ("1",))) == 6
    shutil.copy(model.folders[0] / "fold_0" / "checkpoint_best.pt", model.folders[0] / "fold_1" / "checkpoint_best.pt")
    assert again(ModelChoice(model.folders, ("1",))) == 6


def test_parts_share_the_cases_and_the_last_one_writes_the_tables(roots, model, tmp_path, calls, capsys):
    robustness(model, tmp_path / "whole", roots=roots, options=QUICK)
    calls.clear()
    found = [robustness(model, tmp_path / "out", roots=roots, options=QUICK, part=Part(n, 2)) for n in (2, 1)]
    assert [(result.predicted, result.missing, result.table is None) for result in found] == [
        (6, 12, True), (12, 0, False),
    ]  # fmt: skip
    assert len(calls) == 18
    for name in TABLES[:3]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    call = ["robustness", "-d", 5, "--raw", roots.raw, "--results", roots.results, "-o", tmp_path / "third",
            "--device", "cpu", "--shifts", "blur", "--methods", "none", "--part", "2/3"]  # fmt: skip
    assert benchmark.main([*map(str, call)]) == 0
    assert capsys.readouterr().out == "part 2/3: 2 predictions made; 4 of other parts are lacking\n"


def test_without_plain_prediction_there_is_no_gain_to_show(page, roots, model, tmp_path, capsys):
    raw = roots.raw / shifted_models.NAME
    call = ["-m", model.folders[0], "-i", raw / "imagesTs", "-r", raw / "labelsTs", "-o", tmp_path / "out",
            "--device", "cpu", "--shifts", "none", "--methods", "etta", "--cases", 1]  # fmt: skip
    assert benchmark.main(["robustness", *map(str, call)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mean Dice of 1 case\nshift    etta\nnone   0.")
    assert "gain" not in out
    assert MEAN not in out
    assert {cell["gain"] for cell in _strict(tmp_path / "out" / "robustness.json")["table"]} == {None}


def test_cases_are_drawn_by_seed(roots, model, tmp_path):
    def drawn(count, seed):
        options = RobustnessOptions(shifts=("none",), methods=("none",), cases=count, seed=seed)
        return robustness(model, tmp_path / "out", roots=roots, options=options).table.cases

    for seed in (0, 1, 2):
        names = np.random.default_rng(seed).permutation([f"level_{n}" for n in range(3)])
        assert drawn(2, seed) == tuple(sorted(names[:2])) == drawn(2, seed)
    assert len({drawn(1, seed) for seed in range(8)}) == 3
    with pytest.raises(ConfigError, match=r"--cases 4: there are 3 \(labels of .*labelsTs\)"):
        drawn(4, 0)


def test_a_case_has_the_same_field_and_noise_in_every_run():
    assert shift_seed("hippocampus_011") == 11
    assert shift_seed("patient") == shift_seed("patient") != shift_seed("patients")
    assert shift_seed("BraTS-GLI-00000-000") != shift_seed("BraTS-GLI-00001-000")


def test_several_models_are_averaged(roots, tmp_path):
    folders = (make_model(roots, folds=("0",)), make_model(roots, folds=("0", "1"), name="2d__other"))
    robustness(ModelChoice(folders), tmp_path / "out", roots=roots, options=QUICK)
    scores = _scores(tmp_path / "out")
    image, geometry, truth = _read(roots.raw / shifted_models.NAME, "level_1")
    shifted = apply_shift(image, "gamma 2", geometry.spacing_mm)
    for method in QUICK.methods:
        with EnsemblePredictor.from_model_folders(folders, settings=QUICK.settings(method)) as predictor:
            labels = predictor.predict_array(shifted, geometry).labels
        expected = evaluate_case(labels, truth, geometry.spacing_mm, {"low": 2, "high": 7})
        for name, metrics in expected.items():
            assert scores.loc[("level_1", "gamma 2", method, name)].to_dict() == pytest.approx(metrics)


@pytest.mark.parametrize("configuration", ["3d_fullres", "3d_cascade_fullres"])
def test_without_test_cases_each_fold_is_judged_on_what_it_held_out(configuration, tmp_path):
    roots = shifted_models.make_dataset(tmp_path)
    errors = {"0": 0.3, "1": -0.2}
    shifted_models.make_model(roots, "3d_lowres", "a", errors, validate=False)
    folder = shifted_models.make_model(roots, configuration, "a", errors, validate=False)
    options = RobustnessOptions(shifts=("none",), methods=("none",))
    result = robustness(ModelChoice((folder,)), tmp_path / "out", roots=roots, options=options)
    assert result.table.cases == ("level_0", "level_1", "level_2", "level_3")
    scores = _scores(tmp_path / "out")
    for fold, names in shifted_models.FOLDS.items():
        for case in names:
            chances = shifted_models.probabilities(shifted_models.image_of(int(case[-1])), errors[fold])
            truth, geometry = read_labels(roots.raw / shifted_models.NAME / "labelsTr" / f"{case}.nii.gz")
            labels = np.array([0, 2, 7])[chances.argmax(0)]
            expected = evaluate_case(labels, truth, geometry.spacing_mm, {"low": 2, "high": 7})
            for name, metrics in expected.items():
                assert scores.loc[(case, "none", "none", name), "dice"] == pytest.approx(metrics["dice"], abs=2e-3)
    content = _strict(tmp_path / "out" / "robustness.json")
    assert content["cases_from"] == "held out by fold 0, 1, predicted by that fold's network"
    assert [group["cases"] for group in content["networks"]] == [*map(list, shifted_models.FOLDS.values())]
    assert all(f"/fold_{k}/" in path for k, group in enumerate(content["networks"]) for path in group["checkpoints"])
    one = robustness(ModelChoice((folder,), ("1",)), tmp_path / "one", roots=roots, options=options)
    assert one.table.cases == ("level_1", "level_3")


def test_absent_and_invented_classes(tmp_path):
    """A case without a class on both sides has no value of it; one that invents it has 0 and no distance."""
    nothing = dict.fromkeys(METRICS, math.nan)
    counts = dict.fromkeys(("n_pred", "n_ref", "tp", "fp", "fn"), 0)

    def scores(dice, nsd, hd95):
        return {**nothing, **counts, "dice": dice, "nsd": nsd, "hd95": hd95}

    absent, invented = scores(math.nan, math.nan, math.nan), scores(0.0, 0.0, math.inf)
    table = make_table(
        {
            ("a", "none", "none"): {"x": scores(0.8, 0.9, 2.0), "y": absent},
            ("a", "none", "etta"): {"x": scores(0.8, 0.9, 2.0), "y": invented},
            ("b", "none", "none"): {"x": absent, "y": absent},
            ("b", "none", "etta"): {"x": absent, "y": invented},
        },
        ("none",), ("none", "etta"), ("x", "y"),
    )  # fmt: skip
    assert table.means().loc["none"].tolist() == pytest.approx([0.8, (0.4 + 0.0) / 2])
    assert table.means("hd95").loc["none"].tolist() == pytest.approx([2.0, 2.0])
    assert table.infinite().loc["none"].tolist() == [0, 2]
    gain = table.gains["none", "etta"]
    assert (gain.mean, gain.better, gain.worse, gain.cases, gain.worst) == pytest.approx((-0.4, 0, 1, 1, -0.4))
    by_class = table.by_class().set_index(["method", "class"])
    assert by_class.loc[("none", "y"), ["n", "n_infinite"]].tolist() == [0, 0]
    assert by_class.loc[("etta", "y"), ["n", "n_infinite", "mean_dice"]].tolist() == [2, 2, 0.0]
    assert math.isnan(by_class.loc[("etta", "y"), "mean_hd95_mm"])
    assert MEAN not in table.means().index


def test_a_case_that_changes_nothing_is_neither_better_nor_worse():
    gain = Gain.of(pd.Series([0.1, 0.0, -0.2, math.nan]))
    assert (gain.better, gain.worse, gain.cases, gain.worst) == (1, 1, 3, -0.2)
    assert gain.mean == pytest.approx(-0.1 / 3)
    nothing = Gain.of(pd.Series([math.nan]))
    assert nothing.cases == 0
    assert math.isnan(nothing.mean)
    assert math.isnan(nothing.worst)


def test_a_class_that_is_nowhere_gives_strict_files(page, roots, model, tmp_path):
    for number in range(3):
        path = roots.raw / shifted_models.NAME / "labelsTs" / f"level_{number}.nii.gz"
        labels, geometry = read_labels(path)
        write_labels(np.zeros_like(labels), geometry, path)
    robustness(model, tmp_path / "out", roots=roots, options=QUICK)
    content = _strict(tmp_path / "out" / "robustness.json")
    assert {cell["dice"] for cell in content["table"]} == {0.0}
    assert {cell["hd95_mm"] for cell in content["table"]} == {None}
    assert all(_strict(path) for path in (tmp_path / "out" / "records").rglob("*.json"))


def test_the_page_shows_table_pictures_and_strengths(page, roots, model, tmp_path, monkeypatch):
    monkeypatch.setattr(shift_strengths, "BLUR_SIGMA_MM", 1.7)
    result = robustness(model, tmp_path / "out", roots=roots, options=QUICK)
    text = (tmp_path / "out" / "robustness.html").read_text()
    assert text.count("data:image/png;base64,") == 2
    assert "http" not in text
    means = result.table.means()
    for row in ("none", "blur", "gamma 2", MEAN):
        for method in QUICK.methods:
            assert f"<td>{means.loc[row, method]:.4f}</td>" in text
    assert "smoothed by a Gaussian of standard deviation 1.7 mm" in text
    assert "Rician" not in text
    assert "Case level_0, " in text


def test_every_shift_has_a_definition():
    assert list(shift_strengths.definitions()) == list(SHIFTS)
    assert RobustnessOptions().shifts == tuple(SHIFTS)
    assert RobustnessOptions(shifts=("noise", "blur")).shifts == ("none", "blur", "noise")
    assert RobustnessOptions(methods=("etta", "none")).methods == ("none", "etta")


def test_a_network_without_layers_that_adapt_is_refused_before_any_prediction(tmp_path, calls):
    roots = shifted_models.make_dataset(tmp_path)
    folder = shifted_models.make_model(roots, "3d_fullres", "a", {"0": 0.1, "1": 0.0}, validate=False)
    with pytest.raises(ConfigError, match=r"no normalization layer .* nothing for --etta to adapt"):
        robustness(ModelChoice((folder,)), tmp_path / "out", roots=roots)
    assert calls == []
    plain = RobustnessOptions(shifts=("none",), methods=("none",))
    assert robustness(ModelChoice((folder,)), tmp_path / "out", roots=roots, options=plain).predicted == 4


def _remove_image(raw):
    (raw / "imagesTs" / "level_1_0000.nii.gz").unlink()


def _move_labels(raw):
    path = raw / "labelsTs" / "level_1.nii.gz"
    labels, grid = read_labels(path)
    write_labels(labels, Geometry(grid.shape, grid.spacing_mm, (9.0, 0.0, 0.0)), path)


def _remove_test_cases(raw):
    shutil.rmtree(raw / "labelsTs")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_remove_image, "1 of 3 label files of .*labelsTs have no image CASE_0000.nii.gz in .*imagesTs: level_1"),
        (_move_labels, "case level_1: origin_mm differs"),
        (_remove_test_cases, "no labelled test cases .* cannot be used: .*imagesTr does not exist; or give the images"),
        (shutil.rmtree, "there is no raw dataset .* give the images with -i and their labels with -r"),
    ],
)
def test_what_cannot_be_scored_is_refused(break_it, message, roots, model, tmp_path, calls):
    break_it(roots.raw / shifted_models.NAME)
    with pytest.raises(DatasetError, match=message):
        robustness(model, tmp_path / "out", roots=roots)
    assert calls == []
    assert not (tmp_path / "out").exists()


def test_a_model_of_all_cases_needs_other_cases(roots, tmp_path):
    _remove_test_cases(roots.raw / shifted_models.NAME)
    model = ModelChoice((make_model(roots, folds=("all",)),))
    with pytest.raises(DatasetError, match=r"fold all of .* has seen all training cases; give the images with -i"):
        robustness(model, tmp_path / "out", roots=roots)
    with pytest.raises(CheckpointError, match=r"no checkpoint_best.pt for fold 3 \(trained: all\)"):
        robustness(ModelChoice(model.folders, ("3",)), tmp_path / "out", roots=roots)


def test_unknown_label_values_name_the_case(roots, model, tmp_path):
    path = roots.raw / shifted_models.NAME / "labelsTs" / "level_1.nii.gz"
    write_labels(np.full_like(read_labels(path)[0], 5), read_geometry(path), path)
    with pytest.raises(DatasetError, match=r"case level_1: level_1.nii.gz: unknown label values 5"):
        robustness(model, tmp_path / "out", roots=roots, options=QUICK)
    assert len([*(tmp_path / "out" / "records").rglob("*.json")]) == 6  # level_0 is kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shifts", "blurr"], "error: --shifts: no 'blurr'; choose from none, bias field, blur"),
        (["--methods", "TTA"], "error: --methods: no 'TTA'; choose from none, tta, etta, etta+tta"),
        (["-i", "imagesTs"], "error: -i and -r belong together: give the images with -i and their labels with -r"),
        (["-i", "nowhere", "-r", "nowhere"], "error: -i: folder nowhere does not exist"),
        (["-d", "5"], "error: give the model either as -d ID or as -m MODEL_FOLDER"),
        (
            ["--methods", "none", "--etta-lr", "0.1"],
            "error: --etta-mode, --etta-steps and --etta-lr need --methods etta",
        ),
        (["--cases", "0"], "error: --cases must be at least 1, got 0"),
        (["--tolerance-mm", "-1"], "error: --tolerance-mm must be zero or positive, got -1"),
        (["--part", "3/2"], "error: --part 3/2: the first is 1/2, the last 2/2"),
        (["-f", "0", "7"], "has no checkpoint_best.pt for fold 7 (trained: 0, 1)"),
        (["-m", "elsewhere/Dataset009_Other/3d_fullres__x"], "error: the models are of Dataset005_Levels and of "),
    ],
)
def test_one_sentence_for_what_is_wrong(arguments, message, roots, model, tmp_path, capsys, calls):
    call = ["robustness", "-m", str(model.folders[0]), "--raw", str(roots.raw), "-o", str(tmp_path / "out")]
    assert benchmark.main([*call, "--device", "cpu", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
    assert calls == []


def test_help_lists_shifts_and_loads_nothing_heavy():
    code = (
        "import sys; from ukbob_seg.cli.benchmark import main\n"
        "try: main(['robustness', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = ('torch', 'scipy', 'pandas', 'matplotlib', 'SimpleITK', 'numba')\n"
        "print('LOADED', [name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "example:" in out
    assert "LOADED []" in out
    for name in (*SHIFTS, *METHODS):
        assert name in out
