"""Comparisons of networks: one budget, every fold and seed, measured; nothing twice, and a failure keeps the rest."""

import csv
import json
import math

import numpy as np
import pytest

from ukbob_seg.benchmark import networks_run
from ukbob_seg.benchmark.networks import NetworkStudy, run_networks, runs
from ukbob_seg.benchmark.networks_report import dice_figure, write_report
from ukbob_seg.benchmark.networks_results import COLUMNS, collect_results
from ukbob_seg.benchmark.networks_run import RunRequest, carry_out
from ukbob_seg.cli import benchmark
from ukbob_seg.dataset.image_io import Geometry, write_image, write_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.errors import ConfigError, DatasetError, StoppedError, UkbobError
from ukbob_seg.evaluation import validate_fold
from ukbob_seg.evaluation.evaluate import ReportOptions
from ukbob_seg.parallel import Part
from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions
from ukbob_seg.training import state, trainer
from ukbob_seg.training.config import RunOptions, TrainingConfig

NAME = "Dataset007_Boxes"
SHAPE = (12, 14, 16)
CODE = """
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self, in_channels, out_channels, width):
        super().__init__(nn.Conv3d(in_channels, width, 3, padding=1), nn.InstanceNorm3d(width, affine=True),
                         nn.ReLU(), nn.Conv3d(width, out_channels, 1))

class Wide(Tiny):
    pass

class Broken(Tiny):
    def forward(self, x):
        from ukbob_seg.errors import ConfigError
        raise ConfigError("it does not like this image")
"""
TINY, WIDE, BROKEN = (f"tests_networks:{name}" for name in ("Tiny", "Wide", "Broken"))
CONFIG = TrainingConfig(epochs=2, iterations_per_epoch=2, learning_rate=1e-2, schedule="constant", validation_every=2)
QUIET = RunOptions(quiet=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("networks")
    roots, geometry = Roots.below(root), Geometry(SHAPE, (1.0, 1.2, 0.9))
    for number in range(6):
        generator = np.random.default_rng(number)
        truth = np.zeros(SHAPE, np.uint8)
        truth[2:6, 2:7, 3:9], truth[6:10, 7:12, 6:13] = 1, 2
        image = (100.0 + 60.0 * truth + generator.normal(0, 10, SHAPE)).astype(np.float32)
        part = "Tr" if number < 5 else "Ts"
        write_image(image, geometry, roots.raw / NAME / f"images{part}" / f"case_{number}_0000.nii.gz")
        write_labels(truth, geometry, roots.raw / NAME / f"labels{part}" / f"case_{number}.nii.gz")
    content = {
        "channel_names": {"0": "MRI"}, "labels": {"background": 0, "first": 1, "second": 2}, "numTraining": 5,
        "file_ending": ".nii.gz",
    }  # fmt: skip
    (roots.raw / NAME / "dataset.json").write_text(json.dumps(content))
    folder = plan_and_preprocess(7, roots, PlanOptions(memory_gb=2, batch_size=1, feature_size=12), workers=1).folder
    plans = json.loads((folder / "plans.json").read_text())
    for name, width in ((TINY, 4), (WIDE, 8), (BROKEN, 4)):
        plans["configurations"]["3d_fullres"]["networks"][name] = {
            "patch_size": [8, 8, 8], "batch_size": 1, "arguments": {"width": width}, "estimated_memory_gb": 0.1,
        }  # fmt: skip
    (folder / "plans.json").write_text(json.dumps(plans))
    (root / "tests_networks.py").write_text(CODE)
    return root


@pytest.fixture
def roots(prepared, monkeypatch):
    monkeypatch.syspath_prepend(prepared)
    # Most of the time of so small a run goes into its curves and its report, which other tests look at.
    monkeypatch.setattr(state, "write_plot", lambda *given: None)
    monkeypatch.setattr(validate_fold, "ReportOptions", lambda images: ReportOptions(write=False))
    return Roots.below(prepared)


@pytest.fixture
def make_study(roots, tmp_path):
    def make(networks=(TINY, WIDE), config=CONFIG, **more):
        return NetworkStudy(tmp_path / "study", roots, NAME, dict.fromkeys(networks, config), **more)

    return make


@pytest.fixture
def steps(monkeypatch):
    """Optimizer steps that are really done, by fold's folder."""
    done, real = [], trainer._train_step

    def step(run, *more):
        done.append(run.setup.folder)
        return real(run, *more)

    monkeypatch.setattr(trainer, "_train_step", step)
    return done


def _strict(path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_every_network_fold_and_seed_once_and_again_nothing(make_study, steps, tmp_path):
    study = make_study(folds=("0", "1"), seeds=(0, 3))
    finished, failed = run_networks(study, QUIET, launch=carry_out)
    assert failed == {}
    assert [(run.network, run.fold, run.seed) for run in finished] == [
        (network, fold, seed) for seed in (0, 3) for fold in ("0", "1") for network in (TINY, WIDE)
    ]
    assert len(steps) == 8 * 4
    assert len(set(steps)) == 8
    assert {json.loads((run.folder / "training.json").read_text())["seed"] for run in finished} == {0, 3}
    assert run_networks(study, QUIET, launch=carry_out) == (finished, {})
    assert len(steps) == 8 * 4

    results = collect_results(study, finished)
    assert list(results.table.columns) == list(COLUMNS)
    assert len(results.table) == 8
    found = results.of_network(WIDE)
    dice = [
        json.loads((run.folder / "validation" / "summary.json").read_text())["overall"]["dice"]["mean"]
        for run in finished if run.network == WIDE
    ]  # fmt: skip
    assert found["dice"] == pytest.approx(np.mean(dice))
    assert found["dice_sd"] == pytest.approx(np.std(dice, ddof=1))
    assert found["parameters"] == 8 * 27 + 8 + 16 + 8 * 3 + 3
    assert found["patch_size"] == "8x8x8"
    assert found["runs"] == 4
    assert 0 < found["training_seconds"] < 60
    assert found["peak_gb"] > 0.1
    classes = results.class_means()
    assert list(classes.index) == ["first", "second"]
    assert list(classes.columns) == [TINY, WIDE]
    assert classes[WIDE].mean() == pytest.approx(found["dice"], abs=1e-6)


def test_what_is_written(make_study, tmp_path):
    study = make_study(networks=(TINY,))
    finished, _ = run_networks(study, QUIET, launch=carry_out)
    results = collect_results(study, finished)
    results.write(tmp_path, {"other": "it failed."}, paper="btcv")
    with (tmp_path / "networks.csv").open(newline="") as file:
        assert [row["network"] for row in csv.DictReader(file)] == [TINY]
    content = _strict(tmp_path / "networks.json")
    assert content["steps"] == 4
    assert content["networks"][0]["dice_sd"] is None  # of one run
    assert content["failed"] == {"other": "it failed."}
    table = (tmp_path / "networks.md").read_text()
    assert "| system | source | Dice | HD mm |" in table
    assert "| UNETR | paper | 0.856 | - |" in table
    assert "other failed: it failed." in table
    write_report(tmp_path / "networks.html", results, {"other": "it failed"}, paper="btcv")
    page = (tmp_path / "networks.html").read_text()
    assert all(text in page for text in (TINY, "it failed", "Swin-BOB", "first", "Definitions"))
    axis = dice_figure(results).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [TINY]
    with pytest.raises(DatasetError, match="no run is finished"):
        collect_results(study, [])


def test_a_study_may_grow_but_not_change(make_study, roots, steps):
    run_networks(make_study(networks=(TINY,)), QUIET, launch=carry_out)
    finished, _ = run_networks(make_study(networks=(TINY, WIDE), seeds=(0, 1)), QUIET, launch=carry_out)
    assert len(finished) == 4
    assert len(steps) == 4 * 4
    longer = make_study(networks=(TINY,), config=TrainingConfig(**{**CONFIG.to_json(), "epochs": 5}))
    with pytest.raises(ConfigError, match=r"study with other settings \(epochs 2 -> 5\)"):
        run_networks(longer, QUIET, launch=carry_out)
    with pytest.raises(ConfigError, match="scored held-out cases -> "):
        run_networks(
            make_study(images=roots.raw / NAME / "imagesTs", references=roots.raw / NAME / "labelsTs"), QUIET,
            launch=carry_out,
        )  # fmt: skip


def test_an_interrupted_run_goes_on(make_study, steps, monkeypatch):
    study, real = make_study(networks=(TINY,)), trainer.save

    def stop(*given):
        real(*given)
        raise StoppedError("stopped by SIGTERM after an epoch; run it with --resume")

    monkeypatch.setattr(trainer, "save", stop)
    with pytest.raises(StoppedError, match=r"Tiny, fold 0, seed 0: stopped by SIGTERM .* same command again to go on"):
        run_networks(study, QUIET, launch=carry_out)
    assert not runs(study)[0].is_finished
    monkeypatch.setattr(trainer, "save", real)
    assert run_networks(study, QUIET, launch=carry_out)[0][0].is_finished
    assert len(steps) == 4  # none twice


def test_a_failure_keeps_the_others(make_study):
    study = make_study(networks=(BROKEN, TINY))
    finished, failed = run_networks(study, QUIET, launch=carry_out)
    assert [run.network for run in finished] == [TINY]
    assert failed == {f"{BROKEN}, fold 0, seed 0": "it does not like this image"}


def test_test_cases_are_scored_where_they_are_given(make_study, roots):
    given = {"images": roots.raw / NAME / "imagesTs", "references": roots.raw / NAME / "labelsTs"}
    study = make_study(networks=(TINY,), folds=("all",), **given)
    finished, _ = run_networks(study, QUIET, launch=carry_out)
    row = collect_results(study, finished).table.iloc[0]
    assert row["cases"] == 1
    assert (finished[0].folder / "test" / "case_5.nii.gz").is_file()
    assert math.isfinite(row["dice"])
    assert not (finished[0].folder / "validation").exists()


def test_parts_share_the_runs(make_study):
    study = make_study(seeds=(0, 1))
    both = [run_networks(study, QUIET, Part(number, 2), launch=carry_out)[0] for number in (1, 2)]
    assert sorted(run.name for part in both for run in part) == sorted(run.name for run in runs(study))
    assert len(both[0]) == len(both[1]) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"networks": ()}, "--networks needs at least one value"),
        ({"folds": ("0", "0")}, "--folds has a value twice: 0, 0"),
        ({"folds": ("all",)}, "fold all holds no case out"),
        ({"folds": ("9",)}, "fold must be 0..4 or 'all', got '9'"),
        ({"networks": ("u_net",)}, "the plans hold no network 'u_net' for 3d_fullres"),
        ({"images": "imagesTs"}, "-i and -r belong together"),
        ({"checkpoint": "latest"}, "--checkpoint must be best or final"),
        ({"configuration": "3d_lowres"}, "the plans hold no configuration '3d_lowres'"),
        ({"config": TrainingConfig(early_stopping=3)}, "early stopping would change it"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(make_study, steps, tmp_path, more, message):
    with pytest.raises(UkbobError, match=message):
        run_networks(make_study(**more), QUIET, launch=carry_out)
    assert steps == []


def test_one_budget_is_one_budget(roots, tmp_path):
    longer = TrainingConfig(**{**CONFIG.to_json(), "epochs": 5})
    with pytest.raises(ConfigError, match="same number of epochs"):
        NetworkStudy(tmp_path, roots, NAME, {TINY: CONFIG, WIDE: longer})


def test_requests_survive_the_way_to_another_process(make_study):
    study = make_study(images="i", references="r")
    request = runs(study)[0].request(RunOptions(device="cuda:1", compile=True))
    given = json.loads(json.dumps(request.to_json()))
    again = RunRequest.from_json(given)
    assert again.to_json() == request.to_json()
    assert (again.config, again.options, again.roots) == (request.config, request.options, request.roots)


def test_how_a_process_ended_is_said():
    assert "killed by signal 9, perhaps for lack of memory" in networks_run._ended(-9)
    assert "exit code 1" in networks_run._ended(1)


def test_the_command_in_processes_of_their_own(roots, tmp_path, capfd):
    given = [
        "networks", "-d", 7, "--networks", TINY, BROKEN, "-o", tmp_path / "out", "--epochs", 1,
        "--iterations-per-epoch", 1, "--device", "cpu", "--threads", 1, "--paper", "btcv", "--raw", roots.raw,
        "--preprocessed", roots.preprocessed,
    ]  # fmt: skip
    assert benchmark.main([str(word) for word in given]) == 2
    output, error = capfd.readouterr()
    assert "1 of the runs failed" in error
    assert "it does not like this image" in error
    assert [line.split()[:2] for line in output.splitlines() if line.startswith("tests_")] == [[TINY, "you"]]
    assert "UNETR" in output
    content = _strict(tmp_path / "out" / "networks.json")
    assert list(content["failed"]) == [f"{BROKEN}, fold 0, seed 0"]
    assert 0.1 < content["runs"][0]["peak_gb"] < 3
    assert (tmp_path / "out" / "networks.html").is_file()
    words = [str(word) for word in given]
    words[words.index(BROKEN)] = TINY
    assert benchmark.main(words) == 2
    assert "--networks has a name twice" in capfd.readouterr().err
