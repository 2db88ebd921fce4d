"""Random patch reads from preprocessed arrays: this package's files against npy, npz, zarr and nnU-Net's settings.

    python benchmarks/storage.py                                     # a made-up Dixon scan and a map of 72 organs
    python benchmarks/storage.py --image ct_0000.nii.gz --labels ct_labels.nii.gz
    python benchmarks/storage.py --sweep                             # codecs, levels, filters, chunks and blocks

Every format stores the same arrays (float32 image, uint8 or uint16 labels); patches are compared first. In each
round every format reads the same random patches with one thread, all channels, from files in the page cache.
Printed: time to write, size, patches per second while the file is open (medians over the rounds), milliseconds to
open the file and read one patch (training does that where it has more cases than it holds open; our checksums are
tested then), and the megabytes that Python allocates for one patch. Times are processor time, so that other work on
the machine disturbs them less. zarr is a need of this script alone: pip install zarr.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from solf import torso

from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.demo.cohort import CohortConfig, make_case
from ukbob_seg.preprocessing.resampling import resample_image
from ukbob_seg.preprocessing.storage import choose_block, open_array, save_array

Shape = tuple[int, ...]
Start = tuple[int, ...]
KIB = 1 << 10
APART = blosc2.SplitMode.ALWAYS_SPLIT  # the first bytes of all values are compressed apart from the second, ...
LOADS_ALL = ("npz (compressed)",)  # every read loads the whole file, so that few of them have to do


@dataclass
class Entry:
    """One way to store an array, and what was measured of it."""

    name: str
    write: Callable[[Path, np.ndarray], None]
    open: Callable[[Path], Any]
    path: Path = Path()
    write_s: float = 0.0
    size: int = 0
    allocated: int = 0
    read_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)


def made_up_image(shape: Shape, seed: int) -> np.ndarray:
    """A four-channel Dixon scan with Rician noise, resampled by a cubic spline and z-scored, as preprocessing does."""
    coarse = tuple(round(n / 1.25) for n in shape)
    image = resample_image(make_case(CohortConfig(coarse, seed), 0).image, shape)
    axes = (1, 2, 3)
    return ((image - image.mean(axes, keepdims=True)) / image.std(axes, keepdims=True)).astype(np.float32)


def nnunet_layout(shape: Shape, patch: Shape, itemsize: int) -> tuple[Shape, Shape]:
    """Chunk and block (z, y, x) that nnU-Net v2 chooses for an array and a patch.

    Blocks start at the patch rounded up to powers of two and are halved along the axis that covers most of 1.5
    patches until 128 KiB hold them; chunks grow from a block, block by block along the axis that covers least, to at
    most 1.5 patches along an axis and 6 MiB.

    Reference: nnunetv2/training/dataloading/nnunet_dataset.py, comp_blosc2_params.
    """
    target = [min(n, int(1.5 * p)) for n, p in zip(shape, patch, strict=True)]
    block = [min(n, 1 << (p - 1).bit_length()) for n, p in zip(shape, patch, strict=True)]
    while np.prod(block) * itemsize > 128 * KIB:
        axis = max((a for a in range(3) if block[a] > 1), key=lambda a: (block[a] / target[a], a))
        block[axis] = 1 << ((block[axis] - 1).bit_length() - 1)
    chunk = list(block)
    while True:
        grown = {a: min(chunk[a] + block[a], target[a]) for a in range(3) if chunk[a] < target[a]}
        fits = [a for a in grown if np.prod(chunk) // chunk[a] * grown[a] * itemsize <= 6 * KIB**2]
        if not fits:
            return tuple(chunk), tuple(block)
        axis = min(fits, key=lambda a: (chunk[a] / target[a], -shape[a], a))
        chunk[axis] = grown[axis]


def write_blosc(path: Path, array: np.ndarray, chunk: Shape, block: Shape, **compression: Any) -> None:
    """Chunk and block (z, y, x) hold one channel, or the number given in front."""
    leading = (1,) * (array.ndim - len(chunk))
    compression["filters"] = [compression["filters"]]
    blosc2.asarray(
        array, urlpath=str(path), mode="w", contiguous=True, chunks=leading + chunk, blocks=leading + block,
        cparams={"nthreads": 1, **compression},
    )  # fmt: skip


def open_blosc(path: Path) -> Any:
    return blosc2.open(str(path), mmap_mode="r", dparams={"nthreads": 1})


def write_nnunet(path: Path, array: np.ndarray, patch: Shape) -> None:
    """LZ4HC level 5, with byte shuffling where that makes the middle of the array smaller."""
    chunk, block = nnunet_layout(array.shape[-3:], patch, array.itemsize)
    middle = array[
        (..., *(slice((n - c) // 2, (n - c) // 2 + c) for n, c in zip(array.shape[-3:], chunk, strict=True)))
    ]
    middle = np.ascontiguousarray(middle if array.ndim == 3 else middle[0])
    common: dict[str, Any] = {"codec": blosc2.Codec.LZ4HC, "clevel": 5}
    sizes = {}
    for choice in (blosc2.Filter.NOFILTER, blosc2.Filter.SHUFFLE):
        trial = blosc2.asarray(middle, chunks=chunk, blocks=block, cparams={**common, "filters": [choice]})
        sizes[choice] = trial.schunk.cbytes
    write_blosc(path, array, chunk, block, filters=min(sizes, key=lambda choice: sizes[choice]), **common)


def competitors(patch: Shape) -> list[Entry]:
    """This package first, then the others."""
    entries = [
        Entry("ukbob_seg", lambda path, array: save_array(path, array, patch), open_array),
        Entry("nnU-Net v2 (Blosc2, LZ4HC)", partial(write_nnunet, patch=patch), open_blosc),
        Entry("npy (memory-mapped)", np.save, partial(np.load, mmap_mode="r")),
        Entry("npz (compressed)", lambda path, array: np.savez_compressed(path, array), _NpzReader),
    ]
    try:
        import zarr
    except ImportError:
        print("zarr is not installed, so its rows are left out (pip install zarr)")
        return entries

    def write_zarr(path: Path, array: np.ndarray, **how: Any) -> None:
        chunks = (1,) * (array.ndim - 3) + tuple(min(p, n) for p, n in zip(patch, array.shape[-3:], strict=True))
        zarr.create_array(store=str(path), data=array, chunks=chunks, **how)

    blosc = zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="shuffle")
    zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1, "codec_pipeline.batch_size": 1})
    read = partial(zarr.open_array, mode="r")
    return [
        *entries,
        Entry("zarr v3 (its default, Zstd)", write_zarr, read),
        Entry("zarr v3 (Blosc, LZ4)", partial(write_zarr, compressors=[blosc]), read),
    ]


class _NpzReader:
    """A part of an npz needs the whole array."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getitem__(self, key: Any) -> np.ndarray:
        with np.load(self._path) as file:
            return file["arr_0"][key]


def variants(array: np.ndarray, patch: Shape) -> list[Entry]:
    """Codecs by level and filter; then chunks and blocks with the codec that is shipped."""
    image = array.dtype.kind == "f"
    shipped: dict[str, Any] = {"codec": blosc2.Codec.ZSTD, "clevel": 5, "filters": blosc2.Filter.NOFILTER}
    if image:
        shipped = {"codec": blosc2.Codec.LZ4, "clevel": 9, "filters": blosc2.Filter.SHUFFLE, "splitmode": APART}

    def entry(name: str, chunk: Shape, block: Shape, **changes: Any) -> Entry:
        write = partial(write_blosc, chunk=chunk, block=block, **{**shipped, **changes})
        return Entry(name, write, open_blosc)

    def clip(edges: Shape) -> Shape:
        return tuple(min(e, n) for e, n in zip(edges, array.shape[-3:], strict=True))

    usual = clip(patch)
    block = choose_block(usual, array.itemsize)
    entries = [
        Entry("ukbob_seg", lambda path, array: save_array(path, array, patch), open_array),
        entry("the same without checksums or trial", usual, block),
    ]
    for codec in (blosc2.Codec.LZ4, blosc2.Codec.LZ4HC, blosc2.Codec.ZSTD, blosc2.Codec.BLOSCLZ):
        for level in (1, 3, 5, 8):
            for kind in (blosc2.Filter.SHUFFLE, blosc2.Filter.BITSHUFFLE, blosc2.Filter.NOFILTER):
                name = f"{codec.name} {level} {kind.name}"
                how = {"codec": codec, "clevel": level, "filters": kind, "splitmode": blosc2.SplitMode.AUTO_SPLIT}
                entries.append(entry(name, usual, block, **how))
    for edges in ((64,) * 3, (128,) * 3, tuple(2 * p for p in patch)):
        chunk = clip(edges)
        entries.append(entry(f"chunk {chunk}", chunk, choose_block(chunk, array.itemsize)))
    for edge in (12, 16, 24, 32, 48, 96):
        entries.append(entry(f"block {edge}^3", usual, clip((edge,) * 3)))
        if array.ndim == 4:
            together = (len(array), *usual)
            entries.append(entry(f"chunk of all channels, block {edge}^3", together, (1, *clip((edge,) * 3))))
    return entries


def starts(shape: Shape, patch: Shape, seed: int) -> Iterator[Start]:
    """Endless random positions of a patch."""
    generator = np.random.default_rng(seed)
    while True:
        yield tuple(int(generator.integers(0, n - p + 1)) for n, p in zip(shape, patch, strict=True))


def part(start: Start, patch: Shape) -> tuple[Any, ...]:
    return (..., *(slice(s, s + p) for s, p in zip(start, patch, strict=True)))


def read(source: Any, where: tuple[Any, ...]) -> np.ndarray:
    """A patch as an array of its own: a view into a mapped file has read nothing yet."""
    found = source[where]
    return np.array(found) if isinstance(found, np.memmap) else np.asarray(found)


def disk_bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def store(entries: list[Entry], array: np.ndarray, patch: Shape, folder: Path, seed: int) -> None:
    """Write every entry, and compare what it reads with the array."""
    checks = [part(next(starts(array.shape[-3:], patch, seed + n)), patch) for n in range(3)]
    for number, entry in enumerate(entries):
        suffix = {"npy (memory-mapped)": ".npy", "npz (compressed)": ".npz"}.get(entry.name, ".b2nd")
        entry.path = folder / f"{number}{suffix}"
        started = time.process_time()
        entry.write(entry.path, array)
        entry.write_s = time.process_time() - started
        entry.size = disk_bytes(entry.path)
        source = entry.open(entry.path)
        for where in checks:
            if not np.array_equal(read(source, where), array[where]):
                sys.exit(f"{entry.name} reads another patch than it was given")
        tracemalloc.start()
        read(source, checks[0])
        entry.allocated = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def compete(entries: list[Entry], array: np.ndarray, patch: Shape, options: argparse.Namespace) -> None:
    """Time reads, all entries in every round."""
    positions = starts(array.shape[-3:], patch, options.seed)
    sources = {entry.name: entry.open(entry.path) for entry in entries}
    for source in sources.values():
        source[...]  # ours has then tested every checksum
    for _ in range(options.rounds):
        places = [part(next(positions), patch) for _ in range(options.reads)]
        for entry in entries:
            few = places[:1] if entry.name in LOADS_ALL else places
            started = time.process_time()
            for where in few:
                read(sources[entry.name], where)
            entry.read_s.append((time.process_time() - started) / len(few))
            started = time.process_time()
            read(entry.open(entry.path), places[0])
            entry.first_s.append(time.process_time() - started)


def report(title: str, entries: list[Entry], array: np.ndarray) -> None:
    print(f"\n{title}: {'x'.join(map(str, array.shape))} {array.dtype}, {array.nbytes / 1e6:.0f} MB")
    print(f"{'':42s} {'write':>8s} {'size':>9s} {'patches':>9s} {'ratio':>6s} {'open, read':>11s} {'allocated':>10s}")
    ours = float(np.median(entries[0].read_s))
    for entry in entries:
        once = float(np.median(entry.read_s))
        print(
            f"{entry.name:42s} {entry.write_s:6.2f} s {entry.size / 1e6:6.2f} MB {1 / once:7.1f}/s {ours / once:6.2f} "
            f"{1e3 * float(np.median(entry.first_s)):8.1f} ms {entry.allocated / 1e6:7.1f} MB"
        )


def main() -> None:
    """Parse, store, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, nargs="+", help="channels of a real image; without it a made-up one")
    parser.add_argument("--labels", type=Path, help="a real label map; without it a made-up one")
    parser.add_argument("--shape", type=int, nargs=3, default=(320, 160, 224), help="of the made-up ones")
    parser.add_argument("--patch", type=int, nargs=3, default=(96, 96, 96))
    parser.add_argument("--factor", type=float, default=1.0, help="resample a real image by this first")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--reads", type=int, default=8, help="patches that each format reads in a round")
    parser.add_argument("--sweep", action="store_true", help="variants of Blosc2 instead of the competitors")
    parser.add_argument("--only", choices=("image", "labels"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    blosc2.set_nthreads(1)
    arrays: dict[str, np.ndarray] = {}
    shape = tuple(options.shape)
    if options.only in (None, "image"):
        if options.image:
            image = read_image(options.image)[0].astype(np.float32)
            arrays["image"] = resample_image(image, tuple(round(n * options.factor) for n in image.shape[1:]))
        else:
            arrays["image"] = made_up_image(shape, options.seed)
    if options.only in (None, "labels"):
        labels = read_labels(options.labels)[0] if options.labels else torso(shape, 72, options.seed)
        arrays["labels"] = np.ascontiguousarray(labels.astype(np.uint8 if labels.max() < 256 else np.uint16))
    for title, array in arrays.items():
        patch = tuple(min(p, n) for p, n in zip(options.patch, array.shape[-3:], strict=True))
        entries = variants(array, patch) if options.sweep else competitors(patch)
        with tempfile.TemporaryDirectory() as folder:
            store(entries, array, patch, Path(folder), options.seed)
            compete(entries, array, patch, options)
        report(title, entries, array)


if __name__ == "__main__":
    main()
