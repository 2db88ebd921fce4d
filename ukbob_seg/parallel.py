"""The one place that fans work out over cases: local processes, a Dask cluster, or parts of a job array."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from ukbob_seg.errors import ConfigError, UkbobError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

_CONNECT_SECONDS = 30
_LOOK_SECONDS = 0.2
_DASK_LOGGERS = ("distributed", "distributed.client")  # those that Dask gives levels of their own


def as_finished(futures: Iterable[Future[Result]]) -> Iterator[Future[Result]]:
    """Futures of threads as they finish; meanwhile an interrupt is noticed at once.

    The system may give the signal to another thread than the one that waits here, which is then not woken by it.
    """
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
        yield from done


@dataclass(frozen=True)
class Part:
    """One of several equal parts of the work, for job arrays. ``number`` counts from 1."""

    number: int
    total: int

    def __post_init__(self) -> None:
        if self.total < 1:
            raise ConfigError(f"--part {self.number}/{self.total}: there must be at least one part, such as 1/1")
        if not 1 <= self.number <= self.total:
            raise ConfigError(
                f"--part {self.number}/{self.total}: the first is 1/{self.total}, the last {self.total}/{self.total}"
            )

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read ``2/8``.

        Raises:
            ConfigError: another form, or out of range.
        """
        number, slash, total = text.partition("/")
        if not (slash and number.strip().isdigit() and total.strip().isdigit()):
            raise ConfigError(f"--part must look like 2/8 (the second of eight parts), got {text!r}")
        return cls(int(number), int(total))

    def has(self, index: int) -> bool:
        """Whether the item with that position, counted from 0, belongs to this part."""
        return index % self.total == self.number - 1


@dataclass(frozen=True)
class Cluster:
    """Where work over cases goes beyond this machine.

    Attributes:
        scheduler: address of a Dask scheduler, or None.
        part: the part of the cases that this process does, or None for all.
    """

    scheduler: str | None = None
    part: Part | None = None

    def share(self, items: Sequence[Item]) -> list[Item]:
        """The items of this process's part."""
        return [item for index, item in enumerate(items) if self.part is None or self.part.has(index)]


HERE = Cluster()  # all of the work, on this machine


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


def total_memory_gb() -> float:
    """Memory of this machine in GiB, or of the container's limit: the same whatever else is running."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            total = min(total, int(limit.read()))
    except (OSError, ValueError):
        pass  # no limit is set
    return total / 2**30


def cpu_count() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count() -> int:
    """Threads that one computation may use: all processors, but one inside the worker processes of ``map_cases``."""
    return int(os.environ.get("NUMBA_NUM_THREADS") or cpu_count())


def check_workers(requested: int | None) -> None:
    """Refuse a number of worker processes before anything is written.

    Raises:
        ConfigError: fewer than one.
    """
    if requested is not None and requested < 1:
        raise ConfigError(f"--workers must be at least 1, got {requested}")


def choose_workers(requested: int | None, cases: int, memory_per_case_gb: float = 0.0) -> int:
    """Number of worker processes: no more than cases, processors, or cases that fit into memory together.

    Args:
        requested: the user's wish, or None to choose.
        cases: how many cases there are to do.
        memory_per_case_gb: estimated peak of one case.

    Raises:
        ConfigError: fewer than one worker was asked for.
    """
    check_workers(requested)
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
    *,
    scheduler: str | None = None,
    amounts: Sequence[int] | None = None,
) -> list[Result]:
    """Call ``function`` on every item, in ``workers`` processes, with one progress bar; results in item order.

    With one worker everything happens in this process. A case that fails with a ``UkbobError`` stops the work with
    that error (its message names the case); a worker that the system kills is reported as such.

    Args:
        function: picklable, when there are several workers.
        items: what to call it on.
        workers: local processes.
        description: for the progress bar and for messages.
        quiet: no progress bar.
        scheduler: address of a Dask scheduler; its workers then do the work, and work of lost workers is done again.
        amounts: how many cases each item stands for; 1 each when None.

    Raises:
        UkbobError: from the function, because a worker process died, or because the scheduler cannot be reached.
    """
    from tqdm import tqdm

    amounts = [1] * len(items) if amounts is None else amounts
    results: dict[int, Result] = {}
    with tqdm(total=sum(amounts), desc=description, disable=quiet or not items, unit="case", leave=False) as bar:
        if scheduler is not None and items:
            done = _on_dask(function, items, scheduler, description)
        elif workers <= 1:
            done = ((index, function(item)) for index, item in enumerate(items))
        else:
            done = _in_processes(function, items, workers, description)
        for index, result in done:
            results[index] = result
            bar.update(amounts[index])
    return [results[index] for index in range(len(items))]


def _in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, description: str
) -> Iterator[tuple[int, Result]]:
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    finished = 0
    try:
        pool = Parallel(n_jobs=workers, return_as="generator", inner_max_num_threads=1)
        for result in pool(delayed(function)(item) for item in items):
            finished += 1
            yield finished - 1, result
    except TerminatedWorkerError as error:
        raise UkbobError(
            f"a worker process was killed during {description or 'the work'} after {finished} of {len(items)} "
            "steps, most likely for lack of memory; run again with fewer --workers (finished cases are kept)"
        ) from error


def _on_dask(
    function: Callable[[Item], Result], items: Sequence[Item], scheduler: str, description: str
) -> Iterator[tuple[int, Result]]:
    """As they finish. The scheduler gives the work of a lost worker to another one."""
    try:
        from distributed import Client, as_completed
        from distributed.comm import CommClosedError
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise ConfigError("--scheduler needs Dask: pip install 'ukbob_seg[dask]'") from error
    try:
        client = Client(scheduler, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError, TimeoutError) as error:
        raise UkbobError(f"no Dask scheduler answers at {scheduler} ({error}); is it running?") from error
    levels = {name: logging.getLogger(name).level for name in _DASK_LOGGERS}
    for name in levels:  # its tracebacks would stand before our sentences
        logging.getLogger(name).setLevel(logging.CRITICAL)
    futures: list[Any] = []
    try:
        if not client.scheduler_info()["workers"]:
            logger.warning("the Dask scheduler at %s has no workers yet; waiting for the first", scheduler)
            client.wait_for_workers(1)
        client.run(import_module, "ukbob_seg")  # a worker without it would die without a word
        futures = client.map(function, items, pure=False)
        index_of = {future.key: index for index, future in enumerate(futures)}
        for future in as_completed(futures):
            yield index_of[future.key], future.result()
    except ModuleNotFoundError as error:
        raise ConfigError(f"the Dask workers at {scheduler} lack {error.name}; install ukbob_seg there") from error
    except KilledWorker as error:
        raise UkbobError(
            f"several Dask workers died on the same step of {description or 'the work'}, most likely for lack of "
            "memory; give them more (finished cases are kept)"
        ) from error
    except (CommClosedError, CancelledError) as error:
        raise UkbobError(
            f"the Dask scheduler at {scheduler} was lost during {description or 'the work'}; start it and run the "
            "same command again (finished cases are kept)"
        ) from error
    finally:
        with suppress(Exception):  # nothing to tidy up where the scheduler is gone
            client.cancel(futures, force=True)
        with suppress(Exception):
            client.close()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
