"""One run of a comparison of networks: trained, scored and measured, in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ukbob_seg import errors
from ukbob_seg.benchmark.networks_scores import score_test_cases
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.errors import CheckpointError, ConfigError, UkbobError
from ukbob_seg.evaluation.validate_fold import validate_fold
from ukbob_seg.files import read_json, write_json
from ukbob_seg.training.checkpoint import NAMES, load_network
from ukbob_seg.training.config import RunOptions, TrainingConfig
from ukbob_seg.training.setup import model_folder
from ukbob_seg.training.state import has_run
from ukbob_seg.training.stopping import catch_signals, stop_noted, stopped_at_once
from ukbob_seg.training.trainer import train

RECORD = "measured.json"
MODULE = "ukbob_seg.cli.benchmark_network_run"
INTERRUPTED = 130  # exit code of our commands
POLL_S = 0.5


@dataclass(frozen=True)
class RunRequest:
    """Everything that a run needs; plain values once ``to_json`` has been called.

    Attributes:
        dataset: folder name, ``DatasetXXX_Name``.
        fold: whose training cases are learned from.
        roots: folders; ``results`` is the run's own.
        network: registry name or dotted path.
        config: recipe, with the seed.
        options: device and so on.
        configuration: of the plans.
        checkpoint: which is scored.
        use_filter: honour the flags of ukbob_filter.
        images: folder of test images, or None for the fold's held-out cases.
        references: folder of their labels.
    """

    dataset: str
    fold: str
    roots: Roots
    network: str
    config: TrainingConfig
    options: RunOptions
    configuration: str
    checkpoint: str
    use_filter: bool
    images: Path | None = None
    references: Path | None = None

    @property
    def folder(self) -> Path:
        """Of the fold."""
        return model_folder(self.roots, self.dataset, self.configuration, self.network) / f"fold_{self.fold}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        content = dataclasses.asdict(self)
        for name in ("images", "references"):
            content[name] = None if content[name] is None else str(content[name])
        content["roots"] = {key: str(value) for key, value in content["roots"].items()}
        return {**content, "config": self.config.to_json()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> RunRequest:
        """Inverse of ``to_json``."""
        return cls(
            **{
                **content,
                "roots": Roots(**{key: Path(value) for key, value in content["roots"].items()}),
                "config": TrainingConfig.from_json(content["config"]),
                "options": RunOptions(**content["options"]),
                **{key: content[key] and Path(content[key]) for key in ("images", "references")},
            }
        )


Launch = Callable[[RunRequest], None]


def carry_out(request: RunRequest) -> None:
    """Train from where the run is to its end, score it, and write ``measured.json``.

    Raises:
        UkbobError: in one sentence.
        StoppedError: a signal came.
    """
    folder, begun = request.folder, has_run(request.folder)
    options = dataclasses.replace(request.options, resume=begun, overwrite=False)
    on_gpu = options.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(options.device)
    try:
        train(
            request.dataset, request.fold, request.roots, request.config, options,
            configuration=request.configuration, network=request.network, use_filter=request.use_filter,
        )  # fmt: skip
    except (ConfigError, CheckpointError) as error:
        if not begun:
            raise
        again = f"delete {folder} to train this run again, or give another folder with -o"
        raise type(error)(f"it cannot go on with what is there now ({error}); {again}") from error
    peak = torch.cuda.max_memory_allocated(options.device) / 2**30 if on_gpu else peak_resident_gb()
    with stop_noted(folder), stopped_at_once("in the validation"):
        if request.images is None or request.references is None:
            most = request.config.validation_cases
            validate_fold(
                folder.parent,
                request.fold,
                request.roots,
                options.device,
                checkpoint=request.checkpoint,
                max_cases=most,
            )
        else:
            score_test_cases(
                folder, request.images, request.references, options.device, request.checkpoint, options.quiet
            )
    _record(folder, options.device, peak)


def _record(folder: Path, device: str, peak_gb: float) -> None:
    """What was measured; of a run in several sessions the largest peak."""
    path = folder / RECORD
    before = read_json(path, "record of a run") if path.is_file() else {}
    network, description = load_network(folder / NAMES["final"])
    plan = description.parsed_plans().configuration(description.configuration).network(description.network)
    write_json(
        path,
        {
            "device": device,
            "peak_gb": max(peak_gb, float(before.get("peak_gb", 0.0))),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "patch_size": list(plan.patch_size),
            "batch_size": plan.batch_size,
        },
    )


def peak_resident_gb() -> float:
    """The largest resident size of this process so far, GiB; on Linux without that of the process that started it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kib = most // 1024 if sys.platform == "darwin" else most
    return kib / 2**20


@dataclass(frozen=True)
class Launcher:
    """Carries a run out in a new process, which inherits the terminal, so that its progress is seen.

    Attributes:
        threads: of PyTorch there; None for its own choice.
    """

    threads: int | None = None

    def __call__(self, request: RunRequest) -> None:
        """Wait for the end of the run; a signal to this process goes on to that one.

        Raises:
            UkbobError: what the process said, or how it ended.
            StoppedError: it was stopped by a signal.
        """
        with tempfile.TemporaryDirectory() as temporary, catch_signals(request.options.stop_on_signals) as stop:
            order, answer = Path(temporary) / "run.json", Path(temporary) / "error.json"
            write_json(order, request.to_json())
            # Networks by dotted path are found as they are here.
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
            if self.threads is not None:
                environment["OMP_NUM_THREADS"] = str(self.threads)
            process = subprocess.Popen([sys.executable, "-m", MODULE, str(order), str(answer)], env=environment)
            code = _wait(process, lambda: stop.signal is not None)
            if answer.is_file():
                raise _error(read_json(answer))
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            if code:
                raise UkbobError(_ended(code))


def _wait(process: subprocess.Popen[bytes], stopped: Callable[[], bool]) -> int:
    told = False
    while True:
        try:
            return process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            if stopped() and not told:
                process.terminate()
                told = True
        except BaseException:  # such as Ctrl-C, which a terminal sends to both
            process.terminate()
            process.wait()
            raise


def _error(content: dict[str, str]) -> UkbobError:
    kind = getattr(errors, content["kind"], UkbobError)
    found: UkbobError = kind(content["message"])
    return found


def _ended(code: int) -> str:
    if code < 0:
        why = ", perhaps for lack of memory" if code == -9 else ""
        return f"its process was killed by signal {-code}{why}; run the same command again to go on"
    return f"its process ended with exit code {code}, see what it wrote above; run the same command again to go on"


def write_error(path: Path, error: UkbobError) -> None:
    """For the process that waits."""
    write_json(path, {"kind": type(error).__name__, "message": str(error)})
