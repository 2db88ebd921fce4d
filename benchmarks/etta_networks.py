"""The networks of the ETTA study: two small U-Nets and a small Swin-BOB, trained on the hippocampus cases.

    python benchmarks/etta_networks.py --dataset DIR/Dataset004_Hippocampus --work DIR
    python benchmarks/etta_networks.py --dataset DIR/Dataset004_Hippocampus --work DIR --only swin_0

Seven runs on all training cases, nothing is chosen by test cases: PlainConvUNets of three stages (8, 16, 32 features)
with BatchNorm and with InstanceNorm, from three seeds each, and Swin-BOB of feature size 12 from one. Recipe of all:
batch 2, AdamW, peak rate 5e-3 (U-Nets) or 1e-3 (Swin-BOB) in one cycle, the paper's augmentation without flips.
Finished runs are not done again.
Needs dynamic-network-architectures.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

from ukbob_seg import plan_and_preprocess, train
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.preprocessing.planner import PlanOptions
from ukbob_seg.training.config import TrainingConfig
from ukbob_seg.training.trainer import RunOptions

FEATURES = [8, 16, 32]
CONV_PATCH = (40, 56, 40)
SWIN_PATCH = (32, 64, 32)


@dataclass(frozen=True)
class StudyNetwork:
    """One trained network of the study.

    Attributes:
        kind: ``batch``, ``instance`` or ``swin``.
        seed: of its training.
    """

    kind: str
    seed: int

    @property
    def name(self) -> str:
        """Such as ``batch_0``."""
        return f"{self.kind}_{self.seed}"

    @property
    def registry_name(self) -> str:
        """Of the network."""
        return "swin_unetr" if self.kind == "swin" else "plain_conv_unet"

    @property
    def steps(self) -> int:
        """Of training."""
        return 600

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        return 1e-3 if self.kind == "swin" else 5e-3

    def model_folder(self, work: Path, dataset: str) -> Path:
        """Where it is trained to."""
        return work / "models" / self.name / dataset / f"3d_fullres__{self.registry_name}"


NETWORKS = [*(StudyNetwork(kind, seed) for kind in ("batch", "instance") for seed in range(3)), StudyNetwork("swin", 0)]


def prepare(roots: Roots, dataset: str) -> None:
    """Plan and preprocess once."""
    if not (roots.preprocessed / dataset / "finished").is_file():
        plan_and_preprocess(dataset, roots, PlanOptions(feature_size=12, patch_size=SWIN_PATCH, batch_size=2))
        (roots.preprocessed / dataset / "finished").touch()


def make_small(plans_file: Path, network: StudyNetwork) -> None:
    """Edit the plans as a user may: three stages and the norm of this network."""
    plans = json.loads(plans_file.read_text())
    planned = plans["configurations"]["3d_fullres"]["networks"][network.registry_name]
    planned.update(patch_size=list(SWIN_PATCH if network.kind == "swin" else CONV_PATCH), batch_size=2)
    if network.kind != "swin":
        stages, arguments = len(FEATURES), planned["arguments"]
        for name in ("strides", "kernel_sizes", "n_conv_per_stage"):
            arguments[name] = arguments[name][:stages]
        arguments.update(features_per_stage=FEATURES, n_conv_per_stage_decoder=[2] * (stages - 1), norm=network.kind)
    plans_file.write_text(json.dumps(plans, indent=2))


def train_network(network: StudyNetwork, work: Path, roots: Roots, dataset: str, device: str) -> Path:
    """Train, unless that was done; returns the model folder."""
    folder = network.model_folder(work, dataset)
    fold = folder / "fold_all"
    if (fold / "checkpoint_final.pt").is_file():
        return folder
    make_small(roots.preprocessed / dataset / "plans.json", network)
    config = TrainingConfig(
        epochs=10, iterations_per_epoch=network.steps // 10, learning_rate=network.rate, schedule="one_cycle",
        mirror_axes=(), validation_every=10, validation_cases=1, seed=network.seed,
    )  # fmt: skip
    options = RunOptions(device=device, resume=(fold / "checkpoint_latest.pt").is_file())
    own = Roots(roots.raw, roots.preprocessed, work / "models" / network.name)
    train(dataset, "all", own, config, options, network=network.registry_name)
    return folder


def main() -> None:
    """Parse, prepare, train one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="raw hippocampus dataset")
    parser.add_argument("--work", type=Path, required=True, help="everything is written here")
    parser.add_argument("--only", nargs="+", choices=[network.name for network in NETWORKS])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    roots = Roots(options.dataset.parent, options.work / "preprocessed", options.work / "models")
    prepare(roots, options.dataset.name)
    for network in NETWORKS:
        if options.only is None or network.name in options.only:
            start = time.perf_counter()
            folder = train_network(network, options.work, roots, options.dataset.name, options.device)
            print(f"{network.name}: {folder} ({(time.perf_counter() - start) / 60:.1f} min)", flush=True)


if __name__ == "__main__":
    main()
