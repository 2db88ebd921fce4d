"""nnU-Net's networks: from the plans' entries to those of our registry, in the axis order of the file.

nnU-Net transposes images so that their coarsest axis comes first, and trains on that. A convolution of a transposed
image is the transposed convolution of the image: with the kernels' axes exchanged back, the same network takes images
as they are, and nothing else has to know of the transposition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ukbob_seg.errors import CheckpointError

CLASSES = {"PlainConvUNet": "plain_conv_unet", "ResidualEncoderUNet": "residual_encoder_unet"}
_BLOCKS = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
_NORMS = {"InstanceNorm2d": "instance", "InstanceNorm3d": "instance", "BatchNorm2d": "batch", "BatchNorm3d": "batch"}
_PLAIN = (  # what the constructors take beside what is translated below
    "features_per_stage", "n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder", "conv_bias",
    "norm_op_kwargs", "nonlin_kwargs", "dropout_op_kwargs", "nonlin_first", "stem_channels", "bottleneck_channels",
    "stochastic_depth_p", "squeeze_excitation", "squeeze_excitation_reduction_ratio",
)  # fmt: skip
_DROPPED = ("n_stages", "conv_op", "deep_supervision")


@dataclass(frozen=True)
class AxisOrder:
    """How nnU-Net's transposed axes lie in the file's.

    Attributes:
        forward: for each transposed axis the file's (``transpose_forward``).
        is_flat: whether the configuration is 2D, with slices across the first transposed axis.
    """

    forward: tuple[int, int, int]
    is_flat: bool

    @property
    def slice_axis(self) -> int | None:
        """The file's axis that slices are cut across, None in 3D."""
        return self.forward[0] if self.is_flat else None

    def per_axis(self, values: Sequence[Any], across: Any = None) -> tuple[Any, Any, Any]:
        """Values of transposed axes (two of them in 2D) in the file's order; ``across`` for the slice axis."""
        given = (across, *values) if self.is_flat else tuple(values)
        placed: dict[int, Any] = dict(zip(self.forward, given, strict=True))
        return placed[0], placed[1], placed[2]

    def in_file(self, axis: int) -> int:
        """The file's axis of a spatial axis of the network."""
        return self.forward[axis + 1] if self.is_flat else self.forward[axis]

    def spatial(self, values: Sequence[int]) -> list[int]:
        """Values of a kernel's axes in the order in which the kernel shall have them."""
        return [values[axis] for axis in self._kernel_order()]

    def weights(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with the kernels' axes in the file's order; other tensors are left as they are."""
        order = self._kernel_order()
        if order == sorted(order):
            return dict(given)
        spatial = len(order)
        return {
            name: value.permute(0, 1, *(2 + axis for axis in order)).contiguous()
            if value.dim() == spatial + 2
            else value
            for name, value in given.items()
        }

    def _kernel_order(self) -> list[int]:
        """For each kernel axis, ascending in the file, the network's."""
        own = self.forward[1:] if self.is_flat else self.forward
        return sorted(range(len(own)), key=lambda axis: own[axis])


def network_arguments(configuration: Mapping[str, Any], order: AxisOrder, where: str) -> tuple[str, dict[str, Any]]:
    """Name in the registry and arguments of the network of a configuration, in old plans and new ones.

    Raises:
        CheckpointError: another class, or arguments that are not understood; ``where`` names the file.
    """
    if "architecture" in configuration:
        architecture = configuration["architecture"]
        kind = str(architecture["network_class_name"]).rpartition(".")[2]
        given = dict(architecture["arch_kwargs"])
    else:
        kind = str(configuration.get("UNet_class_name"))
        given = _old_arguments(configuration, kind) if kind in CLASSES else {}
    if kind not in CLASSES:
        raise CheckpointError(
            f"{where}: network {kind} is not supported; models of {' and '.join(CLASSES)} run here, others where they "
            "were trained"
        )
    unknown = sorted(set(given) - {*_PLAIN, *_DROPPED, "kernel_sizes", "strides", "norm_op", "nonlin", "dropout_op"})
    norm = str(given.get("norm_op")).rpartition(".")[2]
    if unknown or norm not in _NORMS:
        what = f"argument {unknown[0]}" if unknown else f"norm_op {given.get('norm_op')}"
        raise CheckpointError(f"{where}: {what} of network {kind} is not supported")
    arguments = {key: value for key, value in given.items() if key in _PLAIN and value is not None}
    arguments["norm"] = _NORMS[norm]
    stages = len(given["features_per_stage"])
    spatial = 2 if order.is_flat else 3
    for name in ("kernel_sizes", "strides"):
        sizes = given[name] if isinstance(given[name], (list, tuple)) else [given[name]] * stages
        arguments[name] = [order.spatial([size] * spatial if isinstance(size, int) else size) for size in sizes]
    for name in ("nonlin", "dropout_op"):
        if given.get(name) is not None:
            arguments[name] = str(given[name]).rpartition(".")[2]
    if order.slice_axis is not None:
        arguments["slice_axis"] = order.slice_axis
    return CLASSES[kind], arguments


def _old_arguments(configuration: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Of plans before 2024-06, which named the numbers but not the rest, which was always the same."""
    blocks = configuration["n_conv_per_stage_encoder"]
    first, most = configuration["UNet_base_num_features"], configuration["unet_max_num_features"]
    return {
        "features_per_stage": [min(first * 2**stage, most) for stage in range(len(blocks))],
        "kernel_sizes": configuration["conv_kernel_sizes"],
        "strides": configuration["pool_op_kernel_sizes"],
        _BLOCKS[kind]: blocks,
        "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
        "norm_op": "InstanceNorm3d",
        "nonlin": "LeakyReLU",
    }
