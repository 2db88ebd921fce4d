"""Reading and writing volumes. The only place that knows the x, y, z order of files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import nibabel.nifti1
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.fileholders import FileHolder
from nibabel.spatialimages import HeaderDataError

from ukbob_seg.errors import DatasetError, UkbobError
from ukbob_seg.files import atomic_path

try:  # decompresses faster than zlib, where it is available
    from isal import igzip as gzip
    from isal.isal_zlib import error as GzipError
except ImportError:
    import gzip  # type: ignore[no-redef]
    from zlib import error as GzipError  # type: ignore[assignment]

sitk.ProcessObject.SetGlobalWarningDisplay(False)

GEOMETRY_TOLERANCE = 1e-3
_BLOCK_BYTES = 2**18
_UNREADABLE: tuple[Any, ...] = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    GzipError,
    ImageFileError,
    HeaderDataError,
)


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

    @property
    def patient_axes(self) -> tuple[tuple[int, bool], tuple[int, bool], tuple[int, bool]]:
        """For superior, posterior and left in turn: the array axis that runs most nearly there, and whether backwards.

        Oblique axes are told apart by the assignment whose directions fit best together. An axial scan in LPS has
        ``((0, False), (1, False), (2, False))``.
        """
        # Rows: superior, posterior, left; columns: z, y, x.
        toward = np.asarray(self.direction).reshape(3, 3)[::-1, ::-1]
        best = max(permutations(range(3)), key=lambda axes: float(np.abs(toward[range(3), list(axes)]).sum()))
        superior, posterior, left = ((axis, bool(toward[row, axis] < 0)) for row, axis in enumerate(best))
        return superior, posterior, left


def _short(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def read_geometry(path: Path) -> Geometry:
    """Read only the header of a volume.

    Raises:
        DatasetError: missing, unreadable, or not one scalar volume.
    """
    if not Path(path).is_file():
        raise DatasetError(f"{path} does not exist")
    if os.path.getsize(path) == 0:
        raise DatasetError(f"{path} is empty (0 bytes); copy it again")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    if str(path).endswith((".nii", ".nii.gz")):
        reader.SetImageIO("NiftiImageIO")  # otherwise every format is asked in turn
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise DatasetError(
                f"{path}: the orientation matrix is sheared (not orthonormal); resample it to a regular grid first"
            ) from error
        raise DatasetError(f"{path} cannot be read: it is corrupt, truncated or not an image; copy it again") from error
    size = [*reader.GetSize()]
    while len(size) > 3 and size[-1] == 1:
        size.pop()
    if len(size) != 3:
        remedy = "write one file per channel (CASE_0000, CASE_0001, ...)" if len(size) > 3 else "give volumes"
        raise DatasetError(f"{path} has {len(size)} dimensions, expected 3; {remedy}")
    if reader.GetNumberOfComponents() != 1:
        raise DatasetError(
            f"{path} has {reader.GetNumberOfComponents()} values per voxel, expected 1; "
            "write one file per channel (CASE_0000, CASE_0001, ...)"
        )
    axes = reader.GetDimension()
    x, y, z = size
    sx, sy, sz = reader.GetSpacing()[:3]
    matrix = np.asarray(reader.GetDirection()).reshape(axes, axes)[:3, :3]
    return Geometry((z, y, x), (sz, sy, sx), tuple(reader.GetOrigin()[:3]), tuple(float(v) for v in matrix.ravel()))


def largest_voxels(paths: Sequence[Path]) -> float:
    """Voxels of the largest of some files, judged by its header: what a memory estimate needs; 0 without files."""
    if not paths:
        return 0.0
    try:
        return float(np.prod(read_geometry(max(paths, key=lambda path: path.stat().st_size)).shape, dtype=float))
    except DatasetError:  # reported when its turn comes
        return 0.0


def _read_voxels(path: Path, geometry: Geometry, scaled: bool = True) -> np.ndarray:
    """The voxels of a file as (Z, Y, X).

    NIfTI is read by nibabel: SimpleITK returns a truncated NIfTI file without complaint and turns NaN into 0.

    Args:
        path: of the file.
        geometry: of the file.
        scaled: apply the header's slope and intercept, where they change anything; otherwise the voxels keep the type
            and the numbers they are stored in.
    """
    try:
        if str(path).endswith(".nii.gz"):
            with gzip.open(path, "rb") as stream:
                holder = FileHolder(fileobj=_InBlocks(stream))  # type: ignore[arg-type]
                image = nibabel.nifti1.Nifti1Image.from_file_map({"image": holder}, mmap=False)
                array = _nifti_voxels(image, scaled)
                while stream.read(2**20):  # the checksum stands at the end
                    pass
        elif str(path).endswith(".nii"):
            array = _nifti_voxels(nibabel.nifti1.load(path), scaled)
        else:
            array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    except MemoryError as error:
        raise _too_large(path, geometry) from (error if _may_be_true(path, geometry) else None)
    except _UNREADABLE as error:
        raise DatasetError(f"{path} cannot be read: it is corrupt or truncated; copy it again") from error
    return array.reshape(geometry.shape)


def _too_large(path: Path, geometry: Geometry) -> DatasetError:
    return DatasetError(
        f"{path}: its header says {' x '.join(map(str, geometry.shape))} voxels, more than fit into memory; "
        "is the file damaged?"
    )


def _may_be_true(path: Path, geometry: Geometry) -> bool:
    """Whether a file can hold as many voxels as its header says: no compression in use makes one of 1032 bytes."""
    return math.prod(geometry.shape) <= 1032 * path.stat().st_size


class _InBlocks:
    """A stream that fills a buffer block by block: decompressors first make a copy of all that is asked for at once."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def read(self, size: int = -1) -> bytes:
        """Of the stream; like ``write`` written out, as nibabel looks for both in the class (from Python 3.12 on)."""
        return self._stream.read(size)

    def write(self, data: Any) -> int:
        """Of the stream, which is open for reading."""
        return self._stream.write(data)

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the stream goes; returns the bytes read."""
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view):
            count = self._stream.readinto(view[done : done + _BLOCK_BYTES])
            if not count:
                break
            done += count
        return done


def _nifti_voxels(image: nibabel.nifti1.Nifti1Image, scaled: bool) -> np.ndarray:
    stored: Any = image.dataobj
    return (np.asarray(stored) if scaled or stored.slope < 0 else stored.get_unscaled()).T


def read_stored(path: Path) -> tuple[np.ndarray, Geometry]:
    """Read one volume in the type it is stored in: for work that does not depend on the unit of the intensities.

    Returns:
        (Z, Y, X) array, an increasing linear function of the intensities (equal to them where the header has no
        scale), and its geometry. It may hold NaN.

    Raises:
        DatasetError: unreadable or not a volume.
    """
    geometry = read_geometry(path)
    return _read_voxels(path, geometry, scaled=False), geometry


def read_image(paths: Sequence[Path]) -> tuple[np.ndarray, Geometry]:
    """Read the channels of one case.

    Args:
        paths: one file per channel, in channel order.

    Returns:
        (C, Z, Y, X) float32 array and the geometry that all channels share.

    Raises:
        DatasetError: unreadable, not a volume, NaN or infinite voxels, or channels on different grids.
    """
    if not paths:
        raise DatasetError("a case without image files cannot be read")
    geometry = read_geometry(paths[0])
    try:
        array = np.empty((len(paths), *geometry.shape), dtype=np.float32)
    except (MemoryError, ValueError) as error:
        raise _too_large(paths[0], geometry) from (error if _may_be_true(paths[0], geometry) else None)
    for channel, path in enumerate(paths):
        here = geometry if channel == 0 else read_geometry(path)
        difference = geometry.difference(here, (Path(paths[0]).name, Path(path).name))
        if difference is not None:
            raise DatasetError(f"{path}: {difference}; resample the channels to one grid")
        array[channel] = _read_voxels(path, geometry)
        finite = np.isfinite(array[channel])
        if not finite.all():
            raise DatasetError(
                f"{path} has {int(finite.size - finite.sum())} NaN or infinite voxels; replace them (for example by 0)"
            )
    return array, geometry


def read_labels(path: Path) -> tuple[np.ndarray, Geometry]:
    """Read a label map.

    Returns:
        (Z, Y, X) integer array of file values (uint8, uint16 or int32) and its geometry.

    Raises:
        DatasetError: unreadable, not a volume, or values that are no whole numbers.
    """
    geometry = read_geometry(path)
    labels = _read_voxels(path, geometry)
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
    return np.ascontiguousarray(labels), geometry


def write_image(array: np.ndarray, geometry: Geometry, path: Path) -> None:
    """Write a (Z, Y, X) volume with the given geometry, atomically.

    Raises:
        DatasetError: the array does not have the geometry's shape.
        UkbobError: it cannot be written, as on a full disk.
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
            raise UkbobError(f"cannot write {path}: check the file ending, permissions and free disk space") from error


def write_labels(labels: np.ndarray, geometry: Geometry, path: Path) -> None:
    """Write a (Z, Y, X) label map of file values (stored as uint8 or uint16), atomically."""
    if labels.dtype not in (np.uint8, np.uint16):
        labels = labels.astype(np.uint8 if labels.size == 0 or labels.max() <= 255 else np.uint16)
    write_image(labels, geometry, path)


def write_labels_like(labels: np.ndarray, image: Path, path: Path) -> None:
    """Write a (Z, Y, X) label map as NIfTI of uint8 with the geometry part of another NIfTI file's header, atomically.

    The matrices (qform, sform, their codes) are the image's own, bit by bit, which is what strict readers compare.

    Raises:
        DatasetError: the image cannot be read or has another shape, or values that uint8 does not hold.
    """
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) <= 255:
        raise DatasetError(f"{path}: values {labels.min()} to {labels.max()} do not fit into uint8")
    try:
        header = nibabel.nifti1.load(image).header.copy()
    except _UNREADABLE as error:
        raise DatasetError(f"{image} cannot be read: it is corrupt or truncated; copy it again") from error
    voxels = labels.astype(np.uint8).T
    if voxels.shape != tuple(header.get_data_shape())[:3]:
        raise DatasetError(f"{path}: array of shape {labels.shape} does not fit the grid of {image}")
    header.set_data_dtype(np.uint8)
    header.set_data_shape(voxels.shape)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"], header["descrip"] = 0, 0, b""
    written = nibabel.nifti1.Nifti1Image(voxels, None, header)
    with atomic_path(Path(path)) as temporary:
        nibabel.nifti1.save(written, temporary)
