"""How long a process takes to load what ukbob_predict needs and to end: Python's collector as it is, and as we have it.

    python benchmarks/startup.py --runs 9

Fresh processes in turn; medians of wall time. PyTorch alone for comparison.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

LOAD = (
    "import ukbob_seg.inference.ensemble_predictor, ukbob_seg.inference.nnunet_predictor, ukbob_seg.inference.predict"
)
WAYS = {
    "import torch": "import torch",
    "what predicts": LOAD,
    "what predicts, collected seldom": f"from ukbob_seg.collector import collect_seldom; collect_seldom(); {LOAD}",
}


def main() -> None:
    """Parse, time in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for run in range(options.runs + 1):
        for way, code in WAYS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            if run:  # the first fills the disk's cache
                seconds[way].append(time.perf_counter() - started)
    for way, values in seconds.items():
        print(f"{way:32} {statistics.median(values):5.2f} s")


if __name__ == "__main__":
    main()
