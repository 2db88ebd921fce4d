"""The one place that fans work out over cases."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from ukbob_seg.errors import ConfigError, UkbobError

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_memory_gb() -> float:
    """Memory that this process may still take, in GiB: what the system has free, within the container's limit."""
    free = float("inf")
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30
    try:
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as used,
        ):
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):
        pass  # no limit is set
    return max(free, 0.0) / 2**30


def cpu_count() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(requested: int | None, cases: int, memory_per_case_gb: float = 0.0) -> int:
    """Number of worker processes: no more than cases, processors, or cases that fit into memory together.

    Args:
        requested: the user's wish, or None to choose.
        cases: how many cases there are to do.
        memory_per_case_gb: estimated peak of one case.

    Raises:
        ConfigError: fewer than one worker was asked for.
    """
    if requested is not None and requested < 1:
        raise ConfigError(f"--workers must be at least 1, got {requested}")
    wish = requested if requested is not None else cpu_count()
    if memory_per_case_gb > 0:
        wish = min(wish, int(0.8 * available_memory_gb() / memory_per_case_gb))
    return max(1, min(wish, cases))


def map_cases(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int = 1,
    description: str = "",
    quiet: bool = False,
) -> list[Result]:
    """Call ``function`` on every item, in ``workers`` processes, with one progress bar; results in item order.

    With one worker everything happens in this process. A case that fails with a ``UkbobError`` stops the work with
    that error (its message names the case); a worker that the system kills is reported as such.

    Raises:
        UkbobError: from the function, or because a worker process died.
    """
    from tqdm import tqdm

    results: list[Result] = []
    with tqdm(total=len(items), desc=description, disable=quiet or not items, unit="case", leave=False) as bar:
        if workers <= 1:
            for item in items:
                results.append(function(item))
                bar.update()
            return results
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        try:
            pool = Parallel(n_jobs=workers, return_as="generator", inner_max_num_threads=1)
            for result in pool(delayed(function)(item) for item in items):
                results.append(result)
                bar.update()
        except TerminatedWorkerError as error:
            raise UkbobError(
                f"a worker process was killed during {description or 'the work'} after {len(results)} of "
                f"{len(items)} cases, most likely for lack of memory; run again with fewer --workers (finished "
                "cases are kept)"
            ) from error
    return results
