"""One small window through a network on a CPU: convolutions as PyTorch dispatches them, and as this package does.

    python benchmarks/small_windows.py
    python benchmarks/small_windows.py --features 32 64 128 --window 40 56 40 --threads 2

Times a forward pass without gradients (prediction) and one with the gradients of the norm layers' parameters (an ETTA
step) of a PlainConvUNet, both ways in turn; prints medians and the largest differences. Needs
dynamic-network-architectures.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ukbob_seg.networks.convolution import quick_convolutions
from ukbob_seg.networks.registry import build_network

WAYS: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "PyTorch": lambda _: nullcontext(),
    "ukbob_seg": lambda network: quick_convolutions(torch.device("cpu"), network),
}


def make_network(features: list[int], norm: str) -> nn.Module:
    """As plans describe it, with fresh weights; only norm layers want gradients."""
    stages = len(features)
    torch.manual_seed(0)
    network = build_network("plain_conv_unet", 1, 3, {
        "features_per_stage": features, "strides": [[1] * 3, *([[2] * 3] * (stages - 1))], "norm": norm,
        "kernel_sizes": [[3] * 3] * stages, "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    })  # fmt: skip
    network.eval().requires_grad_(False)
    for layer in network.modules():
        if isinstance(layer, (nn.BatchNorm3d, nn.InstanceNorm3d)):
            layer.requires_grad_(True)
    return network


def forward(network: nn.Module, window: Tensor) -> list[Tensor]:
    """Logits, as in prediction."""
    with torch.no_grad():
        return [_logits(network(window))]


def step(network: nn.Module, window: Tensor) -> list[Tensor]:
    """Gradients, as in an ETTA step."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(_logits(network(window)).square().mean(), parameters))


def _logits(outputs: Tensor | list[Tensor]) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def main() -> None:
    """Parse, time in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--window", type=int, nargs=3, default=(40, 56, 40), metavar=("Z", "Y", "X"))
    parser.add_argument("--norm", default="instance", choices=("instance", "batch"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = make_network(options.features, options.norm)
    window = torch.randn(1, 1, *options.window)
    for name, work in (("forward", forward), ("with gradients", step)):
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        results: dict[str, list[Tensor]] = {}
        for run in range(options.runs + 1):
            for way, context in WAYS.items():
                start = time.perf_counter()
                with context(network):
                    results[way] = work(network, window)
                if run:  # the first warms up
                    seconds[way].append(time.perf_counter() - start)
        medians = {way: 1000 * statistics.median(values) for way, values in seconds.items()}
        theirs, ours = results.values()
        difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(theirs, ours, strict=True))
        print(
            f"{name:15} {medians['PyTorch']:8.1f} ms  {medians['ukbob_seg']:8.1f} ms  "
            f"ratio {medians['PyTorch'] / medians['ukbob_seg']:5.1f}  largest relative difference {difference:.1e}"
        )


if __name__ == "__main__":
    main()
