"""MedSegDiff through the functions of the commands: it learns a real scan, and predicts and adapts like any network."""

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

EDGE = 16
SMALL = {
    "features_per_stage": [8, 16, 16], "blocks_per_stage": 1, "steps": 100, "sampling_steps": 5, "label_scale": 0.2,
}  # fmt: skip
NETWORKS = {
    "medsegdiff_v1": SMALL | {"image_size": [EDGE, EDGE, EDGE]},
    "medsegdiff_v2": SMALL | {"former_blocks": 1, "filter_blocks": 2, "filter_width": 4, "condition_interval": 1},
}


@pytest.fixture
def hippocampus(data_root, tmp_path):
    """The middle of a real scan and its label, 16 x 16 x 16 voxels, of which a third is hippocampus."""
    source, folder = data_root / "Dataset004_Hippocampus", tmp_path / "raw" / "Dataset004_Hippocampus"
    path = min((source / "labelsTr").glob("*.nii.gz"))
    name = path.name.removesuffix(".nii.gz")
    image, geometry = read_image([source / "imagesTr" / f"{name}_0000.nii.gz"])
    labels, _ = read_labels(path)
    firsts = [round(float(places.mean())) - EDGE // 2 for places in np.nonzero(labels)]
    part = tuple(slice(first, first + EDGE) for first in firsts)
    cut = Geometry((EDGE, EDGE, EDGE), geometry.spacing_mm, geometry.origin_mm, geometry.direction)
    write_image(image[0][part], cut, folder / "imagesTr" / f"{name}_0000.nii.gz")
    write_labels(labels[part], cut, folder / "labelsTr" / f"{name}.nii.gz")
    content = json.loads((source / "dataset.json").read_text()) | {
        "numTraining": 1, "labels": {"background": 0, "hippocampus": [1, 2]}, "regions_class_order": [1],
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
    return roots, image[0][part], labels[part], cut


def _dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def _train(roots, network, steps):
    """The folder of the fold, and the rows of its progress."""
    config = TrainingConfig(
        epochs=4, iterations_per_epoch=steps, learning_rate=6e-3, schedule="one_cycle", augmentation="none",
        gradient_clip=1.0, validation_every=4,
    )  # fmt: skip
    folder = train(4, "all", roots, config, RunOptions(quiet=True), network=network)
    with open(folder / "progress.csv") as file:
        return folder, list(csv.DictReader(file))


@pytest.mark.slow
def test_the_first_version_draws_the_map_of_a_scan_that_it_learned(hippocampus):
    """Foreground everywhere has a Dice below 0.5, and so have samples of the untrained network."""
    roots, image, labels, geometry = hippocampus
    assert _dice(labels > 0, np.ones_like(labels, dtype=bool)) < 0.5
    folder, rows = _train(roots, "medsegdiff_v1", 120)
    assert float(rows[-1]["train_loss"]) < 0.2 * float(rows[0]["train_loss"])
    validated = float(rows[-1]["val_mean_dice"])
    assert validated > 0.55
    predicted = Predictor.from_model_folder(folder.parent).predict_array(image[None], geometry)
    assert _dice(predicted.labels > 0, labels > 0) == pytest.approx(validated, abs=0.01)
    settings = PredictionSettings(etta=EttaConfig())
    record = Predictor.from_model_folder(folder.parent, settings=settings).predict_array(image[None], geometry).etta[0]
    assert record["adapted_parameters"] > 100
    assert record["entropy_after"] <= record["entropy_before"]


@pytest.mark.slow
def test_the_second_version_takes_noise_off_a_map_that_it_learned(hippocampus):
    """In so few steps it does not yet draw one from nothing; but it knows which voxels of a noisy map are which.

    At this step 56% of them have the sign of the truth. The condition model segments the scan by itself.
    """
    roots, image, labels, geometry = hippocampus
    folder, rows = _train(roots, "medsegdiff_v2", 35)
    assert float(rows[-1]["train_loss"]) < 0.2 * float(rows[0]["train_loss"])
    network, description = load_network(folder / "checkpoint_final.pt")
    assert description.head == network.head == "sigmoid"
    (path,) = (roots.preprocessed / "Dataset004_Hippocampus" / "3d_fullres").glob("hippocampus_???.b2nd")
    case = torch.from_numpy(np.asarray(open_array(path)[:]))[None]
    truth = torch.from_numpy(labels > 0)
    clean = truth[None, None].float() * 2 - 1
    with torch.no_grad():
        condition, logits = network.denoiser.condition(case)
        noise = torch.randn(4, 1, EDGE, EDGE, EDGE, generator=torch.Generator().manual_seed(0))
        step = torch.full((4,), 29)
        noisy = network.schedule.noisy(network.sampling.label_scale * clean.expand_as(noise), step, noise)
        condition = tuple(part.expand(4, -1, -1, -1, -1) for part in condition)
        found = network.schedule.clean(noisy, step, network._denoise(noisy, step, condition))
    assert _dice((logits > 0)[0, 0], truth) > 0.7
    by_sign = float(((noisy > 0) == truth).float().mean())
    assert float(((found > 0) == truth).float().mean()) > by_sign + 0.1
    predicted = Predictor.from_model_folder(folder.parent).predict_array(image[None], geometry)
    assert predicted.labels.shape == labels.shape
