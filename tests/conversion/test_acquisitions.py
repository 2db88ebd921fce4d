"""Stations that were scanned more than once, or are another person's: nothing is stitched of two acquisitions."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="pip install 'ukbob_seg[dicom]'")

from ukbob_seg.conversion.acquisitions import choose_acquisition
from ukbob_seg.conversion.dicom_series import read_series
from ukbob_seg.conversion.dixon import CONTRASTS, contrast_of, find_stations
from ukbob_seg.conversion.ukbb_case import StitchOptions, stitch_archive
from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.demo.dixon_archives import ArchivePlan, write_archive

GRID = Geometry((14, 6, 6), (8.0, 3.0, 2.5), (-15.0, -14.0, 4.0))
TWICE = ArchivePlan(stations=2, repeated=frozenset({2}))
FAT, WATER = frozenset({(2, "fat")}), frozenset({(2, "water")})


@pytest.fixture
def image(rng):
    return np.rint(rng.uniform(0, 900, (4, *GRID.shape))) * 2


def _stitched(tmp_path, image, plan, **options):
    write_archive(tmp_path / "1000000_20201_2_0.zip", image, GRID, plan, seed=3)
    return stitch_archive(tmp_path / "1000000_20201_2_0.zip", StitchOptions(stations=2, **options))


def _lower(tmp_path, image, plan):
    """Voxels of the station that was scanned twice, and its share of the image."""
    write_archive(tmp_path / "1000000_20201_2_0.zip", image, GRID, plan, seed=3)
    station = find_stations(read_series(tmp_path / "1000000_20201_2_0.zip")[0], 2)[0][1]
    assert station.problems == ()
    return station.voxels(), image[:, : station.geometry.shape[0]]


def test_the_later_of_two_whole_scans_is_taken(tmp_path, image):
    found, right = _lower(tmp_path, image, TWICE)
    assert np.array_equal(found, right)


@pytest.mark.parametrize("missing", [FAT, WATER, FAT | WATER])
def test_a_later_scan_that_lacks_a_contrast_gives_way_as_a_whole(tmp_path, image, missing):
    found, right = _lower(tmp_path, image, replace(TWICE, later_missing=missing))
    assert np.array_equal(found, right / 2)  # the earlier one has half the signal, in all contrasts


def test_two_scans_that_only_together_have_all_contrasts_are_refused(tmp_path, image):
    found = _stitched(tmp_path, image, replace(TWICE, later_missing=FAT, earlier_missing=WATER))
    assert found.image is None
    (problem,) = found.problems
    assert (
        problem == "station 2: scanned 2 times, never completely (at 12:01:00: water missing; at 12:01:25: fat missing)"
    )
    # Also where no contrast is there twice.
    rest = frozenset((2, name) for name in CONTRASTS if name != "fat")
    found = _stitched(tmp_path, image, replace(TWICE, later_missing=FAT, earlier_missing=rest))
    assert "scanned 2 times, never completely" in found.problems[0]


def test_repeated_scans_without_any_time_are_refused(tmp_path, image):
    found = _stitched(tmp_path, image, replace(TWICE, untimed=True))
    assert found.image is None
    assert "fat is there 2 times, and no AcquisitionTime, SeriesTime or AcquisitionNumber tells" in found.problems[0]
    assert _stitched(tmp_path, image, ArchivePlan(stations=2, untimed=True)).problems == ()


def _group(tmp_path, image, plan=TWICE):
    """(contrast, series) of the station that was scanned twice."""
    write_archive(tmp_path / "a.zip", image, GRID, replace(plan, localiser=False), seed=3)
    series = read_series(tmp_path / "a.zip")[0]
    low = min(each.extent_mm[0] for each in series)
    return [(contrast_of(each), each) for each in series if each.extent_mm[0] == low]


def _with(group, **changes):
    """The same series with other tags: ``tag=function(whether earlier)``."""
    changed = []
    first = min(each.acquired_s for _, each in group)
    for name, each in group:
        earlier = each.acquired_s == first
        values = {key: change(earlier) for key, change in changes.items()}
        slices = tuple(replace(one, origin=replace(one.origin, **values)) for one in each.slices)
        changed.append((name, replace(each, slices=slices)))
    return changed


@pytest.mark.parametrize(
    "tags",
    [
        {"acquired_s": lambda earlier: None},  # by SeriesTime, which differs by milliseconds between contrasts
        {"acquired_s": lambda earlier: None, "started_s": lambda earlier: None, "acquisition": lambda e: 1 if e else 2},
        {"acquired_s": lambda earlier: 9.0, "acquisition": lambda earlier: 1 if earlier else 2},  # times are of no use
        {"acquired_s": lambda earlier: 9.0, "frame": lambda earlier: "1.2" if earlier else "1.3"},
    ],
)
def test_other_tags_part_acquisitions_as_well(tmp_path, image, tags):
    group = _group(tmp_path, image)
    later = {name: each for name, each in group if each.acquired_s == max(one.acquired_s for _, one in group)}
    chosen, problems = choose_acquisition(_with(group, **tags), CONTRASTS)
    assert problems == ()
    assert {name: each.uid for name, each in chosen.items()} == {name: each.uid for name, each in later.items()}


def test_the_same_series_sent_twice_is_one(tmp_path, image):
    group = _group(tmp_path, image, ArchivePlan(stations=2))
    again = [(name, replace(each, uid=each.uid + ".1", number=each.number + 100)) for name, each in group]
    chosen, problems = choose_acquisition([*group, *again[:2]], CONTRASTS)
    assert problems == ()
    assert sorted(chosen) == sorted(CONTRASTS)


def test_two_reconstructions_of_one_acquisition_are_not_mixed(tmp_path, image):
    group = _with(_group(tmp_path, image), acquired_s=lambda earlier: 9.0)
    numbers = sorted(each.number for _, each in group)
    corrected = [
        (name, replace(each, image_type=(*each.image_type[:-1], "DIS3D")) if each.number in numbers[:4] else each)
        for name, each in group
    ]
    chosen, problems = choose_acquisition(corrected, CONTRASTS)
    assert problems == ()
    assert len({each.image_type[-1] for each in chosen.values()}) == 1


def test_a_repeated_scan_that_is_shorter_gives_way(tmp_path, image):
    group = _group(tmp_path, image)
    later = max(each.acquired_s for _, each in group)
    short = [(n, replace(e, slices=e.slices[2:]) if e.acquired_s == later else e) for n, e in group]
    chosen, problems = choose_acquisition(short, CONTRASTS)
    assert problems == ()
    assert {each.acquired_s for each in chosen.values()} == {later - 25}


def test_another_person_in_an_archive_is_refused(tmp_path, image):
    found = _stitched(tmp_path, image, ArchivePlan(stations=2, strangers=frozenset({2})))
    assert found.image is None
    (problem,) = found.problems
    assert problem.startswith("images of 2 people (PatientID) are in one place: 1000000, 10000009; give each its own")


ENDS = frozenset((2, name, 0) for name in CONTRASTS)  # the same slice of all contrasts: every grid stays regular


def test_the_manifest_tells_of_lost_end_slices(tmp_path, image):
    plan = ArchivePlan(stations=2, lost_slices=ENDS, listed=True)
    found = _stitched(tmp_path, image, plan)
    (problem,) = found.problems
    assert problem.startswith("4 of ")
    assert " files that its manifest lists are not there: 1.3.12.2.1107.5.2.18.1000000.90000.dcm, " in problem
    assert problem.endswith("download it again")
    assert _stitched(tmp_path, image, plan, manifest=False).problems == ()
    assert _stitched(tmp_path, image, ArchivePlan(stations=2, lost_slices=ENDS)).problems == ()  # nobody knows of them


@pytest.mark.parametrize("name", ["manifest.cvs", "sub/MANIFEST.CSV"])
def test_manifests_of_other_files_and_forms(tmp_path, image, name):
    write_archive(tmp_path / "a.zip", image, GRID, ArchivePlan(stations=2), seed=3)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        members = {each: archive.read(each) for each in archive.namelist()}
    lines = members.pop("manifest.cvs").decode().splitlines()
    for changed, count in (
        ("\n".join(line.replace(".dcm", "x.dcm") for line in lines), 0),  # of quite other files
        ("\r\n".join([*lines, '"/some/where/lost.dcm",MR']), 1),
        ("\n".join(lines), 0),
        ("nothing at all", 0),
    ):
        with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
            for each, content in {**members, name: changed.encode()}.items():
                archive.writestr(each, content)
        found = read_series(tmp_path / "b.zip", manifest=True)[1]
        assert len(found) == count
        assert all("1 of" in problem and "lost.dcm" in problem for problem in found)
