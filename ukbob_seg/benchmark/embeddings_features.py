"""Mean features of every class under sliding windows, without ever holding the features of a whole image.

A prediction averages windows: at voxel v the logits are the sum over windows w of g_w(v) / G(v) l_w(v), with g_w the
window's weight and G the sum of all. The features in front of the head, averaged in the same way and then over the
voxels of a class, are a sum over windows too: each adds the sum over the class's voxels of g_w(v) / G(v) f_w(v), and
the total is divided by the number of voxels. So what is held are one window's features and one number per voxel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.passes import forward
from ukbob_seg.inference.sliding_window import WindowSettings, gaussian_weights
from ukbob_seg.networks.wrappers import CascadeNetwork, SliceNetwork, unwrapped

Features = Callable[[Tensor], Tensor]


def find_head(network: nn.Module, window: Tensor, outputs: int) -> nn.Module:
    """The segmentation head: the last convolution called that makes all outputs at the window's full resolution.

    Args:
        network: in evaluation mode, wrapped or not.
        window: (1, C, z, y, x) to call it with, on its device.
        outputs: K, classes or regions.

    Raises:
        ConfigError: there is none.
    """
    called: list[tuple[nn.Module, tuple[int, ...]]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        called.append((module, tuple(inputs[0].shape)))

    across = _slice_axis(network)
    plane = [n for axis, n in enumerate(window.shape[2:]) if axis != across]
    hooks = [
        module.register_forward_hook(note)
        for module in network.modules()
        if isinstance(module, (nn.Conv3d, nn.Conv2d)) and module.out_channels == outputs
    ]
    try:
        with torch.no_grad():
            forward(network, window)
    finally:
        for hook in hooks:
            hook.remove()
    heads = [module for module, shape in called if list(shape[2:]) == plane]
    if not heads or heads.count(heads[-1]) > 1:
        why = "calls it several times" if heads else f"has no convolution to {outputs} outputs at full resolution"
        raise ConfigError(
            f"{type(unwrapped(network)).__name__} has no segmentation head whose input could be taken: it {why}"
            if not heads
            else f"the segmentation head of {type(unwrapped(network)).__name__} has no one input: the network {why}"
        )
    return heads[-1]


@contextmanager
def features_of(network: nn.Module, window: Tensor, outputs: int) -> Iterator[Features]:
    """While the block runs, a function (B, C, z, y, x) -> (B, F, z, y, x) float32: the input of the head.

    Args:
        network: in evaluation mode on the windows' device; half precision on CUDA, as for predictions.
        window: as for ``find_head``.
        outputs: likewise.

    Raises:
        ConfigError: no head is found.
    """
    head, across = find_head(network, window, outputs), _slice_axis(network)
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    @torch.no_grad()
    def features(windows: Tensor) -> Tensor:
        seen.clear()
        forward(network, windows)
        (found,) = seen
        seen.clear()
        if across is not None:
            found = found.unflatten(0, (len(windows), -1)).movedim(1, across + 2)
        return found.float()

    hook = head.register_forward_pre_hook(note)
    try:
        yield features
    finally:
        hook.remove()


def class_features(
    features: Features,
    image: Tensor,
    labels: np.ndarray,
    classes: int,
    settings: WindowSettings,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the voxels of every class of the features that sliding windows average.

    Args:
        features: (B, C, z, y, x) windows -> (B, F, z, y, x).
        image: (C, Z, Y, X), where the network is.
        labels: (Z, Y, X) label indices; 1 to ``classes`` count, anything else belongs to no class.
        classes: K.
        settings: of the windows, which are those of a prediction. Windows without a voxel of a class are left out,
            which changes nothing.
        progress: called with (windows done, windows in all).

    Returns:
        (K,) int64 voxels of each class and (K, F) float64 means, NaN for a class without voxels. F is 0 when no class
        has any.
    """
    padded, _ = settings.pad(image)
    known = np.where((labels >= 1) & (labels <= classes), labels, 0).astype(np.int32)
    indices = settings.pad(torch.from_numpy(known))[0].to(image.device)
    voxels = np.bincount(known.ravel(), minlength=classes + 1)[1:]
    patch = settings.window(image.shape[1:])
    gauss = gaussian_weights(patch, image.device)
    corners = itertools.product(*settings.starts(padded.shape[1:]))
    places = [tuple(slice(a, a + p) for a, p in zip(corner, patch, strict=True)) for corner in corners]
    total = torch.zeros(padded.shape[1:], device=image.device)
    for place in places:
        total[place] += gauss
    wanted = [place for place in places if bool(indices[place].any())]
    sums: np.ndarray = np.zeros((classes, 0))
    for first in range(0, len(wanted), settings.batch_size):
        part = wanted[first : first + settings.batch_size]
        found = features(torch.stack([padded[(slice(None), *place)] for place in part]))
        if not sums.size:
            sums = np.zeros((classes, found.shape[1]))
        for place, window in zip(part, found, strict=True):
            _add(sums, window, indices[place], gauss / total[place])
        if progress is not None:
            progress(first + len(part), len(wanted))
    with np.errstate(invalid="ignore"):
        return voxels, sums / np.where(voxels, voxels, np.nan)[:, None]


def _add(sums: np.ndarray, features: Tensor, labels: Tensor, weights: Tensor) -> None:
    """Add a window's weighted features (F, z, y, x) to the sums (K, F) of the classes among its labels (z, y, x)."""
    flat = labels.flatten()
    places = flat.nonzero()[:, 0]
    ordered, order = flat[places].sort(stable=True)
    places = places[order]
    chosen = features.flatten(1).index_select(1, places)
    share = weights.flatten().index_select(0, places)
    present, counts = ordered.unique_consecutive(return_counts=True)
    start = 0
    for index, count in zip(present.tolist(), counts.tolist(), strict=True):
        these = slice(start, start + count)
        # A window in float32, and all windows together in float64 on the host.
        sums[index - 1] += (chosen[:, these] @ share[these]).double().cpu().numpy()
        start += count


def _slice_axis(network: nn.Module) -> int | None:
    """Axis that slices are cut across for a 2D network."""
    inner = network.network if isinstance(network, CascadeNetwork) else network
    return inner.axis if isinstance(inner, SliceNetwork) else None
