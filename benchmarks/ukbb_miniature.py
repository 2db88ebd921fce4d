"""From UK Biobank style archives to scores, on synthetic subjects: every command of the way, with the options it needs.

    python benchmarks/ukbb_miniature.py --work WORK                    # minutes on two CPU cores
    python benchmarks/ukbb_miniature.py --work WORK --labeller MODEL   # label with this model: ours, or nnU-Net v2's

archives -> ukbob_convert -> ukbob_label -> ukbob_filter -> ukbob_train -> ukbob_predict --etta -> ukbob_evaluate

The archives are ``ukbob_seg.demo.dixon_archives``: DICOM stations with gains of their own, some with water and fat
exchanged, one of them incomplete. Without ``--labeller`` a small model is trained first, on other synthetic subjects
with true labels; it stands for TotalVibeSegmentator. A model of one's own takes the four channels fat, water, inphase,
outphase. The small model travels as such a model would: exported to one file, imported elsewhere, then used. Commands
are printed as they run, and can be typed one by one instead; the script goes on where it was stopped.

Needs ``pip install 'ukbob_seg[dicom]'``.
"""

from __future__ import annotations

import argparse
import shlex
from importlib import import_module
from pathlib import Path

from ukbob_seg.errors import UkbobError

SHAPE = (64, 28, 40)  # 12 mm voxels
PATCH = ("64", "32", "32")
SCANS, TEST, LABELLED = "Dataset020_Dixon", "Dataset021_DixonTest", "Dataset022_Labelled"


def main(given: list[str] | None = None) -> None:
    """All steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--labeller", type=Path, help="model folder or archive")
    parser.add_argument("--subjects", type=int, default=25, help="the filter judges organs with 20 labels or more")
    parser.add_argument("--test-subjects", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=13)
    parser.add_argument("--steps", type=int, default=20, help="of an epoch")
    arguments = parser.parse_args(given)
    work = arguments.work
    raw, roots = work / "raw", _roots(work, "raw", "preprocessed")
    everything = [*roots, *_roots(work, "results")]
    training, test = _archives(work, arguments.subjects, arguments.test_subjects)
    _run("convert", "ukbb", "-i", training, "-o", raw / SCANS, "--repair-swaps", "--skip-incomplete")
    _run("convert", "ukbb", "-i", test, "-o", raw / TEST, "--repair-swaps", "--test")
    labeller = (
        "--model",
        arguments.labeller or _labeller(work, arguments.epochs, arguments.steps),
        "--checkpoint",
        "final",
    )
    _run("label", *labeller, "--input", raw / SCANS, "--output", raw / LABELLED, "--device", "cpu")
    _plan(LABELLED, roots)
    _run("filter", "-d", LABELLED, *roots)
    model = _train(work, LABELLED, arguments.epochs, arguments.steps, everything)
    for name, option in (("plain", ()), ("etta", ("--etta",))):
        predictions = work / f"predictions_{name}"
        _run(
            "predict", "-m", model, "-i", raw / TEST / "imagesTs", "-o", predictions, "-f", "0",
            "--checkpoint", "final", "--device", "cpu", "--resume", *option,
        )  # fmt: skip
        _run("evaluate", predictions, test.parent / "truth", "-o", work / f"scores_{name}")


def _archives(work: Path, subjects: int, test_subjects: int) -> tuple[Path, Path]:
    """Folders of archives: for training, with one that lacks a series, and for testing, from another scanner."""
    import dataclasses

    from ukbob_seg.demo.cohort import CohortConfig, make_case
    from ukbob_seg.demo.dixon_archives import ArchivePlan, write_archive, write_archives

    for name, count, config in (
        ("training", subjects, CohortConfig(shape=SHAPE, seed=1)),
        ("test", test_subjects, CohortConfig(shape=SHAPE, seed=2, shift=0.5)),
    ):
        if not (work / name / "archives").is_dir():
            print(f"writing {count} archives into {work / name}")
            write_archives(work / name, config, count)
            if name == "training":
                plan = dataclasses.replace(ArchivePlan(), missing=frozenset({(3, "water")}))
                path = work / name / "archives" / f"{1000000 + count}_20201_2_0.zip"
                write_archive(path, make_case(config, count).image, config.geometry, plan, seed=count)
    return work / "training" / "archives", work / "test" / "archives"


def _labeller(work: Path, epochs: int, steps: int) -> Path:
    """A model for the labels, trained on subjects of its own, exported, and imported into results of others' models."""
    from ukbob_seg.demo.cohort import CohortConfig
    from ukbob_seg.demo.write import DATASET, write_cohort

    own = work / "labeller"
    if not (own / "raw" / DATASET / "dataset.json").is_file():
        write_cohort(own / "raw", CohortConfig(shape=SHAPE, seed=3), 24, 0, fault_fraction=0.0)
    imported = work / "imported" / DATASET / "3d_fullres__swin_unetr"
    if not imported.is_dir():
        _plan(DATASET, _roots(own, "raw", "preprocessed"))
        model = _train(own, DATASET, epochs, steps, _roots(own, "raw", "preprocessed", "results"))
        file = own / "labeller.zip"
        _run("export_model", "--model", model, "--checkpoint", "final", "-o", file, "--overwrite")
        _run("import_model", file, "--results", work / "imported")
    return imported


def _plan(dataset: str, roots: list[str]) -> None:
    small = ("--memory-gb", "4", "--patch-size", *PATCH, "--batch-size", "2", "--feature-size", "12")
    _run("plan_and_preprocess", "-d", dataset, *small, *roots)


def _train(work: Path, dataset: str, epochs: int, steps: int, roots: list[str]) -> Path:
    model = work / "results" / dataset / "3d_fullres__swin_unetr"
    if not (model / "fold_0" / "checkpoint_final.pt").is_file():
        recipe = (
            "--epochs",
            str(epochs),
            "--iterations-per-epoch",
            str(steps),
            "--lr",
            "4e-3",
            "--schedule",
            "one_cycle",
        )
        begun = (model / "fold_0" / "checkpoint_latest.pt").is_file()  # the script was stopped in this step
        again = ("--resume",) if begun else ()
        _run("train", dataset, "0", *recipe, "--mirror-axes", "--no-validation", "--device", "cpu", *again, *roots)
    return model


def _roots(work: Path, *names: str) -> list[str]:
    return [part for name in names for part in (f"--{name}", str(work / name))]


def _run(name: str, *options: object) -> None:
    """One command, in this process."""
    given = [str(option) for option in options]
    print(f"\n$ ukbob_{name} {shlex.join(given)}", flush=True)
    code = import_module(f"ukbob_seg.cli.{name}").main(given)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    try:
        main()
    except UkbobError as error:
        raise SystemExit(f"error: {error}") from error
