"""Self-configuring 3D medical image segmentation with label filtering and test-time adaptation (UKBOB, ICCV 2025)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public names load on first use, so that importing the package and printing a --help stay fast.
_PUBLIC = {
    "extract_fingerprint": "ukbob_seg.preprocessing.fingerprint",
    "plan": "ukbob_seg.preprocessing.planner",
    "preprocess": "ukbob_seg.preprocessing.preprocessor",
    "plan_and_preprocess": "ukbob_seg.preprocessing.pipeline",
    "solf_filter": "ukbob_seg.filtering.cohort",
    "train": "ukbob_seg.training.trainer",
    "predict": "ukbob_seg.inference.predict",
    "Predictor": "ukbob_seg.inference.predictor",
    "EnsemblePredictor": "ukbob_seg.inference.ensemble_predictor",
    "ensemble": "ukbob_seg.inference.ensemble",
    "label_cohort": "ukbob_seg.labelling.label",
    "evaluate": "ukbob_seg.evaluation.evaluate",
    "accumulate_crossval": "ukbob_seg.evaluation.crossval",
    "find_best": "ukbob_seg.evaluation.model_selection",
    "export_model": "ukbob_seg.portable.export",
    "import_model": "ukbob_seg.portable.importing",
    "run_demo": "ukbob_seg.demo.run",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ukbob_seg' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
