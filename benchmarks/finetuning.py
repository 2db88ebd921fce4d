"""Does pre-training on one labelled brain help to segment the hippocampus? Fine-tuning against training from scratch.

    python benchmarks/finetuning.py --data DIR --work DIR
    python benchmarks/finetuning.py --data DIR --work DIR --arms scratch   # in a second process at the same time
    python benchmarks/finetuning.py --data DIR --work DIR --sizes 10 --steps 20 --pretraining-steps 20   # a first look

The data folder holds Dataset004_Hippocampus (imagesTr, labelsTr, imagesTs, labelsTs) and the dataset to learn from
first, Dataset141_BrainAllen. Swin-BOB is trained on that, then on nested subsets of the hippocampus cases, from its
weights and from fresh ones: same steps, batch, schedule, rate, cases and patches. The last checkpoint of each run
predicts the test cases. These lie in the training dataset as the validation cases of its only split, so that
progress.csv has their Dice while training goes on; nothing is chosen by it, and what planning takes from the cases
(spacing, patch) is given here. All steps are the package's commands, printed as they run. What is finished is not done
again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

ARMS = {"scratch": "#8a939d", "pretrained": "#1f6feb"}  # with the colours of their curves
TARGET, SOURCE = "Dataset004_Hippocampus", "Dataset141_BrainAllen"
MODEL = "3d_fullres__swin_unetr"


@dataclass(frozen=True)
class Experiment:
    """Folders and budget.

    Attributes:
        data: folder of the two raw datasets.
        work: everything is written here.
        steps: of each run; a tenth of them is an epoch, after which some test cases are looked at.
        pretraining_steps: on the source.
        rate: peak learning rate of every run.
        seed: of weights, cases and patches; pre-training always has seed 0.
        curve_cases: test cases that the curves are made of.
        planning: options of ukbob_plan_and_preprocess, for both datasets.
    """

    data: Path
    work: Path
    steps: int
    pretraining_steps: int
    rate: float
    seed: int
    curve_cases: int
    planning: tuple[str, ...]

    @property
    def preprocessed(self) -> Path:
        """Root of the preprocessed datasets."""
        return self.work / "preprocessed"

    @property
    def pretrained_weights(self) -> Path:
        """What pre-training leaves."""
        return self.work / "pretraining" / SOURCE / MODEL / "fold_all" / "checkpoint_final.pt"

    def fold(self, arm: str, size: int) -> Path:
        """Folder of one run, in a results root of its own."""
        return self.work / "runs" / f"{arm}_{size}_seed{self.seed}" / TARGET / MODEL / "fold_0"


def check_settings(experiment: Experiment) -> None:
    """Refuse a work folder that was begun with another budget: its finished runs would be taken for these."""
    path = experiment.work / "experiment.json"
    settings = {key: str(value) for key, value in dataclasses.asdict(experiment).items() if key != "seed"}
    known = json.loads(path.read_text()) if path.is_file() else settings
    if changed := [f"{key} {known[key]} -> {value}" for key, value in settings.items() if known[key] != value]:
        raise SystemExit(f"{path.parent} was begun with other settings ({', '.join(changed)}); take another --work")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2))


def call(*words: object) -> None:
    """Run a command, after printing it."""
    command = [str(word) for word in words]
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)


def case_names(labels: Path) -> list[str]:
    """Names of the cases whose labels are in a folder."""
    return sorted(path.name.removesuffix(".nii.gz") for path in labels.glob("*.nii.gz"))


def link_raw(experiment: Experiment) -> None:
    """Both raw datasets, as links; the target's test cases become cases of imagesTr beside its training cases."""
    for name, parts in ((SOURCE, ("Tr",)), (TARGET, ("Tr", "Ts"))):
        original, folder = experiment.data / name, experiment.work / "raw" / name
        files = [path for part in parts for path in sorted(original.glob(f"*{part}/*.nii.gz"))]
        for path in files:
            link = folder / f"{path.parent.name[:-2]}Tr" / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(path.resolve())
        content = json.loads((original / "dataset.json").read_text())
        content["numTraining"] = len(list((folder / "labelsTr").iterdir()))
        (folder / "dataset.json").write_text(json.dumps(content, indent=2))


def prepare(experiment: Experiment) -> None:
    """Plan and preprocess both datasets, with one spacing, patch and network; write the target's split."""
    if (experiment.preprocessed / "finished").is_file():
        return
    link_raw(experiment)
    roots = ("--raw", experiment.work / "raw", "--preprocessed", experiment.preprocessed)
    for name in (SOURCE, TARGET):
        call("ukbob_plan_and_preprocess", "-d", name, "--no-preprocess", *experiment.planning, *roots)
    # The brain is cut out of its head, the hippocampus images are crops without air: z-scores inside the nonzero mask
    # give the tissue of both the same range.
    plans_file = experiment.preprocessed / SOURCE / "plans.json"
    plans = json.loads(plans_file.read_text())
    for channel in plans["normalization"]:
        channel["mask_nonzero"] = True
    plans_file.write_text(json.dumps(plans, indent=2))
    for name in (SOURCE, TARGET):
        call("ukbob_preprocess", "-d", name, *roots)
    original = experiment.data / TARGET
    split = {"train": case_names(original / "labelsTr"), "val": case_names(original / "labelsTs")}
    (experiment.preprocessed / TARGET / "splits.json").write_text(json.dumps([split], indent=2))
    (experiment.preprocessed / "finished").touch()


def train(experiment: Experiment, folder: Path, steps: int, *options: object) -> None:
    """One run of ukbob_train, or the rest of one; the recipe is the same for all.

    Args:
        experiment: rate and folders.
        folder: of the fold, ROOT/DATASET/MODEL/fold_K.
        steps: in 10 epochs.
        options: further ones.
    """
    if (folder / "checkpoint_final.pt").is_file():
        return
    call(
        "ukbob_train", folder.parents[1].name, folder.name.removeprefix("fold_"), *options,
        "--epochs", 10, "--iterations-per-epoch", steps // 10, "--lr", experiment.rate, "--schedule", "one_cycle",
        "--warmup-epochs", 0, "--mirror-axes", "--no-validation",
        "--raw", experiment.work / "raw", "--preprocessed", experiment.preprocessed, "--results", folder.parents[2],
        *(["--resume"] if (folder / "checkpoint_latest.pt").is_file() else []),
        *(["--threads", os.environ["OMP_NUM_THREADS"]] if "OMP_NUM_THREADS" in os.environ else []),
    )  # fmt: skip


def pretrain(experiment: Experiment) -> None:
    """Train on every case of the source; looked at once, at the end."""
    train(experiment, experiment.pretrained_weights.parent, experiment.pretraining_steps, "--validation-every", 10)


def run(experiment: Experiment, arm: str, size: int) -> None:
    """Train from one start on so many cases, predict the test cases with the last checkpoint and score them."""
    fold, original = experiment.fold(arm, size), experiment.data / TARGET
    available = len(case_names(original / "labelsTr"))
    start = ("--pretrained", experiment.pretrained_weights) if arm == "pretrained" else ()
    share = ("--subset-fraction", size / available, "--seed", experiment.seed)
    looks = ("--validation-every", 1, "--validation-cases", experiment.curve_cases)
    train(experiment, fold, experiment.steps, *share, *looks, *start)
    output = fold / "test"
    if (output / "summary.json").is_file():
        return
    model = ("-m", fold.parent, "-f", 0, "--checkpoint", "final")
    call("ukbob_predict", "-i", original / "imagesTs", "-o", output, *model, "--resume")
    call("ukbob_evaluate", output, original / "labelsTs", "--no-report")


def score(summary_file: Path) -> dict[str, str]:
    """Mean Dice of each class and of all, and mean HD95 of all, over the test cases, as ukbob_evaluate prints them."""
    summary = json.loads(summary_file.read_text())
    dice, hd95 = summary["overall"]["dice"], summary["overall"]["hd95"]
    lost = f" ({hd95['n_infinite']} without a distance)" if hd95["n_infinite"] else ""
    classes = {f"Dice {name}": f"{values['dice']['mean']:.3f}" for name, values in summary["classes"].items()}
    return {**classes, "mean Dice": f"{dice['mean']:.3f}", "HD95": f"{hd95['mean']:.2f} mm{lost}"}


def write_table(experiment: Experiment, sizes: Iterable[int]) -> None:
    """Print the table, and write it into the work folder; runs that are missing are left out."""
    runs = [(arm, size, experiment.fold(arm, size) / "test" / "summary.json") for size in sizes for arm in ARMS]
    rows = [{"training cases": size, "start": arm, **score(path)} for arm, size, path in runs if path.is_file()]
    if not rows:
        return
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    (experiment.work / f"table_seed{experiment.seed}.md").write_text(f"{text}\n")
    print(f"\n{text}")


def draw_curves(experiment: Experiment, sizes: list[int], path: Path) -> None:
    """Dice of the looked-at test cases against training steps: a panel for each size, a line for each arm."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "finetuning"  # the same figure is the same file
    figure = Figure(figsize=(3 * len(sizes), 2.6), layout="constrained")
    axes = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axis, size in zip(axes, sizes, strict=True):
        for arm in ARMS:
            progress = experiment.fold(arm, size) / "progress.csv"
            if progress.is_file():
                table = pd.read_csv(progress)
                steps = (table["epoch"] + 1) * (experiment.steps // 10)
                axis.plot(steps, table["val_mean_dice"], "o-", ms=3, color=ARMS[arm], label=arm)
        axis.set(title=f"{size} training cases", xlabel="step", ylim=(0, 1))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"mean Dice, {experiment.curve_cases} test cases")
    axes[0].legend(loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(f"\ncurves: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the raw datasets")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 30, 150], help="training cases")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="runs to do now")
    parser.add_argument("--steps", type=int, default=250, help="of each run, a multiple of 10")
    parser.add_argument("--pretraining-steps", type=int, default=500, help="a multiple of 10")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curve-cases", type=int, default=10, help="test cases in the curves")
    parser.add_argument("--feature-size", type=int, default=12)
    parser.add_argument("--patch-size", type=int, nargs=3, default=[32, 64, 32], metavar=("Z", "Y", "X"))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--figure", type=Path, help="where the curves go; default curves_seedN.png in --work")
    options = parser.parse_args()
    for steps in (options.steps, options.pretraining_steps):
        if steps < 10 or steps % 10:
            parser.error(f"steps must be a multiple of 10, got {steps}")
    planning = ("--spacing", 1, 1, 1, "--patch-size", *options.patch_size, "--batch-size", options.batch_size,
                "--feature-size", options.feature_size)  # fmt: skip
    available = len(case_names(options.data / TARGET / "labelsTr"))
    if not all(0 < size <= available for size in options.sizes):
        parser.error(f"--sizes must be between 1 and the {available} training cases, got {options.sizes}")
    experiment = Experiment(
        options.data.resolve(), options.work.resolve(), options.steps,
        options.pretraining_steps, options.lr, options.seed, options.curve_cases, tuple(map(str, planning)),
    )  # fmt: skip
    check_settings(experiment)
    prepare(experiment)
    if "pretrained" in options.arms:
        pretrain(experiment)
    for size in options.sizes:
        for arm in options.arms:
            run(experiment, arm, size)
    write_table(experiment, options.sizes)
    draw_curves(experiment, options.sizes, options.figure or experiment.work / f"curves_seed{experiment.seed}.png")


if __name__ == "__main__":
    main()
