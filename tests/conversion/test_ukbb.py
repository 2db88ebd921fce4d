"""Miniature archives of the synthetic cohort, stitched: intensities, geometry, exchanged channels, incomplete ones."""

import csv
import dataclasses
import json
import os
from functools import cache

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("pydicom", reason="pip install 'ukbob_seg[dicom]'")

from ukbob_seg.cli.convert import main
from ukbob_seg.conversion.archives import find_archives, subject_of
from ukbob_seg.conversion.dixon import CONTRASTS
from ukbob_seg.conversion.stitching import resample
from ukbob_seg.conversion.ukbb import CohortOptions, convert_cohort
from ukbob_seg.conversion.ukbb_case import StitchOptions, stitch_archive
from ukbob_seg.dataset.image_io import Geometry, read_geometry, read_image
from ukbob_seg.demo.cohort import CohortConfig, make_case
from ukbob_seg.demo.dixon_archives import ArchivePlan, write_archive, write_archives
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.parallel import Cluster, Part

CONFIG = CohortConfig(shape=(96, 40, 56), seed=5)
SMALL = CohortConfig(shape=(60, 20, 28), seed=5)


@cache
def case_of(index, config=CONFIG):
    return make_case(config, index)


def _stitched(tmp_path, plan, options=None, index=0, config=CONFIG):
    path = tmp_path / f"{1000000 + index}_20201_2_0.zip"
    write_archive(path, case_of(index, config).image, config.geometry, plan, seed=index)
    return stitch_archive(path, options or StitchOptions())


def test_one_lattice_comes_back_as_it_was(tmp_path):
    found = _stitched(tmp_path, ArchivePlan())
    assert found.problems == ()
    assert found.ignored == ("localizer",)
    assert found.image.dtype == np.uint16
    assert found.geometry == CONFIG.geometry
    assert np.array_equal(found.image, np.rint(case_of(0).image))
    assert len(found.stations) == 6
    assert [row["station"] for row in found.stations] == [1, 2, 3, 4, 5, 6]
    tops = [row["top_mm"] for row in found.stations]
    assert tops == sorted(tops, reverse=True)
    assert not any(row["swapped"] for row in found.stations)


@pytest.mark.parametrize("index", [0, 1])
def test_gains_and_noise_are_matched_and_averaged(tmp_path, index):
    truth = case_of(index).image
    noise = 0.03 * float(np.percentile(truth[2], 99))
    gains = (1.0, 1.3, 0.75, 1.1, 0.9, 1.25)
    found = _stitched(tmp_path, ArchivePlan(gains=gains, noise=noise), index=index)
    factors = np.array([row["gain"] for row in found.stations])
    assert np.prod(factors) == pytest.approx(1, abs=1e-3)
    even = factors * gains
    assert even == pytest.approx(even.mean(), rel=0.02)
    body = case_of(index).body
    error = np.abs(found.image / even.mean() - truth)[:, body]
    unmatched = np.abs(_without_matching(tmp_path, gains, noise, index) - truth)[:, body]
    assert error.mean() < 1.1 * noise
    assert error.mean() < 0.5 * unmatched.mean()


def _without_matching(tmp_path, gains, noise, index):
    """What comes of the same archive when stations are blended as they are."""
    from ukbob_seg.conversion.dicom_series import read_series
    from ukbob_seg.conversion.dixon import find_stations
    from ukbob_seg.conversion.stitching import Block, stitch

    series, _ = read_series(tmp_path / f"{1000000 + index}_20201_2_0.zip")
    stations = find_stations(series, 6)[0]
    return stitch([Block(each.voxels(), each.geometry) for each in stations], [1.0] * 6, CONFIG.geometry)


def test_slices_of_other_thickness_are_interpolated(tmp_path):
    plan = ArchivePlan(slice_mm=(8.0, 12.0, 12.0, 12.0, 10.0, 9.0), overlap_mm=36.0)
    found = _stitched(tmp_path, plan)
    assert found.problems == ()
    assert found.geometry.spacing_mm == (8, 8, 8)
    assert [row["slice_spacing_mm"] for row in found.stations] == [8, 12, 12, 12, 10, 9]
    z = found.geometry.origin_mm[2] + 8.0 * np.arange(found.geometry.shape[0])
    have = (4 + 8.0 * np.arange(96), np.arange(40.0), np.arange(56.0))
    truth = resample(case_of(0).image, have, (z, *have[1:]))
    body = resample(case_of(0).body[None].astype(np.float32), have, (z, *have[1:]))[0] > 0.99
    relative = np.abs(found.image - truth)[:3, body].mean(axis=1) / truth[:3, body].mean(axis=1)
    assert relative.max() < 0.08
    # A shift by one slice would be far worse.
    shifted = np.abs(np.roll(found.image.astype(float), 1, axis=1) - truth)[:3, body].mean(axis=1)
    assert (relative * truth[:3, body].mean(axis=1) < 0.5 * shifted).all()


def test_the_grid_can_be_chosen(tmp_path):
    found = _stitched(tmp_path, ArchivePlan(), StitchOptions(spacing_mm=(8.0, 4.0, 16.0)))
    assert found.geometry.shape == (96, 79, 28)
    assert found.geometry.origin_mm == CONFIG.geometry.origin_mm
    assert np.abs(found.image[:, :, ::2].astype(float) - np.rint(case_of(0).image)[..., ::2]).max() <= 1


def test_rescaled_and_oblique_archives(tmp_path):
    found = _stitched(tmp_path, ArchivePlan(slope=0.25, oblique_degrees=5.0))
    assert found.image.dtype == np.float32  # quarters are no whole numbers
    assert np.abs(found.image - case_of(0).image).max() <= 0.126
    assert np.asarray(found.geometry.direction).reshape(3, 3)[2, 2] == pytest.approx(np.cos(np.deg2rad(5)))
    assert {row["oblique_degrees"] for row in found.stations} == {5.0}


GAINS = (1.1, 0.9, 1.2, 1.0, 0.8, 1.05)


@pytest.fixture(scope="module")
def scan_as_it_should_be(tmp_path_factory):
    """A stitched scan with gains and noise, by index; its plan."""
    found = {}

    def scan(index):
        if index not in found:
            noise = 0.03 * float(np.percentile(case_of(index).image[2], 99))
            plan = ArchivePlan(gains=GAINS, noise=noise)
            found[index] = plan, _stitched(tmp_path_factory.mktemp("right"), plan, index=index)
        return found[index]

    return scan


@pytest.mark.parametrize("swapped", [{1}, {2, 3}, {1, 4, 6}, {1, 2, 3, 4, 5, 6}], ids=str)
def test_exchanged_water_and_fat_are_found_and_repaired(tmp_path, scan_as_it_should_be, swapped):
    plan, right = scan_as_it_should_be(len(swapped) % 2)
    plan = dataclasses.replace(plan, swapped=frozenset(swapped))
    repaired = _stitched(tmp_path, plan, StitchOptions(repair_swaps=True), index=len(swapped) % 2)
    assert {row["station"] for row in repaired.stations if row["swapped"]} == swapped
    assert {row["station"] for row in repaired.stations if row["repaired"]} == swapped
    assert min(row["swap_confidence"] for row in repaired.stations) > 0.2
    # Noise is drawn before channels change places, so that a repaired archive is the right one, to the last voxel.
    assert np.array_equal(repaired.image, right.image)
    assert not any(row["swapped"] for row in right.stations)


def test_exchanged_water_and_fat_are_left_where_nobody_asks(tmp_path, scan_as_it_should_be):
    plan, right = scan_as_it_should_be(1)
    found = _stitched(tmp_path, dataclasses.replace(plan, swapped=frozenset({5})), index=1)
    assert [row["station"] for row in found.stations if row["swapped"]] == [5]
    assert not any(row["repaired"] for row in found.stations)
    alone = slice(16, 28)  # planes of station 5 alone
    assert np.array_equal(found.image[:2, alone], right.image[1::-1, alone])
    assert np.array_equal(found.image[2:], right.image[2:])


def test_a_folder_of_archives_becomes_a_dataset_and_goes_on(tmp_path, capsys):
    plan = ArchivePlan(swapped=frozenset({2}), overlap_mm=26.0)
    write_archives(tmp_path, SMALL, 3, plan)
    (tmp_path / "archives" / "1000000_20209_2_0.zip").write_bytes(b"of another field")
    dataset = tmp_path / "raw" / "Dataset020_Dixon"
    command = ["ukbb", "-i", str(tmp_path / "archives"), "-o", str(dataset), "--workers", "1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "3 archives read, 0 were done already; 3 complete" in said
    assert "3 stations with water and fat exchanged, left as they are" in said
    content = json.loads((dataset / "dataset.json").read_text())
    assert content["channel_names"] == dict(zip("0123", CONTRASTS, strict=True))
    images = sorted((dataset / "imagesTr").iterdir())
    assert len(images) == 12
    assert read_geometry(images[0]).difference(SMALL.geometry, ("", "")) is None
    stations = pd.read_csv(dataset / "stations.csv")
    assert len(stations) == 18
    assert set(stations.loc[stations.swapped, "station"]) == {2}
    cases = pd.read_parquet(dataset / "conversion.parquet")
    assert list(cases.swapped_stations) == ["2"] * 3
    assert cases.complete.all()
    assert list(cases.subject) == ["1000000", "1000001", "1000002"]
    before = {path: path.stat().st_mtime_ns for path in images}
    images[5].unlink()
    assert main(command) == 0
    assert "1 archives read, 2 were done already" in capsys.readouterr().out
    assert sum(path.stat().st_mtime_ns == before[path] for path in images) == 8
    assert main([*command, "--repair-swaps"]) == 2  # other options into the same folder
    assert "another options" in capsys.readouterr().err


def test_a_changed_archive_is_read_again(tmp_path):
    write_archives(tmp_path, SMALL, 1, ArchivePlan(overlap_mm=26.0))
    folder = tmp_path / "Dataset020_Dixon"
    first = convert_cohort(tmp_path / "archives", folder)
    assert (first.converted, first.kept, first.swapped) == (1, 0, 0)
    write_archives(tmp_path, SMALL, 1, ArchivePlan(overlap_mm=26.0, swapped=frozenset({4})))
    again = convert_cohort(tmp_path / "archives", folder)
    assert (again.converted, again.swapped) == (1, 1)


def test_incomplete_archives_stop_or_are_skipped(tmp_path, capsys):
    write_archives(tmp_path, SMALL, 1, ArchivePlan(overlap_mm=26.0))
    bad = {
        "1000001": ArchivePlan(overlap_mm=26.0, missing=frozenset({(3, "water")})),
        "1000002": ArchivePlan(overlap_mm=26.0, lost_slices=frozenset({(2, "fat", 4)})),
        "1000003": ArchivePlan(overlap_mm=26.0, truncated=2, localiser=False),
    }
    archives = tmp_path / "archives"
    for subject, plan in bad.items():
        write_archive(archives / f"{subject}_20201_2_0.zip", case_of(0, SMALL).image, SMALL.geometry, plan)
    content = (archives / "1000000_20201_2_0.zip").read_bytes()
    (archives / "1000004_20201_2_0.zip").write_bytes(content[: len(content) // 3])
    folder = tmp_path / "Dataset020_Dixon"
    command = ["ukbb", "-i", str(archives), "-o", str(folder), "--workers", "1"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "4 archives are incomplete" in said
    assert "--skip-incomplete" in said
    assert "1000001_20201_2_0.zip: station 3: water missing" in said
    assert "1000002_20201_2_0.zip: station 2: fat: 1 slice missing" in said
    assert "1000003_20201_2_0.zip: " in said
    assert "1000004_20201_2_0.zip: " in said
    assert not (folder / "dataset.json").exists()
    with (folder / "incomplete.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    assert main([*command, "--skip-incomplete"]) == 0
    said = capsys.readouterr().out
    assert "0 archives read, 5 were done already; 1 complete" in said
    assert "4 incomplete archives left out" in said
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 1
    assert len(list((folder / "imagesTr").iterdir())) == 4
    cases = pd.read_parquet(folder / "conversion.parquet").set_index("case")
    assert list(cases.complete) == [True, False, False, False, False]
    stations = pd.read_csv(folder / "stations.csv")
    row = stations[(stations.case == "1000001_20201_2_0") & (stations.station == 3)].iloc[0]
    assert row.contrasts == "fat inphase outphase"
    assert row.problems == "water missing"
    # The archive comes again, whole.
    (archives / "1000004_20201_2_0.zip").write_bytes(content)
    assert convert_cohort(archives, folder, CohortOptions(skip_incomplete=True)).complete == 2


def test_only_incomplete_archives_are_an_error_even_when_skipped(tmp_path):
    write_archives(tmp_path, SMALL, 1, ArchivePlan(overlap_mm=26.0, missing_stations=frozenset({6})))
    with pytest.raises(DatasetError, match="5 of 6 stations are there"):
        convert_cohort(tmp_path / "archives", tmp_path / "Dataset020_X", CohortOptions(skip_incomplete=True))
    options = CohortOptions(StitchOptions(stations=None))
    found = convert_cohort(tmp_path / "archives", tmp_path / "Dataset021_X", options)
    assert found.complete == 1


def test_parts_share_the_archives_and_the_last_run_writes_the_tables(tmp_path):
    write_archives(tmp_path, SMALL, 3, ArchivePlan(overlap_mm=26.0))
    folder = tmp_path / "Dataset020_Dixon"
    for number, count in ((1, 2), (2, 1)):
        done = convert_cohort(tmp_path / "archives", folder, CohortOptions(cluster=Cluster(part=Part(number, 2))))
        assert done.converted == count
        assert not (folder / "dataset.json").exists()
    done = convert_cohort(tmp_path / "archives", folder)
    assert (done.converted, done.kept, done.complete) == (0, 3, 3)
    assert len(pd.read_csv(folder / "stations.csv")) == 18


def test_workers_give_the_same_files(tmp_path):
    write_archives(tmp_path, SMALL, 2, ArchivePlan(overlap_mm=26.0))
    one = convert_cohort(tmp_path / "archives", tmp_path / "a" / "Dataset020_X", CohortOptions(workers=1, test=True))
    two = convert_cohort(tmp_path / "archives", tmp_path / "b" / "Dataset020_X", CohortOptions(workers=2, test=True))
    for path in sorted((one.folder / "imagesTs").iterdir()):
        assert path.read_bytes() == (two.folder / "imagesTs" / path.name).read_bytes()
    assert json.loads((two.folder / "dataset.json").read_text())["numTraining"] == 0


def test_unpacked_folders_are_archives_too(tmp_path):
    import zipfile

    (path,) = write_archives(tmp_path, SMALL, 1, ArchivePlan(overlap_mm=26.0))
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "folders" / "subject1")
    found = convert_cohort(tmp_path / "folders", tmp_path / "Dataset020_X")
    image, _ = read_image([found.folder / "imagesTr" / f"subject1_{k:04d}.nii.gz" for k in range(4)])
    assert np.array_equal(image, np.rint(case_of(0, SMALL).image))


def _dicom(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(bytes(128) + b"DICM")


def test_archives_are_found_at_any_depth(tmp_path, caplog):
    """UK Biobank's platform sorts bulk files into folders by the first digits of the participant's number."""
    for path in ("10/1000016_20201_2_0.zip", "10/1000017_20201_3_0.ZIP", "11/deep/1100002_20201_2_0.zip",
                 "10/1000016_20209_2_0.zip", "10/.hidden/1000019_20201_2_0.zip", "2_20201_2_0.zip"):  # fmt: skip
        (tmp_path / "Bulk" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "Bulk" / path).touch()
    (tmp_path / "Bulk" / "notes").mkdir()
    (tmp_path / "Bulk" / "notes" / "read.me").touch()
    _dicom(tmp_path / "Bulk" / "12" / "1200001_20201_2_0", "a.dcm")
    _dicom(tmp_path / "Bulk" / "volunteer" / "study" / "fat", "a.dcm")
    _dicom(tmp_path / "Bulk" / "volunteer" / "study" / "water", "b.dcm")
    (tmp_path / "Bulk" / "12" / "back").symlink_to(tmp_path / "Bulk")
    with caplog.at_level("WARNING"):
        found = find_archives(tmp_path / "Bulk")
    assert {name: str(path.relative_to(tmp_path / "Bulk")) for name, path in found.items()} == {
        "1000016_20201_2_0": "10/1000016_20201_2_0.zip",
        "1000017_20201_3_0": "10/1000017_20201_3_0.ZIP",
        "1100002_20201_2_0": "11/deep/1100002_20201_2_0.zip",
        "1200001_20201_2_0": "12/1200001_20201_2_0",
        "2_20201_2_0": "2_20201_2_0.zip",
        "volunteer": "volunteer",
    }
    assert "1 archives of other fields are passed over, such as 1000016_20209_2_0.zip" in caplog.text
    assert "folders without DICOM files are passed over" in caplog.text
    assert list(find_archives(tmp_path / "Bulk" / "volunteer" / "study" / "fat")) == ["fat"]
    (tmp_path / "Bulk" / "11" / "1000016_20201_2_0.zip").touch()
    with pytest.raises(
        DatasetError, match=r"two archives of the case 1000016_20201_2_0: 10/1000016_20201_2_0\.zip and 11"
    ):
        find_archives(tmp_path / "Bulk")


TINY = Geometry((14, 6, 6), (8.0, 3.0, 2.5), (-15.0, -14.0, 4.0))
ENDS = frozenset((2, name, 0) for name in CONTRASTS)


def _tiny(path, plan):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.rint(np.random.default_rng(1).uniform(1, 900, (4, *TINY.shape)))
    write_archive(path, image, TINY, dataclasses.replace(plan, stations=2, localiser=False))


def test_stations_shorter_than_in_most_archives_are_said(tmp_path, capsys):
    for k in range(4):
        plan = ArchivePlan(lost_slices=ENDS if k == 3 else frozenset())
        _tiny(tmp_path / "Bulk" / f"{k}0" / f"{k}_20201_2_0.zip", plan)
    folder = tmp_path / "Dataset020_X"
    command = ["ukbb", "-i", str(tmp_path / "Bulk"), "--stations", "2", "--workers", "1", "-o"]
    assert main([*command, str(folder)]) == 0
    said = capsys.readouterr().out
    assert "other numbers of slices than most archives have" in said
    assert "3_20201_2_0 (station 2)" in said
    stations = pd.read_csv(folder / "stations.csv")
    odd = stations[stations.slices != stations.usual_slices]
    assert [(row.case, row.station, row.usual_slices - row.slices) for row in odd.itertuples()] == [
        ("3_20201_2_0", 2, 1)
    ]
    cases = pd.read_parquet(folder / "conversion.parquet").set_index("case")
    assert list(cases.unusual_stations) == ["", "", "", "2"]
    _tiny(tmp_path / "Bulk" / "30" / "3_20201_2_0.zip", ArchivePlan(lost_slices=ENDS, listed=True))
    assert main([*command, str(folder), "--skip-incomplete"]) == 0
    assert "files that its manifest lists are not there" in (folder / "incomplete.csv").read_text()
    assert main([*command, str(tmp_path / "Dataset021_X"), "--ignore-manifest"]) == 0
    assert "4 complete" in capsys.readouterr().out


def test_what_is_usual_takes_three_alike():
    from ukbob_seg.conversion.usual import add_usual_slices, unusual_stations

    def table(*rows):
        return add_usual_slices(
            pd.DataFrame(rows, columns=["case", "station", "slices", "slice_spacing_mm"]).astype({"case": str})
        )

    assert add_usual_slices(pd.DataFrame([])).empty
    two = table(("a", 1, 44, 3.0), ("b", 1, 43, 3.0))
    assert two.usual_slices.isna().all()
    found = table(("a", 1, 44, 3.0), ("b", 1, 43, 3.0), ("c", 1, 44, 3.0), ("d", 1, 44, None), ("e", 1, 60, 2.2))
    assert found.usual_slices.fillna(0).tolist() == [44, 44, 44, 0, 0]  # incomplete, or of another protocol
    assert unusual_stations(found) == {"b": [1]}


def test_names_and_folders_that_cannot_be(tmp_path, capsys):
    assert subject_of("1234567_20201_3_0") == "1234567"
    assert subject_of("volunteer") == "volunteer"
    with pytest.raises(DatasetError, match="does not exist"):
        find_archives(tmp_path / "none")
    with pytest.raises(DatasetError, match="no archives"):
        find_archives(tmp_path)
    (tmp_path / "a b.zip").touch()
    with pytest.raises(DatasetError, match="cannot be the name of a case"):
        find_archives(tmp_path)
    os.rename(tmp_path / "a b.zip", tmp_path / "ab.zip")
    with pytest.raises(ConfigError, match="must end in DatasetXXX_Name"):
        convert_cohort(tmp_path, tmp_path / "out" / "Dixon")
    (tmp_path / "out" / "Dataset020_Other").mkdir(parents=True)
    with pytest.raises(ConfigError, match="number 20 belongs to"):
        convert_cohort(tmp_path, tmp_path / "out" / "Dataset020_Dixon")
    (tmp_path / "out" / "Dataset021_Mine").mkdir()
    (tmp_path / "out" / "Dataset021_Mine" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="not made by this command"):
        convert_cohort(tmp_path, tmp_path / "out" / "Dataset021_Mine")
    assert main(["ukbb", "-i", str(tmp_path), "-o", str(tmp_path / "Dataset020_X")]) == 2
    assert "lies in the source" in capsys.readouterr().err
    for wrong in ({"stations": 0}, {"spacing_mm": (1.0, 0.0, 1.0)}):
        with pytest.raises(ConfigError):
            StitchOptions(**wrong)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    (tmp_path / "archives").mkdir()
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ConfigError, match=r"pip install 'ukbob_seg\[dicom\]'"):
        convert_cohort(tmp_path / "archives", tmp_path / "Dataset020_X")


def test_a_spacing_too_coarse_for_the_overlaps_is_said(tmp_path):
    found = _stitched(tmp_path, ArchivePlan(), StitchOptions(spacing_mm=(70.0, 8.0, 8.0)))
    assert found.image is None
    assert "70 mm is too coarse" in found.problems[0]
    assert isinstance(CONFIG.geometry, Geometry)


@pytest.mark.slow
def test_a_dask_scheduler_does_the_same(tmp_path):
    distributed = pytest.importorskip("distributed", reason="pip install 'ukbob_seg[dask]'")
    write_archives(tmp_path, SMALL, 1, ArchivePlan(overlap_mm=26.0))
    with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster:
        options = CohortOptions(cluster=Cluster(scheduler=cluster.scheduler_address))
        found = convert_cohort(tmp_path / "archives", tmp_path / "Dataset020_X", options)
    assert found.complete == 1
    image, _ = read_image([found.folder / "imagesTr" / f"1000000_20201_2_0_{k:04d}.nii.gz" for k in range(4)])
    assert np.array_equal(image, np.rint(case_of(0, SMALL).image))
