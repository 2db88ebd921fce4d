"""Fan-out over processes, parts and a real Dask cluster."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ukbob_seg.errors import ConfigError, DatasetError, UkbobError
from ukbob_seg.filtering.cohort import solf_filter
from ukbob_seg.filtering.config import FilterConfig
from ukbob_seg.parallel import Part, as_finished, choose_workers, map_cases

TABLES = ("features.parquet", "flags.parquet", "bounds.json", "policy.json")


def square(number: int) -> int:
    return number * number


def refuse_three(number: int) -> int:
    if number == 3:
        raise DatasetError("case 3: broken")
    return number


class KillOnce:
    """Kills the process that works on the fifth item, the first time; writes down every start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, number: int) -> int:
        (self.folder / f"{number}-{os.getpid()}-{time.monotonic_ns()}").touch()
        if number == 5 and len(list(self.folder.glob("5-*"))) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        return number * number


def kill_worker(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """Address of a scheduler on this machine with two workers, each a process of its own, restarted when it dies."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", host="127.0.0.1"
    ) as cluster:
        yield cluster.scheduler_address


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_item_order(workers: int) -> None:
    assert map_cases(square, list(range(20)), workers, quiet=True) == [n * n for n in range(20)]
    assert map_cases(square, [], workers, quiet=True) == []


def test_bar_counts_cases(capsys: pytest.CaptureFixture[str]) -> None:
    map_cases(square, [1, 2], description="work", amounts=[30, 12])
    assert "/42" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_reach_the_caller(workers: int) -> None:
    with pytest.raises(DatasetError, match="case 3: broken"):
        map_cases(refuse_three, list(range(6)), workers, quiet=True)


def test_a_killed_worker_is_reported() -> None:
    with pytest.raises(UkbobError, match="worker process was killed during the test"):
        map_cases(kill_worker, [1, 2, 3], 2, "the test", quiet=True)


def test_parts_divide_the_work() -> None:
    parts = [Part.parse(f"{k}/3") for k in (1, 2, 3)]
    assert [[i for i in range(8) if part.has(i)] for part in parts] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    for text in ("1", "a/b", "-1/3", "1/"):
        with pytest.raises(ConfigError, match="--part must look like 2/8"):
            Part.parse(text)
    for text in ("0/3", "4/3"):
        with pytest.raises(ConfigError, match=f"--part {text}: the first is 1/3, the last 3/3"):
            Part.parse(text)
    with pytest.raises(ConfigError, match="--part 1/0: there must be at least one part"):
        Part.parse("1/0")


def test_workers_are_limited_by_cases_and_memory() -> None:
    assert choose_workers(5, 3) == 3
    assert choose_workers(5, 100, memory_per_case_gb=1e9) == 1
    with pytest.raises(ConfigError, match="--workers"):
        choose_workers(0, 3)


def test_dask_does_the_same(scheduler: str) -> None:
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    assert max(levels) < logging.CRITICAL
    assert map_cases(square, list(range(20)), quiet=True, scheduler=scheduler) == [n * n for n in range(20)]
    with pytest.raises(DatasetError, match="case 3: broken"):
        map_cases(refuse_three, list(range(6)), quiet=True, scheduler=scheduler)
    assert [logger.level for logger in loggers] == levels


def test_a_lost_dask_worker_costs_nothing(scheduler: str, tmp_path: Path) -> None:
    assert map_cases(KillOnce(tmp_path), list(range(16)), quiet=True, scheduler=scheduler) == [n * n for n in range(16)]
    assert len(list(tmp_path.glob("5-*"))) >= 2


def test_work_that_kills_every_dask_worker_is_reported(scheduler: str) -> None:
    with pytest.raises(UkbobError, match="several Dask workers died on the same step of the test"):
        map_cases(kill_worker, [1], description="the test", quiet=True, scheduler=scheduler)


def test_no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("ukbob_seg.parallel._CONNECT_SECONDS", 0.5)
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        with pytest.raises(UkbobError, match="no Dask scheduler answers"):
            map_cases(square, [1], quiet=True, scheduler=address)


def test_a_scheduler_without_workers_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=0, threads_per_worker=1, processes=True, dashboard_address=":0", host="127.0.0.1"
    ) as cluster:
        late = threading.Timer(1.0, cluster.scale, (1,))
        late.start()
        assert map_cases(square, [2, 3], quiet=True, scheduler=cluster.scheduler_address) == [4, 9]
        assert "has no workers yet" in caplog.text


def test_a_lost_scheduler_ends_with_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    address_file = tmp_path / "scheduler.json"
    options = ["--scheduler-file", str(address_file), "--port", "0", "--no-dashboard", "--host", "127.0.0.1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = subprocess.Popen([*dask, *options], **quiet)
    while not address_file.is_file():
        time.sleep(0.05)
    worker = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(address_file), "--no-nanny"],
        **quiet,
    )
    address = json.loads(address_file.read_text())["address"]
    said: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = said.append  # type: ignore[method-assign]
    logging.getLogger("distributed.client").addHandler(listener)
    killer = threading.Timer(6.0, scheduler.kill)
    killer.start()
    try:
        with pytest.raises(UkbobError, match="was lost during the test"):
            map_cases(time.sleep, [0.5] * 100, description="the test", quiet=True, scheduler=address)
        assert said == []  # the sentence stands alone
    finally:
        logging.getLogger("distributed.client").removeHandler(listener)
        killer.cancel()
        for process in (scheduler, worker):
            process.kill()
            process.wait()


def test_filter_on_dask_gives_the_same_bytes(make_dataset: Callable[..., Path], scheduler: str, tmp_path: Path) -> None:
    cohort = make_dataset(cases=22)
    folders = tmp_path / "local", tmp_path / "dask"
    solf_filter(cohort, folders[0], FilterConfig(workers=1, quiet=True, report=False))
    summary = solf_filter(cohort, folders[1], FilterConfig(scheduler=scheduler, quiet=True, report=False))
    assert summary.computed == 22
    for name in TABLES:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_filter_ends_with_the_same_bytes_when_a_dask_worker_is_killed(
    make_dataset: Callable[..., Path], scheduler: str, tmp_path: Path
) -> None:
    import distributed

    cohort = make_dataset(cases=40)
    folders = tmp_path / "local", tmp_path / "dask"
    solf_filter(cohort, folders[0], FilterConfig(workers=1, quiet=True, report=False))
    with distributed.Client(scheduler, set_as_default=False) as client:
        victim = min(client.run(os.getpid).values())
    left = []

    def kill_after_the_first_shard() -> None:
        while not list(folders[1].glob("shards/shard_*")):
            time.sleep(0.001)
        os.kill(victim, signal.SIGKILL)
        left.append(40 - len(list(folders[1].glob("shards/shard_*"))))

    killer = threading.Thread(target=kill_after_the_first_shard, daemon=True)
    killer.start()
    solf_filter(cohort, folders[1], FilterConfig(scheduler=scheduler, quiet=True, report=False))
    killer.join()
    assert left[0] > 0  # it was killed in the middle
    for name in TABLES:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def grow(n: int) -> int:
    """Hold more memory than a worker may gain, and let its manager look."""
    _HELD.append(bytearray(500 * 2**20) if n else bytearray(1))
    time.sleep(1.2)
    return n


_HELD: list[bytearray] = []


def test_a_worker_that_grew_is_replaced_and_nothing_waits_for_it() -> None:
    """Its replacement comes with a warning in another thread, which must not become an error there."""
    assert map_cases(grow, [0, 0, 1, 2, 3, 4], workers=2, quiet=True) == [0, 0, 1, 2, 3, 4]


def test_an_interrupt_that_another_thread_gets_is_noticed_while_one_waits() -> None:
    """The system may choose any thread; the waiting one is then not woken by it."""
    release = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(release.wait, 20) for _ in range(2)]
        threading.Timer(0.3, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT)).start()
        started = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                for _ in as_finished(futures):
                    pass
            assert time.monotonic() - started < 10
        finally:
            release.set()


def test_futures_come_as_they_finish() -> None:
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(time.sleep, 0.5)
        soon = pool.submit(int, "7")
        assert [each is late for each in as_finished([late, soon])] == [False, True]
