"""Files that are either complete or absent: write under a temporary name, then rename."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ukbob_seg.errors import DatasetError, UkbobError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and rename it to ``path`` when the block succeeds.

    The temporary name ends like the final one (writers choose a format by the ending) and starts with a dot,
    so that no listing of cases ever sees it. On an error the temporary file is removed and ``path`` is untouched.

    Raises:
        UkbobError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    # Process numbers are the same in many containers, which may share a folder.
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    complete = False
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
        complete = True
    except OSError as error:
        raise UkbobError(
            f"cannot write {path}: {error.strerror or error}; check permissions and free disk space"
        ) from error
    finally:
        if not complete:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def ensure_writable(folder: Path) -> None:
    """Create ``folder`` and prove that a file can be written into it, before any long work starts.

    Raises:
        UkbobError: the folder cannot be created or written.
    """
    with atomic_path(Path(folder) / "write_test") as temporary:
        temporary.write_bytes(b"")
    (Path(folder) / "write_test").unlink(missing_ok=True)


def place_file(source: Path, target: Path, link: bool = False) -> None:
    """Copy a file byte by byte, or make a symbolic link to it, atomically."""
    with atomic_path(target) as temporary:
        if link:
            temporary.symlink_to(Path(source).resolve())
        else:
            shutil.copyfile(source, temporary)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(content: Any, indent: int | None = 2) -> str:
    """JSON, indented for people or on one line; the same content always gives the same text."""
    return json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=True) + "\n"


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write ``content`` as JSON, atomically; on one line, which is faster, without ``indent``."""
    write_text(path, json_text(content, indent))


def read_json(path: Path, what: str = "file") -> Any:
    """Read a JSON file.

    Raises:
        DatasetError: the file is missing or is not valid JSON (names the line), or an object has a key twice.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError as error:
        raise DatasetError(f"{what} {path} does not exist") from error
    except json.JSONDecodeError as error:
        raise DatasetError(f"{what} {path} is not valid JSON (line {error.lineno}: {error.msg})") from error
    except _DuplicateKeyError as error:
        raise DatasetError(f"{what} {path} has the entry {error} twice; rename or remove one") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{what} {path} cannot be read: {error}") from error


class _DuplicateKeyError(Exception):
    """A key that stands twice in one JSON object; json itself would keep the last and say nothing."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(repr(next(name for name in names if names.count(name) > 1)))
    return content


def digest(content: Any) -> str:
    """Short stable hash of any JSON-serialisable content."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, which is read again only when its size or time of change is another.

    Raises:
        OSError: it cannot be read.
    """
    stat = Path(path).stat()
    return _file_sha256(Path(path).resolve(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _file_sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
