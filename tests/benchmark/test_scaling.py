"""Scaling studies: nested subsets, one budget, the same scored cases; nothing is trained twice, nothing is mixed up."""

import csv
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ukbob_seg.benchmark import scaling
from ukbob_seg.benchmark.scaling import ScalingStudy, Stage, run_scaling, units
from ukbob_seg.benchmark.scaling_report import _far_apart, scaling_figure, write_report
from ukbob_seg.benchmark.scaling_results import collect_results, fit_line, table_lines
from ukbob_seg.cli import benchmark
from ukbob_seg.dataset.image_io import Geometry, write_image, write_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.errors import ConfigError, DatasetError, StoppedError
from ukbob_seg.evaluation import validate_fold
from ukbob_seg.evaluation.evaluate import ReportOptions
from ukbob_seg.parallel import Part
from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions
from ukbob_seg.training import state, trainer
from ukbob_seg.training.checkpoint import read_checkpoint
from ukbob_seg.training.config import RunOptions, TrainingConfig

UP, DOWN = "Dataset007_Many", "Dataset008_Few"
NETWORK = "tests_tiny_scaling:Tiny"
CODE = """
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self, in_channels, out_channels, width):
        super().__init__(nn.Conv3d(in_channels, width, 3, padding=1), nn.InstanceNorm3d(width, affine=True),
                         nn.ReLU(), nn.Conv3d(width, out_channels, 1))
"""
CONFIG = TrainingConfig(epochs=2, iterations_per_epoch=2, learning_rate=1e-2, schedule="constant", validation_every=2)
QUIET = RunOptions(quiet=True)
SHAPE = (16, 18, 20)


def _raw(folder, cases, labels):
    """Two bright boxes in the dark."""
    geometry = Geometry(SHAPE, (1.0, 1.2, 0.9))
    for number in range(cases):
        generator = np.random.default_rng(number)
        truth = np.zeros(SHAPE, np.uint8)
        truth[3:9, 3:8, 4:12], truth[9:14, 8:15, 6:16] = 1, 2
        image = 100.0 + 60.0 * truth + generator.normal(0, 10, SHAPE)
        write_image(image.astype(np.float32), geometry, folder / "imagesTr" / f"case_{number:02d}_0000.nii.gz")
        write_labels(truth, geometry, folder / "labelsTr" / f"case_{number:02d}.nii.gz")
    content = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Ten cases, eight of which train fold 0, and five others, whose classes are listed in another order."""
    root = tmp_path_factory.mktemp("scaling")
    roots = Roots.below(root)
    _raw(roots.raw / UP, 10, {"background": 0, "first": 1, "second": 2})
    _raw(roots.raw / DOWN, 5, {"background": 0, "second": 2, "first": 1})
    for number, name in ((7, UP), (8, DOWN)):
        plan_and_preprocess(number, roots, PlanOptions(memory_gb=2, batch_size=1, feature_size=12), workers=1)
        path = roots.preprocessed / name / "plans.json"
        content = json.loads(path.read_text())
        content["configurations"]["3d_fullres"]["networks"][NETWORK] = {
            "patch_size": [12, 12, 12], "batch_size": 1, "arguments": {"width": 4}, "estimated_memory_gb": 0.1,
        }  # fmt: skip
        path.write_text(json.dumps(content))
    (root / "tests_tiny_scaling.py").write_text(CODE)
    return root


@pytest.fixture
def roots(prepared, monkeypatch):
    monkeypatch.syspath_prepend(prepared)
    return Roots.below(prepared)


@pytest.fixture
def without_pictures(monkeypatch):
    """Most of the time of so small a run goes into its curves and its report, which other tests look at."""
    monkeypatch.setattr(state, "write_plot", lambda *given: None)
    monkeypatch.setattr(validate_fold, "ReportOptions", lambda images: ReportOptions(write=False))


@pytest.fixture
def steps(monkeypatch):
    """Optimizer steps that are really done."""
    done, real = [], trainer._train_step

    def step(run, *more):
        done.append(run.setup.folder)
        return real(run, *more)

    monkeypatch.setattr(trainer, "_train_step", step)
    return done


@pytest.fixture
def make_study(roots, tmp_path, without_pictures):
    def make(downstream=None, config=CONFIG, **more):
        stage = downstream and Stage(DOWN, "0", downstream)
        given = {"fractions": (0.25, 0.5, 1.0), "seeds": (0,), "network": NETWORK, **more}
        return ScalingStudy(tmp_path / "study", roots, Stage(UP, "0", config), stage, **given)

    return make


def _cases(run):
    return json.loads((run.folder / "training.json").read_text())["cases"]


def _weights(path):
    return read_checkpoint(path)[1]["network_weights"]


def _strict(path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_subsets_are_nested_and_all_else_is_equal(make_study, roots, steps):
    study = make_study(seeds=(0, 1))
    runs = run_scaling(study, QUIET)
    split = json.loads((roots.preprocessed / UP / "splits.json").read_text())[0]
    assert len(split["train"]) == 8
    by_key = {(run.seed, run.fraction): run for run in runs}
    assert len(by_key) == len(runs) == 6
    for seed in (0, 1):
        sets = [_cases(by_key[seed, fraction]) for fraction in (0.25, 0.5, 1.0)]
        assert [len(cases) for cases in sets] == [2, 4, 8]
        assert set(sets[0]) < set(sets[1]) < set(sets[2]) == set(split["train"])
    assert _cases(by_key[0, 0.5]) != _cases(by_key[1, 0.5])
    budget = CONFIG.epochs * CONFIG.iterations_per_epoch
    assert {steps.count(run.folder) for run in runs} == {budget}
    for run in runs:
        scored = sorted(path.name for path in (run.folder / "validation").glob("*.nii.gz"))
        assert scored == [f"{name}.nii.gz" for name in sorted(split["val"])]
        recipe = json.loads((run.folder / "training.json").read_text())
        assert (recipe["seed"], recipe["subset_fraction"]) == (run.seed, run.fraction)
    assert not roots.results.exists()  # nothing of the user's is touched


def test_the_numbers_are_those_of_the_summaries(make_study, tmp_path):
    study = make_study(seeds=(0, 3))
    runs = run_scaling(study, QUIET)
    results = collect_results(study, runs)
    results.write(study.output)
    write_report(study.output / "scaling.html", results)
    summaries = {(r.fraction, r.seed): json.loads((r.folder / "validation" / "summary.json").read_text()) for r in runs}
    with open(study.output / "scaling.csv") as file:
        rows = {(float(row["fraction"]), int(row["seed"])): row for row in csv.DictReader(file)}
    assert rows.keys() == summaries.keys()
    for key, row in rows.items():
        assert int(row["training_cases"]) == round(8 * key[0])
        assert int(row["validation_cases"]) == 2
        for metric in ("dice", "iou", "nsd", "hd95"):
            mean = summaries[key]["overall"][metric]["mean"]
            assert row[metric] == "" if mean is None else float(row[metric]) == mean
    figure = scaling_figure(results, "subsets")
    (axis,) = figure.axes
    dots = axis.collections[0].get_offsets()
    expected = sorted((round(8 * f), s["overall"]["dice"]["mean"]) for (f, _), s in summaries.items())
    assert sorted(map(tuple, dots.tolist())) == expected
    means = next(line for line in axis.lines if line.get_label() == "mean over seeds").get_xydata()
    for n, mean in means:
        assert mean == pytest.approx(np.mean([dice for cases, dice in expected if cases == n]), abs=1e-12)
    assert axis.get_xscale() == "log"  # 2 to 8
    content = _strict(study.output / "scaling.json")
    found = [(entry["fraction"], entry["seeds"]) for entry in content["stages"]["subsets"]["means"]]
    assert found == [(0.25, 2), (0.5, 2), (1.0, 2)]
    classes = content["stages"]["subsets"]["classes"]
    for name in ("first", "second"):
        values = [summaries[0.5, seed]["classes"][name]["dice"]["mean"] for seed in (0, 3)]
        assert classes[name]["0.5"] == pytest.approx(np.mean(values), abs=1e-12)
    page = (study.output / "scaling.html").read_text()
    assert "6 runs, 2 seeds" in page
    mean, sd = np.mean([expected[0][1], expected[1][1]]), np.std([expected[0][1], expected[1][1]], ddof=1)
    assert f"{mean:.4f} ± {sd:.4f}" in page
    assert f"{mean:.4f} ± {sd:.4f}" in table_lines(results)[1]


def test_nothing_is_trained_twice(make_study, steps, monkeypatch):
    study = make_study()
    predicted, real = [], scaling.validate_fold

    def validate(folder, *more, **named):
        predicted.append(folder)
        return real(folder, *more, **named)

    monkeypatch.setattr(scaling, "validate_fold", validate)
    runs = run_scaling(study, QUIET)
    first = {run.folder: _weights(run.checkpoint) for run in runs}
    assert (len(steps), len(predicted)) == (12, 3)
    assert [run.folder for run in run_scaling(study, QUIET)] == [run.folder for run in runs]
    assert (len(steps), len(predicted)) == (12, 3)
    (runs[1].folder / "validation" / "summary.json").unlink()  # as when the validation was cut off
    run_scaling(study, QUIET)
    assert (len(steps), len(predicted)) == (12, 4)
    shutil.rmtree(runs[2].folder)
    run_scaling(study, QUIET)
    assert steps[12:] == [runs[2].folder] * 4
    again = _weights(runs[2].checkpoint)
    assert all(torch.equal(again[key], value) for key, value in first[runs[2].folder].items())
    del steps[:]
    run_scaling(make_study(fractions=(0.25, 0.75), seeds=(0, 1)), QUIET)  # more runs of the same study
    assert len(steps) == 3 * 4
    assert not any("fraction_0.25/seed_0" in str(folder) for folder in steps)
    settings = json.loads((study.output / "scaling_settings.json").read_text())
    assert (settings["fractions"], settings["seeds"]) == ([0.25, 0.5, 0.75, 1.0], [0, 1])


def test_a_run_that_was_stopped_goes_on(make_study, steps, monkeypatch):
    study, real = make_study(fractions=(0.5,)), trainer._train_step

    def interrupted(*given):
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_train_step", interrupted)
        with pytest.raises(
            KeyboardInterrupt, match=r"interrupted in Dataset007_Many, fraction 0\.5, seed 0; run the same"
        ):
            run_scaling(study, QUIET)
    assert len(steps) == 3
    with pytest.raises(DatasetError, match=r"1 runs are not finished: Dataset007_Many, fraction 0\.5"):
        collect_results(study, [unit[0] for unit in units(study)])
    (run,) = run_scaling(study, QUIET)
    assert len(steps) == 3 + 2  # the epoch that was interrupted, not the one before
    assert run.is_finished

    def stopped(folder, *more, **named):
        raise StoppedError("stopped by SIGTERM in the validation; run the same command with --resume to go on")

    (run.folder / "validation" / "summary.json").unlink()
    monkeypatch.setattr(scaling, "validate_fold", stopped)
    with pytest.raises(StoppedError, match="in the validation; run the same command again to go on") as raised:
        run_scaling(study, QUIET)
    assert "--resume" not in str(raised.value)


def test_changed_settings_are_refused(make_study, roots, steps, tmp_path):
    study = make_study(fractions=(0.5,))
    (run,) = run_scaling(study, QUIET)
    del steps[:]
    for other, words in (
        (make_study(fractions=(0.5,), config=dataclasses.replace(CONFIG, epochs=3)), "upstream epochs 2 -> 3"),
        (make_study(fractions=(0.5,), checkpoint="best"), "checkpoint final -> best"),
        (make_study(CONFIG, fractions=(0.5,)), "downstream None -> given"),
    ):
        with pytest.raises(ConfigError, match=f"holds a study with other settings .*{words}.*another folder with -o"):
            run_scaling(other, QUIET)
    copy = Roots.below(tmp_path / "copy")
    shutil.copytree(roots.raw, copy.raw)
    shutil.copytree(roots.preprocessed, copy.preprocessed)
    path = copy.preprocessed / UP / "splits.json"
    splits = json.loads(path.read_text())
    moved = dataclasses.replace(study, roots=copy)
    run_scaling(moved, QUIET)  # where the data lie does not matter
    path.write_text(json.dumps([splits[1], *splits[1:]]))
    with pytest.raises(ConfigError, match="upstream split changed"):
        run_scaling(moved, QUIET)
    assert steps == []
    # What only training itself can see, in a run that had begun.
    shutil.rmtree(run.folder / "validation")
    content = json.loads((copy.preprocessed / UP / "plans.json").read_text())
    path.write_text(json.dumps(splits))
    (study.output / "scaling_settings.json").unlink()
    content["configurations"]["3d_fullres"]["networks"][NETWORK]["batch_size"] = 2
    (copy.preprocessed / UP / "plans.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"cannot go on with what is there now \(.*patch and batch.*delete .*fold_0"):
        run_scaling(moved, QUIET)


def test_parts_share_the_runs_and_the_whole_collects(make_study, steps):
    study = make_study(CONFIG, fractions=(0.25, 1.0), seeds=(0, 1))
    all_runs = [run.folder for unit in units(study) for run in unit]
    found = [run_scaling(study, QUIET, Part(number, 3)) for number in (2, 3, 1)]
    folders = [run.folder for runs in found for run in runs]
    assert sorted(folders) == sorted(all_runs)
    assert len(set(folders)) == 10  # 4 on subsets, as many after them, 2 from fresh weights
    done = len(steps)
    results = collect_results(study, run_scaling(study, QUIET))
    assert len(steps) == done == 10 * 4
    assert len(results.table) == 10


def test_fine_tuning_starts_from_the_run_before_it(make_study):
    still = dataclasses.replace(CONFIG, epochs=1, iterations_per_epoch=1, learning_rate=1e-14, weight_decay=0.0)
    study = make_study(still, fractions=(0.25, 1.0), seeds=(0, 1))
    runs = run_scaling(study, QUIET)
    fine_tuned = [run for run in runs if run.source is not None]
    assert [(run.fraction, run.seed) for run in fine_tuned] == [(0.25, 0), (1.0, 0), (0.25, 1), (1.0, 1)]
    for run in fine_tuned:
        before, after = _weights(run.source.checkpoint), _weights(run.checkpoint)
        assert run.source.fraction == run.fraction
        assert run.source.seed == run.seed
        assert before["0.weight"].abs().max() > 0.01
        for key in before:
            torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-9)
        record = json.loads((run.folder / "pretrained.json").read_text())
        assert record["file"] == str((run.source.folder / "checkpoint_final.pt").resolve())
        assert json.loads((run.folder / "training.json").read_text())["seed"] == run.seed
    fresh = [run for run in runs if run.fraction == 0]
    assert [run.seed for run in fresh] == [0, 1]
    for run in fresh:
        assert not (run.folder / "pretrained.json").exists()
        started = _weights(run.checkpoint)
        other = _weights(next(r for r in fine_tuned if r.seed == run.seed).checkpoint)
        assert not torch.allclose(started["0.weight"], other["0.weight"], atol=1e-3)
        assert json.loads((run.folder / "training.json").read_text())["learning_rate"] == 1e-14  # the same budget
    results = collect_results(study, runs)
    means = results.of_stage("downstream")
    assert means["training_cases"].to_dict() == {0.0: 0, 0.25: 2, 1.0: 8}
    figure = scaling_figure(results, "downstream")
    line = next(line for line in figure.axes[0].lines if str(line.get_label()).startswith("fresh weights"))
    assert line.get_ydata()[0] == pytest.approx(means.loc[0.0, "mean"], abs=1e-12)
    lines = table_lines(results)
    assert [row.split()[:3] for row in lines[1:]] == [["0", "0", "2"], ["0.25", "2", "2"], ["1", "8", "2"]]
    assert lines[1].split()[3] == "-"
    write_report(study.output / "page.html", results)


@pytest.mark.parametrize("checkpoint", ["best", "final"])
def test_one_checkpoint_is_scored_and_fine_tuned(checkpoint, make_study, monkeypatch):
    scored, real = [], scaling.validate_fold

    def validate(folder, *more, **named):
        scored.append(named["checkpoint"])
        return real(folder, *more, **named)

    monkeypatch.setattr(scaling, "validate_fold", validate)
    config = dataclasses.replace(CONFIG, epochs=1, validation_every=1)
    _, after, _ = run_scaling(make_study(config, config, fractions=(1.0,), checkpoint=checkpoint), QUIET)
    assert scored == [checkpoint] * 3
    record = json.loads((after.folder / "pretrained.json").read_text())
    assert record["file"].endswith(f"checkpoint_{checkpoint}.pt")


def test_close_labels_of_the_axis_are_left_out():
    figure = Figure(figsize=(8, 4))
    axis = figure.subplots()
    axis.set_xscale("log")
    axis.set_xlim(9, 110)
    assert _far_apart(axis, [10.0, 20, 70, 80, 90, 100]) == [10, 20, 80, 100]


def test_the_line_is_the_least_squares_line():
    cases = np.array([10.0, 10, 100, 1000])
    fit = fit_line(cases, 0.5 + 0.1 * np.log10(cases) + np.array([0.01, -0.01, 0, 0]))
    assert (fit.a, fit.b) == (pytest.approx(0.5), pytest.approx(0.1))
    assert fit.at(10) == pytest.approx(0.6)
    assert fit.residual_sd == pytest.approx(math.sqrt(2e-4 / 2))
    assert (fit.smallest, fit.largest) == (10, 1000)
    assert fit_line(cases[:3], np.ones(3)) is None  # two sizes lie on some line in any case
    assert fit_line(cases, np.array([0.1, 0.2, np.nan, 0.4])) is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"fractions": (0.25, 0.26)}, "fractions 0.25 and 0.26 both give 2 training cases"),
        ({"fractions": (0.5, 0.5)}, "--fractions has a number twice"),
        ({"fractions": (0.0, 0.5)}, r"--fractions must lie in \(0, 1\]"),
        ({"fractions": ()}, "--fractions needs at least one number"),
        ({"seeds": (1, 1)}, "--seeds has a number twice"),
        ({"checkpoint": "latest"}, "--checkpoint must be best or final"),
        ({"network": "u_net"}, "the plans hold no network 'u_net'"),
        ({"config": dataclasses.replace(CONFIG, early_stopping=2)}, "the same budget; early stopping would change it"),
    ],
)
def test_what_cannot_be_compared_is_refused(make_study, more, words, steps):
    with pytest.raises(ConfigError, match=words):
        run_scaling(make_study(**more), QUIET)
    assert steps == []


def test_cascades_and_fold_all_are_refused(make_study, roots, tmp_path):
    with pytest.raises(ConfigError, match="fold all holds no case out"):
        Stage(UP, "all", CONFIG)
    copy = Roots.below(tmp_path / "copy")
    shutil.copytree(roots.raw, copy.raw)
    shutil.copytree(roots.preprocessed, copy.preprocessed)
    path = copy.preprocessed / UP / "plans.json"
    content = json.loads(path.read_text())
    first = content["configurations"]["3d_fullres"]
    content["configurations"]["3d_cascade_fullres"] = {
        **first,
        "previous_stage": "3d_fullres",
        "arrays_of": "3d_fullres",
    }
    path.write_text(json.dumps(content))
    study = dataclasses.replace(make_study(), roots=copy, configuration="3d_cascade_fullres")
    with pytest.raises(ConfigError, match="second stage of a cascade"):
        run_scaling(study, QUIET)


def _call(roots, out, *more, dataset="7"):
    flags = ["--raw", str(roots.raw), "--preprocessed", str(roots.preprocessed), "--device", "cpu"]
    return benchmark.main(["scaling", "-d", dataset, "-f", "0", "-o", str(out), "--network", NETWORK, *flags, *more])


def test_the_command(roots, tmp_path, capsys, steps):
    out = tmp_path / "out"
    budget = ["--epochs", "1", "--iterations-per-epoch", "2", "--downstream", "8"]
    after = ["--downstream-epochs", "1", "--downstream-iterations-per-epoch", "1", "--downstream-lr", "1e-3"]
    call = ["--fractions", "1", "0.25", *budget, *after]
    assert _call(roots, out, *call, "--part", "1/2") == 0
    assert "part 1 of 2: 3 runs" in capsys.readouterr().out
    assert not (out / "scaling.csv").exists()
    assert _call(roots, out, *call) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["fraction", "cases", "seeds", "Dice", "Dice", "downstream"]
    assert [line.split()[0] for line in printed[1:4]] == ["0", "0.25", "1"]
    assert len(steps) == 2 * 2 + 3 * 1
    content = _strict(out / "scaling.json")
    assert (content["stages"]["subsets"]["steps"], content["stages"]["downstream"]["steps"]) == (2, 1)
    assert content["stages"]["downstream"]["recipe"]["learning_rate"] == 1e-3
    assert _call(roots, out, *call, "--lr", "0.5") == 2
    assert "upstream learning_rate 0.0001 -> 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--downstream-epochs", "3"], "options that begin with --downstream- need --downstream"),
        (["--part", "3/2"], "--part 3/2"),
        (["--fractions", "2"], "--fractions must lie in (0, 1]"),
        (["--downstream", "9"], "no dataset '9'"),
        (["--pretrained", "nowhere.pt"], "pretrained weights nowhere.pt do not exist"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_the_command_says_what_is_wrong(roots, tmp_path, capsys, more, words):
    assert _call(roots, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error


def test_torchrun_is_refused(roots, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _call(roots, tmp_path / "out") == 2
    assert "not for torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scaling", "embeddings"])
def test_help_loads_nothing_heavy(name):
    import subprocess
    import sys

    code = (
        "import sys; from ukbob_seg.cli.benchmark import main\n"
        f"try: main(['{name}', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print('LOADED', [n for n in ('torch', 'pandas', 'matplotlib', 'sklearn', 'SimpleITK') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED []" in result.stdout
    assert "example:" in result.stdout
