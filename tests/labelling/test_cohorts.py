"""Labels stay with their images: other cohorts, changed images, cases that fail, tables of subjects."""

import csv
import errno
import json
import shutil

import numpy as np
import pytest
from cohorts import GEOMETRY, label, make_cohort
from nnunet_models import Tiny, scan, write_model

from ukbob_seg.cli.extract_fingerprint import main as fingerprint_main
from ukbob_seg.dataset.image_io import read_image, read_labels, write_image
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.dataset.spec import DatasetSpec, require_cases
from ukbob_seg.errors import DatasetError, UkbobError
from ukbob_seg.inference.case_predictor import CasePredictor
from ukbob_seg.inference.predictor import Predictor
from ukbob_seg.labelling.label import label_cohort
from ukbob_seg.labelling.options import LabelOptions
from ukbob_seg.training.setup import find_split

pytest.importorskip("dynamic_network_architectures", reason="pip install --no-deps dynamic-network-architectures")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(Tiny(), tmp_path_factory.mktemp("model"))


def rows(output):
    return list(csv.DictReader((output / "labelling.csv").open()))


def labels_of(model, image):
    with Predictor.from_model_folder(model) as predictor:
        return predictor.predict_array(*read_image([image])).labels


def state(output):
    return {path.relative_to(output): (path.read_bytes(), path.is_symlink()) for path in output.glob("*Tr/*")}


@pytest.mark.parametrize("copies", [False, True])
def test_labels_of_one_cohort_never_lie_beside_images_of_another(copies, model, tmp_path, capsys):
    """Both have the same names of cases, as have the same participants at two visits, or two exports."""
    first = make_cohort(tmp_path / "a", cases=2, channels=1)
    second = make_cohort(tmp_path / "b", cases=2, channels=1, seed=50)
    output = tmp_path / "Dataset001_X"
    command = ["--model", model, "--output", output, *(["--copy"] if copies else [])]
    assert label(*command, "--input", first) == 0
    before = state(output)
    assert label(*command, "--input", second) == 2
    said = capsys.readouterr().err
    assert f"holds labels made otherwise (other cohort, {first / 'imagesTr'})" in said
    assert state(output) == before
    assert label(*command, "--input", second, "--overwrite") == 0
    for name in ("s0", "s1"):
        image = output / "imagesTr" / f"{name}_0000.nii.gz"
        assert image.is_symlink() != copies
        assert image.read_bytes() == (second / "imagesTr" / image.name).read_bytes()
        assert np.array_equal(read_labels(output / "labelsTr" / f"{name}.nii.gz")[0], labels_of(model, image))
    assert state(output) != before
    assert label(*command, "--input", second) == 0  # and goes on as usual


def test_cases_and_channels_that_the_cohort_does_not_have_are_refused(model, tmp_path, capsys):
    output = tmp_path / "Dataset001_X"
    command = ["--model", model, "--output", output, "--channel", "0"]
    assert label(*command, "--input", make_cohort(tmp_path / "a", cases=2, channels=2)) == 0
    before = state(output)
    for cases, channels, said in ((1, 2, "imagesTr/s1_0000.nii.gz"), (2, 1, "imagesTr/s0_0001.nii.gz")):
        other = make_cohort(tmp_path / f"b{cases}", cases=cases, channels=channels)
        assert label(*command, "--input", other, "--overwrite") == 2
        error = capsys.readouterr().err
        assert "cases or channels that the cohort does not have; delete them" in error
        assert said in error
        assert state(output) == before


def test_a_changed_image_is_labelled_again(model, tmp_path):
    cohort, output = make_cohort(tmp_path / "a", cases=2, channels=1), tmp_path / "Dataset001_X"
    command = ["--model", model, "--output", output, "--input", cohort]
    assert label(*command) == 0
    kept = (output / "labelsTr" / "s0.nii.gz").stat().st_mtime_ns
    write_image(scan(seed=70)[0], GEOMETRY, cohort / "imagesTr" / "s1_0000.nii.gz")
    assert label(*command) == 0
    expected = labels_of(model, cohort / "imagesTr" / "s1_0000.nii.gz")
    assert np.array_equal(read_labels(output / "labelsTr" / "s1.nii.gz")[0], expected)
    assert (output / "labelsTr" / "s0.nii.gz").stat().st_mtime_ns == kept


def test_images_of_somebody_else_are_never_replaced(model, tmp_path, capsys):
    cohort, theirs = make_cohort(tmp_path / "a", cases=1, channels=1), tmp_path / "Dataset001_X"
    image = theirs / "imagesTr" / "s0_0000.nii.gz"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"the only copy")
    for extra in ([], ["--overwrite"]):
        assert label("--model", model, "--output", theirs, "--input", cohort, *extra) == 2
        assert "images that this command did not put there" in capsys.readouterr().err
        assert image.read_bytes() == b"the only copy"


def test_records_of_earlier_versions(model, tmp_path, capsys):
    """They name neither cohort nor images nor the content of checkpoints; where links lead says as much."""
    first, second = (make_cohort(tmp_path / name, cases=1, channels=1) for name in "ab")
    output = tmp_path / "Dataset001_X"
    assert label("--model", model, "--output", output, "--input", first) == 0
    for path, keys in (
        (output / "labelling.json", ("cohort", "checkpoint_sha256", "tables")),
        (output / "labelling" / "s0.json", ("images",)),
    ):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in content.items() if key not in keys}))
    before = state(output)
    assert label("--model", model, "--output", output, "--input", second) == 2
    assert "other cohort" in capsys.readouterr().err
    assert label("--model", model, "--output", output, "--input", first) == 0
    assert state(output) == before
    assert json.loads((output / "labelling.json").read_text())["cohort"] == str(first / "imagesTr")


def test_a_model_that_was_trained_again_is_another_one(tmp_path, capsys):
    model, cohort = write_model(Tiny(), tmp_path / "results"), make_cohort(tmp_path / "a", cases=1, channels=1)
    output = tmp_path / "Dataset001_X"
    assert label("--model", model, "--output", output, "--input", cohort) == 0
    before = state(output)
    write_model(Tiny(seed=9), tmp_path / "results")
    assert label("--model", model, "--output", output, "--input", cohort) == 2
    assert "other content of the checkpoints" in capsys.readouterr().err
    assert state(output) == before


def damage(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return content


def test_a_case_that_cannot_be_read_stops_no_other(model, tmp_path, capsys):
    cohort, output = make_cohort(tmp_path / "a", channels=1), tmp_path / "Dataset001_X"
    command = ["--model", model, "--output", output, "--input", cohort]
    image = cohort / "imagesTr" / "s0_0000.nii.gz"
    whole = damage(image)
    assert label(*command) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "1 of 3 cases could not be labelled (s0; s0: " in error[0]
    assert "--skip-failed" in error[0]
    assert [row["case"] for row in rows(output)] == ["s0", "s1", "s2"]
    assert [bool(row["problem"]) for row in rows(output)] == [True, False, False]
    assert "corrupt or truncated" in rows(output)[0]["problem"]
    kept = (output / "labelsTr" / "s2.nii.gz").stat().st_mtime_ns
    assert label(*command, "--skip-failed") == 0
    assert [case.name for case in require_cases(output, DatasetSpec.load(output))] == ["s1", "s2"]
    assert DatasetSpec.load(output).content["numTraining"] == 2
    image.write_bytes(whole)
    assert label(*command) == 0
    assert len(require_cases(output, DatasetSpec.load(output))) == DatasetSpec.load(output).content["numTraining"] == 3
    assert not any(row["problem"] for row in rows(output))
    assert (output / "labelsTr" / "s2.nii.gz").stat().st_mtime_ns == kept


def test_a_failed_case_leaves_nothing_of_its_earlier_image(model, tmp_path):
    cohort, output = make_cohort(tmp_path / "a", cases=2, channels=1), tmp_path / "Dataset001_X"
    options = LabelOptions(model, quiet=True, skip_failed=True)
    label_cohort(cohort, output, options)
    damage(cohort / "imagesTr" / "s0_0000.nii.gz")
    label_cohort(cohort, output, options)
    assert {path.name for path in output.glob("*Tr/*")} == {"s1_0000.nii.gz", "s1.nii.gz"}


def test_a_cohort_of_which_nothing_can_be_read_is_an_error_in_any_case(model, tmp_path, capsys):
    cohort, output = make_cohort(tmp_path / "a", cases=2, channels=1), tmp_path / "Dataset001_X"
    for name in ("s0", "s1"):
        damage(cohort / "imagesTr" / f"{name}_0000.nii.gz")
    assert label("--model", model, "--output", output, "--input", cohort, "--skip-failed") == 2
    assert "2 of 2 cases could not be labelled" in capsys.readouterr().err


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_memory(*_):
    raise DatasetError("more than fits into memory") from MemoryError()


def full_when_written(*_):
    try:
        full_disk()
    except OSError as error:
        raise DatasetError("cannot be written") from error


@pytest.mark.parametrize("failing", [no_memory, full_when_written])
def test_lack_of_memory_and_disk_stop_the_run(failing, model, tmp_path, monkeypatch):
    cohort, output = make_cohort(tmp_path / "a", cases=2, channels=1), tmp_path / "Dataset001_X"
    monkeypatch.setattr(CasePredictor, "predict_case", failing)
    with pytest.raises(DatasetError, match=r"fits into memory|cannot be written"):
        label_cohort(cohort, output, LabelOptions(model, quiet=True, skip_failed=True))
    assert not list((output / "labelling").glob("*.json"))


def test_a_label_map_that_cannot_be_written_stops_the_run(model, tmp_path, monkeypatch):
    """SimpleITK says no more than that it failed."""
    import SimpleITK as sitk

    cohort, output = make_cohort(tmp_path / "a", cases=2, channels=1), tmp_path / "Dataset001_X"

    def failing(*_, **__):
        raise RuntimeError("write failed")

    monkeypatch.setattr(sitk, "WriteImage", failing)
    with pytest.raises(UkbobError, match="cannot write"):
        label_cohort(cohort, output, LabelOptions(model, quiet=True, skip_failed=True))
    assert not list((output / "labelling").glob("*.json"))


def test_visits_of_a_participant_stay_on_one_side_of_a_split(model, tmp_path):
    """From the cohort's groups.csv to the splits that training makes."""
    cohort = make_cohort(tmp_path / "a", cases=6, channels=1)
    pairs = {f"s{case}": f"participant{case // 2}" for case in range(6)}
    (cohort / "groups.csv").write_text("case,subject\n" + "".join(f"{c},{s}\n" for c, s in pairs.items()))
    (cohort / "demographics.csv").write_text("case,age\ns0,60\n")
    roots = Roots.below(tmp_path)
    output = roots.raw / "Dataset072_Cohort"
    assert label("--model", model, "--output", output, "--input", cohort) == 0
    assert (output / "demographics.csv").read_bytes() == (cohort / "demographics.csv").read_bytes()
    folders = ["--raw", str(roots.raw), "--preprocessed", str(roots.preprocessed)]
    assert fingerprint_main(["-d", "72", *folders, "--workers", "1"]) == 0
    for fold in "012":
        split, groups = find_split(roots.preprocessed / output.name, "default", roots, fold)
        assert groups == pairs
        assert split.val
        assert not {pairs[name] for name in split.train} & {pairs[name] for name in split.val}


def test_tables_follow_the_cohort_but_edited_ones_are_kept(model, tmp_path, capsys):
    cohort, output = make_cohort(tmp_path / "a", cases=1, channels=1), tmp_path / "Dataset001_X"
    command = ["--model", model, "--output", output]
    theirs, ours = cohort / "groups.csv", output / "groups.csv"
    theirs.write_text("case,subject\ns0,p\n")
    assert label(*command, "--input", cohort / "imagesTr") == 0
    assert ours.read_bytes() == theirs.read_bytes()
    theirs.write_text("case,subject\ns0,q\n")
    assert label(*command, "--input", cohort) == 0
    assert ours.read_bytes() == theirs.read_bytes()
    ours.write_text("case,subject\ns0,edited\n")
    assert label(*command, "--input", cohort) == 2
    assert "make them alike or remove one of them" in capsys.readouterr().err
    assert "edited" in ours.read_text()
    shutil.copy(theirs, ours)
    other = make_cohort(tmp_path / "b", cases=1, channels=1)  # without subjects: those of the first are none of its own
    assert label(*command, "--input", other, "--overwrite") == 0
    assert not ours.exists()
