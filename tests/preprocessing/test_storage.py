"""Storage: what is written is what is read, in any part, and damage never goes unnoticed."""

import subprocess
import zlib

import blosc2
import numpy as np
import pytest
from scipy import ndimage

from ukbob_seg.errors import DatasetError, UkbobError
from ukbob_seg.preprocessing.storage import BLOCK_BYTES, choose_block, open_array, save_array


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("shape", [(2, 40, 50, 30), (1, 1, 5, 3), (70, 33, 65), (1, 1, 1, 1), (0, 4, 5)])
def test_round_trip_in_any_memory_order(tmp_path, rng, dtype, shape):
    array = (rng.random(shape) * 200).astype(dtype)
    array[..., :20, :, :] = 0  # chunks of zeros are stored in another way
    save_array(tmp_path / "a.b2nd", np.asfortranarray(array), (32, 32, 32))
    stored = open_array(tmp_path / "a.b2nd")
    assert stored.shape == shape
    assert stored.dtype == dtype
    whole = stored[:]
    assert isinstance(whole, np.ndarray)
    assert whole.dtype == dtype
    assert np.array_equal(whole, array)
    assert [path.name for path in tmp_path.iterdir()] == ["a.b2nd"]


def test_strided_views_and_constant_arrays(tmp_path, rng):
    array = rng.random((40, 50, 60)).astype(np.float32)[::2, ::-1, 5:55:3]
    save_array(tmp_path / "a.b2nd", array, (16, 16, 16))
    assert np.array_equal(open_array(tmp_path / "a.b2nd")[:], array)
    for value in (0, 7):
        save_array(tmp_path / "b.b2nd", np.full((50, 40, 30), value, np.uint8), (16, 16, 16))
        assert (open_array(tmp_path / "b.b2nd")[:] == value).all()


PARTS = [
    (slice(0, 1), slice(1, 5), slice(30, 40), slice(2, 3)),
    (slice(None), slice(7, 39), slice(0, 50), slice(-9, None)),
    (..., slice(0, 1), slice(1, 5), slice(2, 3)),
    (1, ..., 29),
    (1, slice(3, 20)),
    (np.int64(0), 39, 49, 0),
    (slice(None), slice(5, 5), slice(0, 3), slice(0, 3)),
    (slice(None), slice(30, 90), slice(40, 70), slice(20, 50)),
    -1,
    ...,
]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_a_part_equals_the_slice(tmp_path, rng, part):
    array = rng.random((2, 40, 50, 30)).astype(np.float32)
    save_array(tmp_path / "a.b2nd", array, (16, 32, 16))
    assert np.array_equal(open_array(tmp_path / "a.b2nd")[part], array[part])


def test_a_read_needs_only_the_chunks_it_touches(tmp_path, rng):
    """Damage in one corner: the opposite corner still reads, the damaged one does not."""
    path = tmp_path / "a.b2nd"
    save_array(path, rng.random((64, 64, 64)), (32, 32, 32))
    content = bytearray(path.read_bytes())
    content[1000] ^= 1  # within the data of the first chunk
    path.write_bytes(content)
    stored = open_array(path)
    assert stored[40:64, 40:64, 40:64].shape == (24, 24, 24)
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"a\.b2nd is damaged; delete it and run ukbob_preprocess again"):
            stored[:8, :8, :8]


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_no_damage_gives_wrong_numbers(tmp_path, rng, dtype):
    """Cut, overwritten or with a flipped bit anywhere: an error, or the right numbers."""
    array = (rng.random((2, 30, 40, 20)) * 9).astype(dtype)
    array[:, :16] = 0
    path = tmp_path / "a.b2nd"
    save_array(path, array, (16, 16, 16))
    whole = path.read_bytes()
    damaged = [whole[: int(n)] for n in rng.integers(0, len(whole), 30)]
    damaged += [b"garbage" * 100, b""]
    places = np.concatenate([np.arange(0, 250, 3), len(whole) - np.arange(1, 250, 3), rng.integers(0, len(whole), 100)])
    for place in places:
        content = bytearray(whole)
        content[int(place)] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(content))
    messages = []
    for number, content in enumerate(damaged):
        copy = tmp_path / f"{number}.b2nd"
        copy.write_bytes(content)
        try:
            found = open_array(copy)[:]
        except DatasetError as error:
            messages.append(str(error))
        else:
            assert np.array_equal(found, array)
    assert all("b2nd is damaged; delete it" in message for message in messages)
    assert len(messages) >= 32 + 100  # all that are cut or garbage, and most flipped bits


def test_a_missing_file_names_the_remedy(tmp_path):
    with pytest.raises(DatasetError, match="does not exist; run ukbob_preprocess"):
        open_array(tmp_path / "b.b2nd")


def test_arrays_of_other_programs_can_be_read(tmp_path, rng):
    array = rng.random((1, 20, 20, 20)).astype(np.float32)
    blosc2.asarray(array, urlpath=str(tmp_path / "a.b2nd"), chunks=(1, 8, 8, 8), blocks=(1, 8, 8, 8))
    assert np.array_equal(open_array(tmp_path / "a.b2nd")[0, 3:9], array[0, 3:9])


def test_files_of_earlier_versions_can_be_read(tmp_path, rng):
    """ZSTD with shuffling, and checksums by zlib."""
    array = rng.random((2, 20, 30, 20)).astype(np.float32)
    old = blosc2.asarray(
        array, chunks=(1, 16, 16, 16), blocks=(1, 16, 16, 16), contiguous=True,
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": 1, "filters": [blosc2.Filter.SHUFFLE]},
    )  # fmt: skip
    sums = [zlib.crc32(old.schunk.get_chunk(n)) for n in range(old.schunk.nchunks)]
    layout = f"{old.shape} {old.chunks} {old.blocks} {old.dtype.str}"
    old.schunk.vlmeta["ukbob_checksums"] = {"layout": layout, "crc32": sums}
    (tmp_path / "a.b2nd").write_bytes(old.to_cframe())
    assert np.array_equal(open_array(tmp_path / "a.b2nd")[:], array)


def test_few_distinct_intensities_are_stored_smaller(tmp_path, rng):
    """As whole numbers after a z-score are; interpolated ones take most of their size."""
    smooth = ndimage.gaussian_filter(rng.normal(size=(64, 64, 64)), 1).astype(np.float32)
    levels = ((smooth * 100).round() / 37.7).astype(np.float32)
    sizes = []
    for name, array in (("levels", levels), ("smooth", smooth)):
        save_array(tmp_path / name, array, (32, 32, 32))
        assert np.array_equal(open_array(tmp_path / name)[:], array)
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[0] < 0.6 * sizes[1]
    assert sizes[1] < array.nbytes


def test_a_full_disk_leaves_the_old_file(tmp_path, rng):
    resource = pytest.importorskip("resource", reason="file size limits need a Unix system")
    path = tmp_path / "a.b2nd"
    old = rng.random((8, 8, 8))
    save_array(path, old, (8, 8, 8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UkbobError, match=r"cannot write .*a\.b2nd"):
            save_array(path, rng.random((40, 40, 40)), (8, 8, 8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert np.array_equal(open_array(path)[:], old)
    assert len(list(tmp_path.iterdir())) == 1


def test_unusable_arguments(tmp_path):
    with pytest.raises(ValueError, match="3D patch"):
        save_array(tmp_path / "a.b2nd", np.zeros((4, 5)), (2, 2, 2))
    with pytest.raises(ValueError, match="3D patch"):
        save_array(tmp_path / "a.b2nd", np.zeros((4, 5, 6)), (2, 2))


@pytest.mark.parametrize("chunk", [(96, 96, 96), (1, 512, 512), (32, 64, 32), (128, 128, 128), (3, 1, 700), (1, 1, 1)])
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_blocks_fit_the_cache_and_fill_the_chunk(chunk, itemsize):
    block = choose_block(chunk, itemsize)
    assert np.prod(block) * itemsize <= BLOCK_BYTES
    assert all(b <= c for b, c in zip(block, chunk, strict=True))
    blocks = np.ceil(np.array(chunk) / block)
    assert np.prod(blocks * block) <= 1.2 * np.prod(chunk)  # little padding
    if np.prod(chunk) * itemsize > BLOCK_BYTES:
        assert np.prod(block) * itemsize > BLOCK_BYTES / 4


def test_blocks_cut_the_usual_chunks_evenly():
    assert choose_block((96, 96, 96), 4) == (32, 32, 32)
    assert choose_block((96, 96, 96), 1) == (48, 48, 48)
    assert choose_block((1, 512, 512), 4) == (1, 171, 171)


@pytest.mark.parametrize("channels", [2, 6])  # made in memory, and straight on disk
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path, rng, channels):
    """On a real full disk, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        path = disk / "case.b2nd"
        save_array(path, np.ones((1, 8, 8, 8), np.float32), (8, 8, 8))
        before = path.read_bytes()
        with pytest.raises(UkbobError, match=r"cannot write .*case\.b2nd: .*(disk is full|No space left)"):
            save_array(path, rng.normal(size=(channels, 100, 100, 100)).astype(np.float32), (32, 32, 32))
        assert path.read_bytes() == before
        assert [entry.name for entry in disk.iterdir()] == ["case.b2nd"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
