"""Python's collector of unreachable cycles, which takes its time after PyTorch has made 100,000s of objects."""

from __future__ import annotations

import atexit
import functools
import gc

YOUNG = 5_000  # new objects before it looks through the youngest ones; in Python 3.11 it is 700


@functools.cache
def collect_seldom() -> None:
    """Look through new objects seldom, and at the end of the process not through all once more.

    For processes that are one command (``benchmarks/startup.py``). Files are closed by their ``with``, not by this.
    """
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)  # what is frozen is not looked through when the interpreter ends; the system frees it
