"""The images of a cohort: which cases there are, of which channels, and which of these a model is given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ukbob_seg.dataset.spec import Case, DatasetSpec, group_channels, summarise_problems
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.files import read_json

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
_NUMBERED = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class Cohort:
    """Images in nnU-Net's raw format.

    Attributes:
        folder: of the images.
        channel_names: in channel order.
        file_ending: of all files.
        cases: by name, sorted.
        is_named: whether anybody named the channels; else they are called by their numbers.
    """

    folder: Path
    channel_names: tuple[str, ...]
    file_ending: str
    cases: tuple[Case, ...]
    is_named: bool = True

    @classmethod
    def find(cls, source: Path, channel_names: Sequence[str] | None = None) -> Cohort:
        """Look through a raw dataset (with ``imagesTr``) or a folder of ``CASE_0000.ext`` files.

        Args:
            source: the folder.
            channel_names: of the channels; None for those of dataset.json, else ``channel_0`` and so on.

        Raises:
            DatasetError: no such folder, no cases, or cases that are not complete; lists them.
            ConfigError: another number of names than channels.
        """
        if not source.is_dir():
            raise DatasetError(f"input {source} is not a folder")
        folder = source / "imagesTr" if (source / "imagesTr").is_dir() else source
        files = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        endings = {ending for name in files for ending in ENDINGS if name.endswith(ending)}
        if ".nii.gz" in endings and not any(name.endswith(".nii") for name in files):
            endings.discard(".nii")
        if len(endings) != 1:
            what = f"files of several kinds ({', '.join(sorted(endings))})" if endings else "no images"
            raise DatasetError(f"{folder} has {what}; expected files like CASE_0000.nii.gz, all of one kind")
        ending = endings.pop()
        numbers = [_NUMBERED.fullmatch(name.removesuffix(ending)) for name in files if name.endswith(ending)]
        count = 1 + max((int(found["channel"]) for found in numbers if found), default=0)
        given = channel_names or _names_beside(source, folder)
        names = tuple(given or (f"channel_{k}" for k in range(count)))
        if len(names) != count:
            raise ConfigError(
                f"--channel-names: {len(names)} names ({', '.join(names)}) for {count} channels in {folder}"
            )
        if len(set(names)) < len(names):
            raise ConfigError(f"channel names must differ, got {', '.join(names)}")
        content = {
            "channel_names": {str(k): name for k, name in enumerate(names)},
            "labels": {"background": 0, "any": 1},
            "file_ending": ending,
        }
        grouped = group_channels(folder, DatasetSpec.from_json(content, folder.name))
        if grouped.problems:
            raise DatasetError(summarise_problems(list(grouped.problems)))
        cases = tuple(Case(name, grouped.cases[name]) for name in sorted(grouped.cases))
        return cls(folder, names, ending, cases, given is not None)

    def table(self, name: str) -> Path | None:
        """A table of the raw dataset that the images are of; None where there is none."""
        folders = [self.folder.parent] if self.folder.name.startswith("images") else [self.folder]
        return next((folder / name for folder in folders if (folder / name).is_file()), None)

    def choose(self, wanted: Sequence[str] | None, needed: int, option: str) -> tuple[int, ...]:
        """Numbers of the channels that a model of ``needed`` channels is given.

        Args:
            wanted: names or numbers; None for all, if there are as many.
            needed: channels of the model.
            option: that says so, for messages.

        Raises:
            ConfigError: an unknown channel, one twice, or another number of them.
        """
        if wanted is None:
            if len(self.channel_names) != needed:
                raise ConfigError(
                    f"the cohort has {len(self.channel_names)} channels ({', '.join(self.channel_names)}), the model "
                    f"takes {needed}: say which with --channel, or merge the label maps of several with --fuse"
                )
            return tuple(range(needed))
        known = {name: number for number, name in enumerate(self.channel_names)}
        known |= {str(number): number for number in range(len(self.channel_names))}
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise ConfigError(f"{option}: no channel {unknown[0]!r}; the cohort has {', '.join(self.channel_names)}")
        chosen = tuple(known[name] for name in wanted)
        if len(set(chosen)) < len(chosen) or len(chosen) != needed:
            raise ConfigError(f"{option}: {needed} different channels are needed, got {', '.join(wanted)}")
        return chosen

    def names_by_model(self, chosen: Sequence[int], names: Sequence[str]) -> tuple[str, ...]:
        """Names of all channels: where nobody named them, those that a model was given are called as in the model.

        Names choose how planning normalizes a channel: a CT must not be called anything else.

        Args:
            chosen: numbers of the channels that the model is given.
            names: its names of these.
        """
        known = dict(zip(chosen, names, strict=True))
        renamed = tuple(known.get(k, name) for k, name in enumerate(self.channel_names))
        return self.channel_names if self.is_named or len(set(renamed)) < len(renamed) else renamed


def _names_beside(source: Path, folder: Path) -> tuple[str, ...] | None:
    """Channel names of the dataset.json of a raw dataset, or of the folder above the images."""
    for path in (source / "dataset.json", folder.parent / "dataset.json"):
        if path.is_file():
            content = read_json(path, "dataset description")
            names = content.get("channel_names") if isinstance(content, dict) else None
            if not isinstance(names, dict) or sorted(names) != sorted(str(k) for k in range(len(names))):
                raise DatasetError(f'{path}: channel_names must look like {{"0": "fat", "1": "water"}}, got {names!r}')
            return tuple(str(names[str(k)]) for k in range(len(names)))
    return None
