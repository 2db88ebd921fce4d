"""Several networks under one budget on the same folds and seeds: what is trained, and in which order.

Every run has a results root of its own in the study's folder, ``runs/NETWORK/seed_S``, and a process of its own, so
that its peak memory is not another one's. Finished runs are left alone, runs that were begun go on.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ukbob_seg.benchmark.networks_run import RECORD, Launch, Launcher, RunRequest
from ukbob_seg.benchmark.scaling import check_settings
from ukbob_seg.dataset.paths import Roots, find_dataset
from ukbob_seg.dataset.spec import DatasetSpec, require_cases
from ukbob_seg.errors import ConfigError, DatasetError, StoppedError, UkbobError
from ukbob_seg.evaluation.pairing import label_files
from ukbob_seg.files import digest, ensure_writable, read_json
from ukbob_seg.filtering.policies import LabelTrust
from ukbob_seg.parallel import Cluster, Part
from ukbob_seg.preprocessing.fingerprint import label_content
from ukbob_seg.preprocessing.plans import NetworkPlan
from ukbob_seg.preprocessing.requested_networks import load_plans
from ukbob_seg.training.checkpoint import NAMES
from ukbob_seg.training.config import RunOptions, TrainingConfig
from ukbob_seg.training.folds import is_validated
from ukbob_seg.training.setup import find_split, model_folder

log = logging.getLogger(__name__)

SETTINGS = "settings"


@dataclass(frozen=True)
class NetworkStudy:
    """What is trained and scored.

    Attributes:
        output: folder of the study.
        roots: folders; nothing is read from or written to ``results``.
        dataset: folder name, ``DatasetXXX_Name``.
        recipes: of each network; equal in ``epochs`` and ``iterations_per_epoch``. Seeds are those of the runs.
        folds: whose training cases are learned from, and whose held-out cases are scored.
        seeds: of weights, patches and augmentation; a run of every network and fold for each.
        configuration: of the plans.
        checkpoint: ``final``, or ``best``, which the held-out cases have chosen.
        use_filter: honour the flags of ukbob_filter.
        images: folder of test images that are scored in place of the held-out cases, or None.
        references: folder of their labels.
    """

    output: Path
    roots: Roots
    dataset: str
    recipes: dict[str, TrainingConfig]
    folds: tuple[str, ...] = ("0",)
    seeds: tuple[int, ...] = (0,)
    configuration: str = "3d_fullres"
    checkpoint: str = "final"
    use_filter: bool = True
    images: Path | None = None
    references: Path | None = None

    def __post_init__(self) -> None:
        for what, given in (("--networks", tuple(self.recipes)), ("--folds", self.folds), ("--seeds", self.seeds)):
            if not given:
                raise ConfigError(f"{what} needs at least one value")
            if len(set(given)) < len(given):
                raise ConfigError(f"{what} has a value twice: {', '.join(map(str, given))}")
        if "all" in self.folds and self.images is None:
            raise ConfigError(
                "fold all holds no case out, so that nothing can be scored; give numbered folds, or test cases with -i "
                "and -r"
            )
        if (self.images is None) != (self.references is None):
            raise ConfigError("-i and -r belong together: images and their labels")
        if self.checkpoint not in ("best", "final"):
            raise ConfigError(f"--checkpoint must be best or final, got {self.checkpoint!r}")
        if len({(recipe.epochs, recipe.iterations_per_epoch) for recipe in self.recipes.values()}) > 1:
            raise ConfigError("all networks must be trained for the same number of epochs and iterations per epoch")
        if any(recipe.early_stopping for recipe in self.recipes.values()):
            raise ConfigError("a comparison gives every network the same budget; early stopping would change it")

    def plan(self, network: str) -> NetworkPlan:
        """How a network is built and fed."""
        plans = load_plans(find_dataset(self.roots.preprocessed, self.dataset), self.configuration, network)
        return plans.configuration(self.configuration).network(network)


@dataclass(frozen=True)
class NetworkRun:
    """One training and its scores."""

    study: NetworkStudy
    network: str
    fold: str
    seed: int

    @property
    def config(self) -> TrainingConfig:
        """The network's recipe with this run's seed."""
        return dataclasses.replace(self.study.recipes[self.network], seed=self.seed)

    @property
    def roots(self) -> Roots:
        """The study's, with a results root of the run's own."""
        place = self.study.output / "runs" / self.network.replace(":", ".") / f"seed_{self.seed}"
        return dataclasses.replace(self.study.roots, results=place)

    @property
    def folder(self) -> Path:
        """Of the fold."""
        model = model_folder(self.roots, self.study.dataset, self.study.configuration, self.network)
        return model / f"fold_{self.fold}"

    @property
    def summary(self) -> Path:
        """Scores of what is judged."""
        return self.folder / ("validation" if self.study.images is None else "test") / "summary.json"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.network}, fold {self.fold}, seed {self.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to the end, measured, and scored since."""
        final = self.folder / NAMES["final"]
        if not (self.folder / RECORD).is_file() or (self.folder / NAMES["latest"]).is_file() or not final.is_file():
            return False
        if self.study.images is None:
            return is_validated(self.folder)
        return self.summary.is_file() and self.summary.stat().st_mtime_ns >= final.stat().st_mtime_ns

    def request(self, options: RunOptions) -> RunRequest:
        """For the process that carries it out."""
        study = self.study
        return RunRequest(
            study.dataset, self.fold, self.roots, self.network, self.config, options, study.configuration,
            study.checkpoint, study.use_filter, study.images, study.references,
        )  # fmt: skip


def runs(study: NetworkStudy) -> list[NetworkRun]:
    """All of them: every network once before any is trained on the next fold or seed."""
    return [
        NetworkRun(study, network, fold, seed)
        for seed in study.seeds
        for fold in study.folds
        for network in study.recipes
    ]


def run_networks(
    study: NetworkStudy, options: RunOptions | None = None, part: Part | None = None, launch: Launch | None = None
) -> tuple[list[NetworkRun], dict[str, str]]:
    """Train and score what is missing. A run that fails does not keep the others from being made.

    Args:
        study: what to train.
        options: device and so on; resuming is decided here.
        part: only part of the runs; parts may run at once.
        launch: how a run is carried out; None for a process of its own.

    Returns:
        The finished runs of the part, and the sentences of those that failed, by name.

    Raises:
        ConfigError, DatasetError: in one sentence, before the first training where possible.
        StoppedError: a signal came; the same command goes on.
    """
    options = options or RunOptions()
    check(study)
    mine = Cluster(part=part).share(runs(study))
    todo = [run for run in mine if not run.is_finished]
    if mine and len(todo) < len(mine):
        log.info("%d of %d runs are finished already", len(mine) - len(todo), len(mine))
    failed: dict[str, str] = {}
    for number, run in enumerate(todo, 1):
        log.info("run %d of %d: %s", number, len(todo), run.name)
        try:
            (launch or Launcher())(run.request(options))
        except StoppedError as stopped:
            sentence = str(stopped).partition(";")[0]
            raise StoppedError(f"{run.name}: {sentence}; run the same command again to go on") from stopped
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(f"interrupted in {run.name}; run the same command again to go on") from interrupt
        except UkbobError as error:
            log.warning("%s failed: %s", run.name, error)
            failed[run.name] = str(error)
    return [run for run in mine if run.is_finished], failed


def check(study: NetworkStudy) -> None:
    """Refuse, before anything is trained, what cannot be done or compared; then write down the settings.

    Raises:
        ConfigError: a network that cannot be planned, a fold that does not exist, or other settings than before.
        DatasetError: raw or preprocessed data are lacking.
    """
    raw = find_dataset(study.roots.raw, study.dataset)
    require_cases(raw, DatasetSpec.load(raw))
    if study.images is not None and study.references is not None:
        for option, folder in (("-i", study.images), ("-r", study.references)):
            if not folder.is_dir():
                raise DatasetError(f"{option}: folder {folder} does not exist")
        if not label_files(study.references):
            raise DatasetError(f"no label files in {study.references}")
    found = {network: settings(study, network) for network in study.recipes}
    ensure_writable(study.output)
    for network, entry in found.items():
        path = study.output / SETTINGS / f"{network.replace(':', '.')}.json"
        check_settings(path, entry, may_grow=("folds", "seeds"), folder=str(study.output))


def settings(study: NetworkStudy, network: str) -> dict[str, Any]:
    """All that decides the results of one network, as plain values."""
    folder = find_dataset(study.roots.preprocessed, study.dataset)
    plans = load_plans(folder, study.configuration, network)
    configuration = plans.configuration(study.configuration)
    if configuration.previous_stage is not None:
        raise ConfigError(
            f"{study.configuration} is the second stage of a cascade; give a configuration that stands alone, such as "
            f"{configuration.previous_stage}"
        )
    for fold in study.folds:
        find_split(folder, plans.preset, study.roots, fold)
    alone = dataclasses.replace(configuration, networks={network: configuration.network(network)})
    own = dataclasses.replace(plans, configurations={study.configuration: alone}, reasons=())
    trust = LabelTrust.load(folder / "solf") if study.use_filter else None
    splits = folder / "splits.json"
    recipe = study.recipes[network].to_json()
    return {
        "version": 1,
        "dataset": study.dataset,
        "configuration": study.configuration,
        "recipe": {key: value for key, value in recipe.items() if key != "seed"},
        "plans": digest(own.to_json()),
        "labels": digest(label_content(DatasetSpec.load(folder))),
        "split": digest(read_json(splits, "splits")) if splits.is_file() else "",
        "flags": None if trust is None else digest([dataclasses.asdict(trust.policy), sorted(trust.flags.items())]),
        "checkpoint": study.checkpoint,
        "use_filter": study.use_filter,
        "scored": "held-out cases" if study.references is None else str(study.references.resolve()),
        "folds": sorted(study.folds),
        "seeds": sorted(study.seeds),
    }
