"""One summary over the held-out cases of several folds, each predicted by networks that have not seen it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ukbob_seg.dataset.paths import Roots, find_dataset
from ukbob_seg.dataset.spec import Case, DatasetSpec, require_cases
from ukbob_seg.errors import ConfigError, DatasetError, listing
from ukbob_seg.evaluation.evaluate import EvaluationSummary, ReportOptions, evaluate_pairs
from ukbob_seg.training.splits import Split, choose_split, load_groups, load_or_make_splits
from ukbob_seg.training.state import has_run


@dataclass(frozen=True)
class HeldOut:
    """The cases that folds of a dataset hold out.

    Attributes:
        raw: folder of the raw dataset.
        spec: its contract.
        cases: its training cases, by name; those held out have labels.
        folds: fold -> names of its held-out cases; no name is in two of them.
    """

    raw: Path
    spec: DatasetSpec
    cases: Mapping[str, Case]
    folds: Mapping[str, tuple[str, ...]]

    @classmethod
    def load(cls, dataset: str | int, roots: Roots, folds: Sequence[str] | None = None) -> HeldOut:
        """Read the raw dataset and its splits.

        Args:
            dataset: id or folder name.
            roots: folders; labels are read from the raw dataset, splits from the preprocessed one.
            folds: which, None for all of the splits.

        Raises:
            DatasetError: no splits, fold ``all``, a case in two folds, or one without labels.
            ConfigError: no such dataset or fold, or a fold is given twice.
        """
        raw = find_dataset(roots.raw, dataset)
        spec = DatasetSpec.load(raw)
        cases = {case.name: case for case in require_cases(raw, spec)}
        splits = _read_splits(roots.preprocessed / raw.name, raw, sorted(cases))
        chosen = tuple(folds) if folds else tuple(str(number) for number in range(len(splits)))
        if "all" in chosen:
            raise DatasetError("fold all holds no case out, so that nothing can be judged by it; give numbered folds")
        if twice := sorted({fold for fold in chosen if chosen.count(fold) > 1}):
            raise ConfigError(f"fold {twice[0]} is given twice")
        held = {fold: choose_split(splits, fold, sorted(cases)).val for fold in chosen}
        owner: dict[str, str] = {}
        for fold, names in held.items():
            for name in names:
                if owner.setdefault(name, fold) != fold:
                    raise DatasetError(
                        f"case {name} is held out by fold {owner[name]} and by fold {fold}, and would count twice; "
                        "choose folds that share no case"
                    )
                if cases[name].label is None:
                    raise DatasetError(f"case {name}, which fold {fold} holds out, has no labels in {raw}")
        return cls(raw, spec, cases, held)

    def references(self) -> dict[str, Path]:
        """Reference label file of each held-out case, in the order of folds."""
        return {name: label for names in self.folds.values() for name in names if (label := self.cases[name].label)}


def _read_splits(folder: Path, raw: Path, names: Sequence[str]) -> list[Split]:
    """Those that were trained with: none are made here, since what training held out would be a guess."""
    if not any((folder / name).is_file() for name in ("splits.json", "splits_final.json")):
        raise DatasetError(
            f"{folder} has no splits.json, so that it is not known which cases each fold held out; train first, or "
            "give the folder with --preprocessed"
        )
    return load_or_make_splits(folder, names, load_groups(raw / "groups.csv", names))


def accumulate_crossval(
    model_folder: Path,
    roots: Roots,
    folds: Sequence[str] | None = None,
    tolerance_mm: float = 2.0,
    workers: int | None = None,
) -> EvaluationSummary:
    """Score the validation predictions of several folds of a model as one set of cases.

    Writes ``MODEL/crossval_results_folds_0_1_.../`` with summary.json, metrics.csv and report.html; the label files
    stay where they are. The scores are this function's own, whatever the folds' summaries say; those of an earlier call
    are kept.

    Args:
        model_folder: ``results/DatasetXXX_Name/CONFIG__NETWORK``.
        roots: folders; labels are read from the raw dataset, splits from the preprocessed one.
        folds: which, None for all of the splits.
        tolerance_mm: of the normalized surface Dice.
        workers: processes, None to choose.

    Raises:
        DatasetError: a fold has no complete validation, a case is in two folds, or no splits are there.
        ConfigError: no such dataset or fold.
    """
    held_out = HeldOut.load(Path(model_folder).resolve().parent.name, roots, folds)
    check_validated(Path(model_folder), held_out)
    return accumulate(Path(model_folder), held_out, tolerance_mm, workers)


def accumulate(
    folder: Path, held_out: HeldOut, tolerance_mm: float = 2.0, workers: int | None = None
) -> EvaluationSummary:
    """As ``accumulate_crossval``, for a model folder or an ensemble's, which has the same ``fold_K/validation``."""
    references = held_out.references()
    pairs = [
        (name, path, references[name])
        for fold in held_out.folds
        for name, path in fold_predictions(folder, fold, held_out).items()
    ]
    images = held_out.raw / "imagesTr"
    report = ReportOptions(images=images if images.is_dir() else None)
    output = crossval_folder(folder, held_out.folds)
    return evaluate_pairs(pairs, held_out.spec.labels, output, tolerance_mm, workers, report=report)


def crossval_folder(folder: Path, folds: Iterable[str]) -> Path:
    """Where the common results of some folds go."""
    return folder / f"crossval_results_folds_{'_'.join(folds)}"


def check_validated(model_folder: Path, held_out: HeldOut) -> None:
    """Refuse a model of which a fold was not validated to the end, on other cases, or with other labels.

    Training removes a validation that its network has outgrown, so that one that is there is of the checkpoint.

    Raises:
        DatasetError: says what is lacking.
    """
    if (model_folder / "dataset.json").is_file():
        trained = DatasetSpec.load(model_folder).labels
        if difference := trained.difference(held_out.spec.labels, (str(model_folder), str(held_out.raw))):
            raise DatasetError(f"{difference}; train again with the labels as they are now")
    without = [f for f in held_out.folds if not (model_folder / f"fold_{f}" / "validation" / "summary.json").is_file()]
    if without:
        others = [fold for fold in held_out.folds if fold not in without]
        raise DatasetError(
            f"{model_folder} has no complete validation of fold {', '.join(without)} (no validation/summary.json); "
            f"{_how_to_validate(model_folder, without[0], held_out)}"
            + (f", or compare on folds that have one: -f {' '.join(others)}" if others else "")
        )
    for fold in held_out.folds:
        fold_predictions(model_folder, fold, held_out)


def fold_predictions(folder: Path, fold: str, held_out: HeldOut) -> dict[str, Path]:
    """Label file of each case that a fold holds out.

    Raises:
        DatasetError: one is lacking, or there is one of another case.
    """
    place, ending, names = folder / f"fold_{fold}" / "validation", held_out.spec.file_ending, held_out.folds[fold]
    found = {path.name.removesuffix(ending): path for path in sorted(place.glob(f"[!.]*{ending}"))}
    if lacking := [name for name in names if name not in found]:
        raise DatasetError(
            f"{folder} has no complete validation of fold {fold}: {len(lacking)} of {len(names)} cases have no label "
            f"file ({listing(lacking, 3)}); {_how_to_validate(folder, fold, held_out)}"
        )
    if others := sorted(set(found) - set(names)):
        raise DatasetError(
            f"{place} has {others[0]}{ending} ({len(others)} such files), which fold {fold} of the splits does not "
            "hold out; train again if the splits have changed, else remove what does not belong there"
        )
    return {name: found[name] for name in names}


def _how_to_validate(folder: Path, fold: str, held_out: HeldOut) -> str:
    configuration, _, network = folder.name.partition("__")
    network = ":".join(network.rsplit(".", 1))  # package.module:Class has a dot there in the name of the folder
    begun = " --resume" if has_run(folder / f"fold_{fold}") else ""
    return (
        "train it with its final validation on all cases: "
        f"ukbob_train {int(held_out.raw.name[7:].split('_')[0])} {fold} -c {configuration} --network {network}{begun}"
    )
