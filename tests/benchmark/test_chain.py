"""From a challenge's folder to a valid submission, with a network that knows nothing."""

import zipfile

import nibabel
import numpy as np
import pytest

from ukbob_seg.cli import benchmark, plan_and_preprocess, predict, train

OFFICIAL_IMAGES = {
    "btcv": "RawData/Testing/img",
    "amos": "imagesTs",
    "brats": "ValidationData",
}
MEMBERS = {
    "btcv": ["label0061.nii.gz", "label0062.nii.gz"],
    "amos": ["amos_0540.nii.gz", "amos_0541.nii.gz"],
    "brats-2023": ["BraTS-GLI-00010-000.nii.gz", "BraTS-GLI-00011-000.nii.gz"],
    "brats-2021": ["BraTS2021_00010.nii.gz", "BraTS2021_00011.nii.gz"],
}


@pytest.mark.parametrize("case", ["btcv", "amos", "brats-2023", "brats-2021"])
def test_from_the_official_folder_to_a_valid_submission(case, request, tmp_path, tiny, capsys):
    name, _, edition = case.partition("-")
    source = request.getfixturevalue(name)
    source = source(edition) if edition else source
    flags = [x for root in ("raw", "preprocessed", "results") for x in (f"--{root}", str(tmp_path / root))]
    assert benchmark.main(["convert", name, str(source), "-d", "610", "--workers", "1", *flags[:4]]) == 0
    assert (tmp_path / "preprocessed" / f"Dataset610_{name.upper()}" / "splits.json").is_file()
    plan = ["--memory-gb", "2", "--feature-size", "12", "--batch-size", "1", "--patch-size", "64", "32", "32"]
    assert plan_and_preprocess.main(["-d", "610", "--workers", "1", *plan, *flags[:4]]) == 0
    tiny(tmp_path / "preprocessed" / f"Dataset610_{name.upper()}" / "plans.json")
    training = ["--epochs", "1", "--iterations-per-epoch", "2", "--device", "cpu", "--no-validation"]
    network = ["--network", "tests_tiny_benchmark:Tiny"]
    assert train.main(["610", "0", *network, *training, *flags]) == 0
    raw = tmp_path / "raw" / f"Dataset610_{name.upper()}"
    (model,) = (tmp_path / "results" / raw.name).iterdir()
    predicted = tmp_path / "predicted"
    call = ["-i", raw / "imagesTs", "-o", predicted, "-m", model, "--device", "cpu", "--no-mirror"]
    assert predict.main([*map(str, call)]) == 0
    archive = tmp_path / "submission.zip"
    for images in (source / OFFICIAL_IMAGES[name], raw / "imagesTs"):
        capsys.readouterr()
        code = benchmark.main(["package", name, str(predicted), str(images), "-o", str(archive), "--workers", "1"])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        assert captured.out.endswith(f"-> {archive} (valid)\n")
        with zipfile.ZipFile(archive) as opened:
            assert opened.namelist() == MEMBERS[case]
    assert benchmark.main(["validate", name, str(archive), str(source / OFFICIAL_IMAGES[name])]) == 0
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "extracted")
    written = nibabel.load(tmp_path / "extracted" / MEMBERS[case][1])
    assert written.get_data_dtype() == np.uint8
    if edition == "2021":
        assert "edition 2021" in captured.out
        assert set(np.unique(written.dataobj)) <= {0, 1, 2, 4}


@pytest.mark.parametrize("numbered", [True, False])
def test_ukbob_is_planned_trained_and_predicted(numbered, ukbob72, tmp_path, tiny):
    source = ukbob72(numbered)
    flags = [x for root in ("raw", "preprocessed", "results") for x in (f"--{root}", str(tmp_path / root))]
    assert benchmark.main(["convert", "ukbob72", str(source), "-d", "620", "--workers", "1", *flags[:4]]) == 0
    plan = ["--memory-gb", "2", "--feature-size", "12", "--batch-size", "1", "--patch-size", "64", "32", "32"]
    assert plan_and_preprocess.main(["-d", "620", "--workers", "1", *plan, *flags[:4]]) == 0
    tiny(tmp_path / "preprocessed" / "Dataset620_UKBOB72" / "plans.json")
    training = ["--epochs", "1", "--iterations-per-epoch", "2", "--device", "cpu", "--no-validation"]
    assert train.main(["620", "4", "--network", "tests_tiny_benchmark:Tiny", *training, *flags]) == 0
    (model,) = (tmp_path / "results" / "Dataset620_UKBOB72").iterdir()
    images = tmp_path / "raw" / "Dataset620_UKBOB72" / "imagesTr"
    call = ["-i", images, "-o", tmp_path / "predicted", "-m", model, "--device", "cpu"]
    assert predict.main([*map(str, call)]) == 0
    predicted = sorted((tmp_path / "predicted").glob("[!.]*.nii.gz"))
    assert [path.name for path in predicted] == sorted({f"{x.name[:-12]}.nii.gz" for x in images.glob("*_0000.nii.gz")})
    for path in predicted:
        assert set(np.unique(nibabel.load(path).dataobj)) <= set(range(73))
