"""How the C library gives memory back: of a network's maps, which come and go in every layer, not after each."""

from __future__ import annotations

import ctypes
import platform

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
KEPT_BYTES = 256 * 2**20  # larger arrays come from the system and go back at once, as ever


def reuse_freed_memory() -> bool:
    """Let arrays below 256 MiB reuse memory that others have left, for all threads alike.

    By default glibc asks the system for every larger array, gives it back as soon as it is freed, and each thread has
    a heap of its own. A window through a network on a CPU then meets half a gigabyte of fresh pages, which the system
    fills with zeros first: a tenth of the time. Called before threads have begun, and before PyTorch is imported.

    Returns:
        Whether it was done; False with other C libraries and old versions of glibc, where nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Older versions refuse the first; one heap for all threads is of use with it only.
    wanted = ((M_MMAP_THRESHOLD, KEPT_BYTES), (M_TRIM_THRESHOLD, KEPT_BYTES), (M_ARENA_MAX, 1))
    return all(mallopt(option, value) == 1 for option, value in wanted)
