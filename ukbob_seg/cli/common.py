"""What every command shares: roots, logging, and errors as one sentence with exit code 2."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ukbob_seg import __version__
from ukbob_seg.collector import collect_seldom
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.errors import ConfigError, StoppedError, UkbobError, is_out_of_memory

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
MORE_MEMORY = (
    "plan again with a smaller --memory-gb, lower --workers or --window-batch where they were given, predict with "
    "--no-overlap, or end what else uses this memory"
)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line, instead of listing all options first."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {message}; see {self.prog} --help\n" if is_first_process() else None)


def is_first_process() -> bool:
    """Whether this process speaks to the user; torchrun numbers those that it starts."""
    return os.environ.get("RANK", "0") == "0"


def make_parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser with --version and a worked example below the options."""
    parser = _Parser(
        prog=command,
        allow_abbrev=False,  # a misspelt option is an error, not another one
        description=description,
        epilog=f"example:\n{example.rstrip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ukbob_seg {__version__}")
    return parser


def add_roots(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add --raw, --preprocessed and --results (those named); defaults come from the environment."""
    group = parser.add_argument_group("folders (default: the environment variable, else ./ukbob_data/...)")
    for name in names:
        variable = f"UKBOB_{name.upper()}"
        group.add_argument(
            f"--{name}",
            type=Path,
            metavar="DIR",
            default=Path(os.environ.get(variable) or Path("ukbob_data") / name),
            help=f"root of the {name} datasets [{variable}]",
        )


def roots_from(arguments: argparse.Namespace) -> Roots:
    """The three roots; those that the command has no flag for come from the environment or the default."""
    defaults = Roots.below(Path("ukbob_data"))

    def root(name: str) -> Path:
        given = getattr(arguments, name, None)
        return Path(given or os.environ.get(f"UKBOB_{name.upper()}") or getattr(defaults, name))

    return Roots(root("raw"), root("preprocessed"), root("results"))


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers."""
    parser.add_argument(
        "--workers", type=int, metavar="N", help="worker processes (default: by processors, memory and cases)"
    )


def add_cluster(parser: argparse.ArgumentParser, part: str | None) -> None:
    """Add --scheduler, and --part with what to do when all parts are done (None: no parts)."""
    group = parser.add_argument_group("many machines")
    if part is not None:
        group.add_argument(
            "--part", metavar="I/N", help=f"only part I of N of the cases (I from 1), for job arrays; {part}"
        )
    group.add_argument(
        "--scheduler", metavar="ADDRESS", help="work on the workers of a Dask scheduler (tcp://host:8786)"
    )


def choose_device(name: str) -> str:
    """Resolve ``auto`` to cuda when there is one, and refuse a device that is not there.

    Raises:
        ConfigError: unknown name, or no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu or auto"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: not available on this machine; use cpu or auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    return name


def command(function: Callable[[list[str] | None], None]) -> Callable[[list[str] | None], int]:
    """Wrap a command: configure logging, turn expected errors into one line and exit code 2.

    The wrapped function returns the exit code, so tests call it in-process; the console script exits with it.
    """

    @functools.wraps(function)
    def main(argv: list[str] | None = None) -> int:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("ukbob_seg").setLevel(logging.INFO)
        # joblib replaces a worker whose memory has grown between two items and says so; it tells the user nothing.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
        collect_seldom()
        try:
            function(argv)
        except StoppedError as stopped:
            _say(str(stopped))
            return EXIT_TERMINATED
        except UkbobError as error:
            _say(str(error) and f"error: {error}")
            return EXIT_BAD_INPUT
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            _say(f"error: out of memory ({_first_line(error)}); {MORE_MEMORY}")
            return EXIT_BAD_INPUT
        except KeyboardInterrupt as interrupt:  # a command whose way to go on is another one says it
            if is_first_process():
                _say(str(interrupt) or "interrupted; what was finished is kept, run the same command again to go on")
            return EXIT_INTERRUPTED
        return 0

    return main


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _say(message: str) -> None:
    """One line to the user; of an error that several processes share, only the first has a message."""
    if message:
        print(message, file=sys.stderr)
