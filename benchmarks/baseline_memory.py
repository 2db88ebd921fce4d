"""Count what the planner needs to know of a network: its weights, and what a training step keeps for the backward pass.

    python benchmarks/baseline_memory.py                   # every network of ukbob_seg/preprocessing/baseline_plans.py
    python benchmarks/baseline_memory.py unet unetr        # some, also ones that are not in that table yet
    python benchmarks/baseline_memory.py --arguments '{"depth": 2}' medformer

Printed is a line of that table for each. Nothing is computed: shapes alone pass through the network on PyTorch's meta
device, where that fails zeros through a smaller patch on the CPU. Values that the forward pass keeps are fitted as
a V + b V^2 (V: voxels of the patch; b for attention among all tokens) to two patches, and so is what a further output
keeps. Whether the peak of a whole step agrees is what benchmarks/memory_model.py measures.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ukbob_seg.networks.diffusion import DiffusionNetwork, NoisePrediction
from ukbob_seg.networks.registry import NETWORKS, build_network
from ukbob_seg.preprocessing.baseline_plans import BASELINES

EDGES = (64, 96)  # of the two patches
CPU_EDGES = (32, 64)
OUTPUTS = (3, 8)
LEAST_SHARE = 0.02  # of b V^2 at the larger patch, to be in the table


def with_patch(name: str, arguments: Mapping[str, Any], patch: Sequence[int]) -> dict[str, Any]:
    """Arguments of a network for a patch (z, y, x)."""
    argument = NETWORKS[name].patch_argument
    return {**arguments, **({argument: list(patch)} if argument else {})}


def build(name: str, arguments: Mapping[str, Any], edge: int, outputs: int, device: str) -> nn.Module:
    """In training mode; constructors that read values are called on the CPU."""
    given = with_patch(name, arguments, (edge, edge, edge))
    try:
        with torch.device(device):
            return build_network(name, 1, outputs, given).train()
    except RuntimeError:
        return build_network(name, 1, outputs, given).to(device).train()


def count_kept(network: nn.Module, edge: int, device: str) -> tuple[float, float]:
    """float32 values that the backward pass needs besides weights and input, and values of all outputs."""
    image = torch.zeros(1, 1, edge, edge, edge, device=device)
    left_out = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers(), image)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            kept[storage._cdata] = storage
        return tensor

    # A diffusion network learns to denoise a map of its outputs, and keeps nothing of its drawing.
    clean = (image.new_zeros(1, network.outputs, edge, edge, edge),) if isinstance(network, DiffusionNetwork) else ()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(image, *clean)
    if isinstance(outputs, NoisePrediction):
        outputs = [outputs.predicted] if outputs.condition is None else [outputs.predicted, outputs.condition]
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    return sum(storage.nbytes() for storage in kept.values()) / 4, float(sum(output.numel() for output in outputs))


def counts(name: str, arguments: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one network."""
    try:
        return _counts(name, arguments, EDGES, "meta")
    except (RuntimeError, NotImplementedError):  # layers that read values, or have no shape function
        return _counts(name, arguments, CPU_EDGES, "cpu")


def _counts(name: str, arguments: Mapping[str, Any], edges: Sequence[int], device: str) -> dict[str, float]:
    small, large = (edge**3 for edge in edges)
    found = {}
    for edge, outputs in [(edges[0], OUTPUTS[0]), (edges[0], OUTPUTS[1]), (edges[1], OUTPUTS[0])]:
        network = build(name, arguments, edge, outputs, device)
        weights = sum(parameter.numel() for parameter in network.parameters())
        found[edge, outputs] = (weights, *count_kept(network, edge, device))
    first, wider, larger = found.values()
    quadratic = max(0.0, (larger[1] / large - first[1] / small) / (large - small))
    if quadratic * large < LEAST_SHARE * larger[1] / large:
        quadratic = 0.0
    per_output = (wider[1] - first[1]) / (OUTPUTS[1] - OUTPUTS[0]) / small
    linear = max(first[1] / small - quadratic * small, larger[1] / large - quadratic * large)
    return {
        "weights": larger[0],
        "weights_per_output": (wider[0] - first[0]) / (OUTPUTS[1] - OUTPUTS[0]),
        "kept": linear - OUTPUTS[0] * per_output,
        "kept_per_output": per_output,
        "kept_square": quadratic * 1e6,
        "outputs": larger[2] / large / OUTPUTS[0],
    }


def line(name: str, arguments: Mapping[str, Any]) -> str:
    """For the table of baseline_plans.py."""
    divisor = NETWORKS[name].divisor(with_patch(name, arguments, (96, 96, 96)))
    found = counts(name, arguments)
    parts = [str(divisor[0]), f"weights={found['weights'] / 1e6:.1f}e6", f"kept={math.ceil(found['kept'])}"]
    if len(set(divisor)) > 1:
        parts[0] = str(divisor)
    for key, digits, usual in (("kept_per_output", 1, 0.0), ("kept_square", 1, 0.0), ("outputs", 2, 1.0)):
        if round(found[key], digits) != usual:
            parts.append(f"{key}={found[key]:.{digits}f}")
    if found["weights_per_output"] > 1000:
        parts.append(f"weights_per_output={found['weights_per_output']:.0f}")
    if NETWORKS[name].patch_argument:
        parts.append(f'patch_argument="{NETWORKS[name].patch_argument}"')
    return f'    "{name}": Baseline({", ".join(parts)}),'


def main() -> None:
    """Parse, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(BASELINES), help="registry names (default: all)")
    parser.add_argument("--arguments", type=json.loads, default={}, help="JSON, beside the published ones")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.networks:
        published = BASELINES[name].arguments if name in BASELINES else {}
        print(line(name, {**published, **options.arguments}), flush=True)


if __name__ == "__main__":
    main()
