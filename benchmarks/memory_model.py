"""Measure the peak memory of training steps and compare it with the planner's memory model.

    python benchmarks/memory_model.py            # CPU: peak resident size of a fresh process per configuration
    python benchmarks/memory_model.py --device cuda

Each configuration runs two steps (forward, loss, backward, AdamW) in a process of its own. Printed are the measured
peak, the model's prediction and their ratio; the model is meant to err on the high side.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

SWIN = [
    # patch, batch, feature size, image channels, outputs
    ((64, 64, 64), 1, 12, 1, 3),
    ((64, 64, 64), 1, 24, 1, 3),
    ((64, 64, 64), 2, 24, 1, 3),
    ((32, 64, 32), 7, 24, 1, 3),
    ((64, 64, 64), 1, 48, 4, 73),
    ((96, 96, 96), 1, 24, 1, 3),
    ((64, 64, 64), 1, 24, 1, 139),
    ((96, 96, 96), 1, 24, 4, 73),
]
CONV = [
    ((40, 56, 40), 2, 1, 3),
    ((64, 64, 64), 2, 1, 3),
    ((96, 96, 96), 1, 1, 3),
    ((64, 64, 64), 1, 1, 139),
    ((64, 96, 96), 2, 4, 20),
]


def step(kind: str, configuration: list, device: str) -> float:
    """Peak GiB of two training steps in this process."""
    import torch

    from ukbob_seg.networks.registry import build_network
    from ukbob_seg.preprocessing.network_plans import PlanningInput, plan_plain_conv_unet
    from ukbob_seg.training.losses import SoftmaxDiceLoss, with_deep_supervision

    if kind == "swin_unetr":
        patch, batch, features, channels, outputs = configuration
        arguments = {"feature_size": features}
    else:
        patch, batch, channels, outputs = configuration
        given = PlanningInput(tuple(patch), (1.0, 1.0, 1.0), 1e12, channels, outputs, 1e3, patch_size=tuple(patch))
        arguments = plan_plain_conv_unet(given)[0].arguments
    network = build_network(kind, channels, outputs, arguments).to(device)
    optimizer = torch.optim.AdamW(network.parameters())
    loss = with_deep_supervision(SoftmaxDiceLoss(255))
    for _ in range(2):
        image = torch.randn(batch, channels, *patch, device=device)
        labels = torch.randint(0, outputs, (batch, *patch), device=device, dtype=torch.int32)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            result = network(image)
        loss(result, labels).backward()
        optimizer.step()
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def predict(kind: str, configuration: list) -> float:
    """The planner's prediction, GiB."""
    from ukbob_seg.preprocessing.memory_model import swin_unetr_memory_gb
    from ukbob_seg.preprocessing.network_plans import PlanningInput, plan_plain_conv_unet

    if kind == "swin_unetr":
        patch, batch, features, channels, outputs = configuration
        return swin_unetr_memory_gb(tuple(patch), batch, features, channels, outputs)
    patch, batch, channels, outputs = configuration
    given = PlanningInput(
        tuple(patch), (1.0, 1.0, 1.0), 1e12, channels, outputs, 1e3, patch_size=tuple(patch), batch_size=batch
    )
    return plan_plain_conv_unet(given)[0].estimated_memory_gb


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, configuration = json.loads(arguments.one)
        print(step(kind, configuration, arguments.device))
        return
    print(f"{'network':16s} {'configuration':44s} {'measured':>9s} {'model':>7s} {'model/measured':>15s}")
    for kind, rows in (("swin_unetr", SWIN), ("plain_conv_unet", CONV)):
        for row in rows:
            command = [sys.executable, __file__, "--device", arguments.device, "--one", json.dumps([kind, row])]
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
            measured, predicted = float(answer.stdout.splitlines()[-1]), predict(kind, list(row))
            print(f"{kind:16s} {row!s:44s} {measured:9.2f} {predicted:7.2f} {predicted / measured:15.2f}", flush=True)


if __name__ == "__main__":
    main()
