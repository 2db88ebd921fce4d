"""A network that knows a coil's field from training: what ETTA's field step does to images that have it as well.

    python benchmarks/etta_fields.py --dataset DIR/Dataset004_Hippocampus --work DIR

All images of the dataset are multiplied by one coil's field with small variations, and a BatchNorm and an InstanceNorm
network of ``etta_networks.py`` are trained on them. The test cases that ``etta_study.py`` does not draw are predicted
as they are then, and with the study's bias field on top: without ETTA, with it, and with a field step that knows
nothing of the training images. Printed are mean Dice and the number of images that the step changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import torch
from etta_networks import NETWORKS, StudyNetwork, prepare, train_network
from etta_study import DRAWN, draw_cases, mean_dice

from ukbob_seg.dataset.image_io import read_image, read_labels, write_image
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.evaluation.shifts import apply_shift
from ukbob_seg.inference.etta import EttaConfig
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.preprocessing.intensity_field import UsualField
from ukbob_seg.training.checkpoint import load_network

WAYS = ("no ETTA", "ETTA", "ETTA without knowledge")


def coil(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Bright at one end of the y axis; (Z, Y, X)."""
    _, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    vary = np.random.default_rng(seed).normal(scale=0.05, size=3)
    return np.exp((0.65 + vary[0]) * y + (0.2 + vary[1]) * x - (0.25 + vary[2]) * y**2)


def shade(dataset: Path, target: Path) -> None:
    """A copy of the dataset with the field in every image."""
    for folder in ("imagesTr", "imagesTs"):
        for path in sorted((dataset / folder).glob("*_0000.nii.gz")):
            image, geometry = read_image([path])
            field = coil(image.shape[1:], int(path.name.split("_")[1]))
            write_image((image[0] * field).astype(np.float32), geometry, target / folder / path.name)
    for folder in ("labelsTr", "labelsTs"):
        shutil.copytree(dataset / folder, target / folder, dirs_exist_ok=True)
    shutil.copy(dataset / "dataset.json", target / "dataset.json")


def predictors(folder: Path) -> dict[str, Predictor]:
    """One for each way."""
    network, description = load_network(folder / "fold_all" / "checkpoint_final.pt")
    with_etta = PredictionSettings(etta=EttaConfig())
    unknowing = dataclasses.replace(description, fields=(UsualField(),))
    made = (description, PredictionSettings()), (description, with_etta), (unknowing, with_etta)
    return dict(zip(WAYS, (Predictor([network], what, "cpu", how) for what, how in made), strict=True))


def compare(network: StudyNetwork, folder: Path, dataset: Path, cases: list[str]) -> None:
    """Print a table row for each condition and way."""
    ways = predictors(folder)
    for shift in ("none", "bias field"):
        dice: dict[str, list[float]] = {way: [] for way in ways}
        changed = dict.fromkeys(ways, 0)
        for case in cases:
            image, geometry = read_image([dataset / "imagesTs" / f"{case}_0000.nii.gz"])
            truth, _ = read_labels(dataset / "labelsTs" / f"{case}.nii.gz")
            shifted = apply_shift(image, shift, geometry.spacing_mm, seed=int(case.rsplit("_", 1)[1]))
            for way, predictor in ways.items():
                prediction = predictor.predict_array(shifted, geometry)
                dice[way].append(mean_dice(prediction.labels, truth))
                changed[way] += bool(prediction.etta and prediction.etta[0]["fields_removed"])
        for way, values in dice.items():
            print(f"{network.name:11} {shift:11} {way:23} Dice {np.mean(values):.4f}  "
                  f"least gain {np.min(np.subtract(values, dice[WAYS[0]])):+.3f}  "
                  f"images changed {changed[way]} of {len(cases)}", flush=True)  # fmt: skip


def main() -> None:
    """Parse, shade, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", type=Path, required=True, help="raw hippocampus dataset with imagesTs and labelsTs"
    )
    parser.add_argument("--work", type=Path, required=True, help="everything is written here")
    parser.add_argument("--device", default="cpu", help="of training: cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shaded = options.work / "raw" / options.dataset.name
    if not (shaded / "dataset.json").is_file():  # which is written last
        shade(options.dataset, shaded)
    roots = Roots(shaded.parent, options.work / "preprocessed", options.work / "models")
    prepare(roots, shaded.name)
    cases = draw_cases(shaded, 30, 0, after=DRAWN)
    for network in NETWORKS:
        if network.name in ("batch_0", "instance_0"):
            folder = train_network(network, options.work, roots, shaded.name, options.device)
            compare(network, folder, shaded, cases)


if __name__ == "__main__":
    main()
