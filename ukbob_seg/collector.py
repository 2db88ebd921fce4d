"""Python's collector of unreachable cycles, which takes its time where PyTorch has made 300,000 objects on import."""

from __future__ import annotations

import atexit
import functools
import gc

YOUNG = 5_000  # new objects before it looks through the youngest ones; by default 700


@functools.cache
def collect_seldom() -> None:
    """Look through new objects seldom, and at the end of the process not through all once more.

    For processes that are one command: of two seconds for loading what predicts and ending, this saves a third.
    """
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)  # what is frozen is not looked through when the interpreter ends; the system frees it
