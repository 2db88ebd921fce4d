"""Average the saved probabilities of several models and write label maps.

Read class by class, a few planes at a time: what is held does not grow with the number of classes, except for the
planes that wait to be written where probabilities are saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ukbob_seg.dataset.image_io import read_geometry, write_labels
from ukbob_seg.dataset.spec import DatasetSpec, summarise_problems
from ukbob_seg.errors import ConfigError, DatasetError, listing
from ukbob_seg.files import ensure_writable, read_json, write_json
from ukbob_seg.inference.case_predictor import PROBABILITIES
from ukbob_seg.inference.export import PROBABILITY, decide_probabilities
from ukbob_seg.parallel import Cluster, Part
from ukbob_seg.preprocessing.storage import STREAMED_CHUNK, PlaneWriter, StoredArray, open_array, plane_writer

MAKER = "ukbob_predict --save-probabilities"
PLANES = STREAMED_CHUNK[0]  # a row of stored chunks, so that none is decompressed twice
RECORD = "ensemble.json"


@dataclass(frozen=True)
class Members:
    """What is averaged.

    Attributes:
        folders: of predictions.
        weights: of each, positive; they need not add up to 1.
        spec: of the first folder; labels and file ending are those of all.
    """

    folders: tuple[Path, ...]
    weights: tuple[float, ...]
    spec: DatasetSpec

    def probabilities(self, case: str) -> list[Path]:
        """The case's file in each folder."""
        return [folder / f"{case}{PROBABILITIES}" for folder in self.folders]

    def labels(self, case: str) -> list[Path]:
        """The case's label map in each folder, whether or not it exists."""
        return [folder / f"{case}{self.spec.file_ending}" for folder in self.folders]

    def to_json(self) -> dict[str, list[str] | list[float]]:
        """The record of an ensemble."""
        return {"folders": [str(folder.resolve()) for folder in self.folders], "weights": list(self.weights)}


def ensemble(
    folders: Sequence[Path],
    output: Path,
    weights: Sequence[float] | None = None,
    save_probabilities: bool = False,
    resume: bool = False,
    part: Part | None = None,
    quiet: bool = False,
) -> list[Path]:
    """Average the probabilities of every case over folders that ``predict`` wrote with ``save_probabilities``.

    Args:
        folders: at least two, with the same cases.
        output: folder for label maps, dataset.json and ``ensemble.json`` (folders and weights).
        weights: one per folder, positive; equal when None. They are divided by their sum.
        save_probabilities: also write the averages as ``CASE_probabilities.b2nd``.
        resume: leave cases alone whose label file exists (files are complete once they have their name).
        part: which of the cases to do; None for all.
        quiet: no progress bar.

    Returns:
        The label files of all cases of this part.

    Raises:
        ConfigError: fewer than two folders, one given twice, weights that do not fit, or an output that may not be.
        DatasetError: folders, cases or files that do not fit together, or a damaged file; finished cases are kept.
    """
    output = Path(output)
    members = find_members([Path(folder) for folder in folders], weights)
    if output.resolve() in [folder.resolve() for folder in members.folders]:
        raise ConfigError(f"the output folder {output} is one of the folders to average; give another one with -o")
    is_other = (output / RECORD).is_file() and read_json(output / RECORD, "record") != members.to_json()
    if is_other and (resume or part is not None):  # parts cannot know which label maps another part has replaced
        raise ConfigError(f"{output} holds an ensemble of other folders or weights; go on with those, or change -o")
    cases = Cluster(part=part).share(common_cases(members))
    files = [output / f"{case}{members.spec.file_ending}" for case in cases]
    todo = [(case, file) for case, file in zip(cases, files, strict=True) if not (resume and file.is_file())]
    problems = [problem for case, _ in todo for problem in case_problems(members, case)]
    if problems:
        raise DatasetError(summarise_problems(problems))
    ensure_writable(output)
    if is_other:  # after an interruption nobody could tell its label maps from ours
        for case, file in zip(cases, files, strict=True):
            file.unlink(missing_ok=True)
            (output / f"{case}{PROBABILITIES}").unlink(missing_ok=True)
    write_json(output / "dataset.json", members.spec.content)
    write_json(output / RECORD, members.to_json())
    for case, file in tqdm(todo, desc="averaging", unit="case", disable=quiet):
        average_case(members, case, file, save_probabilities)
    return files


def find_members(folders: Sequence[Path], weights: Sequence[float] | None = None) -> Members:
    """Check folders and weights.

    Raises:
        ConfigError: fewer than two folders, one given twice, or weights that do not fit.
        DatasetError: no folder of predictions, or datasets that differ.
    """
    if len(folders) < 2:
        raise ConfigError(f"an ensemble needs at least two folders, got {listing([str(f) for f in folders]) or 'none'}")
    places = [folder.resolve() for folder in folders]
    if twice := [str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise ConfigError(f"folder {twice[0]} is given twice; give it more weight with --weights instead")
    weights = [1.0] * len(folders) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(folders):
        raise ConfigError(f"--weights needs one number per folder: got {len(weights)} for {len(folders)} folders")
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ConfigError(f"--weights must be positive numbers, got {', '.join(f'{weight:g}' for weight in weights)}")
    specs = [_load_spec(folder) for folder in folders]
    for folder, spec in zip(folders[1:], specs[1:], strict=True):
        names = str(folders[0]), str(folder)
        difference = specs[0].labels.difference(spec.labels, names)
        if difference is None and spec.file_ending != specs[0].file_ending:
            endings = f"{specs[0].file_ending} in {names[0]}, {spec.file_ending} in {names[1]}"
            difference = f"file_ending differs: {endings}"
        if difference is not None:
            raise DatasetError(f"{difference} (dataset.json); only predictions of the same labels can be averaged")
    return Members(tuple(folders), tuple(weights), specs[0])


def _load_spec(folder: Path) -> DatasetSpec:
    if not folder.is_dir():
        raise DatasetError(f"folder {folder} does not exist")
    if not (folder / "dataset.json").is_file():
        raise DatasetError(f"{folder} has no dataset.json; give folders that {MAKER} wrote")
    return DatasetSpec.load(folder)


def common_cases(members: Members) -> list[str]:
    """The cases, sorted.

    Raises:
        DatasetError: none at all, or some that are not in all folders; lists them.
    """
    found = {
        folder: {path.name.removesuffix(PROBABILITIES) for path in folder.glob(f"[!.]*{PROBABILITIES}")}
        for folder in members.folders
    }
    for folder, names in found.items():
        if not names:
            raise DatasetError(f"{folder} has no CASE{PROBABILITIES}; predict with --save-probabilities")
    everything = set.union(*found.values())
    lacking = [
        f"{listing(sorted(everything - names))} not in {folder}"
        for folder, names in found.items()
        if everything - names
    ]
    if lacking:
        raise DatasetError(
            f"cases without probabilities: {'; '.join(lacking)}; predict them with --save-probabilities, or take them "
            "out of the other folders"
        )
    return sorted(everything)


def case_problems(members: Members, case: str) -> list[str]:
    """What keeps one case from being averaged, judged by headers; one sentence each."""
    first = members.folders[0]
    paths = members.labels(case)
    if not paths[0].is_file():
        return [f"case {case}: {first} has no label map {paths[0].name}, which tells the geometry; predict it again"]
    try:
        geometry = read_geometry(paths[0])
        for folder, path in zip(members.folders[1:], paths[1:], strict=True):
            there = read_geometry(path) if path.is_file() else geometry
            if difference := geometry.difference(there, (str(first), str(folder))):
                return [f"case {case}: {difference}; predict both from the same image"]
        expected = (members.spec.labels.num_outputs, *geometry.shape)
        for folder, path in zip(members.folders, members.probabilities(case), strict=True):
            stored = open_array(path, MAKER)
            if stored.shape != expected:
                return [
                    f"case {case}: probabilities have shape {stored.shape} in {folder}, expected {expected} by "
                    f"dataset.json and the label map in {first}; predict both from the same image"
                ]
            if stored.dtype.kind != "f":
                return [f"case {case}: {path} holds {stored.dtype}, no probabilities; predict it again"]
    except DatasetError as error:
        return [f"case {case}: {error}"]
    return []


def average_case(members: Members, case: str, output: Path, save_probabilities: bool = False) -> None:
    """Average one case and write its label map.

    Args:
        members: what is averaged.
        case: its name.
        output: label file; the probabilities go beside it.
        save_probabilities: also write them.

    Raises:
        DatasetError: a file is damaged; then neither label map nor probabilities are written.
    """
    scheme, total = members.spec.labels, sum(members.weights)
    stored = [open_array(path, MAKER, mapped=False) for path in members.probabilities(case)]
    outputs, z, y, x = stored[0].shape
    labels: np.ndarray = np.empty((z, y, x), dtype=scheme.output_values.dtype)
    with ExitStack() as stack:
        writer: PlaneWriter | None = None
        if save_probabilities:
            path = output.with_name(f"{case}{PROBABILITIES}")
            writer = stack.enter_context(plane_writer(path, (outputs, z, y, x), PROBABILITY))
        for start in range(0, z, PLANES):
            stop = min(start + PLANES, z)
            kept = None if writer is None else np.empty((outputs, stop - start, y, x), dtype=PROBABILITY)
            sums = _sums(stored, members.weights, slice(start, stop), kept)
            decision = decide_probabilities(sums, total / 2 if scheme.has_regions else None)
            labels[start:stop] = scheme.output_values[decision.numpy()]
            if writer is not None and kept is not None:
                writer.append(kept)
    write_labels(labels, read_geometry(members.labels(case)[0]), output)


def _sums(
    stored: Sequence[StoredArray], weights: Sequence[float], planes: slice, kept: np.ndarray | None
) -> Iterator[Tensor]:
    """Weighted sums (n, Y, X) float32 of some planes, one output after the other; the averages go to ``kept``.

    Sums decide, not averages: dividing by a number that is no power of two would make ties of some neighbours.
    """
    for output in range(stored[0].shape[0]):
        total: Tensor | None = None
        for array, weight in zip(stored, weights, strict=True):
            values = torch.from_numpy(array[output, planes]).float()
            total = values.mul_(weight) if total is None else total.add_(values.mul_(weight))
        assert total is not None
        if kept is not None:
            kept[output] = (total / sum(weights)).half().numpy()
        yield total
