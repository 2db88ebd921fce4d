"""When a run ends before its last epoch: signals of a scheduler, and validations without progress."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ukbob_seg.errors import StoppedError
from ukbob_seg.files import write_text
from ukbob_seg.training.distributed import any_process, gather, is_first, said_once

SIGNALS = tuple(s for s in (signal.SIGTERM, getattr(signal, "SIGUSR1", None)) if s is not None)
STOPPED = "stopped.txt"


class StopRequest:
    """Whether a signal asked for the end of the run; the run decides when it is a good moment."""

    def __init__(self) -> None:
        self.signal: str | None = None  # name of the first one that this process got

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """As a signal handler: remember."""
        self.signal = self.signal or signal.Signals(number).name

    def check(self, where: str) -> None:
        """Called by all processes at the same place.

        Args:
            where: what was done last, for the message.

        Raises:
            StoppedError: in all of them, when one got a signal.
        """
        if any_process(self.signal is not None):
            name = next(name for name in gather(self.signal) if name)
            raise said_once(StoppedError(_sentence(name, where)))


@contextmanager
def catch_signals(wanted: bool) -> Iterator[StopRequest]:
    """While the block runs, SIGTERM and SIGUSR1 are only remembered; not in threads, where Python cannot."""
    request = StopRequest()
    if not wanted:
        yield request
        return
    with _handled_by(request):
        yield request


@contextmanager
def stopped_at_once(where: str) -> Iterator[None]:
    """While the block runs, a signal ends it wherever it is: for work whose files are complete or absent.

    Args:
        where: for the message.

    Raises:
        StoppedError: when a signal came.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise said_once(StoppedError(_sentence(signal.Signals(number).name, where)))

    with _handled_by(stop):
        yield


@contextmanager
def stop_noted(folder: Path) -> Iterator[None]:
    """While the block runs, a stop by a signal leaves ``stopped.txt`` with its sentence, until the run goes on.

    For job scripts: torchrun exits with 1 whatever its processes exit with, so that the code cannot say it.

    Args:
        folder: of the fold.
    """
    try:
        yield
    except StoppedError as stopped:
        if is_first():
            write_text(folder / STOPPED, f"{stopped}\n")
        raise


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _sentence(name: str, where: str) -> str:
    return f"stopped by {name} {where}; run the same command with --resume to go on"


def outlive_one_signal(worker: int = 0) -> None:
    """For processes that read patches: schedulers signal them too, but the running step still needs them."""
    for number in SIGNALS:
        signal.signal(number, lambda received, frame: signal.signal(received, signal.SIG_DFL))


def validations_without_gain(history: Sequence[dict[str, Any]]) -> int:
    """Validations since the one with the highest mean Dice; NaN is never a gain."""
    best, since = -math.inf, 0
    for row in history:
        score = row.get("val_mean_dice")
        if score is not None:
            since = 0 if score > best else since + 1
            best = score if score > best else best
    return since
