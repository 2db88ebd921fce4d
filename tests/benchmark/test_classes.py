"""Classes by name, scores over classes of two schemes, and sides."""

import json

import numpy as np
import pytest
from official_labels import AMOS_LABELS, BRATS_LABELS, BTCV_LABELS

from ukbob_seg.benchmark.amos import CLASSES as AMOS
from ukbob_seg.benchmark.brats import CLASSES as BRATS
from ukbob_seg.benchmark.btcv import CLASSES as BTCV
from ukbob_seg.benchmark.btcv import MERGED
from ukbob_seg.benchmark.classes import SCORED, common_name, common_values, mapped_values
from ukbob_seg.benchmark.sides import Midline, find_midline, left_mm, split_sides
from ukbob_seg.benchmark.totalvibe import TOTALVIBE_LABELS
from ukbob_seg.cli import benchmark
from ukbob_seg.dataset.image_io import Geometry, read_image, read_labels, write_labels
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import ConfigError, DatasetError

GEOMETRY = Geometry((12, 14, 40), (3.0, 1.0, 0.7), (-14.0, 3.0, 7.0))


def _scheme(labels):
    return LabelScheme.from_json({"background": 0, **labels}, None)


@pytest.mark.parametrize(
    ("name", "common"),
    [
        ("postcava", "inferior_vena_cava"),
        ("IVC", "inferior_vena_cava"),
        ("oesophagus", "esophagus"),
        ("gall_bladder", "gallbladder"),
        ("Left Kidney", "kidney_left"),
        ("left_kidney", "kidney_left"),
        ("kidney-l", "kidney_left"),
        ("rightKidney", "kidney_right"),
        ("right adrenal", "adrenal_gland_right"),
        ("left adrenal gland", "adrenal_gland_left"),
        ("adrenal_glands", "adrenal_glands"),
        ("Portal vein and splenic vein", "portal_vein_and_splenic_vein"),
        ("prostate/uterus", "prostate_uterus"),
        ("bladder", "urinary_bladder"),
        ("arota", "aorta"),
        ("RKid", "kidney_right"),
        ("Inferior Vena Cava (IVC)", "inferior_vena_cava"),
        ("kidney", None),
        ("superior_vena_cava", None),
        ("common_carotid_artery_left", None),
    ],
)
def test_names(name, common):
    assert common_name(name) == common


def test_values_are_the_organisers():
    assert {value: common_name(name) for value, name in BTCV_LABELS.items()} == {v: n for n, v in BTCV.items()}
    theirs = {int(value): common_name(name) for value, name in AMOS_LABELS.items() if value != "0"}
    assert theirs == {value: name for name, value in AMOS.items()}
    for edition, names in BRATS_LABELS.items():
        assert {value: common_name(name) for value, name in names.items()} == {v: n for n, v in BRATS[edition].items()}


@pytest.mark.parametrize(("protocol", "count"), [("ten", 10), ("btcv", 11), ("amos", 12)])
def test_every_protocol_maps_every_scheme_it_is_for(protocol, count):
    ours = mapped_values(_scheme(TOTALVIBE_LABELS), protocol, "prediction")
    assert len(ours) == len(SCORED[protocol]) == count
    assert ours["adrenal_glands"] == (8, 9)
    assert ours["inferior_vena_cava"] == (36,)
    theirs = AMOS if protocol == "amos" else BTCV
    assert mapped_values(_scheme(theirs), protocol, "reference").keys() == ours.keys()
    if protocol != "amos":
        assert mapped_values(_scheme(MERGED), protocol, "reference")["adrenal_glands"] == (12,)


def test_what_cannot_be_mapped():
    with pytest.raises(DatasetError, match="no class for kidney_left, gallbladder"):
        mapped_values(_scheme({"spleen": 1, "right kidney": 2}), "ten", "prediction")
    with pytest.raises(DatasetError, match="two classes for kidney_left: left_kidney and kidney_l"):
        common_values(_scheme({"left_kidney": 1, "kidney_l": 2}), "reference")
    with pytest.raises(ConfigError, match="regions"):
        common_values(LabelScheme.from_json({"background": 0, "spleen": [1, 2]}, [1]), "reference")
    assert common_values(_scheme({"adrenal_gland_left": 1}), "reference").keys() == {"adrenal_gland_left"}
    assert common_values(_scheme({"prostate": 1, "uterus": 4}), "reference") == {"prostate_uterus": (1, 4)}


def test_scores_of_a_foreign_scheme(tmp_path, rng, capsys):
    """Every voxel of a shared organ agrees; a class of one side alone does not count."""
    truth = rng.permutation(np.repeat(np.arange(16), GEOMETRY.shape[0] * GEOMETRY.shape[1] * 40 // 16 + 1))
    truth = truth[: np.prod(GEOMETRY.shape)].reshape(GEOMETRY.shape).astype(np.uint8)
    by_common = common_values(_scheme(TOTALVIBE_LABELS), "x")
    table = np.array([0, *(by_common[name][0] if name in by_common else 0 for name in AMOS)], dtype=np.uint8)
    table[14:] = 66  # muscle, instead of bladder and prostate
    for folder, array, labels in (("pred", table[truth], TOTALVIBE_LABELS), ("ref", truth, AMOS)):
        write_labels(array, GEOMETRY, tmp_path / folder / "labels" / "amos_0517.nii.gz")
        content = {"channel_names": {"0": "x"}, "labels": {"background": 0, **labels}, "file_ending": ".nii.gz"}
        (tmp_path / folder / "dataset.json").write_text(json.dumps(content))
    out = tmp_path / "scores"
    call = ["score", str(tmp_path / "pred/labels"), str(tmp_path / "ref/labels"), "-o", str(out)]
    assert benchmark.main([*call, "--protocol", "amos", "--workers", "1"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["classes"]) == set(SCORED["amos"])
    assert all(entry["dice"]["mean"] == 1.0 for entry in summary["classes"].values())
    assert summary["per_case"][0]["prediction"] == str(tmp_path / "pred/labels/amos_0517.nii.gz")
    assert (out / "report.html").is_file()
    adrenals = int(((truth == 11) | (truth == 12)).sum())
    assert summary["per_case"][0]["classes"]["adrenal_glands"]["n_ref"] == adrenals
    labels = ["--prediction-labels", str(tmp_path / "ref/dataset.json")]
    assert benchmark.main([*call, "--protocol", "amos", *labels]) == 2
    assert "unknown label values" in capsys.readouterr().err
    assert benchmark.main([*call, "--protocol", "ten", "--reference-labels", str(tmp_path / "no.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "pred/dataset.json").unlink()
    assert benchmark.main([*call, "--protocol", "amos"]) == 2
    assert "give it with --prediction-labels" in capsys.readouterr().err


def _turned(geometry, turn):
    """The same grid with x running to the right, or with x and z exchanged."""
    flipped = {"right": (-1, 0, 0, 0, 1, 0, 0, 0, 1), "across": (0, 0, 1, 0, 1, 0, 1, 0, 0)}.get(turn)
    if flipped is None:
        return geometry
    return Geometry(geometry.shape, geometry.spacing_mm, geometry.origin_mm, tuple(map(float, flipped)))


@pytest.mark.parametrize("turn", ["left", "right", "across"])
def test_sides_follow_the_direction_of_the_file(turn):
    geometry = _turned(GEOMETRY, turn)
    place = left_mm(np.indices(geometry.shape), geometry)
    middle = float(place.mean())
    half = (place.max() - place.min()) / 2
    one = np.zeros(geometry.shape, dtype=bool)
    one[2:10, 2:10, 2:38] = True
    merged = one & (abs(place - middle) > half / 4)
    right, left = split_sides(merged, Midline(middle, "test"), geometry)
    assert np.array_equal(right, merged & (place < middle))
    assert np.array_equal(left, merged & (place > middle))
    bridge = one & (abs(place - middle) < half / 2)
    right, left = split_sides(bridge, Midline(middle, "test"), geometry)
    assert right.sum() == pytest.approx(left.sum(), rel=0.2)
    nearly = one & (place - middle > -half / 12)  # its end crosses the middle: still one organ
    right, left = split_sides(nearly, Midline(middle, "test"), geometry)
    assert not right.any()
    assert np.array_equal(left, nearly)


def test_the_midline_by_what_is_there():
    place = left_mm(np.indices(GEOMETRY.shape), GEOMETRY)
    vessels = {"inferior_vena_cava": (place > -6) & (place < -4), "aorta": (place > 2) & (place < 4)}
    found = find_midline(vessels, lambda: pytest.fail("not needed"), GEOMETRY)
    assert found.landmark == "inferior_vena_cava and aorta"
    assert found.left_mm == pytest.approx(-1, abs=0.4)
    kidneys = {"kidney_right": place < -8, "kidney_left": place > 8, "aorta": np.zeros(GEOMETRY.shape, dtype=bool)}
    assert find_midline(kidneys, lambda: pytest.fail("not needed"), GEOMETRY).landmark == "kidney_right and kidney_left"
    body = np.where(abs(place - 2) < 8, 100.0, 0.0)
    body[0] = body[-1] = 0
    found = find_midline({}, lambda: body, GEOMETRY)
    assert found.landmark == "the body's width"
    assert found.left_mm == pytest.approx(2, abs=1.0)


@pytest.mark.parametrize(
    "landmarks", [{"inferior_vena_cava": 63, "aorta": 52}, {"kidney_right": 2, "kidney_left": 3}, {}]
)
def test_every_landmark_tells_the_adrenal_glands_of_a_real_ct_apart(landmarks, data_root):
    """Merged and divided again, every voxel has its side back, whichever landmark is there to go by."""
    folder = data_root / "totalsegmentator_ct"
    labels, geometry = read_labels(folder / "ct_labels.nii.gz")
    right, left = labels == 8, labels == 9
    assert min(right.sum(), left.sum()) > 20
    organs = {name: labels == value for name, value in landmarks.items()}
    midline = find_midline(organs, lambda: read_image([folder / "ct_0000.nii.gz"])[0][0], geometry)
    assert midline.landmark == (" and ".join(landmarks) or "the body's width")
    found = split_sides(right | left, midline, geometry)
    np.testing.assert_array_equal(found[0], right)
    np.testing.assert_array_equal(found[1], left)
