"""Measure the peak memory of training steps and compare it with the planner's memory model.

    python benchmarks/memory_model.py            # CPU: peak resident size of a fresh process per configuration
    python benchmarks/memory_model.py --device cuda
    python benchmarks/memory_model.py --only residual_encoder_unet --steps 8
    python benchmarks/memory_model.py --only unetr

Each configuration runs the trainer's own steps (augmentation, forward, loss, backward, clipping, AdamW) in a process
of its own, as many as ``--steps`` and ``--seconds`` allow: the peak grows over the first few, since the allocator
cannot reuse everything. Printed are the measured peak, the model's prediction for that kind of device and their
ratio; the model is meant to err on the high side. On the CPU the number of threads hardly matters.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6)  # nnU-Net's


@dataclass(frozen=True)
class Configuration:
    """A training step; feature size of Swin-UNETR, spacing (z, y, x) of the others."""

    network: str
    patch: tuple[int, int, int]
    batch: int
    channels: int
    outputs: int
    features: int = 0
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __str__(self) -> str:
        size = f", feature size {self.features}" if self.features else ""
        return f"{'x'.join(map(str, self.patch))}, {self.batch}{size}, {self.channels}, {self.outputs}"


def _swin(patch: tuple[int, int, int], batch: int, features: int, channels: int, outputs: int) -> Configuration:
    return Configuration("swin_unetr", patch, batch, channels, outputs, features)


SWIN = [
    _swin((32, 32, 64), 1, 24, 1, 3),
    _swin((32, 64, 32), 2, 24, 1, 3),
    _swin((32, 64, 32), 7, 24, 1, 3),
    _swin((64, 64, 64), 1, 12, 1, 3),
    _swin((64, 64, 64), 1, 24, 1, 3),
    _swin((64, 64, 64), 1, 48, 1, 3),
    _swin((64, 64, 64), 2, 24, 1, 3),
    _swin((64, 64, 64), 1, 24, 1, 139),
    _swin((64, 64, 64), 1, 48, 4, 73),
    _swin((96, 96, 96), 1, 12, 1, 3),
    _swin((96, 96, 96), 1, 24, 1, 3),
    _swin((96, 96, 96), 1, 24, 4, 73),
    _swin((96, 96, 96), 1, 48, 1, 14),
]
CONV = [
    Configuration("plain_conv_unet", (40, 56, 40), 2, 1, 3),
    Configuration("plain_conv_unet", (64, 64, 64), 1, 1, 3),
    Configuration("plain_conv_unet", (64, 64, 64), 1, 1, 139),
    Configuration("plain_conv_unet", (96, 96, 96), 1, 1, 3),
    Configuration("plain_conv_unet", (24, 96, 96), 2, 2, 20, spacing_mm=(3.0, 1.0, 1.0)),
    Configuration("plain_conv_unet", (64, 96, 96), 2, 4, 20),
    Configuration("residual_encoder_unet", (64, 64, 64), 1, 1, 3),
    Configuration("residual_encoder_unet", (64, 64, 64), 2, 4, 20),
    Configuration("residual_encoder_unet", (96, 96, 96), 1, 1, 3),
]
BASELINE_PATCHES = (((64, 64, 64), 1, 1, 3), ((64, 64, 64), 2, 4, 20), ((96, 96, 96), 1, 1, 3))


def baselines() -> list[Configuration]:
    """Every network of baseline_plans.py, as published."""
    from ukbob_seg.preprocessing.baseline_plans import BASELINES

    return [Configuration(name, *sizes) for name in BASELINES for sizes in BASELINE_PATCHES]


def network_arguments(what: Configuration) -> dict[str, Any]:
    """As the planner would give them for exactly this patch; nnU-Net's blocks for the residual encoder."""
    from ukbob_seg.preprocessing.baseline_plans import BASELINES, plan_baseline
    from ukbob_seg.preprocessing.network_plans import PlanningInput, plan_plain_conv_unet

    if what.network == "swin_unetr":
        return {"feature_size": what.features}
    given = PlanningInput(
        what.patch, what.spacing_mm, 1e12, what.channels, what.outputs, 1e3, patch_size=what.patch, batch_size=1
    )
    if what.network in BASELINES:
        return dict(plan_baseline(what.network, given)[0].arguments)
    arguments = dict(plan_plain_conv_unet(given)[0].arguments)
    if what.network == "residual_encoder_unet":
        stages = len(arguments["strides"])
        arguments["n_conv_per_stage"] = list(RESIDUAL_BLOCKS[:stages])
        arguments["n_conv_per_stage_decoder"] = [1] * (stages - 1)
    return arguments


def measure(what: Configuration, device: str, steps: int, seconds: float) -> dict[str, Any]:
    """Peak GiB of this process after training steps, and how many it made."""
    import torch

    from ukbob_seg.networks.registry import build_network
    from ukbob_seg.training import trainer  # noqa: F401, with everything that a training process imports
    from ukbob_seg.training.augmentation import AugmentationSetup, Batch, augment, make_transforms
    from ukbob_seg.training.losses import SoftmaxDiceLoss, with_deep_supervision

    network = build_network(what.network, what.channels, what.outputs, network_arguments(what)).to(device)
    optimizer = torch.optim.AdamW(network.parameters())
    loss = with_deep_supervision(SoftmaxDiceLoss(255))
    transforms = make_transforms("ukbob", AugmentationSetup(what.patch, (1.0, 1.0, 1.0), (0, 1, 2), None, None))
    generator = torch.Generator().manual_seed(0)
    started, done = time.perf_counter(), 0
    while done < 2 or (done < steps and time.perf_counter() - started < seconds):
        image = torch.randn(what.batch, what.channels, *what.patch, generator=generator)
        labels = torch.randint(0, what.outputs, (what.batch, *what.patch), generator=generator, dtype=torch.int32)
        batch = augment(Batch(image.to(device), labels.to(device)), transforms, generator)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            result = network(batch.image)
        loss(result, batch.labels).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        done += 1
    if device == "cuda":
        return {"peak_gb": torch.cuda.max_memory_reserved() / 2**30, "steps": done}
    return {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "steps": done}


def predict(what: Configuration, device: str) -> float:
    """The model, GiB."""
    from ukbob_seg.preprocessing.baseline_plans import BASELINES, baseline_memory_gb
    from ukbob_seg.preprocessing.memory_model import plain_conv_unet_memory_gb, swin_unetr_memory_gb

    if what.network in BASELINES:
        return baseline_memory_gb(what.network, what.patch, what.batch, what.channels, what.outputs)
    if what.network == "swin_unetr":
        return swin_unetr_memory_gb(what.patch, what.batch, what.features, what.channels, what.outputs, device)
    arguments = network_arguments(what)
    blocks = arguments["n_conv_per_stage"] if what.network == "residual_encoder_unet" else None
    features, strides = arguments["features_per_stage"], arguments["strides"]
    return plain_conv_unet_memory_gb(what.patch, what.batch, strides, features, what.channels, what.outputs, blocks)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=8, help="at most; at least 2 are made")
    parser.add_argument("--seconds", type=float, default=60, help="after which no further step is begun")
    parser.add_argument("--only", metavar="NETWORK", help="a single network")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(options.one).items()}
        print(json.dumps(measure(Configuration(**given), options.device, options.steps, options.seconds)))
        return
    print(f"{'network':22s} {'patch, batch, channels, outputs':44s} {'steps':>5s} {'measured':>9s} {'model':>7s} ratio")
    for what in SWIN + CONV + baselines():
        if options.only not in (None, what.network):
            continue
        command = [sys.executable, __file__, "--device", options.device, "--one", json.dumps(asdict(what))]
        command += ["--steps", str(options.steps), "--seconds", str(options.seconds)]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        peak, predicted = found["peak_gb"], predict(what, options.device)
        line = (
            f"{what.network:22s} {what!s:44s} {found['steps']:5d} {peak:9.2f} {predicted:7.2f} {predicted / peak:5.2f}"
        )
        print(line, flush=True)


if __name__ == "__main__":
    main()
