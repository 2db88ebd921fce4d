"""What nnU-Net v2's planners decide, from the same numbers: spacing, axes, patch, topology, batch, low resolution.

Written for exact agreement with nnU-Net 2.8.1 (``ExperimentPlanner`` and the residual-encoder planners M, L and XL),
so the order of floating-point operations follows its definitions. Axes are ordered coarsest first in here, as nnU-Net
plans them (its ``transpose_forward``); ``nnunet_preset`` brings the result back to (z, y, x).

References: Isensee et al., nnU-Net, Nature Methods 2021; Isensee et al., nnU-Net Revisited, MICCAI 2024 (ResEnc).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from ukbob_seg.errors import ConfigError

ANISOTROPY_THRESHOLD = 3
MIN_EDGE = 4  # voxels of a feature map along an axis that is still pooled
BASE_FEATURES = 32
MAX_FEATURES = {2: 512, 3: 320}
START_EDGE = {2: 2048, 3: 256}  # the first patch has the volume of a square or cube of this edge
MIN_BATCH = 2
REFERENCE_BATCH = {2: 12, 3: 2}
LOWRES_COVERAGE = 0.25
LOWRES_STEP = 1.03
LOWRES_LEAST_RATIO = 2  # a low resolution must have at most one over this of the voxels
STANDARD_BLOCKS = (2,) * 14
RESIDUAL_BLOCKS = (1, 3, 4) + (6,) * 10


@dataclass(frozen=True)
class Sizing:
    """How large a network one of nnU-Net's planners makes.

    Attributes:
        residual: whether the encoder is residual (ResEnc).
        reference: by dimension, the feature-map values that ``memory_gb`` is taken to hold.
        memory_gb: graphics memory that the planner aims at unless told otherwise, GB.
        dataset_share: a batch holds at most this share of the dataset's voxels.
    """

    residual: bool
    reference: dict[int, int]
    memory_gb: float
    dataset_share: float

    @property
    def encoder_blocks(self) -> tuple[int, ...]:
        """Convolutions (residual: blocks) of each encoder stage."""
        return RESIDUAL_BLOCKS if self.residual else STANDARD_BLOCKS

    @property
    def decoder_convolutions(self) -> int:
        """Convolutions of a decoder stage."""
        return 1 if self.residual else 2


# By registry name of the network: nnU-Net's standard planner and its residual-encoder presets.
SIZINGS: dict[str, Sizing] = {
    "plain_conv_unet": Sizing(False, {3: 560_000_000, 2: 85_000_000}, 8, 0.05),
    "resenc_unet_m": Sizing(True, {3: 680_000_000, 2: 135_000_000}, 8, 1),
    "resenc_unet_l": Sizing(True, {3: 2_100_000_000, 2: 380_000_000}, 24, 1),
    "resenc_unet_xl": Sizing(True, {3: 3_600_000_000, 2: 560_000_000}, 40, 1),
}


@dataclass(frozen=True)
class Topology:
    """Stages of a U-Net; lists run from the input to the bottleneck.

    Attributes:
        patch: voxels, divisible by ``divisor``.
        strides: per stage and axis.
        kernels: per stage and axis.
        divisor: product of the strides of each axis.
    """

    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    divisor: tuple[int, ...]

    @property
    def features(self) -> tuple[int, ...]:
        """Channels per stage."""
        most = MAX_FEATURES[len(self.patch)]
        return tuple(min(most, BASE_FEATURES * 2**stage) for stage in range(len(self.strides)))


@dataclass(frozen=True)
class SizedNetwork:
    """A network at one resolution: what it sees, its stages, and how it is fed.

    Attributes:
        spacing_mm: target spacing of its axes.
        median_shape: median case at that spacing, in (possibly half) voxels.
        topology: patch and stages.
        batch: patches per step.
        memory_gb: share of the reference that the batch fills, times the reference's memory.
    """

    spacing_mm: tuple[float, ...]
    median_shape: tuple[float, ...]
    topology: Topology
    batch: int
    memory_gb: float


@dataclass(frozen=True)
class Cases:
    """What the rules need of a dataset; arrays are (cases, 3) in (z, y, x).

    Attributes:
        spacings_mm: voxel sizes.
        shapes: voxels after cropping.
        outputs: entries of ``labels`` in dataset.json, background and ignore included, which is what nnU-Net counts.
    """

    spacings_mm: np.ndarray
    shapes: np.ndarray
    outputs: int


def target_spacing(cases: Cases) -> np.ndarray:
    """Median spacing (z, y, x); the 10th percentile along an axis that is coarse and has few voxels."""
    target = np.percentile(cases.spacings_mm, 50, 0)
    size = np.percentile(cases.shapes, 50, 0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarse = target[worst] > ANISOTROPY_THRESHOLD * max(target[others])
    if coarse and size[worst] * ANISOTROPY_THRESHOLD < min(size[others]):
        tenth = np.percentile(cases.spacings_mm[:, worst], 10)
        limit = max(target[others])
        target[worst] = limit + 1e-5 if tenth < limit else tenth
    return target


def coarsest_first(spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """Order of axes with the coarsest in front (ties: the first) and the others as they were."""
    worst = int(np.argmax(spacing_mm))
    first, second = (axis for axis in range(3) if axis != worst)
    return worst, first, second


def build_topology(spacing_mm: Sequence[float], patch: Sequence[float]) -> Topology:
    """Halve axes while they are long enough, coarse axes only once the others have caught up.

    An axis can be pooled while it keeps ``MIN_EDGE`` voxels, and is pooled in a stage if its spacing is within a
    factor of two of the finest poolable one. A single axis is pooled only from 12 voxels on. A kernel is 1 along an
    axis that is twice as coarse as the finest, and 3 from the stage where that ends.
    """
    axes = range(len(patch))
    spacing, size = list(spacing_mm), [float(n) for n in patch]
    strides, kernels = [(1,) * len(patch)], []
    kernel = [1] * len(patch)
    while True:
        long = [axis for axis in axes if size[axis] >= 2 * MIN_EDGE]
        pooled = [axis for axis in long if spacing[axis] / min(spacing[a] for a in long) < 2]
        if not pooled or (len(pooled) == 1 and size[pooled[0]] < 3 * MIN_EDGE):
            break
        finest = min(spacing)
        kernel = [3 if k == 3 or spacing[axis] / finest < 2 else 1 for axis, k in enumerate(kernel)]
        for axis in pooled:
            spacing[axis] *= 2
            size[axis] = ceil(size[axis] / 2)
        strides.append(tuple(2 if axis in pooled else 1 for axis in axes))
        kernels.append(tuple(kernel))
    kernels.append((3,) * len(patch))  # the bottleneck
    divisor = tuple(prod(stride[axis] for stride in strides) for axis in axes)
    padded = tuple(ceil(n / d) * d for n, d in zip(patch, divisor, strict=True))
    return Topology(padded, tuple(strides), tuple(kernels), divisor)


def feature_map_values(topology: Topology, sizing: Sizing, outputs: int) -> int:
    """Values in all feature maps of one patch: nnU-Net's measure of memory, in closed form.

    Equals ``compute_conv_feature_map_size`` of the network without deep supervision: the outputs of every convolution
    and transposed convolution, of the projections beside the first block of a residual stage, and of the last layer.
    """
    size, total = list(topology.patch), 0
    last = len(topology.strides) - 1
    for stage, (stride, width) in enumerate(zip(topology.strides, topology.features, strict=True)):
        size = [n // s for n, s in zip(size, stride, strict=True)]
        blocks = sizing.encoder_blocks[stage]
        # Residual: two convolutions a block, and the stem (stage 0) or the projection of the skip connection.
        convolutions = 2 * blocks + 1 if sizing.residual else blocks
        if stage < last:
            convolutions += sizing.decoder_convolutions + 1
        total += convolutions * width * prod(size)
    return total + (outputs * prod(topology.patch) if last else 0)


def size_network(
    spacing_mm: Sequence[float],
    median_shape: Sequence[float],
    dataset_voxels: float,
    outputs: int,
    sizing: Sizing,
    memory_gb: float | None = None,
) -> SizedNetwork:
    """Patch, topology and batch for 2 or 3 axes.

    The patch starts with edges proportional to 1/spacing, clipped to the median case. While it is too large, the axis
    that covers most of the median case (ties: the last) loses as little as pooling allows. What is left of the
    memory goes to the batch.

    Args:
        spacing_mm: per axis.
        median_shape: median case, voxels.
        dataset_voxels: of all cases.
        outputs: of the network.
        sizing: which of nnU-Net's planners.
        memory_gb: graphics memory to aim at instead of the planner's own.

    Raises:
        ConfigError: shrinking the patch leads nowhere.
    """
    dims = len(spacing_mm)
    reference = sizing.reference[dims] * ((memory_gb or sizing.memory_gb) / sizing.memory_gb)
    aspect = 1 / np.asarray(spacing_mm, dtype=float)
    edges = aspect * (START_EDGE[dims] ** dims / np.prod(aspect)) ** (1 / dims)
    topology = build_topology(spacing_mm, [min(round(e), n) for e, n in zip(edges, median_shape, strict=True)])
    values = feature_map_values(topology, sizing, outputs)
    seen = set()
    while _least_batch_share(values, dims, sizing) > reference:
        seen.add(topology.patch)
        topology = _shrink(topology, spacing_mm, median_shape)
        values = feature_map_values(topology, sizing, outputs)
        if topology.patch in seen:  # padding to the new divisor undid the step; nnU-Net would go round for ever
            raise ConfigError(
                f"preset nnunet: no patch of a network with {outputs} outputs fits {memory_gb or sizing.memory_gb:g} "
                "GB by nnU-Net's rules; give more --memory-gb"
            )
    batch = round((reference / values) * REFERENCE_BATCH[dims])
    by_share = round(dataset_voxels * sizing.dataset_share / float(prod(topology.patch)))
    batch = max(min(batch, by_share), MIN_BATCH)
    memory = sizing.memory_gb * (values * batch) / (sizing.reference[dims] * REFERENCE_BATCH[dims])
    return SizedNetwork(tuple(spacing_mm), tuple(median_shape), topology, batch, memory)


def _least_batch_share(values: int, dims: int, sizing: Sizing) -> float:
    """What a batch of two takes of the reference, or what the residual planners take for it: one value a value."""
    return values if sizing.residual else values / REFERENCE_BATCH[dims] * MIN_BATCH


def _shrink(topology: Topology, spacing_mm: Sequence[float], median_shape: Sequence[float]) -> Topology:
    """The next smaller patch. Pooling less often may allow a smaller step than the present divisor (256 to 224)."""
    share = [n / m for n, m in zip(topology.patch, median_shape, strict=True)]
    axis = max(range(len(share)), key=lambda a: (share[a], a))
    edges = list(topology.patch)
    edges[axis] -= topology.divisor[axis]
    step = build_topology(spacing_mm, edges).divisor[axis]
    edges[axis] = topology.patch[axis] - step
    return build_topology(spacing_mm, edges)


def resampled_shapes(cases: Cases, target_mm: np.ndarray) -> np.ndarray:
    """(cases, 3) voxels at another spacing."""
    return np.array(
        [
            [max(1, round(s / t * n)) for n, s, t in zip(shape, spacing, target_mm, strict=True)]
            for shape, spacing in zip(cases.shapes.tolist(), cases.spacings_mm.tolist(), strict=True)
        ]
    )


def size_all(
    cases: Cases, target_mm: np.ndarray, sizing: Sizing, memory_gb: float | None = None
) -> dict[str, SizedNetwork]:
    """Every configuration that one of nnU-Net's planners makes, axes coarsest first; ``2d`` has two.

    ``3d_fullres`` is absent when the median case is one voxel thick along the coarsest axis, ``3d_lowres`` unless the
    patch of ``3d_fullres`` covers little of the median case and a much coarser resolution changes that.
    """
    order = list(coarsest_first(list(target_mm)))
    median = np.median(resampled_shapes(cases, target_mm), 0)[order]
    spacing = np.asarray(target_mm, dtype=float)[order]
    voxels = float(np.prod(median)) * len(cases.shapes)
    found = {}
    if median[0] != 1:
        full = size_network(spacing.tolist(), median.tolist(), voxels, cases.outputs, sizing, memory_gb)
        found["3d_fullres"] = full
        low = _lowres(full, cases, sizing, memory_gb)
        if low is not None:
            found["3d_lowres"] = low
    plane, size = spacing[1:].tolist(), median[1:].tolist()
    found["2d"] = size_network(plane, size, voxels, cases.outputs, sizing, memory_gb)
    return found


def _lowres(full: SizedNetwork, cases: Cases, sizing: Sizing, memory_gb: float | None) -> SizedNetwork | None:
    """Coarsen (axes that are more than twice as fine as the coarsest first) until a patch covers enough."""
    original, median = np.array(full.spacing_mm), np.array(full.median_shape)
    spacing, voxels, low = original.copy(), float(np.prod(median)), full
    while prod(low.topology.patch) / voxels < LOWRES_COVERAGE:
        finer = max(spacing) / spacing > 2
        spacing = np.where(finer, spacing * LOWRES_STEP, spacing) if finer.any() else spacing * LOWRES_STEP
        shape = original / spacing * median
        voxels = float(np.prod(shape))
        low = size_network(
            spacing.tolist(), [round(n) for n in shape], voxels * len(cases.shapes), cases.outputs, sizing, memory_gb
        )
    return None if np.prod(median) / voxels < LOWRES_LEAST_RATIO else low
