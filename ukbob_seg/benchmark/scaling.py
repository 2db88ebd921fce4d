"""How Dice grows with the number of training cases: the same budget on nested subsets, then the same fine-tuning.

Everything lies in a folder of the study's own, which serves as its results root. A *run* is one training and its
validation; a *unit* is what needs nothing of other units: a run on a subset and the fine-tuning that starts from it, or
a fine-tuning from fresh weights.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ukbob_seg.dataset.paths import Roots, find_dataset
from ukbob_seg.dataset.spec import DatasetSpec, require_cases
from ukbob_seg.errors import CheckpointError, ConfigError, DatasetError, StoppedError, listing
from ukbob_seg.evaluation.validate_fold import validate_fold
from ukbob_seg.files import digest, ensure_writable, file_sha256, read_json, write_json
from ukbob_seg.filtering.policies import LabelTrust
from ukbob_seg.parallel import Cluster, Part
from ukbob_seg.preprocessing.fingerprint import label_content
from ukbob_seg.preprocessing.plans import Plans
from ukbob_seg.preprocessing.requested_networks import load_plans
from ukbob_seg.training.checkpoint import NAMES
from ukbob_seg.training.config import RunOptions, TrainingConfig
from ukbob_seg.training.folds import is_validated
from ukbob_seg.training.setup import find_split, model_folder
from ukbob_seg.training.splits import take_subset
from ukbob_seg.training.state import has_run
from ukbob_seg.training.stopping import stop_noted, stopped_at_once
from ukbob_seg.training.trainer import train

log = logging.getLogger(__name__)

SETTINGS = "scaling_settings.json"
FRACTIONS = (0.1, 0.25, 0.5, 1.0)
SUBSETS, DOWNSTREAM = "subsets", "downstream"
MAY_GROW = ("fractions", "seeds")  # of the settings, when a study goes on
HASHED = ("plans", "labels", "split", "flags", "pretrained")  # settings that are only known by their hash


@dataclass(frozen=True)
class Stage:
    """A dataset, and how networks are trained on it.

    Attributes:
        dataset: folder name, ``DatasetXXX_Name``.
        fold: whose training cases are learned from, and whose held-out cases are scored.
        config: recipe; its seed, and of the first stage its ``subset_fraction`` too, are those of each run.
    """

    dataset: str
    fold: str
    config: TrainingConfig

    def __post_init__(self) -> None:
        if self.fold == "all":
            raise ConfigError("fold all holds no case out, so that nothing can be scored; give a numbered fold")
        if self.config.early_stopping:
            raise ConfigError("a scaling study gives every run the same budget; early stopping would change it")


@dataclass(frozen=True)
class ScalingStudy:
    """What is trained and scored.

    Attributes:
        output: folder of the study.
        roots: folders; nothing is read from or written to ``results``.
        upstream: dataset whose subsets are trained on.
        downstream: dataset that every network is fine-tuned on, or None.
        fractions: shares of the fold's training subjects, ascending.
        seeds: of weights, subsets, patches and augmentation; a run for each.
        configuration: of the plans, of both datasets.
        network: of the plans, of both datasets.
        checkpoint: ``final``, or ``best``, which the scored cases themselves choose.
        use_filter: honour the flags of ukbob_filter.
    """

    output: Path
    roots: Roots
    upstream: Stage
    downstream: Stage | None = None
    fractions: tuple[float, ...] = FRACTIONS
    seeds: tuple[int, ...] = (0,)
    configuration: str = "3d_fullres"
    network: str = "swin_unetr"
    checkpoint: str = "final"
    use_filter: bool = True

    def __post_init__(self) -> None:
        for what, given in (("--fractions", self.fractions), ("--seeds", self.seeds)):
            if not given:
                raise ConfigError(f"{what} needs at least one number")
            if len(set(given)) < len(given):
                raise ConfigError(f"{what} has a number twice: {', '.join(map(str, given))}")
        if not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ConfigError(f"--fractions must lie in (0, 1], got {', '.join(map(str, self.fractions))}")
        if self.checkpoint not in ("best", "final"):
            raise ConfigError(f"--checkpoint must be best or final, got {self.checkpoint!r}")
        object.__setattr__(self, "fractions", tuple(sorted(self.fractions)))


@dataclass(frozen=True)
class Run:
    """One training and its validation.

    Attributes:
        study: that it belongs to.
        stage: dataset and recipe, with this run's seed.
        fraction: of the first stage's cases that the weights have seen; 0 for fresh weights.
        seed: of the run.
        source: run whose checkpoint this one starts from, or None.
    """

    study: ScalingStudy
    stage: Stage
    fraction: float
    seed: int
    source: Run | None = None

    @property
    def kind(self) -> str:
        """``subsets`` or ``downstream``."""
        return DOWNSTREAM if self.source is not None or not self.fraction else SUBSETS

    @property
    def roots(self) -> Roots:
        """The study's, with a results root of the run's own."""
        folder = self.study.output / self.kind / f"fraction_{self.fraction:g}" / f"seed_{self.seed}"
        return dataclasses.replace(self.study.roots, results=folder)

    @property
    def model(self) -> Path:
        """Model folder, ``CONFIG__NETWORK``."""
        return model_folder(self.roots, self.stage.dataset, self.study.configuration, self.study.network)

    @property
    def folder(self) -> Path:
        """Of the fold."""
        return self.model / f"fold_{self.stage.fold}"

    @property
    def checkpoint(self) -> Path:
        """What is scored, and what fine-tuning starts from."""
        return self.folder / NAMES[self.study.checkpoint]

    @property
    def name(self) -> str:
        """For people."""
        what = f"fraction {self.fraction:g}" if self.fraction else "fresh weights"
        return f"{self.stage.dataset}, {what}, seed {self.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to the end and scored since."""
        return is_validated(self.folder) and not (self.folder / NAMES["latest"]).is_file()


def units(study: ScalingStudy) -> list[tuple[Run, ...]]:
    """What is to be trained; the runs of one unit one after the other, units in any order."""
    found: list[tuple[Run, ...]] = []
    for seed in study.seeds:
        for fraction in study.fractions:
            config = dataclasses.replace(study.upstream.config, seed=seed, subset_fraction=fraction)
            first = Run(study, dataclasses.replace(study.upstream, config=config), fraction, seed)
            found.append((first, *_fine_tuned(study, first, fraction, seed)))
        if study.downstream is not None:
            found.append(_fine_tuned(study, None, 0.0, seed))
    return found


def _fine_tuned(study: ScalingStudy, source: Run | None, fraction: float, seed: int) -> tuple[Run, ...]:
    if study.downstream is None:
        return ()
    config = dataclasses.replace(study.downstream.config, seed=seed)
    return (Run(study, dataclasses.replace(study.downstream, config=config), fraction, seed, source),)


def run_scaling(study: ScalingStudy, options: RunOptions | None = None, part: Part | None = None) -> list[Run]:
    """Train and score what is missing; runs that were begun go on, finished ones are left alone.

    Args:
        study: what to train.
        options: device and so on; ``resume``, ``overwrite`` and ``pretrained`` are decided here for every run, but for
            ``pretrained``, which every subset starts from where it is given.
        part: only part of the units; parts may run at once.

    Returns:
        The runs of the part, all finished.

    Raises:
        ConfigError, DatasetError: in one sentence, before the first training where possible.
        StoppedError: a signal came; the same command goes on.
    """
    options = options or RunOptions()
    check(study, options)
    mine = [run for unit in Cluster(part=part).share(units(study)) for run in unit]
    todo = [run for run in mine if not run.is_finished]
    if mine and len(todo) < len(mine):
        log.info("%d of %d runs are finished already", len(mine) - len(todo), len(mine))
    for number, run in enumerate(todo, 1):
        log.info("run %d of %d: %s", number, len(todo), run.name)
        _carry_out(run, options)
    return mine


def _carry_out(run: Run, options: RunOptions) -> None:
    """Train one run from where it is to its end, then predict and score the held-out cases."""
    study, stage, begun = run.study, run.stage, has_run(run.folder)
    own = dataclasses.replace(options, resume=begun, overwrite=False)
    if run.kind == DOWNSTREAM:
        source = None if run.source is None else run.source.checkpoint
        own = dataclasses.replace(own, pretrained=source, pretrained_dataset=None, pretrained_merging=None)
    most = stage.config.validation_cases
    try:
        train(
            stage.dataset,
            stage.fold,
            run.roots,
            stage.config,
            own,
            configuration=study.configuration,
            network=study.network,
            use_filter=study.use_filter,
        )
        with stop_noted(run.folder), stopped_at_once("in the validation"):
            validate_fold(run.model, stage.fold, run.roots, own.device, checkpoint=study.checkpoint, max_cases=most)
    except StoppedError as stopped:
        sentence = str(stopped).partition(";")[0]
        raise StoppedError(f"{run.name}: {sentence}; run the same command again to go on") from stopped
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"interrupted in {run.name}; run the same command again to go on") from interrupt
    except (ConfigError, CheckpointError) as error:
        if not begun:
            raise
        again = f"delete {run.folder} to train this run again, or give another folder with -o"
        raise type(error)(f"{run.name} cannot go on with what is there now ({error}); {again}") from error


def check(study: ScalingStudy, options: RunOptions) -> None:
    """Refuse, before anything is trained, what cannot be compared; then write down the settings.

    Raises:
        ConfigError: two fractions give the same cases, or the folder holds a study with other settings.
        DatasetError, CheckpointError: raw or preprocessed data or the weights to start from are lacking.
    """
    for seed in study.seeds:
        _check_sizes(subsets(study, seed))
    for stage in (study.upstream, study.downstream):
        if stage is not None:
            raw = find_dataset(study.roots.raw, stage.dataset)
            require_cases(raw, DatasetSpec.load(raw))
            plan = _plans(study, stage).configuration(study.configuration)
            if plan.previous_stage is not None:
                raise ConfigError(
                    f"{study.configuration} is the second stage of a cascade, whose first stage has its own subsets; "
                    f"give a configuration that stands alone, such as {plan.previous_stage}"
                )
    if options.pretrained is not None and not options.pretrained.is_file():
        raise CheckpointError(f"pretrained weights {options.pretrained} do not exist, or are no file")
    ensure_writable(study.output)
    check_settings(study.output / SETTINGS, settings(study, options))


def _check_sizes(subsets: Mapping[float, Sequence[str]]) -> None:
    sizes: dict[int, float] = {}
    for fraction, subset in subsets.items():
        if len(subset) in sizes:
            raise ConfigError(
                f"fractions {sizes[len(subset)]:g} and {fraction:g} both give {len(subset)} training cases; "
                "leave one of them out"
            )
        sizes[len(subset)] = fraction


def subsets(study: ScalingStudy, seed: int) -> dict[float, tuple[str, ...]]:
    """Training cases of every fraction; a smaller one's are among a larger one's of the same seed."""
    folder = find_dataset(study.roots.preprocessed, study.upstream.dataset)
    preset = Plans.load(folder / "plans.json").preset
    split, groups = find_split(folder, preset, study.roots, study.upstream.fold)
    return {fraction: take_subset(split.train, fraction, seed, groups) for fraction in study.fractions}


def settings(study: ScalingStudy, options: RunOptions) -> dict[str, Any]:
    """All that decides the results, as plain values."""
    weights = options.pretrained
    return {
        "version": 1,
        "upstream": _stage_settings(study, study.upstream, without=("seed", "subset_fraction")),
        "downstream": None if study.downstream is None else _stage_settings(study, study.downstream, without=("seed",)),
        "fractions": list(study.fractions),
        "seeds": sorted(study.seeds),
        "configuration": study.configuration,
        "network": study.network,
        "checkpoint": study.checkpoint,
        "use_filter": study.use_filter,
        "pretrained": None if weights is None else file_sha256(weights),
    }


def _stage_settings(study: ScalingStudy, stage: Stage, without: Sequence[str]) -> dict[str, Any]:
    folder = find_dataset(study.roots.preprocessed, stage.dataset)
    plans = _plans(study, stage)
    split, groups = find_split(folder, plans.preset, study.roots, stage.fold)
    trust = LabelTrust.load(folder / "solf") if study.use_filter else None
    return {
        "dataset": stage.dataset,
        "fold": stage.fold,
        "recipe": {key: value for key, value in stage.config.to_json().items() if key not in without},
        "plans": digest(plans.to_json()),
        "labels": digest(label_content(DatasetSpec.load(folder))),
        "split": digest([split.train, split.val, [groups[name] for name in split.train]]),
        "flags": None if trust is None else digest([dataclasses.asdict(trust.policy), sorted(trust.flags.items())]),
    }


def _plans(study: ScalingStudy, stage: Stage) -> Plans:
    return load_plans(find_dataset(study.roots.preprocessed, stage.dataset), study.configuration, study.network)


def check_settings(path: Path, now: dict[str, Any], may_grow: Sequence[str] = MAY_GROW, folder: str = "") -> None:
    """Write the settings, with all fractions and seeds so far.

    Args:
        path: file of the settings.
        now: of this call.
        may_grow: entries, lists, of which a study may get more.
        folder: of the study, for the message; by default that of the file.

    Raises:
        ConfigError: other settings than those of the runs in the folder.
    """
    if path.is_file():
        before = read_json(path, "settings of the study")
        if not isinstance(before, dict):
            raise DatasetError(f"settings of the study {path} are no object; delete the folder {path.parent}")
        changed = differences({**before, **{key: now[key] for key in may_grow}}, now)
        if changed:
            raise ConfigError(
                f"{folder or path.parent} holds a study with other settings ({listing(changed, 4)}); give those again, "
                "or another folder with -o"
            )
        now = {**now, **{key: sorted({*before.get(key, []), *now[key]}) for key in may_grow}}
        if now == before:
            return
    write_json(path, now)


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two settings, as ``upstream epochs 5 -> 6``; contents that only have a hash ``changed``."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [found for key in keys for found in differences(before.get(key), now.get(key), f"{name} {key}".strip())]
    name = name.replace("recipe ", "")
    if name.endswith(HASHED):
        return [f"{name} changed"]
    was, is_now = ("given" if isinstance(value, dict) else value for value in (before, now))
    return [f"{name} {was} -> {is_now}"]
