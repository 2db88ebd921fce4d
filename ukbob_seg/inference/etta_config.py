"""How far a case may adapt, and the record of how far it did."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ukbob_seg.errors import ConfigError

MODES = ("guarded", "paper")


@dataclass(frozen=True)
class EttaConfig:
    """How far a case may adapt.

    Attributes:
        mode: ``guarded``, or ``paper`` for the paper's plain recipe: statistics of the case alone, every step taken,
            nothing undone.
        steps: entropy steps, in mode ``guarded`` at most; 0 for the statistics alone.
        learning_rate: of Adam on the affine parameters.
        max_patches: windows that the steps look at.
        candidates: windows among which they are chosen (foreground first, then highest entropy).
        statistics_share: weight of the case's statistics against the stored ones, None to decide per case.
        least_foreground: undo everything when predicted foreground shrinks below this share of the unadapted one.
    """

    mode: str = "guarded"
    steps: int = 5
    learning_rate: float = 1e-3
    max_patches: int = 2
    candidates: int = 6
    statistics_share: float | None = None
    least_foreground: float = 0.5

    @classmethod
    def of_mode(cls, mode: str, **changes: Any) -> EttaConfig:
        """The defaults of a mode, with changes; None leaves a default."""
        if mode not in MODES:
            raise ConfigError(f"--etta-mode must be one of {', '.join(MODES)}, got {mode!r}")
        given = {key: value for key, value in changes.items() if value is not None}
        return cls(**{**_DEFAULTS[mode], **given})

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"--etta-mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.steps < 0 or self.max_patches < 1 or self.candidates < self.max_patches:
            raise ConfigError(
                "ETTA needs no negative number of steps (--etta-steps), a patch, and as many candidates as patches; "
                f"got {self.steps}, {self.max_patches} and {self.candidates}"
            )
        if not self.learning_rate > 0:
            raise ConfigError(f"the ETTA learning rate must be positive, got {self.learning_rate}")
        if self.statistics_share is not None and not 0 <= self.statistics_share <= 1:
            raise ConfigError(f"statistics_share must lie in [0, 1], got {self.statistics_share}")


_DEFAULTS: dict[str, dict[str, Any]] = {
    "guarded": {},
    "paper": {
        "mode": "paper",
        "steps": 8,
        "learning_rate": 5e-3,
        "max_patches": 8,
        "candidates": 8,
        "statistics_share": 1.0,
        "least_foreground": 0.0,
    },
}


@dataclass
class EttaRecord:
    """What adaptation did to one case; entropies are means per voxel of the chosen windows, in nats."""

    mode: str = "guarded"
    decision: str = "adapted"
    adapted_parameters: int = 0
    statistics_layers: int = 0
    statistics_distance: float | None = None  # of the case's statistics from the stored ones
    statistics_share: float | None = None
    patches: int = 0
    steps: int = 0
    entropy_before: float = 0.0
    entropy_after: float = 0.0
    foreground_before: int = 0
    foreground_after: int = 0
    voxels_changed: int = 0

    def to_json(self) -> dict[str, float | int | str | None]:
        """Plain values."""
        return dataclasses.asdict(self)
