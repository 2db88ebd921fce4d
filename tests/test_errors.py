"""What the messages have in common."""

from __future__ import annotations

import pytest
import torch

from ukbob_seg.cli.common import command
from ukbob_seg.dataset.spec import summarise_problems
from ukbob_seg.errors import DatasetError, is_out_of_memory, listing
from ukbob_seg.filtering.measure import refuse_failures


def test_the_first_names_and_how_many_more() -> None:
    names = ("a", "b", "c", "d")
    assert listing(names, 4) == listing(names) == "a, b, c, d"
    assert listing(names, 3) == "a, b, c and 1 more"
    assert listing(names[:2], 2, total=9) == "a, b and 7 more"
    assert listing(names[:2], 5, total=2) == "a, b"
    assert listing(()) == ""


def test_many_problems_in_one_message() -> None:
    assert summarise_problems(["case a: broken"], heading="one of them") == "case a: broken"
    assert summarise_problems(["x", "y"]) == "2 problems:\n  - x\n  - y"
    assert summarise_problems(["x", "y", "z"], 1, "bad") == "bad:\n  - x\n  - ... and 2 more"


@pytest.mark.parametrize(
    ("failing", "cases", "start", "end"),
    [
        (1, 1, "case 0: broken; mend the files", "run again"),
        (1, 9, "case 0: broken; mend it", "--skip-unreadable (the others are kept)"),
        (2, 9, "2 of 9 cases cannot be measured; the others are kept:\n  - case 0: broken", "with --skip-unreadable"),
        (12, 40, "12 of 40 cases", "... and 2 more\nmend the files and run again, or leave these cases out with"),
        (3, 3, "none of the 3 cases can be measured:\n  - case 0", "- case 2: broken\nmend the files and run again"),
    ],
)
def test_cases_that_cannot_be_measured(failing: int, cases: int, start: str, end: str) -> None:
    with pytest.raises(DatasetError) as caught:
        refuse_failures({str(k): f"case {k}: broken" for k in range(failing)}, cases)
    assert str(caught.value).startswith(start)
    assert end in str(caught.value)
    refuse_failures({}, cases)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError("Unable to allocate 3 GiB for an array"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("expected scalar type Float"), False),
    ],
)
def test_too_little_memory_is_one_sentence_and_other_errors_keep_their_traceback(error, expected, capsys):
    @command
    def run(argv):
        try:
            raise error
        except type(error) as cause:
            raise RuntimeError("backend failed\nmany lines") from cause

    if not expected:
        with pytest.raises(RuntimeError, match="backend failed"):
            run([])
        return
    assert run([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (backend failed); plan again with a smaller --memory-gb")
    assert len(said.splitlines()) == 1


def test_torchs_own_allocator_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
