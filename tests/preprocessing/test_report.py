"""The report of preprocessing: its numbers, its pictures, and what it says when something is missing."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ukbob_seg.dataset.image_io import Geometry, read_image, read_labels, write_image, write_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import DatasetError
from ukbob_seg.preprocessing.fingerprint import Fingerprint
from ukbob_seg.preprocessing.fingerprint_cases import STORE
from ukbob_seg.preprocessing.pipeline import Prepared, plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan
from ukbob_seg.preprocessing.report import write_report

OPTIONS = PlanOptions(memory_gb=2)


def prepare(folder: Path, **options: object) -> Prepared:
    roots = Roots.below(folder.parents[1])
    return plan_and_preprocess(7, roots, OPTIONS, workers=1, **{"report": True, **options})  # type: ignore[arg-type]


def page_of(prepared: Prepared) -> str:
    return (prepared.folder / "report.html").read_text()


def text_of(page: str) -> str:
    return re.sub(r"<[^>]+>", " ", re.sub(r"<img[^>]*>|<style>.*?</style>", " ", page, flags=re.DOTALL))


def row_of(page: str, name: str) -> list[str]:
    """Cells of the first table row that starts with a name (as HTML)."""
    found = re.search(rf"<tr><td>{re.escape(name)}</td>(.*?)</tr>", page)
    assert found is not None, name
    return re.findall(r"<td>(.*?)</td>", found[1])


def one_voxel_labels(folder: Path, count: int) -> None:
    """Give the dataset ``count`` classes, most of one voxel; the last is absent."""
    path = folder / "labelsTr" / "blob_000.nii.gz"
    labels, geometry = read_labels(path)
    labels[0, 0, : count - 3] = np.arange(3, count)
    write_labels(labels, geometry, path)


def test_numbers_are_those_of_the_files(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(cases=5, spacing_mm=(3.0, 1.0, 0.7), channel_names=("T1", "CT"))
    prepared = prepare(folder)
    page, text = page_of(prepared), text_of(page_of(prepared))
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 1 + 3 + 1 + 2  # patches, cases, sizes, a histogram per channel
    for value, name in ((1, "first"), (2, "second")):
        masks, means, volumes = [], [], []
        for case in range(5):
            labels, geometry = read_labels(folder / "labelsTr" / f"blob_{case:03d}.nii.gz")
            image, _ = read_image([folder / "imagesTr" / f"blob_{case:03d}_{k:04d}.nii.gz" for k in range(2)])
            masks.append(int((labels == value).sum()))
            means.append(image[:, labels == value].mean(axis=1, dtype=float))
            volumes.append(masks[-1] * np.prod(geometry.spacing_mm) / 1000)
        cells = row_of(page, name)
        assert cells[:4] == [str(value), "5", f"{np.median(masks):,.0f}", f"{np.median(volumes):.3g}"]
        assert [float(v) for v in cells[4:]] == pytest.approx(np.median(means, axis=0), rel=1e-3)
    for statistics in prepared.fingerprint.intensities:
        assert f"mean {statistics.mean:.4g}, sd {statistics.std:.4g}, median {statistics.median:.4g}" in text
    entry = prepared.plans.normalization[1]
    assert row_of(page, "CT")[:2] == ["ct", f"{entry.clip_low:.4g} to {entry.clip_high:.4g}"]
    assert row_of(page, "spacing, mm") == ["3 x 1 x 0.7"] * 3
    assert row_of(page, "size, voxels") == ["24 x 28 x 20"] * 3
    cropped = np.array([case.cropped_shape for case in prepared.fingerprint.cases])
    assert row_of(page, "cropped to nonzero, voxels")[1] == " x ".join(map(str, cropped.min(axis=0)))
    network = prepared.plans.configurations["3d_fullres"].networks["swin_unetr"]
    cells = row_of(page, "3d_fullres")
    assert cells[0] == "swin_unetr"
    assert " x ".join(map(str, network.patch_size)) in cells
    assert cells[-1] == "5 of 5"
    assert all(reason.replace("'", "&#x27;") in page for reason in prepared.plans.reasons)
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    assert "24 x 28 x 20 voxels of 3 x 1 x 0.7 mm" in text


def test_a_report_can_be_had_later_and_equals_the_first(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(cases=3)
    first = prepare(folder)
    page = page_of(first)
    (first.folder / "report.html").unlink()
    assert prepare(folder, report=False).cases_done == 0
    assert not (first.folder / "report.html").exists()
    assert prepare(folder).cases_done == 0
    assert page_of(first) == page
    assert write_report(folder, first.folder) == first.folder / "report.html"


def test_names_are_escaped_and_many_classes_named(make_dataset: Callable[..., Path]) -> None:
    names = {"background": 0, "first": 1, "second": 2, **{f"<b>organ & {k}</b>": k for k in range(3, 15)}}
    folder = make_dataset(cases=1, labels=names)
    one_voxel_labels(folder, 14)
    page = page_of(prepare(folder))
    assert "<b>organ" not in page
    for k in range(3, 14):
        assert row_of(page, f"&lt;b&gt;organ &amp; {k}&lt;/b&gt;")[:3] == [str(k), "1", "1"]
    assert row_of(page, "&lt;b&gt;organ &amp; 14&lt;/b&gt;") == ["14", "absent", "-", "-", "-"]
    assert "A row per class" in page
    assert "the only case" in page
    assert "Fewer than 5 cases" in page


def test_regions_and_ignored_voxels(make_dataset: Callable[..., Path]) -> None:
    regions = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    folder = make_dataset(cases=2, labels=regions, regions_class_order=[1, 2])
    path = folder / "labelsTr" / "blob_000.nii.gz"
    labels, geometry = read_labels(path)
    labels[:, :, 0] = 3
    write_labels(labels, geometry, path)
    page = page_of(prepare(folder))
    both = [int((read_labels(folder / "labelsTr" / f"blob_{k:03d}.nii.gz")[0] % 3 > 0).sum()) for k in range(2)]
    assert row_of(page, "whole")[:3] == ["1, 2", "2", f"{np.median(both):,.0f}"]
    assert "ignore" not in re.findall(r"<tr><td>(.*?)</td>", page)
    assert "the smaller case" in page
    assert "the larger case" in page


def test_case_without_foreground(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(cases=1)
    path = folder / "labelsTr" / "blob_000.nii.gz"
    labels, geometry = read_labels(path)
    write_labels(np.zeros_like(labels), geometry, path)
    page = page_of(prepare(folder, allow_empty=True))
    assert "no foreground; the middle slice is shown" in page
    assert row_of(page, "first")[1] == "absent"
    assert not re.search(r"\bnan\b", text_of(page), re.IGNORECASE)


def test_cases_unlike_the_others_are_named(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(cases=8)
    for case, spacing, direction in (
        (3, (5.0, 1.0, 1.0), (1, 0, 0, 0, 1, 0, 0, 0, 1)),
        (6, (1.0, 1.0, 1.0), (0, -1, 0, 1, 0, 0, 0, 0, 1)),
    ):
        geometry = Geometry((24, 28, 20), spacing, direction=tuple(map(float, direction)))
        for part, suffix in (("images", "_0000"), ("labels", "")):
            path = folder / f"{part}Tr" / f"blob_{case:03d}{suffix}.nii.gz"
            if part == "images":
                write_image(read_image([path])[0][0], geometry, path)
            else:
                write_labels(read_labels(path)[0], geometry, path)
    page = page_of(prepare(folder))
    assert row_of(page, "blob_003")[:3] == ["spacing z, mm", "5", "1"]
    assert "Axis that runs left-right: x in 7, y in 1 of 8 cases." in page
    assert "Others: blob_006." in page
    assert "<td>blob_001</td>" not in page


def test_what_cannot_be_read_is_said_in_place_of_the_picture(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(cases=3)
    prepared = prepare(folder)
    whole = page_of(prepared).count("<img")
    (folder / "imagesTr" / "blob_000_0000.nii.gz").write_bytes(b"broken")
    (folder / "imagesTr" / "blob_001_0000.nii.gz").unlink()
    (prepared.folder / "3d_fullres" / "blob_002.b2nd").unlink()
    write_report(folder, prepared.folder)
    page = page_of(prepared)
    assert re.search(r"<p>blob_000 [^<]*cannot be read", page)
    assert re.search(r"<p>blob_001 [^<]*no longer in the raw dataset", page)
    assert re.search(r"<p>blob_002 [^<]*no picture of 3d_fullres", page)
    assert page.count("<img") == whole - 2


def test_damaged_array_and_missing_readings(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(cases=1)
    prepared = prepare(folder)
    array = prepared.folder / "3d_fullres" / "blob_000.b2nd"
    stamp = array.stat()
    array.write_bytes(b"\0" * stamp.st_size)
    os.utime(array, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # damage that size and time do not show
    (prepared.folder / STORE).unlink()
    write_report(folder, prepared.folder)
    page = page_of(prepared)
    assert "blob_000.b2nd is damaged" in page
    assert "lacks 1 of 1 cases; run with --verify" in page
    assert "Intensities" not in page


def test_plans_that_were_not_preprocessed(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(cases=2)
    prepared = prepare(folder, configurations=())
    page = page_of(prepared)
    assert row_of(page, "3d_fullres")[-1] == "0 of 2"
    assert "before 24 x 28 x 20" in page
    assert "after (" not in page
    prepare(folder, report=False)
    other = PlanOptions(memory_gb=2, spacing_mm=(2.0, 2.0, 2.0))
    plan_and_preprocess(7, Roots.below(folder.parents[1]), other, configurations=(), workers=1, report=True)
    assert "not preprocessed, or from other files or plans" in page_of(prepared)


def test_other_kinds_of_configurations(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(cases=2, spacing_mm=(3.0, 1.0, 0.7))
    prepared = prepare(folder, report=False)
    network = NetworkPlan((1, 64, 64), 4, {}, 1.0)
    flat = ConfigurationPlan((3.0, 1.0, 1.0), (24, 28, 20), 3, {"plain_conv_unet": network}, slice_axis=0)
    second = ConfigurationPlan(
        (3.0, 1.0, 0.7), (24, 28, 20), 3, {"swin_unetr": network}, previous_stage="2d", arrays_of="3d_fullres"
    )
    plans = prepared.plans
    more = {
        **plans.configurations,
        "2d": flat,
        "cascade": second,
        "bare": ConfigurationPlan((1, 1, 1), (9, 9, 9), 1, {}),
    }
    dataclasses.replace(plans, configurations=more).save(prepared.folder / "plans.json")
    write_report(folder, prepared.folder)
    page = page_of(prepared)
    assert row_of(page, "2d")[0] == "plain_conv_unet"
    assert row_of(page, "cascade")[-1] == "2 of 2"
    for sentence in ("slices across z", "segmentation of 2d is a further input", "uses the arrays of 3d_fullres"):
        assert sentence in page


def test_missing_fingerprint_is_one_sentence(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"fingerprint .* does not exist"):
        write_report(make_dataset(cases=1), tmp_path / "nothing")


def test_real_cases(data_root: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "Dataset141_BrainAllen").symlink_to(data_root / "Dataset141_BrainAllen")
    roots = Roots.below(tmp_path)
    prepared = plan_and_preprocess(141, roots, OPTIONS, configurations=(), workers=1, report=True)
    page = page_of(prepared)
    names = DatasetSpec.load(roots.raw / "Dataset141_BrainAllen").labels.names
    assert len(names) == 138
    assert all(row_of(page, name.replace("&", "&amp;").replace("'", "&#x27;"))[1] == "1" for name in names)
    assert Fingerprint.load(prepared.folder / "fingerprint.json") == prepared.fingerprint
    assert page.count("A row per class") == 2 * 4  # caption and alternative text
