"""Geometry must survive a round trip exactly, and every unreadable file must be named."""

import gzip
import math
import zlib

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from ukbob_seg.dataset import image_io
from ukbob_seg.dataset.image_io import (
    Geometry,
    read_geometry,
    read_image,
    read_labels,
    read_stored,
    write_image,
    write_labels,
    write_labels_like,
)
from ukbob_seg.errors import DatasetError

COS, SIN = math.cos(0.4), math.sin(0.4)
OBLIQUE = (COS, -SIN, 0.0, SIN, COS, 0.0, 0.0, 0.0, -1.0)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("direction", [(1.0, 0, 0, 0, 1, 0, 0, 0, 1), (-1.0, 0, 0, 0, 1, 0, 0, 0, 1), OBLIQUE])
def test_round_trip_keeps_voxels_and_geometry(tmp_path, rng, ending, direction):
    geometry = Geometry((5, 6, 7), (3.0, 1.0, 0.7), (10.5, -20.25, 3.0), direction)
    array = rng.normal(size=(5, 6, 7)).astype(np.float32)
    write_image(array, geometry, tmp_path / f"a{ending}")
    read, found = read_image([tmp_path / f"a{ending}"])
    assert np.array_equal(read[0], array)
    assert geometry.difference(found, ("written", "read")) is None
    assert geometry.difference(read_geometry(tmp_path / f"a{ending}"), ("written", "header")) is None


def test_axes_agree_with_an_independent_reader(tmp_path):
    """nibabel's (x, y, z) array and affine must describe the same voxels."""
    array = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    write_image(array, Geometry((2, 3, 4), (3.0, 1.0, 0.7), (1.0, 2.0, 3.0)), tmp_path / "a.nii.gz")
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert np.array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), array)
    assert np.allclose(image.header.get_zooms(), (0.7, 1.0, 3.0))
    assert np.allclose(image.affine[:3, 3], (-1.0, -2.0, 3.0))  # NIfTI is RAS, ITK is LPS


def test_left_right_axis():
    assert Geometry((1, 1, 1), (1, 1, 1)).left_right_axis == 2
    sagittal = (0.0, 0, 1, 1, 0, 0, 0, 1, 0)  # x index runs anterior-posterior, z index runs left-right
    assert Geometry((1, 1, 1), (1, 1, 1), (0, 0, 0), sagittal).left_right_axis == 0
    half = math.sqrt(0.5)
    assert Geometry((1, 1, 1), (1, 1, 1), (0, 0, 0), (half, -half, 0, half, half, 0, 0, 0, 1)).left_right_axis is None


def test_patient_axes():
    assert Geometry((1, 1, 1), (1, 1, 1)).patient_axes == ((0, False), (1, False), (2, False))
    ras = (-1.0, 0, 0, 0, -1, 0, 0, 0, 1)
    assert Geometry((1, 1, 1), (1, 1, 1), (0, 0, 0), ras).patient_axes == ((0, False), (1, True), (2, True))
    # x index runs to the back, y index down, z index to the left
    sagittal = (0.0, 0, 1, 1, 0, 0, 0, -1, 0)
    assert Geometry((1, 1, 1), (1, 1, 1), (0, 0, 0), sagittal).patient_axes == ((1, True), (2, False), (0, False))
    c, s = math.cos(0.7), math.sin(0.7)
    turned = (c, 0, s, 0, 1, 0, -s, 0, c)  # by 40 degrees about the front-back axis
    assert Geometry((1, 1, 1), (1, 1, 1), (0, 0, 0), turned).patient_axes == ((0, False), (1, False), (2, False))


def test_channels_on_different_grids(tmp_path):
    write_image(np.ones((4, 4, 4), np.float32), Geometry((4, 4, 4), (1, 1, 1)), tmp_path / "a_0000.nii.gz")
    write_image(np.ones((4, 4, 4), np.float32), Geometry((4, 4, 4), (1, 1, 2)), tmp_path / "a_0001.nii.gz")
    with pytest.raises(DatasetError, match=r"a_0001.*spacing_mm differs: \(1, 1, 1\).*\(1, 1, 2\)"):
        read_image([tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"])


def _write(path, array):
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(path))


def test_damaged_files_are_named(tmp_path, rng):
    good = tmp_path / "good.nii.gz"
    _write(good, rng.normal(size=(20, 20, 20)).astype(np.float32))
    whole = good.read_bytes()
    for name, content in {
        "truncated.nii.gz": whole[: len(whole) // 2],
        "truncated_inside.nii.gz": gzip.compress(gzip.decompress(whole)[:5000]),
        "garbage.nii.gz": b"this is no image" * 50,
        "empty.nii.gz": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DatasetError, match=name):
            read_image([tmp_path / name])
    with pytest.raises(DatasetError, match=r"absent\.nii\.gz does not exist"):
        read_image([tmp_path / "absent.nii.gz"])


def test_wrong_dimensions(tmp_path):
    _write(tmp_path / "flat.nii.gz", np.ones((5, 6), np.float32))
    with pytest.raises(DatasetError, match=r"flat.nii.gz has 2 dimensions, expected 3"):
        read_image([tmp_path / "flat.nii.gz"])
    _write(tmp_path / "series.nii.gz", np.ones((3, 4, 5, 6), np.float32))
    with pytest.raises(DatasetError, match=r"series.nii.gz has 4 dimensions, expected 3; write one file per channel"):
        read_image([tmp_path / "series.nii.gz"])


def test_nan_voxels_are_counted(tmp_path):
    array = np.ones((4, 4, 4), np.float32)
    array[0, 0, :2] = np.nan
    array[1, 1, 1] = np.inf
    _write(tmp_path / "nan.nii.gz", array)
    with pytest.raises(DatasetError, match=r"nan.nii.gz has 3 NaN or infinite voxels"):
        read_image([tmp_path / "nan.nii.gz"])


def test_labels_stored_as_float(tmp_path):
    _write(tmp_path / "whole.nii.gz", np.array([[[0.0, 1.0, 300.0]]], np.float32))
    labels, _ = read_labels(tmp_path / "whole.nii.gz")
    assert labels.dtype.kind == "i"
    assert labels.ravel().tolist() == [0, 1, 300]
    _write(tmp_path / "soft.nii.gz", np.array([[[0.0, 0.5, 1.0]]], np.float32))
    with pytest.raises(DatasetError, match=r"soft.nii.gz has 1 voxels that are no whole numbers"):
        read_labels(tmp_path / "soft.nii.gz")


def test_write_refuses_a_wrong_shape_and_leaves_no_file(tmp_path):
    with pytest.raises(DatasetError, match="does not fit"):
        write_labels(np.zeros((2, 2, 2), np.uint8), Geometry((2, 2, 3), (1, 1, 1)), tmp_path / "a.nii.gz")
    assert list(tmp_path.iterdir()) == []
    write_labels(np.full((2, 2, 3), 300, np.int64), Geometry((2, 2, 3), (1, 1, 1)), tmp_path / "a.nii.gz")
    assert read_labels(tmp_path / "a.nii.gz")[0].max() == 300
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]


def test_real_files(data_root):
    array, geometry = read_image([data_root / "totalsegmentator_ct" / "ct_0000.nii.gz"])
    assert array.shape == (1, *geometry.shape)
    assert sorted(geometry.shape) == [101, 112, 122]
    assert np.allclose(geometry.spacing_mm, 3.0, atol=0.01)


def test_zlib_reads_the_same_as_isal(tmp_path, rng, monkeypatch):
    """Both decompressors, a volume of several blocks; truncation and changed bytes are noticed by both."""
    path = tmp_path / "a.nii.gz"
    volume = rng.integers(-500, 2000, (20, 90, 100)).astype(np.int16)
    write_image(volume, Geometry(volume.shape, (2.0, 1.0, 0.5)), path)
    good = path.read_bytes()
    for module, error in ((image_io.gzip, image_io.GzipError), (gzip, zlib.error)):
        monkeypatch.setattr(image_io, "gzip", module)
        monkeypatch.setattr(image_io, "GzipError", error)
        monkeypatch.setattr(image_io, "_UNREADABLE", (*image_io._UNREADABLE, error))
        path.write_bytes(good)
        stored, _ = read_stored(path)
        assert stored.dtype == np.int16
        assert (stored == volume).all()
        assert (read_image([path])[0][0] == volume).all()
        for damaged in (good[:-5], good[: len(good) // 2], good[:-6] + b"\0\0" + good[-4:]):
            path.write_bytes(damaged)
            with pytest.raises(DatasetError, match="corrupt"):
                read_stored(path)


def test_stored_voxels_keep_their_type_and_order(tmp_path):
    path = tmp_path / "scaled.nii.gz"
    stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    for slope in (2.0, -2.0):
        image = nibabel.Nifti1Image(stored, np.eye(4))
        image.header.set_slope_inter(slope, 7)
        nibabel.save(image, path)
        intensities = read_image([path])[0][0]
        found, geometry = read_stored(path)
        assert found.shape == geometry.shape == (4, 3, 2)
        assert found.dtype == np.int16 or slope < 0
        assert (np.argsort(found, axis=None) == np.argsort(intensities, axis=None)).all()


def test_labels_like_an_image_have_its_matrices_bit_by_bit(tmp_path, rng):
    """Though the image is scaled, oblique, and its two matrices differ."""
    matrix = np.array([[-0.7 * COS, 0.9 * SIN, 0, 3.3], [0.7 * SIN, 0.9 * COS, 0, -4.1], [0, 0, 3, 9.7], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(rng.normal(size=(7, 6, 5)).astype(np.float32) * 1000, matrix)
    image.set_qform(np.diag([0.7, 0.9, 3, 1]), code=1)
    image.set_sform(matrix, code=2)
    image.header.set_data_dtype(np.int16)  # stored with a slope
    nibabel.save(image, tmp_path / "image.nii.gz")
    labels = rng.integers(0, 14, (5, 6, 7))
    write_labels_like(labels, tmp_path / "image.nii.gz", tmp_path / "labels.nii.gz")
    like, written = nibabel.load(tmp_path / "image.nii.gz"), nibabel.load(tmp_path / "labels.nii.gz")
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(written.dataobj).T, labels)
    assert (written.dataobj.slope, written.dataobj.inter) == (1, 0)
    for field in ("qform_code", "sform_code", "pixdim", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x"):
        assert np.array_equal(written.header[field], like.header[field]), field
    read, _ = read_labels(tmp_path / "labels.nii.gz")
    assert np.array_equal(read, labels)
    for wrong, message in ((labels + 250, "do not fit into uint8"), (labels[:-1], "does not fit the grid")):
        with pytest.raises(DatasetError, match=message):
            write_labels_like(wrong, tmp_path / "image.nii.gz", tmp_path / "labels.nii.gz")
    (tmp_path / "image.nii.gz").write_bytes(b"nonsense")
    with pytest.raises(DatasetError, match="cannot be read"):
        write_labels_like(labels, tmp_path / "image.nii.gz", tmp_path / "labels.nii.gz")
