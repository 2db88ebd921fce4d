"""Record what nnU-Net v2's own planners decide for synthetic fingerprints; the test of --preset nnunet compares.

    nnenv/bin/python benchmarks/nnunet_planner.py --output tests/preprocessing/nnunet_decisions.json

Run it in an environment that has nnunetv2 (it needs nothing of this package). Every dataset below becomes a
dataset.json and a dataset_fingerprint.json in temporary folders; nnU-Net's classes plan it unchanged, and what they
decide is written down with the version. Takes a few minutes, because nnU-Net builds the networks whose size it asks.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

PLANNERS = {
    "plain_conv_unet": "ExperimentPlanner",
    "resenc_unet_m": "nnUNetPlannerResEncM",
    "resenc_unet_l": "nnUNetPlannerResEncL",
    "resenc_unet_xl": "nnUNetPlannerResEncXL",
}
STATISTICS = {
    "mean": 20.0, "median": 18.0, "std": 40.0, "min": -1000.0, "max": 900.0,
    "percentile_00_5": -100.0, "percentile_99_5": 300.0,
}  # fmt: skip


def group(count: int, shape: tuple, spacing: tuple, cropped: tuple | None = None) -> dict[str, Any]:
    """Equal cases; axes (z, y, x)."""
    return {"count": count, "shape": list(shape), "spacing": list(spacing), "cropped": list(cropped or shape)}


def varied(seed: int, count: int, shape: tuple, spacing: tuple, spread: float = 0.2, kept: float = 1.0) -> list:
    """Cases that differ around a shape and a spacing; cropping keeps the share ``kept`` of each edge."""
    generator = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        size = [max(1, int(n * generator.uniform(1 - spread, 1 + spread))) for n in shape]
        mm = [round(float(s * generator.uniform(1 - spread, 1 + spread)), 4) for s in spacing]
        groups.append(group(1, tuple(size), tuple(mm), tuple(max(1, int(n * kept)) for n in size)))
    return groups


def datasets() -> dict[str, dict[str, Any]]:
    """Synthetic datasets: groups of cases, channels, number of foreground labels, further settings."""

    def dataset(groups: list, channels: tuple = ("MRI",), labels: int = 2, **more: Any) -> dict[str, Any]:
        return {"groups": groups, "channels": list(channels), "labels": labels, **more}

    return {
        "ct_isotropic": dataset([group(50, (300, 512, 512), (1.0, 0.8, 0.8))], ("CT",), 13),
        "ct_varied": dataset(varied(1, 31, (250, 512, 512), (2.0, 0.75, 0.75)), ("CT",), 4),
        "ct_thick": dataset(varied(2, 40, (60, 512, 512), (5.0, 0.78, 0.78)), ("CT",), 1),
        "ct_total": dataset(varied(3, 25, (280, 260, 260), (1.5, 1.5, 1.5), 0.3), ("CT",), 117),
        "prostate": dataset([group(32, (20, 320, 320), (3.6, 0.6, 0.6))], ("T2", "ADC"), 2),
        "cardiac": dataset(varied(4, 100, (9, 256, 216), (10.0, 1.56, 1.56), 0.25), labels=3),
        "hippocampus": dataset(varied(5, 60, (36, 50, 35), (1.0, 1.0, 1.0), 0.15)),
        "tiny": dataset([group(8, (14, 17, 13), (2.0, 2.0, 2.0))]),
        "brats": dataset(
            [group(30, (155, 240, 240), (1.0, 1.0, 1.0), (140, 172, 137))], ("T1", "T1ce", "T2", "Flair"), 3
        ),
        "brats_regions": dataset(
            [group(30, (155, 240, 240), (1.0, 1.0, 1.0), (150, 220, 220))],
            ("T1", "T1ce", "T2", "Flair"),
            3,
            regions=True,
        ),
        "mixed_spacing": dataset(
            [
                group(10, (40, 400, 400), (4.0, 0.7, 0.7)),
                group(11, (120, 256, 256), (1.2, 1.1, 1.1)),
                group(6, (25, 512, 512), (7.0, 0.45, 0.45)),
            ],
            ("CT", "noNorm"),
            5,
        ),
        "coarse_axis_fine_cases": dataset(
            [group(9, (20, 300, 300), (6.0, 1.0, 1.0)), group(2, (160, 300, 300), (0.8, 1.0, 1.0))]
        ),
        "few_slices": dataset(varied(6, 12, (3, 400, 380), (8.0, 0.9, 0.9), 0.3)),
        "single_slices": dataset([group(200, (1, 512, 640), (999.0, 1.0, 1.0))], ("rgb_to_0_1",) * 3, 4),
        "mostly_single_slices": dataset(
            [group(5, (1, 512, 512), (10.0, 0.5, 0.5)), group(4, (6, 512, 512), (10.0, 0.5, 0.5))]
        ),
        "ukb": dataset([group(40, (501, 160, 224), (2.23, 2.23, 2.23))], ("water", "fat", "in", "out"), 72),
        "ukb_cropped": dataset(
            varied(7, 30, (501, 160, 224), (3.0, 2.232, 2.232), 0.05, 0.85), ("water", "fat", "in", "out"), 72
        ),
        "one_case": dataset([group(1, (100, 130, 90), (1.0, 0.9, 1.3))]),
        "thousand_cases": dataset(
            [group(500, (90, 110, 95), (1.0, 1.0, 1.0)), group(501, (101, 120, 88), (1.1, 0.9, 1.0))]
        ),
        "coarse_second": dataset(varied(8, 21, (320, 24, 300), (0.7, 4.4, 0.7), 0.15), ("zscore",), 3),
        "coarse_last": dataset(varied(9, 21, (260, 280, 70), (0.9, 0.8, 2.5), 0.15), ("rescale_to_0_1",), 3),
        "two_coarse_axes": dataset(varied(10, 14, (60, 62, 400), (3.3, 3.2, 0.6), 0.1), ("CT", "PET"), 2),
        "half_voxels": dataset(
            [group(5, (149, 200, 171), (1.0, 1.0, 1.0)), group(5, (156, 211, 180), (1.0, 1.0, 1.0))]
        ),
        "microscopy": dataset([group(3, (1200, 1400, 1300), (0.01, 0.01, 0.01))], labels=1),
        "long": dataset([group(17, (1800, 60, 64), (0.7, 0.7, 0.7))], ("CT",), 1),
        "ignore_label": dataset(varied(11, 20, (128, 160, 112), (1.0, 1.0, 1.0)), labels=6, ignore=True),
        "less_memory": dataset(varied(2, 40, (60, 512, 512), (5.0, 0.78, 0.78)), ("CT",), 4, memory_gb=4.0),
        "more_memory": dataset(varied(1, 31, (250, 512, 512), (2.0, 0.75, 0.75)), ("CT",), 4, memory_gb=14.5),
        "asked_spacing": dataset(varied(3, 25, (280, 260, 260), (1.5, 1.5, 1.5)), ("CT",), 4, spacing=[1.0, 3.5, 1.2]),
    }


def label_table(dataset: dict[str, Any]) -> dict[str, Any]:
    """``labels`` of dataset.json."""
    values = range(1, dataset["labels"] + 1)
    table: dict[str, Any] = {"background": 0}
    table |= {f"label {v}": list(values[v - 1 :]) if dataset.get("regions") else v for v in values}
    if dataset.get("ignore"):
        table["ignore"] = dataset["labels"] + 1
    return table


def write_inputs(dataset: dict[str, Any], name: str, raw: Path, preprocessed: Path) -> None:
    """dataset.json and dataset_fingerprint.json as nnU-Net's fingerprint extraction leaves them."""
    cases = [entry for entry in dataset["groups"] for _ in range(entry["count"])]
    content = {
        "channel_names": {str(i): channel for i, channel in enumerate(dataset["channels"])},
        "labels": label_table(dataset),
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
        "dataset": {"case": {"images": ["case_0000.nii.gz"], "label": "case.nii.gz"}},  # never opened
    }
    if dataset.get("regions"):
        content["regions_class_order"] = list(range(1, dataset["labels"] + 1))
    kept = [np.prod(entry["cropped"]) / np.prod(entry["shape"]) for entry in cases]
    fingerprint = {
        "spacings": [entry["spacing"] for entry in cases],
        "shapes_after_crop": [entry["cropped"] for entry in cases],
        "foreground_intensity_properties_per_channel": {str(i): STATISTICS for i in range(len(dataset["channels"]))},
        "median_relative_size_after_cropping": float(np.median(kept, 0)),
    }
    for folder, file, text in (
        (raw / name, "dataset.json", content),
        (preprocessed / name, "dataset_fingerprint.json", fingerprint),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(text))


def decide(planner_class: type, dataset: dict[str, Any], name: str) -> dict[str, Any]:
    """Plan with nnU-Net and keep the decisions, in nnU-Net's order of axes."""
    options: dict[str, Any] = {}
    if "memory_gb" in dataset:
        options["gpu_memory_target_in_gb"] = dataset["memory_gb"]
    if "spacing" in dataset:
        options["overwrite_target_spacing"] = dataset["spacing"]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plans = planner_class(name, **options).plan_experiment()
    found: dict[str, Any] = {"transpose": plans["transpose_forward"], "configurations": {}}
    for configuration, plan in plans["configurations"].items():
        if "inherits_from" in plan:
            found["configurations"][configuration] = plan
            continue
        network = plan["architecture"]["arch_kwargs"]
        found["configurations"][configuration] = {
            "spacing": plan["spacing"],
            "median_shape": plan["median_image_size_in_voxels"],
            "patch": plan["patch_size"],
            "batch": plan["batch_size"],
            "features": network["features_per_stage"],
            "strides": network["strides"],
            "kernels": network["kernel_sizes"],
            "encoder": network.get("n_conv_per_stage", network.get("n_blocks_per_stage")),
            "decoder": network["n_conv_per_stage_decoder"],
        }
        found["normalization"] = [plan["normalization_schemes"], plan["use_mask_for_norm"]]
    return found


def plain(value: Any) -> Any:
    """Numbers of numpy as Python's."""
    return value.item() if isinstance(value, np.generic) else value.tolist()


def compact(content: Any) -> str:
    """JSON without spaces."""
    return json.dumps(content, default=plain, separators=(",", ":"))


def main() -> None:
    """Plan every dataset with every planner."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="decisions, .json")
    arguments = parser.parse_args()
    planners = "nnunetv2.experiment_planning.experiment_planners"
    with tempfile.TemporaryDirectory() as temporary:
        raw, preprocessed = Path(temporary) / "raw", Path(temporary) / "preprocessed"
        os.environ |= {"nnUNet_raw": str(raw), "nnUNet_preprocessed": str(preprocessed), "nnUNet_results": temporary}
        standard = importlib.import_module(f"{planners}.default_experiment_planner")
        residual = importlib.import_module(f"{planners}.residual_unets.residual_encoder_unet_planners")
        content: dict[str, Any] = {
            "made_by": "benchmarks/nnunet_planner.py",
            "nnunetv2": importlib.metadata.version("nnunetv2"),
            "dynamic_network_architectures": importlib.metadata.version("dynamic_network_architectures"),
            "datasets": {},
        }
        for number, (key, dataset) in enumerate(datasets().items(), start=1):
            name = f"Dataset{number:03d}_{key}"
            write_inputs(dataset, name, raw, preprocessed)
            decisions = {}
            for network, class_name in PLANNERS.items():
                planner_class = getattr(standard, class_name, None) or getattr(residual, class_name)
                decisions[network] = decide(planner_class, dataset, name)
            content["datasets"][key] = {**dataset, "label_table": label_table(dataset), "decisions": decisions}
            print(f"{key}: {', '.join(decisions['plain_conv_unet']['configurations'])}", file=sys.stderr, flush=True)
    # One line per dataset: small, and a change shows where it is.
    lines = [f"{json.dumps(key)}:{compact(entry)}" for key, entry in content.pop("datasets").items()]
    text = compact(content)[:-1] + ',"datasets":{\n' + ",\n".join(lines) + "\n}}\n"
    arguments.output.write_text(text, encoding="utf-8")
    print(f"{len(text)} bytes -> {arguments.output}")


if __name__ == "__main__":
    main()
