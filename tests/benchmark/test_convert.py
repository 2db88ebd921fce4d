"""What conversions write, keep and refuse."""

import json
import os
import shutil

import nibabel
import numpy as np
import pytest
from official_labels import AMOS_LABELS

from ukbob_seg.benchmark.brats import ORDER, REGIONS, VALUES
from ukbob_seg.benchmark.convert import convert
from ukbob_seg.benchmark.protocol import ConvertOptions
from ukbob_seg.benchmark.totalvibe import TOTALVIBE_LABELS
from ukbob_seg.cli import benchmark
from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.dataset.labels import LabelScheme, left_right_pairs
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.dataset.spec import DatasetSpec, require_cases
from ukbob_seg.errors import ConfigError, DatasetError


@pytest.fixture
def roots(tmp_path):
    """Empty ones."""
    return Roots.below(tmp_path)


def _edit(path, change):
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(change(np.asarray(image.dataobj).copy()), image.affine), path)


def test_btcv_is_clipped_and_merged(btcv, roots):
    done = convert("btcv", btcv, 610, roots, workers=1)
    assert done.cases == {"Tr": 5, "Va": 0, "Ts": 2}
    spec = DatasetSpec.load(done.folder)
    assert spec.labels.names[-1] == "adrenal_glands"
    assert len(spec.labels.names) == 12
    assert spec.content["benchmark"]["intensities_clipped_to"] == [-175, 250]
    for case in require_cases(done.folder, spec):
        image, geometry = read_image(case.images)
        source, original = read_image([btcv / "RawData/Training/img" / f"img{case.name[-4:]}.nii.gz"])
        assert (image.min(), image.max()) == (-175, 250)
        assert np.array_equal(image, source.clip(-175, 250))
        assert geometry.difference(original, ("a", "b")) is None
        labels, _ = read_labels(case.label)
        truth, _ = read_labels(btcv / "RawData/Training/label" / f"label{case.name[-4:]}.nii.gz")
        assert np.array_equal(labels, np.minimum(truth, 12))


def test_btcv_with_separate_adrenal_glands_copies_the_labels(btcv, roots):
    done = convert("btcv", btcv, 610, roots, ConvertOptions(separate_adrenals=True), workers=1)
    official = btcv / "RawData/Training/label/label0001.nii.gz"
    assert (done.folder / "labelsTr/btcv_0001.nii.gz").read_bytes() == official.read_bytes()
    assert len(DatasetSpec.load(done.folder).labels.names) == 13


def test_a_conversion_goes_on_where_it_stopped(btcv, roots):
    first = convert("btcv", btcv, 610, roots, workers=1)
    assert (first.converted, first.kept) == (7, 0)
    times = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*.nii.gz")}
    gone = first.folder / "labelsTr/btcv_0003.nii.gz"
    gone.unlink()
    changed = btcv / "RawData/Testing/img/img0061.nii.gz"
    later = changed.stat().st_mtime + 100
    os.utime(changed, (later, later))
    again = convert("btcv", btcv, 610, roots, workers=1)
    assert (again.converted, again.kept) == (2, 5)
    redone = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert redone == {gone, first.folder / "imagesTs/btcv_0061_0000.nii.gz"}


def test_several_workers_do_the_same(amos, tmp_path):
    one, two = (
        convert("amos", amos, 611, Roots.below(tmp_path / str(n)), ConvertOptions(modality="all"), workers=n)
        for n in (1, 2)
    )
    files = sorted(path.relative_to(one.folder) for path in one.folder.rglob("*.*"))
    assert files == sorted(path.relative_to(two.folder) for path in two.folder.rglob("*.*"))
    assert all((one.folder / path).read_bytes() == (two.folder / path).read_bytes() for path in files)


@pytest.mark.parametrize(
    ("options", "cases", "channel", "classes"),
    [
        (ConvertOptions(), (5, 1, 2), "rescale_to_0_1", 13),
        (ConvertOptions(modality="ct"), (1, 1, 1), "CT", 13),
        (ConvertOptions(modality="all", all_organs=True), (6, 2, 3), "rescale_to_0_1", 15),
        (ConvertOptions(validation=True), (6, 0, 2), "rescale_to_0_1", 13),
    ],
)
def test_amos_options(amos, roots, options, cases, channel, classes):
    done = convert("amos", amos, 611, roots, options, workers=1)
    assert tuple(done.cases.values()) == cases
    spec = DatasetSpec.load(done.folder)
    assert spec.channel_names == (channel,)
    assert len(spec.labels.names) == classes
    found = require_cases(done.folder, spec)
    assert len(found) == cases[0]
    official = amos / "labelsTr" / found[0].label.name
    if classes == 15:
        assert found[0].label.read_bytes() == official.read_bytes()
    else:
        labels, truth = read_labels(found[0].label)[0], read_labels(official)[0]
        assert np.array_equal(labels, np.where(truth > 13, 0, truth))
    image = found[0].images[0]
    assert image.read_bytes() == (amos / "imagesTr" / official.name).read_bytes()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({**AMOS_LABELS, "8": "postcava", "9": "arota"}, "value 8 is postcava, in AMOS 2022 it is aorta"),
        ({"0": "background", "1": "spleen"}, "value 2 is nothing"),
        (None, "does not say what label values mean"),
        ({name: int(value) for value, name in AMOS_LABELS.items()}, None),
    ],
)
def test_amos_of_other_values_is_refused(amos, roots, labels, message):
    (amos / "dataset.json").write_text(json.dumps({} if labels is None else {"labels": labels}))
    if message is None:
        assert convert("amos", amos, 611, roots, workers=1)
        return
    with pytest.raises(DatasetError, match=message):
        convert("amos", amos, 611, roots, workers=1)


def test_links_and_copies_replace_each_other(amos, roots):
    done = convert("amos", amos, 611, roots, link=True, workers=1)
    image = done.folder / "imagesTr/amos_0507_0000.nii.gz"
    assert image.resolve() == (amos / "imagesTr/amos_0507.nii.gz").resolve()
    again = convert("amos", amos, 611, roots, workers=1)
    assert again.converted == 8
    assert not image.is_symlink()


@pytest.mark.parametrize("edition", ["2023", "2021"])
def test_brats(brats, roots, edition):
    source = brats(edition)
    done = convert("brats", source, 612, roots, workers=1)
    assert done.cases == {"Tr": 5, "Va": 0, "Ts": 2}
    spec = DatasetSpec.load(done.folder)
    assert spec.content["benchmark"]["edition"] == edition == done.edition
    name = "BraTS-GLI-00000-000" if edition == "2023" else "BraTS2021_00000"
    labels, _ = read_labels(done.folder / "labelsTr" / f"{name}.nii.gz")
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    groups = (done.folder / "groups.csv").read_text().splitlines()
    subjects = {line.split(",")[1] for line in groups[1:]}
    assert len(subjects) == (4 if edition == "2023" else 5)
    for split in json.loads((roots.preprocessed / done.folder.name / "splits.json").read_text()):
        both = {"BraTS-GLI-00000-000", "BraTS-GLI-00000-001"}
        assert not both & set(split["train"]) or not both & set(split["val"])


def test_brats_without_test_cases(brats, roots):
    done = convert("brats", brats("2023") / "TrainingData", 612, roots, workers=1)
    assert done.cases == {"Tr": 5, "Va": 0, "Ts": 0}


@pytest.mark.parametrize("edition", ["2023", "2021"])
def test_the_order_of_regions_gives_the_values_back(edition):
    """Regions of the truth, written in order, are the truth."""
    scheme = LabelScheme.from_json({"background": 0, **REGIONS}, ORDER)
    theirs = np.array([0, *VALUES[edition]])
    ours = np.array([0, *VALUES[edition].values()])
    regions = scheme.region_table[:, scheme.to_indices(ours)]
    written = np.zeros_like(ours)
    for inside, value in zip(regions, scheme.region_values, strict=True):
        written[inside] = value
    assert written.tolist() == ours.tolist()
    back = {value: key for key, value in VALUES[edition].items()}
    assert [back.get(int(value), 0) for value in written] == theirs.tolist()


def test_ukbob_has_72_classes_and_five_folds(ukbob72, roots):
    source = ukbob72(False)
    done = convert("ukbob72", source, 620, roots, workers=1)
    spec = DatasetSpec.load(done.folder)
    assert spec.labels.num_outputs == 73
    assert spec.channel_names == ("fat", "water", "inphase", "outphase")
    assert len(json.loads((roots.preprocessed / done.folder.name / "splits.json").read_text())) == 5
    first = done.folder / "imagesTr/scan_0000000_0002.nii.gz"
    assert first.read_bytes() == (source / "scan_0000000/inphase.nii.gz").read_bytes()


def test_the_names_are_those_of_the_papers_list(data_root):
    names = json.loads((data_root / "totalvibe_labels.json").read_text())
    assert {str(value): name for name, value in TOTALVIBE_LABELS.items()} | {"0": "background"} == names
    assert len(left_right_pairs(tuple(TOTALVIBE_LABELS))) == 19


DAMAGE = {
    "missing label": ("btcv", lambda f: (f / "RawData/Training/label/label0002.nii.gz").unlink(), "label0002.nii.gz"),
    "label alone": ("btcv", lambda f: (f / "RawData/Training/img/img0002.nii.gz").unlink(), "no image img0002.nii.gz"),
    "unknown value": (
        "btcv", lambda f: _edit(f / "RawData/Training/label/label0002.nii.gz", lambda a: a + 9),
        "label0002.nii.gz: unexpected label values 14, 15",
    ),
    "other grid": (
        "btcv", lambda f: _edit(f / "RawData/Training/label/label0002.nii.gz", lambda a: a[:-1]), "shape differs",
    ),
    "another layout": ("btcv", lambda f: shutil.rmtree(f / "RawData/Training"), "Training/img/img0001.nii.gz"),
    "AMOS without label": ("amos", lambda f: (f / "labelsTr/amos_0508.nii.gz").unlink(), "labelsTr/amos_0508.nii.gz"),
    "AMOS twice": (
        "amos", lambda f: shutil.copy(f / "imagesTr/amos_0508.nii.gz", f / "imagesTs"), "is in imagesTr as well",
    ),
    "AMOS without dataset.json": ("amos", lambda f: (f / "dataset.json").unlink(), "there is no dataset.json"),
    "AMOS without MRI": (
        "amos", lambda f: [path.unlink() for path in f.glob("*/amos_05*")], "holds no case of --modality mri",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_folders_are_refused_with_the_files_name(damage, request, roots):
    name, spoil, message = DAMAGE[damage]
    source = request.getfixturevalue(name)
    spoil(source)
    with pytest.raises(DatasetError, match=message):
        convert(name, source, 610, roots, workers=1)
    assert not list(roots.raw.glob("*/dataset.json"))  # nothing takes it for a dataset


def test_bad_brats_folders_are_refused(brats, roots):
    source = brats("2023")
    case = source / "TrainingData/BraTS-GLI-00002-000"
    (case / f"{case.name}-t2w.nii.gz").unlink()
    (case / f"{case.name}-seg.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"t2w\.nii\.gz does not exist") as caught:
        convert("brats", source, 612, roots, workers=1)
    assert "no label file" in str(caught.value)
    with pytest.raises(DatasetError, match="no case with a label"):
        convert("brats", source / "ValidationData", 612, roots, workers=1)
    (source / "TrainingData/BraTS2021_00000").mkdir()
    with pytest.raises(DatasetError, match="2021 and 2023"):
        convert("brats", source, 612, roots, workers=1)


def test_other_datasets_are_left_alone(btcv, amos, roots):
    (roots.raw / "Dataset610_Mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match="number 610 belongs to"):
        convert("btcv", btcv, 610, roots, workers=1)
    mine = roots.raw / "Dataset611_BTCV" / "imagesTr"
    mine.mkdir(parents=True)
    with pytest.raises(ConfigError, match="not made by this command"):
        convert("btcv", btcv, 611, roots, workers=1)
    convert("btcv", btcv, 612, roots, workers=1)
    with pytest.raises(ConfigError, match="with other options"):
        convert("btcv", btcv, 612, roots, ConvertOptions(separate_adrenals=True), workers=1)
    shutil.copy(
        roots.raw / "Dataset612_BTCV/imagesTs/btcv_0061_0000.nii.gz",
        roots.raw / "Dataset612_BTCV/imagesTr/x_0000.nii.gz",
    )
    with pytest.raises(DatasetError, match=r"x_0000\.nii\.gz"):
        convert("btcv", btcv, 612, roots, workers=1)


def test_options_of_other_protocols_are_refused(btcv, tmp_path, capsys):
    flags = ["-d", "610", "--raw", str(tmp_path / "raw"), "--preprocessed", str(tmp_path / "pre")]
    assert benchmark.main(["convert", "btcv", str(btcv), *flags, "--all-organs", "--modality", "ct"]) == 2
    assert "--all-organs, --modality does not apply to btcv" in capsys.readouterr().err
    assert benchmark.main(["convert", "btcv", str(tmp_path / "none"), *flags]) == 2
    assert "is no folder" in capsys.readouterr().err
