"""ukbob_label: from a cohort's images to a raw dataset that the label filter takes."""

import csv
import json
import os

import numpy as np
import pytest
from cohorts import CHANNELS, GEOMETRY, make_cohort
from cohorts import label as run
from nnunet_models import Tiny, write_model

from ukbob_seg.benchmark.totalvibe import TOTALVIBE_LABELS
from ukbob_seg.cli.filter import main as filter_main
from ukbob_seg.dataset.image_io import Geometry, read_image, read_labels, write_image
from ukbob_seg.dataset.spec import DatasetSpec, require_cases
from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.predictor import Predictor
from ukbob_seg.labelling import label as module
from ukbob_seg.labelling.fusion import fuse
from ukbob_seg.labelling.label import label_cohort
from ukbob_seg.labelling.options import LabelOptions
from ukbob_seg.labelling.outputs import label_names
from ukbob_seg.parallel import Cluster, Part

pytest.importorskip("dynamic_network_architectures", reason="pip install --no-deps dynamic-network-architectures")
VIBE = {"background": 0, **{str(value): value for value in TOTALVIBE_LABELS.values()}}


def test_a_dataset_ready_for_the_filter(tmp_path, capsys):
    model = write_model(Tiny(), tmp_path / "results")
    cohort = make_cohort(tmp_path / "cohort")
    output = tmp_path / "raw" / "Dataset072_Cohort"
    assert run("--model", model, "--input", cohort, "--output", output, "--channel", "water") == 0
    spec = DatasetSpec.load(output)
    assert spec.channel_names == CHANNELS
    assert spec.labels.names == ("first", "second")
    cases = require_cases(output, spec)
    assert [case.name for case in cases] == ["s0", "s1", "s2"]
    assert spec.content["numTraining"] == 3
    link = output / "imagesTr" / "s1_0001.nii.gz"
    assert link.is_symlink()
    assert link.resolve() == cohort / "imagesTr" / "s1_0001.nii.gz"
    image, geometry = read_image([link])
    with Predictor.from_model_folder(model) as predictor:
        expected = predictor.predict_array(image, geometry).labels
    labels, grid = read_labels(output / "labelsTr" / "s1.nii.gz")
    assert np.array_equal(labels, expected)
    assert geometry.difference(grid, ("image", "labels")) is None
    assert sorted(path.name for path in (output / "labelsTr").iterdir()) == ["s0.nii.gz", "s1.nii.gz", "s2.nii.gz"]
    rows = list(csv.DictReader((output / "labelling.csv").open()))
    assert [row["case"] for row in rows] == ["s0", "s1", "s2"]
    assert {row["orientation"] for row in rows} == {"LPS"}
    roots = ["--raw", str(tmp_path / "raw"), "--preprocessed", str(tmp_path / "preprocessed")]
    assert filter_main(["-d", "72", *roots, "--workers", "1"]) == 0


@pytest.mark.parametrize(("chosen", "channels"), [((), ("MRI",)), (("--channel", "1"), ("channel_0", "MRI"))])
def test_channels_that_nobody_named_are_called_as_in_the_model(chosen, channels, tmp_path):
    model = write_model(Tiny(), tmp_path / "results")
    name = json.loads((model / "dataset.json").read_text())["channel_names"]["0"]
    cohort = make_cohort(tmp_path / "cohort", cases=1, channels=len(channels), described=False)
    output = tmp_path / "Dataset072_Cohort"
    for _ in range(2):  # the second time it goes on
        assert run("--model", model, "--input", cohort, "--output", output, *chosen) == 0
        assert DatasetSpec.load(output).channel_names == tuple(name if each == "MRI" else each for each in channels)


def test_a_number_that_another_dataset_has_is_refused_before_anything_is_predicted(tmp_path, capsys, caplog):
    model, cohort = write_model(Tiny(), tmp_path / "results"), make_cohort(tmp_path / "cohort", channels=1)
    (tmp_path / "raw" / "Dataset072_Other").mkdir(parents=True)
    (tmp_path / "raw" / "Dataset072_Other" / "dataset.json").write_text("{}")
    output = tmp_path / "raw" / "Dataset072_Cohort"
    assert run("--model", model, "--input", cohort, "--output", output) == 2
    assert "number 72 belongs to " in capsys.readouterr().err
    assert not output.exists()
    assert run("--model", model, "--input", cohort, "--output", tmp_path / "raw" / "labelled") == 0
    assert "labelled is not named DatasetXXX_Name" in caplog.text


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    model, cohort = write_model(Tiny(), tmp_path / "results"), make_cohort(tmp_path / "cohort", channels=1)
    output = tmp_path / "Dataset001_X"
    options = LabelOptions(model, quiet=True)
    done: list[str] = []
    real = module.Labeller.label

    def failing(self, case, progress=None):
        if case.name == "s1" and not done:
            raise ConfigError("stopped")
        return real(self, case, progress)

    monkeypatch.setattr(module.Labeller, "label", failing)
    with pytest.raises(ConfigError, match="stopped"):
        label_cohort(cohort, output, options)
    assert not (output / "labelsTr" / "s1.nii.gz").exists()
    (output / "labelsTr").mkdir(exist_ok=True)
    before = {path.name: path.stat().st_mtime_ns for path in (output / "labelsTr").iterdir()}
    done.append("go on")
    label_cohort(cohort, output, options)
    after = {path.name: path.stat().st_mtime_ns for path in (output / "labelsTr").iterdir()}
    assert len(after) == 3
    assert all(after[name] == time for name, time in before.items())


def test_labels_made_otherwise_are_not_mixed(tmp_path, capsys):
    model, cohort = write_model(Tiny(), tmp_path / "results"), make_cohort(tmp_path / "cohort", cases=1, channels=1)
    output = tmp_path / "Dataset001_X"
    command = ["--model", model, "--input", cohort, "--output", output]
    assert run(*command) == 0
    before, _ = read_labels(output / "labelsTr" / "s0.nii.gz")
    assert run(*command, "--tta") == 2
    assert "labels made otherwise (other settings: tta False, now True)" in capsys.readouterr().err
    assert np.array_equal(read_labels(output / "labelsTr" / "s0.nii.gz")[0], before)
    assert run(*command, "--tta", "--overwrite", "--part", "1/2") == 2
    assert "could remove each other's labels" in capsys.readouterr().err
    assert np.array_equal(read_labels(output / "labelsTr" / "s0.nii.gz")[0], before)
    assert run(*command, "--tta", "--overwrite") == 0
    assert not np.array_equal(read_labels(output / "labelsTr" / "s0.nii.gz")[0], before)


def test_foreign_labels_are_not_replaced(tmp_path, capsys):
    model, cohort = write_model(Tiny(), tmp_path / "results"), make_cohort(tmp_path / "cohort", cases=1, channels=1)
    label = tmp_path / "Dataset001_X" / "labelsTr" / "s0.nii.gz"
    label.parent.mkdir(parents=True)
    label.write_bytes(b"by hand")
    assert run("--model", model, "--input", cohort, "--output", label.parents[1]) == 2
    assert label.read_bytes() == b"by hand"
    assert run("--model", model, "--input", cohort, "--output", cohort) == 2
    assert "is the cohort itself" in capsys.readouterr().err


def test_parts_and_worker_processes_make_the_same_dataset(tmp_path):
    model, cohort = write_model(Tiny(), tmp_path / "results"), make_cohort(tmp_path / "cohort", channels=1)
    whole, parts, workers = (tmp_path / f"Dataset00{k}_X" for k in (1, 2, 3))
    label_cohort(cohort, whole, LabelOptions(model, quiet=True))
    for number in (1, 2):
        cluster = Cluster(part=Part(number, 2))
        label_cohort(cohort, parts, LabelOptions(model, quiet=True, cluster=cluster))
        assert len(list((parts / "labelsTr").iterdir())) == (2 if number == 1 else 3)
    label_cohort(cohort, workers, LabelOptions(model, quiet=True, workers=2))
    for name in ("s0", "s1", "s2"):
        expected, _ = read_labels(whole / "labelsTr" / f"{name}.nii.gz")
        for other in (parts, workers):
            assert np.array_equal(read_labels(other / "labelsTr" / f"{name}.nii.gz")[0], expected)


def test_a_process_per_device(tmp_path):
    """Two names of one device stand for two GPUs."""
    model, cohort = write_model(Tiny(), tmp_path / "results"), make_cohort(tmp_path / "cohort", channels=1)
    output = tmp_path / "Dataset001_X"
    label_cohort(cohort, output, LabelOptions(model, quiet=True, devices=("cpu", "cpu:0")))
    assert len(list((output / "labelsTr").iterdir())) == 3


def test_copies_on_request_and_names_of_channels(tmp_path):
    model = write_model(Tiny(schemes=("ZScoreNormalization",) * 2, masked=(False, True)), tmp_path / "results")
    cohort = make_cohort(tmp_path / "cohort", cases=1, channels=2, described=False)
    output = tmp_path / "Dataset001_X"
    command = ["--model", model, "--input", cohort / "imagesTr", "--output", output, "--copy"]
    assert run(*command, "--channel-names", "T1", "T2") == 0
    assert DatasetSpec.load(output).channel_names == ("T1", "T2")
    image = output / "imagesTr" / "s0_0001.nii.gz"
    assert not image.is_symlink()
    assert image.read_bytes() == (cohort / "imagesTr" / image.name).read_bytes()


def test_channels_must_be_said_when_there_are_more_than_the_model_takes(tmp_path, capsys):
    model, cohort = write_model(Tiny(), tmp_path / "results"), make_cohort(tmp_path / "cohort", cases=1)
    command = ["--model", model, "--input", cohort, "--output", tmp_path / "Dataset001_X"]
    for extra, said in (
        ([], "say which with --channel"),
        (["--channel", "T1"], "no channel 'T1'"),
        (["--channel", "fat", "water"], "1 different channels"),
        (["--channel", "fat", "--fuse", "fat", "water"], "exclude each other"),
        (["--fuse", "water"], "at least two"),
        (["--fuse", "water", "fat"], "not first, second"),
        (["--names", "totalvibe", "--channel", "1"], "TotalVibeSegmentator 1 to 72"),
        (["--channel-names", "a", "--channel", "0"], "1 names (a) for 4 channels"),
    ):
        assert run(*command, *extra) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "Dataset001_X").exists()


def test_incomplete_cohorts(tmp_path, capsys):
    model, cohort = write_model(Tiny(), tmp_path / "results"), make_cohort(tmp_path / "cohort", cases=2, channels=2)
    os.remove(cohort / "imagesTr" / "s1_0000.nii.gz")
    assert run("--model", model, "--input", cohort, "--output", tmp_path / "o", "--channel", "fat") == 2
    assert "missing channel s1_0000.nii.gz" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run("--model", model, "--input", tmp_path / "empty", "--output", tmp_path / "o") == 2
    assert "no images" in capsys.readouterr().err


def test_several_channels_are_labelled_and_merged(tmp_path):
    """TotalVibeSegmentator's values under its names, though the model numbers its labels."""
    model = write_model(Tiny(labels=VIBE, extra={"orientation": ["R", "A", "S"]}), tmp_path / "results")
    plain = write_model(Tiny(labels=VIBE), tmp_path / "plain")
    cohort, output = make_cohort(tmp_path / "cohort", cases=1), tmp_path / "Dataset001_X"
    command = ["--model", model, "--input", cohort, "--output", output]
    assert run(*command, "--fuse", "water", "inphase") == 0
    content = json.loads((output / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, **TOTALVIBE_LABELS}
    assert content["channel_names"] == {str(k): name for k, name in enumerate(CHANNELS)}
    maps, unturned = {}, {}
    with Predictor.from_model_folder(plain) as predictor:  # the scans are LPS: x and y run the other way in RAS
        for number, name in ((1, "water"), (2, "inphase")):
            image, geometry = read_image([cohort / "imagesTr" / f"s0_{number:04d}.nii.gz"])
            turned = np.ascontiguousarray(image[:, :, ::-1, ::-1])
            maps[name] = predictor.predict_array(turned, geometry).labels[:, ::-1, ::-1]
            unturned[name] = predictor.predict_array(image, geometry).labels
    expected = fuse(maps, TOTALVIBE_LABELS, float(np.prod(GEOMETRY.spacing_mm)))
    labels, _ = read_labels(output / "labelsTr" / "s0.nii.gz")
    assert np.array_equal(labels, expected)
    assert not np.array_equal(labels, maps["water"])
    assert not np.array_equal(labels, fuse(unturned, TOTALVIBE_LABELS, float(np.prod(GEOMETRY.spacing_mm))))
    assert json.loads((output / "labelling.json").read_text())["channels"] == ["water", "inphase"]


def test_names_of_labels():
    def spec(labels: dict, name: str = "Dataset001_Any", **extra: object) -> DatasetSpec:
        content = {"channel_names": {"0": "x"}, "labels": labels, "file_ending": ".nii.gz", **extra}
        return DatasetSpec.from_json(content, name)

    vibe = {"background": 0, **TOTALVIBE_LABELS}
    assert label_names(spec(VIBE), "auto") == vibe
    assert label_names(spec(VIBE), "model") == VIBE
    others = {"background": 0, **{f"muscle {k}": k for k in range(1, 73)}}
    assert label_names(spec(others), "auto") == others  # 72 labels of something else
    assert label_names(spec(others, "Dataset086_TotalVibe"), "auto") == vibe
    assert label_names(spec(others), "totalvibe") == vibe
    ignoring = {"background": 0, "a": 1, "ignore": 2}
    assert label_names(spec(ignoring), "auto") == {"background": 0, "a": 1}
    with pytest.raises(ConfigError, match="label values 1 to 1"):
        label_names(spec(ignoring), "totalvibe")


def test_warnings_reach_the_table(tmp_path, capsys):
    """A model whose left and right lie the wrong way round for half of the structures or more."""
    tiny = Tiny(labels={"background": 0, "lobe_left": 1, "lobe_right": 2})
    model, cohort = write_model(tiny, tmp_path / "results"), make_cohort(tmp_path / "cohort", cases=1, channels=1)
    outputs = []
    for flipped in (False, True):
        image, geometry = read_image([cohort / "imagesTr" / "s0_0000.nii.gz"])
        direction = (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0) if flipped else geometry.direction
        folder = tmp_path / f"cohort{flipped}"
        write_image(
            image[0], Geometry(GEOMETRY.shape, GEOMETRY.spacing_mm, (0, 0, 0), direction), folder / "s0_0000.nii.gz"
        )
        output = tmp_path / f"Dataset00{flipped:d}_X"
        assert run("--model", model, "--input", folder, "--output", output) == 0
        outputs.append(next(csv.DictReader((output / "labelling.csv").open()))["warnings"])
    assert sorted(bool(warning) for warning in outputs) == [False, True]
    assert any("left structures lie right" in warning for warning in outputs)
