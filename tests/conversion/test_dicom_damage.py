"""Damaged DICOM: every malformed tag and every flipped byte is a sentence about a file, never a traceback."""

import warnings
import zipfile
from io import BytesIO

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="pip install 'ukbob_seg[dicom]'")

import pydicom

from ukbob_seg.cli.convert import main
from ukbob_seg.conversion.dicom_pixels import pixels_of
from ukbob_seg.conversion.dicom_series import read_series
from ukbob_seg.conversion.ukbb_case import StitchOptions, stitch_archive
from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.demo.dixon_archives import ArchivePlan, write_archive, write_series
from ukbob_seg.errors import DatasetError

GRID = Geometry((8, 6, 6), (8.0, 3.0, 2.5), (-15.0, -14.0, 4.0))
ONE = ArchivePlan(stations=1, localiser=False)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """name -> content of an honest archive of one station."""
    path = tmp_path_factory.mktemp("honest") / "1000000_20201_2_0.zip"
    image = np.rint(np.random.default_rng(1).uniform(0, 900, (4, *GRID.shape)))
    write_archive(path, image, GRID, ONE, seed=3)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _archive(path, members, name=None, content=b""):
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for each, original in members.items():
            archive.writestr(each, content if each == name else original)
    return path


def _raw(members, tag, value):
    """The first DICOM file with a tag's bytes replaced, whatever pydicom thinks of them; (name, content)."""
    name = next(each for each in members if each.endswith(".dcm"))
    dataset = pydicom.dcmread(BytesIO(members[name]))
    vr = dataset[tag].VR if tag in dataset else "DS"
    key = pydicom.tag.Tag(tag)
    dataset[key] = pydicom.dataelem.RawDataElement(key, vr, len(value), value, 0, False, True)
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(buffer)
    return name, buffer.getvalue()


DAMAGE = [
    ("RescaleSlope", b""), ("RescaleSlope", b"one "), ("RescaleSlope", b"1\\2 "), ("RescaleIntercept", b""),
    ("RescaleSlope", b"0 "), ("RescaleSlope", b"nan "), ("Rows", b""), ("Columns", b""), ("SamplesPerPixel", b""),
    ("PixelSpacing", b"3 "), ("PixelSpacing", b"3\\2\\1 "), ("PixelSpacing", b"a\\b "), ("PixelSpacing", b"0\\1 "),
    ("ImagePositionPatient", b"1\\2 "), ("ImagePositionPatient", b"1\\2\\x "), ("ImagePositionPatient", b"1\\2\\1e300"),
    ("ImageOrientationPatient", b"1\\0\\0 "), ("ImageOrientationPatient", b""), ("SeriesNumber", b"five"),
    ("SeriesNumber", b"1\\2 "), ("AcquisitionNumber", b"x "), ("SliceThickness", b"thin"), ("NumberOfFrames", b"many"),
    ("SeriesInstanceUID", b""),
]  # fmt: skip


@pytest.mark.parametrize(("tag", "value"), DAMAGE, ids=str)
def test_a_malformed_tag_is_a_problem_of_its_archive(tmp_path, members, tag, value):
    name, content = _raw(members, tag, value)
    found = stitch_archive(_archive(tmp_path / "a.zip", members, name, content), StitchOptions(stations=1))
    assert found.image is None
    assert any(name in problem and tag in problem for problem in found.problems), found.problems


def test_one_damaged_archive_does_not_end_the_cohort(tmp_path, members, capsys):
    for number, (tag, value) in enumerate((("RescaleSlope", b""), ("Rows", b""), ("ImagePositionPatient", b"1\\2 "))):
        _archive(tmp_path / "in" / f"{number}_20201_2_0.zip", members, *_raw(members, tag, value))
    _archive(tmp_path / "in" / "7_20201_2_0.zip", members)
    folder = tmp_path / "Dataset020_X"
    command = ["ukbb", "-i", str(tmp_path / "in"), "-o", str(folder), "--stations", "1", "--workers", "1"]
    assert main(command) == 2
    assert "3 archives are incomplete" in capsys.readouterr().err
    assert main([*command, "--skip-incomplete"]) == 0
    assert len(list((folder / "imagesTr").iterdir())) == 4
    assert "RescaleSlope is empty and must be one number" in (folder / "incomplete.csv").read_text()


def test_flipped_bytes_never_end_in_a_traceback(tmp_path, members):
    """Warnings are errors here, so that a silent overflow is found as well."""
    generator = np.random.default_rng(7)
    names = [each for each in members if each.endswith(".dcm")]
    said = 0
    for run in range(40):
        name = str(generator.choice(names))
        content = bytearray(members[name])
        header = content.find(b"\xe0\x7f\x10\x00")  # pixel data: flips there are another picture, no damage
        for place in generator.integers(128, header + 8, size=1 + run % 4):
            content[place] ^= int(generator.integers(1, 256))
        found = stitch_archive(_archive(tmp_path / "a.zip", members, name, bytes(content)), StitchOptions(stations=1))
        assert (found.image is None) == bool(found.problems)
        said += bool(found.problems)
    assert said > 8


def test_an_empty_number_of_a_series_is_no_damage(tmp_path, members):
    """Tags that the standard allows to be empty."""
    content = dict(members)
    for tag in ("SeriesNumber", "SliceThickness", "AcquisitionNumber"):
        name, changed = _raw(content, tag, b"")
        content[name] = changed
    assert stitch_archive(_archive(tmp_path / "a.zip", content), StitchOptions(stations=1)).problems == ()


@pytest.fixture
def compressed(tmp_path):
    """A slice as JPEG Lossless, which pydicom has no decoder for by itself."""
    import SimpleITK as sitk

    stored = np.random.default_rng(2).integers(0, 4000, (1, 20, 24)).astype(np.uint16)
    writer = sitk.ImageFileWriter()
    writer.SetFileName(tmp_path / "x.dcm")
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    writer.Execute(sitk.GetImageFromArray(stored))
    dataset = pydicom.dcmread(tmp_path / "x.dcm")
    assert dataset.file_meta.TransferSyntaxUID == pydicom.uid.JPEGLosslessSV1
    for tag in ("RescaleSlope", "RescaleIntercept"):
        if tag in dataset:
            del dataset[tag]
    return dataset, stored[0]


def test_jpeg_lossless_is_read_without_further_packages(compressed, monkeypatch):
    dataset, stored = compressed
    monkeypatch.setattr("ukbob_seg.conversion.dicom_pixels._undecodable", lambda syntax: True)
    assert np.array_equal(pixels_of(dataset, "x.dcm"), stored)
    dataset.RescaleSlope, dataset.RescaleIntercept = 0.5, -10
    assert pixels_of(dataset, "x.dcm") == pytest.approx(stored * 0.5 - 10)
    dataset.PixelData = dataset.PixelData[:60]
    with pytest.raises(DatasetError, match=r"x\.dcm is damaged or truncated"):
        pixels_of(dataset, "x.dcm")


def test_a_decoder_that_is_missing_is_named(compressed, monkeypatch):
    dataset, _ = compressed
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
    monkeypatch.setattr("ukbob_seg.conversion.dicom_pixels._undecodable", lambda syntax: True)
    with pytest.raises(DatasetError, match="which nothing installed reads; pip install pylibjpeg pylibjpeg-openjpeg"):
        pixels_of(dataset, "x.dcm")


def test_several_people_in_a_folder_are_refused(tmp_path):
    for seed in (1, 2):
        write_series(tmp_path / "case" / str(seed), np.ones(GRID.shape), GRID, "t1", seed, seed=seed)
    _, problems = read_series(tmp_path / "case")
    assert len(problems) == 1
    assert "images of 2 studies (StudyInstanceUID) are in one place" in problems[0]


def test_files_that_are_no_dicom_are_not_read_as_a_whole(tmp_path, monkeypatch):
    from ukbob_seg.conversion.dicom_files import ArchiveLimits, read_files

    write_series(tmp_path / "case", np.ones(GRID.shape), GRID, "t1", 1)
    (tmp_path / "case" / "video.avi").write_bytes(bytes(50_000))
    found = dict(read_files(tmp_path / "case", ArchiveLimits(file_bytes=20_000)))
    assert len(found["video.avi"]) == 132
    with pytest.raises(DatasetError, match="no DICOM slice is as large"):
        dict(read_files(tmp_path / "case", ArchiveLimits(file_bytes=200)))
