"""``ukbob_predict`` against ``nnUNetv2_predict``: the same network, weights and images, command against command.

    python benchmarks/predict_end_to_end.py --nnunet NNENV/bin --model MODEL_FOLDER --fold all --images DIR --cases 20
    python benchmarks/predict_end_to_end.py --nnunet NNENV/bin --untrained DATASET --images DIR    # random weights

``--model`` is a folder of a trained plain_conv_unet (such as ``etta_networks.py`` makes); its weights are written into
an nnU-Net model folder as well, since both packages build the same class. ``--untrained`` plans a raw dataset and takes
fresh weights. ``NNENV`` is an environment with nnunetv2, of which nothing is needed here.

Both run as their users start them, with interpreter start and model loading, without mirroring and with half a patch as
the step; in turn, ``--runs`` times each. Printed are the medians of seconds and of the peak memory of all processes of
a command (proportional set size, sampled), and how far the label maps agree.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from ukbob_seg import plan_and_preprocess
from ukbob_seg.dataset.image_io import read_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.networks.registry import build_network
from ukbob_seg.preprocessing.intensity_field import UsualField
from ukbob_seg.preprocessing.planner import PlanOptions
from ukbob_seg.training.checkpoint import NAMES, ModelDescription, read_checkpoint, save_checkpoint

NORMS = {"instance": "instancenorm.InstanceNorm3d", "batch": "batchnorm.BatchNorm3d"}


def untrained(dataset: Path, work: Path, name: str = "plain_conv_unet") -> Path:
    """A model folder of a network with fresh weights, planned as ``ukbob_plan_and_preprocess`` does."""
    roots = Roots(dataset.parent, work / "preprocessed", work / "results")
    plan_and_preprocess(dataset.name, roots, PlanOptions())
    plans = json.loads((roots.preprocessed / dataset.name / "plans.json").read_text())
    content = json.loads((dataset / "dataset.json").read_text())
    arguments = plans["configurations"]["3d_fullres"]["networks"][name]["arguments"]
    spec = DatasetSpec.from_json(content, dataset.name)
    torch.manual_seed(0)
    network = build_network(name, len(spec.channel_names), spec.labels.num_outputs, arguments)
    description = ModelDescription(
        name, arguments, "3d_fullres", "all", "softmax", (0, 1, 2), plans, content,
        tuple(UsualField() for _ in spec.channel_names),
    )  # fmt: skip
    fold = roots.results / dataset.name / f"3d_fullres__{name}" / "fold_all"
    fold.mkdir(parents=True)
    save_checkpoint(fold / NAMES["final"], description, network.state_dict())
    return fold.parent


def nnunet_plans(description: ModelDescription) -> dict[str, Any]:
    """What nnU-Net would have written in its plans.json for this model."""
    plans = description.parsed_plans()
    configuration = plans.configuration(description.configuration)
    arguments = dict(description.arguments)
    stages = len(arguments["features_per_stage"])
    image = {"is_seg": False, "order": configuration.image_order, "order_z": 0, "force_separate_z": None}
    resampling = {"data": image, "seg": {**image, "is_seg": True, "order": 1}, "probabilities": {**image, "order": 1}}
    own = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(configuration.network(description.network).patch_size),
        "median_image_size_in_voxels": list(configuration.median_shape),
        "spacing": list(configuration.spacing_mm),
        "normalization_schemes": ["ZScoreNormalization"] * len(plans.normalization),
        "use_mask_for_norm": [scheme.mask_nonzero for scheme in plans.normalization],
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                **{key: arguments[key] for key in ("features_per_stage", "strides", "kernel_sizes")},
                **{key: arguments[key] for key in ("n_conv_per_stage", "n_conv_per_stage_decoder")},
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.{NORMS[arguments['norm']]}",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    for name, values in resampling.items():
        own[f"resampling_fn_{name}"] = "resample_data_or_seg_to_shape"
        own[f"resampling_fn_{name}_kwargs"] = values
    statistic = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
    return {
        "dataset_name": plans.dataset,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(configuration.spacing_mm),
        "original_median_shape_after_transp": list(configuration.median_shape),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": own},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(n): statistic for n in range(len(plans.normalization))},
    }


def nnunet_folder(checkpoint: Path, target: Path) -> Path:
    """The same model as nnU-Net keeps it."""
    description, content = read_checkpoint(checkpoint)
    if any(scheme.scheme != "zscore" for scheme in description.parsed_plans().normalization):
        raise SystemExit("this benchmark knows z-scored channels only")
    fold = target / "fold_all"
    fold.mkdir(parents=True)
    (target / "plans.json").write_text(json.dumps(nnunet_plans(description)))
    (target / "dataset.json").write_text(json.dumps({"numTraining": 1, **description.dataset}))
    torch.save(
        {
            "network_weights": content["network_weights"],
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": "3d_fullres"},
            "inference_allowed_mirroring_axes": (0, 1, 2),
        },
        fold / "checkpoint_final.pth",
    )
    return target


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds and peak GiB of a command and its children."""
    start, peak, ended = time.perf_counter(), 0, threading.Event()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def watch() -> None:
        nonlocal peak
        root = psutil.Process(process.pid)
        while not ended.wait(0.2):
            total = 0
            try:
                members = [root, *root.children(recursive=True)]
            except psutil.Error:  # it ended meanwhile
                return
            for member in members:
                with contextlib.suppress(psutil.Error):
                    total += member.memory_full_info().pss
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{output[-3000:]}")
    return seconds, peak / 2**30


def agreement(one: Path, other: Path) -> float:
    """Least share of equal voxels over the cases."""
    shares = []
    for path in sorted(one.glob("*.nii.gz")):
        shares.append(float((read_labels(path)[0] == read_labels(other / path.name)[0]).mean()))
    return min(shares)


def main() -> None:
    """Parse, prepare both models, run in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet", type=Path, required=True, help="bin folder of an environment with nnunetv2")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="our model folder")
    model.add_argument("--untrained", type=Path, help="raw dataset to plan; fresh weights")
    parser.add_argument("--fold", default="all")
    parser.add_argument("--images", type=Path, required=True, help="folder of NIfTI images, one channel")
    parser.add_argument("--cases", type=int, default=20, help="the first so many")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = options.model or untrained(options.untrained, work)
        fold = "all" if options.untrained else options.fold
        theirs = nnunet_folder(folder / f"fold_{fold}" / NAMES["final"], work / "nnunet")
        images = work / "images"
        images.mkdir()
        for path in sorted(options.images.glob("*_0000.nii.gz"))[: options.cases]:
            shutil.copy(path, images)
        environment = {**os.environ, **{f"nnUNet_{name}": str(work) for name in ("raw", "preprocessed", "results")}}
        commands = {
            "ukbob_predict": [
                sys.executable, "-m", "ukbob_seg.cli.predict", "-m", str(folder), "-f", fold, "--checkpoint", "final",
                "--device", options.device,
            ],
            "nnUNetv2_predict": [
                str(options.nnunet / "nnUNetv2_predict_from_modelfolder"), "-m", str(theirs), "-f", "all",
                "-device", options.device, "--disable_tta",
            ],
        }  # fmt: skip
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for run in range(options.runs):
            for name, command in commands.items():
                output = work / f"{name}_{run}"
                figures[name].append(measure([*command, "-i", str(images), "-o", str(output)], environment))
                print(f"{name}: {figures[name][-1][0]:.1f} s, {figures[name][-1][1]:.2f} GiB", flush=True)
        medians = {name: np.median(values, axis=0) for name, values in figures.items()}
        ours, peer = medians.values()
        print(f"\n{len(list(images.iterdir()))} cases, median of {options.runs} runs in turn")
        for name, (seconds, memory) in medians.items():
            print(f"  {name:18} {seconds:7.1f} s  {memory:6.2f} GiB")
        ratios = [b[0] / a[0] for a, b in zip(*figures.values(), strict=True)]
        print(f"  ratio {statistics.median(ratios):.1f} (median of pairs), memory {peer[1] / ours[1]:.1f}")
        print(f"  equal voxels in the worst case: {agreement(*(work / f'{name}_0' for name in commands)):.5f}")


if __name__ == "__main__":
    main()
