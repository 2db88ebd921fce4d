"""Parameters, time and memory of a training step of every network, each in a process of its own, as a Markdown table.

    python benchmarks/networks.py                        # every network of the registry, one patch of 96^3
    python benchmarks/networks.py unet unetr --threads 2
    python benchmarks/networks.py --device cuda --steps 20

A step is the trainer's: forward, Dice and cross-entropy, backward, clipping, AdamW, on noise; bfloat16 on CUDA. Times
are medians after the first step. Memory is the peak resident size of the whole process on a CPU, with what Python and
PyTorch take; on CUDA the most that was allocated. Networks are as planned for that patch, with 1 channel and 3 outputs.
Diffusion networks learn by the error of their noise alone here.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

EDGE = 96


def arguments_of(name: str, edge: int) -> dict[str, Any]:
    """As the planner gives them for a patch that is a cube of this edge."""
    from ukbob_seg.preprocessing.network_plans import PlanningInput
    from ukbob_seg.preprocessing.requested_networks import PLANNERS

    patch, more = (edge, edge, edge), {"feature_size": 48} if name == "swin_unetr" else {}
    given = PlanningInput(patch, (1.0, 1.0, 1.0), 1e12, 1, 3, 1e3, patch_size=patch, batch_size=1, **more)
    return dict(PLANNERS[name](given)[0].arguments)


def measure(name: str, edge: int, device: str, steps: int, seconds: float) -> dict[str, float]:
    """Millions of parameters, median seconds of a step, peak GiB."""
    import torch

    from ukbob_seg.networks.diffusion import DiffusionNetwork
    from ukbob_seg.networks.registry import build_network
    from ukbob_seg.training.losses import SoftmaxDiceLoss, with_deep_supervision

    torch.manual_seed(0)
    network = build_network(name, 1, 3, arguments_of(name, edge)).to(device).train()
    optimizer, loss = torch.optim.AdamW(network.parameters()), with_deep_supervision(SoftmaxDiceLoss(255))
    image = torch.randn(1, 1, edge, edge, edge, device=device)
    labels = torch.randint(0, 3, (1, edge, edge, edge), dtype=torch.int32, device=device)
    clean = None
    if isinstance(network, DiffusionNetwork):  # it learns from the truth made noisy
        clean = 2.0 * torch.nn.functional.one_hot(labels.long(), 3).movedim(-1, 1) - 1
    on_gpu, times, began = device.startswith("cuda"), [], time.perf_counter()
    while len(times) < 2 or (len(times) <= steps and time.perf_counter() - began < seconds):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(image.device.type, torch.bfloat16, enabled=on_gpu):
            if clean is None:
                value = loss(network(image), labels)
            else:
                predicted = network(image, clean)
                value = (predicted.predicted - predicted.target).square().mean()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    return {"parameters": millions, "seconds": statistics.median(times[1:]), "gib": peak / 2**30}


def main() -> None:
    """Parse, measure one after the other, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="registry names (default: all)")
    parser.add_argument("--edge", type=int, default=EDGE, help="voxels of the patch along each axis")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=5, help="measured ones, at most")
    parser.add_argument("--seconds", type=float, default=120, help="after which no further step is begun")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        import torch

        if options.threads:
            torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.one, options.edge, options.device, options.steps, options.seconds)))
        return
    from ukbob_seg.networks.registry import NETWORKS

    print("| network | parameters (M) | step (s) | peak memory (GiB) |\n|---|---:|---:|---:|")
    for name in options.networks or NETWORKS:
        command = [sys.executable, __file__, "--one", name, "--device", options.device, "--edge", str(options.edge)]
        command += ["--steps", str(options.steps), "--seconds", str(options.seconds)]
        command += ["--threads", str(options.threads)] if options.threads else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"| `{name}` | failed, see above | | |", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"| `{name}` | {found['parameters']:.1f} | {found['seconds']:.2f} | {found['gib']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
