"""The best model wins, ensembles never see what they predict, and the printed command works."""

import itertools
import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from shifted_models import (
    FOLDS,
    NAME,
    folder_name,
    image_of,
    make_dataset,
    make_model,
    probabilities,
)

from ukbob_seg import find_best
from ukbob_seg.cli import find_best as command
from ukbob_seg.cli import predict as predict_command
from ukbob_seg.dataset.image_io import read_labels, write_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.errors import CheckpointError, ConfigError, DatasetError
from ukbob_seg.evaluation import ensemble_validation
from ukbob_seg.evaluation.ensemble_validation import in_groups
from ukbob_seg.evaluation.model_selection import Candidate, Ranked, SelectionOptions, rank
from ukbob_seg.evaluation.summary import OverallMean
from ukbob_seg.evaluation.validate_fold import validate_fold
from ukbob_seg.files import read_json
from ukbob_seg.inference.postprocessing import keep_largest
from ukbob_seg.inference.predictor import Predictor

A, B = folder_name("3d_fullres", "a"), folder_name("2d", "b")
SHIFTS_A, SHIFTS_B = {"0": 0.5, "1": -0.4}, {"0": -0.3, "1": 0.55}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two models whose errors have opposite signs in each fold, so that their average is better than both."""
    root = tmp_path_factory.mktemp("trained")
    roots = make_dataset(root)
    make_model(roots, "3d_fullres", "a", SHIFTS_A)
    make_model(roots, "2d", "b", SHIFTS_B)
    return root


@pytest.fixture
def roots(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "it is here")
    return Roots.below(tmp_path / "it is here")


@pytest.fixture
def counted(monkeypatch):
    """Names of the label files that are predicted."""
    calls, real = [], ensemble_validation.predict_jobs

    def predict_jobs(predictor, jobs):
        calls.extend(job.output.name for job in jobs.values())
        return real(predictor, jobs)

    monkeypatch.setattr(ensemble_validation, "predict_jobs", predict_jobs)
    return calls


def _flags(roots):
    return ["--raw", str(roots.raw), "--preprocessed", str(roots.preprocessed), "--results", str(roots.results)]


def _average(number, *shifts):
    mean = sum(probabilities(image_of(number), shift) for shift in shifts)
    return np.array([0, 2, 7])[mean.argmax(0)]


def _ensemble(roots):
    return roots.results / NAME / "ensembles" / f"{B}---{A}"


def _expected(roots):
    """Every case of the ensemble is the average of its own fold's two networks, computed by hand."""
    for fold, names in FOLDS.items():
        for name in names:
            found, _ = read_labels(_ensemble(roots) / f"fold_{fold}" / "validation" / f"{name}.nii.gz")
            number, other = int(name[-1]), "1" if fold == "0" else "0"
            assert (found == _average(number, SHIFTS_A[fold], SHIFTS_B[fold])).mean() > 0.999  # float32
            for wrong in ((SHIFTS_A[other], SHIFTS_B[other]), (*SHIFTS_A.values(), *SHIFTS_B.values())):
                assert (found == _average(number, *wrong)).mean() < 0.98


def test_an_ensemble_predicts_with_networks_that_have_not_seen_the_case(roots):
    selection = find_best(5, roots, workers=1)
    _expected(roots)
    assert selection.winner.name == f"{B}---{A}"
    scores = {ranked.candidate.name: ranked.score for ranked in selection.ranking}
    assert len(scores) == 3
    assert scores[f"{B}---{A}"].mean > max(scores[A].mean, scores[B].mean) + 0.05
    for ranked in selection.ranking:
        folder = ranked.candidate.folder / "crossval_results_folds_0_1"
        assert read_json(folder / "summary.json")["overall"]["dice"]["mean"] == pytest.approx(ranked.score.mean)
    content = read_json(roots.results / NAME / "best_model.json")
    assert content["winner"] == f"{B}---{A}"
    assert (content["metric"], content["folds"], content["cases"]) == ("dice", ["0", "1"], 4)
    assert [entry["name"] for entry in content["ranking"]] == list(scores)
    assert content["postprocessing"]["file"] == str(_ensemble(roots) / "postprocessing.json")
    assert content["commands"] == list(selection.commands)


def test_a_better_model_wins_and_ties_go_to_the_simpler(roots):
    perfect = make_model(roots, "3d_lowres", "a", {"0": 0.0, "1": 0.0})
    selection = find_best(NAME, roots, SelectionOptions(ensemble_size=3), workers=1)
    assert len(selection.ranking) == 7
    assert selection.winner.models == (perfect,)
    assert selection.ranking[0].score.mean == 1.0
    make_model(roots, "3d_cascade_fullres", "a", {"0": 0.0, "1": 0.0})
    selection = find_best(NAME, roots, SelectionOptions(networks=("shifted_models:Shifted",)), workers=1)
    best = [ranked.candidate for ranked in selection.ranking if ranked.score.mean == 1.0]
    assert [(len(candidate.models), candidate.stages) for candidate in best] == [(1, 1), (1, 2), (2, 3), (2, 3)]
    assert best[0].folder == perfect


def test_the_first_stage_of_a_cascade_is_of_the_same_fold(roots):
    shifts = {"0": 0.2, "1": -0.25}
    make_model(roots, "3d_lowres", "a", shifts)
    make_model(roots, "3d_cascade_fullres", "a", {"0": 0.0, "1": 0.0})
    options = SelectionOptions(configurations=("3d_cascade_fullres", "2d"))
    find_best(5, roots, options, workers=1)
    folder = roots.results / NAME / "ensembles" / f"{B}---{folder_name('3d_cascade_fullres', 'a')}"
    for fold, names in FOLDS.items():
        for name in names:
            found, _ = read_labels(folder / f"fold_{fold}" / "validation" / f"{name}.nii.gz")
            # The second stage is sure of what the first one says, so that it decides alone.
            assert (found == _average(int(name[-1]), shifts[fold])).mean() > 0.999
    record = read_json(folder / "fold_1" / "validation" / "predict_args.json")
    low = folder_name("3d_lowres", "a")
    assert f"{low}/fold_1/checkpoint_best.pt" in record["checkpoints"]
    assert len(record["checkpoints"]) == 3


def test_goes_on_where_it_stopped_but_not_with_other_checkpoints(roots, counted, monkeypatch):
    find_best(5, roots, workers=1)
    assert sorted(counted) == [f"level_{number}.nii.gz" for number in range(4)]
    counted.clear()
    first = _ensemble(roots) / "fold_0" / "validation" / "level_2.nii.gz"
    first.unlink()
    find_best(5, roots, workers=1)
    assert counted == ["level_2.nii.gz"]
    counted.clear()
    monkeypatch.setitem(SHIFTS_A, "1", -0.1)
    make_model(roots, "3d_fullres", "a", {"1": -0.1})  # trained again
    counted.clear()
    real, before = ensemble_validation.predict_jobs, first.parents[2] / "fold_1" / "validation" / "level_3.nii.gz"

    def interrupted(predictor, jobs):
        if any(job.output == before for job in jobs.values()):
            raise KeyboardInterrupt
        return real(predictor, jobs)

    with monkeypatch.context() as patch:
        patch.setattr(ensemble_validation, "predict_jobs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            find_best(5, roots, workers=1)
    assert before.is_file()  # of the earlier network, and marked as such
    assert counted == ["level_1.nii.gz"]
    counted.clear()
    find_best(5, roots, workers=1)
    assert counted == ["level_3.nii.gz"]
    _expected(roots)


def test_other_splits_leave_no_cases_of_the_old_ones(roots):
    find_best(5, roots, workers=1)
    path = next(roots.preprocessed.rglob("splits.json"))
    splits = read_json(path)
    path.write_text(json.dumps([{"train": s["val"], "val": s["train"]} for s in splits]))
    for model in (A, B):
        for fold in ("0", "1"):
            one = roots.results / NAME / model / f"fold_{fold}"
            shutil.rmtree(one / "validation")
            validate_fold(roots.results / NAME / model, fold, roots)
    assert find_best(5, roots, workers=1).ranking
    found = sorted(path.name for path in _ensemble(roots).glob("fold_0/validation/*.nii.gz"))
    assert found == [f"{name}.nii.gz" for name in sorted(splits[0]["train"])]


@pytest.mark.parametrize(("at_once", "runs"), [(2, 12), (3, 8), (4, 4)])
def test_a_model_runs_once_for_all_ensembles_made_together(roots, monkeypatch, at_once, runs):
    """Four models, six pairs: by twos every pair runs both of its models."""
    for letter, shift in (("a", 0.15), ("b", -0.2)):
        make_model(roots, "3d_lowres", letter, {"0": shift, "1": shift})
    calls, real = [], Predictor.stream

    def stream(self, image, geometry, progress=None):
        calls.append(self)
        return real(self, image, geometry, progress)

    monkeypatch.setattr(Predictor, "stream", stream)
    selection = find_best(5, roots, SelectionOptions(models_at_once=at_once), workers=1)
    assert len(selection.ranking) == 10
    assert len(calls) == runs * 4  # cases
    _expected(roots)
    calls.clear()
    find_best(5, roots, SelectionOptions(models_at_once=at_once, metric="hd95"), workers=1)
    assert calls == []


def test_groups_have_every_ensemble_once_and_few_models():
    models = [Path(letter) for letter in "abcdef"]
    ensembles = [*itertools.combinations(models, 2), *itertools.combinations(models, 3)]
    for most in (2, 3, 4, 6):
        groups = in_groups(ensembles, most)
        assert sorted(ensemble for group in groups for ensemble in group) == sorted(ensembles)
        for group in groups:
            assert len({model for ensemble in group for model in ensemble}) <= max(most, 3 if len(group) == 1 else 0)
    assert len(in_groups(ensembles, 6)) == 1


def test_the_printed_command_predicts_with_an_ensemble(roots, capsys):
    """Paths have spaces here. Truly 'high' is one piece, so that the winner's postprocessing is to keep the largest."""
    for path in (roots.raw / NAME / "labelsTr").iterdir():
        truth, geometry = read_labels(path)
        write_labels(keep_largest(truth, [7]), geometry, path)
    assert command.main(["-d", "5", "--workers", "1", *_flags(roots)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[2].split()[-3:] == [B, "+", A]
    decision = _ensemble(roots) / "postprocessing.json"
    assert f"largest component alone: high -> {decision}" in out
    assert read_json(decision)["largest_component"] == ["high"]
    words = shlex.split(out.splitlines()[-1])
    assert words[0] == "ukbob_predict"
    assert words.count("-m") == 2
    assert words[-5:] == ["-f", "0", "1", "--postprocessing", str(decision)]
    assert predict_command.main([*words[1:], "--device", "cpu"]) == 0
    removed = 0
    for number in (4, 5):
        found, _ = read_labels(roots.results / NAME / "predictions_best" / f"level_{number}.nii.gz")
        # Logits of folds are averaged, which grow linearly with the shift.
        plain = _average(number, np.mean([*SHIFTS_A.values()]), np.mean([*SHIFTS_B.values()]))
        assert (found == keep_largest(plain, [7])).mean() > 0.999
        removed += ((plain == 7) & (found == 0)).sum()
    assert removed > 20
    assert predict_command.main([*words[1:], "--no-postprocessing", "--device", "cpu"]) == 2
    assert predict_command.main([*words[1:-2], "--resume", "--device", "cpu"]) == 2  # without it, into the same folder
    assert "largest_component" in capsys.readouterr().err


def test_the_printed_command_predicts_with_a_single_model(roots, capsys):
    make_model(roots, "3d_lowres", "a", {"0": 0.0, "1": 0.0})
    assert command.main(["-d", "5", "-c", "3d_lowres", "2d", "--workers", "1", *_flags(roots)]) == 0
    out = capsys.readouterr().out
    assert "dice of folds 0, 1 (higher is better)" in out
    assert out.splitlines()[2].split() == ["1", "1.0000", "-", "8", folder_name("3d_lowres", "a")]
    words = shlex.split(out.splitlines()[-1])
    assert predict_command.main([*words[1:], "--device", "cpu"]) == 0
    for number in (4, 5):
        found, _ = read_labels(roots.results / NAME / "predictions_best" / f"level_{number}.nii.gz")
        assert (found == _average(number, 0.0)).mean() > 0.999


def test_models_that_cannot_be_compared_are_named(roots, capsys):
    shutil.rmtree(roots.results / NAME / B / "fold_1")
    assert command.main(["-d", "5", "--workers", "1", *_flags(roots)]) == 0
    out = capsys.readouterr().out
    assert f"{B} has no complete validation of fold 1" in out
    assert "-c 2d --network shifted_models:" in out
    assert not (roots.results / NAME / "ensembles").exists()
    assert B in read_json(roots.results / NAME / "best_model.json")["skipped"]
    assert len(find_best(5, roots, SelectionOptions(folds=("0",)), workers=1).ranking) == 3


def test_errors(roots, capsys):
    def fails(*more):
        assert command.main(["-d", "5", *_flags(roots), *more]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "--metric must be one of dice, iou" in fails("--metric", "beauty")
    assert "exclude each other" in fails("--no-ensembles", "--ensemble-size", "3")
    assert "--ensemble-size must be at least 1" in fails("--ensemble-size", "0")
    assert "--models-at-once must be at least 2" in fails("--models-at-once", "1")
    assert "--models-at-once and --no-ensembles exclude" in fails("--no-ensembles", "--models-at-once", "3")
    assert "--tolerance-mm must be zero or positive" in fails("--tolerance-mm", "-1")
    assert "fold must be 0..1" in fails("-f", "7")
    assert "fold all holds no case out" in fails("-f", "all")
    assert f"no model of configuration 3d_huge in {roots.results / NAME} (found: 2d, 3d_" in fails("-c", "3d_huge")
    assert "no model of network none" in fails("--network", "none")
    (roots.results / NAME / A / "fold_1" / "checkpoint_best.pt").unlink()
    assert "checkpoint_best.pt does not exist: an ensemble predicts" in fails()
    with pytest.raises(CheckpointError):
        find_best(5, roots)
    assert find_best(5, roots, SelectionOptions(ensemble_size=1), workers=1).ranking  # nothing is predicted
    for name in (A, B):
        shutil.rmtree(roots.results / NAME / name / "fold_0" / "validation")
    with pytest.raises(DatasetError, match=r"no model in .* can be compared on folds 0, 1: .* has no complete"):
        find_best(5, roots)
    with pytest.raises(ConfigError, match="no dataset '9'"):
        find_best("9", roots)


def _ranked(name, mean, infinite=0, models=1, stages=1):
    folders = tuple(Path(f"{name}{number}") for number in range(models))
    return Ranked(Candidate(folders, Path(name), stages), OverallMean(mean, 2, 8, infinite))


@pytest.mark.parametrize(
    ("entries", "lower", "order"),
    [
        ([("a", 0.8), ("b", 0.9), ("c", math.nan)], False, "bac"),
        ([("a", 3.0), ("b", 2.0), ("c", math.nan)], True, "bac"),
        ([("misses", 1.0, 2), ("finds", 5.0, 0), ("often", 0.5, 3)], True, ["finds", "misses", "often"]),
        ([("a", 0.9, 0, 2, 2), ("b", 0.9 - 1e-9, 0, 1, 2), ("c", 0.9, 0, 1, 1)], False, "cba"),
    ],
)
def test_ranking(entries, lower, order):
    found = rank([_ranked(*entry) for entry in entries], lower)
    assert [ranked.candidate.name for ranked in found] == list(order)


def test_a_model_that_misses_an_organ_has_no_short_distances(roots):
    """Without its errors its mean distance is 0; yet it comes last."""
    model = make_model(roots, "3d_lowres", "a", {"0": 0.0, "1": 0.0})
    path = model / "fold_0" / "validation" / "level_0.nii.gz"
    labels, geometry = read_labels(path)
    write_labels(np.where(labels == 7, 0, labels), geometry, path)
    selection = find_best(5, roots, SelectionOptions(metric="hd95", ensemble_size=1), workers=1)
    last = selection.ranking[-1]
    assert last.candidate.models == (model,)
    assert last.score.n_infinite == 1
    assert last.score.mean < selection.ranking[0].score.mean
    assert json.loads(selection.file.read_text())["lower_is_better"] is True


def test_regions_have_no_postprocessing(roots, capsys):
    regions = {"labels": {"background": 0, "whole": [2, 7], "core": [7]}, "regions_class_order": [2, 7]}
    for folder in (roots.raw / NAME, roots.results / NAME / A, roots.results / NAME / B):
        path = folder / "dataset.json"
        path.write_text(json.dumps({**read_json(path), **regions}))
    assert command.main(["-d", "5", "--no-ensembles", "--workers", "1", *_flags(roots)]) == 0
    assert "largest component alone: not for regions" in capsys.readouterr().out
    content = read_json(roots.results / NAME / "best_model.json")
    assert content["postprocessing"] is None
    assert len(content["ranking"]) == 2
    assert not list((roots.results / NAME).glob("*/postprocessing.json"))


def test_a_file_of_postprocessing_stands_for_the_models_own(roots, tmp_path, capsys):
    model, file = roots.results / NAME / A, tmp_path / "mine.json"
    (model / "postprocessing.json").write_text(json.dumps({"largest_component": ["low", "high"]}))
    flags = ["-i", str(roots.raw / NAME / "imagesTs"), "-m", str(model), "-f", "0", "--device", "cpu"]
    for names in (["high"], []):
        file.write_text(json.dumps({"largest_component": names}))
        output = tmp_path / f"{len(names)}"
        assert predict_command.main([*flags, "-o", str(output), "--postprocessing", str(file)]) == 0
        for number in (4, 5):
            found, _ = read_labels(output / f"level_{number}.nii.gz")
            plain = _average(number, SHIFTS_A["0"])
            assert (found == (keep_largest(plain, [7]) if names else plain)).mean() > 0.999
    for wrong, says in (
        ("{}", "no list 'largest_component'"),
        ('{"largest_component": ["kidney"]}', "class names (low"),
    ):
        file.write_text(wrong)
        assert predict_command.main([*flags, "-o", str(tmp_path / "no"), "--postprocessing", str(file)]) == 2
        assert says in capsys.readouterr().err
    file.unlink()
    assert predict_command.main([*flags, "-o", str(tmp_path / "no"), "--postprocessing", str(file)]) == 2
