"""Plan and preprocess one raw dataset with ukbob_seg and with nnU-Net v2, in turn, as whole processes.

    python benchmarks/plan_and_preprocess.py --dataset DIR/Dataset004_Hippocampus --nnunet-bin ENV/bin --repeats 3

nnU-Net lives in an environment of its own (it is heavy); ``--nnunet-bin`` is that environment's bin folder. Both
tools start from an empty preprocessed folder each time and use the same number of workers. Printed are wall time
and peak memory of each run, the medians, and their ratio. Peak memory is the largest sum of the proportional set
sizes (PSS: shared pages counted once) of a command's processes, sampled every 50 ms.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def run(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall seconds and peak memory (GB) of a command and all its children."""
    started = time.perf_counter()
    process = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        total = 0
        for one in [process, *_children(process)]:
            try:
                total += one.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        peak = max(peak, total / 1e9)
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{command[0]} failed with code {process.returncode}")
    return time.perf_counter() - started, peak


def _children(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="raw dataset folder (DatasetXXX_Name)")
    parser.add_argument(
        "--nnunet-bin", type=Path, help="bin folder of an environment with nnunetv2; omit to time ours alone"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--workers", type=int, default=2, help="nnU-Net's -np and -npfp; ours chooses unless --same-workers"
    )
    parser.add_argument("--same-workers", action="store_true", help="give --workers to ukbob_plan_and_preprocess too")
    arguments = parser.parse_args()

    number = str(int(arguments.dataset.name[7:10]))
    ours_bin = Path(sys.executable).parent
    figures: dict[str, list[tuple[float, float]]] = {"ukbob_seg": [], "nnU-Net": []}
    for repeat in range(arguments.repeats + 1):
        with tempfile.TemporaryDirectory() as scratch:
            raw = Path(scratch) / "raw"
            shutil.copytree(arguments.dataset, raw / arguments.dataset.name)
            ours = [
                str(ours_bin / "ukbob_plan_and_preprocess"), "-d", number, "--raw", str(raw),
                "--preprocessed", f"{scratch}/ours", "--memory-gb", "8",
                *(["--workers", str(arguments.workers)] if arguments.same_workers else []),
            ]  # fmt: skip
            rows = {"ukbob_seg": run(ours, dict(os.environ))}
            if arguments.nnunet_bin:
                environment = {
                    **os.environ, "nnUNet_raw": str(raw), "nnUNet_preprocessed": f"{scratch}/nnunet",
                    "nnUNet_results": f"{scratch}/results",
                }  # fmt: skip
                theirs = [
                    str(arguments.nnunet_bin / "nnUNetv2_plan_and_preprocess"), "-d", number, "-c", "3d_fullres",
                    "-np", str(arguments.workers), "-npfp", str(arguments.workers),
                ]  # fmt: skip
                rows["nnU-Net"] = run(theirs, environment)
        if repeat == 0:
            continue  # warm-up: page cache, and the compiled kernels' cache
        for name, row in rows.items():
            figures[name].append(row)
            print(f"run {repeat}: {name:10s} {row[0]:7.2f} s  {row[1]:6.2f} GB", flush=True)
    medians = {
        name: tuple(statistics.median(column) for column in zip(*rows, strict=True))
        for name, rows in figures.items()
        if rows
    }
    for name, (seconds, gigabytes) in medians.items():
        print(f"median: {name:10s} {seconds:7.2f} s  {gigabytes:6.2f} GB")
    if len(medians) == 2:
        (our_s, our_gb), (their_s, their_gb) = medians["ukbob_seg"], medians["nnU-Net"]
        print(f"ukbob_seg takes 1/{their_s / our_s:.1f} of the time and 1/{their_gb / our_gb:.1f} of the memory")


if __name__ == "__main__":
    main()
