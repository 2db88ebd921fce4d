"""What is asked of the robustness protocol. Light: a ``--help`` shows these."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from ukbob_seg.errors import ConfigError, listing
from ukbob_seg.evaluation.shift_strengths import definitions
from ukbob_seg.inference.etta_config import EttaConfig
from ukbob_seg.inference.settings import PredictionSettings

UNSHIFTED = "none"
PLAIN = "none"


@dataclass(frozen=True)
class Method:
    """A way to predict: which of the two kinds of test-time treatment it has."""

    tta: bool = False
    etta: bool = False


METHODS = {
    PLAIN: Method(),
    "tta": Method(tta=True),
    "etta": Method(etta=True),
    "etta+tta": Method(tta=True, etta=True),
}


@dataclass(frozen=True)
class ModelChoice:
    """A trained model, or several whose probabilities are averaged.

    Attributes:
        folders: ``results/DatasetXXX_Name/CONFIG__NETWORK``, at least one.
        folds: which, None for all trained.
        checkpoint: ``best`` or ``final``.
        device: where to predict.
    """

    folders: tuple[Path, ...]
    folds: tuple[str, ...] | None = None
    checkpoint: str = "best"
    device: str = "cpu"


@dataclass(frozen=True)
class RobustnessOptions:
    """Which shifts, methods and cases.

    Attributes:
        shifts: names of ``SHIFTS``; the unshifted images are always among them, and their order is that of ``SHIFTS``.
        methods: names of ``METHODS``, in their order.
        cases: how many to draw, None for all.
        seed: of the draw. Fields and noise depend on the case's name alone.
        tolerance_mm: of the normalized surface Dice.
        base: settings of all methods but for ``tta`` and ``etta``.
        etta: limits of adaptation.
    """

    shifts: tuple[str, ...] = field(default_factory=lambda: tuple(definitions()))
    methods: tuple[str, ...] = (PLAIN, "etta")
    cases: int | None = None
    seed: int = 0
    tolerance_mm: float = 2.0
    base: PredictionSettings = field(default_factory=PredictionSettings)
    etta: EttaConfig = field(default_factory=EttaConfig)

    def __post_init__(self) -> None:
        for option, given, known in (
            ("--shifts", self.shifts, tuple(definitions())),
            ("--methods", self.methods, tuple(METHODS)),
        ):
            if unknown := [name for name in given if name not in known]:
                raise ConfigError(f"{option}: no {unknown[0]!r}; choose from {', '.join(known)}")
            ordered = tuple(name for name in known if name in given or (option == "--shifts" and name == UNSHIFTED))
            object.__setattr__(self, option[2:], ordered)
        if not self.methods:
            raise ConfigError(f"--methods: give at least one of {listing(tuple(METHODS))}")
        if self.cases is not None and self.cases < 1:
            raise ConfigError(f"--cases must be at least 1, got {self.cases}")
        if self.seed < 0:
            raise ConfigError(f"--seed must not be negative, got {self.seed}")

    def settings(self, method: str) -> PredictionSettings:
        """How a method predicts."""
        chosen = METHODS[method]
        return dataclasses.replace(self.base, tta=chosen.tta, etta=self.etta if chosen.etta else None)
