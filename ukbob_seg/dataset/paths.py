"""Where things are: the three roots and the dataset folders inside them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ukbob_seg.errors import ConfigError, DatasetError

_FOLDER = re.compile(r"Dataset(\d{3,})_(.+)")


@dataclass(frozen=True)
class Roots:
    """The raw, preprocessed and results folders (nnU-Net's convention)."""

    raw: Path
    preprocessed: Path
    results: Path

    @classmethod
    def below(cls, folder: Path) -> Roots:
        """The default layout: raw/, preprocessed/ and results/ in one folder."""
        return cls(Path(folder) / "raw", Path(folder) / "preprocessed", Path(folder) / "results")


def list_datasets(root: Path) -> dict[int, Path]:
    """Dataset folders directly below ``root``, by id.

    Raises:
        DatasetError: the root does not exist, or two folders share an id.
    """
    if not root.is_dir():
        raise DatasetError(
            f"folder {root} does not exist; give it with --raw/--preprocessed/--results or the variables "
            "UKBOB_RAW, UKBOB_PREPROCESSED, UKBOB_RESULTS"
        )
    found: dict[int, Path] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        match = _FOLDER.fullmatch(folder.name)
        if match is None:
            continue
        number = int(match[1])
        if number in found:
            raise DatasetError(f"two datasets with id {number} in {root}: {found[number].name} and {folder.name}")
        found[number] = folder
    return found


def find_dataset(root: Path, dataset: str | int) -> Path:
    """Find a dataset folder by id (``4``) or by name (``Dataset004_Hippocampus``; a path before it and a slash after
    it, as shells complete them, do not matter).

    Raises:
        ConfigError: no such dataset; the message lists those that exist.
    """
    datasets = list_datasets(root)
    text = str(dataset)
    if text.isdigit() and int(text) in datasets:
        return datasets[int(text)]
    for folder in datasets.values():
        if folder.name == Path(text).name:
            return folder
    known = ", ".join(folder.name for folder in datasets.values()) or "none"
    raise ConfigError(f"no dataset {text!r} in {root} (found: {known}); folders must be named DatasetXXX_Name")
