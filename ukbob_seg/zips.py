"""What no honest zip archive has, told by its directory alone: for all who read archives from elsewhere."""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Iterable

_DRIVE = re.compile(r"[A-Za-z]:")
_ENCRYPTED = 0x1
MANIFEST, MODEL_FORMAT = "manifest.json", "ukbob_seg model"  # of archives that ukbob_export_model wrote


def leads_out(name: str) -> bool:
    """Whether a name is absolute, on a drive, or goes up, on any system: a backslash separates as well."""
    plain = name.replace("\\", "/")
    return plain.startswith("/") or _DRIVE.match(plain) is not None or ".." in plain.split("/")


def is_special(entry: zipfile.ZipInfo) -> bool:
    """Whether an entry is a link, a device, or not the file or folder that its name says."""
    return stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG)


def is_encrypted(entry: zipfile.ZipInfo) -> bool:
    """Whether an entry needs a password."""
    return bool(entry.flag_bits & _ENCRYPTED)


def repeated_name(entries: Iterable[zipfile.ZipInfo]) -> str | None:
    """The first name that occurs twice, where upper and lower case are the same (they are on some systems)."""
    seen: set[str] = set()
    for entry in entries:
        folded = entry.filename.rstrip("/").casefold()
        if folded in seen:
            return entry.filename
        seen.add(folded)
    return None
