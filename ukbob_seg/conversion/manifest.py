"""The list of files that UK Biobank puts into its archives: what should be there and is not."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import PurePosixPath

from ukbob_seg.errors import listing

_NAME = re.compile(r"[^/]*manifest[^/]*\.(csv|cvs)", re.IGNORECASE)
# Columns are no help: dates have commas of their own, so that fields do not stand below their names.
_SEPARATOR = re.compile(r"[,;\t\r\n\"]+")


def is_manifest(name: str) -> bool:
    """Whether a file of an archive is its list of files; most are called manifest.cvs, by mistake."""
    return _NAME.fullmatch(_base(name)) is not None


def listed_files(content: bytes) -> set[str]:
    """Names of the DICOM files that a manifest lists: every field that ends in ``.dcm``, without folders."""
    fields = _SEPARATOR.split(content.decode("utf-8", errors="replace"))
    return {_base(field.strip()) for field in fields if field.strip().lower().endswith(".dcm")}


def missing_files(listed: Collection[str], there: Collection[str]) -> list[str]:
    """A problem where files that the manifest lists are not there; none where it lists not a single one that is.

    Args:
        listed: names in the manifest.
        there: names in the archive.
    """
    have = {_base(name).casefold() for name in there}
    lost = sorted(name for name in listed if name.casefold() not in have)
    if not lost or len(lost) == len(listed):  # of other files altogether
        return []
    named = listing(lost, most=3)
    return [f"{len(lost)} of {len(listed)} files that its manifest lists are not there: {named}; download it again"]


def _base(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name
