"""MedSegDiff through the functions of the commands: it learns two real scans, predicts and adapts like any network."""

import csv
import json

import numpy as np
import pytest
import torch

from ukbob_seg.dataset.image_io import Geometry, read_image, read_labels, write_image, write_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.inference.etta_config import EttaConfig
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions
from ukbob_seg.preprocessing.storage import open_array
from ukbob_seg.training.checkpoint import load_network
from ukbob_seg.training.config import TrainingConfig
from ukbob_seg.training.trainer import RunOptions, train

CASES, EDGE = ("hippocampus_003", "hippocampus_006"), 16
SMALL = {
    "features_per_stage": [8, 16, 16], "blocks_per_stage": 1, "steps": 100, "sampling_steps": 5, "target": "velocity",
}  # fmt: skip
NETWORKS = {
    "medsegdiff_v1": SMALL | {"image_size": [EDGE, EDGE, EDGE]},
    "medsegdiff_v2": SMALL | {"former_blocks": 1, "filter_blocks": 2, "filter_width": 4, "condition_interval": 1},
}
EPOCHS, ENOUGH = 4, 0.8


@pytest.fixture
def hippocampus(data_root, tmp_path):
    """The middle of two real scans and their labels, 16 x 16 x 16 voxels, of which a third is hippocampus."""
    source, folder = data_root / "Dataset004_Hippocampus", tmp_path / "raw" / "Dataset004_Hippocampus"
    scans = []
    for name in CASES:
        image, geometry = read_image([source / "imagesTr" / f"{name}_0000.nii.gz"])
        labels, _ = read_labels(source / "labelsTr" / f"{name}.nii.gz")
        middle = [round(float(places.mean())) for places in np.nonzero(labels)]
        firsts = [max(0, min(n - EDGE, m - EDGE // 2)) for m, n in zip(middle, labels.shape, strict=True)]
        part = tuple(slice(first, first + EDGE) for first in firsts)
        cut = Geometry((EDGE, EDGE, EDGE), geometry.spacing_mm, geometry.origin_mm, geometry.direction)
        write_image(image[0][part], cut, folder / "imagesTr" / f"{name}_0000.nii.gz")
        write_labels(labels[part], cut, folder / "labelsTr" / f"{name}.nii.gz")
        scans.append((image[0][part], labels[part] > 0, cut))
    content = json.loads((source / "dataset.json").read_text()) | {
        "numTraining": 2, "labels": {"background": 0, "hippocampus": [1, 2]}, "regions_class_order": [1],
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(content))
    roots = Roots.below(tmp_path)
    plan_and_preprocess(4, roots, PlanOptions(memory_gb=2, batch_size=2, feature_size=12), workers=1)
    plans_path = roots.preprocessed / folder.name / "plans.json"
    plans = json.loads(plans_path.read_text())
    plans["configurations"]["3d_fullres"]["networks"] = {
        network: {"patch_size": [EDGE] * 3, "batch_size": 2, "arguments": arguments, "estimated_memory_gb": 1}
        for network, arguments in NETWORKS.items()
    }
    plans_path.write_text(json.dumps(plans))
    return roots, scans


def _dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.slow
@pytest.mark.parametrize(("network", "steps"), [("medsegdiff_v1", 200), ("medsegdiff_v2", 240)])
def test_it_draws_the_maps_of_two_scans_that_it_learned(hippocampus, network, steps):
    """Foreground everywhere has a Dice below 0.6."""
    roots, scans = hippocampus
    assert all(_dice(truth, np.ones_like(truth)) < 0.6 for _, truth, _ in scans)
    config = TrainingConfig(
        epochs=EPOCHS, iterations_per_epoch=steps // EPOCHS, learning_rate=3e-3, schedule="one_cycle",
        augmentation="none", gradient_clip=1.0, validation_every=EPOCHS,
    )  # fmt: skip
    folder = train(4, "all", roots, config, RunOptions(quiet=True), network=network)
    with open(folder / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["train_loss"]) < 0.5 * float(rows[0]["train_loss"])
    assert float(rows[-1]["val_mean_dice"]) > ENOUGH
    predictor = Predictor.from_model_folder(folder.parent)
    drawn = [predictor.predict_array(image[None], geometry).labels > 0 for image, _, geometry in scans]
    scores = [_dice(labels, truth) for labels, (_, truth, _) in zip(drawn, scans, strict=True)]
    assert min(scores) > ENOUGH
    assert np.mean(scores) == pytest.approx(float(rows[-1]["val_mean_dice"]), abs=0.01)
    inner, description = load_network(folder / "checkpoint_final.pt")
    assert description.head == inner.head == "sigmoid"
    if network == "medsegdiff_v2":  # its condition model segments the scans by itself
        array = open_array(roots.preprocessed / "Dataset004_Hippocampus" / "3d_fullres" / f"{CASES[0]}.b2nd")
        _, logits = inner.denoiser.condition(torch.from_numpy(np.asarray(array[:]))[None])
        assert _dice((logits > 0)[0, 0].numpy(), scans[0][1]) > 0.7
    adapting = predictor.with_settings(PredictionSettings(etta=EttaConfig()))
    record = adapting.predict_array(scans[0][0][None], scans[0][2]).etta[0]
    assert record["adapted_parameters"] > 100
    assert record["entropy_after"] <= record["entropy_before"]
