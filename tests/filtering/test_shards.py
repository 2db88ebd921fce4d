"""Features kept between runs: whatever way they are measured, the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ukbob_seg.filtering import measure
from ukbob_seg.filtering.cohort import measure_part, solf_filter
from ukbob_seg.filtering.config import FilterConfig
from ukbob_seg.parallel import Part
from ukbob_seg.shards import Shard, shard_size

TABLES = ("features.parquet", "flags.parquet", "bounds.json", "policy.json")


def run(cohort: Path, output: Path, **options: Any) -> dict[str, bytes]:
    solf_filter(cohort, output, FilterConfig(**{"workers": 1, "report": False, "quiet": True, **options}))
    return {name: (output / name).read_bytes() for name in TABLES}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of five cases."""
    monkeypatch.setattr(measure, "shard_size", lambda _: 5)


def test_shard_sizes() -> None:
    assert [shard_size(n) for n in (1, 24, 150, 2000, 51_761)] == [1, 1, 2, 31, 64]


def test_a_shard_survives_its_file(tmp_path: Path) -> None:
    rows = pd.DataFrame({"case": ["a", "a", "c"], "label": [1, 2, 1], "x": [0.1, float("nan"), 3.0]})
    shard = Shard({"a": "k1", "b": "k2", "c": "k3"}, rows, True)
    shard.save(tmp_path / "one.parquet")
    shard.save(tmp_path / "two.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    again = Shard.load(tmp_path / "one.parquet")
    assert again is not None
    assert (again.keys, again.complete) == (shard.keys, True)
    pd.testing.assert_frame_equal(again.rows, rows)
    part = shard.select({"b", "c"})
    assert part.keys == {"b": "k2", "c": "k3"}
    assert part.rows["case"].tolist() == ["c"]
    (tmp_path / "two.parquet").write_bytes(b"PAR1")
    assert Shard.load(tmp_path / "two.parquet") is None
    rows.to_parquet(tmp_path / "two.parquet")
    assert Shard.load(tmp_path / "two.parquet") is None


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("evidence", [False, True])
def test_parts_and_workers_do_not_change_a_byte(cohort: Path, tmp_path: Path, evidence: bool) -> None:
    whole = run(cohort, tmp_path / "whole", evidence=evidence)
    config = FilterConfig(workers=1, quiet=True, evidence=evidence)
    counts = [measure_part(cohort, tmp_path / "parts", Part(number, 3), config) for number in (3, 1, 2)]
    assert counts == [5, 10, 9]
    assert run(cohort, tmp_path / "parts", evidence=evidence) == whole
    assert run(cohort, tmp_path / "two", evidence=evidence, workers=2) == whole
    shards = [sorted((tmp_path / name / "shards").iterdir()) for name in ("whole", "parts", "two")]
    assert [len(files) for files in shards] == [5, 5, 5]
    for one, other in zip(shards[0], shards[1], strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_features_of_another_partition_are_used(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(cohort, tmp_path / "whole")
    monkeypatch.setattr(measure, "shard_size", lambda _: 7)
    run(cohort, tmp_path / "solf")
    monkeypatch.setattr(measure, "shard_size", lambda _: 4)
    for name in ("read_labels", "read_stored"):
        monkeypatch.setattr(measure, name, lambda *_: pytest.fail("a measured case was read again"))
    assert run(cohort, tmp_path / "solf") == whole
    assert len(list((tmp_path / "solf" / "shards").iterdir())) == 6
    monkeypatch.setattr(measure, "shard_size", lambda _: 24)
    assert run(cohort, tmp_path / "solf") == whole
    assert len(list((tmp_path / "solf" / "shards").iterdir())) == 1


@pytest.mark.usefixtures("small_shards")
def test_evidence_is_measured_once_and_left_out_when_not_asked_for(cohort: Path, tmp_path: Path) -> None:
    plain = run(cohort, tmp_path / "solf")
    full = run(cohort, tmp_path / "solf", evidence=True)
    assert full["features.parquet"] != plain["features.parquet"]
    assert "components" in pd.read_parquet(tmp_path / "solf" / "features.parquet")
    assert run(cohort, tmp_path / "solf") == plain
    config = FilterConfig(workers=1, quiet=True, evidence=True, report=False)
    assert solf_filter(cohort, tmp_path / "solf", config).computed == 0


@pytest.mark.usefixtures("small_shards")
def test_cases_that_fail_do_not_stop_the_others(cohort: Path, tmp_path: Path) -> None:
    broken = [cohort / "labelsTr" / f"blob_{k:03d}.nii.gz" for k in (3, 11)]
    kept = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(b"")
    with pytest.raises(Exception, match=r"(?s)2 of 24 cases cannot be measured.*blob_003.*blob_011.*--skip-unreadable"):
        run(cohort, tmp_path / "solf")
    config = FilterConfig(workers=1, quiet=True, report=False, skip_unreadable=True)
    summary = solf_filter(cohort, tmp_path / "solf", config)
    assert (summary.computed, summary.skipped, summary.cases) == (0, ("blob_003", "blob_011"), 22)
    for path, content in zip(broken, kept, strict=True):
        path.write_bytes(content)
    assert solf_filter(cohort, tmp_path / "solf", config).computed == 2
    assert run(cohort, tmp_path / "solf") == run(cohort, tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_each_file_is_read_once_and_again_only_when_rewritten(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    load = Shard.load.__func__  # type: ignore[attr-defined]

    def spy(cls: type[Shard], path: Path) -> Shard | None:
        reads.append(path.name)
        return load(cls, path)

    monkeypatch.setattr(Shard, "load", classmethod(spy))
    files = [f"shard_{k:05d}.parquet" for k in range(5)]
    whole = run(cohort, tmp_path / "solf")
    assert reads == files
    reads.clear()
    assert run(cohort, tmp_path / "solf") == whole
    assert reads == files
    reads.clear()
    os.utime(cohort / "labelsTr" / "blob_012.nii.gz", ns=(1, 1))
    assert run(cohort, tmp_path / "solf") == whole
    assert reads == [*files, files[2]]


@pytest.mark.usefixtures("small_shards")
def test_old_rows_of_cases_that_now_fail_are_left_out(cohort: Path, tmp_path: Path) -> None:
    run(cohort, tmp_path / "solf")
    failing = [f"blob_{k:03d}" for k in range(5, 10)]  # a whole shard: its file is not written again
    for name in failing:
        (cohort / "labelsTr" / f"{name}.nii.gz").write_bytes(b"")
    config = FilterConfig(workers=1, quiet=True, report=False, skip_unreadable=True)
    assert solf_filter(cohort, tmp_path / "solf", config).skipped == tuple(failing)
    assert (tmp_path / "solf" / "shards" / "shard_00001.parquet").is_file()
    assert set(failing).isdisjoint(pd.read_parquet(tmp_path / "solf" / "features.parquet")["case"])


def _slow_run(cohort: Path, output: Path) -> None:
    read = measure.read_labels

    def slowly(path: Path) -> Any:
        time.sleep(0.03)
        return read(path)

    measure.read_labels = slowly  # type: ignore[assignment]
    measure.shard_size = lambda _: 5  # type: ignore[assignment]
    run(cohort, output)


@pytest.mark.usefixtures("small_shards")
def test_killed_at_any_moment_it_ends_with_the_same_bytes(cohort: Path, tmp_path: Path) -> None:
    """SIGKILL after different numbers of shards, then the same command once more."""
    whole = run(cohort, tmp_path / "whole")
    context = multiprocessing.get_context("fork")
    for shards in (0, 2, 4):
        output = tmp_path / f"killed_{shards}"
        process = context.Process(target=_slow_run, args=(cohort, output))
        process.start()
        end = time.monotonic() + 60
        while len(list(output.glob("shards/shard_*.parquet"))) < shards and time.monotonic() < end:
            time.sleep(0.002)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (output / "policy.json").exists()
        assert run(cohort, output) == whole
        kept = {path.name: path.read_bytes() for path in output.glob("shards/shard_*")}
        assert kept == {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("shards/shard_*")}
