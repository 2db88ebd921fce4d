"""Tiny model folders as nnU-Net v2 writes them, with random weights, and nnU-Net's documented pipeline in plain numpy.

``write_model`` imitates the files (plans.json, dataset.json, fold_K/checkpoint_final.pth); ``Reference`` predicts them
with scipy, scikit-image and whole arrays, without a line of this package.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from skimage.transform import resize
from torch import Tensor, nn

LABELS = {"background": 0, "first": 1, "second": 2}
NUMBERS = {"mean": 90.0, "median": 80.0, "std": 60.0, "min": 0.0, "max": 300.0,
           "percentile_00_5": 5.0, "percentile_99_5": 230.0}  # fmt: skip


def splines(**changes: Any) -> dict[str, Any]:
    """The three resampling entries of a configuration, as nnU-Net's planner writes them."""
    entries: dict[str, Any] = {}
    for kind, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        entries[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        entries[f"resampling_fn_{kind}_kwargs"] = {
            "is_seg": kind == "seg", "order": order, "order_z": 0, "force_separate_z": None,
        } | changes  # fmt: skip
    return entries


def architecture(
    flat: bool, residual: bool, strides: Sequence[Sequence[int]], kernels: Sequence[Sequence[int]]
) -> dict:
    """The ``architecture`` entry of a configuration."""
    dimension = 2 if flat else 3
    blocks = {"n_blocks_per_stage": [1, 2]} if residual else {"n_conv_per_stage": [2, 2]}
    name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": {
            "n_stages": 2,
            "features_per_stage": [4, 6],
            "conv_op": f"torch.nn.modules.conv.Conv{dimension}d",
            "kernel_sizes": [list(k) for k in kernels],
            "strides": [list(s) for s in strides],
            **blocks,
            "n_conv_per_stage_decoder": [1],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimension}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


@dataclass
class Tiny:
    """What makes up a model; spacing, patch, kernels and strides are in nnU-Net's transposed order."""

    spacing: Sequence[float] = (1.2, 1.0, 0.8)
    patch: Sequence[int] = (8, 12, 10)
    forward: Sequence[int] = (0, 1, 2)
    schemes: Sequence[str] = ("ZScoreNormalization",)
    masked: Sequence[bool] = (False,)
    labels: dict[str, Any] = field(default_factory=lambda: dict(LABELS))
    regions_order: Sequence[int] | None = None
    mirror: Sequence[int] | None = (0, 1, 2)
    residual: bool = False
    old_plans: bool = False
    configuration: str = "3d_fullres"
    previous: str | None = None
    resampling: dict[str, Any] = field(default_factory=splines)
    extra: dict[str, Any] = field(default_factory=dict)
    reader: str = "SimpleITKIO"
    folds: Sequence[str] = ("0",)
    seed: int = 1

    @property
    def flat(self) -> bool:
        return len(self.patch) == 2

    def strides(self) -> list[list[int]]:
        return [[1] * len(self.patch), [2, 1] if self.flat else [1, 2, 2]]

    def kernels(self) -> list[list[int]]:
        return [[3, 1] if self.flat else [1, 3, 3], [3] * len(self.patch)]

    def classes(self) -> list[int]:
        values = {v for name, value in self.labels.items() if name != "ignore" for v in np.atleast_1d(value)}
        return sorted(int(v) for v in values if v)

    def outputs(self) -> int:
        return len(self.regions_order) if self.regions_order else len(self.classes()) + 1

    def configurations(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "data_identifier": f"nnUNetPlans_{self.configuration}",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": list(self.patch),
            "median_image_size_in_voxels": [20.0] * len(self.patch),
            "spacing": list(self.spacing),
            "normalization_schemes": list(self.schemes),
            "use_mask_for_norm": list(self.masked),
            **self.resampling,
            "batch_dice": True,
        }
        if self.old_plans:
            entry |= {
                "UNet_class_name": "ResidualEncoderUNet" if self.residual else "PlainConvUNet",
                "UNet_base_num_features": 4,
                "unet_max_num_features": 6,
                "n_conv_per_stage_encoder": [1, 2] if self.residual else [2, 2],
                "n_conv_per_stage_decoder": [1],
                "num_pool_per_axis": [1] * len(self.patch),
                "pool_op_kernel_sizes": self.strides(),
                "conv_kernel_sizes": self.kernels(),
            }
        else:
            entry["architecture"] = architecture(self.flat, self.residual, self.strides(), self.kernels())
        if (
            self.previous is not None
        ):  # as nnU-Net writes a cascade: a configuration that inherits all but a few entries
            base = dict(entry)
            return {
                "3d_fullres": base,
                self.previous: {"inherits_from": "3d_fullres", "next_stage": self.configuration},
                self.configuration: {"inherits_from": "3d_fullres", "previous_stage": self.previous},
            }
        return {self.configuration: entry}

    def plans(self) -> dict[str, Any]:
        return {
            "dataset_name": "Dataset005_Tiny",
            "plans_name": "nnUNetPlans",
            "original_median_spacing_after_transp": [float(s) for s in (*self.spacing, 1.0, 1.0)][:3],
            "original_median_shape_after_transp": [20, 20, 20],
            "image_reader_writer": self.reader,
            "transpose_forward": list(self.forward),
            "transpose_backward": [list(self.forward).index(axis) for axis in range(3)],
            "configurations": self.configurations(),
            "experiment_planner_used": "ExperimentPlanner",
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {str(k): NUMBERS for k in range(len(self.schemes))},
        }

    def dataset(self) -> dict[str, Any]:
        content = {
            "channel_names": {str(k): f"channel{k}" for k in range(len(self.schemes))},
            "labels": self.labels,
            "numTraining": 3,
            "file_ending": ".nii.gz",
            **self.extra,
        }
        return content | ({"regions_class_order": list(self.regions_order)} if self.regions_order else {})

    def network(self, seed: int) -> nn.Module:
        """As nnU-Net builds it, with weights that make every class win somewhere."""
        from dynamic_network_architectures.architectures import unet

        name = "ResidualEncoderUNet" if self.residual else "PlainConvUNet"
        given = architecture(self.flat, self.residual, self.strides(), self.kernels())["arch_kwargs"]
        flat = self.flat
        given |= {
            "conv_op": nn.Conv2d if flat else nn.Conv3d,
            "norm_op": nn.InstanceNorm2d if flat else nn.InstanceNorm3d,
            "nonlin": nn.LeakyReLU,
        }
        inputs = len(self.schemes) + (len(self.classes()) if self.previous else 0)
        torch.manual_seed(seed)
        network = getattr(unet, name)(input_channels=inputs, num_classes=self.outputs(), deep_supervision=True, **given)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return network


def write_model(tiny: Tiny, results: Path, name: str | None = None) -> Path:
    """Write a model folder below ``results/Dataset005_Tiny``."""
    folder = results / "Dataset005_Tiny" / f"nnUNetTrainer__nnUNetPlans__{name or tiny.configuration}"
    for position, fold in enumerate(tiny.folds):
        network = tiny.network(tiny.seed + position)
        optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.99, nesterov=True)
        checkpoint = {
            "network_weights": network.state_dict(),
            "optimizer_state": optimizer.state_dict(),
            "grad_scaler_state": None,
            "logging": {"mean_fg_dice": [np.float64(0.5)], "dice_per_class_or_region": [[np.float32(0.1)]]},
            "_best_ema": np.float64(0.61),
            "current_epoch": 2,
            "init_args": {
                "plans": tiny.plans(), "configuration": tiny.configuration, "fold": fold,
                "dataset_json": tiny.dataset(), "device": torch.device("cpu"),
            },
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": None if tiny.mirror is None else tuple(tiny.mirror),
        }  # fmt: skip
        path = folder / f"fold_{fold}" / "checkpoint_final.pth"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)
    (folder / "plans.json").write_text(json.dumps(tiny.plans()))
    (folder / "dataset.json").write_text(json.dumps(tiny.dataset()))
    return folder


def scan(shape: Sequence[int] = (17, 23, 19), channels: int = 1, seed: int = 3, margin: int = 2) -> np.ndarray:
    """An image (C, Z, Y, X) of blobs in noise, with zeros around it and a dark hole inside."""
    generator = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(generator.normal(0, 1, (channels, *shape)), (0, 2, 2, 2)) * 800 + 120
    image = np.abs(image + generator.normal(0, 6, image.shape)) + 1
    inner = np.zeros(shape, dtype=bool)
    inner[tuple(slice(margin, n - margin) for n in shape)] = True
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    inner &= (grid**2).sum(axis=0) < 1.6
    inner[tuple(slice(n // 2, n // 2 + 2) for n in shape)] = False
    return (image * inner).astype(np.float32)


class Reference:
    """nnU-Net's pipeline (transpose, crop, normalise, resample, windows, export) as its documentation and code say."""

    def __init__(self, tiny: Tiny, previous: Reference | None = None) -> None:
        self.tiny, self.previous = tiny, previous
        self.networks = [tiny.network(tiny.seed + k).eval() for k in range(len(tiny.folds))]
        for network in self.networks:
            network.decoder.deep_supervision = False

    def predict(self, image: np.ndarray, spacing: Sequence[float], mirror: bool = False) -> np.ndarray:
        """Label values (Z, Y, X) of an image (C, Z, Y, X) with a spacing (z, y, x)."""
        logits, box, shape = self.logits(image, spacing, mirror)
        if self.tiny.regions_order:
            decided = np.zeros(logits.shape[1:], dtype=int)
            for region, value in zip(1 / (1 + np.exp(-logits)), self.tiny.regions_order, strict=True):
                decided[region > 0.5] = value
        else:
            decided = np.asarray([0, *self.tiny.classes()])[logits.argmax(axis=0)]
        whole = np.zeros(shape, dtype=int)
        whole[box] = decided
        return whole.transpose([list(self.tiny.forward).index(axis) for axis in range(3)])

    def logits(self, image: np.ndarray, spacing: Sequence[float], mirror: bool) -> tuple[np.ndarray, Any, tuple]:
        """Of the kept box at the file's resolution, still transposed."""
        tiny, forward = self.tiny, list(self.tiny.forward)
        data = image.astype(np.float64).transpose(0, *(1 + axis for axis in forward))
        own = [spacing[axis] for axis in forward]
        shape = data.shape[1:]
        mask = ndimage.binary_fill_holes((data != 0).any(axis=0))
        box = tuple(slice(int(w.min()), int(w.max()) + 1) for w in np.nonzero(mask))
        data, mask = data[(slice(None), *box)], mask[box]
        seg = None
        if self.previous is not None:
            seg = self.previous.predict(image, spacing, mirror).transpose(forward)[box]
            mask = mask | (seg > 0)
            seg = np.where(mask, seg, -1)  # nnU-Net's mark of what lies outside
        target = [own[0], *tiny.spacing] if tiny.flat else list(tiny.spacing)
        new_shape = [round(o / t * n) for o, t, n in zip(own, target, data.shape[1:], strict=True)]
        data = np.stack([self.normalise(c, k, mask) for k, c in enumerate(data)])
        kwargs = tiny.resampling
        data = resample(data, new_shape, own, target, kwargs["resampling_fn_data_kwargs"])
        if seg is not None:
            seg = resample(seg[None], new_shape, own, target, kwargs["resampling_fn_seg_kwargs"])[0]
            data = np.concatenate([data, [(seg == value).astype(float) for value in tiny.classes()]])
        logits = self.windows(torch.from_numpy(data.astype(np.float32)), mirror)
        back = [s.stop - s.start for s in box]
        return resample(logits, back, target, own, kwargs["resampling_fn_probabilities_kwargs"]), box, shape

    def normalise(self, values: np.ndarray, channel: int, mask: np.ndarray) -> np.ndarray:
        scheme = self.tiny.schemes[channel]
        if scheme == "ZScoreNormalization":
            if not self.tiny.masked[channel]:
                return (values - values.mean()) / values.std()
            result = values.copy()
            result[mask] = (values[mask] - values[mask].mean()) / values[mask].std()
            return result
        if scheme == "CTNormalization":
            clipped = np.clip(values, NUMBERS["percentile_00_5"], NUMBERS["percentile_99_5"])
            return (clipped - NUMBERS["mean"]) / NUMBERS["std"]
        if scheme == "RescaleTo01Normalization":
            return (values - values.min()) / (values.max() - values.min())
        return values / 255 if scheme == "RGBTo01Normalization" else values

    def windows(self, data: Tensor, mirror: bool) -> np.ndarray:
        """Sliding windows at half a patch, weighted by scipy's Gaussian of a unit impulse at the centre, of which
        half precision, ten times as large, keeps what exceeds its smallest number."""
        patch = (1, *self.tiny.patch) if self.tiny.flat else tuple(self.tiny.patch)
        lack = [max(0, p - n) for p, n in zip(patch, data.shape[1:], strict=True)]
        sides = [side for p in reversed(lack) for side in (p // 2, p - p // 2)]
        padded = nn.functional.pad(data, sides)
        impulse = np.zeros(patch)
        impulse[tuple(p // 2 for p in patch)] = 1
        gauss = ndimage.gaussian_filter(impulse, [p / 8 for p in patch], mode="constant")
        gauss = torch.from_numpy(np.maximum(gauss / gauss.max(), 2**-24 / 10))
        total = torch.zeros((self.tiny.outputs(), *padded.shape[1:]), dtype=torch.float64)
        weight = torch.zeros(padded.shape[1:], dtype=torch.float64)
        for corner in itertools.product(*map(starts, padded.shape[1:], patch)):
            place = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
            total[(slice(None), *place)] += self.forward(padded[(slice(None), *place)][None], mirror)[0] * gauss
            weight[place] += gauss
        inner = tuple(slice(p // 2, p // 2 + n) for p, n in zip(lack, data.shape[1:], strict=True))
        return (total / weight)[(slice(None), *inner)].numpy()

    @torch.no_grad()
    def forward(self, window: Tensor, mirror: bool) -> Tensor:
        axes = [a + 2 for a in self.tiny.mirror or ()] if mirror else []
        combinations = [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]
        total = 0
        for network in self.networks:
            for combination in combinations:
                given = window[:, :, 0] if self.tiny.flat else window
                output = network(given.flip(combination)).flip(combination).double()
                total = total + (output[:, :, None] if self.tiny.flat else output)
        return total / (len(combinations) * len(self.networks))


def starts(size: int, patch: int) -> list[int]:
    count = math.ceil((size - patch) / (patch * 0.5)) + 1
    return [round((size - patch) / max(1, count - 1) * k) for k in range(count)]


def resample(
    data: np.ndarray, shape: Sequence[int], current: Sequence[float], new: Sequence[float], options: dict[str, Any]
) -> np.ndarray:
    """nnU-Net's ``resample_data_or_seg_to_shape`` in the words of its documentation."""
    shape = [int(n) for n in shape]
    if list(data.shape[1:]) == shape:
        return data
    axis = None
    for spacing in (current, new):
        if options["force_separate_z"] is False:
            break
        if options["force_separate_z"] or max(spacing) / min(spacing) > 3:
            coarse = [k for k, s in enumerate(spacing) if s == max(spacing)]
            axis = coarse[0] if len(coarse) == 1 else None
            break

    def one(values: np.ndarray, size: Sequence[int]) -> np.ndarray:
        if not options["is_seg"]:
            return resize(values.astype(float), size, options["order"], mode="edge", anti_aliasing=False)
        labels = np.unique(values)
        shares = np.stack([
            resize((values == label).astype(float), size, options["order"], mode="edge", anti_aliasing=False)
            for label in labels
        ])  # fmt: skip
        result, best = labels[shares.argmax(axis=0)], shares.max(axis=0)
        nearest = resize(values.astype(float), size, 0, mode="edge", anti_aliasing=False)
        for label, share in zip(labels, shares, strict=True):
            result[(share == best) & (nearest == label)] = label
        return result

    if axis is None:
        return np.stack([one(channel, shape) for channel in data])
    result = []
    in_plane = [n for k, n in enumerate(shape) if k != axis]
    for channel in data:
        slices = np.stack([one(part, in_plane) for part in np.moveaxis(channel, axis, 0)], axis=axis)
        position = (np.arange(shape[axis]) + 0.5) * channel.shape[axis] / shape[axis] - 0.5
        grid = np.meshgrid(*(position if k == axis else np.arange(n) for k, n in enumerate(shape)), indexing="ij")
        result.append(ndimage.map_coordinates(slices, grid, order=options["order_z"], mode="nearest"))
    return np.stack(result)
