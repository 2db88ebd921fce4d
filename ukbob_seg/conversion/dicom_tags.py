"""Values of DICOM tags, checked: what is damaged is named by file and tag, never passed on."""

from __future__ import annotations

import math
import re
import warnings
from datetime import date
from typing import TYPE_CHECKING, Any

from ukbob_seg.errors import DatasetError

if TYPE_CHECKING:
    from pydicom import Dataset

_LARGEST = 1e9  # mm, or any other unit: what is larger is damage
_TIME = re.compile(r"(\d{2}):?(\d{2})(?::?(\d{2})(\.\d{1,6})?)?")


def value_of(dataset: Dataset, tag: str, name: str) -> Any:
    """The value of a tag as pydicom reads it; None where the tag is absent or empty.

    Args:
        dataset: of one file.
        tag: its keyword, such as ``Rows``.
        name: of the file, for messages.

    Raises:
        DatasetError: pydicom cannot read it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # values that are not quite as the standard wants
            value = dataset.get(tag)
    except Exception as error:  # pydicom raises whatever the damage leads to
        raise DatasetError(f"{name}: {tag} is damaged ({first_line(error)}); download it again") from error
    if value is None or (isinstance(value, (str, bytes, list)) and not value):
        return None
    return value


def numbers_of(dataset: Dataset, tag: str, name: str, count: int) -> tuple[float, ...]:
    """The numbers of a tag that must have ``count`` of them.

    Raises:
        DatasetError: absent, not numbers, or not so many.
    """
    value = value_of(dataset, tag, name)
    if value is None:
        if tag in dataset:
            raise DatasetError(f"{name}: {tag} is empty and must be {_how_many(count)}; download it again")
        raise DatasetError(f"{name} has no {tag}; export the scan again, with its geometry")
    several = [value] if isinstance(value, (str, bytes, int, float)) or not hasattr(value, "__len__") else list(value)
    try:
        found = tuple(float(each) for each in several)
    except (TypeError, ValueError, OverflowError) as error:
        raise DatasetError(f"{name}: {tag} {_shown(value)} must be {_how_many(count)}; download it again") from error
    if len(found) != count or not all(math.isfinite(each) and abs(each) < _LARGEST for each in found):
        raise DatasetError(f"{name}: {tag} {_shown(value)} must be {_how_many(count)}; download it again")
    return found


def number_of(dataset: Dataset, tag: str, name: str, default: float | None = None) -> float:
    """The number of a tag; ``default`` where the tag is absent (not where it is there and empty).

    Raises:
        DatasetError: no number, or absent without a default.
    """
    if default is not None and tag not in dataset:
        return default
    return numbers_of(dataset, tag, name, 1)[0]


def whole_of(dataset: Dataset, tag: str, name: str, default: int | None = None) -> int:
    """The whole number of a tag, as ``number_of``.

    Raises:
        DatasetError: no whole number, or absent without a default.
    """
    found = number_of(dataset, tag, name, default)
    if found != int(found):
        raise DatasetError(f"{name}: {tag} {found} must be a whole number; download it again")
    return int(found)


def text_of(dataset: Dataset, tag: str, name: str) -> str:
    """The text of a tag, stripped; empty where it is absent.

    Raises:
        DatasetError: pydicom cannot read it.
    """
    return "\\".join(texts_of(dataset, tag, name))


def texts_of(dataset: Dataset, tag: str, name: str) -> tuple[str, ...]:
    """The texts of a tag that may have several, such as ImageType.

    Raises:
        DatasetError: pydicom cannot read it.
    """
    value = value_of(dataset, tag, name)
    if value is None:
        return ()
    several = value if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue" else [value]
    return tuple(str(each).strip() for each in several)


def moment_of(dataset: Dataset, kind: str, name: str) -> float | None:
    """Seconds (since year 1) of ``AcquisitionTime`` or ``SeriesTime`` with its date; None where there is no time.

    Args:
        dataset: of one file.
        kind: ``Acquisition`` or ``Series``.
        name: of the file, for messages.

    Raises:
        DatasetError: pydicom cannot read them.
    """
    day, time = text_of(dataset, f"{kind}Date", name), text_of(dataset, f"{kind}Time", name)
    both = text_of(dataset, f"{kind}DateTime", name) if kind == "Acquisition" else ""
    if not time and len(both) > 8:
        day, time = both[:8], both[8:]
    match = _TIME.match(time)
    if match is None:
        return None
    days = _day(day or text_of(dataset, "StudyDate", name))
    hours, minutes, seconds, part = match.groups()
    return days * 86400.0 + int(hours) * 3600 + int(minutes) * 60 + int(seconds or 0) + float(part or 0)


def _day(text: str) -> int:
    digits = text.replace(".", "").replace("-", "")
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:8])).toordinal()
    except ValueError:
        return 0


def first_line(error: BaseException) -> str:
    """Of an error's message, for a sentence."""
    lines = str(error).splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def _shown(value: Any) -> str:
    """A value in a message, shortened."""
    shown = repr(value) if isinstance(value, (str, bytes)) else str(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _how_many(count: int) -> str:
    return "one number" if count == 1 else f"{count} numbers"
