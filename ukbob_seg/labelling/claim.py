"""Whose an output folder is: of one cohort, one model, one way to label; and the cohort's tables in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ukbob_seg.errors import ConfigError, DatasetError, listing
from ukbob_seg.files import file_sha256, place_file, read_json, write_json
from ukbob_seg.inference.earlier import first_difference
from ukbob_seg.labelling.cohort import Cohort
from ukbob_seg.labelling.outputs import HOW, label_path, remove_case

TABLES = ("groups.csv", "demographics.csv")  # subjects, by which training splits; age and sex, for the filter's bounds
COPIED = "tables"  # in the record: which of them were copied, and their content
COHORT, HASHES = "cohort", "checkpoint_sha256"  # entries that earlier versions did not write
_SAID = {HASHES: "content of the checkpoints"}


def claim(cohort: Cohort, output: Path, record: Mapping[str, Any], overwrite: bool, is_part: bool) -> None:
    """Recognise a folder as begun with the same cohort and model, or make it ready for these; copy the tables.

    Args:
        cohort: whose images are labelled.
        output: dataset folder, which exists.
        record: of how, as JSON keeps it.
        overwrite: labels of these cases that were made otherwise.
        is_part: whether others may be at work in the folder.

    Raises:
        ConfigError: labels made otherwise that are not to be replaced, images of somebody else, or edited tables.
        DatasetError: cases or channels that the cohort does not have.
    """
    before = read_json(output / HOW, "record of the labelling") if (output / HOW).is_file() else None
    if before is None and (mine := _files(output / "imagesTr")):
        raise ConfigError(
            f"{output} has images that this command did not put there, such as {mine[0]}; give another folder"
        )
    changed = _difference(cohort, output, before, record)
    if changed and not overwrite:
        raise ConfigError(
            f"{output} holds labels made otherwise ({_said(changed, before, record)}); give another folder, or "
            "--overwrite"
        )
    if changed and is_part:
        raise ConfigError(
            f"--overwrite with --part: parts could remove each other's labels; remove {output / 'labelsTr'} and "
            f"{output / HOW} first"
        )
    _refuse_strangers(cohort, output)
    copied = dict(before.get(COPIED, {})) if isinstance(before, dict) else {}
    tables = _copy_tables(cohort, output, copied, replaced=COHORT in changed)
    for case in cohort.cases if changed else ():
        remove_case(output, case, cohort.file_ending, images=COHORT in changed)
    write_json(output / HOW, {**record, COPIED: tables})


def _difference(cohort: Cohort, output: Path, before: Any, record: Mapping[str, Any]) -> list[str]:
    """Entries of the record that differ; one empty name where labels are there and nothing says how they were made."""
    if before is None:
        return [""] if _files(output / "labelsTr") else []
    if not isinstance(before, dict):
        return ["record"]
    changed = [
        key for key in record if before.get(key) != record[key] and (key in before or key not in (COHORT, HASHES))
    ]
    if COHORT not in before and _links_elsewhere(cohort, output):
        changed.append(COHORT)
    return changed


def _said(changed: list[str], before: Any, record: Mapping[str, Any]) -> str:
    if changed == [""]:
        return "there is no record of how"
    names = [_SAID.get(key, key) for key in changed]
    if COHORT in changed and isinstance(before, dict) and COHORT in before:
        names[changed.index(COHORT)] = f"cohort, {before[COHORT]}"
    if "settings" in changed and isinstance(before, dict):
        names[changed.index("settings")] = f"settings: {first_difference(before.get('settings'), record['settings'])}"
    return f"other {', '.join(names)}"


def _links_elsewhere(cohort: Cohort, output: Path) -> bool:
    """Whether what an earlier version linked, which kept no name of the cohort, are images of another one."""
    pairs = [(output / "imagesTr" / case.images[0].name, case.images[0]) for case in cohort.cases]
    return any(target.is_symlink() and target.resolve() != image.resolve() for target, image in pairs)


def _refuse_strangers(cohort: Cohort, output: Path) -> None:
    expected = {image.name for case in cohort.cases for image in case.images}
    expected_labels = {label_path(output, case, cohort.file_ending).name for case in cohort.cases}
    strangers = [f"imagesTr/{name}" for name in _files(output / "imagesTr") if name not in expected]
    strangers += [f"labelsTr/{name}" for name in _files(output / "labelsTr") if name not in expected_labels]
    if strangers:
        raise DatasetError(
            f"{output} holds cases or channels that the cohort does not have; delete them: {listing(strangers)}"
        )


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def _copy_tables(cohort: Cohort, output: Path, copied: dict[str, str], replaced: bool) -> dict[str, str]:
    """Copy the tables that lie beside the cohort's images, and say what was copied.

    Raises:
        ConfigError: one in the output was edited there.
    """
    tables: dict[str, str] = {}
    for name in TABLES:
        source, target = cohort.table(name), output / name
        own = target.is_file() and file_sha256(target) == copied.get(name)
        if source is None:
            if own and replaced:
                target.unlink()  # of the cohort before
            elif own:
                tables[name] = copied[name]
            continue
        tables[name] = file_sha256(source)
        if target.is_file() and file_sha256(target) == tables[name]:
            continue
        if target.is_file() and not own:
            raise ConfigError(
                f"{target} is another table than {source} and was not copied from there; make them alike or remove "
                "one of them"
            )
        place_file(source, target)
    return tables
