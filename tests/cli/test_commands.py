"""The commands as a user meets them: the whole chain on a small dataset, and one clear sentence for every bad input."""

import json
import os

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from ukbob_seg.cli import (
    evaluate,
    export_model,
    extract_fingerprint,
    find_postprocessing,
    plan,
    plan_and_preprocess,
    predict,
    preprocess,
    train,
)
from ukbob_seg.dataset.image_io import read_geometry, read_labels


@pytest.fixture
def run(tmp_path, capsys):
    """Call a command in-process; returns (exit code, stdout, stderr)."""
    roots = ["raw", "preprocessed", "results"]

    def call(command, *arguments, folders=None):
        names = folders if folders is not None else {
            plan_and_preprocess: roots[:2], extract_fingerprint: roots[:2], plan: roots[:2], preprocess: roots[:2],
            train: roots, predict: roots[2:], evaluate: [], export_model: roots[2:], find_postprocessing: roots[::2],
        }[command]  # fmt: skip
        flags = [part for name in names for part in (f"--{name}", str(tmp_path / name))]
        try:
            code = command.main([*map(str, arguments), *flags])
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def _error(result):
    """The one sentence of a refused call: exit code 2, no traceback."""
    code, _, err = result
    assert code == 2, result
    assert "Traceback" not in err
    return next(line for line in reversed(err.splitlines()) if "error:" in line)


PLAN = ["--memory-gb", "2", "--feature-size", "12", "--batch-size", "1", "--patch-size", "64", "32", "32"]
TRAIN = ["--epochs", "1", "--iterations-per-epoch", "2", "--device", "cpu", "--validation-cases", "1"]


def _interrupted(*_):
    raise KeyboardInterrupt


def test_the_whole_chain(run, make_dataset, tmp_path, monkeypatch):
    folder = make_dataset(cases=5, test_cases=2, shape=(24, 28, 20), spacing_mm=(1.5, 1.0, 1.0))
    code, out, _ = run(plan_and_preprocess, "-d", 7, "--verify", *PLAN)
    assert code == 0
    assert "verified 5 cases: no problems" in out
    assert "patch 64x32x32" in out
    assert "preprocessed 5 cases (0 were up to date)" in out
    assert run(plan_and_preprocess, "-d", 7, *PLAN)[1].count("preprocessed 0 cases (5 were up to date)") == 1
    code, out, _ = run(plan_and_preprocess, "-d", 7, "--report", *PLAN)
    assert code == 0
    page = tmp_path / "preprocessed" / "Dataset007_Blobs" / "report.html"
    assert out.endswith(f"-> {page}\n")
    assert "5 of 5" in page.read_text()
    code, out, err = run(train, 7, 0, *TRAIN)
    assert code == 0, err
    model = tmp_path / "results" / "Dataset007_Blobs" / "3d_fullres__swin_unetr"
    assert (model / "fold_0" / "validation" / "summary.json").is_file()
    assert "first" in out
    for extra in ([], ["--etta", "--etta-steps", "1"], ["--tta", "--no-mirror", "--step-size", "1"]):
        code, out, err = run(predict, "-i", folder / "imagesTs", "-o", tmp_path / "out", "-d", 7, "-f", 0,
                             "--device", "cpu", *extra)  # fmt: skip
        assert code == 0, err
        assert (tmp_path / "out" / "blob_005_etta.json").is_file() == ("--etta" in extra)  # of this run only
    code, out, err = run(predict, "-i", folder / "imagesTs", "-o", tmp_path / "out", "-d", 7, "-f", 0,
                         "--device", "cpu", "--resume")  # fmt: skip
    assert code == 2
    assert "predict_args.json has other settings than this run (mirror False, now True); predict as before" in err
    with monkeypatch.context() as patched:
        patched.setattr("ukbob_seg.inference.predict._predict_jobs", _interrupted)
        code, out, err = run(predict, "-i", folder / "imagesTs", "-o", tmp_path / "out", "-d", 7, "-f", 0,
                             "--device", "cpu", "--tta", "--no-mirror", "--step-size", "1")  # fmt: skip
    assert code == 130
    assert "interrupted; finished cases are kept, run the same command with --resume to go on" in err
    labels, _ = read_labels(tmp_path / "out" / "blob_005.nii.gz")
    image = folder / "imagesTs" / "blob_005_0000.nii.gz"
    assert read_geometry(image).difference(read_geometry(tmp_path / "out" / "blob_005.nii.gz"), ("a", "b")) is None
    assert set(np.unique(labels)) <= {0, 1, 2}
    code, out, _ = run(evaluate, tmp_path / "out", folder / "labelsTs")
    assert code == 0
    assert "mean" in out
    single = run(predict, "-i", image, "-o", tmp_path / "one.nii.gz", "-m", model, "--device", "cpu")
    assert single[0] == 0
    assert (tmp_path / "one.nii.gz").is_file()


def test_parts_classes_statistics_and_previews(run, make_dataset, tmp_path):
    folder = make_dataset(cases=5, test_cases=3, shape=(24, 28, 20), spacing_mm=(3.0, 1.0, 0.7))
    assert run(plan_and_preprocess, "-d", 7, *PLAN)[0] == 0
    assert run(train, 7, 0, *TRAIN)[0] == 0
    call = ["-i", folder / "imagesTs", "-d", 7, "--device", "cpu", "--step-size", 1]
    extras = ["--classes", "second", "--statistics", "--preview"]
    kept = []
    for part, count in (("1/2", 2), ("2/2", 1)):
        code, out, err = run(predict, *call, "-o", tmp_path / "out", *extras, "--part", part)
        assert code == 0, err
        assert out.startswith(f"part {part[0]} of 2: {count} cases -> ")
        kept.append((tmp_path / "out" / "predict_args.json").read_bytes())
    assert kept[0] == kept[1]
    assert run(predict, *call, "-o", tmp_path / "whole")[0] == 0
    for number in (5, 6, 7):
        name = f"blob_{number:03d}"
        labels, _ = read_labels(tmp_path / "out" / f"{name}.nii.gz")
        everything, _ = read_labels(tmp_path / "whole" / f"{name}.nii.gz")
        assert np.array_equal(labels, np.where(everything == 2, 2, 0))
        found = json.loads((tmp_path / "out" / f"{name}_statistics.json").read_text())["classes"]
        assert found["second"]["voxels"] == (labels == 2).sum()
        assert (tmp_path / "out" / f"{name}_preview.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "whole").glob("*_statistics.json"))
    assert run(evaluate, tmp_path / "out", folder / "labelsTs")[0] == 0
    refused = run(predict, *call, "-o", tmp_path / "no", "--classes", "liver", "second")
    assert "--classes: no class 'liver'; choose from first, second" in _error(refused)
    assert "the first is 1/2, the last 2/2" in _error(run(predict, *call, "-o", tmp_path / "no", "--part", "3/2"))
    assert "--part must look like 2/8" in _error(run(predict, *call, "-o", tmp_path / "no", "--part", "3"))
    assert not (tmp_path / "no").exists()


def test_the_steps_one_by_one(run, make_dataset, tmp_path):
    make_dataset(cases=2)
    assert "no preprocessed" not in run(extract_fingerprint, "-d", 7)[1]
    code, out, _ = run(plan, "-d", 7, *PLAN)
    assert code == 0
    assert "Target spacing 1 x 1 x 1 mm" in out
    assert run(preprocess, "-d", 7)[1].startswith("3d_fullres: 2 cases preprocessed")
    assert run(preprocess, "-d", 7)[1].startswith("3d_fullres: 0 cases preprocessed")


@pytest.mark.parametrize("command", [plan, plan_and_preprocess])
def test_options_of_interpolation(run, make_dataset, tmp_path, command):
    make_dataset(cases=2)
    run(extract_fingerprint, "-d", 7)
    assert run(command, "-d", 7, *PLAN, "--anti-alias", "--coarse-order", 1)[0] == 0
    path = tmp_path / "preprocessed" / "Dataset007_Blobs" / "plans.json"
    full = json.loads(path.read_text())["configurations"]["3d_fullres"]
    assert (full["anti_alias"], full["coarse_order"]) == (True, 1)
    assert "invalid choice" in _error(run(command, "-d", 7, *PLAN, "--coarse-order", 2))


def test_the_preset_of_nnunet(run, make_dataset, tmp_path):
    make_dataset(cases=3, shape=(24, 28, 20), spacing_mm=(1.5, 1.0, 1.0))
    code, out, _ = run(plan_and_preprocess, "-d", 7, "--preset", "nnunet", "--no-preprocess")
    assert code == 0
    assert "24 GB\n    (resenc_unet_l)" in out
    path = tmp_path / "preprocessed" / "Dataset007_Blobs" / "plans.json"
    content = json.loads(path.read_text())
    assert (content["preset"], content["memory_gb"]) == ("nnunet", 8.0)  # whatever this machine has
    assert set(content["configurations"]["3d_fullres"]["networks"]) == {
        "plain_conv_unet", "resenc_unet_m", "resenc_unet_l", "resenc_unet_xl", "swin_unetr",
    }  # fmt: skip
    assert run(plan, "-d", 7, "--preset", "nnunet", "--memory-gb", 4, "--batch-size", 2)[0] == 0
    assert json.loads(path.read_text())["memory_gb"] == 4.0
    refused = run(plan, "-d", 7, "--preset", "nnunet", "--patch-size", 64, 64, 64)
    assert "--patch-size cannot be combined with --preset nnunet" in _error(refused)
    refused = run(plan, "-d", 7, "--preset", "nnunet", "--feature-size", 24)
    assert "--feature-size cannot be combined with --preset nnunet" in _error(refused)


def test_roots_from_the_environment(run, make_dataset, tmp_path, monkeypatch):
    make_dataset(cases=2)
    monkeypatch.setenv("UKBOB_RAW", str(tmp_path / "raw"))
    monkeypatch.setenv("UKBOB_PREPROCESSED", str(tmp_path / "elsewhere"))
    assert run(extract_fingerprint, "-d", "Dataset007_Blobs", folders=[])[0] == 0
    assert (tmp_path / "elsewhere" / "Dataset007_Blobs" / "fingerprint.json").is_file()


def _edit(path, change):
    image = sitk.ReadImage(str(path))
    edited = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image)))
    edited.CopyInformation(image)
    sitk.WriteImage(edited, str(path))


def _write(array, path):
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(path))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


SPOIL = {
    "truncated image": (lambda f: _truncate(f / "imagesTr/blob_001_0000.nii.gz"), "blob_001", "cannot be read"),
    "missing channel": (lambda f: (f / "imagesTr/blob_001_0001.nii.gz").unlink(), "blob_001", "missing channel"),
    "label without image": (
        lambda f: [(f / f"imagesTr/blob_001_000{c}.nii.gz").unlink() for c in (0, 1)], "blob_001", "has no image",
    ),
    "image without label": (lambda f: (f / "labelsTr/blob_001.nii.gz").unlink(), "blob_001", "no label file"),
    "unknown label": (
        lambda f: _edit(f / "labelsTr/blob_001.nii.gz", lambda a: a * 9), "blob_001", "unknown label values 9",
    ),
    "NaN": (
        lambda f: _edit(f / "imagesTr/blob_001_0000.nii.gz", lambda a: np.where(a > 100, np.nan, a).astype("f4")),
        "blob_001", "NaN",
    ),
    "empty image": (
        lambda f: _edit(f / "imagesTr/blob_001_0000.nii.gz", np.zeros_like), "blob_001", "every voxel is 0",
    ),
    "all background": (lambda f: _edit(f / "labelsTr/blob_001.nii.gz", np.zeros_like), "blob_001", "all background"),
    "flat file": (
        lambda f: _write(np.ones((4, 5), "f4"), f / "imagesTr/blob_001_0000.nii.gz"),
        "blob_001", "2 dimensions",
    ),
    "4D file": (
        lambda f: _write(np.ones((2, 4, 5, 6), "f4"), f / "imagesTr/blob_001_0000.nii.gz"),
        "blob_001", "4 dimensions",
    ),
    "duplicate case": (
        lambda f: [os.link(f / p, f / p.replace("blob_001", "BLOB_001")) for p in
                   ("imagesTr/blob_001_0000.nii.gz", "imagesTr/blob_001_0001.nii.gz", "labelsTr/blob_001.nii.gz")],
        "BLOB_001", "duplicate case id",
    ),
    "no description": (lambda f: (f / "dataset.json").unlink(), "dataset.json", "does not exist"),
    "broken description": (lambda f: (f / "dataset.json").write_text("{"), "dataset.json", "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOIL)
def test_bad_datasets(run, make_dataset, what):
    spoil, where, message = SPOIL[what]
    folder = make_dataset(cases=3, channel_names=("fat", "water"))
    spoil(folder)
    for command in ([plan_and_preprocess, "-d", 7, *PLAN], [plan_and_preprocess, "-d", 7, "--verify-only"]):
        error = _error(run(*command))
        whole = error
        assert message in whole, whole
        assert where in whole, whole


def test_geometry_mismatch(run, make_dataset):
    folder = make_dataset(cases=2)
    path = folder / "labelsTr" / "blob_000.nii.gz"
    image = sitk.ReadImage(str(path))
    image.SetOrigin((9.0, 9.0, 9.0))
    sitk.WriteImage(image, str(path))
    error = _error(run(plan_and_preprocess, "-d", 7, *PLAN))
    assert "case blob_000: origin_mm differs: (3, -5, 7) in the image, (9, 9, 9) in the label" in error


def test_wrong_roots_ids_and_options(run, make_dataset, tmp_path):
    assert "does not exist; give it with --raw" in _error(run(plan_and_preprocess, "-d", 7, *PLAN))
    make_dataset(cases=5)
    assert "no dataset '9'" in _error(run(plan_and_preprocess, "-d", 9, *PLAN))
    assert "multiple of 12" in _error(run(plan_and_preprocess, "-d", 7, "--memory-gb", 2, "--feature-size", 10))
    assert "no configuration '2d'" in _error(run(plan_and_preprocess, "-d", 7, *PLAN, "-c", "2d"))
    assert "--workers must be at least 1" in _error(run(plan_and_preprocess, "-d", 7, *PLAN, "--workers", 0))
    assert run(plan_and_preprocess, "-d", 7, *PLAN)[0] == 0
    assert "fold must be 0..4 or 'all', got '9'" in _error(run(train, 7, 9, *TRAIN))
    assert "holds no network" not in _error(run(train, 7, 0, *TRAIN, "--device", "cuda:7"))
    assert "the plans hold no network 'u_net'" in _error(run(train, 7, 0, *TRAIN, "--network", "u_net"))
    assert "nothing to resume" in _error(run(train, 7, 0, *TRAIN, "--resume"))
    assert "learning_rate must be positive" in _error(run(train, 7, 0, *TRAIN, "--lr", "-1"))
    (tmp_path / "results").mkdir(exist_ok=True)
    assert "no dataset '7'" in _error(run(predict, "-i", tmp_path, "-o", tmp_path / "o", "-d", 7, "--device", "cpu"))
    missing = run(predict, "-i", tmp_path, "-o", tmp_path / "o", "-m", tmp_path / "none", "--device", "cpu")
    assert "does not exist; train it first" in _error(missing)
    assert "either as -d ID or as -m" in _error(run(predict, "-i", tmp_path, "-o", tmp_path / "o"))
    for command in (
        [predict, "-i", tmp_path, "-o", tmp_path / "o"], [export_model], [find_postprocessing, "-d", 7],
    ):  # fmt: skip
        refused = _error(run(*command, "-m", tmp_path / "model", "--network", "vnet"))
        assert "--network vnet chooses a model, and -m names one already; leave out one of them" in refused
    assert "give that" in _error(run(train, 7, 0, *TRAIN, "--pretrained-merging", "legacy"))
    none = ["--pretrained", tmp_path / "none.pt"]
    assert "none.pt do not exist" in _error(run(train, 7, 0, *TRAIN, *none))
    conv = ["--network", "plain_conv_unet", "--pretrained-merging", "legacy", "--pretrained", tmp_path / "w.pt"]
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    assert "is for swin_unetr" in _error(run(train, 7, 0, *TRAIN, *conv))
    assert "not one of its 1 weights matches" in _error(run(train, 7, 0, *TRAIN, "--pretrained", tmp_path / "w.pt"))
    assert run(train, 7, 0, *TRAIN, "--flagged-labels", "drop")[0] == 2
    assert "need --etta" in _error(run(predict, "-i", tmp_path, "-o", tmp_path / "o", "-d", 7, "--etta-lr", "0.1"))


def test_a_refused_wish_leaves_the_plans_alone_and_a_report_follows_them(run, make_dataset, tmp_path):
    make_dataset(cases=5)
    folder = tmp_path / "preprocessed" / "Dataset007_Blobs"
    assert run(plan_and_preprocess, "-d", 7, *PLAN, "--report")[0] == 0
    plans, report = (folder / "plans.json").read_bytes(), folder / "report.html"
    wish = ["--feature-size", 24, "--workers", -1]
    assert "--workers must be at least 1" in _error(run(plan_and_preprocess, "-d", 7, *PLAN, *wish))
    assert (folder / "plans.json").read_bytes() == plans
    assert report.is_file()
    code, output, _ = run(plan_and_preprocess, "-d", 7, "--memory-gb", 2, "--feature-size", 12)
    assert code == 0
    assert "(feature size as asked for, else the largest)" in " ".join(output.split())
    assert not report.exists()  # it showed other plans


def test_edited_plans_with_a_typing_error(run, make_dataset, tmp_path):
    make_dataset(cases=5)
    run(plan_and_preprocess, "-d", 7, *PLAN)
    path = tmp_path / "preprocessed" / "Dataset007_Blobs" / "plans.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "memory": 3}))
    assert "unknown entry memory" in _error(run(train, 7, 0, *TRAIN))
    whole = content["configurations"]["3d_fullres"]
    for change, message in (
        ({"networks": None}, "networks must be a table"),
        (
            {"networks": {"swin_unetr": {**whole["networks"]["swin_unetr"], "patch_size": [64, 64.5, 64]}}},
            "whole numbers",
        ),
        ({"networks": {"swin_unetr": {**whole["networks"]["swin_unetr"], "patch_size": [33, 32, 32]}}}, "divisible by"),
    ):
        path.write_text(json.dumps({**content, "configurations": {"3d_fullres": {**whole, **change}}}))
        assert message in _error(run(train, 7, 0, *TRAIN))
    assert "--spacing must be positive" in _error(run(plan_and_preprocess, "-d", 7, *PLAN, "--spacing", "nan", 1, 1))


def test_cases_listed_in_dataset_json_train_to_the_end(run, make_dataset, tmp_path):
    folder = make_dataset(cases=5)
    (folder / "imagesTr").rename(folder / "scans")
    content = json.loads((folder / "dataset.json").read_text())
    content["dataset"] = {
        f"c{k}": {"images": [f"scans/blob_{k:03d}_0000.nii.gz"], "label": f"labelsTr/blob_{k:03d}.nii.gz"}
        for k in range(5)
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    assert run(plan_and_preprocess, "-d", 7, *PLAN)[0] == 0
    code, _, error = run(train, 7, 0, *TRAIN)
    assert code == 0, error
    assert list((tmp_path / "results").rglob("validation/summary.json"))


def test_missing_raw_data_are_noticed_before_training(run, make_dataset, tmp_path):
    folder = make_dataset(cases=5)
    run(plan_and_preprocess, "-d", 7, *PLAN)
    folder.rename(tmp_path / "elsewhere")
    assert "no dataset '7'" in _error(run(train, 7, 0, *TRAIN))
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output(run, make_dataset, tmp_path):
    make_dataset(cases=2)
    (tmp_path / "preprocessed").mkdir(mode=0o500)
    assert "cannot write" in _error(run(plan_and_preprocess, "-d", 7, *PLAN))


def test_an_output_that_is_a_file(run, make_dataset, tmp_path):
    make_dataset(cases=2)
    (tmp_path / "preprocessed").write_text("in the way")
    assert "cannot write" in _error(run(plan_and_preprocess, "-d", 7, *PLAN))


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """The rename never happens when the write fails, so what was there stays."""
    import errno

    from ukbob_seg.errors import UkbobError
    from ukbob_seg.files import atomic_path, write_text

    write_text(tmp_path / "a.txt", "old")

    def fill_the_disk():
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("ne")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UkbobError, match=r"cannot write .*a\.txt: No space left on device; check"):
        fill_the_disk()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_writers_of_the_same_file_do_not_meet(tmp_path):
    """Processes of containers may have the same number: both finish, and the last one's content stays."""
    from ukbob_seg.files import atomic_path

    with atomic_path(tmp_path / "a.txt") as first:
        with atomic_path(tmp_path / "a.txt") as second:
            first.write_text("first")
            second.write_text("second")
        assert (tmp_path / "a.txt").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "first"


def test_parts_of_the_fingerprint_and_kept_plans(make_dataset, tmp_path, capsys):
    make_dataset(cases=3)
    roots = ["--raw", str(tmp_path / "raw"), "--preprocessed", str(tmp_path / "p")]
    for part in ("1/2", "2/2"):
        assert extract_fingerprint.main(["-d", "7", "--part", part, *roots]) == 0
    assert "when all parts are done" in capsys.readouterr().out
    assert plan_and_preprocess.main(["-d", "7", "--keep-plans", *roots]) == 2
    assert "plans.json do not exist; ukbob_plan_and_preprocess makes them" in capsys.readouterr().err
    assert plan_and_preprocess.main(["-d", "7", "--memory-gb", "2", "--no-preprocess", *roots]) == 0
    assert plan_and_preprocess.main(["-d", "7", "--keep-plans", "--memory-gb", "3", *roots]) == 2
    assert "--keep-plans follows plans.json and takes no --memory-gb" in capsys.readouterr().err
    assert plan_and_preprocess.main(["-d", "7", "--keep-plans", *roots]) == 0
    assert "preprocessed 3 cases" in capsys.readouterr().out
    assert preprocess.main(["-d", "7", "--part", "0/2", *roots]) == 2
    assert extract_fingerprint.main(["-d", "7", "--part", "1/2", "--scheduler", "tcp://x:1", *roots]) == 2
