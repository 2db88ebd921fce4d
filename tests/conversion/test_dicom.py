"""DICOM files and archives: order by position, irregular series, damaged and hostile archives."""

import stat
import zipfile

import numpy as np
import pytest

from ukbob_seg.conversion.dicom_files import ArchiveLimits, check_archive, read_files
from ukbob_seg.conversion.dicom_series import read_series
from ukbob_seg.conversion.dixon import CONTRASTS, contrast_of, find_stations
from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.demo.dixon_archives import ArchivePlan, write_archive
from ukbob_seg.errors import DatasetError

pytest.importorskip("pydicom", reason="pip install 'ukbob_seg[dicom]'")

GRID = Geometry((24, 10, 12), (8.0, 3.0, 2.5), (-15.0, -14.0, 4.0))
TWO = ArchivePlan(stations=2, overlap_mm=24.0)


@pytest.fixture
def image(rng):
    return np.rint(rng.uniform(0, 900, (4, *GRID.shape)))


def _write(folder, image, plan=TWO, name="1000000_20201_2_0.zip"):
    write_archive(folder / name, image, GRID, plan, seed=3)
    return folder / name


def test_slices_are_ordered_by_position_whatever_their_names(tmp_path, image):
    series, problems = read_series(_write(tmp_path, image))
    assert problems == []
    stations, found, ignored = find_stations(series, 2)
    assert (found, ignored) == ([], ["localizer"])
    assert [station.number for station in stations] == [1, 2]
    assert stations[0].extent_mm[1] == pytest.approx(4 + 23 * 8)  # the head first
    upper = stations[0].voxels()
    assert np.array_equal(upper, image[:, 24 - upper.shape[1] :])
    assert stations[1].geometry == Geometry(stations[1].geometry.shape, GRID.spacing_mm, GRID.origin_mm)
    instances = [each.dataset.InstanceNumber for each in stations[0].series["water"].slices]
    assert instances == sorted(instances, reverse=True)  # so the order came from elsewhere


def test_rescaled_and_oblique_slices(tmp_path, image):
    plan = ArchivePlan(stations=2, slope=0.5, oblique_degrees=10.0)
    stations, problems, _ = find_stations(read_series(_write(tmp_path, image, plan))[0], 2)
    assert problems == []
    assert stations[0].voxels() == pytest.approx(image[:, 24 - stations[0].geometry.shape[0] :])
    assert stations[0].oblique_degrees == pytest.approx(10, abs=1e-3)
    matrix = np.asarray(stations[0].geometry.direction).reshape(3, 3)
    assert matrix @ matrix.T == pytest.approx(np.eye(3), abs=1e-6)
    assert matrix[:, 2] == pytest.approx([0, -np.sin(np.deg2rad(10)), np.cos(np.deg2rad(10))], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"missing": frozenset({(2, "water")})}, "water missing"),
        ({"lost_slices": frozenset({(1, "fat", 3)})}, "fat: 1 slice missing, the first after 100.0 mm"),
        ({"lost_slices": frozenset({(1, "fat", 0)})}, "slices, 14 in another contrast"),
        ({"missing_stations": frozenset({1})}, "1 of 2 stations are there"),
    ],
)
def test_what_is_missing_is_said(tmp_path, image, changes, said):
    path = _write(tmp_path, image, ArchivePlan(stations=2, **changes))
    stations, problems, _ = find_stations(read_series(path)[0], 2)
    everything = "; ".join([*problems, *(problem for station in stations for problem in station.problems)])
    assert said in everything


def test_a_station_in_the_middle_that_is_missing_leaves_a_gap(tmp_path, image):
    plan = ArchivePlan(stations=3, missing_stations=frozenset({2}))
    _, problems, _ = find_stations(read_series(_write(tmp_path, image, plan))[0], None)
    assert len(problems) == 1
    assert "stations 1 and 2 lie" in problems[0]
    assert "a station is missing" in problems[0]


def test_duplicates_are_left_out_and_repetitions_resolved(tmp_path, image):
    plan = ArchivePlan(stations=2, duplicated=5, repeated=frozenset({2}))
    stations, problems, _ = find_stations(read_series(_write(tmp_path, image, plan))[0], 2)
    assert problems == []
    assert stations[1].repeated == 4
    assert np.array_equal(stations[1].voxels(), image[:, : stations[1].geometry.shape[0]])  # the later one
    plan = ArchivePlan(stations=2, duplicated=5)
    stations, problems, _ = find_stations(read_series(_write(tmp_path, image, plan))[0], 2)
    assert problems == []
    assert 1 <= sum(station.duplicates for station in stations) <= 5  # some may be of the localiser


def test_truncated_files_are_named(tmp_path, image):
    path = _write(tmp_path, image, ArchivePlan(stations=2, truncated=1, localiser=False))
    assert any("truncated" in problem for problem in read_series(path)[1])
    with zipfile.ZipFile(path) as archive:
        name = archive.namelist()[5]
        content = archive.read(name)
    for share in (0.25, 0.5, 0.9, 0.999):  # in the meta data, the tags, the pixels
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / "one.dcm").write_bytes(content[: int(len(content) * share)])
        series, problems = read_series(tmp_path / "cut")
        if series:
            with pytest.raises(DatasetError, match=r"one\.dcm is damaged or truncated"):
                series[0].voxels()
        else:
            assert "one.dcm" in problems[0]
            assert "truncated" in problems[0]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match="no zip archive, or truncated"):
        read_series(path)


def _modified(tmp_path, image, change):
    """A folder with one series, of which ``change(dataset, k)`` spoils the slices."""
    path = _write(tmp_path, image, ArchivePlan(stations=1, localiser=False))
    series = next(each for each in read_series(path)[0] if each.description.endswith("_W"))
    for k, each in enumerate(series.slices):
        change(each.dataset, k)
        each.dataset.save_as(tmp_path / "one" / f"{k}.dcm")
    return read_series(tmp_path / "one")


def _move(dataset, axis, by):
    dataset.ImagePositionPatient[axis] += by


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d, k: _move(d, 2, 0.8 * (k == 5)), "equally spaced"),
        (lambda d, k: _move(d, 1, k), "tilted gantry"),
        (lambda d, k: setattr(d, "PixelSpacing", [3.0, 2.5 + (k == 2)]), "differ in spacing_mm"),
        (lambda d, k: setattr(d, "ImageOrientationPatient", [1, 0, 0, 0, 1, 0] if k else [0, 1, 0, 0, 0, 1]), "orient"),
        (lambda d, k: d.ImagePositionPatient.__setitem__(2, 100.0) if k in (3, 4) else None, "two different slices"),
    ],
)  # fmt: skip
def test_irregular_series_are_refused(tmp_path, image, change, said):
    (tmp_path / "one").mkdir()
    (series,), problems = _modified(tmp_path, image, change)
    assert problems == []
    assert any(said in problem for problem in series.problems), series.problems


def test_a_file_without_geometry_is_named(tmp_path, image):
    (tmp_path / "one").mkdir()
    _, problems = _modified(tmp_path, image, lambda d, k: d.__delattr__("PixelSpacing") if k == 1 else None)
    assert problems == ["1.dcm has no PixelSpacing; export the scan again, with its geometry"]


def test_contrasts_by_type_and_by_description(tmp_path, image):
    from dataclasses import replace

    series = read_series(_write(tmp_path, image))[0]
    one = next(each for each in series if each.description.endswith("_W"))
    assert contrast_of(one) == "water"
    silent = replace(one, image_type=("ORIGINAL", "PRIMARY", "M"))
    assert contrast_of(silent) == "water"
    for description, contrast in (
        ("Dixon_BH_17s_in", "inphase"), ("Dixon_noBH_opp", "outphase"),
        ("Dixon_noBH_F", "fat"), ("Dixon_noBH_W", "water"), ("Dixon_noBH_in", "inphase"), ("Dixon_BH_17s_F", "fat"),
        ("mDIXON-F", "fat"), ("t1_vibe water", "water"),
        ("t1_vibe_in_phase", "inphase"), ("mDIXON out", "outphase"), ("localizer_within", None), ("pdff", None),
    ):  # fmt: skip
        assert contrast_of(replace(silent, description=description)) == contrast
    assert contrast_of(replace(one, description="")) == "water"
    with pytest.raises(DatasetError, match="fat and water at once"):
        contrast_of(replace(one, description="Dixon_BH_17s_F"))
    assert {contrast_of(each) for each in series} == {*CONTRASTS, None}


def _zip(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("UP", "../"), content)
    return path


def test_hostile_archives_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(DatasetError, match="leads out of it"):
        check_archive(_zip(tmp_path / "a.zip", UPUPevil=b"x"))
    for name in ("/etc/passwd", "C:/x", "a/../../b", "..\\b"):
        with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
            archive.writestr(zipfile.ZipInfo(name), b"x")
        with pytest.raises(DatasetError, match="leads out of it"):
            check_archive(tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        link = zipfile.ZipInfo("innocent.dcm")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DatasetError, match="holds a link"):
        check_archive(tmp_path / "link.zip")
    bomb = _zip(tmp_path / "bomb.zip", **{f"{k}.dcm": bytes(2**20) for k in range(70)})
    with pytest.raises(DatasetError, match="times its size"):
        list(read_files(bomb))
    with pytest.raises(DatasetError, match="more than the"):
        check_archive(bomb, ArchiveLimits(total_bytes=2**25))
    with pytest.raises(DatasetError, match="more than the"):
        check_archive(bomb, ArchiveLimits(members=10))
    with pytest.raises(DatasetError, match="no DICOM slice is as large"):
        check_archive(bomb, ArchiveLimits(file_bytes=2**19))


def test_an_archive_that_lies_about_sizes_is_not_followed(tmp_path):
    path = _zip(tmp_path / "liar.zip", **{"a.dcm": bytes(2**20)})
    content = bytearray(path.read_bytes())
    size = (2**20).to_bytes(4, "little")
    while (at := content.find(size)) >= 0:
        content[at : at + 4] = (100).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.dcm is damaged"):
        list(read_files(path))


def test_encrypted_members_are_refused(tmp_path):
    path = _zip(tmp_path / "secret.zip", **{"a.dcm": b"abc"})
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02")
    content[at + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="encrypted"):
        check_archive(path)
