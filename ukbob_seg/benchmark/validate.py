"""An archive against the rules of its challenge, as the organisers' side would look at it.

Nothing here uses the code that writes archives: files are read with nibabel alone, and compared with the test images.
"""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from ukbob_seg.benchmark.protocols import submission_rules
from ukbob_seg.benchmark.testset import find_test_images
from ukbob_seg.errors import DatasetError, listing

AFFINE_TOLERANCE = 1e-3  # mm
_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, WrapStructError)
# Encrypted members and unknown ways of compression are RuntimeErrors, the latter as NotImplementedError.
_BAD_MEMBER = (*_UNREADABLE, zipfile.BadZipFile, RuntimeError)
_BYTES_PER_VOXEL, _HEADER_BYTES = 8, 1 << 20  # a label file holds no more


def validate(name: str, archive: Path, images: Path, modality: str | None = None) -> tuple[int, list[str]]:
    """Everything that is wrong with a submission.

    All test cases are there and nothing else, at the top of the archive; every file is a readable NIfTI volume of
    integers without scaling, of the challenge's values, on the test image's grid (shape equal, matrix to 0.001 mm).

    Args:
        name: of the challenge.
        archive: the zip file.
        images: folder of the test images.
        modality: AMOS: which test cases; None is ``mri``.

    Returns:
        (number of test cases, problems); each problem is one sentence that names the file.

    Raises:
        ConfigError: no such challenge.
        DatasetError: the archive or the images cannot be read at all.
    """
    rules, archive = submission_rules(name), Path(archive)
    tests = find_test_images(rules, images, modality)
    if not archive.is_file():
        raise DatasetError(f"archive {archive} does not exist")
    if not zipfile.is_zipfile(archive):
        raise DatasetError(f"{archive} is no zip file, or it is cut off")
    wanted = {rules.member.format(id=number): number for number in tests}
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        problems = _names(names, list(wanted))
        for member in sorted(set(names) & set(wanted)):
            number = wanted[member]
            allowed = rules.allowed_values(rules.edition_of(number))
            problems += [f"{member}: {problem}" for problem in _member(opened, member, tests[number], allowed)]
    return len(wanted), problems


def _names(names: list[str], wanted: list[str]) -> list[str]:
    problems = []
    missing = [name for name in wanted if name not in names]
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} test cases are missing: {listing(missing)}")
    extra = sorted(set(names) - set(wanted))
    nested = [name for name in extra if name.rsplit("/", 1)[-1] in wanted]
    if nested:
        problems.append(f"files must lie at the top of the archive, not in a folder: {listing(nested)}")
    strange = [name for name in extra if name not in nested]
    if strange:
        problems.append(f"files that are no test case's label map: {listing(strange)}; expected names like {wanted[0]}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        problems.append(f"files that are in the archive twice: {listing(twice)}")
    return problems


def _member(opened: zipfile.ZipFile, member: str, image: Path, allowed: tuple[int, ...]) -> list[str]:
    try:
        reference = nibabel.load(image)
        shape = tuple(reference.shape)  # type: ignore[attr-defined]
    except _UNREADABLE as error:
        raise DatasetError(f"{image} cannot be read: it is corrupt or truncated; copy it again") from error
    try:
        label = nibabel.Nifti1Image.from_bytes(_content(opened, member, shape))
    except _BAD_MEMBER as error:
        return [f"cannot be read ({error})"]
    problems = []
    if label.get_data_dtype().kind not in "iu":
        problems.append(f"type {label.get_data_dtype()}, expected integers such as uint8")
    if label.shape != shape:
        problems.append(f"shape {label.shape}, but {shape} in {image.name}")
    if not np.allclose(label.affine, reference.affine, rtol=0, atol=AFFINE_TOLERANCE):  # type: ignore[attr-defined]
        problems.append(f"its matrix (affine) is not that of {image.name}")
    if label.get_data_dtype().kind not in "iuf" or label.shape != shape:
        return problems  # a header may promise more voxels than memory holds
    try:
        stored = np.asanyarray(label.dataobj.get_unscaled())  # type: ignore[attr-defined]
    except _BAD_MEMBER as error:
        return [*problems, f"cannot be read ({error})"]
    slope, intercept = label.dataobj.slope, label.dataobj.inter  # type: ignore[attr-defined]
    if (slope, intercept) != (1, 0):
        problems.append(f"values are scaled in the header (slope {slope}, intercept {intercept}); expected none")
    wrong = [f"{value:g}" for value in np.unique(stored).tolist() if value not in allowed]
    if wrong:
        problems.append(f"label values {listing(wrong)}, allowed are {', '.join(map(str, allowed))}")
    return problems


def _content(opened: zipfile.ZipFile, member: str, shape: tuple[int, ...]) -> bytes:
    """The unpacked bytes of a member, which are no more than a label map of that shape can have.

    Raises:
        ValueError: they are, as those of a file made to fill the memory.
    """
    most = int(np.prod(shape, dtype=np.int64)) * _BYTES_PER_VOXEL + _HEADER_BYTES
    if opened.getinfo(member).file_size <= most:
        with gzip.GzipFile(fileobj=io.BytesIO(opened.read(member))) as stream:
            content = stream.read(most + 1)
        if len(content) <= most:
            return content
    raise ValueError(f"it unpacks to more than {most} bytes, the most that a label map of this image can have")
