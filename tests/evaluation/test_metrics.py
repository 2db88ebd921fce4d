"""Metrics against closed forms, hand-made masks, brute force, MONAI and SimpleITK; always with unequal spacing."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial import cKDTree

from ukbob_seg.dataset.image_io import read_labels
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.evaluation.metrics import (
    COUNTS,
    METRICS,
    VOLUMES,
    absent_from_both,
    evaluate_case,
    present_values,
)
from ukbob_seg.evaluation.surface import boundary_distances, boundary_voxels

SPACING = (3.0, 1.0, 0.7)


def volume(shape: tuple[int, int, int] = (12, 14, 16)) -> np.ndarray:
    return np.zeros(shape, dtype=np.uint8)


def box(start: tuple[int, int, int], size: tuple[int, int, int], value: int = 1) -> np.ndarray:
    labels = volume()
    labels[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = value
    return labels


def blobs(rng: np.random.Generator, shape: tuple[int, int, int] = (20, 24, 28), classes: int = 3) -> np.ndarray:
    fields = gaussian_filter(rng.normal(size=(classes + 1, *shape)), (0, 2, 3, 3))
    fields[0] += 0.3 * fields.std()
    return fields.argmax(0).astype(np.uint8)


def brute_force(predicted: np.ndarray, true: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> dict:
    """Everything from the definitions, voxel by voxel."""

    def boundary(mask: np.ndarray) -> np.ndarray:
        inside = {tuple(v) for v in np.argwhere(mask)}
        steps = [s for s in itertools.product((-1, 0, 1), repeat=3) if sum(map(abs, s)) == 1]
        return np.array(
            [v for v in sorted(inside) if any((v[0] + a, v[1] + b, v[2] + c) not in inside for a, b, c in steps)]
        )

    surfaces = [boundary(mask) * np.asarray(spacing) for mask in (predicted, true)]
    gaps = np.sqrt(((surfaces[0][:, None] - surfaces[1][None]) ** 2).sum(-1))
    there, back = gaps.min(1), gaps.min(0)
    return {
        "dice": 2 * (predicted & true).sum() / (predicted.sum() + true.sum()),
        "iou": (predicted & true).sum() / (predicted | true).sum(),
        "hd": max(there.max(), back.max()),
        "hd95": max(np.percentile(there, 95), np.percentile(back, 95)),
        "assd": (there.sum() + back.sum()) / (len(there) + len(back)),
        "nsd": ((there <= tolerance).sum() + (back <= tolerance).sum()) / (len(there) + len(back)),
        "precision": (predicted & true).sum() / predicted.sum(),
        "recall": (predicted & true).sum() / true.sum(),
    }


def test_two_single_voxels_have_the_distance_between_their_centres() -> None:
    found = evaluate_case(box((2, 3, 4), (1, 1, 1)), box((4, 6, 8), (1, 1, 1)), SPACING, {"organ": 1})["organ"]
    distance = math.sqrt((2 * 3.0) ** 2 + (3 * 1.0) ** 2 + (4 * 0.7) ** 2)
    assert found["hd"] == found["hd95"] == found["assd"] == pytest.approx(distance, abs=1e-12)
    assert found["dice"] == found["iou"] == found["nsd"] == found["precision"] == found["recall"] == 0
    assert (found["n_pred"], found["n_ref"], found["tp"], found["fp"], found["fn"]) == (1, 1, 0, 1, 1)
    assert found["volume_pred_mm3"] == found["volume_ref_mm3"] == pytest.approx(2.1)


@pytest.mark.parametrize(("axis", "step"), [(0, 3.0), (1, 1.0), (2, 0.7)])
def test_a_shifted_box_has_closed_forms(axis: int, step: float) -> None:
    size = (5, 6, 7)
    start = [2, 3, 4]
    start[axis] += 2
    found = evaluate_case(box(tuple(start), size), box((2, 3, 4), size), SPACING, [1])[1]
    share = 1 - 2 / size[axis]
    assert found["dice"] == pytest.approx(share)
    assert found["iou"] == pytest.approx(share / (2 - share))
    assert found["precision"] == found["recall"] == pytest.approx(share)
    assert found["hd"] == pytest.approx(2 * step)
    assert found["volume_ref_mm3"] == pytest.approx(5 * 6 * 7 * 2.1)


def test_percentile_is_per_direction_and_mean_is_pooled() -> None:
    """One voxel against a row of five: directed distances [0] and [0, 1, 2, 3, 4] mm."""
    found = evaluate_case(box((2, 3, 4), (1, 1, 1)), box((2, 3, 4), (1, 5, 1)), SPACING, [1], tolerance_mm=1.0)[1]
    assert found["hd"] == 4
    assert found["hd95"] == pytest.approx(3.8)  # pooled, it would be 3.75
    assert found["assd"] == pytest.approx(10 / 6)
    assert found["nsd"] == pytest.approx(3 / 6)
    assert found["dice"] == pytest.approx(2 / 6)


def test_tolerance_includes_its_bound_whatever_the_rounding_of_the_spacing() -> None:
    far = box((2, 3, 7), (1, 1, 1))
    spacing = (3.0, 1.0, float(np.float32(0.7)))  # as a NIfTI header gives it
    for tolerance, expected in ((2.1, 1.0), (2.09, 0.0), (2.11, 1.0)):
        assert evaluate_case(box((2, 3, 4), (1, 1, 1)), far, spacing, [1], tolerance)[1]["nsd"] == expected


def test_boundary_voxels_of_a_block_inside_and_at_the_border() -> None:
    block = box((2, 2, 2), (5, 6, 7)) == 1
    assert boundary_voxels(block).sum() == 5 * 6 * 7 - 3 * 4 * 5
    full = np.ones((5, 6, 7), dtype=bool)
    assert boundary_voxels(full).sum() == 5 * 6 * 7 - 3 * 4 * 5
    assert not boundary_voxels(np.zeros((3, 3, 3), dtype=bool)).any()
    corner = np.ones((3, 3, 3), dtype=bool)
    corner[0, 0, 0] = False  # a diagonal neighbour does not make the centre a boundary voxel
    assert not boundary_voxels(corner)[1, 1, 1]


def test_an_object_at_the_border_scores_like_the_same_object_inside(rng: np.random.Generator) -> None:
    prediction, reference = blobs(rng), blobs(rng)
    padded = [np.pad(labels, 3) for labels in (prediction, reference)]
    inner = evaluate_case(prediction, reference, SPACING, [1, 2, 3])
    outer = evaluate_case(padded[0], padded[1], SPACING, [1, 2, 3])
    assert inner == outer


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0.02, 0.9))
def test_random_masks_match_brute_force(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    maps = [np.where(rng.random((5, 6, 7)) < density, rng.integers(1, 4, (5, 6, 7)), 0) for _ in range(2)]
    result = evaluate_case(maps[0], maps[1], SPACING, {"one": 1, "two": 2, "both": (1, 3)}, tolerance_mm=1.5)
    for name, values in (("one", (1,)), ("two", (2,)), ("both", (1, 3))):
        predicted, true = (np.isin(labels, values) for labels in maps)
        if predicted.any() and true.any():
            for metric, expected in brute_force(predicted, true, SPACING, 1.5).items():
                assert result[name][metric] == pytest.approx(expected, abs=1e-9), (name, metric)


def kd_tree(predicted: np.ndarray, true: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Directed surface distances with scipy's erosion and a kd-tree."""
    points = [np.argwhere(np.pad(m, 1) ^ binary_erosion(np.pad(m, 1))) * np.asarray(spacing) for m in (predicted, true)]
    return cKDTree(points[1]).query(points[0])[0], cKDTree(points[0]).query(points[1])[0]


def test_large_blobs_match_a_kd_tree(rng: np.random.Generator) -> None:
    prediction, reference = blobs(rng, (40, 50, 60)), blobs(rng, (40, 50, 60))
    result = evaluate_case(prediction, reference, SPACING, [1, 2, 3])
    for value in (1, 2, 3):
        there, back = kd_tree(prediction == value, reference == value, SPACING)
        pooled = np.concatenate([there, back])
        assert result[value]["hd"] == pytest.approx(pooled.max())
        assert result[value]["hd95"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
        assert result[value]["assd"] == pytest.approx(pooled.mean())
        assert result[value]["nsd"] == pytest.approx((pooled <= 2).mean())


@pytest.mark.filterwarnings("ignore::FutureWarning:monai")
@pytest.mark.parametrize("real", [False, True])
def test_agrees_with_monai(real: bool, rng: np.random.Generator, request: pytest.FixtureRequest) -> None:
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")
    if real:
        folder = request.getfixturevalue("data_root") / "Dataset004_Hippocampus" / "labelsTs"
        reference, _ = read_labels(sorted(folder.glob("*.nii.gz"))[0])
        prediction = np.roll(reference, (1, -1, 2), (0, 1, 2))
    else:
        prediction, reference = blobs(rng), blobs(rng)
    classes = [int(v) for v in np.unique(reference) if v]
    # An object at the volume's border: both definitions count beyond the volume as outside.
    onehot = [
        torch.as_tensor(np.stack([labels == c for c in (0, *classes)])[None].astype(np.float32))
        for labels in (prediction, reference)
    ]
    result = evaluate_case(prediction, reference, SPACING, classes, tolerance_mm=1.9)
    expected = {
        "dice": metrics.compute_dice(*onehot, include_background=False),
        "iou": metrics.compute_iou(*onehot, include_background=False),
        "hd": metrics.compute_hausdorff_distance(*onehot, spacing=SPACING),
        "hd95": metrics.compute_hausdorff_distance(*onehot, spacing=SPACING, percentile=95),
        "assd": metrics.compute_average_surface_distance(*onehot, symmetric=True, spacing=SPACING),
        "nsd": metrics.compute_surface_dice(*onehot, class_thresholds=[1.9] * len(classes), spacing=SPACING),
    }
    for metric, values in expected.items():
        ours = [result[c][metric] for c in classes]
        np.testing.assert_allclose(ours, values[0].numpy(), rtol=2e-5, atol=2e-5, err_msg=metric)


@pytest.mark.parametrize("x_centre", [14, 18, 25])
def test_agrees_with_simpleitk_where_the_definitions_do(x_centre: float) -> None:
    """SimpleITK measures from all voxels of one object to the other object; for convex ones that is the same."""
    sitk = pytest.importorskip("SimpleITK")
    z, y, x = np.indices((16, 30, 40))
    prediction = ((z - 6) / 4.2) ** 2 + ((y - 10) / 7) ** 2 + ((x - 12) / 9) ** 2 < 1
    reference = ((z - 9) / 5) ** 2 + ((y - 17) / 9) ** 2 + ((x - x_centre) / 8) ** 2 < 1
    images = [sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in (prediction, reference)]
    for image in images:
        image.SetSpacing(SPACING[::-1])
    hausdorff, overlap = sitk.HausdorffDistanceImageFilter(), sitk.LabelOverlapMeasuresImageFilter()
    hausdorff.Execute(*images)
    overlap.Execute(*images)
    ours = evaluate_case(prediction, reference, SPACING, [1])[1]
    assert ours["hd"] == pytest.approx(hausdorff.GetHausdorffDistance(), rel=1e-5)
    assert ours["dice"] == pytest.approx(overlap.GetDiceCoefficient(1))
    assert ours["iou"] == pytest.approx(overlap.GetJaccardCoefficient(1))


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Voxels with a face neighbour outside, as defined in the docs; beyond the volume is outside."""
    inner = np.pad(mask, 1)
    for axis in range(3):
        for step in (1, -1):
            inner = inner & np.roll(np.pad(mask, 1), step, axis)
    return mask & ~inner[1:-1, 1:-1, 1:-1]


def _degenerate() -> dict[str, np.ndarray]:
    shape = (7, 9, 11)
    masks = {name: np.zeros(shape, bool) for name in ("voxel", "plane", "line", "corners", "shell")}
    masks["voxel"][3, 4, 5] = True
    masks["plane"][2] = True
    masks["line"][:, 4, 6] = True
    masks["corners"][::6, ::8, ::10] = True
    masks["shell"][1:6, 1:8, 1:10] = True
    masks["shell"][3, 4, 5] = False
    return {**masks, "full": np.ones(shape, bool)}


def test_agrees_with_simpleitk_on_boundaries_whatever_the_shapes(rng: np.random.Generator) -> None:
    """Between the boundary voxels of both maps its distance is ours: random, sparse, degenerate objects."""
    sitk = pytest.importorskip("SimpleITK")
    masks = [*_degenerate().values(), *(rng.random((7, 9, 11)) < share for share in (0.02, 0.3, 0.7))]
    for one, two in itertools.permutations(masks, 2):
        images = [sitk.GetImageFromArray(_boundary(mask).astype(np.uint8)) for mask in (one, two)]
        for image in images:
            image.SetSpacing(SPACING[::-1])
        hausdorff = sitk.HausdorffDistanceImageFilter()
        hausdorff.Execute(*images)
        ours = evaluate_case(one.astype(np.uint8), two.astype(np.uint8), SPACING, [1])[1]
        assert ours["hd"] == pytest.approx(hausdorff.GetHausdorffDistance(), rel=1e-5, abs=1e-5)


def test_agrees_with_simpleitk_on_real_labels(data_root: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    path = sorted((data_root / "Dataset004_Hippocampus" / "labelsTs").glob("*.nii.gz"))[0]
    labels, geometry = read_labels(path)
    moved = np.roll(labels, (1, -2, 1), (0, 1, 2))
    found = evaluate_case(moved, labels, geometry.spacing_mm, [1, 2])
    for value in (1, 2):
        images = [sitk.GetImageFromArray(_boundary(m == value).astype(np.uint8)) for m in (moved, labels)]
        for image in images:
            image.SetSpacing([float(mm) for mm in geometry.spacing_mm[::-1]])
        hausdorff = sitk.HausdorffDistanceImageFilter()
        hausdorff.Execute(*images)
        assert found[value]["hd"] == pytest.approx(hausdorff.GetHausdorffDistance(), rel=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_what_the_docs_say_of_monai_and_absent_classes() -> None:
    """An invented class has no Dice there, and a missed or invented one no HD95."""
    torch, metrics = pytest.importorskip("torch"), pytest.importorskip("monai.metrics")
    empty, full = torch.zeros(1, 1, 6, 6, 6), torch.zeros(1, 1, 6, 6, 6)
    full[..., 2:4, 2:4, 2:4] = 1
    assert torch.isnan(metrics.compute_dice(full, empty, include_background=True)).all()
    assert metrics.compute_dice(empty, full, include_background=True) == 0
    for pair in ((full, empty), (empty, full)):
        distance = metrics.compute_hausdorff_distance(*pair, include_background=True, percentile=95)
        assert torch.isnan(distance).all()


def test_swapping_the_maps_swaps_precision_and_recall_only(rng: np.random.Generator) -> None:
    one, other = blobs(rng), blobs(rng)
    ahead, back = evaluate_case(one, other, SPACING, [2])[2], evaluate_case(other, one, SPACING, [2])[2]
    assert ahead["precision"] == back["recall"]
    for metric in ("dice", "iou", "hd", "hd95", "nsd", "tp"):
        assert ahead[metric] == back[metric]
    assert ahead["assd"] == pytest.approx(back["assd"])


def test_equal_maps_are_perfect(rng: np.random.Generator) -> None:
    labels = blobs(rng)
    for metrics in evaluate_case(labels, labels.copy(), SPACING, [1, 2, 3], tolerance_mm=0.0).values():
        assert [metrics[m] for m in ("dice", "iou", "nsd", "precision", "recall")] == [1] * 5
        assert [metrics[m] for m in ("hd", "hd95", "assd", "fp", "fn")] == [0] * 5


def test_absent_classes() -> None:
    full = box((2, 2, 2), (3, 3, 3))
    both = evaluate_case(full, full, SPACING, {"organ": 1, "absent": 7})["absent"]
    assert list(both) == list(METRICS)
    assert all(both[m] == 0 if m in (*VOLUMES, *COUNTS) else math.isnan(both[m]) for m in METRICS)
    assert str(absent_from_both()) == str(both)
    missed = evaluate_case(volume(), full, SPACING, [1])[1]
    invented = evaluate_case(full, volume(), SPACING, [1])[1]
    for metrics in (missed, invented):
        assert [metrics[m] for m in ("dice", "iou", "nsd")] == [0, 0, 0]
        assert [metrics[m] for m in ("hd", "hd95", "assd")] == [math.inf] * 3
    assert math.isnan(missed["precision"])
    assert missed["recall"] == 0
    assert math.isnan(invented["recall"])
    assert invented["precision"] == 0
    assert (missed["fn"], invented["fp"]) == (27, 27)


def test_ignored_voxels_leave_both_maps(rng: np.random.Generator) -> None:
    prediction, reference = blobs(rng), blobs(rng)
    ignored = rng.random(reference.shape) < 0.2
    ignored[:4] = True
    masked = evaluate_case(np.where(ignored, 0, prediction), np.where(ignored, 0, reference), SPACING, [1, 2, 3])
    marked = np.where(ignored, 255, reference).astype(np.uint8)
    assert evaluate_case(prediction, marked, SPACING, [1, 2, 3], ignore_value=255) == masked
    assert evaluate_case(prediction, marked, SPACING, [1, 2, 3]) != masked


def test_regions_are_unions_and_may_overlap(rng: np.random.Generator) -> None:
    prediction, reference = blobs(rng), blobs(rng)
    regions = evaluate_case(prediction, reference, SPACING, {"whole": (1, 2, 3), "core": [3, 2], "tip": 3})
    for name, values in (("whole", (1, 2, 3)), ("core", (2, 3)), ("tip", (3,))):
        masks = (np.isin(labels, values) for labels in (prediction, reference))
        assert regions[name] == evaluate_case(*masks, SPACING, [1])[1]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64])
def test_integer_types_and_unlisted_values_do_not_matter(dtype: type, rng: np.random.Generator) -> None:
    prediction, reference = blobs(rng), blobs(rng)
    expected = evaluate_case(np.where(prediction == 2, 0, prediction), reference, SPACING, [1, 3])
    prediction = prediction.astype(dtype)
    prediction[prediction == 2] = -1 if np.dtype(dtype).kind == "i" else 99
    assert evaluate_case(prediction, reference.astype(dtype), SPACING, [1, 3]) == expected


def test_background_and_large_values_can_be_scored(rng: np.random.Generator) -> None:
    prediction, reference = blobs(rng), blobs(rng)
    result = evaluate_case(prediction, reference, SPACING, [0, 1])
    assert result[0] == evaluate_case(prediction == 0, reference == 0, SPACING, [1])[1]
    large = [np.where(labels == 1, 60000, 0).astype(np.int32) for labels in (prediction, reference)]
    assert evaluate_case(*large, SPACING, [60000])[60000] == result[1]


def test_many_real_classes_against_a_shifted_copy(data_root: Path) -> None:
    path = next((data_root / "Dataset141_BrainAllen" / "labelsTr").glob("*.nii.gz"))
    reference = read_labels(path)[0]
    prediction = np.roll(reference, (0, 0, 2), (0, 1, 2))
    values = present_values(reference)
    assert len(values) == 138
    result = evaluate_case(prediction, reference, SPACING, values)
    sizes = np.bincount(reference.ravel(), minlength=142)
    hits = np.bincount(reference[reference == prediction], minlength=142)
    for value, metrics in result.items():
        assert metrics["n_ref"] == metrics["n_pred"] == sizes[value]
        assert metrics["tp"] == hits[value]
        assert metrics["dice"] == pytest.approx(hits[value] / sizes[value])
        assert metrics["assd"] <= metrics["hd95"] + 1e-9
        assert metrics["hd95"] <= metrics["hd"] <= 2 * 0.7 + 1e-9  # every voxel has its copy two voxels further
    for value in values[::23]:
        there, back = kd_tree(prediction == value, reference == value, SPACING)
        assert result[value]["hd"] == pytest.approx(max(there.max(), back.max()))
        assert result[value]["assd"] == pytest.approx(np.concatenate([there, back]).mean())


def test_present_values() -> None:
    assert present_values(np.array([[[0, 5, 300]]], dtype=np.uint16)) == [5, 300]
    assert present_values(np.array([[[0, -2, 70000]]], dtype=np.int32)) == [-2, 70000]
    assert present_values(volume()) == []


def test_bad_input_is_named() -> None:
    labels = volume()
    with pytest.raises(DatasetError, match=r"shape differs: \(12, 14, 15\) in the reference, \(12, 14, 16\)"):
        evaluate_case(labels, labels[:, :, 1:], SPACING, [1])
    with pytest.raises(DatasetError, match=r"prediction must be a .* array of integers, got shape .* of float64"):
        evaluate_case(labels.astype(float), labels, SPACING, [1])
    with pytest.raises(DatasetError, match="reference must be"):
        evaluate_case(labels, labels[0], SPACING, [1])
    for spacing in ((1, 1), (1, 0, 1), (1, 1, math.nan)):
        with pytest.raises(ConfigError, match="spacing_mm"):
            evaluate_case(labels, labels, spacing, [1])
    for tolerance in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="tolerance_mm"):
            evaluate_case(labels, labels, SPACING, [1], tolerance)
    for bad in ({"a": ()}, {"a": -1}, {"a": 70000}, {"a": 1.5}, {"a": (True,)}):
        with pytest.raises(ConfigError, match="label 'a'"):
            evaluate_case(labels, labels, SPACING, bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at most 2048"):
        evaluate_case(labels, labels, SPACING, range(1, 3000))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), density=st.sampled_from([0.001, 0.01, 0.1, 0.7]))
def test_distances_of_sparse_objects_match_a_kd_tree(seed: int, density: float) -> None:
    """Few voxels far apart: whole rows and planes hold no boundary, and envelopes have one parabola or many."""
    rng = np.random.default_rng(seed)
    spacing = rng.uniform(0.3, 5.0, 3)
    maps = [(rng.random((9, 17, 13)) < density).astype(np.uint8) for _ in range(2)]
    for labels in maps:
        labels[tuple(rng.integers(0, labels.shape))] = 1
    surfaces = [np.argwhere(boundary_voxels(labels.astype(bool))) * spacing for labels in maps]
    there, back = boundary_distances(maps[0], maps[1], [1], spacing)
    np.testing.assert_allclose(there, cKDTree(surfaces[1]).query(surfaces[0])[0], atol=1e-9)
    np.testing.assert_allclose(back, cKDTree(surfaces[0]).query(surfaces[1])[0], atol=1e-9)


def test_values_below_zero_are_background_and_hide_nothing() -> None:
    """-1 in the reference is no ignore value: what is predicted there counts as invented."""
    labels = box((2, 3, 4), (2, 2, 2)).astype(np.int16)
    found = evaluate_case(labels, np.full_like(labels, -1), SPACING, [1])[1]
    assert (found["n_pred"], found["fp"], found["n_ref"]) == (8, 8, 0)


def test_volume_differences_are_signed_and_relative_to_the_reference() -> None:
    two, five = box((2, 3, 4), (1, 1, 2)), box((2, 3, 4), (1, 5, 1))
    found = evaluate_case(two, five, SPACING, [1])[1]
    assert found["volume_difference_mm3"] == pytest.approx(-3 * 2.1)
    assert found["relative_volume_difference"] == pytest.approx(-0.6)
    missed, invented = evaluate_case(volume(), five, SPACING, [1])[1], evaluate_case(five, volume(), SPACING, [1])[1]
    assert missed["relative_volume_difference"] == -1
    assert invented["volume_difference_mm3"] == pytest.approx(5 * 2.1)
    assert math.isnan(invented["relative_volume_difference"])


def test_several_tolerances_give_what_each_gives_alone(rng: np.random.Generator) -> None:
    maps = blobs(rng), blobs(rng)
    together = evaluate_case(*maps, SPACING, [1, 2], tolerance_mm=(2.0, 0.5))
    for label, found in together.items():
        alone = [evaluate_case(*maps, SPACING, [1, 2], tolerance_mm=t)[label]["nsd"] for t in (2.0, 0.5)]
        assert [found["nsd_2mm"], found["nsd_0.5mm"]] == alone
        assert found["nsd"] == alone[0] > alone[1]
    absent = evaluate_case(*maps, SPACING, [9], tolerance_mm=(2.0, 0.5))[9]
    assert math.isnan(absent["nsd_2mm"])
    with pytest.raises(ConfigError, match="different"):
        evaluate_case(*maps, SPACING, [1], tolerance_mm=(1.0, 1.0))
