"""Swin-UNETR of this package against MONAI's, in one process, in turn.

    python benchmarks/swin_unetr.py --feature-size 24 --patch 64 64 64 --repeats 3
    python benchmarks/swin_unetr.py --feature-size 48 --patch 96 96 96 --channels 4 --outputs 73 --train --batch 2 \\
        --device cuda --precision bf16

Both have the same weights, and their outputs are compared in float32 before anything is timed. Each round runs one
after the other, the order changing from round to round; printed are the medians and their ratio. With ``--train`` a
step is forward, backward and AdamW. With ``--precision bf16`` both run under PyTorch's autocast. Peak memory is that
of a process of its own, for each network, that runs twice: what was allocated on CUDA, the resident set on a CPU
(Linux).

Operations per second are MONAI's multiplications and additions (as PyTorch counts them in one of its steps) over the
time of each, and as a share of what this machine reaches in a product of large square matrices of the same type.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ukbob_seg.networks.swin_unetr import SwinUNETR


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Wall seconds, until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def make_run(network: nn.Module, image: torch.Tensor, options: argparse.Namespace) -> Callable[[], None]:
    """What is timed: a forward pass, or a whole training step."""

    def autocast() -> torch.autocast:
        return torch.autocast(image.device.type, torch.bfloat16, enabled=options.precision == "bf16")

    def forward() -> None:
        with torch.no_grad(), autocast():
            network(image)

    if not options.train:
        network.eval()
        return forward
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            outputs = network(image)
        outputs.float().square().mean().backward()
        optimizer.step()

    return step


def build(name: str, options: argparse.Namespace) -> nn.Module:
    """One of the two networks, in evaluation mode."""
    sizes = (options.channels, options.outputs)
    if name == "MONAI":
        return MonaiSwinUNETR(*sizes, feature_size=options.feature_size).to(options.device).eval()
    return SwinUNETR(*sizes, feature_size=options.feature_size, norm_affine=False).to(options.device).eval()


def alone(name: str, options: argparse.Namespace) -> None:
    """Run a network twice, print the peak in GiB: allocated on CUDA, or of this process's resident set."""
    image = torch.randn(options.batch, options.channels, *options.patch, device=options.device)
    run = make_run(build(name, options), image, options)
    for _ in range(2):
        run()
    if image.is_cuda:
        print(torch.cuda.max_memory_allocated(image.device) / 2**30)
        return
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 2**20)


def peak_of_a_process(name: str) -> float:
    """GiB, by this script in another process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--alone", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def count_operations(run: Callable[[], None]) -> float:
    """Multiplications and additions of one call, in units of 10^12."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def matrix_rate(device: torch.device, precision: str) -> float:
    """10^12 operations a second in the best of some products of two large square matrices."""
    edge = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    return max(2 * edge**3 / 1e12 / seconds(lambda: torch.mm(a, b), device) for _ in range(8))


def main() -> None:
    """Parse, compare, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--feature-size", type=int, default=24)
    parser.add_argument("--patch", type=int, nargs=3, default=(64, 64, 64), metavar=("Z", "Y", "X"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--outputs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train", action="store_true", help="time training steps instead of forward passes")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alone", choices=("ours", "MONAI"), help=argparse.SUPPRESS)
    options = parser.parse_args()

    device = torch.device(options.device)
    torch.manual_seed(0)
    if options.alone:
        alone(options.alone, options)
        return
    monai, ours = build("MONAI", options), build("ours", options)
    ours.load_state_dict(monai.state_dict())
    image = torch.randn(options.batch, options.channels, *options.patch, device=device)
    with torch.no_grad():
        difference = (ours(image) - monai(image)).abs().max().item()
    print(f"largest difference of the outputs: {difference:.1e}")

    runs = {"ours": make_run(ours, image, options), "MONAI": make_run(monai, image, options)}
    operations, best = count_operations(runs["MONAI"]), matrix_rate(device, options.precision)
    print(f"{operations:.3f} x 10^12 operations; products of matrices: {best:.2f} x 10^12 a second")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 1):
        for name in runs if repeat % 2 else reversed(runs):
            taken = seconds(runs[name], device)
            if repeat:  # the first round warms up
                times[name].append(taken)
    for name, taken_s in times.items():
        rate = operations / statistics.median(taken_s)
        print(
            f"{name:6s} {statistics.median(taken_s):8.3f} s  {peak_of_a_process(name):6.2f} GiB  "
            f"{rate:7.2f} x 10^12 operations a second, {rate / best:.0%}"
        )
    print(f"MONAI / ours: {statistics.median(times['MONAI']) / statistics.median(times['ours']):.2f}")


if __name__ == "__main__":
    main()
