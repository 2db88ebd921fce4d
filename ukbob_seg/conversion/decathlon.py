"""The layouts with the Medical Segmentation Decathlon's dataset.json: ``msd`` itself, and nnU-Net's first version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ukbob_seg.conversion.run import TEST, TRAINING, ConvertedCase, Layout, image_target, label_target
from ukbob_seg.conversion.steps import PlaceFile, SplitChannels, Step, common_ending, ending_of
from ukbob_seg.dataset.spec import summarise_problems
from ukbob_seg.errors import DatasetError, listing
from ukbob_seg.files import read_json

_KEPT = ("description", "reference", "licence", "release")


@dataclass(frozen=True)
class Description:
    """A dataset.json of the Decathlon.

    Attributes:
        title: of the dataset.
        channels: names in ``modality``.
        labels: name -> value without background.
        training: (image, label) paths relative to the dataset, as listed.
        test: image paths.
        extra: description, reference, licence, release, where given.
    """

    title: str
    channels: tuple[str, ...]
    labels: dict[str, int]
    training: tuple[tuple[str, str], ...]
    test: tuple[str, ...]
    extra: dict[str, Any]


def read_description(folder: Path) -> Description:
    """Read and check ``folder/dataset.json``.

    Raises:
        DatasetError: missing, malformed, or with paths that lead out of the folder.
    """
    path = folder / "dataset.json"
    content = read_json(path, "dataset description")
    if isinstance(content, dict) and "channel_names" in content:
        raise DatasetError(f"{path} is of nnU-Net v2 already; its folder is a raw dataset as it is")
    if not isinstance(content, dict) or any(key not in content for key in ("modality", "labels", "training")):
        raise DatasetError(f"{path} needs the entries modality, labels and training, as the Decathlon has them")
    channels = _numbered(content["modality"], f"{path}: modality")
    if list(channels) != list(range(len(channels))):
        raise DatasetError(f"{path}: modality must be numbered 0, 1, 2, ..., got {sorted(channels)}")
    classes = {value: name for value, name in _numbered(content["labels"], f"{path}: labels").items() if value != 0}
    if len(set(classes.values())) != len(classes):
        raise DatasetError(f"{path}: two labels have one name: {listing(sorted(classes.values()))}")
    try:
        training = tuple((str(entry["image"]), str(entry["label"])) for entry in content["training"])
        test = tuple(str(e["image"]) if isinstance(e, Mapping) else str(e) for e in content.get("test") or ())
    except (TypeError, KeyError) as error:
        raise DatasetError(
            f'{path}: training must list {{"image": ..., "label": ...}}, test must list paths'
        ) from error
    for name in (*(each for pair in training for each in pair), *test):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DatasetError(f"{path}: {name!r} leads out of the dataset; correct it")
    extra = {key: content[key] for key in _KEPT if key in content}
    title = str(content.get("name") or folder.name)
    return Description(
        title, tuple(channels.values()), {name: value for value, name in classes.items()}, training, test, extra
    )


def _numbered(content: Any, what: str) -> dict[int, str]:
    if not isinstance(content, Mapping) or not content or not all(str(key).isdigit() for key in content):
        raise DatasetError(f'{what} must look like {{"0": "...", "1": "..."}}, got {content!r}')
    return {int(key): str(content[key]) for key in sorted(content, key=int)}


def find_msd(source: Path, folder: Path) -> Layout:
    """``TaskXX_Name`` of the Decathlon: images of one channel are placed as they are, others are split.

    Args:
        source: folder with dataset.json, imagesTr, labelsTr and perhaps imagesTs.
        folder: the raw dataset to be.

    Raises:
        DatasetError: another layout, or files that are not there.
    """
    description = read_description(source)
    images = [source / image for image, _ in description.training] + [source / image for image in description.test]
    labels = [source / label for _, label in description.training]
    _require(source, [*images, *labels])
    ending = common_ending([*images, *labels])
    count = len(description.channels)
    cases = []
    for number, image in enumerate(images):
        name, part = _stem(image), TRAINING if number < len(labels) else TEST
        targets = tuple(image_target(folder, part, name, channel, ending) for channel in range(count))
        step: Step = PlaceFile(image, targets[0]) if _is_volume(image, count) else SplitChannels(image, targets)
        label = PlaceFile(labels[number], label_target(folder, part, name, ending)) if part == TRAINING else None
        cases.append(ConvertedCase(name, part, (step,), label))
    return _layout("msd", description, ending, cases)


def find_nnunetv1(source: Path, folder: Path) -> Layout:
    """``nnUNet_raw_data/TaskXXX_Name`` of nnU-Net's first version: files have their names already.

    dataset.json lists cases without the channel number (``imagesTr/CASE.nii.gz``); its files are ``CASE_0000.nii.gz``.

    Args:
        source: folder with dataset.json, imagesTr, labelsTr and perhaps imagesTs, labelsTs.
        folder: the raw dataset to be.

    Raises:
        DatasetError: another layout, or files that are not there.
    """
    description = read_description(source)
    ending, count = ".nii.gz", len(description.channels)
    listed = [(image, label, TRAINING) for image, label in description.training]
    listed += [(image, None, TEST) for image in description.test]  # type: ignore[misc]
    cases, needed = [], []
    for image, label, part in listed:
        name = _stem(Path(image))
        files = [source / Path(image).parent / f"{name}_{channel:04d}{ending}" for channel in range(count)]
        steps = tuple(
            PlaceFile(path, image_target(folder, part, name, channel, ending)) for channel, path in enumerate(files)
        )
        truth = source / label if label else source / "labelsTs" / f"{name}{ending}"
        placed = PlaceFile(truth, label_target(folder, part, name, ending)) if label or truth.is_file() else None
        needed += files if placed is None else [*files, truth]
        cases.append(ConvertedCase(name, part, steps, placed))
    _require(source, needed)
    return _layout("nnunetv1", description, ending, cases)


def _layout(name: str, description: Description, ending: str, cases: Sequence[ConvertedCase]) -> Layout:
    return Layout(
        format=name,
        title=description.title,
        channels=description.channels,
        labels=description.labels,
        ending=ending,
        cases=tuple(cases),
        extra=description.extra,
    )


def _stem(path: Path) -> str:
    return path.name.removesuffix(ending_of(path))


def _is_volume(path: Path, channels: int) -> bool:
    """Whether a file needs no splitting: a dataset of one channel whose file has three dimensions."""
    import nibabel.nifti1

    if channels > 1:
        return False
    try:
        return len(nibabel.nifti1.load(path).shape) == 3
    except Exception as error:  # nibabel raises what the damage leads to
        raise DatasetError(f"{path} cannot be read: it is corrupt or truncated; copy it again") from error


def _require(source: Path, paths: Sequence[Path]) -> None:
    """Refuse a dataset that lists no files, or files that are not there."""
    if not paths:
        raise DatasetError(f"{source / 'dataset.json'} lists no cases")
    missing = [f"{path} is listed in dataset.json but does not exist" for path in paths if not path.is_file()]
    if missing:
        raise DatasetError(summarise_problems(missing))
