"""What an output folder holds of earlier runs: all its predictions are made in one way.

``predict_args.json`` says in which. Predictions that a run will replace stay until there are new ones, and are marked
meanwhile, so that a run that goes on later does not take them for its own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ukbob_seg.errors import ConfigError
from ukbob_seg.files import read_json
from ukbob_seg.inference.settings import PredictionSettings
from ukbob_seg.networks.precision_names import AUTO

if TYPE_CHECKING:
    from ukbob_seg.inference.case_predictor import CasePredictor

log = logging.getLogger(__name__)

ARGUMENTS = "predict_args.json"
HASHES = "checkpoint_sha256"  # a model that was trained again lies under the same name
HARMLESS = ("window_batch", "compile", "overlap")  # settings that do not show in what is written


@dataclass(frozen=True)
class PredictionJob:
    """One case to predict."""

    name: str
    images: tuple[Path, ...]
    output: Path
    ending: str = ".nii.gz"

    @property
    def stale(self) -> Path:
        """Is there while the label file is of an earlier run, which this one replaces."""
        return self.output.with_name(f".{self.output.name}.stale")

    def is_finished(self) -> bool:
        """Files are complete once they have their name, and the label file is the last of a case."""
        return self.output.is_file() and not self.stale.is_file()

    def run(self, predictor: CasePredictor, show: Callable[[int, int], None]) -> None:
        """Predict it; ``show`` is told (windows done, windows in all)."""
        predictor.predict_case(self.images, self.output, show)


def what_matters(settings: PredictionSettings) -> dict[str, Any]:
    """Of settings what shows in label maps and the files beside them, as plain values that JSON keeps."""
    chosen = {key: value for key, value in dataclasses.asdict(settings).items() if key not in HARMLESS}
    for name, usual in (("largest_component", None), ("precision", AUTO)):
        if chosen[name] == usual:
            del chosen[name]  # so that folders of earlier versions, which did not have it, can be resumed
    return json.loads(json.dumps(chosen))


def differences(folder: Path, record: dict[str, Any], jobs: Sequence[PredictionJob]) -> str | None:
    """In what way the predictions in a folder were made that this run's are not; None if they are alike.

    Raises:
        ConfigError: there are label files that are not predictions, or other cases' that were made in another way.
    """
    path = folder / ARGUMENTS
    if not path.is_file():
        if there := [job.output.name for job in jobs if job.output.is_file()]:
            raise ConfigError(
                f"{folder} has {there[0]} ({len(there)} such files) but no {ARGUMENTS}: they are not predictions of "
                "this command, which would replace or keep them; give another folder with -o"
            )
        return None
    before = read_json(path, "record of the last run")
    for name in ("checkpoints", "settings", HASHES):  # the last is not in records of earlier versions
        if name in before and before[name] != record[name]:
            break
    else:
        return None
    said = f"{path} has other {name} than this run ({first_difference(before[name], record[name])})"
    ending, own = jobs[0].ending, {job.output.name for job in jobs}
    labels = sorted(each.name for each in folder.glob(f"[!.]*{ending}") if not each.name.endswith(f"_entropy{ending}"))
    if others := [label for label in labels if label not in own]:
        raise ConfigError(f"{said}, and {folder} holds {others[0]}, which is not predicted now; give another folder")
    return said


def first_difference(before: Any, now: Any) -> str:
    """For people: what it was and what it is."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            usual = AUTO if key == "precision" else None
            if before.get(key, usual) != now.get(key, usual):
                inner = first_difference(before.get(key, usual), now.get(key, usual))
                return f"{key} {inner}"
    was, is_now = ("given" if isinstance(value, dict) else value for value in (before, now))
    return f"{was}, now {is_now}"


def mark_stale(jobs: Sequence[PredictionJob]) -> None:
    """Remember of each case that its label map is an earlier run's, until there is a new one."""
    earlier = [job for job in jobs if job.output.is_file()]
    for job in earlier:
        job.stale.touch()
    if earlier:
        log.info("%d earlier predictions in %s will be replaced", len(earlier), earlier[0].output.parent)
