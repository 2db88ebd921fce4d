"""Against nnU-Net v2 itself, in an environment that has it: tiny models, and models that it trains on real data."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunet_models import Tiny, scan, splines, write_model

from ukbob_seg.dataset.image_io import Geometry, read_image
from ukbob_seg.inference.predictor import PredictionSettings, Predictor

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("nnunetv2") is None, reason="nnunetv2 is not installed"),
    pytest.mark.filterwarnings("default"),  # nnU-Net's own
]
SPACING = (1.0, 1.3, 0.9)
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "nnunet_models.py"
MODELS = {
    "plain": Tiny(),
    "residual": Tiny(residual=True),
    "old plans": Tiny(old_plans=True),
    "two folds": Tiny(folds=("0", "1")),
    "masked z-score": Tiny(masked=(True,)),
    "ct": Tiny(schemes=("CTNormalization",)),
    "transposed": Tiny(forward=(2, 0, 1)),
    "coarse target": Tiny(spacing=(4.5, 1.0, 0.8)),
    "linear across": Tiny(spacing=(4.5, 1.0, 0.8), resampling=splines(order_z=1)),
    "regions": Tiny(labels={"background": 0, "whole": [1, 2], "core": [2]}, regions_order=(1, 2)),
    "ignore label": Tiny(labels={"background": 0, "first": 1, "second": 2, "ignore": 3}),
    "2d": Tiny(configuration="2d", spacing=(1.0, 0.8), patch=(12, 10), mirror=(0, 1)),
    "2d, transposed": Tiny(configuration="2d", spacing=(1.0, 0.8), patch=(12, 10), mirror=(0, 1), forward=(1, 2, 0)),
}


def theirs(
    folder: Path, image: np.ndarray, spacing, mirror: bool, previous: np.ndarray | None = None, kind=None
) -> np.ndarray:
    """nnU-Net's own predictor, or another of this kind."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = (kind or nnUNetPredictor)(use_mirroring=mirror, device=torch.device("cpu"), allow_tqdm=False)
    folds = tuple(path.name.removeprefix("fold_") for path in sorted(folder.glob("fold_*")))
    predictor.initialize_from_trained_model_folder(str(folder), folds, "checkpoint_final.pth")
    earlier = None if previous is None else previous[None].astype(np.int16)  # as nnU-Net reads label maps
    return predictor.predict_single_npy_array(image, {"spacing": list(spacing)}, earlier)


def compare(found: np.ndarray, expected: np.ndarray, least: float) -> None:
    for value in np.unique(expected):
        a, b = found == value, expected == value
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) >= least, value


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_tiny_models(name, mirror, tmp_path):
    """Random weights leave many voxels nearly undecided, which half precision, in which nnU-Net adds up, decides."""
    tiny = MODELS[name]
    folder, image = write_model(tiny, tmp_path), scan((33, 41, 37), channels=len(tiny.schemes))
    expected = theirs(folder, image, SPACING, mirror)
    with Predictor.from_model_folder(folder, settings=PredictionSettings(tta=mirror)) as predictor:
        found = predictor.predict_array(image, Geometry(image.shape[1:], SPACING)).labels
    assert len(np.unique(expected)) > 1
    compare(found, expected, 0.99)
    assert (found != expected).mean() < 3e-3


def test_a_cascade(tmp_path):
    first = write_model(Tiny(configuration="3d_lowres", spacing=(1.9, 1.7, 1.5), seed=5), tmp_path)
    second = write_model(Tiny(configuration="3d_cascade_fullres", previous="3d_lowres"), tmp_path)
    image = scan((33, 41, 37))
    with Predictor.from_model_folder(second) as predictor:
        found = predictor.predict_array(image, Geometry(image.shape[1:], SPACING))
    compare(found.previous_stage.labels, theirs(first, image, SPACING, False), 0.99)
    # Its own first stage, so that only the second is compared.
    compare(found.labels, theirs(second, image, SPACING, False, found.previous_stage.labels), 0.99)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "resenc", "regions"])
def test_models_that_nnunet_trains_on_the_hippocampus_data(name, data_root, tmp_path_factory, request):
    """Planned, preprocessed and trained for a few iterations by nnU-Net; minutes on two processors."""
    work = tmp_path_factory.mktemp("nnunet")
    command = [sys.executable, str(SCRIPT), "make", "--data", str(data_root), "--work", str(work), "--models", name]
    subprocess.run([*command, "--width", "8"], check=True, stdout=subprocess.DEVNULL)
    folder = next((work / "results").glob("*/nnUNetTrainer__*"))
    images = sorted((work / "raw" / folder.parent.name / "imagesTs").glob("*.nii.gz"))[:5]
    assert json.loads((folder / "dataset.json").read_text())["file_ending"] == ".nii.gz"
    spec = importlib.util.spec_from_file_location("script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    maps = {kind: [] for kind in ("ours", "theirs", "in float32")}
    with Predictor.from_model_folder(folder) as predictor:
        for path in images:
            image, geometry = read_image([path])
            maps["ours"].append(predictor.predict_array(image, geometry).labels.ravel())
            given = (folder, image, geometry.spacing_mm, False, None)
            maps["theirs"].append(theirs(*given).ravel())
            maps["in float32"].append(theirs(*given, script.exact_predictor()).ravel())
    ours, half, exact = (np.concatenate(each) for each in maps.values())
    assert set(np.unique(half)) == {0, 1, 2}
    compare(ours, half, 0.999)
    compare(ours, exact, 0.9999)
