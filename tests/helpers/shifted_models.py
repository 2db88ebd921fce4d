"""A dataset whose labels are thresholds of the intensity, and models of it that are wrong by a known shift."""

import json

import numpy as np
import torch
from torch import nn

from ukbob_seg.dataset.image_io import Geometry, write_image, write_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.evaluation.validate_fold import validate_fold
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan, Plans
from ukbob_seg.preprocessing.resampling import resample_image
from ukbob_seg.training.checkpoint import ModelDescription, save_checkpoint

NAME = "Dataset005_Levels"
DATASET = {"channel_names": {"0": "noNorm"}, "labels": {"background": 0, "low": 2, "high": 7}, "numTraining": 4,
           "file_ending": ".nii.gz"}  # fmt: skip
CONFIGURATIONS = {"3d_fullres": None, "2d": None, "3d_lowres": None, "3d_cascade_fullres": "3d_lowres"}
FOLDS = {"0": ("level_0", "level_2"), "1": ("level_1", "level_3")}
GEOMETRY = Geometry((14, 20, 18), (3.0, 1.0, 0.7))


class Shifted(nn.Module):
    """Thresholds at 0.5 and 1.2 plus ``shift``; the second stage of a cascade says what the first one said."""

    def __init__(self, in_channels, out_channels, shift=0.0, sharpness=4.0):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(float(shift)))
        self.sharpness = nn.Parameter(torch.tensor(float(sharpness)))

    def forward(self, x):
        if x.shape[1] == 2:
            return 20 * nn.functional.one_hot(x[:, 1].long(), 3).movedim(-1, 1).float()
        x = x[:, 0] - self.shift
        return torch.stack([torch.full_like(x, 0.5), x, 3 * x - 2.4], dim=1) * self.sharpness


NETWORKS = {"a": "shifted_models:Shifted", "b": "shifted_models:OtherShifted"}


class OtherShifted(Shifted):
    """Another network by name."""


def folder_name(configuration, network):
    return f"{configuration}__{NETWORKS[network].replace(':', '.')}"


def probabilities(image, shift, sharpness=4.0):
    """(3, Z, Y, X) of a network, by hand."""
    x = image.astype(np.float64) - shift
    logits = np.stack([np.full_like(x, 0.5), x, 3 * x - 2.4]) * sharpness
    powers = np.exp(logits - logits.max(0))
    return powers / powers.sum(0)


def image_of(number):
    coarse = np.random.default_rng(number).normal(0.8, 0.6, (4, 4, 4))
    return (np.abs(resample_image(coarse[None], GEOMETRY.shape, 3)[0]) + 0.01).astype(np.float32)


def make_dataset(root):
    """Four labelled cases in two folds, and two more to predict."""
    roots = Roots.below(root)
    raw = roots.raw / NAME
    for number in range(6):
        image, part = image_of(number), "Tr" if number < 4 else "Ts"
        write_image(image, GEOMETRY, raw / f"images{part}" / f"level_{number}_0000.nii.gz")
        if number < 4:
            truth = np.where(image > 1.2, 7, np.where(image > 0.5, 2, 0)).astype(np.uint8)
            write_labels(truth, GEOMETRY, raw / "labelsTr" / f"level_{number}.nii.gz")
    (raw / "dataset.json").write_text(json.dumps(DATASET))
    names = sorted(name for fold in FOLDS.values() for name in fold)
    splits = [{"train": [n for n in names if n not in held], "val": list(held)} for held in FOLDS.values()]
    (roots.preprocessed / NAME).mkdir(parents=True)
    (roots.preprocessed / NAME / "splits.json").write_text(json.dumps(splits))
    return roots


def make_model(roots, configuration, network, shifts, validate=True):
    """A model folder with a checkpoint per fold, each with a shift of its own."""
    plan = NetworkPlan((16, 16, 16), 1, {}, 0.1)
    spacing = GEOMETRY.spacing_mm
    configurations = {
        name: ConfigurationPlan(
            spacing, GEOMETRY.shape, 1, dict.fromkeys(NETWORKS.values(), plan), previous_stage=previous,
            arrays_of=previous and "3d_fullres",
        )
        for name, previous in CONFIGURATIONS.items()
    }  # fmt: skip
    plans = Plans(NAME, "default", 1.0, (ChannelNormalization("no_norm"),), None, configurations).to_json()
    folder = roots.results / NAME / folder_name(configuration, network)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    for fold, shift in shifts.items():
        description = ModelDescription(NETWORKS[network], {}, configuration, fold, "softmax", (), plans, DATASET)
        path = folder / f"fold_{fold}" / "checkpoint_best.pt"
        save_checkpoint(path, description, Shifted(1, 3, shift).state_dict())
        if validate:
            validate_fold(folder, fold, roots)
    return folder
