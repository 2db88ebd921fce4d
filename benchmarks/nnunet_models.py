"""Models trained by nnU-Net v2 itself, predicted by nnU-Net and by ukbob_predict: the same segmentations, what time.

    nnenv/bin/python benchmarks/nnunet_models.py make --data DATA --work WORK   # an environment with nnunetv2==2.8.1
    nnenv/bin/python benchmarks/nnunet_models.py theirs --work WORK             # nnUNetv2_predict_from_modelfolder
    nnenv/bin/python benchmarks/nnunet_models.py exact --work WORK              # not rounded to half precision
    env/bin/python benchmarks/nnunet_models.py ours --work WORK                 # an environment with ukbob_seg[nnunet]
    env/bin/python benchmarks/nnunet_models.py ours --work WORK --precision bfloat16    # on CPUs with AMX
    env/bin/python benchmarks/nnunet_models.py compare --work WORK [--precision bfloat16]

``DATA`` holds Dataset004_Hippocampus (Medical Segmentation Decathlon, task 4) and totalsegmentator_ct, one CT with 61
organs for the model ``organs``: learned at 3 mm, and segmented at 1.5 mm, as one uses such a model. Every model below
is planned, preprocessed and trained by nnU-Net's own classes, for a few iterations; the trainer differs from
nnUNetTrainer in the number of iterations and the optimizer (AdamW, which finds the structures sooner). ``compare``
prints the Dice of each class between both predictions, over all cases and the lowest of a case, how many voxels differ,
wall times (medians of as many runs as were made) and peak memory (of all processes together, shared pages counted
once; a run of its own with --memory, since watching takes time).

Figures of an idle machine are in documentation/nnunet_models.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

TRAINING, TEST = 24, 20
BASE, REGIONS, COARSE, ORGANS = "Dataset901_Base", "Dataset902_Regions", "Dataset903_Coarse", "Dataset904_Organs"
# Name: dataset, planner, plans, configuration, first stage.
MODELS: dict[str, tuple[str, str, str, str, str | None]] = {
    "plain": (BASE, "ExperimentPlanner", "nnUNetPlans", "3d_fullres", None),
    "plain_2d": (BASE, "ExperimentPlanner", "nnUNetPlans", "2d", None),
    "resenc": (BASE, "nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans", "3d_fullres", None),
    "regions": (REGIONS, "ExperimentPlanner", "nnUNetPlans", "3d_fullres", None),
    "coarse": (COARSE, "ExperimentPlanner", "nnUNetPlans", "3d_fullres", None),
    "coarse_2d": (COARSE, "ExperimentPlanner", "nnUNetPlans", "2d", None),
    "lowres": (BASE, "ExperimentPlanner", "nnUNetPlans", "3d_lowres", None),
    "cascade": (BASE, "ExperimentPlanner", "nnUNetPlans", "3d_cascade_fullres", "lowres"),
    "organs": (ORGANS, "ExperimentPlanner", "nnUNetPlans", "3d_fullres", None),
}


def main() -> None:
    """One of the steps above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("make", "theirs", "exact", "ours", "compare"))
    parser.add_argument("--data", type=Path, help="folder of Dataset004_Hippocampus and totalsegmentator_ct")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--width", type=int, default=32, help="features of the first stage (nnU-Net's own: 32)")
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--against", choices=("theirs", "exact"), default="theirs", help="what to compare with")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of ours")
    parser.add_argument("--tta", action="store_true", help="mirror, as nnUNetv2_predict does by default")
    arguments = parser.parse_args()
    os.environ |= {f"nnUNet_{name}": str(arguments.work / name) for name in ("raw", "preprocessed", "results")} | {
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "2",
    }
    steps = {"make": make, "theirs": predict_theirs, "exact": predict_exactly, "ours": predict_ours, "compare": compare}
    steps[arguments.step](arguments)


def make(arguments: argparse.Namespace) -> None:
    """Raw datasets, plans, preprocessed cases and trained models."""
    raw = arguments.work / "raw"
    if not (raw / COARSE / "dataset.json").is_file():
        write_raw(arguments.data / "Dataset004_Hippocampus", raw)
    if "organs" in arguments.models and not (raw / ORGANS / "dataset.json").is_file():
        write_organs(arguments.data / "totalsegmentator_ct", raw / ORGANS)
    for name in arguments.models:
        if model_folder(arguments.work, name).joinpath("fold_all", "checkpoint_final.pth").is_file():
            continue
        plan(arguments, name)
        train(arguments, name)


def write_raw(data: Path, raw: Path) -> None:
    """24 training and 20 test cases; test cases get varied voxel sizes, so that all are resampled.

    In the third dataset only every fourth sagittal slice is left: its coarse axis is x, which nnU-Net transposes.
    """
    import numpy as np
    import SimpleITK as sitk

    source = json.loads((data / "dataset.json").read_text())
    labels = {BASE: source["labels"], COARSE: source["labels"]}
    labels[REGIONS] = {"background": 0, "hippocampus": [1, 2], "posterior": [2]}
    for dataset, own in labels.items():
        content: dict[str, Any] = {
            "channel_names": {"0": "MRI"}, "labels": own, "numTraining": TRAINING, "file_ending": ".nii.gz",
        }  # fmt: skip
        if dataset == REGIONS:
            content["regions_class_order"] = [1, 2]
        for part, count in (("Tr", TRAINING), ("Ts", TEST)):
            generator = np.random.default_rng(len(part) + count)
            for image in sorted((data / f"images{part}").glob("*.nii.gz"))[:count]:
                label = data / f"labels{part}" / image.name.replace("_0000", "")
                factors = generator.uniform(0.75, 1.3, 3) if part == "Ts" else np.ones(3)
                for path, folder in ((image, f"images{part}"), (label, f"labels{part}")):
                    volume = sitk.ReadImage(str(path))
                    if dataset == COARSE:
                        volume = volume[::4, :, :]
                    volume.SetSpacing([float(s * f) for s, f in zip(volume.GetSpacing(), factors, strict=True)])
                    target = raw / dataset / folder / path.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    sitk.WriteImage(volume, str(target), True)
        (raw / dataset / "dataset.json").write_text(json.dumps(content, indent=1))


def write_organs(data: Path, folder: Path) -> None:
    """The CT with its labels renumbered without gaps, as nnU-Net demands; to be segmented at half the spacing."""
    import numpy as np
    import SimpleITK as sitk

    image, labels = (sitk.ReadImage(str(data / name)) for name in ("ct_0000.nii.gz", "ct_labels.nii.gz"))
    values, indices = np.unique(sitk.GetArrayFromImage(labels), return_inverse=True)
    renumbered = sitk.GetImageFromArray(indices.reshape(labels.GetSize()[::-1]).astype(np.uint8))
    renumbered.CopyInformation(labels)
    fine = sitk.Resample(
        sitk.Cast(image, sitk.sitkFloat32), [2 * n for n in image.GetSize()], sitk.Transform(), sitk.sitkLinear,
        image.GetOrigin(), [s / 2 for s in image.GetSpacing()], image.GetDirection(), -1024.0,
    )  # fmt: skip
    for volume, target in ((image, "imagesTr/ct_0000"), (renumbered, "labelsTr/ct"), (fine, "imagesTs/fine_0000")):
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(volume, str(folder / f"{target}.nii.gz"), True)
    names = {"background": 0} | {f"organ_{value}": index for index, value in enumerate(values) if index}
    content = {"channel_names": {"0": "CT"}, "labels": names, "numTraining": 1, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content, indent=1))


def plan(arguments: argparse.Namespace, name: str) -> None:
    """nnU-Net's plans with a batch of two, perhaps narrower; and a cascade, which such small images do not need."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess_dataset,
    )

    dataset, planner, plans, configuration, _ = MODELS[name]
    number = int(dataset[7:10])
    path = arguments.work / "preprocessed" / dataset / f"{plans}.json"
    if not path.is_file():
        extract_fingerprints([number], num_processes=2)
        plan_experiments([number], planner)
        content = json.loads(path.read_text())
        for entry in content["configurations"].values():
            entry["batch_size"] = 2
            widths = entry["architecture"]["arch_kwargs"]
            most = max(widths["features_per_stage"])
            count = len(widths["features_per_stage"])
            widths["features_per_stage"] = [min(arguments.width * 2**k, most) for k in range(count)]
        full = content["configurations"]["3d_fullres"]
        content["configurations"]["3d_lowres"] = {
            "inherits_from": "3d_fullres",
            "data_identifier": f"{plans}_3d_lowres",
            "spacing": [1.5 * s for s in full["spacing"]],
            "next_stage": "3d_cascade_fullres",
        }
        content["configurations"]["3d_cascade_fullres"] = {
            "inherits_from": "3d_fullres", "previous_stage": "3d_lowres",
        }  # fmt: skip
        path.write_text(json.dumps(content, indent=1))
    folder = path.parent / f"{plans}_{configuration}"
    if configuration != "3d_cascade_fullres" and not any(folder.glob("*.pkl")):
        preprocess_dataset(number, plans, (configuration,), (2,))


def train(arguments: argparse.Namespace, name: str) -> None:
    """A few iterations; the class has nnU-Net's name, so that nnU-Net finds its own when it predicts."""
    import torch
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module

    class nnUNetTrainer(module.nnUNetTrainer):  # noqa: N801
        def __init__(self, plans: dict, configuration: str, fold: str, dataset_json: dict, device: Any) -> None:
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs, self.num_val_iterations_per_epoch = 4, 1
            self.num_iterations_per_epoch = max(1, arguments.iterations // 4)

        def configure_optimizers(self) -> tuple[Any, Any]:
            optimizer = torch.optim.AdamW(self.network.parameters(), lr=3e-3)
            return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    dataset, _, plans, configuration, _ = MODELS[name]
    folder = arguments.work / "preprocessed" / dataset
    content = json.loads((folder / f"{plans}.json").read_text()) | {"continue_training": False}
    trainer = nnUNetTrainer(
        content, configuration, "all", json.loads((folder / "dataset.json").read_text()), torch.device("cpu")
    )
    torch.manual_seed(901)
    trainer.run_training()
    if name == "lowres":
        trainer.perform_actual_validation()  # writes what the second stage trains on


def model_folder(work: Path, name: str) -> Path:
    """As nnU-Net names it."""
    dataset, _, plans, configuration, _ = MODELS[name]
    return work / "results" / dataset / f"nnUNetTrainer__{plans}__{configuration}"


def predict_theirs(arguments: argparse.Namespace) -> None:
    """nnUNetv2_predict_from_modelfolder on the test cases, as a user runs it."""
    for name in arguments.models:
        dataset, *_, first = MODELS[name]
        command = [
            str(Path(sys.executable).with_name("nnUNetv2_predict_from_modelfolder")),
            "-i", str(arguments.work / "raw" / dataset / "imagesTs"), "-o", str(output(arguments, name, "theirs")),
            "-m", str(model_folder(arguments.work, name)), "-f", "all", "-device", "cpu", "-npp", "2", "-nps", "2",
        ]  # fmt: skip
        if not arguments.tta:
            command.append("--disable_tta")
        if first is not None:
            command += ["-prev_stage_predictions", str(output(arguments, first, "theirs"))]
        measure(arguments, name, "theirs", command)


def predict_ours(arguments: argparse.Namespace) -> None:
    """ukbob_predict on the same cases; a cascade predicts its first stage itself, which nnU-Net was given."""
    for name in arguments.models:
        command = [
            sys.executable, "-m", "ukbob_seg.cli.predict",
            "-i", str(arguments.work / "raw" / MODELS[name][0] / "imagesTs"),
            "-o", str(output(arguments, name, whose_ours(arguments))), "-m", str(model_folder(arguments.work, name)),
            "--device", "cpu", "--precision", arguments.precision,
        ]  # fmt: skip
        measure(arguments, name, whose_ours(arguments), command + ["--tta"] * arguments.tta)


def exact_predictor() -> Any:
    """nnU-Net's predictor with float32 in place of half precision where it adds up windows, and no other change."""
    import types

    from nnunetv2.inference import predict_from_raw_data as module

    source = Path(module.__file__).read_text().partition("if __name__ ==")[0]
    for old, new in (
        ("torch.half", "torch.float"),
        ("value_scaling_factor=10,", "value_scaling_factor=10, dtype=torch.float,"),
    ):
        if old not in source:
            raise SystemExit(f"this version of nnU-Net does not say {old}")
        source = source.replace(old, new)
    exact = types.ModuleType("exact")
    exec(compile(source, module.__file__, "exec"), exact.__dict__)
    return exact.nnUNetPredictor


def predict_exactly(arguments: argparse.Namespace) -> None:
    """The test cases by ``exact_predictor``."""
    import torch
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    exact = exact_predictor()
    for name in arguments.models:
        predictor = exact(use_mirroring=arguments.tta, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model_folder(arguments.work, name)), ("all",))
        target = output(arguments, name, "exact")
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted((arguments.work / "raw" / MODELS[name][0] / "imagesTs").glob("*.nii.gz")):
            image, properties = SimpleITKIO().read_images([str(path)])
            labels = predictor.predict_single_npy_array(image, properties)
            SimpleITKIO().write_seg(labels, str(target / path.name.replace("_0000", "")), properties)


def whose_ours(arguments: argparse.Namespace) -> str:
    """Predictions of other precisions lie apart."""
    return "ours" if arguments.precision == "float32" else f"ours_{arguments.precision}"


def output(arguments: argparse.Namespace, name: str, whose: str) -> Path:
    """Folder of predictions."""
    return arguments.work / ("predicted_tta" if arguments.tta else "predicted") / whose / name


def measure(arguments: argparse.Namespace, name: str, whose: str, command: list[str]) -> None:
    """Run a command afresh; write its wall time, or the peak memory of its processes, beside the predictions.

    Watching memory takes time from what is watched, hence one or the other.
    """
    folder = output(arguments, name, whose)
    shutil.rmtree(folder, ignore_errors=True)
    file = folder.with_suffix(".json")
    record = json.loads(file.read_text()) if file.is_file() else {}
    started, peak = time.monotonic(), [0]
    process = subprocess.Popen(command)
    watch = threading.Thread(target=_watch, args=(process, peak))
    if arguments.memory:
        watch.start()
    if status := process.wait():
        raise SystemExit(f"{name}: {command[0]} ended with {status}")
    if arguments.memory:
        watch.join()
        record["peak_mb"] = peak[0] / 2**20
    else:
        record.setdefault("wall_s", []).append(time.monotonic() - started)
    file.write_text(json.dumps(record))
    print(whose, name, record)


def _watch(process: subprocess.Popen, peak: list[int]) -> None:
    """The largest sum of proportional set sizes of a process and its descendants (Linux)."""
    while process.poll() is None:
        peak[0] = max(peak[0], sum(map(_proportional_size, _family(process.pid))))
        time.sleep(0.2)


def _family(root: int) -> list[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    family, added = [root], True
    while added:
        added = False
        for child, parent in parents.items():
            if parent in family and child not in family:
                family.append(child)
                added = True
    return family


def _proportional_size(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def compare(arguments: argparse.Namespace) -> None:
    """Dice of each class between both predictions, per model."""
    import SimpleITK as sitk

    print("model       cases  Dice per class, lowest and mean  lowest in a case  other voxels  spent, ours; theirs")
    for name in arguments.models:
        content = json.loads((arguments.work / "raw" / MODELS[name][0] / "dataset.json").read_text())
        values = range(1, len(content["labels"]))
        both, sums = dict.fromkeys(values, 0), dict.fromkeys(values, 0)
        lowest, different, voxels, cases = (1.0, 0), 0, 0, 0
        for path in sorted(output(arguments, name, arguments.against).glob("*.nii.gz")):
            theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
            ours = sitk.GetArrayFromImage(
                sitk.ReadImage(str(output(arguments, name, whose_ours(arguments)) / path.name))
            )
            for value in values:
                common, total = int(((theirs == value) & (ours == value)).sum()), int((theirs == value).sum())
                total += int((ours == value).sum())
                both[value], sums[value] = both[value] + common, sums[value] + total
                if total:
                    lowest = min(lowest, (2 * common / total, total // 2))
            different, voxels, cases = different + int((ours != theirs).sum()), voxels + ours.size, cases + 1
        found = [2 * both[value] / sums[value] for value in values if sums[value]] or [float("nan")]
        dice = f"{min(found):.5f} {sum(found) / len(found):.5f} ({len(found)} classes)"
        spent = "; ".join(
            _spent(output(arguments, name, whose).with_suffix(".json")) for whose in (whose_ours(arguments), "theirs")
        )
        count = f"{different} of {voxels}"
        print(f"{name:11s} {cases:5d}  {dice:31s}  {lowest[0]:.5f} ({lowest[1]})  {count:20s} {spent}")


def _spent(file: Path) -> str:
    """Median of the runs, and how many; peak memory."""
    record = json.loads(file.read_text()) if file.is_file() else {}
    times, peak = record.get("wall_s", []), record.get("peak_mb")
    time_s = f"{statistics.median(times):.1f} s ({len(times)})" if times else "not timed"
    return f"{time_s}, {'not measured' if peak is None else f'{peak:.0f} MB'}"


if __name__ == "__main__":
    main()
