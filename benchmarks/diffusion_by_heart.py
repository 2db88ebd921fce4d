"""MedSegDiff learns two real cases by heart: Dice of what it draws, while it learns.

    python benchmarks/diffusion_by_heart.py --data DATA medsegdiff_v1
    python benchmarks/diffusion_by_heart.py --data DATA medsegdiff_v2 --target noise --label-scale 0.2 --steps 2400

``DATA`` holds Dataset004_Hippocampus. Both cases are cut to the 16^3 voxels around the middle of their labels
(background, anterior, posterior), the networks are small (8, 16 and 16 channels), T is 100, and five steps draw a map.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.networks.registry import build_network
from ukbob_seg.training.losses import SoftmaxDiceLoss
from ukbob_seg.training.noise_loss import NoiseLoss

CASES = ("hippocampus_003", "hippocampus_006")
EDGE, CLASSES = 16, 3
SMALL = {"features_per_stage": [8, 16, 16], "blocks_per_stage": 1, "steps": 100, "sampling_steps": 5}
OWN = {
    "medsegdiff_v1": {"image_size": [EDGE] * 3},
    "medsegdiff_v2": {"former_blocks": 1, "filter_blocks": 2, "filter_width": 4, "condition_interval": 1},
}


def main() -> None:
    """Learn, and print what is drawn now and then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=tuple(OWN))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--label-scale", type=float, default=1.0)
    parser.add_argument("--target", choices=("velocity", "noise"), default="velocity", help="what is predicted")
    options = parser.parse_args()
    image, labels = cases(options.data / "Dataset004_Hippocampus")
    torch.manual_seed(0)
    arguments = {
        **SMALL, **OWN[options.network], "label_scale": options.label_scale, "target": options.target,
    }  # fmt: skip
    network = build_network(options.network, 1, CLASSES, arguments).train()
    loss = NoiseLoss(SoftmaxDiceLoss(255, network.cross_entropy_weight), network, None)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps)
    clean = loss.clean(labels)
    for step in range(1, options.steps + 1):
        optimizer.zero_grad(set_to_none=True)
        value = loss(network(image, clean), labels)
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, options.steps // 8) == 0:
            anterior, posterior = dice(network, image, labels)
            print(f"step {step}: loss {value.item():.4f}, Dice {anterior:.3f} and {posterior:.3f}", flush=True)


def cases(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(2, 1, 16, 16, 16) z-scored over each whole scan, and labels (2, 16, 16, 16)."""
    images, labels = [], []
    for name in CASES:
        scan = read_image([folder / "imagesTr" / f"{name}_0000.nii.gz"])[0][0]
        truth = read_labels(folder / "labelsTr" / f"{name}.nii.gz")[0]
        middle = [round(float(places.mean())) for places in np.nonzero(truth)]
        firsts = [max(0, min(n - EDGE, m - EDGE // 2)) for m, n in zip(middle, truth.shape, strict=True)]
        part = tuple(slice(first, first + EDGE) for first in firsts)
        images.append(((scan - scan.mean()) / scan.std())[part])
        labels.append(truth[part])
    return torch.from_numpy(np.stack(images)[:, None].astype(np.float32)), torch.from_numpy(
        np.stack(labels).astype(np.int32)
    )


def dice(network: torch.nn.Module, image: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Of each class over both cases, as drawn from noise."""
    network.eval()
    with torch.no_grad():
        drawn = network(image).argmax(1)
    network.train()
    return [
        float(2 * ((drawn == k) & (labels == k)).sum() / ((drawn == k).sum() + (labels == k).sum()))
        for k in range(1, CLASSES)
    ]


if __name__ == "__main__":
    main()
