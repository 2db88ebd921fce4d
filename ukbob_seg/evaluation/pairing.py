"""Which prediction belongs to which reference, and what their values mean."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import ConfigError, DatasetError, listing
from ukbob_seg.files import read_json

logger = logging.getLogger(__name__)

FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")


class Pair(NamedTuple):
    """A case's two label files."""

    case: str
    prediction: Path
    reference: Path


@dataclass(frozen=True)
class MatchedFiles:
    """Which files belong together: pairs to score, references and predictions that stay alone."""

    pairs: tuple[Pair, ...]
    missing: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()


def match_files(prediction: Path, reference: Path, allow_missing: bool = False) -> MatchedFiles:
    """Find each reference's prediction by the file name without its ending.

    Raises:
        ConfigError: one is a folder and the other a file.
        DatasetError: something does not exist, is ambiguous, or has no counterpart.
    """
    for what, path in (("prediction", prediction), ("reference", reference)):
        if not path.exists():
            raise DatasetError(f"{what} {path} does not exist")
    if prediction.is_dir() != reference.is_dir():
        raise ConfigError(f"give two folders or two files, got {prediction} and {reference}")
    if not prediction.is_dir():
        return MatchedFiles((Pair(case_name(reference), prediction, reference),))
    predictions, references = label_files(prediction), label_files(reference)
    if not references:
        raise DatasetError(f"no label files in {reference}; expected files ending in {', '.join(FILE_ENDINGS)}")
    missing = tuple(case for case in references if case not in predictions)
    pairs = tuple(Pair(case, predictions[case], path) for case, path in references.items() if case in predictions)
    if missing and not (allow_missing and pairs):
        remedy = "score those that are there with --allow-missing" if pairs else "is this the right folder?"
        raise DatasetError(
            f"{len(missing)} of {len(references)} references have no prediction of the same name in {prediction} "
            f"({remedy}): {', '.join(missing)}"
        )
    unmatched = tuple(case for case in predictions if case not in references)
    return MatchedFiles(pairs, missing, unmatched)


def label_files(folder: Path) -> dict[str, Path]:
    """Label files of a folder by case, sorted.

    Raises:
        DatasetError: two files of one case, differing in the ending.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.lower().endswith(FILE_ENDINGS) or not path.is_file():
            continue
        other = found.setdefault(case_name(path), path)
        if other != path:
            raise DatasetError(f"case {case_name(path)}: both {other.name} and {path.name} in {folder}; keep one")
    # What ukbob_predict --save-entropy writes beside a label map is none.
    return {name: path for name, path in found.items() if name.removesuffix("_entropy") not in found.keys() - {name}}


def case_name(path: Path) -> str:
    """File name without its ending."""
    for ending in FILE_ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.stem


def find_labels(prediction: Path, reference: Path, dataset_json: Path | None = None) -> LabelScheme | None:
    """What the label values mean, from the dataset.json given or the first found near the files; None without one.

    Raises:
        DatasetError: the file does not exist or cannot be used.
    """
    here = prediction if prediction.is_dir() else prediction.parent
    there = reference if reference.is_dir() else reference.parent
    candidates = [folder.resolve() / "dataset.json" for folder in (here, here.resolve().parent, there.resolve().parent)]
    path = dataset_json if dataset_json is not None else next((p for p in candidates if p.is_file()), None)
    if path is None:
        logger.info("no dataset.json found: every label value that occurs is scored, named by its number")
        return None
    return DatasetSpec.from_json(read_json(Path(path), "dataset description"), Path(path).parent.name).labels


def find_image(folder: Path, case: str) -> Path | None:
    """The first channel of a case (``CASE_0000.nii.gz``), or its only file (``CASE.nii.gz``); None without one."""
    candidates = (Path(folder) / f"{case}{suffix}{ending}" for suffix in ("_0000", "") for ending in FILE_ENDINGS)
    return next((path for path in candidates if path.is_file()), None)


def check_images(folder: Path, cases: Sequence[str]) -> None:
    """Say which cases have no image for their picture.

    Raises:
        DatasetError: none has one, so that it is the wrong folder.
    """
    without = [case for case in cases if find_image(folder, case) is None]
    if len(without) == len(cases):
        raise DatasetError(
            f"{folder} has no image of any of the {len(cases)} cases, named like {without[0]}_0000.nii.gz"
        )
    if without:
        logger.warning("no image of %d of %d cases in %s: %s", len(without), len(cases), folder, listing(without))
