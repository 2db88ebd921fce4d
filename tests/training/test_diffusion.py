"""MedSegDiff through the commands' own functions: it learns a real case, and predicts and adapts like any network."""

import csv
import json

import numpy as np
import pytest

from ukbob_seg.dataset.image_io import Geometry, read_image, read_labels, write_image, write_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions
from ukbob_seg.training.config import TrainingConfig
from ukbob_seg.training.trainer import RunOptions, train

PATCH = (16, 16, 16)
SAMPLED = {"features_per_stage": [8, 16, 24], "blocks_per_stage": 1, "steps": 100, "sampling_steps": 5}
NETWORKS = {
    "medsegdiff_v1": {**SAMPLED, "image_size": list(PATCH)},
    "medsegdiff_v2": {**SAMPLED, "former_blocks": 1, "filter_blocks": 2, "filter_width": 4},
}


@pytest.fixture
def hippocampus(data_root, tmp_path):
    """Two real scans, cut to 24 x 24 x 24 voxels around the middle of their labels."""
    source, folder = data_root / "Dataset004_Hippocampus", tmp_path / "raw" / "Dataset004_Hippocampus"
    paths = sorted((source / "labelsTr").glob("*.nii.gz"))[:2]
    for path in paths:
        name = path.name.removesuffix(".nii.gz")
        image, geometry = read_image([source / "imagesTr" / f"{name}_0000.nii.gz"])
        labels, _ = read_labels(path)
        middle = [int(round(float(axis.mean()))) for axis in np.nonzero(labels)]
        part = tuple(slice(max(0, min(m - 12, n - 24)), max(0, min(m - 12, n - 24)) + 24)
                     for m, n in zip(middle, labels.shape, strict=True))  # fmt: skip
        cut = Geometry(labels[part].shape, geometry.spacing_mm, geometry.origin_mm, geometry.direction)
        write_image(image[0][part], cut, folder / "imagesTr" / f"{name}_0000.nii.gz")
        write_labels(labels[part], cut, folder / "labelsTr" / f"{name}.nii.gz")
    content = json.loads((source / "dataset.json").read_text()) | {"numTraining": 2}
    (folder / "dataset.json").write_text(json.dumps(content))
    plan_and_preprocess(4, Roots.below(tmp_path), PlanOptions(memory_gb=2, batch_size=2, feature_size=12), workers=1)
    path = tmp_path / "preprocessed" / folder.name / "plans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_fullres"]["networks"] = {
        name: {"patch_size": list(PATCH), "batch_size": 4, "arguments": arguments, "estimated_memory_gb": 1}
        for name, arguments in NETWORKS.items()
    }
    path.write_text(json.dumps(plans))
    return Roots.below(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_it_learns_real_scans(hippocampus, network):
    config = TrainingConfig(
        epochs=4, iterations_per_epoch=80, learning_rate=3e-3, schedule="one_cycle", augmentation="none",
        validation_every=4, foreground_fraction=0.5,
    )  # fmt: skip
    folder = train(4, "all", hippocampus, config, RunOptions(quiet=True), network=network)
    with open(folder / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    print([(row["train_loss"], row["val_mean_dice"], row["seconds"]) for row in rows])
    assert float(rows[-1]["train_loss"]) < 0.5 * float(rows[0]["train_loss"])
    assert float(rows[-1]["val_mean_dice"]) > 0.5
