"""Swin-UNETR of this package against MONAI's, in one process, in turn.

    python benchmarks/swin_unetr.py --feature-size 24 --patch 64 64 64 --repeats 3
    python benchmarks/swin_unetr.py --feature-size 48 --patch 96 96 96 --outputs 73 --train --device cuda

Both have the same weights, and their outputs are compared before anything is timed. Each round runs one after the
other, the order changing from round to round; printed are the medians and their ratio. With ``--train`` a step is
forward, backward and AdamW. On CUDA the peak memory of each is printed too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR
from torch import nn

from ukbob_seg.networks.swin_unetr import SwinUNETR


def seconds(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Wall seconds, and peak GiB allocated on CUDA (0 elsewhere)."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, 0.0
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) / 2**30


def make_run(network: nn.Module, image: torch.Tensor, train: bool) -> Callable[[], None]:
    """What is timed: a forward pass, or a whole training step."""

    def forward() -> None:
        with torch.no_grad():
            network(image)

    if not train:
        network.eval()
        return forward
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        network(image).square().mean().backward()
        optimizer.step()

    return step


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
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    device = torch.device(options.device)
    torch.manual_seed(0)
    size = options.feature_size
    monai = MonaiSwinUNETR(options.channels, options.outputs, feature_size=size).to(device).eval()
    ours = SwinUNETR(options.channels, options.outputs, feature_size=size, norm_affine=False).to(device).eval()
    ours.load_state_dict(monai.state_dict())
    image = torch.randn(options.batch, options.channels, *options.patch, device=device)
    with torch.no_grad():
        difference = (ours(image) - monai(image)).abs().max().item()
    print(f"largest difference of the outputs: {difference:.1e}")

    runs = {"ours": make_run(ours, image, options.train), "MONAI": make_run(monai, image, options.train)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 1):
        for name in runs if repeat % 2 else reversed(runs):
            taken, peak = seconds(runs[name], device)
            if repeat:  # the first round warms up
                times[name].append(taken)
                peaks[name].append(peak)
    for name in runs:
        memory = f"  {max(peaks[name]):6.2f} GiB" if device.type == "cuda" else ""
        print(f"{name:6s} {statistics.median(times[name]):8.3f} s{memory}")
    print(f"MONAI / ours: {statistics.median(times['MONAI']) / statistics.median(times['ours']):.2f}")


if __name__ == "__main__":
    main()
