"""The main job end to end on a synthetic cohort: plan, filter, train, predict without and with ETTA, evaluate."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ukbob_seg.dataset.paths import Roots
from ukbob_seg.demo.cohort import CohortConfig
from ukbob_seg.demo.faults import PlantedFault
from ukbob_seg.demo.report import write_demo_report
from ukbob_seg.demo.write import DATASET, WrittenCohort, write_cohort
from ukbob_seg.errors import ConfigError
from ukbob_seg.evaluation.evaluate import ReportOptions, evaluate
from ukbob_seg.evaluation.summary import EvaluationSummary
from ukbob_seg.files import ensure_writable
from ukbob_seg.filtering.cohort import solf_filter
from ukbob_seg.filtering.config import FilterConfig
from ukbob_seg.inference.etta import EttaConfig
from ukbob_seg.inference.predict import predict
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.parallel import choose_workers
from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions
from ukbob_seg.training.setup import choose_config
from ukbob_seg.training.trainer import RunOptions, train

log = logging.getLogger(__name__)

MARKER = ".ukbob_demo"
# Small enough for a CPU; the network and every stage are those of a real run.
SHAPE = (64, 28, 40)
PATCH = (64, 32, 32)
ETTA = EttaConfig(steps=3, max_patches=2, candidates=4)


@dataclass(frozen=True)
class DemoConfig:
    """Size of the demo; the defaults take some minutes on two CPU cores.

    Attributes:
        train_cases: synthetic training cases (the filter wants a cohort, the network is content with less).
        test_cases: synthetic test cases from an unknown scanner.
        steps: training steps.
        fault_fraction: share of training labels to spoil.
        test_shift: how unlike the training scanners the test scanner is.
        device: ``cpu``, ``cuda``, ...
        seed: of everything.
    """

    train_cases: int = 100
    test_cases: int = 6
    steps: int = 260
    fault_fraction: float = 0.02
    test_shift: float = 0.5
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train_cases < 5 or self.test_cases < 1 or self.steps < 1:
            raise ConfigError("the demo needs at least 5 training cases, 1 test case and 1 step")


@dataclass(frozen=True)
class FilterScore:
    """How many planted faults the filter found."""

    planted: int
    found: int
    false_alarms: int


@dataclass(frozen=True)
class DemoResult:
    """What came out.

    Attributes:
        plain: scores of the unadapted prediction.
        adapted: scores with ETTA.
        filtered: the filter against the planted faults.
        report: the page to look at.
        seconds: of each stage, by name.
    """

    plain: EvaluationSummary
    adapted: EvaluationSummary
    filtered: FilterScore
    report: Path
    seconds: dict[str, float]


def run_demo(folder: Path, config: DemoConfig | None = None) -> DemoResult:
    """Run the demo into ``folder`` (which it empties first if an earlier demo made it).

    Raises:
        ConfigError: the folder holds something else.
    """
    config = config or DemoConfig()
    folder = _fresh_folder(Path(folder))
    roots = Roots.below(folder)
    clock = _Clock()

    cohort = write_cohort(
        roots.raw,
        CohortConfig(shape=SHAPE, seed=config.seed),
        config.train_cases,
        config.test_cases,
        config.fault_fraction,
        config.test_shift,
        workers=choose_workers(None, config.train_cases),
    )
    clock.lap("synthetic cohort")
    options = PlanOptions(memory_gb=4.0, patch_size=PATCH, batch_size=2, feature_size=12)
    prepared = plan_and_preprocess(DATASET, roots, options)
    clock.lap("plan and preprocess")
    solf_filter(cohort.folder, prepared.folder / "solf", FilterConfig())
    filtered = score_filter(prepared.folder / "solf", cohort.faults)
    clock.lap("SOLF filter")
    model = _train(roots, config)
    clock.lap("training")
    plain = _predict_and_score(model, cohort, folder / "predictions", config, etta=False)
    clock.lap("prediction")
    adapted = _predict_and_score(model, cohort, folder / "predictions_etta", config, etta=True)
    clock.lap("prediction with ETTA")
    report = folder / "report.html"
    result = DemoResult(plain, adapted, filtered, report, clock.laps)
    write_demo_report(result, cohort, roots, model)
    return result


def _fresh_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder with -o")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise ConfigError(f"{folder} is not empty and was not made by ukbob_demo; give another folder with -o")
        shutil.rmtree(folder)
    ensure_writable(folder)
    (folder / MARKER).touch()
    return folder


def score_filter(solf_folder: Path, faults: tuple[PlantedFault, ...]) -> FilterScore:
    """Compare the filter's flags with the planted faults, label by label."""
    import pandas as pd

    flags = pd.read_parquet(solf_folder / "flags.parquet")
    flagged = {(str(row.case), int(row.label)) for row in flags[flags.flagged].itertuples()}
    planted = {(fault.case, fault.label) for fault in faults}
    return FilterScore(len(planted), len(flagged & planted), len(flagged - planted))


def _train(roots: Roots, config: DemoConfig) -> Path:
    """Train Swin-BOB for a few minutes; returns the model folder."""
    epochs = max(1, config.steps // 20)
    recipe = choose_config(
        DATASET,
        roots,
        "swin_unetr",
        epochs=epochs,
        iterations_per_epoch=max(1, config.steps // epochs),
        learning_rate=4e-3,
        schedule="one_cycle",
        mirror_axes=(),
        validation_every=max(1, epochs // 2),
        validation_cases=2,
        seed=config.seed,
    )
    folder = train(DATASET, 0, roots, recipe, RunOptions(device=config.device))
    return folder.parent


def _predict_and_score(
    model: Path, cohort: WrittenCohort, output: Path, config: DemoConfig, etta: bool
) -> EvaluationSummary:
    settings = PredictionSettings(etta=ETTA if etta else None)
    with Predictor.from_model_folder(model, ["0"], "final", config.device, settings) as predictor:
        predict(predictor, cohort.folder / "imagesTs", output, arguments=dataclasses.asdict(config))
    images = cohort.folder / "imagesTs"
    return evaluate(output, cohort.folder / "labelsTs", workers=1, report=ReportOptions(images=images))


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
        log.info("%s: %.0f s", name, self.laps[name])
