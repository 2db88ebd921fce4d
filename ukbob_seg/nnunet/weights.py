"""Checkpoints that nnU-Net pickled, read without running code from them.

They hold more than tensors: the numpy numbers of the training log, and the device. Those few kinds are allowed beside
what PyTorch allows by itself; anything else that a pickle asks for is refused with its name.
"""

from __future__ import annotations

import re
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ukbob_seg.errors import CheckpointError
from ukbob_seg.nnunet.archive import check_archive

KEYS = ("network_weights", "init_args", "trainer_name")
_PREFIXES = ("module.", "_orig_mod.")  # of networks saved as DistributedDataParallel or torch.compile see them
# PyTorch keeps its list of allowed kinds per process: one thread would take it from under another.
_READING = threading.Lock()
_UNSUPPORTED = re.compile(r"(?:GLOBAL|global|type) ([\w.]+)")


@dataclass(frozen=True)
class NnunetCheckpoint:
    """What prediction needs of a checkpoint of nnU-Net.

    Attributes:
        weights: the network's state dict, on the CPU; mapped from the file where it allows that.
        configuration: of the plans, such as ``3d_fullres``.
        trainer: name of the trainer class.
        mirror_axes: spatial axes that training mirrored, in nnU-Net's transposed order; empty for none.
    """

    weights: dict[str, Tensor]
    configuration: str
    trainer: str
    mirror_axes: tuple[int, ...]


def read_nnunet_checkpoint(path: Path) -> NnunetCheckpoint:
    """Read a checkpoint of nnU-Net v2.

    Raises:
        CheckpointError: missing, damaged, hostile, or of another program; names the file.
    """
    content = _load(path)
    lacking = [key for key in KEYS if key not in content] if isinstance(content, dict) else list(KEYS)
    if lacking:
        raise CheckpointError(f"checkpoint {path} is not one of nnU-Net v2: it lacks {', '.join(lacking)}")
    weights, arguments = content["network_weights"], content["init_args"]
    fine = isinstance(weights, dict) and weights and all(isinstance(value, Tensor) for value in weights.values())
    configuration = arguments.get("configuration") if isinstance(arguments, dict) else None
    axes = content.get("inference_allowed_mirroring_axes") or ()
    fine = fine and isinstance(axes, (tuple, list)) and all(isinstance(axis, int) for axis in axes)
    if not fine or not isinstance(configuration, str):
        raise CheckpointError(
            f"checkpoint {path} is damaged: its weights, configuration or mirroring axes are not there"
        )
    return NnunetCheckpoint(
        weights={_plain_name(name): value for name, value in weights.items()},
        configuration=configuration,
        trainer=str(content["trainer_name"]),
        mirror_axes=tuple(axes),
    )


def _load(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist; give another fold, checkpoint or folder")
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        check_archive(path)  # PyTorch's files are zip archives too
    try:
        with _READING, torch.serialization.safe_globals(allowed_globals()):
            # Mapped, the optimizer's state, two thirds of the file, is never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # arbitrary bytes make the unpickler raise anything
        wanted = _UNSUPPORTED.search(str(error))
        what = f"asks for {wanted[1]}, which weights do not need" if wanted else "is damaged or holds more than weights"
        raise CheckpointError(f"checkpoint {path} {what}; it was not loaded") from error


def allowed_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What nnU-Net's checkpoints pickle besides tensors, under the names of numpy 1 and 2."""
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    return [
        np.dtype,
        *kinds,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]


def _plain_name(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name
