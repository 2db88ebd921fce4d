"""The ablation tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ukbob_seg.dataset.image_io import Geometry, read_labels, write_labels
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.filtering.ablation import ablate, label_dice
from ukbob_seg.filtering.bounds import learn_bounds
from ukbob_seg.filtering.cohort import solf_filter
from ukbob_seg.filtering.config import FilterConfig
from ukbob_seg.filtering.solf import flag_organs

QUIET = {"workers": 1, "quiet": True, "report": False}


@pytest.fixture
def references(cohort: Path, tmp_path: Path) -> Path:
    """True labels of ten cases; those of blob_005 have the whole second organ."""
    folder = tmp_path / "manual"
    for path in sorted((cohort / "labelsTr").glob("*.nii.gz"))[:10]:
        labels, geometry = read_labels(path)
        if path.name.startswith("blob_005"):
            labels = np.where((labels == 0) & (np.arange(labels.shape[1])[:, None] > 14), 2, labels).astype(np.uint8)
        write_labels(labels, geometry, folder / path.name)
    return folder


def test_table_agrees_with_the_rules(cohort: Path, references: Path, tmp_path: Path) -> None:
    config = FilterConfig(**QUIET)
    solf_filter(cohort, tmp_path / "solf", config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "solf").glob("*.*")}
    printed = ablate(cohort, tmp_path / "solf", config, references)
    table = pd.read_csv(tmp_path / "solf" / "ablation.csv")
    assert before == {name: (tmp_path / "solf" / name).read_bytes() for name in before}

    features = pd.read_parquet(tmp_path / "solf" / "features.parquet")
    for epsilon in range(6):
        for rule in ("solf", "volume"):
            flags = flag_organs(features, epsilon, rule)
            rows = table[(table["rule"] == rule) & (table["setting"] == epsilon)].set_index("organ")
            assert rows.loc["all organs", "flagged"] == flags["flagged"].sum()
            for organ, of_organ in flags.groupby("organ"):
                assert rows.loc[organ, "flagged"] == of_organ["flagged"].sum()
                assert rows.loc[organ, "share"] == pytest.approx(100 * of_organ["flagged"].mean())
        flags = flag_organs(features, epsilon)
        both = (flags["sphericity_outside"] & flags["eccentricity_outside"]).sum()
        rows = table[(table["rule"] == "sphericity + eccentricity") & (table["setting"] == epsilon)]
        assert rows["flagged"].iloc[0] == both
    joint = flag_organs(features, rule="joint", bounds=learn_bounds(features))
    rows = table[(table["rule"] == "joint") & (table["organ"] == "all organs")]
    assert dict(zip(rows["setting"], rows["flagged"], strict=True))[0.99] == (joint["doubt"] > 2).sum()

    none = table[(table["rule"] == "none") & (table["organ"] == "all organs")].iloc[0]
    assert none["scored"] == 20
    assert none["dice_kept"] == pytest.approx(none["dice_all"])
    solf = table[(table["rule"] == "solf") & (table["setting"] == 2) & (table["organ"] == "all organs")].iloc[0]
    assert solf["dice_flagged"] < solf["dice_kept"]
    assert "labels with a reference: 20 of 48" in printed
    assert (tmp_path / "solf" / "ablation.html").read_text().count("data:image/png;base64,") == 1


def test_without_references(cohort: Path, tmp_path: Path) -> None:
    printed = ablate(cohort, tmp_path / "solf", FilterConfig(**QUIET))
    assert "Dice" not in printed
    assert "dice_all" not in pd.read_csv(tmp_path / "solf" / "ablation.csv")
    assert not (tmp_path / "solf" / "flags.parquet").exists()


def test_dice_of_labels(rng: np.random.Generator) -> None:
    label, reference = rng.integers(0, 5, (4, 5, 6)), rng.integers(0, 3, (4, 5, 6))
    found = label_dice(label, reference)
    assert set(found) == {1, 2, 3, 4}
    for value in found:
        a, b = label == value, reference == value
        assert found[value] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_unusable_references(cohort: Path, references: Path, tmp_path: Path) -> None:
    config = FilterConfig(**QUIET)
    with pytest.raises(ConfigError, match="does not exist"):
        ablate(cohort, tmp_path / "solf", config, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"none of the 24 cases.*blob_000"):
        ablate(cohort, tmp_path / "solf", config, tmp_path / "empty")
    labels, geometry = read_labels(references / "blob_002.nii.gz")
    write_labels(labels, Geometry(geometry.shape, (9.0, 9.0, 9.0)), references / "blob_002.nii.gz")
    with pytest.raises(DatasetError, match="case blob_002: spacing_mm differs"):
        ablate(cohort, tmp_path / "solf", config, references)
    with pytest.raises(ConfigError, match="leave --bounds out"):
        ablate(cohort, tmp_path / "solf", FilterConfig(bounds_file=tmp_path / "b.json", **QUIET))
