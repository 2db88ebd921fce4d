"""A dataset with test cases, and models of it that can adapt, or that know regions."""

import json

import numpy as np
import torch
from shifted_models import GEOMETRY, NAME, image_of
from torch import nn

from ukbob_seg.dataset.image_io import write_image, write_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan, Plans
from ukbob_seg.training.checkpoint import ModelDescription, save_checkpoint

CLASSES = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "low": 2, "high": 7}, "file_ending": ".nii.gz"}
REGIONS = {
    "channel_names": {"0": "noNorm", "1": "noNorm"},
    "labels": {"background": 0, "whole": [2, 7], "core": [7], "ignore": 9},
    "regions_class_order": [2, 7],
    "file_ending": ".nii.gz",
}


class Adapting(nn.Module):
    """Thresholds behind a BatchNorm layer, which a case's own statistics change, of a voxel and its neighbour, so that
    flips show."""

    def __init__(self, in_channels, out_channels, offset=0.0):
        super().__init__()
        self.norm = nn.BatchNorm3d(1)
        with torch.no_grad():
            self.norm.running_mean.fill_(0.3)
        self.offset = nn.Parameter(torch.tensor(float(offset)))

    def forward(self, x):
        x = self.norm(x)[:, 0] - self.offset
        x = 0.6 * x + 0.4 * torch.roll(x, 1, dims=-1)
        return 4 * torch.stack([torch.full_like(x, 0.2), x, 3 * x - 1.8], dim=1)


class RegionsOfTwoChannels(nn.Module):
    """Both regions are thresholds of the first channel plus a little of the second."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        x = x[:, 0] + self.share * x[:, 1]
        return torch.stack([x - 0.5, x - 1.2], dim=1)


def truth_of(image):
    return np.where(image > 1.2, 7, np.where(image > 0.5, 2, 0)).astype(np.uint8)


def make_cases(root, dataset, numbers=(0, 1, 2), labelled=True):
    """Test cases; with regions, a slab of ignored voxels and an inverted second channel."""
    roots = Roots.below(root)
    raw = roots.raw / NAME
    for number in numbers:
        image = image_of(number)
        truth = truth_of(image)
        channels = [image]
        if "ignore" in dataset["labels"]:
            truth[:, :6] = 9
            channels.append(1 - image)
        for channel, values in enumerate(channels):
            write_image(values, GEOMETRY, raw / "imagesTs" / f"level_{number}_{channel:04d}.nii.gz")
        if labelled:
            write_labels(truth, GEOMETRY, raw / "labelsTs" / f"level_{number}.nii.gz")
    (raw / "dataset.json").write_text(json.dumps(dataset))
    return roots


def make_model(roots, dataset=CLASSES, network="Adapting", folds=("0", "1"), name=None):
    """A model folder whose folds differ."""
    has_regions = "regions_class_order" in dataset
    registered = f"robust_models:{network}"
    plan = ConfigurationPlan(
        GEOMETRY.spacing_mm, GEOMETRY.shape, 1, {registered: NetworkPlan((16, 16, 16), 1, {}, 0.1)}
    )
    scheme = ChannelNormalization("no_norm" if has_regions else "zscore")
    normalization = (scheme,) * len(dataset["channel_names"])
    plans = Plans(NAME, "default", 1.0, normalization, None, {"3d_fullres": plan}).to_json()
    folder = roots.results / NAME / (name or f"3d_fullres__{registered.replace(':', '.')}")
    for number, fold in enumerate(folds):
        arguments = {} if has_regions else {"offset": 0.1 * number}
        built = RegionsOfTwoChannels(2, 2) if has_regions else Adapting(1, 3, **arguments)
        head = "sigmoid" if has_regions else "softmax"
        description = ModelDescription(registered, {}, "3d_fullres", fold, head, (0, 2), plans, dataset)
        save_checkpoint(folder / f"fold_{fold}" / "checkpoint_best.pt", description, built.state_dict())
    return folder
