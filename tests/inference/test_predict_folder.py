"""Prediction of folders: folds, resuming, parts, interruption, what is written last, bad input."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threshold_network import DATASET, Adaptable, Identity, blobs, many_cases, model_folder, predictor_of, truth_of

from ukbob_seg.dataset.image_io import Geometry, read_image, read_labels, write_image, write_labels
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import CheckpointError, ConfigError, DatasetError
from ukbob_seg.inference import case_predictor
from ukbob_seg.inference.etta import EttaConfig
from ukbob_seg.inference.predict import find_jobs, predict
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.parallel import Part


def test_a_model_folder_predicts_a_folder_and_resumes(tmp_path):
    folder = model_folder(tmp_path)
    for i in range(3):
        write_image(blobs((20, 20, 20), i)[0], Geometry((20, 20, 20), (1, 1, 1)), tmp_path / f"in/c{i}_0000.nii.gz")
    with Predictor.from_model_folder(folder) as predictor:
        written = predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True, arguments={"folds": None})
        assert [path.name for path in written] == ["c0.nii.gz", "c1.nii.gz", "c2.nii.gz"]
        for i, path in enumerate(written):
            assert np.array_equal(read_labels(path)[0], truth_of(blobs((20, 20, 20), i)))
        assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == DATASET
        assert (tmp_path / "out" / "plans.json").is_file()
        record = json.loads((tmp_path / "out" / "predict_args.json").read_text())
        assert record["folds"] is None
        assert record["checkpoints"] == [str(folder / f"fold_{fold}" / "checkpoint_best.pt") for fold in "01"]
        assert record["settings"]["step"] == 0.5
        written[1].unlink()
        before = written[0].stat().st_mtime_ns
        predict(predictor, tmp_path / "in", tmp_path / "out", resume=True, quiet=True)
        assert written[1].is_file()
        assert written[0].stat().st_mtime_ns == before
        predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True)
        assert written[0].stat().st_mtime_ns > before


SIDE_FILES = ("probabilities.b2nd", "preview.png", "statistics.json")
EVERYTHING = PredictionSettings(save_probabilities=True, preview=True, statistics=True, step=1.0)


def _images(folder, count, spacing=(3.0, 1.0, 0.7)):
    for i in range(count):
        write_image(blobs((20, 20, 20), i)[0], Geometry((20, 20, 20), spacing), folder / f"c{i}_0000.nii.gz")


def test_parts_share_the_cases_and_one_output_folder(tmp_path):
    _images(tmp_path / "in", 5)
    predictor = predictor_of(PredictionSettings(step=1.0))
    out, note = tmp_path / "out", {"folds": None}
    expected = {1: ["c0", "c2", "c4"], 2: ["c1", "c3"]}
    kept = None
    for number in (2, 1):
        written = predict(predictor, tmp_path / "in", out, part=Part(number, 2), arguments=note, quiet=True)
        assert [path.name for path in written] == [f"{name}.nii.gz" for name in expected[number]]
        model = {name: (out / name).read_bytes() for name in ("dataset.json", "plans.json", "predict_args.json")}
        assert kept in (None, model)
        kept = model
    whole = predict(predictor, tmp_path / "in", tmp_path / "whole", arguments=note, quiet=True)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for path in whole:
        assert (out / path.name).read_bytes() == path.read_bytes()
    (out / "c1.nii.gz").unlink()
    (out / "c2.nii.gz").unlink()
    predict(predictor, tmp_path / "in", out, part=Part(2, 2), resume=True, quiet=True)
    assert (out / "c1.nii.gz").is_file()
    assert not (out / "c2.nii.gz").exists()  # of the other part
    assert predict(predictor, tmp_path / "in", out, part=Part(7, 9), quiet=True) == []  # more parts than cases


@pytest.mark.parametrize("stopped_by", ["write_labels", "case_statistics"])
def test_the_label_file_is_written_last_of_all(tmp_path, monkeypatch, stopped_by):
    _images(tmp_path / "in", 1)
    predictor, out = predictor_of(EVERYTHING), tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"ukbob_seg.inference.case_predictor.{stopped_by}", stop)
        with pytest.raises(KeyboardInterrupt):
            predict(predictor, tmp_path / "in", out, quiet=True)
    assert not (out / "c0.nii.gz").exists()
    assert all((out / f"c0_{name}").is_file() for name in SIDE_FILES) == (stopped_by == "write_labels")
    predict(predictor, tmp_path / "in", out, resume=True, quiet=True)
    names = {"c0.nii.gz", *(f"c0_{name}" for name in SIDE_FILES), "dataset.json", "plans.json", "predict_args.json"}
    assert {path.name for path in out.iterdir()} == names


def test_statistics_are_those_of_the_written_labels_and_the_file(tmp_path):
    _images(tmp_path / "in", 1)
    settings = PredictionSettings(step=1.0, statistics=True, classes=("high",))
    predict(predictor_of(settings), tmp_path / "in", tmp_path / "out", quiet=True)
    found = json.loads((tmp_path / "out" / "c0_statistics.json").read_text())
    image, labels = blobs((20, 20, 20), 0)[0], read_labels(tmp_path / "out" / "c0.nii.gz")[0]
    assert found["spacing_mm"] == pytest.approx([3, 1, 0.7])
    assert set(found["classes"]) == {"high"}
    high = found["classes"]["high"]
    assert high["voxels"] == (labels == 7).sum() > 0
    assert high["volume_ml"] == pytest.approx(high["voxels"] * 2.1e-3)
    assert high["mean"] == pytest.approx([image[labels == 7].mean()])


def test_the_next_case_is_read_while_the_networks_work(tmp_path, monkeypatch):
    """The first case waits inside the network until the second has been read; one at a time that would never happen."""
    many_cases(tmp_path / "in")
    read, second_is_read, waited = [], threading.Event(), []

    def noting(images):
        read.append(images[0].name)
        if len(read) == 2:
            second_is_read.set()
        return read_image(images)

    class Waiting(Identity):
        def forward(self, x):
            if not waited:
                waited.append(second_is_read.wait(20))
            return super().forward(x)

    monkeypatch.setattr(case_predictor, "read_image", noting)
    predictor = predictor_of(networks=[Waiting(1, 3).eval()])
    written = predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True)
    assert waited == [True]
    alone = predictor_of(PredictionSettings(overlap=False))
    expected = predict(alone, tmp_path / "in", tmp_path / "alone", quiet=True)
    assert [path.name for path in written] == [path.name for path in expected]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(written, expected, strict=True))


def test_an_interrupt_ends_adaptation_too(tmp_path):
    many_cases(tmp_path / "in", 3)
    passes = []

    class Endless(Identity):
        def forward(self, x):
            passes.append(1)
            if len(passes) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            return super().forward(x)

    settings = PredictionSettings(etta=EttaConfig.of_mode("paper", steps=50))
    with pytest.raises(KeyboardInterrupt):
        predict(predictor_of(settings, networks=[Endless(1, 3).eval()]), tmp_path / "in", tmp_path / "out", quiet=True)
    assert len(passes) < 6


def test_an_interrupt_ends_prediction_at_the_next_window(tmp_path, monkeypatch):
    many_cases(tmp_path / "in", 8)
    windows = []

    class Endless(Identity):
        def forward(self, x):
            windows.append(1)
            if len(windows) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            return super().forward(x)

    predictor = predictor_of(networks=[Endless(1, 3).eval()])
    with pytest.raises(KeyboardInterrupt):
        predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True)
    assert len(windows) < 6  # one in each case: those that were begun end, no other begins
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) < 6
    assert not list((tmp_path / "out").glob(".*"))


def test_an_interrupt_while_cases_are_handed_over_ends_those_that_were(tmp_path, monkeypatch):
    many_cases(tmp_path / "in", 8)
    windows, submit = [], ThreadPoolExecutor.submit

    class Slow(Identity):
        def forward(self, x):
            windows.append(1)
            time.sleep(0.2)
            return super().forward(x)

    def interrupted(pool, work, job):
        if job.name == "case_3":
            while not windows:
                time.sleep(0.01)
            raise KeyboardInterrupt
        return submit(pool, work, job)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(predictor_of(networks=[Slow(1, 3).eval()]), tmp_path / "in", tmp_path / "out", quiet=True)
    assert len(windows) < 4


WITH_ETTA = PredictionSettings(
    etta=EttaConfig(steps=2, learning_rate=0.03), save_probabilities=True, statistics=True, save_entropy=True
)
OUTPUTS = 5  # files of a case


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "predict_args.json"}


def test_etta_leaves_a_record_and_any_order_gives_the_same(tmp_path):
    folder = model_folder(tmp_path, ("0", "1"), "Adaptable")
    _images(tmp_path / "in", 3, (1.0, 1.0, 1.0))
    for number, name in enumerate(("z", "y", "x")):  # the same cases in the opposite order
        (tmp_path / "turned").mkdir(exist_ok=True)
        shutil.copy(tmp_path / f"in/c{number}_0000.nii.gz", tmp_path / f"turned/{name}_0000.nii.gz")
    with Predictor.from_model_folder(folder, settings=WITH_ETTA) as predictor:
        predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True)
        predict(predictor, tmp_path / "turned", tmp_path / "turned_out", quiet=True)
    with Predictor.from_model_folder(folder) as predictor:
        plain = predict(predictor, tmp_path / "in", tmp_path / "plain", quiet=True)
    for number, name in enumerate(("z", "y", "x")):
        first, second = tmp_path / f"out/c{number}", tmp_path / f"turned_out/{name}"
        for ending in (".nii.gz", "_etta.json", "_entropy.nii.gz", "_statistics.json", "_probabilities.b2nd"):
            assert first.with_name(first.name + ending).read_bytes() == (
                second.with_name(second.name + ending).read_bytes()
            ), ending
        assert (read_labels(plain[number])[0] != read_labels(first.with_name(f"c{number}.nii.gz"))[0]).any()
    records = json.loads((tmp_path / "out" / "c0_etta.json").read_text())["folds"]
    assert [record["adapted_parameters"] for record in records] == [12, 12]
    assert set(records[0]) >= {"decision", "entropy_before", "entropy_after", "voxels_changed", "steps"}


@pytest.mark.parametrize("overlap", [False, True])
def test_wherever_it_is_interrupted_resuming_gives_what_an_undisturbed_run_gives(tmp_path, overlap):
    """Interrupted before every pass of the networks in turn: adapting, predicting, in each of the cases."""
    _images(tmp_path / "in", 3, (1.0, 1.0, 1.0))
    network = Adaptable(1, 3).eval()
    predictor = predictor_of(dataclasses.replace(WITH_ETTA, overlap=overlap, step=1.0), networks=[network])
    passes, real = 0, network.forward

    def counted(x):
        nonlocal passes
        passes += 1
        if passes == stop_at:
            raise KeyboardInterrupt
        return real(x)

    network.forward, stop_at = counted, None
    predict(predictor, tmp_path / "in", tmp_path / "whole", quiet=True)
    expected, total = _contents(tmp_path / "whole"), passes
    assert len(expected) == 3 * OUTPUTS + 2
    for stop_at in (*range(1, total, 5), total):
        out, passes = tmp_path / f"out_{stop_at}", 0
        with pytest.raises(KeyboardInterrupt):
            predict(predictor, tmp_path / "in", out, quiet=True)
        found = _contents(out)
        finished = {name for name in found if name in ("c0.nii.gz", "c1.nii.gz", "c2.nii.gz")}
        assert len(finished) < 3
        for name in finished:  # complete, with all that lies beside it
            case = name.removesuffix(".nii.gz")
            assert {key: value for key, value in expected.items() if key.startswith(case)}.items() <= found.items()
        passes = total  # no more interruptions
        predict(predictor, tmp_path / "in", out, resume=True, quiet=True)
        assert _contents(out) == expected


def test_an_interrupted_second_run_is_not_resumed_with_the_firsts_cases(tmp_path):
    """Nor is anything of the first lost before there is something new."""
    _images(tmp_path / "in", 3, (1.0, 1.0, 1.0))
    out, plain = tmp_path / "out", predictor_of(networks=[Adaptable(1, 3).eval()])
    predict(predictor_of(WITH_ETTA, networks=[Adaptable(1, 3).eval()]), tmp_path / "in", out, quiet=True)
    first = _contents(out)
    expected = predict(plain, tmp_path / "in", tmp_path / "plain", quiet=True)
    (tmp_path / "in/c1_0000.nii.gz").rename(tmp_path / "c1_0000.nii.gz")
    (tmp_path / "in/c1_0000.nii.gz").write_bytes(b"broken")
    with pytest.raises(DatasetError, match="c1_0000"):
        predict(plain, tmp_path / "in", out, quiet=True)
    found = _contents(out)
    assert {name: found[name] for name in first if name.startswith("c1")}.items() <= first.items()
    assert found["c1.nii.gz"] == first["c1.nii.gz"]
    (tmp_path / "c1_0000.nii.gz").rename(tmp_path / "in/c1_0000.nii.gz")
    predict(plain, tmp_path / "in", out, resume=True, quiet=True)
    assert _contents(out) == _contents(tmp_path / "plain")  # no file of the first, no mark
    assert [path.name for path in expected] == ["c0.nii.gz", "c1.nii.gz", "c2.nii.gz"]


def test_a_part_that_begins_with_resume_replaces_what_another_part_made_stale(tmp_path):
    """Part 1 of a new run began without --resume; part 2 was lost and is started again with it."""
    _images(tmp_path / "in", 4, (1.0, 1.0, 1.0))
    old, new = (predictor_of(PredictionSettings(step=step), networks=[Adaptable(1, 3).eval()]) for step in (1.0, 0.3))
    predict(old, tmp_path / "in", tmp_path / "out", quiet=True)
    expected = predict(new, tmp_path / "in", tmp_path / "new", quiet=True)
    predict(new, tmp_path / "in", tmp_path / "out", part=Part(1, 2), quiet=True)
    predict(new, tmp_path / "in", tmp_path / "out", part=Part(2, 2), resume=True, quiet=True)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "new")
    assert (tmp_path / "out/predict_args.json").read_bytes() == (tmp_path / "new/predict_args.json").read_bytes()
    assert len(expected) == 4


@pytest.mark.parametrize("resume", [False, True])
def test_label_maps_of_others_are_not_replaced(tmp_path, resume):
    """Such as the reference, where -o was mistaken."""
    _images(tmp_path / "in", 2)
    write_labels(np.ones((20, 20, 20), np.uint8), Geometry((20, 20, 20), (1, 1, 1)), tmp_path / "out/c1.nii.gz")
    before = (tmp_path / "out/c1.nii.gz").read_bytes()
    with pytest.raises(ConfigError, match=r"out has c1\.nii\.gz \(1 such files\) but no predict_args\.json"):
        predict(predictor_of(), tmp_path / "in", tmp_path / "out", resume=resume, quiet=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"c1.nii.gz"}
    assert (tmp_path / "out/c1.nii.gz").read_bytes() == before


def test_a_folder_holds_predictions_of_one_way(tmp_path):
    _images(tmp_path / "in", 2)
    out = tmp_path / "out"
    plain, other = predictor_of(), predictor_of(PredictionSettings(step=0.7, window_batch=2))
    written = predict(plain, tmp_path / "in", out, quiet=True)
    written[1].unlink()
    before = _contents(out)
    with pytest.raises(
        ConfigError, match=r"--resume: .*predict_args\.json has other settings .*\(step 0\.5, now 0\.7\)"
    ):
        predict(other, tmp_path / "in", out, resume=True, quiet=True)
    with pytest.raises(ConfigError, match=r"other settings .* and .*out holds c0\.nii\.gz, which is not predicted now"):
        predict(other, tmp_path / "in" / "c1_0000.nii.gz", out, quiet=True)
    assert _contents(out) == before
    predict(
        predictor_of(PredictionSettings(window_batch=2, overlap=False)), tmp_path / "in", out, resume=True, quiet=True
    )
    assert written[1].is_file()
    predict(other, tmp_path / "in", out, quiet=True)  # anew
    assert json.loads((out / "predict_args.json").read_text())["settings"]["step"] == 0.7
    assert not list(out.glob(".*"))
    folder = model_folder(tmp_path)
    for folds, fails in ((["0"], False), (["1"], True)):
        with Predictor.from_model_folder(folder, folds) as predictor:
            if fails:
                with pytest.raises(ConfigError, match=r"has other checkpoints than this run .*fold_1"):
                    predict(predictor, tmp_path / "in", tmp_path / "folds", resume=True, quiet=True)
            else:
                predict(predictor, tmp_path / "in", tmp_path / "folds", quiet=True)


def test_folds_that_are_not_there(tmp_path):
    folder = model_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint_best\.pt for fold 3 \(trained: 0, 1\)"):
        Predictor.from_model_folder(folder, ["0", "3"])
    with pytest.raises(ConfigError, match="fold 0 is given twice"):
        Predictor.from_model_folder(folder, ["0", "1", "0"])
    with pytest.raises(CheckpointError, match=r"no checkpoint_final\.pt for fold any \(trained: none\)"):
        Predictor.from_model_folder(folder, checkpoint="final")
    with pytest.raises(CheckpointError, match=r"nothing does not exist; train it first.*there is no model in"):
        Predictor.from_model_folder(folder / "nothing")
    with pytest.raises(CheckpointError, match=f"does not exist; .*has {folder.name}"):
        Predictor.from_model_folder(folder.with_name("2d__identity"))
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        Predictor.from_model_folder(folder / "fold_0" / "checkpoint_best.pt")
    with pytest.raises(CheckpointError, match=f"is a fold of a model: give -m {folder} with -f 1"):
        Predictor.from_model_folder(folder / "fold_1")
    (folder / "fold_1" / "checkpoint_best.pt").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="damaged"):
        Predictor.from_model_folder(folder)


def test_a_model_folders_postprocessing_is_done_unless_declined(tmp_path, caplog):
    folder = model_folder(tmp_path)
    (folder / "postprocessing.json").write_text(json.dumps({"largest_component": ["high"]}))
    image = np.zeros((1, 24, 24, 24), np.float32)
    image[0, 2:8, 2:8, 2:8] = 2.0
    image[0, 20:22, 20:22, 20:22] = 2.0
    geometry = Geometry((24, 24, 24), (1, 1, 1))
    with caplog.at_level("INFO", logger="ukbob_seg"), Predictor.from_model_folder(folder) as predictor:
        assert (predictor.predict_array(image, geometry).labels == 7).sum() == 6**3
    assert "stray pieces are removed of high (postprocessing.json)" in caplog.text
    with Predictor.from_model_folder(folder, settings=PredictionSettings(postprocessing=False)) as predictor:
        assert (predictor.predict_array(image, geometry).labels == 7).sum() == 6**3 + 2**3
    for names, voxels in ((("high",), 6**3), (("low",), 0)):
        with Predictor.from_model_folder(folder, settings=PredictionSettings(classes=names)) as predictor:
            assert (predictor.predict_array(image, geometry).labels == 7).sum() == voxels


def test_finding_jobs(tmp_path, caplog):
    spec = DatasetSpec.from_json({**DATASET, "channel_names": {"0": "fat", "1": "water"}}, "Dataset001_X")
    for name in ("a_0000", "a_0001", "b_0000"):
        write_image(np.ones((2, 2, 2), np.float32), Geometry((2, 2, 2), (1, 1, 1)), tmp_path / f"in/{name}.nii.gz")
    with pytest.raises(DatasetError, match=r"case b: missing channel b_0001\.nii\.gz"):
        find_jobs(tmp_path / "in", tmp_path / "out", spec)
    (job,) = find_jobs(tmp_path / "in" / "a_0000.nii.gz", tmp_path / "out.nii.gz", spec)
    assert [path.name for path in job.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert job.output == tmp_path / "out.nii.gz"
    with pytest.raises(DatasetError, match=r"out\.png ends like a file .* ends in \.mha, \.nii, \.nii\.gz, \.nrrd"):
        find_jobs(tmp_path / "in" / "a_0000.nii.gz", tmp_path / "out.png", spec)
    with pytest.raises(DatasetError, match="takes 2 channels; missing"):
        find_jobs(tmp_path / "in" / "b_0000.nii.gz", tmp_path / "out", spec)
    with pytest.raises(DatasetError, match="does not exist"):
        find_jobs(tmp_path / "none", tmp_path / "out", spec)
    with pytest.raises(DatasetError, match=r"out\.nii\.gz is named like a file, but the input .* is a folder of cases"):
        find_jobs(tmp_path / "in", tmp_path / "out.nii.gz", spec)
    write_image(np.ones((2, 2, 2), np.float32), Geometry((2, 2, 2), (1, 1, 1)), tmp_path / "in/b_0001.nii.gz")
    write_image(np.ones((2, 2, 2), np.float32), Geometry((2, 2, 2), (1, 1, 1)), tmp_path / "in/c_0000.nii")
    assert [job.name for job in find_jobs(tmp_path / "in", tmp_path / "out", spec)] == ["a", "b"]
    assert "left out, as the model takes files that end in .nii.gz: c_0000.nii" in caplog.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no cases in"):
        find_jobs(tmp_path / "empty", tmp_path / "out", spec)
