"""Memory that the C library keeps: set in a process of its own, and seen in what it holds."""

import platform
import subprocess
import sys

import pytest

from ukbob_seg import allocator

CODE = """
import sys
from pathlib import Path
from ukbob_seg.allocator import reuse_freed_memory
if sys.argv[1] == "reuse" and not reuse_freed_memory():
    sys.exit(3)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])
before = resident()
for _ in range(3):
    array = bytearray(b"1") * 2**26
    del array
print((resident() - before) * 4096)
"""


def _left(how: str) -> int:
    """Bytes that a process holds of three arrays of 64 MiB, made and freed one after the other."""
    done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("this glibc refuses so high a threshold")
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_kept_once_for_the_next_array() -> None:
    assert 60 * 2**20 < _left("reuse") < 80 * 2**20
    assert _left("leave") < 8 * 2**20


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("it was asked"))
    assert allocator.reuse_freed_memory() is False


def test_where_the_threshold_is_refused_threads_keep_their_heaps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Library:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            asked.append(option)
            return 0

    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2.17"))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Library)
    assert allocator.reuse_freed_memory() is False
    assert asked == [allocator.M_MMAP_THRESHOLD]
