"""The Brain Imaging Data Structure: ``sub-01[/ses-1]/anat/..._T1w.nii.gz`` and ``derivatives/NAME/..._dseg.nii.gz``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ukbob_seg.conversion.run import TEST, TRAINING, ConvertedCase, Layout, image_target, label_target
from ukbob_seg.conversion.steps import PlaceFile, common_ending
from ukbob_seg.dataset.image_io import read_labels
from ukbob_seg.dataset.spec import summarise_problems
from ukbob_seg.dataset.tables import read_table
from ukbob_seg.errors import ConfigError, DatasetError, listing
from ukbob_seg.parallel import choose_workers, map_cases

_NAME = re.compile(r"(?P<entities>(?:[a-zA-Z]+-[a-zA-Z0-9+]+_)+)(?P<suffix>[a-zA-Z0-9]+)\.nii(?:\.gz)?")
# Pictures of tissue as scanners make them. Quantitative maps and series of many echoes have to be asked for.
INTENSITIES = frozenset({
    "T1w", "T2w", "PDw", "T2starw", "FLAIR", "inplaneT1", "inplaneT2", "PDT2", "UNIT1", "angio",
    "T2star", "FLASH", "PD", "CT", "ct",
})  # fmt: skip
_NO_IMAGE = re.compile(r".*mask|.*dseg|.*probseg|roi", re.IGNORECASE)


@dataclass(frozen=True)
class BidsOptions:
    """What to take.

    Attributes:
        suffixes: modalities that become channels, in this order; None for all of ``INTENSITIES`` that all have.
        derivatives: pipeline whose segmentations to take; None where only one has any.
        entities: ``acq-highres``, ``run-1``, ...: of several files, the one that says so.
    """

    suffixes: tuple[str, ...] | None = None
    derivatives: str | None = None
    entities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        masks = [each for each in self.suffixes or () if _NO_IMAGE.fullmatch(each)]
        if masks:
            raise ConfigError(f"--suffixes: {listing(masks)} is no image that could be a channel")
        wrong = [each for each in self.entities if re.fullmatch(r"[a-zA-Z]+-[a-zA-Z0-9+]+", each) is None]
        if wrong:
            raise ConfigError(f"--entities must look like run-1 or acq-highres, got {listing(wrong)}")

    @property
    def wanted(self) -> dict[str, str]:
        """Entities by key."""
        return dict(each.split("-", 1) for each in self.entities)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _File:
    """A file whose name follows BIDS."""

    path: Path
    entities: dict[str, str]
    suffix: str

    @property
    def session(self) -> str:
        """The name of its case: ``sub-01`` or ``sub-01_ses-1``."""
        return "_".join(f"{key}-{self.entities[key]}" for key in ("sub", "ses") if key in self.entities)


def find_bids(source: Path, folder: Path, options: BidsOptions, workers: int | None = None) -> Layout:
    """Every session with images of all modalities; those with a segmentation are training cases.

    Args:
        source: the BIDS dataset.
        folder: the raw dataset to be.
        options: what to take.
        workers: processes that read label values, where no table names them.

    Raises:
        ConfigError: choices that have to be made, or that do not exist.
        DatasetError: another layout, no segmentations, or tables that contradict each other.
    """
    images = _images(source)
    pipeline, segmentations = _segmentations(source, options)
    suffixes = options.suffixes or _common_suffixes(images)
    chosen, problems = _choose(images, suffixes, options.wanted)
    labels, more = _choose_labels(segmentations, options.wanted)
    alone = sorted(set(labels) - set(chosen))
    problems += more + [f"{name}: segmented, but not all of {', '.join(suffixes)} are there" for name in alone]
    if problems:
        raise DatasetError(summarise_problems(problems))
    ending = common_ending([path for files in chosen.values() for path in files] + list(labels.values()))
    cases = []
    for name, files in sorted(chosen.items()):
        part = TRAINING if name in labels else TEST
        steps = tuple(PlaceFile(path, image_target(folder, part, name, k, ending)) for k, path in enumerate(files))
        truth = PlaceFile(labels[name], label_target(folder, part, name, ending)) if name in labels else None
        cases.append(ConvertedCase(name, part, steps, truth, name.split("_")[0]))
    return Layout(
        format="bids",
        title=source.resolve().name,
        channels=tuple(suffixes),
        labels=_names(pipeline) or _values_of(list(labels.values()), workers),
        ending=ending,
        cases=tuple(cases),
        options={
            "suffixes": options.suffixes and list(options.suffixes),
            "derivatives": options.derivatives,
            "entities": list(options.entities),
        },
        note=_note(suffixes, images),
    )


def _note(suffixes: Sequence[str], images: Sequence[_File]) -> str:
    others = [each for each in _suffixes(images) if each not in suffixes]
    also = f"; there are also {listing(others)}" if others else ""
    return f"channels: {', '.join(suffixes)} (others with --suffixes{also})"


def _parse(path: Path) -> _File | None:
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    entities = dict(each.split("-", 1) for each in match["entities"].strip("_").split("_"))
    return _File(path, entities, match["suffix"]) if "sub" in entities else None  # type: ignore[arg-type]


def _images(source: Path) -> list[_File]:
    paths = [*source.glob("sub-*/anat/*.nii*"), *source.glob("sub-*/ses-*/anat/*.nii*")]
    named = [parsed for path in sorted(paths) if (parsed := _parse(path)) is not None]
    found = [each for each in named if _NO_IMAGE.fullmatch(each.suffix) is None]
    if not found:
        raise DatasetError(f"no images in {source}: expected files like sub-01/anat/sub-01_T1w.nii.gz")
    return found


def _segmentations(source: Path, options: BidsOptions) -> tuple[Path, list[_File]]:
    """The pipeline's folder and its discrete segmentations."""
    found: dict[str, list[_File]] = {}
    for path in sorted((source / "derivatives").rglob("*_dseg.nii*")):
        parsed, inside = _parse(path), path.relative_to(source / "derivatives").parts
        if parsed is not None:
            found.setdefault("" if inside[0].startswith("sub-") else inside[0], []).append(parsed)
    if options.derivatives is not None:
        if options.derivatives not in found:
            raise ConfigError(f"--derivatives {options.derivatives} has no ..._dseg files; {_there(found)}")
        return source / "derivatives" / options.derivatives, found[options.derivatives]
    if not found:
        raise DatasetError(
            f"no segmentations in {source}: expected files like derivatives/manual/sub-01/anat/sub-01_dseg.nii.gz"
        )
    if len(found) > 1:
        raise ConfigError(f"several pipelines have segmentations; choose one with --derivatives: {_there(found)}")
    name, files = found.popitem()
    return source / "derivatives" / name, files


def _suffixes(images: Sequence[_File]) -> list[str]:
    return sorted({each.suffix for each in images})


def _there(found: Mapping[str, object]) -> str:
    return f"there are {listing(sorted(found))}" if found else "no pipeline has any"


def _common_suffixes(images: Sequence[_File]) -> tuple[str, ...]:
    sessions: dict[str, set[str]] = {}
    for each in images:
        sessions.setdefault(each.session, set()).add(each.suffix)
    common = set.intersection(*sessions.values()) & INTENSITIES
    if not common:
        there = _suffixes(images)
        raise ConfigError(
            f"no picture such as T1w, T2w or FLAIR is in every session; choose with --suffixes: {listing(there)}"
        )
    return tuple(sorted(common))


def _matching(files: Sequence[_File], wanted: Mapping[str, str]) -> list[_File]:
    """Those that do not say otherwise; of several, those that say so themselves."""
    fine = [each for each in files if all(each.entities.get(key, value) == value for key, value in wanted.items())]
    said = [each for each in fine if any(key in each.entities for key in wanted)]
    return said or fine


def _choose(
    images: Sequence[_File], suffixes: Sequence[str], wanted: Mapping[str, str]
) -> tuple[dict[str, tuple[Path, ...]], list[str]]:
    """The images of every session that has all modalities, and what could not be decided."""
    unknown = [suffix for suffix in suffixes if suffix not in {each.suffix for each in images}]
    if unknown:
        there = _suffixes(images)
        raise ConfigError(f"--suffixes: no image is {listing(unknown)}; there are {listing(there)}")
    chosen: dict[str, tuple[Path, ...]] = {}
    problems = []
    for session in sorted({each.session for each in images}):
        files = []
        for suffix in suffixes:
            found = _matching([e for e in images if (e.session, e.suffix) == (session, suffix)], wanted)
            if len(found) > 1:
                names = listing([each.path.name for each in found])
                problems.append(f"{session}: several {suffix} images; choose one with --entities: {names}")
            files += [each.path for each in found[:1]]
        if len(files) == len(suffixes):
            chosen[session] = tuple(files)
    return chosen, problems


def _choose_labels(files: Sequence[_File], wanted: Mapping[str, str]) -> tuple[dict[str, Path], list[str]]:
    chosen, problems = {}, []
    for session in sorted({each.session for each in files}):
        found = _matching([each for each in files if each.session == session], wanted)
        if len(found) > 1:
            names = listing([each.path.name for each in found])
            problems.append(f"{session}: several segmentations; choose one with --entities: {names}")
        if found:
            chosen[session] = found[0].path
    return chosen, problems


def _names(pipeline: Path) -> dict[str, int]:
    """Name -> value of every table of labels in a pipeline's folder; empty where there is none.

    Raises:
        DatasetError: a table without the columns, or tables that contradict each other.
    """
    names: dict[int, tuple[str, Path]] = {}
    for path in sorted(pipeline.rglob("*dseg.tsv")):
        table = read_table(path, "the table of labels", ["index", "name"])
        for index, name in zip(table["index"], table["name"], strict=True):
            if not str(index).isdigit() or not name:
                raise DatasetError(f"{path}: index must be a whole number and name a word, got {index!r} and {name!r}")
            earlier = names.setdefault(int(index), (name, path))
            if earlier[0] != name:
                raise DatasetError(
                    f"value {index} is {earlier[0]!r} in {earlier[1]} but {name!r} in {path}; correct one"
                )
    return {name: value for value, (name, _) in sorted(names.items()) if value != 0}


def _values_of(paths: Sequence[Path], workers: int | None) -> dict[str, int]:
    """``label_3`` -> 3 for every value in the label maps."""
    found = map_cases(_values, paths, choose_workers(workers, len(paths)), "reading label values")
    return {f"label_{value}": value for value in sorted(set().union(*found) - {0})}


def _values(path: Path) -> set[int]:
    return {int(value) for value in np.unique(read_labels(path)[0])}
