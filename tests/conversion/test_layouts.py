"""Other layouts, in miniature: every voxel arrives, dataset.json is translated, the result verifies and plans."""

import gzip
import json

import nibabel
import numpy as np
import pytest

from ukbob_seg.cli.convert import main
from ukbob_seg.conversion.steps import merge_masks
from ukbob_seg.dataset.image_io import Geometry, read_image, read_labels, write_image, write_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.dataset.verify import verify_dataset
from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions

SHAPE = (14, 16, 12)
GRID = Geometry(SHAPE, (3.0, 1.0, 0.7), (3.0, -5.0, 7.0))


def _image(rng):
    return rng.integers(1, 1000, SHAPE).astype(np.int16)


def _label(rng, values=(1, 2)):
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[3:9, 4:12, 3:9] = values[0]
    label[5:8, 6:10, 4:7] = values[-1]
    label[tuple(rng.integers(4, 8, 3))] = values[0]
    return label


def _convert(kind, source, target, *options, code=0):
    assert main([kind, "-i", str(source), "-o", str(target), "--workers", "1", *options]) == code


def _plans(folder):
    """The package's own checks, and a plan."""
    assert verify_dataset(folder, quiet=True) == []
    roots = Roots(folder.parent, folder.parent.parent / "preprocessed", folder.parent.parent / "results")
    prepared = plan_and_preprocess(folder.name, roots, PlanOptions(memory_gb=2.0), workers=1)
    assert (prepared.folder / "plans.json").is_file()


def _json(path):
    return json.loads(path.read_text())


@pytest.fixture
def target(tmp_path):
    return tmp_path / "raw" / "Dataset004_Other"


def _decathlon(folder, modality, training, test, labels):
    content = {
        "name": "Heart", "description": "left atrium", "reference": "King's College", "licence": "CC-BY-SA 4.0",
        "release": "1.0", "tensorImageSize": "3D", "modality": modality, "labels": labels,
        "numTraining": len(training), "numTest": len(test),
        "training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in training],
        "test": [f"./imagesTs/{name}.nii.gz" for name in test],
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(content))
    return content


def _write_4d(path, channels, slope=None):
    """As the Decathlon stores several channels: (x, y, z, channel), here with a scale in the header, too."""
    affine = np.diag([-0.7, -1.0, 3.0, 1])
    affine[:3, 3] = (-3, 5, 7)
    image = nibabel.Nifti1Image(np.stack([each.T for each in channels], axis=-1), affine)
    path.parent.mkdir(parents=True, exist_ok=True)
    if slope is not None:
        image.header.set_slope_inter(slope, 3)
        with gzip.open(path, "wb") as file:
            header = image.header.copy()
            header["magic"], header["vox_offset"] = b"n+1", 352
            file.write(header.binaryblock + b"\0" * 4 + np.asarray(image.dataobj).tobytes(order="F"))
        return
    nibabel.save(image, path)


class TestDecathlon:
    def test_one_channel_is_copied_byte_by_byte(self, tmp_path, target, rng, capsys):
        source = tmp_path / "Task02_Heart"
        for name, part in (("la_003", "Tr"), ("la_004", "Tr"), ("la_001", "Ts")):
            write_image(_image(rng), GRID, source / f"images{part}" / f"{name}.nii.gz")
        for name in ("la_003", "la_004"):
            write_labels(_label(rng), GRID, source / "labelsTr" / f"{name}.nii.gz")
            (source / "imagesTr" / f"._{name}.nii.gz").write_bytes(b"of a Mac")
        labels = {"0": "background", "1": "left atrium", "2": "rest"}
        _decathlon(source, {"0": "MRI"}, ["la_003", "la_004"], ["la_001"], labels)
        _convert("msd", source, target)
        assert "3 cases converted, 0 were there already: 2 training, 1 test" in capsys.readouterr().out
        assert _json(target / "dataset.json") == {
            "name": "Heart", "channel_names": {"0": "MRI"},
            "labels": {"background": 0, "left atrium": 1, "rest": 2}, "numTraining": 2, "file_ending": ".nii.gz",
            "description": "left atrium", "reference": "King's College", "licence": "CC-BY-SA 4.0", "release": "1.0",
        }  # fmt: skip
        for part, name in (("Tr", "la_003"), ("Ts", "la_001")):
            copied = target / f"images{part}" / f"{name}_0000.nii.gz"
            assert copied.read_bytes() == (source / f"images{part}" / f"{name}.nii.gz").read_bytes()
        before = copied.stat().st_mtime_ns
        _convert("msd", source, target)
        assert "0 cases converted, 3 were there already" in capsys.readouterr().out
        _convert("msd", source, target, "--link")
        assert copied.stat().st_mtime_ns == before  # a copy is as good as a link
        _plans(target)

    def test_links_are_made_and_replaced(self, tmp_path, target, rng):
        source = tmp_path / "Task02_Heart"
        write_image(_image(rng), GRID, source / "imagesTr" / "a.nii.gz")
        write_labels(_label(rng), GRID, source / "labelsTr" / "a.nii.gz")
        _decathlon(source, {"0": "CT"}, ["a"], [], {"0": "bg", "1": "x", "2": "y"})
        _convert("msd", source, target, "--link")
        placed = target / "imagesTr" / "a_0000.nii.gz"
        assert placed.is_symlink()
        assert placed.resolve() == (source / "imagesTr" / "a.nii.gz").resolve()
        _convert("msd", source, target)
        assert not placed.is_symlink()

    @pytest.mark.parametrize("slope", [None, 0.5])
    def test_four_dimensions_are_split_without_changing_a_value(self, tmp_path, target, rng, slope):
        source = tmp_path / "Task05_Prostate"
        channels = {}
        for name in ("p_00", "p_01"):
            channels[name] = [_image(rng), _image(rng)]
            _write_4d(source / "imagesTr" / f"{name}.nii.gz", channels[name], slope)
            write_labels(_label(rng), GRID, source / "labelsTr" / f"{name}.nii.gz")
        _decathlon(source, {"0": "T2", "1": "ADC"}, list(channels), [], {"0": "background", "1": "PZ", "2": "TZ"})
        _convert("msd", source, target)
        for name, stored in channels.items():
            image, geometry = read_image([target / "imagesTr" / f"{name}_{k:04d}.nii.gz" for k in range(2)])
            expected = np.stack(stored) * (slope or 1) + (3 if slope else 0)
            assert np.array_equal(image, expected.astype(np.float32))
            assert geometry.difference(GRID, ("", "")) is None
            header = nibabel.load(target / "imagesTr" / f"{name}_0001.nii.gz").header
            assert header.get_data_dtype() == np.int16
        _plans(target)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda c: c.update(training=[{"image": "../../etc/x.nii.gz", "label": "l.nii.gz"}]), "leads out of"),
            (lambda c: c.update(training=[{"image": "imagesTr/b.nii.gz", "label": "b.nii.gz"}]), "does not exist"),
            (lambda c: c.update(training=[], test=[]), "lists no cases"),
            (lambda c: c.update(labels={"0": "background", "1": "x", "2": "x"}), "two labels have one name"),
            (lambda c: c.update(modality={"1": "MRI"}), "numbered 0, 1, 2"),
            (lambda c: c.update(modality={"0": "MRI", "1": "CT"}), "expected 2 channels"),
            (lambda c: c.pop("labels"), "needs the entries"),
            (lambda c: c.update(channel_names={"0": "MRI"}), "nnU-Net v2 already"),
        ],
    )  # fmt: skip
    def test_a_wrong_description_is_one_sentence(self, tmp_path, target, rng, capsys, change, said):
        source = tmp_path / "Task02_Heart"
        write_image(_image(rng), GRID, source / "imagesTr" / "a.nii.gz")
        write_labels(_label(rng), GRID, source / "labelsTr" / "a.nii.gz")
        content = _decathlon(source, {"0": "CT"}, ["a"], [], {"0": "background", "1": "x", "2": "y"})
        change(content)
        (source / "dataset.json").write_text(json.dumps(content))
        _convert("msd", source, target, code=2)
        assert said in capsys.readouterr().err
        assert not (target / "dataset.json").exists()

    def test_other_grids_and_damaged_files_are_named(self, tmp_path, target, rng, capsys):
        source = tmp_path / "Task02_Heart"
        for name in ("a", "b"):
            write_image(_image(rng), GRID, source / "imagesTr" / f"{name}.nii.gz")
            write_labels(_label(rng), GRID, source / "labelsTr" / f"{name}.nii.gz")
        write_labels(_label(rng), Geometry(SHAPE, (3.0, 1.0, 0.7)), source / "labelsTr" / "a.nii.gz")
        _decathlon(source, {"0": "CT"}, ["a", "b"], [], {"0": "background", "1": "x", "2": "y"})
        for _ in range(2):  # also when the files are there already
            _convert("msd", source, target, code=2)
            assert "case a: origin_mm differs" in capsys.readouterr().err
        (source / "imagesTr" / "b.nii.gz").write_bytes(b"nothing")
        _convert("msd", source, target, code=2)
        assert "b.nii.gz cannot be read" in capsys.readouterr().err


class TestFirstNnunet:
    def test_files_keep_their_names(self, tmp_path, target, rng):
        source = tmp_path / "nnUNet_raw_data" / "Task501_Two"
        for name, part in (("c1", "Tr"), ("c2", "Tr"), ("t1", "Ts")):
            for channel in range(2):
                write_image(_image(rng), GRID, source / f"images{part}" / f"{name}_{channel:04d}.nii.gz")
            write_labels(_label(rng, (1, 4)), GRID, source / f"labels{part}" / f"{name}.nii.gz")
        _decathlon(source, {"0": "T1", "1": "T2"}, ["c1", "c2"], ["t1"], {"0": "background", "1": "x", "4": "y"})
        _convert("nnunetv1", source, target)
        assert _json(target / "dataset.json")["labels"] == {"background": 0, "x": 1, "y": 4}
        for path in ("imagesTr/c1_0001.nii.gz", "labelsTr/c2.nii.gz", "imagesTs/t1_0000.nii.gz", "labelsTs/t1.nii.gz"):
            assert (target / path).read_bytes() == (source / path).read_bytes()
        _plans(target)

    def test_a_missing_channel_is_named(self, tmp_path, target, rng, capsys):
        source = tmp_path / "Task501_Two"
        write_image(_image(rng), GRID, source / "imagesTr" / "c1_0000.nii.gz")
        write_labels(_label(rng), GRID, source / "labelsTr" / "c1.nii.gz")
        _decathlon(source, {"0": "T1", "1": "T2"}, ["c1"], [], {"0": "background", "1": "x"})
        _convert("nnunetv1", source, target, code=2)
        assert "c1_0001.nii.gz is listed in dataset.json but does not exist" in capsys.readouterr().err


def _bids(folder, rng, sessions, suffixes=("T1w", "T2w"), labelled=(), pipeline="manual", names=None):
    (folder / "derivatives" / pipeline).mkdir(parents=True)
    (folder / "dataset_description.json").write_text('{"Name": "study", "BIDSVersion": "1.8.0"}')
    for session in sessions:
        anat = folder / session.replace("_", "/") / "anat"
        for suffix in suffixes:
            write_image(_image(rng), GRID, anat / f"{session}_{suffix}.nii.gz")
            (anat / f"{session}_{suffix}.json").write_text("{}")
        if session in labelled:
            there = folder / "derivatives" / pipeline / session.replace("_", "/") / "anat"
            write_labels(_label(rng, (2, 5)), GRID, there / f"{session}_space-orig_dseg.nii.gz")
    if names is not None:
        rows = "\n".join(f"{index}\t{name}\t#00ff00" for index, name in names.items())
        (folder / "derivatives" / pipeline / "dseg.tsv").write_text(f"index\tname\tcolor\n{rows}\n")
    return folder


class TestBids:
    def test_modalities_become_channels_and_sessions_cases(self, tmp_path, target, rng):
        sessions = ["sub-01_ses-a", "sub-01_ses-b", "sub-02"]
        names = {0: "Unknown", 2: "hippocampus", 5: "amygdala"}
        source = _bids(tmp_path / "study", rng, sessions, labelled=sessions[:2], names=names)
        _convert("bids", source, target)
        content = _json(target / "dataset.json")
        assert content["channel_names"] == {"0": "T1w", "1": "T2w"}
        assert content["labels"] == {"background": 0, "hippocampus": 2, "amygdala": 5}
        assert content["numTraining"] == 2
        t2 = source / "sub-01" / "ses-b" / "anat" / "sub-01_ses-b_T2w.nii.gz"
        assert (target / "imagesTr" / "sub-01_ses-b_0001.nii.gz").read_bytes() == t2.read_bytes()
        assert (target / "imagesTs" / "sub-02_0000.nii.gz").is_file()
        groups = (target / "groups.csv").read_text().split()
        assert groups == ["case,subject", "sub-01_ses-a,sub-01", "sub-01_ses-b,sub-01"]
        _plans(target)

    def test_values_without_names_are_read(self, tmp_path, target, rng):
        source = _bids(tmp_path / "study", rng, ["sub-01", "sub-02"], labelled=["sub-01", "sub-02"])
        _convert("bids", source, target, "--suffixes", "T2w")
        content = _json(target / "dataset.json")
        assert content["labels"] == {"background": 0, "label_2": 2, "label_5": 5}
        assert content["channel_names"] == {"0": "T2w"}
        assert verify_dataset(target, quiet=True) == []

    def test_plain_files_are_compressed_where_others_are(self, tmp_path, target, rng):
        source = _bids(tmp_path / "study", rng, ["sub-01", "sub-02"], ("T1w",), ["sub-01", "sub-02"])
        image = source / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
        with gzip.open(image) as file:
            content = file.read()
        image.unlink()
        image.with_name("sub-01_T1w.nii").write_bytes(content)
        _convert("bids", source, target)
        with gzip.open(target / "imagesTr" / "sub-01_0000.nii.gz") as file:
            assert file.read() == content
        assert verify_dataset(target, quiet=True) == []

    def test_choices_are_asked_for(self, tmp_path, target, rng, capsys):
        source = _bids(tmp_path / "study", rng, ["sub-01"], ("T1w",), ["sub-01"])
        for run in (1, 2):
            write_image(_image(rng), GRID, source / "sub-02" / "anat" / f"sub-02_run-{run}_T1w.nii.gz")
        _convert("bids", source, target, code=2)
        assert "sub-02: several T1w images; choose one with --entities" in capsys.readouterr().err
        _convert("bids", source, target, "--entities", "run-2")
        chosen = source / "sub-02" / "anat" / "sub-02_run-2_T1w.nii.gz"
        assert (target / "imagesTs" / "sub-02_0000.nii.gz").read_bytes() == chosen.read_bytes()
        write_labels(_label(rng), GRID, source / "derivatives" / "other" / "sub-01" / "anat" / "sub-01_dseg.nii.gz")
        _convert("bids", source, tmp_path / "raw" / "Dataset005_B", code=2)
        assert "choose one with --derivatives: there are manual, other" in capsys.readouterr().err
        options = ("--derivatives", "other", "--entities", "run-1")
        _convert("bids", source, tmp_path / "raw" / "Dataset005_B", *options)
        for option, value, said in (
            ("--derivatives", "none", "there are manual, other"),
            ("--entities", "second", "must look like run-1"),
        ):
            _convert("bids", source, tmp_path / "raw" / "Dataset006_C", option, value, code=2)
            assert said in capsys.readouterr().err

    def test_a_modality_that_no_session_has(self, tmp_path, target, rng, capsys):
        source = _bids(tmp_path / "study", rng, ["sub-01"], ("T1w",), ["sub-01"])
        _convert("bids", source, target, "--suffixes", "FLAIR", code=2)
        assert "no image is FLAIR; there are T1w" in capsys.readouterr().err

    def test_masks_and_maps_are_no_channels(self, tmp_path, target, rng, capsys):
        suffixes = ("T2w", "defacemask", "T1map", "T1w", "mask")
        source = _bids(tmp_path / "study", rng, ["sub-01", "sub-02"], suffixes, ["sub-01"])
        _convert("bids", source, target)
        assert "channels: T1w, T2w (others with --suffixes; there are also T1map)" in capsys.readouterr().out
        assert _json(target / "dataset.json")["channel_names"] == {"0": "T1w", "1": "T2w"}
        other = tmp_path / "raw" / "Dataset005_B"
        _convert("bids", source, other, "--suffixes", "T1map", "T1w")
        assert _json(other / "dataset.json")["channel_names"] == {"0": "T1map", "1": "T1w"}
        _convert("bids", source, tmp_path / "raw" / "Dataset006_C", "--suffixes", "T1w", "defacemask", code=2)
        assert "defacemask is no image that could be a channel" in capsys.readouterr().err

    def test_maps_alone_have_to_be_asked_for(self, tmp_path, target, rng, capsys):
        source = _bids(tmp_path / "study", rng, ["sub-01"], ("T1map", "MESE"), ["sub-01"])
        _convert("bids", source, target, code=2)
        assert "choose with --suffixes: MESE, T1map" in capsys.readouterr().err

    def test_contradictions_and_gaps_are_named(self, tmp_path, target, rng, capsys):
        source = _bids(tmp_path / "study", rng, ["sub-01"], ("T1w",), ["sub-01"], names={2: "a", 5: "b"})
        table = source / "derivatives" / "manual" / "sub-01" / "anat" / "sub-01_dseg.tsv"
        table.write_text("index\tname\n2\tz\n")
        _convert("bids", source, target, code=2)
        assert "value 2 is 'a' in" in capsys.readouterr().err
        table.unlink()
        (source / "sub-01" / "anat" / "sub-01_T1w.nii.gz").unlink()
        write_image(_image(rng), GRID, source / "sub-02" / "anat" / "sub-02_T1w.nii.gz")
        _convert("bids", source, target, code=2)
        assert "sub-01: segmented, but not all of T1w are there" in capsys.readouterr().err
        _convert("bids", tmp_path, target, code=2)
        assert "lies in the source" in capsys.readouterr().err


def _masks(folder, organs, image, kind="ct"):
    write_image(image, GRID, folder / f"{kind}.nii.gz")
    for name, mask in organs.items():
        write_labels(mask.astype(np.uint8), GRID, folder / "segmentations" / f"{name}.nii.gz")


def _organs():
    organs = {name: np.zeros(SHAPE, dtype=bool) for name in ("liver", "aorta", "spleen")}
    organs["liver"][2:10, 2:12, 2:10] = True
    organs["aorta"][4:8, 5:7, 5:7] = True  # wholly inside the liver's mask
    organs["spleen"][9:12, 11:14, 9:11] = True  # shares 1 x 1 x 1 with the liver
    return organs


class TestTotalSegmentator:
    def test_masks_become_one_map_and_overlaps_are_counted(self, tmp_path, target, rng, capsys):
        source, organs = tmp_path / "Total", _organs()
        for name in ("s0000", "s0001", "s0002"):
            _masks(source / name, organs, _image(rng))
        (source / "meta.csv").write_text("image_id;age;split\ns0000;50;train\ns0001;60;val\ns0002;70;test\n")
        _convert("totalsegmentator", source, target)
        said = capsys.readouterr().out
        assert "2 training, 1 test, 1 channel, 3 classes" in said
        assert f"{3 * 17} voxels were in several masks" in said  # 16 of the aorta and 1 of the spleen
        content = _json(target / "dataset.json")
        assert content["channel_names"] == {"0": "CT"}
        assert content["labels"] == {"background": 0, "aorta": 1, "liver": 2, "spleen": 3}
        labels, _ = read_labels(target / "labelsTr" / "s0000.nii.gz")
        expected = np.zeros(SHAPE, dtype=np.uint8)
        expected[organs["liver"]] = 2
        expected[organs["aorta"]] = 1
        expected[organs["spleen"]] = 3
        assert np.array_equal(labels, expected)
        rows = (target / "overlaps.csv").read_text().split()
        assert rows[0] == "case,kept_by,lost_by,voxels"
        assert set(rows[1:3]) == {"s0000,aorta,liver,16", "s0000,spleen,liver,1"}
        assert (target / "labelsTs" / "s0002.nii.gz").is_file()
        before = (target / "labelsTr" / "s0000.nii.gz").stat().st_mtime_ns
        _convert("totalsegmentator", source, target)
        assert (target / "labelsTr" / "s0000.nii.gz").stat().st_mtime_ns == before
        _plans(target)

    def test_chosen_classes_and_mri(self, tmp_path, target, rng, capsys):
        source, organs = tmp_path / "Total", _organs()
        _masks(source / "s0000", organs, _image(rng), "mri")
        write_image(_image(rng), GRID, source / "s0001" / "mri.nii.gz")  # without masks: a test case
        _convert("totalsegmentator", source, target, "--classes", "spleen", "aorta")
        assert _json(target / "dataset.json")["labels"] == {"background": 0, "spleen": 1, "aorta": 2}
        assert _json(target / "dataset.json")["channel_names"] == {"0": "MRI"}
        labels, _ = read_labels(target / "labelsTr" / "s0000.nii.gz")
        assert np.array_equal(labels, organs["spleen"] * 1 + organs["aorta"] * 2)
        assert (target / "imagesTs" / "s0001_0000.nii.gz").is_file()
        other = tmp_path / "raw" / "Dataset005_B"
        _convert("totalsegmentator", source, other, "--classes", "heart", code=2)
        assert "no subject has heart; there are aorta, liver, spleen" in capsys.readouterr().err

    def test_missing_masks_and_other_grids(self, tmp_path, target, rng, capsys):
        source, organs = tmp_path / "Total", _organs()
        _masks(source / "s0000", organs, _image(rng))
        _masks(source / "s0001", {"liver": organs["liver"]}, _image(rng))
        _convert("totalsegmentator", source, target, code=2)
        assert "case s0001: no mask of aorta, spleen; add the masks" in capsys.readouterr().err
        _convert("totalsegmentator", source, target, "--allow-missing")
        assert set(np.unique(read_labels(target / "labelsTr" / "s0001.nii.gz")[0])) == {0, 2}
        wrong = Geometry(SHAPE, (3.0, 1.0, 0.8), GRID.origin_mm)
        write_labels(organs["aorta"].astype(np.uint8), wrong, source / "s0000" / "segmentations" / "aorta.nii.gz")
        _convert("totalsegmentator", source, target, "--allow-missing", code=2)
        assert "case s0000" in (said := capsys.readouterr().err)
        assert "spacing_mm differs" in said
        _masks(source / "s0003", organs, _image(rng), "mri")
        _convert("totalsegmentator", source, target, code=2)
        assert "CT and MRI" in capsys.readouterr().err
        (tmp_path / "empty").mkdir()
        _convert("totalsegmentator", tmp_path / "empty", target, code=2)
        assert "no subjects" in capsys.readouterr().err


def test_the_smallest_mask_keeps_a_voxel_whatever_the_order(rng):
    masks = [np.flatnonzero(rng.random(500) < share) for share in (0.5, 0.1, 0.9, 0.3)]
    labels, overlaps = merge_masks(list(enumerate(masks, 1)), 500)
    sizes = {value: len(mask) for value, mask in enumerate(masks, 1)}
    for voxel in range(500):
        holders = [value for value, mask in enumerate(masks, 1) if voxel in mask]
        assert labels[voxel] == (min(holders, key=sizes.get) if holders else 0)
    claims = sum(len(mask) for mask in masks)
    assert sum(overlaps.values()) == claims - np.count_nonzero(labels)
    equal, _ = merge_masks([(1, np.array([0, 1])), (2, np.array([1, 2]))], 4)
    assert equal.tolist() == [1, 2, 2, 0]
    many, _ = merge_masks([(300, np.array([2]))], 4)
    assert many.tolist() == [0, 0, 300, 0]


def test_help_of_every_subcommand(capsys):
    for name in ("ukbb", "msd", "nnunetv1", "bids", "totalsegmentator"):
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert "example:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--link", "msd"])
    assert stop.value.code == 2


def test_a_real_scan_split_into_masks_comes_back(data_root, tmp_path, target):
    """A real CT with TotalSegmentator's labels, in the layout in which TotalSegmentator publishes them."""
    labels, geometry = read_labels(data_root / "totalsegmentator_ct" / "ct_labels.nii.gz")
    values = [int(value) for value in np.unique(labels) if value][:12]
    subject = tmp_path / "Total" / "s0007"
    (subject / "segmentations").mkdir(parents=True)
    (subject / "ct.nii.gz").write_bytes((data_root / "totalsegmentator_ct" / "ct_0000.nii.gz").read_bytes())
    for value in values:
        write_labels(
            (labels == value).astype(np.uint8), geometry, subject / "segmentations" / f"organ_{value:03d}.nii.gz"
        )
    _convert("totalsegmentator", tmp_path / "Total", target, "--link")
    found, grid = read_labels(target / "labelsTr" / "s0007.nii.gz")
    expected = np.zeros_like(labels)
    for number, value in enumerate(values, 1):
        expected[labels == value] = number
    assert np.array_equal(found, expected)
    assert grid.difference(geometry, ("", "")) is None
    assert (target / "overlaps.csv").read_text().count("\n") == 1  # nothing overlaps
    assert verify_dataset(target, quiet=True) == []


def test_the_real_hippocampus_task_in_its_first_layout(data_root, tmp_path, target):
    """Task 4 of the Decathlon, a few cases, under the names that they have there."""
    source, task = data_root / "Dataset004_Hippocampus", tmp_path / "Task04_Hippocampus"
    labels = sorted((source / "labelsTr").glob("hippocampus_*.nii.gz"))[:3]
    names = [path.name.removesuffix(".nii.gz") for path in labels]
    (task / "imagesTr").mkdir(parents=True)
    (task / "labelsTr").mkdir()
    for name, path in zip(names, labels, strict=True):
        image = (source / "imagesTr" / f"{name}_0000.nii.gz").read_bytes()
        (task / "imagesTr" / f"{name}.nii.gz").write_bytes(image)
        (task / "labelsTr" / f"{name}.nii.gz").write_bytes(path.read_bytes())
    _decathlon(task, {"0": "MRI"}, names, [], {"0": "background", "1": "Anterior", "2": "Posterior"})
    _convert("msd", task, target)
    for name in names:
        placed = target / "imagesTr" / f"{name}_0000.nii.gz"
        assert placed.read_bytes() == (source / "imagesTr" / f"{name}_0000.nii.gz").read_bytes()
    _plans(target)
