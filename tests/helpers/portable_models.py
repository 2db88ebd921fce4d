"""Models in which everything that a checkpoint carries changes the prediction: folds, flips, fields, a first stage."""

import dataclasses

import numpy as np
import torch
from torch import nn

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.files import write_json
from ukbob_seg.networks.registry import build_network
from ukbob_seg.preprocessing.intensity_field import TERMS, UsualField
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan, Plans
from ukbob_seg.preprocessing.resampling import resample_image
from ukbob_seg.training.checkpoint import ModelDescription, save_checkpoint

NAME = "Dataset006_Carried"
SMALL = "portable_models:Small"
CLASSES = {
    "channel_names": {"0": "MRI", "1": "MRI"},
    "labels": {"background": 0, "low": 2, "high": 7},
    "file_ending": ".nii.gz",
    "numTraining": 5,
    "licence": "CC BY 4.0",
    "dataset": {"Doe_Jane": {"images": ["/home/jane/a.nii.gz", "/home/jane/b.nii.gz"], "label": "/home/jane/l.nii.gz"}},
}
REGIONS = {**CLASSES, "labels": {"background": 0, "whole": [2, 7], "core": [7]}, "regions_class_order": [2, 7]}
GEOMETRY = Geometry((14, 22, 20), (2.5, 1.0, 0.7), (3.0, -4.0, 5.0))
SWIN = {"feature_size": 12}
UNET = {
    "features_per_stage": [4, 8], "strides": [1, 2], "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
    "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "deep_supervision": True,
}  # fmt: skip


class Small(nn.Module):
    """Neighbours matter, so that flips show, and BatchNorm has statistics, which ETTA changes."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.first = nn.Conv3d(in_channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm3d(6)
        self.last = nn.Conv3d(6, out_channels, 1)

    def forward(self, x):
        return 4 * self.last(torch.relu(self.norm(self.first(x))))


class ReadsItsInput(Small):
    """Does what no graph can say."""

    def forward(self, x):
        return super().forward(x) if np.isfinite(x.detach().numpy()).all() else x


def image_of(number, channels=2):
    generator = np.random.default_rng(number)
    coarse = generator.normal(0.8, 0.6, (channels, 4, 4, 4))
    return np.abs(resample_image(coarse, GEOMETRY.shape, 3)) + np.float32(0.01)


def make_model(
    roots, dataset=CLASSES, network=SMALL, folds=("0", "1"), configuration="3d_fullres", arguments=None,
    patch=(8, 16, 16), checkpoint="best", seed=0,
):  # fmt: skip
    """A model folder; the second stage of a cascade has the first one's name in its plans."""
    arguments = dict(arguments or {})
    channels = len(dataset["channel_names"])
    schemes = (ChannelNormalization("zscore"),) * channels
    plans = Plans(NAME, "default", 1.0, schemes, 2, _configurations(network, arguments, patch)).to_json()
    stage = plans["configurations"][configuration]["previous_stage"]
    given = {**arguments, **({"previous_labels": 2} if stage else {})}
    outputs = 2 if "regions_class_order" in dataset else 3
    folder = roots.results / NAME / f"{configuration}__{network.replace(':', '.')}"
    for number, fold in enumerate(folds):
        with torch.random.fork_rng():
            torch.manual_seed(seed + 10 * number + 100 * bool(stage))
            built = build_network(network, channels, outputs, given)
            for name, value in built.state_dict().items():
                if "norm" in name and value.is_floating_point():
                    value.uniform_(0.5, 1.5)
        usual = UsualField(tuple(0.01 * (number + 1) for _ in TERMS), 0.1 / 3)
        description = ModelDescription(
            network, given, configuration, fold, "sigmoid" if outputs == 2 else "softmax", (1, 2), plans, dataset,
            (usual, None),
        )  # fmt: skip
        state = {"epoch": 3, "best_dice": 0.5, "optimizer_state": {"momentum": torch.ones(1000)}}
        save_checkpoint(
            folder / f"fold_{fold}" / f"checkpoint_{checkpoint}.pt", description, built.state_dict(), **state
        )
    write_json(folder / "plans.json", plans)
    write_json(folder / "dataset.json", dataset)
    return folder


def _configurations(network, arguments, patch):
    plan = {network: NetworkPlan(patch, 1, arguments, 0.1)}
    second = {network: NetworkPlan(patch, 1, {**arguments, "previous_labels": 2}, 0.1)}
    full = ConfigurationPlan((2.5, 1.0, 1.0), GEOMETRY.shape, 3, plan)
    return {
        "3d_fullres": full,
        "3d_lowres": dataclasses.replace(full, spacing_mm=(3.0, 1.5, 1.5)),
        "3d_cascade_fullres": dataclasses.replace(
            full, networks=second, previous_stage="3d_lowres", arrays_of="3d_fullres"
        ),
    }


def roots_of(tmp_path, name="there"):
    return Roots.below(tmp_path / name)
