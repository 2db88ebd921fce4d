"""What goes into an archive, and what the validator refuses."""

import gzip
import json
import shutil
import struct
import zipfile

import nibabel
import numpy as np
import pytest

from ukbob_seg.benchmark.btcv import CLASSES, MERGED
from ukbob_seg.benchmark.submission import package
from ukbob_seg.benchmark.validate import validate
from ukbob_seg.cli import benchmark
from ukbob_seg.errors import ConfigError, DatasetError


def _describe(folder, labels, **extra):
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, **labels}, "file_ending": ".nii.gz", **extra}
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.fixture
def predictions(btcv, tmp_path):
    """The truth of the two test cases, with merged adrenal glands."""
    folder = tmp_path / "predictions"
    folder.mkdir()
    for path in (tmp_path / "truth").iterdir():
        image = nibabel.load(path)
        merged = np.minimum(np.asarray(image.dataobj), 12)
        nibabel.save(nibabel.Nifti1Image(merged, image.affine), folder / path.name)
    _describe(folder, MERGED)
    return folder


@pytest.fixture
def images(btcv):
    """The official test images."""
    return btcv / "RawData/Testing/img"


def _read(archive, member):
    with zipfile.ZipFile(archive) as opened:
        return nibabel.Nifti1Image.from_bytes(gzip.decompress(opened.read(member)))


def test_merged_adrenal_glands_get_their_sides_back(predictions, images, tmp_path):
    """In one test image x runs to the left, in the other to the right."""
    done = package("btcv", predictions, images, tmp_path / "a.zip", workers=1)
    assert (done.cases, done.empty, done.dropped) == (2, (), ())
    assert done.sides == {"inferior_vena_cava and aorta": 2}
    for number in ("0061", "0062"):
        written = _read(tmp_path / "a.zip", f"label{number}.nii.gz")
        truth = nibabel.load(tmp_path / "truth" / f"btcv_{number}.nii.gz")
        assert np.array_equal(np.asarray(written.dataobj), np.asarray(truth.dataobj))
        image = nibabel.load(images / f"img{number}.nii.gz")
        assert np.array_equal(written.affine, image.affine)
        assert written.header["sform_code"] == image.header["sform_code"]
    again = package("btcv", predictions, images, tmp_path / "b.zip", workers=1)
    assert again.path.read_bytes() == (tmp_path / "a.zip").read_bytes()


def test_a_model_of_other_classes_is_matched_by_name(predictions, images, tmp_path, capsys):
    _describe(predictions, {"liver": 1, "Right Kidney": 2, "lung": 3, **{f"x{k}": k for k in range(4, 13)}})
    shutil.copy(predictions / "btcv_0061.nii.gz", predictions / "btcv_0099.nii.gz")
    call = ["package", "btcv", str(predictions), str(images), "-o", str(tmp_path / "a.zip"), "--workers", "1"]
    assert benchmark.main(call) == 0
    out = capsys.readouterr().out
    assert "empty in every case, as the prediction has no such class: spleen, kidney_left" in out
    assert "now background: lung, x4" in out
    assert "not packaged: btcv_0099" in out
    assert set(np.unique(_read(tmp_path / "a.zip", "label0061.nii.gz").dataobj)) == {0, 2, 6}


def test_what_cannot_be_packaged(predictions, images, tmp_path):
    out = tmp_path / "a.zip"
    with pytest.raises(ConfigError, match=r"must end in .zip"):
        package("btcv", predictions, images, tmp_path / "a.tar", workers=1)
    with pytest.raises(DatasetError, match="holds no test image"):
        package("btcv", predictions, predictions, out, workers=1)
    with pytest.raises(ConfigError, match="has no submissions"):
        package("ukbob72", predictions, images, out, workers=1)
    with pytest.raises(ConfigError, match="--modality does not apply"):
        package("btcv", predictions, images, out, modality="ct", workers=1)
    _describe(predictions, {"lung": 1})
    with pytest.raises(ConfigError, match="no class of the prediction has a name of this challenge"):
        package("btcv", predictions, images, out, workers=1)
    _describe(predictions, {"liver": 1})
    with pytest.raises(DatasetError, match=r"are not in its dataset\.json"):
        package("btcv", predictions, images, out, workers=1)
    _describe(predictions, MERGED)
    (predictions / "btcv_0062.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"1 of 2 test images have no prediction.*btcv_0062"):
        package("btcv", predictions, images, out, workers=1)
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)), predictions / "btcv_0062.nii.gz")
    with pytest.raises(DatasetError, match="shape differs"):
        package("btcv", predictions, images, out, workers=1)
    (predictions / "dataset.json").unlink()
    with pytest.raises(DatasetError, match="give it with --dataset-json"):
        package("btcv", predictions, images, out, workers=1)
    assert not out.exists()


@pytest.mark.parametrize("edition", ["2021", "2023"])
def test_regions_come_back_as_the_challenges_values(brats, tmp_path, edition):
    source = brats(edition)
    images = source / "ValidationData"
    predicted = tmp_path / "predicted"
    predicted.mkdir()
    for case in images.iterdir():
        training = next((source / "TrainingData").iterdir())
        truth = nibabel.load(next(training.glob("*seg.nii.gz")))
        ours = np.minimum(np.asarray(truth.dataobj), 3)
        nibabel.save(nibabel.Nifti1Image(ours, truth.affine), predicted / f"{case.name}.nii.gz")
    regions = {"whole_tumour": [1, 2, 3], "tumour_core": [1, 3], "enhancing_tumour": [3]}
    _describe(predicted, regions, regions_class_order=[2, 1, 3])
    done = package("brats", predicted, images, tmp_path / "a.zip", workers=1)
    assert done.editions == (edition,)
    written = np.asarray(_read(tmp_path / "a.zip", f"{case.name}.nii.gz").dataobj)
    assert np.array_equal(written, np.asarray(truth.dataobj))
    assert validate("brats", tmp_path / "a.zip", images) == (2, [])
    _describe(predicted, regions, regions_class_order=[1, 2, 3])
    with pytest.raises(ConfigError, match="labels differ"):
        package("brats", predicted, images, tmp_path / "a.zip", workers=1)
    _describe(predicted, {"NCR": 1, "edema": 2, "enhancing tumor": 3})  # of a model of classes
    package("brats", predicted, images, tmp_path / "b.zip", workers=1)
    assert np.array_equal(_read(tmp_path / "b.zip", f"{case.name}.nii.gz").dataobj, truth.dataobj)


def _rewritten(change):
    """Damage one member's voxels or matrix."""

    def spoil(members):
        image = nibabel.Nifti1Image.from_bytes(gzip.decompress(members["label0061.nii.gz"]))
        members["label0061.nii.gz"] = gzip.compress(change(np.asarray(image.dataobj).copy(), image.affine).to_bytes())

    return spoil


def _scaled(members):
    raw = bytearray(gzip.decompress(members["label0061.nii.gz"]))
    struct.pack_into("<f", raw, 112, 2.0)  # scl_slope
    members["label0061.nii.gz"] = gzip.compress(bytes(raw))


def _bits(array, _, move=0.0, dtype=np.uint8):
    return nibabel.Nifti1Image(array.astype(dtype), _ + np.array([[0, 0, 0, move]] + [[0] * 4] * 3))


def _colours(array, matrix):
    colours = np.zeros(array.shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    return nibabel.Nifti1Image(colours, matrix)


def _huge(members):
    raw = bytearray(gzip.decompress(members["label0061.nii.gz"]))
    struct.pack_into("<3h", raw, 42, 30000, 30000, 30000)  # dim[1:4]
    members["label0061.nii.gz"] = gzip.compress(bytes(raw))


DAMAGE = {
    "missing": (lambda m: m.pop("label0061.nii.gz"), "1 of 2 test cases are missing: label0061.nii.gz"),
    "other file": (lambda m: m.update({"notes.txt": b"x"}), "no test case's label map: notes.txt"),
    "in a folder": (lambda m: m.update({"out/label0061.nii.gz": m.pop("label0061.nii.gz")}), "not in a folder"),
    "wrong name": (lambda m: m.update({"img0061.nii.gz": m.pop("label0061.nii.gz")}), "img0061.nii.gz"),
    "floats": (_rewritten(lambda a, m: _bits(a, m, dtype=np.float32)), "type float32, expected integers"),
    "value": (_rewritten(lambda a, m: _bits(np.where(a == 3, 14, a), m)), "label values 14, allowed are 0, 1"),
    "negative": (_rewritten(lambda a, m: _bits(np.where(a == 3, -1, a.astype(int)), m, dtype=np.int16)), "values -1"),
    "shape": (_rewritten(lambda a, m: _bits(a[:-1], m)), "shape (31, 32, 32), but (32, 32, 32)"),
    "moved": (_rewritten(lambda a, m: _bits(a, m, move=0.5)), "is not that of img0061.nii.gz"),
    "turned": (_rewritten(lambda a, m: _bits(a[::-1], m @ np.diag([-1, 1, 1, 1]))), "is not that of img0061.nii.gz"),
    "scaled": (_scaled, "scaled in the header"),
    "no NIfTI": (lambda m: m.update({"label0061.nii.gz": b"nonsense"}), "label0061.nii.gz: cannot be read"),
    "empty": (lambda m: m.update({"label0061.nii.gz": gzip.compress(b"")}), "label0061.nii.gz: cannot be read"),
    "no header": (lambda m: m.update({"label0061.nii.gz": gzip.compress(b"x" * 400)}), "cannot be read"),
    "colours": (_rewritten(_colours), "expected integers"),
    "bomb": (lambda m: m.update({"label0061.nii.gz": gzip.compress(bytes(1 << 26))}), "unpacks to more than"),
    "huge header": (_huge, "shape (30000, 30000, 30000), but"),
    "cut off": (
        lambda m: m.update({"label0061.nii.gz": m["label0061.nii.gz"][:-60]}), "label0061.nii.gz: cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_validator_refuses_damage(damage, predictions, images, tmp_path, capsys):
    package("btcv", predictions, images, tmp_path / "good.zip", workers=1)
    assert validate("btcv", tmp_path / "good.zip", images) == (2, [])
    with zipfile.ZipFile(tmp_path / "good.zip") as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    spoil, message = DAMAGE[damage]
    spoil(members)
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    assert benchmark.main(["validate", "btcv", str(tmp_path / "bad.zip"), str(images)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "offset", "says"), [(1, 6, "cannot be read"), (99, 8, "cannot be read")])
def test_members_that_cannot_be_unpacked(predictions, images, tmp_path, capsys, flag, offset, says):
    """Encrypted, or compressed in a way that nobody knows: both local and central headers say so."""
    package("btcv", predictions, images, tmp_path / "good.zip", workers=1)
    raw = bytearray((tmp_path / "good.zip").read_bytes())
    for signature, further in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        place = raw.index(signature) + offset + further
        raw[place : place + 2] = struct.pack("<H", flag)
    (tmp_path / "bad.zip").write_bytes(raw)
    assert benchmark.main(["validate", "btcv", str(tmp_path / "bad.zip"), str(images)]) == 2
    assert says in capsys.readouterr().err


def test_the_validator_refuses_what_is_no_archive(predictions, images, tmp_path, capsys):
    package("btcv", predictions, images, tmp_path / "good.zip", workers=1)
    (tmp_path / "bad.zip").write_bytes((tmp_path / "good.zip").read_bytes()[:-300])
    assert benchmark.main(["validate", "btcv", str(tmp_path / "bad.zip"), str(images)]) == 2
    assert "is no zip file, or it is cut off" in capsys.readouterr().err
    assert benchmark.main(["validate", "btcv", str(tmp_path / "none.zip"), str(images)]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_separate_sides_of_the_prediction_are_kept(predictions, images, tmp_path):
    for path in (tmp_path / "truth").iterdir():
        shutil.copy(path, predictions / path.name)
    _describe(predictions, CLASSES)
    done = package("btcv", predictions, images, tmp_path / "a.zip", workers=1)
    assert done.sides == {}
    written = np.asarray(_read(tmp_path / "a.zip", "label0062.nii.gz").dataobj)
    assert np.array_equal(written, np.asarray(nibabel.load(tmp_path / "truth/btcv_0062.nii.gz").dataobj))


def test_modalities_of_amos(amos, tmp_path):
    predicted = tmp_path / "predicted"
    predicted.mkdir()
    for path in (amos / "imagesTs").iterdir():
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), predicted / path.name)
    _describe(predicted, {"spleen": 1})
    counts = {"mri": 2, "ct": 1, "all": 3}
    for modality, count in counts.items():
        package("amos", predicted, amos / "imagesTs", tmp_path / "a.zip", modality=modality, workers=1)
        for other in counts:
            cases, problems = validate("amos", tmp_path / "a.zip", amos / "imagesTs", other)
            assert cases == counts[other]
            assert bool(problems) == (other != modality)
        assert count == len(zipfile.ZipFile(tmp_path / "a.zip").namelist())
