"""What a challenge's protocol consists of: where its files are, what its labels mean, what it wants back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ukbob_seg.errors import ConfigError, DatasetError

ENDING = ".nii.gz"
TRAINING, VALIDATION, TEST = "Tr", "Va", "Ts"
MODALITIES = ("mri", "ct", "all")

Labels = Mapping[str, "int | list[int]"]


@dataclass(frozen=True)
class ConvertOptions:
    """What the user may choose; None is the protocol's default, and an option that a protocol lacks is refused.

    Attributes:
        modality: AMOS: ``mri`` (default), ``ct`` or ``all``.
        all_organs: AMOS: 15 organs instead of 13.
        validation: AMOS: train on the labelled validation cases as well.
        separate_adrenals: BTCV: 13 classes instead of 12.
    """

    modality: str | None = None
    all_organs: bool | None = None
    validation: bool | None = None
    separate_adrenals: bool | None = None

    def __post_init__(self) -> None:
        if self.modality is not None and self.modality not in MODALITIES:
            raise ConfigError(f"--modality must be one of {', '.join(MODALITIES)}, got {self.modality!r}")

    def given(self) -> dict[str, str | bool]:
        """Those that are not at the default."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class SourceCase:
    """One case in the challenge's own layout.

    Attributes:
        name: of the case in the raw dataset.
        part: ``Tr``, ``Va`` or ``Ts``: the folder it goes to.
        images: one file per channel.
        label: its label map, or None (test cases).
        subject: of a training case, where the challenge tells subjects apart.
    """

    name: str
    part: str
    images: tuple[Path, ...]
    label: Path | None = None
    subject: str | None = None


@dataclass(frozen=True)
class Found:
    """A challenge's folder, as a converter understood it.

    Attributes:
        cases: all of them.
        channel_names: for dataset.json; they choose the normalization.
        labels: for dataset.json.
        values: label value in the challenge's files -> value in the raw dataset.
        order: ``regions_class_order``, or None without regions.
        clip: intensities are limited to this interval in the written images; None copies the files.
        edition: which layout of several was found; empty where there is one.
    """

    cases: tuple[SourceCase, ...]
    channel_names: tuple[str, ...]
    labels: Labels
    values: Mapping[int, int]
    order: tuple[int, ...] | None = None
    clip: tuple[float, float] | None = None
    edition: str = ""


@dataclass(frozen=True)
class SubmissionRules:
    """What the organisers want back.

    Attributes:
        image: whole name of the (first) image file of a test case, in the challenge's layout or the converted one; its
            group ``id`` is what the following two build upon.
        image_names: examples of such names, for messages.
        case: name of the case in the raw dataset; ``{id}`` is replaced.
        member: name of the label map in the archive, likewise.
        classes: class name -> value that the organisers expect, by edition ("" where there is one).
        regions: value in predictions -> value that the organisers expect, by edition, where predictions are regions;
            empty where they are classes, which are matched by name.
        region_labels: of the dataset.json that such predictions come with.
        region_order: its ``regions_class_order``.
        edition_of: edition of a case's id.
        has_modality: whether an id belongs to a modality; None where there is one modality.
    """

    image: re.Pattern[str]
    image_names: str
    case: str
    member: str
    classes: Mapping[str, Mapping[str, int]]
    regions: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    region_labels: Labels = field(default_factory=dict)
    region_order: tuple[int, ...] = ()
    edition_of: Callable[[str], str] = lambda _: ""
    has_modality: Callable[[str, str], bool] | None = None

    def allowed_values(self, edition: str) -> tuple[int, ...]:
        """Label values of a submission, background included."""
        return (0, *sorted(set(self.classes[edition].values())))


@dataclass(frozen=True)
class Protocol:
    """One challenge.

    Attributes:
        name: on the command line.
        title: for people.
        dataset: the second part of the raw dataset's folder name.
        layout: the files that are expected, for messages.
        options: names of the fields of ``ConvertOptions`` that it knows.
        find: looks at a folder and says what is there.
        submission: None where there is nothing to submit.
    """

    name: str
    title: str
    dataset: str
    layout: str
    options: frozenset[str]
    find: Callable[[Path, ConvertOptions], Found]
    submission: SubmissionRules | None = None


def not_recognised(source: Path, title: str, layout: str, why: str) -> DatasetError:
    """The error for a folder in another layout: what is missing, and what was expected."""
    return DatasetError(f"{source} is not in the layout of {title}: {why}; expected\n{layout}")


def existing_folder(path: Path, title: str) -> Path:
    """A folder that is there.

    Raises:
        DatasetError: it is not.
    """
    if not path.is_dir():
        raise DatasetError(f"{path} is no folder; give the folder of {title}")
    return path


def files_matching(folder: Path, pattern: re.Pattern[str]) -> dict[str, Path]:
    """Files directly in a folder whose whole name matches, by the pattern's group ``id``, sorted; hidden ones not."""
    if not folder.is_dir():
        return {}
    found = {}
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is not None and path.is_file():
            found[match["id"]] = path
    return found
