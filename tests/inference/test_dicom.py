"""DICOM series in, DICOM Segmentations out: every voxel and position is read back by other programs."""

import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from threshold_network import REGIONS, Regions, blobs, model_folder, predictor_of, truth_of

pytest.importorskip("pydicom", reason="pip install 'ukbob_seg[dicom]'")
pytest.importorskip("highdicom", reason="pip install 'ukbob_seg[dicom]'")

import highdicom
import pydicom

from ukbob_seg.cli.predict import main
from ukbob_seg.conversion.dicom_series import read_series
from ukbob_seg.dataset.image_io import Geometry, read_labels, write_image
from ukbob_seg.demo.dixon_archives import write_series
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.inference.dicom_cases import choose_series, find_dicom_jobs
from ukbob_seg.inference.dicom_seg import coded_terms
from ukbob_seg.inference.predict import predict
from ukbob_seg.inference.predictor import PredictionSettings
from ukbob_seg.parallel import Part

SHAPE = (11, 20, 24)
GRID = Geometry(SHAPE, (3.0, 1.0, 0.7), (12.0, -40.0, 55.0))
SLOPE = 0.001  # stored whole numbers, intensities around 1


def _series(folder, seed=0, description="t1_vibe", oblique=0.0, number=4):
    """A series whose right segmentation is known; returns (image as stored, its series' geometry)."""
    image = np.clip(np.rint(blobs(SHAPE, seed)[0] / SLOPE), 0, None) * SLOPE
    write_series(folder, image, GRID, description, number, slope=SLOPE, oblique_degrees=oblique, seed=seed)
    return image


def _predictor(classes=None, **options):
    """Of a model whose spacing is the series', so that nothing is interpolated and the right answer is exact."""
    return predictor_of(PredictionSettings(step=1.0, classes=classes), spacing=GRID.spacing_mm, **options)


def _truth(image):
    return truth_of(image[None].astype(np.float32))


def _sitk_series(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def test_a_series_has_the_voxels_and_the_grid_that_another_reader_finds(tmp_path):
    image = _series(tmp_path / "case", oblique=12.0)
    (series,), problems = read_series(tmp_path / "case")
    assert problems == []
    assert series.problems == ()
    assert np.allclose(series.voxels(), image, atol=1e-6)
    other = _sitk_series(tmp_path / "case")
    assert np.allclose(sitk.GetArrayFromImage(other), series.voxels(), atol=1e-6)
    assert other.GetOrigin() == pytest.approx(series.geometry.origin_mm, abs=1e-4)
    assert other.GetSpacing() == pytest.approx(series.geometry.spacing_mm[::-1], abs=1e-4)
    assert other.GetDirection() == pytest.approx(series.geometry.direction, abs=1e-5)


@pytest.mark.parametrize("oblique", [0.0, 12.0])
def test_predictions_of_series_come_back_as_dicom(tmp_path, oblique):
    source, out = tmp_path / "in", tmp_path / "out"
    images = {name: _series(source / name, seed, oblique=oblique) for seed, name in enumerate(("ann", "bob"))}
    written = predict(_predictor(), source, out, quiet=True, dicom_seg=True)
    assert [path.name for path in written] == ["ann.nii.gz", "bob.nii.gz"]
    for name, image in images.items():
        expected = _truth(image)
        labels, geometry = read_labels(out / f"{name}.nii.gz")
        assert np.array_equal(labels, expected)
        (series,), _ = read_series(source / name)
        assert geometry.difference(series.geometry, ("", "")) is None
        _compare_segmentation(out / f"{name}_seg.dcm", series, expected, {1: ("low", 2), 2: ("high", 7)})
    assert not [path for path in out.iterdir() if path.name.startswith(".")]  # nothing temporary is left


def _compare_segmentation(path, series, expected, segments):
    """By highdicom, and slice by slice with pydicom alone."""
    found = highdicom.seg.segread(path)
    assert found.StudyInstanceUID == series.slices[0].dataset.StudyInstanceUID
    assert found.FrameOfReferenceUID == series.slices[0].dataset.FrameOfReferenceUID
    assert found.PatientID == series.slices[0].dataset.PatientID
    labels = {item.SegmentNumber: item.SegmentLabel for item in found.SegmentSequence}
    assert labels == {number: name for number, (name, _) in segments.items()}
    uids = [each.dataset.SOPInstanceUID for each in series.slices]
    pixels = found.get_pixels_by_source_instance(uids, segment_numbers=sorted(segments), combine_segments=False)
    for k, number in enumerate(sorted(segments)):
        assert np.array_equal(pixels[..., k] > 0, expected == segments[number][1])
    plain = pydicom.dcmread(path)
    frames = plain.pixel_array.reshape(-1, *expected.shape[1:])
    heights = {tuple(np.round(each.position_mm, 3)): k for k, each in enumerate(series.slices)}
    rebuilt = np.zeros_like(expected)
    for frame, item in zip(frames, plain.PerFrameFunctionalGroupsSequence, strict=True):
        position = tuple(np.round([float(v) for v in item.PlanePositionSequence[0].ImagePositionPatient], 3))
        number = item.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        rebuilt[heights[position]][frame > 0] = segments[number][1]
    assert np.array_equal(rebuilt, expected)
    shared = plain.SharedFunctionalGroupsSequence[0]
    orientation = [float(v) for v in shared.PlaneOrientationSequence[0].ImageOrientationPatient]
    first = series.slices[0]
    assert orientation == pytest.approx([*first.rows_mm, *first.columns_mm], abs=1e-6)
    assert [float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing] == pytest.approx(first.spacing_mm)


def test_one_series_parts_and_resuming(tmp_path):
    predictor = _predictor()
    image = _series(tmp_path / "alone")
    (written,) = predict(predictor, tmp_path / "alone", tmp_path / "one.nii.gz", quiet=True, dicom_seg=True)
    assert written == tmp_path / "one.nii.gz"
    assert np.array_equal(read_labels(written)[0], _truth(image))
    assert (tmp_path / "one_seg.dcm").is_file()
    for seed, name in enumerate(("a", "b", "c")):
        _series(tmp_path / "in" / name / "study" / "series", seed)
    out = tmp_path / "out"
    for number in (1, 2):
        predict(predictor, tmp_path / "in", out, part=Part(number, 2), quiet=True, dicom_seg=True)
    assert {path.name for path in out.glob("*_seg.dcm")} == {"a_seg.dcm", "b_seg.dcm", "c_seg.dcm"}
    (out / "b_seg.dcm").unlink()
    before = (out / "a.nii.gz").stat().st_mtime_ns, (out / "b.nii.gz").stat().st_mtime_ns
    predict(predictor, tmp_path / "in", out, resume=True, quiet=True, dicom_seg=True)
    assert (out / "b_seg.dcm").is_file()
    assert (out / "a.nii.gz").stat().st_mtime_ns == before[0]
    assert (out / "b.nii.gz").stat().st_mtime_ns > before[1]


def test_overlapping_regions_and_chosen_classes(tmp_path):
    image = _series(tmp_path / "case")
    regions = _predictor(dataset=REGIONS, networks=[Regions().eval()])
    predict(regions, tmp_path / "case", tmp_path / "out", quiet=True, dicom_seg=True)
    found = highdicom.seg.segread(tmp_path / "out" / "case_seg.dcm")
    (series,), _ = read_series(tmp_path / "case")
    uids = [each.dataset.SOPInstanceUID for each in series.slices]
    pixels = found.get_pixels_by_source_instance(uids, segment_numbers=[1, 2], combine_segments=False)
    truth = _truth(image)
    assert np.array_equal(pixels[..., 0] > 0, truth > 0)  # the whole holds the core
    assert np.array_equal(pixels[..., 1] > 0, truth == 7)
    one = _predictor(classes=("high",))
    predict(one, tmp_path / "case", tmp_path / "some", quiet=True, dicom_seg=True)
    found = highdicom.seg.segread(tmp_path / "some" / "case_seg.dcm")
    assert [item.SegmentLabel for item in found.SegmentSequence] == ["high"]
    pixels = found.get_pixels_by_source_instance(uids, segment_numbers=[1])
    assert np.array_equal(pixels[..., 0] > 0, truth == 7)


def test_an_empty_prediction_is_a_segmentation_too(tmp_path):
    write_series(tmp_path / "case", np.zeros(SHAPE) + 0.1, GRID, "t1", 3, slope=SLOPE)
    predict(_predictor(), tmp_path / "case", tmp_path / "out", quiet=True, dicom_seg=True)
    found = pydicom.dcmread(tmp_path / "out" / "case_seg.dcm")
    assert not found.pixel_array.any()
    assert len(found.SegmentSequence) == 2


def test_the_command_takes_dicom(tmp_path, capsys):
    image = _series(tmp_path / "in" / "ann")
    write_image(image.astype(np.float32), GRID, tmp_path / "nifti" / "ann_0000.nii.gz")
    model = model_folder(tmp_path)

    def run(source, output, *options):
        folders = ["-i", str(tmp_path / source), "-o", str(tmp_path / output)]
        return main([*folders, "-m", str(model), "--device", "cpu", *options])

    assert run("in", "out", "--dicom-seg", "--statistics") == 0
    assert (tmp_path / "out" / "ann_seg.dcm").is_file()
    assert (tmp_path / "out" / "ann_statistics.json").is_file()
    assert run("nifti", "other") == 0  # the same from NIfTI
    labels = read_labels(tmp_path / "out" / "ann.nii.gz")[0]
    assert np.array_equal(labels, read_labels(tmp_path / "other" / "ann.nii.gz")[0])
    assert set(np.unique(labels)) == {0, 2, 7}
    assert run("nifti", "third", "--dicom-seg") == 2
    assert "holds no DICOM files to refer to" in capsys.readouterr().err


def test_channels_are_series_by_contrast_or_by_name(tmp_path):
    for number, description in enumerate(("Dixon_W", "Dixon_F", "Dixon_in", "Dixon_opp", "t2_tse", "FLAIR axial")):
        _series(tmp_path / "case", number, description, number=number + 2)
    series, _ = read_series(tmp_path / "case")

    def names(channels):
        return [each.description for each in choose_series(series, channels)]

    assert names(("fat", "water", "in-phase", "out-of-phase")) == ["Dixon_F", "Dixon_W", "Dixon_in", "Dixon_opp"]
    assert names(("inphase", "outphase")) == ["Dixon_in", "Dixon_opp"]
    assert names(("flair", "t2")) == ["FLAIR axial", "t2_tse"]
    with pytest.raises(DatasetError, match="no series is the channel 'CT'"):
        names(("CT",))
    with pytest.raises(DatasetError, match="4 series are the channel 'dixon'"):
        names(("dixon",))
    assert choose_series(series[:1], ("anything",)) == [series[0]]


def test_irregular_series_name_the_case(tmp_path):
    _series(tmp_path / "in" / "ann")
    _series(tmp_path / "in" / "bob", 1)
    sorted((tmp_path / "in" / "bob").iterdir())[4].unlink()
    with pytest.raises(DatasetError, match=r"case bob .*1 slice missing"):
        predict(_predictor(), tmp_path / "in", tmp_path / "out", quiet=True)
    spec = predictor_of().spec
    assert find_dicom_jobs(tmp_path / "none", tmp_path, spec) == []
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no DICOM")
    assert find_dicom_jobs(tmp_path / "text", tmp_path, spec) == []
    shutil.copy(tmp_path / "text" / "a.txt", tmp_path / "in" / "ann" / "notes.txt")
    (job, _) = find_dicom_jobs(tmp_path / "in", tmp_path / "out", spec, dicom_seg=True)
    assert (job.name, job.output.name, job.segmentation.name) == ("ann", "ann.nii.gz", "ann_seg.dcm")


def test_damaged_tags_name_the_case(tmp_path, capsys):
    _series(tmp_path / "in" / "ann")
    path = sorted((tmp_path / "in" / "ann").iterdir())[3]
    dataset = pydicom.dcmread(path)
    dataset.RescaleSlope = None
    dataset.save_as(path)
    model = model_folder(tmp_path)
    command = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", str(model), "--device", "cpu"]
    assert main(command) == 2
    assert f"{path.name}: RescaleSlope is empty" in capsys.readouterr().err
    dataset.RescaleSlope = SLOPE
    dataset.save_as(path)
    for each in (tmp_path / "in" / "ann").iterdir():  # no volume suffers, but nothing can refer to these
        dataset = pydicom.dcmread(each)
        del dataset.SOPClassUID
        dataset.save_as(each)
    assert main([*command, "--dicom-seg"]) == 2
    said = capsys.readouterr().err
    assert "no DICOM Segmentation can refer to series 4 (" in said
    assert "predict without --dicom-seg" in said
    assert (tmp_path / "out" / "ann.nii.gz").is_file()


def test_missing_packages_are_named(tmp_path, monkeypatch):
    import sys

    _series(tmp_path / "case")
    spec = predictor_of().spec
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ConfigError, match=r"highdicom: pip install 'ukbob_seg\[dicom\]'"):
        find_dicom_jobs(tmp_path / "case", tmp_path / "out", spec, dicom_seg=True)
    assert len(find_dicom_jobs(tmp_path / "case", tmp_path / "out", spec)) == 1
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ConfigError, match="DICOM files need pydicom"):
        find_dicom_jobs(tmp_path / "case", tmp_path / "out", spec)


@pytest.mark.parametrize(
    ("name", "code", "side"),
    [
        ("liver", "10200004", None), ("kidney_left", "64033007", "7771000"), ("Right lung", "39607008", "24028007"),
        ("urinary_bladder", "89837001", None), ("aorta", "15825003", None), ("pancreas", "15776009", None),
        ("tumour core", "108369006", None), ("some new thing", "85756007", None),
        ("femur_right", "71341001", "24028007"),
    ],
)  # fmt: skip
def test_terms_are_those_of_snomed(name, code, side):
    _, kind, modifier = coded_terms(name)
    assert kind.value == code
    assert kind.scheme_designator == "SCT"
    assert (modifier.value if modifier is not None else None) == side
