"""The errors that a user can cause and mend. Commands print their message on one line and exit with code 2."""

from __future__ import annotations

import errno
from collections.abc import Sequence


class UkbobError(Exception):
    """Base of every error whose message alone tells the user what is wrong and what to do."""


class DatasetError(UkbobError):
    """The data on disk (raw, preprocessed, predictions) is not as it must be."""


class ConfigError(UkbobError):
    """An option, a plan or a configuration value is not valid."""


class CheckpointError(UkbobError):
    """A checkpoint or model folder cannot be used."""


class StoppedError(UkbobError):
    """A signal asked the program to stop, and it did so in good order. Commands exit with code 143."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that a GPU's or the machine's memory did not suffice."""
    seen: BaseException | None = error
    while seen is not None:
        # By name: torch has had this class in two places, and is not imported here.
        if isinstance(seen, MemoryError) or type(seen).__name__ == "OutOfMemoryError":
            return True
        if isinstance(seen, RuntimeError) and "can't allocate memory" in str(seen):  # torch's allocator on CPUs
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def stops_all(error: BaseException) -> bool:
    """Whether an error of a case is no fault of the case: memory or disk do not suffice, for any other either.

    One that was raised ``from None`` is the case's, whatever happened before: a file that cannot hold what it says.
    """
    if error.__cause__ is None and error.__suppress_context__:
        return False
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen = seen.__cause__ or seen.__context__
    return is_out_of_memory(error)


def listing(names: Sequence[str], most: int = 10, total: int | None = None) -> str:
    """``a, b and 5 more``: the first of many names for a message, and how many it leaves out.

    Args:
        names: all, or at least the first ``most`` of them.
        most: names to show.
        total: how many there are, where ``names`` does not hold all.
    """
    shown = ", ".join(names[:most])
    more = (len(names) if total is None else total) - most
    return f"{shown} and {more} more" if more > 0 else shown
