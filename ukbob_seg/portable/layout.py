"""What the members of a model's archive are called: as the files of a model folder, but for the weights."""

from __future__ import annotations

import re

IS_DATASET = re.compile(r"Dataset[0-9]{3,}_.+")
IS_FOLD = re.compile(r"[0-9]{1,4}|all")

CARD = "model_card.json"
README = "README.md"
BOUNDS = "bounds.json"  # of the label filter
OF_ARCHIVE = (CARD, README, BOUNDS)

PLANS = "plans.json"
DATASET = "dataset.json"
POSTPROCESSING = "postprocessing.json"
OF_MODEL = (PLANS, DATASET, POSTPROCESSING)

DESCRIPTION = "model.json"
WEIGHTS = "weights.safetensors"
ONNX = "network.onnx"
MONAI_WEIGHTS = "monai.safetensors"
MONAI_ARGUMENTS = "monai.json"
COPIED = (ONNX, MONAI_WEIGHTS, MONAI_ARGUMENTS)  # into a fold's folder, as they are
OF_FOLD = (DESCRIPTION, WEIGHTS, *COPIED)


def of_model(model: str, name: str) -> str:
    """Member of a model (``CONFIG__NETWORK``)."""
    return f"{model}/{name}"


def of_fold(model: str, fold: str, name: str) -> str:
    """Member of a fold of a model."""
    return f"{model}/fold_{fold}/{name}"
