"""How far a case may adapt, and the record of how far it did."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ukbob_seg.errors import ConfigError

MODES = ("guarded", "paper")
RATE, RATE_AFTER_STATISTICS = 4e-3, 1e-3


@dataclass(frozen=True)
class EttaConfig:
    """How far a case may adapt.

    Attributes:
        steps: entropy steps, at most; 0 for the statistics alone.
        learning_rate: of Adam on the affine parameters; None for 4e-3, and 1e-3 for networks whose stored statistics
            were replaced before.
        max_patches: windows that the steps look at.
        candidates: windows among which they are chosen (foreground first, then highest entropy).
        statistics_share: weight of the case's statistics against the stored ones, None to decide per case.
        weigh_windows: windows count for the case's statistics as confident as the network is in them; else all alike.
        certain_background: voxels whose probability of background reaches this are left out of the entropy that the
            steps lower (with regions: whose every region is as improbable); 1 for the entropy of all voxels.
        stop_early: the entropy steps end once the entropy no longer falls.
        most_drift: they end before they change the amount of foreground by more than this share.
        least_field_gain: divide a smooth field that training images do not have out of the image where the entropy of
            its intensities falls by at least this, in nats, and where the field is strong enough; None to leave every
            image as it is.
        least_field_spread: standard deviation of the logarithm of what is divided out from which on it is strong
            enough.
        field_margin: and so many times as strong as in the farthest training image it has to be.
        least_foreground: the layers are as trained again when predicted foreground shrinks below this share of the
            unadapted one, and the image has its field again when it does so without it.
    """

    steps: int = 5
    learning_rate: float | None = None
    max_patches: int = 2
    candidates: int = 6
    statistics_share: float | None = None
    weigh_windows: bool = True
    certain_background: float = 0.95
    stop_early: bool = True
    most_drift: float = 0.1
    least_field_gain: float | None = 0.1
    least_field_spread: float = 0.15
    field_margin: float = 2.0
    least_foreground: float = 0.5

    @classmethod
    def of_mode(cls, mode: str, **changes: Any) -> EttaConfig:
        """The defaults of a mode, with changes; None leaves a default.

        Those of ``paper``: statistics of the case alone, every step taken, nothing undone.
        """
        if mode not in MODES:
            raise ConfigError(f"--etta-mode must be one of {', '.join(MODES)}, got {mode!r}")
        given = {key: value for key, value in changes.items() if value is not None}
        return cls(**{**_DEFAULTS[mode], **given})

    @property
    def mode(self) -> str:
        """``paper`` with all that it stands for but the number of steps and their rate, else ``guarded``."""
        free = {"steps": self.steps, "learning_rate": self.learning_rate}
        return "paper" if self == EttaConfig(**{**_DEFAULTS["paper"], **free}) else "guarded"

    def rate(self, has_statistics: bool) -> float:
        """Of the entropy steps, for a network with layers that keep statistics or one without."""
        if self.learning_rate is not None:
            return self.learning_rate
        return RATE_AFTER_STATISTICS if has_statistics else RATE

    def __post_init__(self) -> None:
        if self.steps < 0 or self.max_patches < 1 or self.candidates < self.max_patches:
            raise ConfigError(
                "ETTA needs no negative number of steps (--etta-steps), a patch, and as many candidates as patches; "
                f"got {self.steps}, {self.max_patches} and {self.candidates}"
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"the ETTA learning rate must be positive, got {self.learning_rate}")
        if self.statistics_share is not None and not 0 <= self.statistics_share <= 1:
            raise ConfigError(f"statistics_share must lie in [0, 1], got {self.statistics_share}")
        if not 0 < self.certain_background <= 1:
            raise ConfigError(f"certain_background must lie in (0, 1], got {self.certain_background}")
        if not self.most_drift >= 0:
            raise ConfigError(f"most_drift must not be negative, got {self.most_drift}")
        if not 0 <= self.least_foreground <= 1:
            raise ConfigError(f"least_foreground must lie in [0, 1], got {self.least_foreground}")
        if self.least_field_gain is not None and not self.least_field_gain >= 0:
            raise ConfigError(f"least_field_gain must not be negative, got {self.least_field_gain}")
        for name in ("least_field_spread", "field_margin"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")


_DEFAULTS: dict[str, dict[str, Any]] = {
    "guarded": {},
    "paper": {
        "steps": 8,
        "learning_rate": 5e-3,
        "max_patches": 8,
        "candidates": 8,
        "statistics_share": 1.0,
        "weigh_windows": False,
        "certain_background": 1.0,
        "stop_early": False,
        "most_drift": math.inf,
        "least_field_gain": None,
        "least_foreground": 0.0,
    },
}


@dataclass
class EttaRecord:
    """What adaptation did to one case; entropies are means per voxel of the chosen windows, in nats."""

    mode: str = "guarded"
    decision: str = "adapted"
    field_gains: tuple[float | None, ...] | None = None  # of each channel; None where no field was looked for
    field_spreads: tuple[float | None, ...] | None = None
    fields_removed: tuple[int, ...] = ()  # channels
    field_decision: str | None = None
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

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they come back from a JSON file."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}
