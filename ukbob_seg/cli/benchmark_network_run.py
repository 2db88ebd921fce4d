"""The process of one run of ``ukbob_benchmark networks``, which starts it; not for people."""

from __future__ import annotations

import sys
from pathlib import Path

from ukbob_seg.cli.common import command
from ukbob_seg.errors import UkbobError


def _run(argv: list[str] | None) -> None:
    """``ORDER ANSWER``: files with what is to be done, and for the sentence where it cannot be."""
    from ukbob_seg.benchmark.networks_run import RunRequest, carry_out, write_error
    from ukbob_seg.files import read_json

    order, answer = (Path(word) for word in (sys.argv[1:] if argv is None else argv))
    try:
        carry_out(RunRequest.from_json(read_json(order)))
    except UkbobError as error:
        write_error(answer, error)
        raise type(error)("") from error  # the process that waits says it


main = command(_run)

if __name__ == "__main__":
    raise SystemExit(main(None))
