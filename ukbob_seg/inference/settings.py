"""How predictions are made, and what is written."""

from __future__ import annotations

from dataclasses import dataclass

from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.etta_config import EttaConfig
from ukbob_seg.networks.precision_names import AUTO, check_precision


@dataclass(frozen=True)
class PredictionSettings:
    """How predictions are made, and what is written beside label maps.

    Attributes:
        step: distance of neighbouring windows as a share of the patch.
        tta: average over flips along the axes that training mirrored, if any, and small changes of intensity.
        mirror: whether ``tta`` flips; without, it averages over changes of intensity alone.
        etta: adapt to each case, or None.
        window_batch: windows per forward pass.
        skip_empty: leave out windows outside of the body (``filtering/body.py``, of the first channel): background.
        postprocessing: do what ``postprocessing.json`` of the model folder says, where there is one.
        largest_component: classes of which only the largest component is kept, instead of what the model folder says
            and for several models as well; None for what it says. Without ``postprocessing`` nothing is done.
        precision: ``auto`` (half precision on CUDA, float32 on CPUs), ``float32`` or ``bfloat16``, of the networks;
            also while ETTA adapts them.
        compile: call the networks through ``torch.compile``; as they are, with a warning, where that fails. ETTA adapts
            the networks as they are.
        overlap: read the next case and write the last one while the networks work on another; two are in memory then.
        classes: names that label maps show, the others become background; None for all. A cascade's first stage always
            has all.
        save_probabilities: also write ``CASE_probabilities.b2nd``, of all classes.
        statistics: also write ``CASE_statistics.json``.
        preview: also write ``CASE_preview.png``.
        save_entropy: also write the entropy of each voxel's prediction, ``CASE_entropy`` with the file's ending.
    """

    step: float = 0.5
    tta: bool = False
    mirror: bool = True
    etta: EttaConfig | None = None
    window_batch: int = 1
    skip_empty: bool = False
    postprocessing: bool = True
    largest_component: tuple[str, ...] | None = None
    precision: str = AUTO
    compile: bool = False
    overlap: bool = True
    classes: tuple[str, ...] | None = None
    save_probabilities: bool = False
    statistics: bool = False
    preview: bool = False
    save_entropy: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise ConfigError(f"--step-size must lie in (0, 1], got {self.step}")
        check_precision(self.precision)
        if self.window_batch < 1:
            raise ConfigError(f"--window-batch must be at least 1, got {self.window_batch}")
