"""Options and output that the planning commands share."""

from __future__ import annotations

import argparse
import subprocess
import textwrap
from typing import TYPE_CHECKING

from ukbob_seg.parallel import total_memory_gb

if TYPE_CHECKING:
    from ukbob_seg.preprocessing.planner import PlanOptions
    from ukbob_seg.preprocessing.plans import Plans

CPU_DEFAULT_GB = 5.0


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Add -d."""
    parser.add_argument("-d", "--dataset", required=True, metavar="ID", help="dataset id (4) or DatasetXXX_Name")


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add what a user may ask of the planner."""
    group = parser.add_argument_group("planning")
    group.add_argument(
        "--preset",
        choices=("default", "ukbob", "nnunet"),
        default="default",
        help="ukbob: the paper's exact recipe (isotropic, patch 96^3, feature size 48, batch 8, intensities in "
        "[0, 1]); nnunet: what nnU-Net's planners decide, for plain_conv_unet and resenc_unet_m, _l and _xl",
    )
    group.add_argument(
        "--memory-gb",
        type=float,
        metavar="GB",
        help="memory for a training step (default: 90%% of the GPU; on a CPU half of the memory, at most 5; with "
        "preset nnunet what nnU-Net's planners aim at)",
    )
    group.add_argument(
        "--networks", nargs="+", default=[], metavar="NAME",
        help="plan these too, beside swin_unetr and plain_conv_unet: unet, unetr, resenc_unet_m, ... (ukbob_train "
        "plans by itself what its --network names)",
    )  # fmt: skip
    group.add_argument("--spacing", type=float, nargs=3, metavar=("Z", "Y", "X"), help="target spacing in mm")
    group.add_argument("--patch-size", type=int, nargs=3, metavar=("Z", "Y", "X"), help="patch in voxels")
    group.add_argument("--batch-size", type=int, metavar="N", help="patches per training step")
    group.add_argument("--feature-size", type=int, metavar="N", help="Swin-UNETR feature size (a multiple of 12)")
    group.add_argument("--anti-alias", action="store_true", help="blur images along axes that shrink (as skimage does)")
    group.add_argument(
        "--coarse-order",
        type=int,
        choices=(0, 1),
        default=0,
        help="images across an axis over 3 times as coarse: 0 nearest voxels, 1 linear (default: 0)",
    )


def given_plan_options(arguments: argparse.Namespace) -> list[str]:
    """The planning options that a command line gives, as they are spelt there."""
    parser = argparse.ArgumentParser()
    add_plan_options(parser)
    return [
        action.option_strings[0]
        for action in parser._actions
        if action.dest != "help" and getattr(arguments, action.dest) != action.default
    ]


def plan_options(arguments: argparse.Namespace) -> PlanOptions:
    """Options from parsed arguments; the memory budget is what the device has unless given.

    nnU-Net's planners aim at a memory of their own, whatever the device.
    """
    from ukbob_seg.preprocessing.planner import PlanOptions

    def triple(values: list[float] | None) -> tuple | None:
        return None if values is None else tuple(values)

    ask_device = arguments.memory_gb is None and arguments.preset != "nnunet"
    return PlanOptions(
        memory_gb=default_memory_gb() if ask_device else arguments.memory_gb,
        preset=arguments.preset,
        spacing_mm=triple(arguments.spacing),
        patch_size=triple(arguments.patch_size),
        batch_size=arguments.batch_size,
        feature_size=arguments.feature_size,
        anti_alias=arguments.anti_alias,
        coarse_order=arguments.coarse_order,
        networks=tuple(arguments.networks),
    )


def default_memory_gb() -> float:
    """Memory of the training device: most of the first GPU, or a modest share of the main memory."""
    gpu = gpu_memory_gb()
    return round(0.9 * gpu if gpu else max(1.0, min(CPU_DEFAULT_GB, total_memory_gb() / 2)), 1)


def gpu_memory_gb() -> float | None:
    """Memory of the first NVIDIA GPU, asked of its driver because importing torch takes seconds; None without one."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        return float(answer.stdout.splitlines()[0]) / 1024
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def describe(plans: Plans) -> str:
    """One screen: what was decided, and why."""
    budget = "" if plans.preset == "nnunet" else f", {plans.memory_gb:g} GB per training step"
    lines = [f"{plans.dataset} (preset {plans.preset}{budget})"]
    for reason in plans.reasons:
        lines.extend(textwrap.wrap(reason, 100, initial_indent="  - ", subsequent_indent="    "))
    return "\n".join(lines)
