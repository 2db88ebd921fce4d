"""Features of organs against a loop over organs and closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ukbob_seg.dataset.image_io import read_labels
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.filtering.shape_features import FEATURE_COLUMNS, organ_features

SPACING = (3.0, 1.0, 0.7)


def brute_force(labels: np.ndarray, spacing_mm: tuple[float, float, float], body: float | None = None) -> pd.DataFrame:
    """The definitions written down once more, organ by organ, in the plainest way."""
    spacing = np.asarray(spacing_mm)
    body = np.count_nonzero(labels) if body is None else body
    rows = []
    for value in np.unique(labels):
        if value == 0:
            continue
        mask = np.pad(labels == value, 1)
        faces, surface = 0, 0.0
        for axis in range(3):
            exposed = sum(int((mask & ~np.roll(mask, step, axis)).sum()) for step in (-1, 1))
            faces += exposed
            surface += exposed * spacing.prod() / spacing[axis]
        points = np.argwhere(mask) * spacing
        volume = len(points) * spacing.prod()
        eccentricity = np.nan
        if len(points) > 1:
            eigenvalues = np.linalg.eigvalsh(np.cov(points.T, bias=True))
            eccentricity = np.sqrt(np.clip(1 - eigenvalues[0] / eigenvalues[-1], 0, 1))
        rows.append(
            (
                int(value),
                len(points),
                volume,
                faces,
                surface,
                len(points) / body,
                np.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / surface,
                eccentricity,
            )
        )
    return pd.DataFrame(rows, columns=list(FEATURE_COLUMNS))


def assert_same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert list(found.columns) == list(FEATURE_COLUMNS)
    assert (
        found[["label", "voxels", "faces"]].to_numpy().tolist()
        == expected[["label", "voxels", "faces"]].to_numpy().tolist()
    )
    np.testing.assert_allclose(found.to_numpy(float), expected.to_numpy(float), rtol=1e-9, atol=1e-6)


def ellipsoids(rng: np.random.Generator, dtype: type, values: list[int]) -> np.ndarray:
    """Overlapping ellipsoids, some cut by the border of the volume."""
    shape = (22, 31, 27)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    labels = np.zeros(shape, dtype)
    for value in values:
        centre, radius = rng.uniform(0, 1, 3) * shape, rng.uniform(3, 9, 3)
        labels[(((grid - centre) / radius) ** 2).sum(-1) < 1] = value
    return labels


@pytest.mark.parametrize(
    ("dtype", "values"), [(np.uint8, [3, 255, 17]), (np.uint16, [1, 300, 65535]), (np.int32, [2, 9, 65535])]
)
def test_matches_brute_force_on_anisotropic_volumes(rng: np.random.Generator, dtype: type, values: list[int]) -> None:
    labels = ellipsoids(rng, dtype, values)
    assert_same(organ_features(labels, SPACING), brute_force(labels, SPACING))
    assert_same(organ_features(labels, SPACING, body_voxels=12345), brute_force(labels, SPACING, 12345))


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=7), elements=st.integers(0, 3)))
def test_matches_brute_force_on_any_small_volume(labels: np.ndarray) -> None:
    assert_same(organ_features(labels, SPACING), brute_force(labels, SPACING))


@pytest.mark.parametrize(
    "path",
    ["Dataset141_BrainAllen/labelsTr/mni152sym.nii.gz", "Dataset005_CordLevels/labelsTr/t2.nii.gz"],
)
def test_matches_brute_force_on_real_label_maps(data_root: Path, path: str) -> None:
    labels, geometry = read_labels(data_root / path)
    box = tuple(slice(where.min(), where.max() + 1) for where in np.nonzero(labels))
    # Cropping makes organs touch the border; coarse sampling keeps the loop over 138 organs short.
    labels = labels[box][::2, ::2, ::2] if labels.size > 10**6 else labels[box]
    assert_same(organ_features(labels, geometry.spacing_mm), brute_force(labels, geometry.spacing_mm))


def test_matches_brute_force_on_hippocampus(data_root: Path) -> None:
    paths = sorted((data_root / "Dataset004_Hippocampus" / "labelsTr").glob("*.nii.gz"))[:8]
    assert paths
    for path in paths:
        labels, geometry = read_labels(path)
        assert_same(organ_features(labels, geometry.spacing_mm), brute_force(labels, geometry.spacing_mm))


def test_box_has_its_closed_form() -> None:
    shape, (sz, sy, sx) = (4, 6, 10), SPACING
    labels = np.zeros((12, 14, 16), np.uint8)
    labels[3:7, 5:11, 2:12] = 7
    row = organ_features(labels, SPACING, body_voxels=480).iloc[0]
    assert (row.label, row.voxels) == (7, 240)
    assert row.faces == 2 * (6 * 10 + 4 * 10 + 4 * 6)
    assert row.surface_mm2 == pytest.approx(2 * (60 * sy * sx + 40 * sz * sx + 24 * sz * sy))
    assert row.volume_mm3 == pytest.approx(240 * sz * sy * sx)
    assert row.normalized_volume == 0.5
    variance_mm2 = [(n * n - 1) / 12 * s * s for n, s in zip(shape, SPACING, strict=True)]
    assert row.eccentricity == pytest.approx(np.sqrt(1 - min(variance_mm2) / max(variance_mm2)), rel=1e-12)


def test_cube_that_fills_the_volume() -> None:
    row = organ_features(np.ones((5, 5, 5), np.uint8), (2.0, 2.0, 2.0)).iloc[0]
    assert row.faces == 150
    assert row.sphericity == pytest.approx((np.pi / 6) ** (1 / 3))
    assert row.eccentricity == pytest.approx(0, abs=1e-6)
    assert row.normalized_volume == 1


def test_sphericity_of_a_digital_ball_tends_to_two_thirds() -> None:
    distance = []
    for radius in (6.3, 12.3, 40.3):
        edge = np.arange(-np.ceil(radius), np.ceil(radius) + 1)
        squared = edge[:, None, None] ** 2 + edge[None, :, None] ** 2 + edge[None, None, :] ** 2
        row = organ_features((squared < radius**2).astype(np.uint8), (1.5, 1.5, 1.5)).iloc[0]
        distance.append(abs(row.sphericity - 2 / 3))
        assert row.eccentricity < 1e-6
    assert distance[-1] < 0.005
    assert distance[0] > distance[-1]


def test_memory_layout_does_not_matter(rng: np.random.Generator) -> None:
    labels = ellipsoids(rng, np.uint8, [1, 2, 3, 4])
    expected = organ_features(labels, SPACING)
    padded = np.zeros((50, 66, 60), np.uint8)
    padded[3:47:2, 2:64:2, 1:55:2] = labels
    frozen = labels.copy()
    frozen.flags.writeable = False
    layouts = {
        "Fortran": np.asfortranarray(labels),
        "strided": padded[3:47:2, 2:64:2, 1:55:2],
        "reversed": labels[::-1, :, ::-1].copy()[::-1, :, ::-1],
        "permuted": np.ascontiguousarray(labels.transpose(1, 2, 0)).transpose(2, 0, 1),
        "read-only": frozen,
        "big-endian": labels.astype(">u2"),
        "int64": labels.astype(np.int64),
    }
    for name, layout in layouts.items():
        found = organ_features(layout, SPACING)
        np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), rtol=1e-12, err_msg=name)


def test_is_invariant_to_permuting_axes_with_their_spacing(rng: np.random.Generator) -> None:
    labels = ellipsoids(rng, np.uint16, [5, 600])
    turned = organ_features(np.ascontiguousarray(labels.transpose(2, 0, 1)), (SPACING[2], SPACING[0], SPACING[1]))
    np.testing.assert_allclose(turned.to_numpy(), organ_features(labels, SPACING).to_numpy(), rtol=1e-12)


def test_moments_stay_exact_far_from_the_centre() -> None:
    labels = np.zeros((1, 2, 200_000), np.uint8)
    labels[0, :, -3:] = 1
    expected = organ_features(np.ones((1, 2, 3), np.uint8), (1.0, 1.0, 1e-3))
    assert organ_features(labels, (1.0, 1.0, 1e-3)).eccentricity[0] == expected.eccentricity[0]


def test_degenerate_organs_are_defined() -> None:
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[0, 0, 0] = 1  # one voxel, in a corner
    labels[2, 1:4, 1:4] = 2  # a plane
    labels[4, 0, 1:5] = 3  # a line
    table = organ_features(labels, SPACING).set_index("label")
    assert np.isnan(table.eccentricity[1])
    assert table.faces[1] == 6
    assert table.eccentricity[2] == table.eccentricity[3] == 1
    assert np.isfinite(table.sphericity).all()


@pytest.mark.parametrize("shape", [(4, 5, 6), (0, 5, 6), (3, 4, 0)])
def test_volume_without_labels_gives_no_rows(shape: tuple[int, int, int]) -> None:
    table = organ_features(np.zeros(shape, np.uint8), SPACING)
    assert list(table.columns) == list(FEATURE_COLUMNS)
    assert table.empty


def test_bool_mask_is_one_organ(rng: np.random.Generator) -> None:
    mask = rng.random((5, 6, 7)) < 0.4
    assert_same(organ_features(mask, SPACING), brute_force(mask.astype(np.uint8), SPACING))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("value", [-3, 65536, 2**31 - 1])
def test_value_out_of_range_is_named(dtype: type, value: int) -> None:
    labels = np.zeros((3, 3, 3), dtype)
    labels[1, 1, 1] = value
    with pytest.raises(DatasetError, match=f"value {value};"):
        organ_features(labels, SPACING)


def test_wrong_arguments_are_refused() -> None:
    labels = np.ones((3, 3, 3), np.uint8)
    with pytest.raises(DatasetError, match=r"\(3, 3\)"):
        organ_features(labels[0], SPACING)
    with pytest.raises(DatasetError, match="float32"):
        organ_features(labels.astype(np.float32), SPACING)
    with pytest.raises(DatasetError, match="too large"):
        organ_features(np.broadcast_to(np.uint8(0), (1, 1, 2**30)), SPACING)
    with pytest.raises(ConfigError, match="spacing_mm"):
        organ_features(labels, (1.0, 0.0, 1.0))
    with pytest.raises(ConfigError, match="body_voxels"):
        organ_features(labels, SPACING, body_voxels=0)


def test_more_than_two_gigavoxels() -> None:
    """A cube of 1291^3 voxels, more than 32 bits count; the array is one voxel, repeated by its strides."""
    n = 1291
    labels = np.broadcast_to(np.uint8(1), (n, n, n))
    row = organ_features(labels, (1.0, 1.0, 1.0)).iloc[0]
    assert row["voxels"] == n**3 > 2**31
    assert row["faces"] == 6 * n**2
    assert row["sphericity"] == pytest.approx(np.cbrt(np.pi / 6))
    assert row["eccentricity"] == pytest.approx(0, abs=1e-6)
