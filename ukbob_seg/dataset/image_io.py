"""Reading and writing volumes. The only place that knows SimpleITK's x, y, z order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ukbob_seg.errors import DatasetError
from ukbob_seg.files import atomic_path

sitk.ProcessObject.SetGlobalWarningDisplay(False)

GEOMETRY_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Geometry:
    """Where a volume's voxels lie in the patient.

    Attributes:
        shape: voxels (z, y, x).
        spacing_mm: voxel size (z, y, x).
        origin_mm: position of the first voxel in LPS coordinates, (x, y, z).
        direction: row-major 3x3 matrix whose columns are the directions of the x, y, z index axes in LPS.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)

    def difference(self, other: Geometry, names: tuple[str, str]) -> str | None:
        """One phrase naming the first property in which two geometries differ, or None when they agree."""
        for what in ("shape", "spacing_mm", "origin_mm", "direction"):
            mine, theirs = getattr(self, what), getattr(other, what)
            tolerance = 0.0 if what == "shape" else GEOMETRY_TOLERANCE
            scale = max(self.spacing_mm) if what == "origin_mm" else 1.0
            if not np.allclose(mine, theirs, rtol=0, atol=tolerance * scale):
                return f"{what} differs: {_short(mine)} in {names[0]}, {_short(theirs)} in {names[1]}"
        return None

    @property
    def left_right_axis(self) -> int | None:
        """Array axis (0 = z, 1 = y, 2 = x) that runs most nearly left-right; None when it is too oblique to say."""
        to_left = np.abs(np.asarray(self.direction).reshape(3, 3)[0])
        axis = int(np.argmax(to_left))
        return 2 - axis if to_left[axis] > 0.8 else None


def _short(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _load(path: Path) -> sitk.Image:
    """Read a file as a 3D SimpleITK image, or say in one sentence why not."""
    if not Path(path).is_file():
        raise DatasetError(f"{path} does not exist")
    if os.path.getsize(path) == 0:
        raise DatasetError(f"{path} is empty (0 bytes); copy it again")
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        text = str(error)
        if "orthonormal" in text:
            raise DatasetError(
                f"{path}: the orientation matrix is sheared (not orthonormal); resample it to a regular grid first"
            ) from error
        raise DatasetError(f"{path} cannot be read: it is corrupt, truncated or not an image; copy it again") from error
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[..., 0]
    if image.GetDimension() != 3:
        raise DatasetError(
            f"{path} has {image.GetDimension()} dimensions, expected 3; "
            + (
                "write one file per channel (CASE_0000, CASE_0001, ...)"
                if image.GetDimension() > 3
                else "only volumes are supported"
            )
        )
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise DatasetError(
            f"{path} has {image.GetNumberOfComponentsPerPixel()} values per voxel, expected 1; "
            "write one file per channel (CASE_0000, CASE_0001, ...)"
        )
    return image


def _geometry(image: sitk.Image) -> Geometry:
    x, y, z = image.GetSize()
    sx, sy, sz = image.GetSpacing()
    return Geometry((z, y, x), (sz, sy, sx), tuple(image.GetOrigin()), tuple(image.GetDirection()))


def read_image(paths: Sequence[Path]) -> tuple[np.ndarray, Geometry]:
    """Read the channels of one case.

    Args:
        paths: one file per channel, in channel order.

    Returns:
        (C, Z, Y, X) float32 array and the geometry that all channels share.

    Raises:
        DatasetError: unreadable, not a volume, NaN or infinite voxels, or channels on different grids.
    """
    array: np.ndarray | None = None
    geometry: Geometry | None = None
    for channel, path in enumerate(paths):
        image = _load(path)
        here = _geometry(image)
        if geometry is None or array is None:
            geometry = here
            array = np.empty((len(paths), *here.shape), dtype=np.float32)
        difference = geometry.difference(here, (Path(paths[0]).name, Path(path).name))
        if difference is not None:
            raise DatasetError(f"{path}: {difference}; resample the channels to one grid")
        array[channel] = sitk.GetArrayViewFromImage(image)
        finite = np.isfinite(array[channel])
        if not finite.all():
            raise DatasetError(
                f"{path} has {int(finite.size - finite.sum())} NaN or infinite voxels; replace them (for example by 0)"
            )
    if array is None or geometry is None:
        raise DatasetError("a case without image files cannot be read")
    return array, geometry


def read_labels(path: Path) -> tuple[np.ndarray, Geometry]:
    """Read a label map.

    Returns:
        (Z, Y, X) integer array of file values (uint8, uint16 or int32) and its geometry.

    Raises:
        DatasetError: unreadable, not a volume, or values that are no whole numbers.
    """
    image = _load(path)
    labels = sitk.GetArrayFromImage(image)
    if labels.dtype.kind == "f":
        whole = np.rint(labels)
        wrong = int((~(np.abs(labels - whole) < 1e-3)).sum())
        if wrong:
            raise DatasetError(
                f"{path} has {wrong} voxels that are no whole numbers; a label map must hold integers "
                "(was it resampled with linear interpolation?)"
            )
        labels = whole.astype(np.int32)
    if labels.dtype not in (np.uint8, np.uint16, np.int32):
        if labels.size and (int(labels.max()) > 2**31 - 1 or int(labels.min()) < -(2**31)):
            raise DatasetError(f"{path} has label values beyond 32 bits; a label map must hold small integers")
        labels = labels.astype(np.int32)
    return labels, _geometry(image)


def read_geometry(path: Path) -> Geometry:
    """Read only the header of a volume."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DatasetError(f"{path} cannot be read: it is corrupt or not an image; copy it again") from error
    if reader.GetDimension() != 3:
        raise DatasetError(f"{path} has {reader.GetDimension()} dimensions, expected 3")
    x, y, z = reader.GetSize()
    sx, sy, sz = reader.GetSpacing()
    return Geometry((z, y, x), (sz, sy, sx), tuple(reader.GetOrigin()), tuple(reader.GetDirection()))


def write_image(array: np.ndarray, geometry: Geometry, path: Path) -> None:
    """Write a (Z, Y, X) volume with the given geometry, atomically.

    Raises:
        DatasetError: the array does not have the geometry's shape.
    """
    if tuple(array.shape) != tuple(geometry.shape):
        raise DatasetError(f"{path}: array of shape {array.shape} does not fit a grid of {geometry.shape}")
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    image.SetSpacing(tuple(float(v) for v in reversed(geometry.spacing_mm)))
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction)
    with atomic_path(Path(path)) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            raise DatasetError(
                f"cannot write {path}: check the file ending, permissions and free disk space"
            ) from error


def write_labels(labels: np.ndarray, geometry: Geometry, path: Path) -> None:
    """Write a (Z, Y, X) label map of file values (stored as uint8 or uint16), atomically."""
    if labels.dtype not in (np.uint8, np.uint16):
        labels = labels.astype(np.uint8 if labels.size == 0 or labels.max() <= 255 else np.uint16)
    write_image(labels, geometry, path)
