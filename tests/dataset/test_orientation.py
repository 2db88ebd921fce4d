"""Turning volumes: against SimpleITK's and nibabel's own reorientation."""

import itertools

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.dataset.orientation import checked_orientation, is_oblique, orientation_of, turn_to
from ukbob_seg.errors import ConfigError

CODES = ["".join(p) for sides in itertools.product("LR", "PA", "SI") for p in itertools.permutations(sides)]


def volume(code: str) -> tuple[np.ndarray, Geometry]:
    """A volume of unlike axes, stored in an orientation."""
    image = sitk.GetImageFromArray(np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5))
    image.SetSpacing((0.7, 1.0, 3.0))
    image.SetOrigin((10.0, -20.0, 30.0))
    return parts(sitk.DICOMOrient(image, code))


def parts(image: sitk.Image) -> tuple[np.ndarray, Geometry]:
    array = sitk.GetArrayFromImage(image)
    return array, Geometry(array.shape, image.GetSpacing()[::-1], image.GetOrigin(), image.GetDirection())


@pytest.mark.parametrize("code", CODES[::5])
@pytest.mark.parametrize("wanted", ["RAS", "LPS", "ASL", "IPR"])
def test_turned_as_simpleitk_turns(code, wanted):
    array, geometry = volume(code)
    assert orientation_of(geometry) == code
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction)
    expected, grid = parts(sitk.DICOMOrient(image, wanted))
    turn = turn_to(geometry, wanted)
    assert np.array_equal(turn.apply(array), expected)
    assert grid.difference(turn.geometry(geometry), ("theirs", "ours")) is None
    assert np.array_equal(turn.undo(turn.apply(array)), array)
    channels = np.stack([array, -array])
    assert np.array_equal(turn.undo(turn.apply(channels)), channels)
    assert turn.is_identity == (code == wanted)


def test_letters_are_nibabels():
    array, geometry = volume("PIR")
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ np.reshape(geometry.direction, (3, 3)) @ np.diag(geometry.spacing_mm[::-1])
    image = nibabel.Nifti1Image(array.T, affine)
    assert nibabel.aff2axcodes(affine) == tuple("PIR")
    change = ornt_transform(io_orientation(affine), axcodes2ornt("RAS"))
    assert np.array_equal(turn_to(geometry, "RAS").apply(array), np.asarray(image.as_reoriented(change).dataobj).T)


def test_oblique_volumes():
    cos, sin = np.cos(0.9), np.sin(0.9)
    assert is_oblique(Geometry((2, 2, 2), (1, 1, 1), (0, 0, 0), (cos, -sin, 0, sin, cos, 0, 0, 0, 1)))
    cos, sin = np.cos(0.2), np.sin(0.2)
    assert not is_oblique(Geometry((2, 2, 2), (1, 1, 1), (0, 0, 0), (cos, -sin, 0, sin, cos, 0, 0, 0, 1)))


@pytest.mark.parametrize("code", ["RA", "RAX", "RLS", ["R", "A"], [1, 2, 3], "RASS"])
def test_other_letters_are_refused(code):
    with pytest.raises(ConfigError, match="such as RAS"):
        checked_orientation(code)
