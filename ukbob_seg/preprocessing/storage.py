"""Preprocessed arrays on disk: Blosc2 in chunks near the patch size, so that a patch decompresses little else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from ukbob_seg.errors import DatasetError
from ukbob_seg.files import atomic_path

CODEC = blosc2.Codec.ZSTD
LEVEL = 3
BLOCK_EDGE = 32  # a block of 32^3 float32 voxels is 128 KiB, near the second-level cache


def save_array(path: Path, array: np.ndarray, patch_size: Sequence[int]) -> None:
    """Write a (Z, Y, X) or (C, Z, Y, X) array, atomically.

    Args:
        path: ``.b2nd`` file.
        array: any numeric type and memory order.
        patch_size: voxels (z, y, x) that readers will ask for at a time; chunks are no larger, one channel each.
    """
    leading = (1,) * (array.ndim - 3)
    chunks = leading + tuple(max(1, min(p, n)) for p, n in zip(patch_size, array.shape[-3:], strict=True))
    blocks = leading + tuple(min(BLOCK_EDGE, c) for c in chunks[-3:])
    with atomic_path(Path(path)) as temporary:
        blosc2.asarray(
            np.ascontiguousarray(array),
            urlpath=str(temporary),
            mode="w",
            chunks=chunks,
            blocks=blocks,
            cparams={"codec": CODEC, "clevel": LEVEL, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1},
        )


def open_array(path: Path) -> Any:
    """Open a stored array for partial reads: ``shape``, ``dtype``, and slicing to numpy arrays.

    Raises:
        DatasetError: missing or damaged; names the file and the remedy.
    """
    if not Path(path).is_file():
        raise DatasetError(f"{path} does not exist; run ukbob_preprocess")
    try:
        return _CheckedArray(Path(path), blosc2.open(str(path), mode="r", dparams={"nthreads": 1}))
    except (RuntimeError, ValueError, OSError) as error:
        raise _damaged(path) from error


class _CheckedArray:
    """A Blosc2 array whose read errors name the file."""

    def __init__(self, path: Path, array: Any) -> None:
        self._path, self._array = path, array
        self.shape, self.dtype = tuple(array.shape), array.dtype

    def __getitem__(self, key: Any) -> np.ndarray:
        try:
            return self._array[key]
        except (RuntimeError, ValueError, OSError) as error:
            raise _damaged(self._path) from error


def _damaged(path: Path) -> DatasetError:
    return DatasetError(f"{path} is damaged; delete it and run ukbob_preprocess again")
