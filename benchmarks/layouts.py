"""One window through each network on a CPU, without gradients: float32 maps in the usual layout and with channels last.

    python benchmarks/layouts.py                  # every network but diffusion, one window of 64^3
    python benchmarks/layouts.py swin_unetr plain_conv_unet --edge 96 --threads 2

Networks as planned for such a patch (fresh weights, 1 channel, 3 outputs), called as prediction does, both ways in turn
in one process; medians, and the largest difference of the logits. Networks with group norms stay as they are.
"""

from __future__ import annotations

import argparse
import statistics
import time

from networks import arguments_of

from ukbob_seg.allocator import reuse_freed_memory

RUNS = 5


def measure(name: str, edge: int) -> str | None:
    """A row of the table; None for diffusion networks, which draw many times."""
    import torch

    from ukbob_seg.networks.channels_last import types_with_channels_last, with_channels_first
    from ukbob_seg.networks.convolution import quick_convolutions
    from ukbob_seg.networks.diffusion import DiffusionNetwork
    from ukbob_seg.networks.registry import build_network

    torch.manual_seed(0)
    network = build_network(name, 1, 3, arguments_of(name, edge)).eval()
    if isinstance(network, DiffusionNetwork):
        return None
    if torch.float32 not in types_with_channels_last(network):
        return f"| {name} | stays in the usual layout | | | |"
    window, cpu = torch.randn(1, 1, edge, edge, edge), torch.device("cpu")
    seconds: dict[bool, list[float]] = {False: [], True: []}  # by whether channels are last
    logits = {}
    for run in range(RUNS + 1):
        for is_last in seconds:
            started = time.perf_counter()
            with torch.no_grad(), quick_convolutions(cpu, network if is_last else None):
                outputs = network(window)
                logits[is_last] = with_channels_first(outputs if isinstance(outputs, torch.Tensor) else outputs[0])
            if run:  # the first warms up
                seconds[is_last].append(time.perf_counter() - started)
    usual, last = (statistics.median(values) for values in seconds.values())
    difference = float((logits[True] - logits[False]).abs().max() / logits[False].abs().max())
    return f"| {name} | {usual:.3f} s | {last:.3f} s | {usual / last:.2f} | {difference:.0e} |"


def main() -> None:
    """Parse, measure one after the other, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="registry names (default: all)")
    parser.add_argument("--edge", type=int, default=64, help="voxels of the window along each axis")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    reuse_freed_memory()
    import torch

    from ukbob_seg.networks.registry import NETWORKS

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print("| network | usual layout | channels last | ratio | largest relative difference |\n|---|---:|---:|---:|---:|")
    for name in options.networks or NETWORKS:
        if (row := measure(name, options.edge)) is not None:
            print(row, flush=True)


if __name__ == "__main__":
    main()
