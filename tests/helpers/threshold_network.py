"""A network whose right answer is known for any image, and predictors made of it."""

import numpy as np
import torch
from torch import nn

from ukbob_seg.dataset.image_io import Geometry, write_image
from ukbob_seg.inference.predictor import Predictor
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan, Plans
from ukbob_seg.training.checkpoint import ModelDescription, save_checkpoint

DATASET = {
    "channel_names": {"0": "noNorm"},
    "labels": {"background": 0, "low": 2, "high": 7},
    "file_ending": ".nii.gz",
}


class Identity(nn.Module):
    """Segments by thresholds of the intensity, so that the right answer is known for any image.

    ``norm`` gives it something to adapt: an affine LayerNorm over one value is a constant 0 plus bias.
    """

    def __init__(self, in_channels, out_channels, sharpness=50.0):
        super().__init__()
        self.norm = nn.LayerNorm(1)
        self.scale = nn.Parameter(torch.tensor(float(sharpness)))

    def forward(self, x):
        x = x[:, 0] + 0 * self.norm(x[:, 0, ..., None])[..., 0]
        bumps = [x.new_full(x.shape, 0.5), x, 3 * x - 2.4]  # argmax: < 0.5, 0.5..1.2, > 1.2
        return torch.stack(bumps, dim=1) * self.scale


REGIONS = {**DATASET, "labels": {"background": 0, "whole": [2, 7], "core": [7]}, "regions_class_order": [2, 7]}


class Regions(nn.Module):
    """The same thresholds as overlapping regions."""

    def forward(self, x):
        return torch.stack([x[:, 0] - 0.5, x[:, 0] - 1.2], dim=1)


def plans_of(spacing=(1.0, 1.0, 1.0)):
    network = NetworkPlan((16, 16, 16), 1, {}, 0.1)
    configuration = ConfigurationPlan(spacing, (20, 20, 20), 1, {"identity": network})
    return Plans("Dataset001_Identity", "default", 1.0, (ChannelNormalization("no_norm"),), 2,
                 {"3d_fullres": configuration})  # fmt: skip


def predictor_of(settings=None, spacing=(1.0, 1.0, 1.0), dataset=None, networks=None, mirror=(0, 1, 2)):
    description = ModelDescription(
        "identity", {}, "3d_fullres", "0", "softmax", mirror, plans_of(spacing).to_json(), dataset or DATASET
    )
    return Predictor(networks or [Identity(1, 3).eval()], description, settings=settings)


def truth_of(image):
    return np.where(image[0] > 1.2, 7, np.where(image[0] > 0.5, 2, 0)).astype(np.uint8)


def blobs(shape, seed=0):
    """A smooth image whose labels are large compared with a voxel."""
    generator = np.random.default_rng(seed)
    coarse = generator.normal(0.7, 0.6, (4, 4, 4))
    from ukbob_seg.preprocessing.resampling import resample_image

    return resample_image(coarse[None], shape, 3)


def many_cases(folder, count=4):
    """Images case_0, case_1, ... in a folder."""
    for number in range(count):
        image = blobs((16, 15, 14), number).astype(np.float32)
        write_image(image[0], Geometry((16, 15, 14), (3.0, 1.0, 0.7)), folder / f"case_{number}_0000.nii.gz")


class Adaptable(nn.Module):
    """A small convolutional network whose norm layer ETTA changes, and its labels with it."""

    def __init__(self, in_channels, out_channels, norm="batch", seed=0):
        super().__init__()
        norms = {
            "batch": lambda: nn.BatchNorm3d(6), "batch, not affine": lambda: nn.BatchNorm3d(6, affine=False),
            "instance": lambda: nn.InstanceNorm3d(6, affine=True), "group": lambda: nn.GroupNorm(2, 6),
            "layer": lambda: ChannelsLast(6),
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Conv3d(in_channels, 6, 3, padding=1)
            self.norm = norms[norm]()
            self.last = nn.Conv3d(6, out_channels, 1)

    def forward(self, x):
        return 4 * self.last(torch.relu(self.norm(self.first(x))))


class ChannelsLast(nn.Module):
    """LayerNorm over the channels of each voxel, as in Swin blocks."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def model_folder(tmp_path, folds=("0", "1"), network="Identity"):
    plans = plans_of().to_json()
    networks = plans["configurations"]["3d_fullres"]["networks"]
    networks[f"threshold_network:{network}"] = networks.pop("identity")
    folder = tmp_path / "3d_fullres__identity"
    for fold in folds:
        is_identity = network == "Identity"
        built = Identity(1, 3, sharpness=float(fold) + 1) if is_identity else Adaptable(1, 3, seed=int(fold))
        description = ModelDescription(
            f"threshold_network:{network}", {}, "3d_fullres", fold, "softmax", (0,), plans, DATASET
        )
        save_checkpoint(folder / f"fold_{fold}" / "checkpoint_best.pt", description, built.state_dict())
    return folder
