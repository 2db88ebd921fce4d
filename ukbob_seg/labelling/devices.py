"""Which device a Dask worker predicts on."""

from __future__ import annotations

import logging
import os
import re
import sys

import torch

from ukbob_seg.errors import ConfigError

log = logging.getLogger(__name__)
RANKS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_RANK")  # of a process on its machine
_NUMBERED = re.compile(r"(?:.*[-_])?(\d+)")


def device_of_worker(wish: str) -> str:
    """The device of this process: ``auto`` is a GPU where there is one; of several GPUs each worker takes its own.

    Workers are told apart by their names' numbers (``dask worker --name node1 --nworkers 4`` gives node1-0 to node1-3;
    a LocalCluster counts from 0), else by the rank that srun or mpirun gave. Workers that see their own GPU first, as
    those of dask-cuda, take that.

    Raises:
        ConfigError: no such device on this machine.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wish == "auto":
        wish = "cuda" if count else "cpu"
    if wish == "cuda" and count > 1 and not _own_comes_first():
        number = worker_number()
        if number is None:
            log.warning("a worker without a number in its name shares the first of %d GPUs with others", count)
        return f"cuda:{(number or 0) % count}"
    if wish.startswith("cuda") and int(wish.partition(":")[2] or 0) >= count:
        raise ConfigError(
            f"--device {wish}: worker {_name()} has {count} CUDA devices; give a device that all have, or auto"
        )
    return wish


def worker_number() -> int | None:
    """Number of this Dask worker among those of its machine, as far as that can be told."""
    if (found := _NUMBERED.fullmatch(str(_name()))) is not None:
        return int(found[1])
    ranks = [os.environ[name] for name in RANKS if os.environ.get(name, "").isdigit()]
    return int(ranks[0]) if ranks else None


def _name() -> object:
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker

    try:
        return get_worker().name
    except ValueError:  # not in a worker
        return None


def _own_comes_first() -> bool:
    """Whether somebody gave each worker the list of GPUs in an order of its own."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    numbers = [int(name) for name in visible if name.strip().isdigit()]
    return numbers != sorted(numbers)
