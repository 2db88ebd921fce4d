"""Swin-UNETR through ``torch.compile``, as ``--compile`` calls it, against the network as it is.

    python benchmarks/compiled.py                                    # a small network in float64: is it the same?
    python benchmarks/compiled.py --channels-last                    # the same through the norm of large maps
    python benchmarks/compiled.py --dtype float32 --feature-size 24 --patch 64 64 64     # does it pay?

Prints how long the graphs take to make, the largest difference of the output and of every gradient (relative to the
largest value of each), and the medians of training steps (forward and backward), one of each in turn. In float64 no
rounding can hide an error; in float32 the kinks of leaky ReLUs make single gradients differ by up to a percent between
any two ways of computing them.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time

import torch
from torch import Tensor, nn

from ukbob_seg.networks.compiled import CompiledNetwork
from ukbob_seg.networks.instance_norm import InstanceNorm
from ukbob_seg.networks.swin_unetr import SwinUNETR


def step(network: nn.Module, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of the input and of all parameters, for a loss that tells voxels apart."""
    image = image.clone().requires_grad_()
    output = network(image)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    gradients = torch.autograd.grad((output * weights).sum(), [image, *network.parameters()])
    return output.detach(), list(gradients)


def seconds(network: nn.Module, image: Tensor) -> float:
    """Of one training step without the optimizer's."""
    if image.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(network, image)
    if image.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def main() -> None:
    """Compile, compare, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--feature-size", type=int, default=12)
    parser.add_argument("--patch", type=int, nargs=3, default=(32, 32, 64), metavar=("Z", "Y", "X"))
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--outputs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--use-checkpoint", action="store_true", help="recompute transformer blocks")
    parser.add_argument("--channels-last", action="store_true", help="as in large maps: float64 does not by itself")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    if options.channels_last:
        own_norm = InstanceNorm.forward
        InstanceNorm.forward = lambda self, x: own_norm(self, x.contiguous(memory_format=torch.channels_last_3d))
    torch.manual_seed(0)
    network = SwinUNETR(
        options.channels, options.outputs, feature_size=options.feature_size, use_checkpoint=options.use_checkpoint
    ).to(options.device, getattr(torch, options.dtype))
    image = torch.randn(1, options.channels, *options.patch).to(options.device, getattr(torch, options.dtype))
    compiled = CompiledNetwork(network)
    start = time.perf_counter()
    found, gradients = step(compiled, image)
    print(f"graphs and first step: {time.perf_counter() - start:.0f} s")
    if compiled.fell_back:
        raise SystemExit("the network could not be compiled: see the warning")
    expected, expected_gradients = step(network, image)
    print(f"largest difference of the output: {largest_difference(found, expected):.1e}")
    names = ["input", *dict(network.named_parameters())]
    pairs = zip(gradients, expected_gradients, strict=True)
    worst = sorted(((largest_difference(*pair), name) for name, pair in zip(names, pairs, strict=True)), reverse=True)
    print(f"gradients of {len(worst)} tensors: median {worst[len(worst) // 2][0]:.1e}, largest")
    for difference, name in worst[:3]:
        print(f"  {difference:.1e}  {name}")

    times: dict[str, list[float]] = {"compiled": [], "as it is": []}
    for repeat in range(options.repeats + 1):
        for name, way in zip(times, (compiled, network), strict=True):
            taken = seconds(way, image)
            if repeat:
                times[name].append(taken)
    for name, values in times.items():
        print(f"{name:9s} {statistics.median(values):8.3f} s")
    print(f"as it is / compiled: {statistics.median(times['as it is']) / statistics.median(times['compiled']):.2f}")


if __name__ == "__main__":
    main()
