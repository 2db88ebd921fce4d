"""ukbob_ensemble's work: streamed averages against whole volumes, and everything that does not fit together."""

import json
import os

import numpy as np
import pytest

from ukbob_seg.dataset.image_io import Geometry, read_labels, write_labels
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.inference import ensemble as module
from ukbob_seg.inference.ensemble import ensemble
from ukbob_seg.parallel import Part
from ukbob_seg.preprocessing.storage import open_array, plane_writer

CLASSES = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "low": 2, "high": 300}, "file_ending": ".nii.gz"}
REGIONS = {**CLASSES, "labels": {"background": 0, "whole": [2, 7], "core": [7]}, "regions_class_order": [2, 7]}
GEOMETRY = Geometry((37, 9, 11), (3.0, 1.0, 0.7), (5.0, -7.0, 11.0), (-1.0, 0, 0, 0, -1, 0, 0, 0, 1))


def _write(folder, case, probabilities, geometry=GEOMETRY, dataset=CLASSES):
    """What ukbob_predict --save-probabilities leaves of one case."""
    values = np.asarray(probabilities, dtype=np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(dataset))
    with plane_writer(folder / f"{case}_probabilities.b2nd", values.shape, values.dtype) as writer:
        writer.append(values)
    write_labels(np.zeros(geometry.shape, np.uint8), geometry, folder / f"{case}.nii.gz")
    return values.astype(np.float64)


def _random(seed, outputs=3, regions=False, shape=GEOMETRY.shape):
    logits = np.random.default_rng(seed).normal(0, 2, (outputs, *shape))
    return 1 / (1 + np.exp(-logits)) if regions else np.exp(logits) / np.exp(logits).sum(0)


@pytest.fixture
def two(tmp_path):
    """Two folders with the cases c0 and c1."""
    for number, name in enumerate("ab"):
        for case in range(2):
            _write(tmp_path / name, f"c{case}", _random(10 * number + case))
    return [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize("weights", [None, (3, 1, 2)])
@pytest.mark.parametrize("regions", [False, True])
def test_streamed_averages_are_those_of_the_whole_volume(tmp_path, regions, weights):
    """Three models, a depth that is no multiple of a row of chunks, values past 255."""
    dataset = REGIONS if regions else CLASSES
    folders = [tmp_path / str(n) for n in range(3)]
    saved = [
        _write(folder, "c", _random(n, 2 if regions else 3, regions), dataset=dataset)
        for n, folder in enumerate(folders)
    ]
    (written,) = ensemble(folders, tmp_path / "out", weights, save_probabilities=True, quiet=True)
    mean = np.average(saved, axis=0, weights=weights)
    if regions:
        expected = np.where(mean[1] > 0.5, 7, np.where(mean[0] > 0.5, 2, 0))
    else:
        expected = np.array([0, 2, 300])[mean.argmax(0)]
    labels, geometry = read_labels(written)
    assert written == tmp_path / "out" / "c.nii.gz"
    assert GEOMETRY.difference(geometry, ("input", "output")) is None
    assert labels.dtype == (np.uint8 if regions else np.uint16)
    assert len(np.unique(expected)) == 3
    assert np.array_equal(labels, expected)
    stored = open_array(tmp_path / "out" / "c_probabilities.b2nd")
    assert stored.dtype == np.float16
    assert np.abs(stored[:] - mean).max() <= 2.0**-12  # half a step of float16 below 1
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == dataset
    assert json.loads((tmp_path / "out" / "ensemble.json").read_text()) == {
        "folders": [str(folder) for folder in folders], "weights": [float(w) for w in weights or (1, 1, 1)]
    }  # fmt: skip


def test_equal_votes_and_an_exact_half(tmp_path):
    """Of equal classes the lower one is written; a region needs more than half."""
    shape = (1, 1, 4)
    geometry = Geometry(shape, (3.0, 1.0, 0.7))
    thirds = [[[[0.1, 0.2, 0.1, 0.2]]], [[[0.6, 0.4, 0.3, 0.4]]], [[[0.3, 0.4, 0.6, 0.4]]]]
    _write(tmp_path / "a", "c", thirds, geometry)
    _write(tmp_path / "b", "c", [thirds[0], thirds[2], thirds[1]], geometry)
    (path,) = ensemble([tmp_path / "a", tmp_path / "b"], tmp_path / "o", quiet=True)
    assert (read_labels(path)[0] == 2).all()
    quarter, wide = [[[0.25, 0.5, 0.5, 0.75]]], [[[0.75, 0.5, 0.625, 0.75]]]
    _write(tmp_path / "c", "c", [wide, quarter], geometry, REGIONS)
    _write(tmp_path / "d", "c", [wide, wide], geometry, REGIONS)
    (path,) = ensemble([tmp_path / "c", tmp_path / "d"], tmp_path / "p", quiet=True)
    assert read_labels(path)[0].ravel().tolist() == [2, 0, 7, 7]  # core means 0.5, 0.5, 0.5625, 0.75


def test_a_few_planes_of_one_class_are_read_at_a_time(two, tmp_path, monkeypatch):
    read = []

    class Watched:
        def __init__(self, path, maker, **how):
            self._array = open_array(path, maker, **how)
            self.shape, self.dtype = self._array.shape, self._array.dtype

        def __getitem__(self, key):
            part = self._array[key]
            read.append(part.shape)
            return part

    monkeypatch.setattr(module, "open_array", Watched)
    ensemble(two, tmp_path / "out", quiet=True)
    assert set(read) == {(16, 9, 11), (5, 9, 11)}
    assert len(read) == 2 * 2 * 3 * 3  # cases, folders, classes, blocks: nothing is read twice


def test_resuming_leaves_finished_cases_alone(two, tmp_path):
    out = tmp_path / "out"
    first, second = ensemble(two, out, quiet=True)
    right = second.read_bytes()
    second.unlink()
    first.write_bytes(b"a finished label map")
    assert ensemble(two, out, resume=True, quiet=True) == [first, second]
    assert first.read_bytes() == b"a finished label map"
    assert second.read_bytes() == right
    with pytest.raises(ConfigError, match=r"out holds an ensemble of other folders or weights; go on with those"):
        ensemble(two, out, (2, 1), resume=True, quiet=True)
    ensemble(two, out, quiet=True)
    assert read_labels(first)[0].max() == 300


@pytest.mark.parametrize("save", [False, True])
def test_an_interrupted_case_leaves_nothing_and_finished_ones_stay(two, tmp_path, save):
    out = tmp_path / "out"
    path = two[1] / "c1_probabilities.b2nd"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255  # found when its chunk is read
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"c1_probabilities\.b2nd is damaged; .* ukbob_predict --save-probabilities"):
        ensemble(two, out, save_probabilities=save, quiet=True)
    finished = ["c0.nii.gz", *(["c0_probabilities.b2nd"] if save else [])]
    assert sorted(os.listdir(out)) == sorted([*finished, "dataset.json", "ensemble.json"])
    assert read_labels(out / "c0.nii.gz")[0].max() == 300


def test_other_weights_remove_the_label_maps_of_the_first(two, tmp_path, monkeypatch):
    """After an interruption --resume could not tell them from new ones."""
    out = tmp_path / "out"
    ensemble(two, out, save_probabilities=True, quiet=True)

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "average_case", stop)
    with pytest.raises(KeyboardInterrupt):
        ensemble(two, out, (2, 1), quiet=True)
    assert sorted(os.listdir(out)) == ["dataset.json", "ensemble.json"]


def test_parts_do_all_cases_once(two, tmp_path):
    parts = [ensemble(two, tmp_path / "out", part=Part(n, 3), quiet=True) for n in (1, 2, 3)]
    assert [[path.name for path in part] for part in parts] == [["c0.nii.gz"], ["c1.nii.gz"], []]
    with pytest.raises(ConfigError, match="other folders or weights"):  # the other parts' label maps would stay
        ensemble(two, tmp_path / "out", weights=(1, 9), part=Part(1, 3), quiet=True)


def test_folders_and_weights_that_do_not_fit(two, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"needs at least two folders, got .*a$"):
        ensemble(two[:1], out)
    with pytest.raises(ConfigError, match="needs at least two folders, got none"):
        ensemble([], out)
    with pytest.raises(ConfigError, match="a is given twice; give it more weight"):
        ensemble([*two, tmp_path / "b" / ".." / "a"], out)
    with pytest.raises(ConfigError, match="one number per folder: got 3 for 2 folders"):
        ensemble(two, out, (1, 2, 3))
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="must be positive numbers, got 1, "):
            ensemble(two, out, (1, wrong))
    with pytest.raises(ConfigError, match="is one of the folders to average"):
        ensemble(two, two[1])
    with pytest.raises(DatasetError, match="none does not exist"):
        ensemble([two[0], tmp_path / "none"], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"empty has no dataset\.json; give folders that ukbob_predict"):
        ensemble([two[0], tmp_path / "empty"], out)
    (tmp_path / "empty" / "dataset.json").write_text(json.dumps(CLASSES))
    with pytest.raises(DatasetError, match=r"empty has no CASE_probabilities\.b2nd"):
        ensemble([two[0], tmp_path / "empty"], out)
    assert not out.exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"labels": {"background": 0, "low": 2, "top": 300}}, r"labels differ: high = 300 in .*a, top = 300 in .*b \(data"),
    ({"labels": {"background": 0, "low": 2}}, r"labels differ: high = 300 in .*a, nothing more in .*b \(dataset"),
    (REGIONS, r"labels differ: low = 2, high = 300 in .*a, whole = 2\+7 \(written as 2\), core = 7 \(written as 7\) i"),
    ({"file_ending": ".mha"}, r"file_ending differs: \.nii\.gz in .*a, \.mha in .*b \(dataset"),
])  # fmt: skip
def test_datasets_that_differ(two, tmp_path, change, message):
    (two[1] / "dataset.json").write_text(json.dumps({**CLASSES, **change}))
    with pytest.raises(DatasetError, match=message):
        ensemble(two, tmp_path / "out")


def test_schemes_that_predict_the_same():
    """The order of exclusive labels and the ignore label change no output; the order of regions does."""
    classes = LabelScheme.from_json({"background": 0, "a": 1, "b": 2}, None)
    assert classes.difference(LabelScheme.from_json({"b": 2, "background": 0, "a": 1, "ignore": 3}, None), "xy") is None
    regions = LabelScheme.from_json({"background": 0, "a": [1, 2], "b": [2]}, [1, 2])
    turned = LabelScheme.from_json({"background": 0, "b": [2], "a": [1, 2]}, [2, 1])
    assert regions.difference(turned, ("x", "y")) == (
        "labels differ: a = 1+2 (written as 1), b = 2 (written as 2) in x, "
        "b = 2 (written as 2), a = 1+2 (written as 1) in y"
    )


def test_cases_that_are_not_in_all_folders(two, tmp_path):
    _write(two[0], "c7", _random(0))
    (two[0] / "c1_probabilities.b2nd").unlink()
    with pytest.raises(DatasetError, match=r"without probabilities: c1 not in .*a; c7 not in .*b; predict them with"):
        ensemble(two, tmp_path / "out")


def test_shapes_and_geometries_that_differ(two, tmp_path):
    out = tmp_path / "out"
    moved = Geometry(GEOMETRY.shape, (3.0, 1.0, 0.8), GEOMETRY.origin_mm, GEOMETRY.direction)
    _write(two[1], "c1", _random(0), moved)
    message = r"^case c1: spacing_mm differs: \(3, 1, 0\.7\) in .*a, \(3, 1, 0\.8\) in .*b; predict both"
    with pytest.raises(DatasetError, match=message):
        ensemble(two, out)
    _write(two[1], "c1", _random(0, shape=(37, 9, 12)))
    expected = r"^case c1: probabilities have shape \(3, 37, 9, 12\) in .*b, expected \(3, 37, 9, 11\) by dataset\.json"
    with pytest.raises(DatasetError, match=expected):
        ensemble(two, out)
    _write(two[1], "c0", _random(0, outputs=4))
    with pytest.raises(DatasetError, match=r"2 problems(.|\n)*case c0: .*\(4, 37, 9, 11\)(.|\n)*case c1: "):
        ensemble(two, out)
    assert not out.exists()


def test_a_missing_label_map_and_truncated_probabilities(two, tmp_path):
    path = two[1] / "c1_probabilities.b2nd"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        DatasetError, match=r"^case c1: .*b/c1_probabilities\.b2nd is damaged; delete it and run ukbob_p"
    ):
        ensemble(two, tmp_path / "out")
    (two[0] / "c1.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"case c1: .*a has no label map c1\.nii\.gz, which tells the geometry"):
        ensemble(two, tmp_path / "out")
    assert not (tmp_path / "out").exists()
