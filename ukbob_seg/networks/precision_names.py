"""Names of precisions, as commands take them; without PyTorch, so that ``--help`` is quick."""

from __future__ import annotations

from ukbob_seg.errors import ConfigError

AUTO = "auto"  # half precision on CUDA, float32 on CPUs
PRECISIONS = (AUTO, "float32", "bfloat16")


def check_precision(name: str) -> None:
    """Refuse what is no precision.

    Raises:
        ConfigError: names those that there are.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"--precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
