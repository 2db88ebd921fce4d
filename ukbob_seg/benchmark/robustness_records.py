"""One small file per prediction and its scores, so that a long run can be interrupted and go on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ukbob_seg import __version__
from ukbob_seg.benchmark.robustness_cases import label_of, shift_seed
from ukbob_seg.dataset.spec import Case
from ukbob_seg.errors import DatasetError
from ukbob_seg.evaluation.metrics import METRICS
from ukbob_seg.evaluation.shift_strengths import definitions
from ukbob_seg.files import digest, read_json, write_json

RECORDS, EXAMPLE = "records", "example"
_VERSION = 2  # raise it when shifts, predictions or scores mean something else: all is then done again

Scores = dict[str, dict[str, float]]  # class -> metric -> value


@dataclass(frozen=True)
class Record:
    """Scores of one prediction.

    Attributes:
        scores: class -> metric -> value; NaN and infinity as ``evaluate_case`` gives them.
        seconds: that the prediction took.
        adaptation: what ETTA did, empty without it.
    """

    scores: Scores
    seconds: float
    adaptation: Mapping[str, Any]


@dataclass(frozen=True)
class RecordStore:
    """The records of a run.

    Attributes:
        folder: of the run's output.
        classes: that each record must have.
        ending: of label files.
    """

    folder: Path
    classes: tuple[str, ...]
    ending: str

    def path(self, case: str, shift: str, method: str) -> Path:
        """Where a record is kept."""
        return self.folder / RECORDS / case / f"{_slug(shift, method)}.json"

    def example_path(self, case: str, shift: str, method: str) -> Path:
        """Where the label map of the case that is drawn in the report is kept."""
        return self.folder / EXAMPLE / case / f"{_slug(shift, method)}{self.ending}"

    def load(self, case: str, shift: str, method: str, key: str) -> Record | None:
        """A record; None where there is none, or a damaged one, or one that was made otherwise."""
        try:
            content = read_json(self.path(case, shift, method), "record")
            if content["key"] != key or tuple(content["classes"]) != self.classes:
                return None
            scores = {
                name: {metric: _number(values[metric]) for metric in METRICS}
                for name, values in content["classes"].items()
            }
            return Record(scores, float(content["seconds"]), dict(content["adaptation"]))
        except (DatasetError, KeyError, TypeError, ValueError, AttributeError):
            return None

    def save(self, case: str, shift: str, method: str, key: str, record: Record) -> None:
        """Write a record, atomically."""
        content = {
            "key": key, "case": case, "shift": shift, "method": method, "seconds": round(record.seconds, 3),
            "classes": record.scores, "adaptation": record.adaptation,
        }  # fmt: skip
        write_json(self.path(case, shift, method), strict(content), indent=None)


def record_key(case: Case, shift: str, model: Sequence[Any], tolerance_mm: float) -> str:
    """Hash of what a record depends on.

    Args:
        case: whose files count by path, size and time of change.
        shift: with its strength.
        model: plain values that stand for networks and settings.
        tolerance_mm: of the normalized surface Dice.
    """
    files = [(str(path.resolve()), path.stat()) for path in (*case.images, label_of(case))]
    stats = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]
    what = [__version__, _VERSION, case.name, stats, shift, definitions()[shift], shift_seed(case.name)]
    return digest([*what, model, tolerance_mm])


def strict(content: Any) -> Any:
    """The same as JSON that any reader takes: null for NaN, "inf" and "-inf" for infinity."""
    if isinstance(content, Mapping):
        return {str(key): strict(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [strict(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None if math.isnan(content) else "inf" if content > 0 else "-inf"
    return content


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or value in ("inf", "-inf")):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _slug(shift: str, method: str) -> str:
    return f"{shift.replace(' ', '_')}--{method}"
