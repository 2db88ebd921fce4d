"""What a conversion does with single files. A step is done when its files are there and not older than its sources."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel.nifti1
import numpy as np

from ukbob_seg.dataset.image_io import read_geometry, read_labels, write_labels
from ukbob_seg.errors import DatasetError
from ukbob_seg.files import atomic_path, place_file, write_json

NIFTI_ENDINGS = (".nii.gz", ".nii")


def ending_of(path: Path) -> str:
    """``.nii.gz`` or ``.nii``.

    Raises:
        DatasetError: another one.
    """
    for ending in NIFTI_ENDINGS:
        if path.name.endswith(ending):
            return ending
    raise DatasetError(f"{path} is no NIFTI file (.nii.gz or .nii)")


def common_ending(paths: Sequence[Path]) -> str:
    """The ending of a dataset whose files come from these: the one that all have, else ``.nii.gz``."""
    endings = {ending_of(path) for path in paths}
    return endings.pop() if len(endings) == 1 else ".nii.gz"


@dataclass(frozen=True)
class PlaceFile:
    """One file as it is: copied or linked byte by byte; compressed only where the dataset's ending asks for it."""

    source: Path
    target: Path

    @property
    def sources(self) -> tuple[Path, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[Path, ...]:
        return (self.target,)

    def run(self, link: bool) -> None:
        """Do it."""
        if ending_of(self.source) == ending_of(self.target):
            place_file(self.source, self.target, link)
            return
        with (
            atomic_path(self.target) as temporary,
            self.source.open("rb") as plain,
            temporary.open("wb") as file,
            gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
        ):
            shutil.copyfileobj(plain, packed)


@dataclass(frozen=True)
class SplitChannels:
    """A file of four dimensions into one file per channel: the same type, scale and position, no value changed."""

    source: Path
    targets: tuple[Path, ...]

    @property
    def sources(self) -> tuple[Path, ...]:
        return (self.source,)

    def run(self, link: bool) -> None:
        """Do it; ``link`` has no meaning here.

        Raises:
            DatasetError: unreadable, or another number of channels than dataset.json has.
        """
        try:
            image = nibabel.nifti1.load(self.source)
            stored = np.asanyarray(image.dataobj.get_unscaled())
            slope, intercept = image.dataobj.slope, image.dataobj.inter
        except Exception as error:  # nibabel raises what the damage leads to
            raise DatasetError(f"{self.source} cannot be read: it is corrupt or truncated; copy it again") from error
        channels = stored.shape[3] if stored.ndim == 4 else 1
        if stored.ndim not in (3, 4) or channels != len(self.targets):
            raise DatasetError(
                f"{self.source} has the shape {stored.shape}, expected {len(self.targets)} channels along the fourth "
                "axis, as dataset.json says"
            )
        for channel, target in enumerate(self.targets):
            voxels = stored[..., channel] if stored.ndim == 4 else stored
            header = image.header.copy()
            header.set_data_shape(voxels.shape)
            header["pixdim"][4:] = 1
            header.set_slope_inter(slope, intercept)
            with atomic_path(target) as temporary:
                # With a scale in the header, nibabel would divide by it: the file is written part by part.
                _write_stored(voxels, header, temporary)


def _write_stored(voxels: np.ndarray, header: nibabel.nifti1.Nifti1Header, path: Path) -> None:
    """A header, no extensions, and voxels in the type that the header states."""
    header = header.copy()
    header["magic"], header["vox_offset"] = b"n+1", 352
    content = header.binaryblock + b"\0" * 4 + np.asarray(voxels, dtype=header.get_data_dtype()).tobytes(order="F")
    path.write_bytes(gzip.compress(content, 6, mtime=0) if path.name.endswith(".gz") else content)


@dataclass(frozen=True)
class MergeMasks:
    """Masks of single organs into one label map; a voxel in several masks belongs to the smallest of them.

    Small structures are drawn inside or at the border of large ones, which lose little by it. Masks of one size: the
    later class. How many voxels were claimed twice is written to ``record``.

    Attributes:
        image: whose grid the masks must have.
        masks: (value, file), in class order.
        target: the label map.
        record: JSON of overlaps: {"smaller > larger": voxels}.
    """

    image: Path
    masks: tuple[tuple[int, Path], ...]
    target: Path
    record: Path

    @property
    def sources(self) -> tuple[Path, ...]:
        return tuple(path for _, path in self.masks)

    @property
    def targets(self) -> tuple[Path, ...]:
        return self.target, self.record

    def run(self, link: bool) -> None:
        """Do it; ``link`` has no meaning here.

        Raises:
            DatasetError: a mask cannot be read, or lies on another grid.
        """
        geometry = read_geometry(self.image)
        inside: list[tuple[int, np.ndarray]] = []
        for value, path in self.masks:
            mask, own = read_labels(path)
            difference = geometry.difference(own, (self.image.name, path.name))
            if difference is not None:
                raise DatasetError(f"{path}: {difference}; resample the mask to the image's grid")
            voxels = np.flatnonzero(mask)
            inside.append((value, voxels.astype(np.uint32) if mask.size < 2**32 else voxels))
        merged, overlaps = merge_masks(inside, int(np.prod(geometry.shape)))
        names = {value: path.name.removesuffix(".nii.gz").removesuffix(".nii") for value, path in self.masks}
        said = {f"{names[winner]} > {names[loser]}": count for (winner, loser), count in sorted(overlaps.items())}
        write_labels(merged.reshape(geometry.shape), geometry, self.target)
        write_json(self.record, said)


def merge_masks(inside: Sequence[tuple[int, np.ndarray]], size: int) -> tuple[np.ndarray, dict[tuple[int, int], int]]:
    """Paint masks into one array, the largest first.

    Args:
        inside: (value, flat indices of the mask's voxels), in class order.
        size: voxels of the array.

    Returns:
        (labels (size,), {(value that kept the voxels, value that lost them): voxels}).
    """
    highest = max((value for value, _ in inside), default=0)
    labels = np.zeros(size, dtype=np.uint8 if highest < 256 else np.uint16)
    overlaps: dict[tuple[int, int], int] = {}
    for value, voxels in sorted(inside, key=lambda item: -len(item[1])):  # stable: of equal ones the later class last
        before = np.bincount(labels[voxels], minlength=1)
        for loser in np.flatnonzero(before[1:]) + 1:
            overlaps[value, int(loser)] = int(before[loser])
        labels[voxels] = value
    return labels, overlaps


Step = PlaceFile | SplitChannels | MergeMasks
