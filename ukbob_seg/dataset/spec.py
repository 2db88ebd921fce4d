"""A raw dataset: dataset.json and the cases that lie beside it (nnU-Net v2's raw format)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import DatasetError
from ukbob_seg.files import read_json

_REQUIRED = ("channel_names", "labels", "file_ending")


@dataclass(frozen=True)
class Case:
    """One case on disk: its channel files in channel order, and its label file where there is one."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class DatasetSpec:
    """The contract of one dataset, as dataset.json states it.

    Attributes:
        name: ``DatasetXXX_Name``.
        channel_names: modality of each channel, in channel order; they choose the normalization.
        labels: what the label values mean.
        file_ending: of images and labels, with the dot.
        content: dataset.json as read, for copying beside a model.
    """

    name: str
    channel_names: tuple[str, ...]
    labels: LabelScheme
    file_ending: str
    content: dict[str, Any] = field(compare=False, repr=False)

    @classmethod
    def from_json(cls, content: dict[str, Any], name: str) -> DatasetSpec:
        """Validate the content of a dataset.json.

        Raises:
            DatasetError: a required entry is missing or malformed; the message names it.
        """
        if not isinstance(content, dict):
            raise DatasetError(f"{name}: dataset.json must hold an object")
        missing = [key for key in _REQUIRED if key not in content]
        if missing:
            raise DatasetError(f"{name}: dataset.json lacks {', '.join(missing)}")
        channels, labels, ending = content["channel_names"], content["labels"], content["file_ending"]
        if not isinstance(channels, dict) or not channels or not all(str(key).isdigit() for key in channels):
            raise DatasetError(f'{name}: channel_names must look like {{"0": "T1", "1": "T2"}}, got {channels!r}')
        if sorted(int(key) for key in channels) != list(range(len(channels))):
            raise DatasetError(f"{name}: channel_names must be numbered 0, 1, 2, ..., got {sorted(channels)}")
        if not isinstance(labels, dict):
            raise DatasetError(f'{name}: labels must look like {{"background": 0, "liver": 1}}, got {labels!r}')
        if not isinstance(ending, str) or not ending.startswith("."):
            raise DatasetError(f"{name}: file_ending must start with a dot, such as '.nii.gz', got {ending!r}")
        names = tuple(str(channels[key]) for key in sorted(channels, key=int))
        scheme = LabelScheme.from_json(labels, content.get("regions_class_order"))
        return cls(name, names, scheme, ending, content)

    @classmethod
    def load(cls, folder: Path) -> DatasetSpec:
        """Read ``folder/dataset.json``."""
        folder = Path(folder)
        return cls.from_json(read_json(folder / "dataset.json", "dataset description"), folder.name)


def find_cases(folder: Path, spec: DatasetSpec) -> tuple[list[Case], list[str]]:
    """List the training cases of a raw dataset, sorted by name, and everything that is wrong with the file lists.

    Cases come from the explicit ``dataset`` entry of dataset.json when there is one, else from imagesTr/labelsTr.

    Returns:
        (complete cases, problems); each problem is one sentence that names the case and the remedy.
    """
    if "dataset" in spec.content:
        return _explicit_cases(Path(folder), spec)
    images = group_channels(Path(folder) / "imagesTr", spec)
    labels_folder = Path(folder) / "labelsTr"
    cases, problems = [], list(images.problems)
    for name, files in sorted(images.cases.items()):
        label = labels_folder / f"{name}{spec.file_ending}"
        if not label.is_file():
            problems.append(f"case {name}: no label file {label}; add it or move the images to imagesTs")
        else:
            cases.append(Case(name, files, label))
    if labels_folder.is_dir():
        for path in sorted(labels_folder.glob(f"*{spec.file_ending}")):
            name = path.name.removesuffix(spec.file_ending)
            if not name.startswith(".") and name not in images.cases and name not in images.incomplete:
                problems.append(
                    f"case {name}: label {path.name} has no image; expected {name}_0000{spec.file_ending} in imagesTr"
                )
    if not cases and not problems:
        problems.append(f"{folder}: no training cases; expected files like imagesTr/CASE_0000{spec.file_ending}")
    return cases, problems


@dataclass(frozen=True)
class ChannelFiles:
    """The image files of a folder, grouped by case."""

    cases: dict[str, tuple[Path, ...]]
    incomplete: frozenset[str]
    problems: tuple[str, ...]


def group_channels(folder: Path, spec: DatasetSpec) -> ChannelFiles:
    """Group ``CASE_0000.ext, CASE_0001.ext, ...`` of a folder by case.

    Raises:
        DatasetError: the folder does not exist.
    """
    if not folder.is_dir():
        raise DatasetError(f"folder {folder} does not exist")
    channels = len(spec.channel_names)
    found: dict[str, dict[int, Path]] = {}
    problems: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.endswith(spec.file_ending):
            continue
        stem = path.name.removesuffix(spec.file_ending)
        name, separator, number = stem.rpartition("_")
        if not separator or len(number) != 4 or not number.isdigit():
            problems.append(f"{path}: the name must end in the channel number, such as {stem}_0000{spec.file_ending}")
            continue
        found.setdefault(name, {})[int(number)] = path
    problems += _twins(found)
    cases: dict[str, tuple[Path, ...]] = {}
    incomplete = set()
    for name, files in found.items():
        lacking = [f"{name}_{k:04d}{spec.file_ending}" for k in range(channels) if k not in files]
        extra = [files[k].name for k in sorted(files) if k >= channels]
        if lacking:
            problems.append(
                f"case {name}: missing channel {', '.join(lacking)}; dataset.json names {channels} channel"
                f"{'s' if channels > 1 else ''}"
            )
            incomplete.add(name)
        else:
            cases[name] = tuple(files[k] for k in range(channels))
        if extra:
            problems.append(f"case {name}: channel {', '.join(extra)} is not among the {channels} of dataset.json")
    return ChannelFiles(cases, frozenset(incomplete), tuple(problems))


def _twins(names: Iterable[str]) -> list[str]:
    """Case ids that some file systems cannot tell apart."""
    lowered: dict[str, str] = {}
    return [
        f"case {name}: duplicate case id (differs from {lowered[name.lower()]} only in upper/lower case); rename one"
        for name in names
        if lowered.setdefault(name.lower(), name) != name
    ]


def _files_of(entry: Any) -> list[str]:
    """Images and, last, the label of an entry of ``dataset``; empty when it does not have that form."""
    if not isinstance(entry, dict) or not isinstance(entry.get("images"), list):
        return []
    files = [*entry["images"], entry.get("label")]
    return files if all(isinstance(path, str) for path in files) else []


def _explicit_cases(folder: Path, spec: DatasetSpec) -> tuple[list[Case], list[str]]:
    """Cases from dataset.json's ``dataset`` entry: {case: {"images": [...], "label": ...}}, paths relative to it."""
    entries = spec.content["dataset"]
    if not isinstance(entries, dict) or not entries:
        raise DatasetError(f'{spec.name}: dataset must look like {{"case": {{"images": [...], "label": "..."}}}}')
    cases, problems = [], _twins(entries)
    for name, entry in sorted(entries.items()):
        files = _files_of(entry)
        if not files:
            problems.append(
                f"case {name}: the entry in dataset.json needs 'images' (a list of paths) and 'label' (a path)"
            )
            continue
        *images, label = (folder / path for path in files)
        if len(images) != len(spec.channel_names):
            problems.append(
                f"case {name}: {len(images)} image files for {len(spec.channel_names)} channels in dataset.json"
            )
            continue
        lacking = [str(path) for path in (*images, label) if not path.is_file()]
        if lacking:
            problems.append(f"case {name}: {', '.join(lacking)} does not exist; correct 'dataset' in dataset.json")
            continue
        cases.append(Case(name, tuple(path.resolve() for path in images), label.resolve()))
    return cases, problems


def require_cases(folder: Path, spec: DatasetSpec) -> list[Case]:
    """The training cases of a raw dataset.

    Raises:
        DatasetError: any problem with the file lists; all of them in one message.
    """
    cases, problems = find_cases(folder, spec)
    if problems:
        raise DatasetError(summarise_problems(problems))
    return cases


def summarise_problems(problems: list[str], most: int = 20, heading: str = "") -> str:
    """One message out of many problems; a single one stands by itself, without a heading.

    Args:
        problems: at least one.
        most: problems to list.
        heading: of the list, without colon; by default their number.
    """
    if len(problems) == 1:
        return problems[0]
    more = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return "\n  - ".join([f"{heading or f'{len(problems)} problems'}:", *problems[:most], *more])
