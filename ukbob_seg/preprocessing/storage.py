"""Preprocessed arrays on disk: Blosc2 in chunks near the patch size, so that a patch decompresses little else.

Blosc2 itself notices a file that was cut short but not a changed byte, so every chunk carries a checksum, which is
tested when the chunk is first read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from ukbob_seg.errors import DatasetError
from ukbob_seg.files import atomic_path
from ukbob_seg.parallel import thread_count

try:  # the same sums, eight times as fast
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

BLOCK_BYTES = 1 << 17  # what is decompressed at a time; fits the second-level cache
STREAMED_CHUNK = (16, 128, 128)  # (z, y, x) of arrays that are written plane by plane
SMALL_BYTES = 1 << 24  # arrays that are made in memory, every way, and written at once
GOOD_RATIO = 0.6  # what is compressed so well needs no other try
HEADER_BYTES = 32  # of a Blosc2 chunk; the last one tells what a chunk without data stands for
CHECKSUMS = "ukbob_checksums"
MAKER = "ukbob_preprocess"
MAP_MODE = {"mode": "r"} if os.name == "nt" else {"mmap_mode": "r"}  # mapped files read up to twice as fast


def save_array(path: Path, array: np.ndarray, patch_size: Sequence[int]) -> None:
    """Write a (Z, Y, X) or (C, Z, Y, X) array, atomically.

    Args:
        path: ``.b2nd`` file; folders are made.
        array: any numeric type and memory order.
        patch_size: voxels (z, y, x) that readers will ask for at a time; chunks are no larger, one channel each.

    Raises:
        UkbobError: the file cannot be written.
        ValueError: an array of fewer than three axes.
    """
    if array.ndim < 3 or len(patch_size) != 3:
        raise ValueError(f"need a (C, Z, Y, X) or (Z, Y, X) array and a 3D patch, got {array.shape} and {patch_size}")
    leading = (1,) * (array.ndim - 3)
    chunks = leading + tuple(max(1, min(int(p), n)) for p, n in zip(patch_size, array.shape[-3:], strict=True))
    blocks = leading + choose_block(chunks[-3:], array.dtype.itemsize)
    array = np.ascontiguousarray(array)
    layout = {"chunks": chunks, "blocks": blocks, "contiguous": True}
    with atomic_path(Path(path)) as temporary:
        if array.nbytes <= SMALL_BYTES:
            tried = []
            for choice in _choices(array.dtype):
                tried.append(_compress(array, choice, **layout))
                if _stored_bytes(tried[-1]) <= GOOD_RATIO * array.nbytes:
                    break
            stored = min(tried, key=_stored_bytes)
            _add_checksums(stored)
            temporary.write_bytes(stored.to_cframe())
        else:
            _write_large(temporary, array, layout)


def _write_large(path: Path, array: np.ndarray, layout: dict[str, Any]) -> None:
    """Compress straight into the file, by all threads; the middle chunk tells which compression suits best.

    Raises:
        OSError: the disk is full.
    """
    middle = np.ascontiguousarray(
        array[tuple(slice((n - c) // 2, (n - c) // 2 + c) for n, c in zip(array.shape, layout["chunks"], strict=True))]
    )
    choice = min(_choices(array.dtype), key=lambda choice: _stored_bytes(_compress(middle, choice, **layout)))
    with _failures_of_writing():
        stored = _compress(array, choice | {"nthreads": thread_count()}, **layout, urlpath=str(path))
        _add_checksums(stored)  # of what is in the file now
        StoredArray(path)


@contextmanager
def _failures_of_writing() -> Iterator[None]:
    """Blosc2 does not say why it failed."""
    try:
        yield
    except (RuntimeError, DatasetError) as error:
        raise OSError("writing failed, most likely because the disk is full") from error


def _compress(array: np.ndarray, choice: dict[str, Any], **how: Any) -> Any:
    # Its defaults start threads for every array, which take longer than small arrays do.
    return blosc2.asarray(array, cparams=choice, dparams={"nthreads": 1}, **how)


def _stored_bytes(stored: Any) -> int:
    return int(stored.schunk.cbytes)


def _add_checksums(stored: Any) -> None:
    sums = [_chunk_sum(stored, n) for n in range(stored.schunk.nchunks)]
    stored.schunk.vlmeta[CHECKSUMS] = {"layout": _layout(stored), "crc32": sums}


@contextmanager
def plane_writer(path: Path, shape: tuple[int, int, int, int], dtype: np.dtype[Any]) -> Iterator[PlaneWriter]:
    """Write a (C, Z, Y, X) array whose planes come in order, atomically; at most one row of chunks is in memory.

    Args:
        path: ``.b2nd`` file; folders are made.
        shape: of the whole array.
        dtype: of its values.

    Raises:
        UkbobError: the file cannot be written.
        ValueError: planes are missing at the end.
    """
    chunks = (1, *(min(edge, n) for edge, n in zip(STREAMED_CHUNK, shape[1:], strict=True)))
    blocks = (1, *choose_block(chunks[1:], dtype.itemsize))
    compression = _choices(dtype)[-1] | {"nthreads": thread_count()}
    with atomic_path(Path(path)) as temporary:
        layout = {"chunks": chunks, "blocks": blocks, "contiguous": True, "urlpath": str(temporary)}
        with _failures_of_writing():
            stored = blosc2.empty(shape, dtype=dtype, cparams=compression, dparams={"nthreads": 1}, **layout)
        writer = PlaneWriter(stored, chunks[1])
        yield writer  # errors of whoever makes the planes are their own
        writer.finish()
        with _failures_of_writing():
            _add_checksums(stored)
            StoredArray(temporary)


class PlaneWriter:
    """Appends planes to a Blosc2 array, a row of chunks at a time, so that none is compressed twice."""

    def __init__(self, stored: Any, depth: int) -> None:
        self._stored = stored
        channels, _, y, x = stored.shape
        self._waiting = np.empty((channels, depth, y, x), dtype=stored.dtype)
        self._written = self._count = 0

    def append(self, planes: np.ndarray) -> None:
        """Add (C, n, Y, X); values are converted to the array's type."""
        start = 0
        while start < planes.shape[1]:
            taken = min(planes.shape[1] - start, self._waiting.shape[1] - self._count)
            self._waiting[:, self._count : self._count + taken] = planes[:, start : start + taken]
            self._count, start = self._count + taken, start + taken
            if self._count == self._waiting.shape[1]:
                self._flush()

    def finish(self) -> None:
        """Write what waits.

        Raises:
            ValueError: not all planes have come.
        """
        self._flush()
        if self._written != self._stored.shape[1]:
            raise ValueError(f"{self._written} of {self._stored.shape[1]} planes were written")

    def _flush(self) -> None:
        if self._count:
            stop = self._written + self._count
            with _failures_of_writing():
                self._stored[:, self._written : stop] = np.ascontiguousarray(self._waiting[:, : self._count])
            self._written, self._count = stop, 0


def open_array(path: Path, maker: str = MAKER, mapped: bool = True) -> StoredArray:
    """Open a stored array for partial reads.

    Args:
        path: ``.b2nd`` file.
        maker: command that makes such files, for messages.
        mapped: map the file into memory, which is faster; but what was read once then counts as this process's memory.

    Raises:
        DatasetError: missing or damaged; names the file and the remedy.
    """
    if not Path(path).is_file():
        raise DatasetError(f"{path} does not exist; run {maker}")
    return StoredArray(Path(path), maker, mapped)


class StoredArray:
    """An array on disk: ``shape``, ``dtype``, and slicing to numpy arrays; for one thread at a time.

    A read decompresses only the blocks that it needs. Damage that lies elsewhere goes unnoticed until it is read.
    """

    def __init__(self, path: Path, maker: str = MAKER, mapped: bool = True) -> None:
        self._path, self._maker = path, maker
        try:
            how = MAP_MODE if mapped else {"mode": "r"}
            self._array = blosc2.open(str(path), dparams={"nthreads": 1}, **how)
            self.shape: tuple[int, ...] = tuple(self._array.shape)
            self.dtype: np.dtype[Any] = self._array.dtype
            # A file that another program wrote has no checksums and is taken as it is.
            found = CHECKSUMS in self._array.schunk.vlmeta
            record = self._array.schunk.vlmeta[CHECKSUMS] if found else {"layout": _layout(self._array), "crc32": []}
            self._sums = np.asarray(record["crc32"], dtype=np.int64)
            damaged = record["layout"] != _layout(self._array)
            damaged |= found and self._sums.shape != (self._array.schunk.nchunks,)
        except Exception as error:  # what a mangled header raises is anyone's guess
            raise _damaged(path, maker) from error
        if damaged:
            raise _damaged(path, maker)
        self._unchecked = np.ones(len(self._sums), dtype=bool)

    def __getitem__(self, key: Any) -> np.ndarray:
        """The selected part as a numpy array.

        Raises:
            DatasetError: a part of the file that is needed is damaged.
        """
        try:
            if self._unchecked.any():
                for n in self._chunks_touched(key):
                    if self._unchecked[n] and _chunk_sum(self._array, n) != self._sums[n]:
                        raise _damaged(self._path, self._maker)
                    self._unchecked[n] = False
            return np.asarray(self._array[key])
        except RuntimeError as error:  # Blosc2's own
            raise _damaged(self._path, self._maker) from error

    def _chunks_touched(self, key: Any) -> list[int]:
        """Numbers of the chunks that hold a selection (integers, slices, an ellipsis)."""
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis not in keys:
            keys.append(Ellipsis)
        at = keys.index(Ellipsis)
        keys[at : at + 1] = [slice(None)] * (len(self.shape) - len(keys) + 1)
        per_axis = [
            np.unique(np.atleast_1d(np.arange(n)[k]) // c)
            for n, c, k in zip(self.shape, self._array.chunks, keys, strict=True)
        ]
        grid = [-(-n // c) for n, c in zip(self.shape, self._array.chunks, strict=True)]
        return [int(n) for n in np.ravel_multi_index(np.ix_(*per_axis), grid).ravel()] if all(self.shape) else []


def choose_block(chunk: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Voxels (z, y, x) of a block: the chunk cut evenly, its longest edge first, until a block fits BLOCK_BYTES."""
    parts = [1, 1, 1]
    block = list(chunk)
    while block[0] * block[1] * block[2] * itemsize > BLOCK_BYTES:
        axis = max(range(3), key=lambda a: block[a])
        parts[axis] += 1
        block[axis] = -(-chunk[axis] // parts[axis])
    return tuple(block)


def _choices(dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    """Compressions to try, for their size; found by measurement (benchmarks/storage.py).

    Interpolated images are LZ4 with the bytes of a value apart: written and read half as fast again as ZSTD or faster,
    and a tenth larger. Where intensities were not interpolated, few values occur, and LZ4HC with the bytes as they are
    halves the size. Label maps are small, so that size decides: ZSTD.
    """
    if dtype.kind in "biu":  # sorting single bytes does nothing but take time
        kind = blosc2.Filter.NOFILTER if dtype.itemsize == 1 else blosc2.Filter.SHUFFLE
        return [{"codec": blosc2.Codec.ZSTD, "clevel": 5, "filters": [kind], "nthreads": 1}]
    apart = {"filters": [blosc2.Filter.SHUFFLE], "splitmode": blosc2.SplitMode.ALWAYS_SPLIT, "nthreads": 1}
    return [
        {"codec": blosc2.Codec.LZ4HC, "clevel": 2, "filters": [blosc2.Filter.NOFILTER], "nthreads": 1},
        {"codec": blosc2.Codec.LZ4, "clevel": 9, **apart},
    ]


def _layout(array: Any) -> str:
    """All that decides where a voxel lies in the file."""
    return f"{tuple(array.shape)} {tuple(array.chunks)} {tuple(array.blocks)} {array.dtype.str}"


def _chunk_sum(array: Any, number: int) -> int:
    """CRC-32 of a compressed chunk; of an all-zero one, whose header Blosc2 makes up on reading, only its kind."""
    chunk = array.schunk.get_chunk(number)
    return crc32(chunk[HEADER_BYTES - 1 :] if len(chunk) == HEADER_BYTES else chunk)


def _damaged(path: Path, maker: str) -> DatasetError:
    return DatasetError(f"{path} is damaged; delete it and run {maker} again")
